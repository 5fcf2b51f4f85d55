/* SPDX-License-Identifier: Apache-2.0 */
#include "ingress.h"

#include <linux/if_packet.h>
#include <sys/socket.h>

uint32_t ingress_overruns(struct ingress *ingress)
{
    struct tpacket_stats statistics;
    socklen_t size = sizeof(statistics);

    if (!ingress->statistics)
        return 0;
    if (getsockopt(ingress->fd, SOL_PACKET, PACKET_STATISTICS, &statistics, &size) < 0) {
        ingress->statistics = false;
        return 0;
    }
    return statistics.tp_drops;
}

void ingress_judge(struct frame *frame, uint32_t status, uint8_t packet_type)
{
    if (packet_type == PACKET_OTHERHOST)
        frame->reason = DROP_OTHER_HOST;
    if (status & TP_STATUS_VLAN_VALID)
        frame->reason = DROP_VLAN_TAGGED;
    frame->checksum_vouched = status & (TP_STATUS_CSUM_VALID | TP_STATUS_CSUMNOTREADY);
}

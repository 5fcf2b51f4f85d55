/* SPDX-License-Identifier: Apache-2.0 */
#include "ingress.h"

#include <linux/if_packet.h>
#include <linux/virtio_net.h>
#include <string.h>
#include <sys/socket.h>

#ifndef VIRTIO_NET_HDR_GSO_UDP_L4
#define VIRTIO_NET_HDR_GSO_UDP_L4 5 /* linux/virtio_net.h, from Linux 6.2 on */
#endif

enum { VLAN_ID_MASK = 0xfff }; /* IEEE 802.1Q; an id of 0 is a priority and no VLAN */

static_assert(sizeof(struct virtio_net_hdr) == VIRTIO_HEADER, "as in linux/virtio_net.h");

uint32_t ingress_overruns(struct ingress *ingress)
{
    struct tpacket_stats statistics;
    socklen_t size = sizeof(statistics);

    if (ingress->kind->sockets)
        return ingress->kind->sockets->overruns(ingress);
    if (!ingress->statistics)
        return 0;
    if (getsockopt(ingress->fd, SOL_PACKET, PACKET_STATISTICS, &statistics, &size) < 0) {
        ingress->statistics = false;
        return 0;
    }
    return statistics.tp_drops;
}

bool ingress_has_virtio(int fd)
{
    int on = 0;
    socklen_t size = sizeof(on);

    return getsockopt(fd, SOL_PACKET, PACKET_VNET_HDR, &on, &size) == 0 && on;
}

void ingress_judge(struct frame *frame, uint32_t status, uint16_t vlan_tci, uint8_t packet_type, bool whole,
                   const uint8_t *virtio)
{
    if (virtio) {
        struct virtio_net_hdr header;

        memcpy(&header, virtio, sizeof(header));
        /* Other kinds that a UDP packet can be of (VIRTIO_NET_HDR_GSO_UDP) are one datagram, still to be fragmented. */
        if (header.gso_type == VIRTIO_NET_HDR_GSO_UDP_L4)
            frame->segment = header.gso_size;
    }
    if (!whole)
        frame->reason = frame->segment ? DROP_MERGED : DROP_OVERSIZE;
    if (packet_type == PACKET_OTHERHOST)
        frame->reason = DROP_OTHER_HOST;
    if (status & TP_STATUS_VLAN_VALID)
        frame->vlan = vlan_tci & VLAN_ID_MASK;
    frame->checksum_vouched = status & (TP_STATUS_CSUM_VALID | TP_STATUS_CSUMNOTREADY);
}

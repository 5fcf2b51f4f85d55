/* SPDX-License-Identifier: Apache-2.0 */
#include "egress.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void sends_init(struct sends *sends)
{
    memset(sends, 0, sizeof(*sends));
    for (uint16_t i = 0; i < SENDS_MAX; i++)
        sends->all[i].next_free = i + 1;
}

uint16_t sends_prepare(struct sends *sends, struct io_uring_sqe *sqe, int fd, const struct table_output *output,
                       const struct packet *packet, struct ingress *ingress, uint32_t slot)
{
    uint16_t index = sends->first_free;
    struct send *send = &sends->all[index];
    struct cmsghdr *control = (struct cmsghdr *)send->control;
    int ttl = output->ttl ? output->ttl : packet->ttl > 1 ? packet->ttl - 1 : 1;

    sends->first_free = send->next_free;
    sends->in_flight++;
    send->ingress = ingress;
    send->slot = slot;
    send->output = output->counter;
    send->payload.iov_base = (void *)(uintptr_t)packet->payload; /* read only by a send */
    send->payload.iov_len = packet->payload_length;
    send->address.sin_family = AF_INET;
    send->address.sin_port = htons(output->port);
    send->address.sin_addr.s_addr = output->address.words[3];
    /* IP_TTL as a control message also holds for multicast (ip(7) names only IP_MULTICAST_TTL, a per-socket value). */
    control->cmsg_level = IPPROTO_IP;
    control->cmsg_type = IP_TTL;
    control->cmsg_len = CMSG_LEN(sizeof(ttl));
    memcpy(CMSG_DATA(control), &ttl, sizeof(ttl));
    send->message.msg_name = &send->address;
    send->message.msg_namelen = sizeof(send->address);
    send->message.msg_iov = &send->payload;
    send->message.msg_iovlen = 1;
    send->message.msg_control = send->control;
    send->message.msg_controllen = sizeof(send->control);
    io_uring_prep_sendmsg(sqe, fd, &send->message, MSG_DONTWAIT | MSG_NOSIGNAL);
    return index;
}

const struct send *sends_finish(struct sends *sends, uint16_t index)
{
    struct send *send;

    if (index >= SENDS_MAX || sends->in_flight == 0) {
        fprintf(stderr, "mcrelay: completion of a send that was not in flight\n");
        abort();
    }
    send = &sends->all[index];
    send->next_free = sends->first_free;
    sends->first_free = index;
    sends->in_flight--;
    return send;
}

enum drop_reason send_drop_reason(int result)
{
    switch (-result) {
    case EAGAIN:
    case ENOBUFS:
    case ENOMEM:
        return DROP_EGRESS_FULL;
    case ENETUNREACH:
    case EHOSTUNREACH:
    case ENETDOWN:
    case EHOSTDOWN:
    case EADDRNOTAVAIL:
    case ENODEV:
    case ENXIO:
        return DROP_EGRESS_UNREACHABLE;
    case EPERM:
    case EACCES:
        return DROP_EGRESS_REFUSED;
    default:
        return DROP_EGRESS_ERROR;
    }
}

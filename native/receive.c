/* SPDX-License-Identifier: Apache-2.0 */
#include "receive.h"

#include "buffers.h"
#include "table.h"

#include <errno.h>
#include <linux/if_packet.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

enum {
    NAME_ROOM = 24, /* struct sockaddr_ll, rounded up so that the control messages are aligned */
    CONTROL_ROOM = CMSG_SPACE(sizeof(struct tpacket_auxdata)),
    HEAD_ROOM = sizeof(struct io_uring_recvmsg_out) + NAME_ROOM + CONTROL_ROOM,
    LINK_ROOM = VIRTIO_HEADER + 32, /* what stands before the packet; Ethernet's header has 14 */
    SLOT_ALIGNMENT = 64,
    SLOTS_MIN = 1,
    SLOTS_MAX = BUFFERS_SLOTS_MAX,      /* 10 ms of 200,000 packets/s */
    MEMORY_MAX = 16 * 1024 * 1024,      /* per ingress: 1024 slots of a 9000-byte MTU, 128 of the loopback's */
    MTU_MIN = 68, MTU_MAX = 65536,      /* RFC 791; the loopback's */
};

static_assert(sizeof(struct sockaddr_ll) <= NAME_ROOM, "room for the link-layer address");
static_assert((sizeof(struct io_uring_recvmsg_out) + NAME_ROOM) % sizeof(size_t) == 0, "control messages are aligned");

static const struct ingress_kind receive_kind;

static size_t round_up(size_t n, size_t to)
{
    return (n + to - 1) / to * to;
}

int receive_new(struct ingress **out, uint8_t interface, int fd, uint32_t mtu, uint32_t slots)
{
    const size_t slot_size = round_up(HEAD_ROOM + LINK_ROOM + mtu, SLOT_ALIGNMENT);
    struct buffers *buffers;

    if (interface >= TABLE_INTERFACES_MAX || fd < 0 || mtu < MTU_MIN || mtu > MTU_MAX || slots > SLOTS_MAX ||
        (slots & (slots - 1)) != 0)
        return -EINVAL;
    buffers = calloc(1, sizeof(*buffers));
    if (!buffers)
        return -ENOMEM;
    buffers->base = (struct ingress){.kind = &receive_kind, .fd = fd, .interface = interface, .statistics = true};
    buffers->base.virtio = ingress_has_virtio(fd);
    buffers->shape.msg_namelen = NAME_ROOM;
    buffers->shape.msg_controllen = CONTROL_ROOM;
    if (!slots)
        for (slots = SLOTS_MAX; slots > SLOTS_MIN && slots * slot_size > MEMORY_MAX;)
            slots /= 2;
    if (buffers_open(buffers, slots, slot_size)) {
        ingress_free(&buffers->base);
        return -ENOMEM;
    }
    *out = &buffers->base;
    return 0;
}

static bool receive_wants_arming(const struct ingress *ingress, bool looked_at)
{
    (void)looked_at; /* it is the receive that fetches the frames */
    return buffers_suffice(ingress);
}

static void receive_arm(struct ingress *ingress, struct io_uring_sqe *sqe)
{
    buffers_arm((struct buffers *)ingress, sqe, ingress->fd);
}

static void receive_complete(struct ingress *ingress, const struct io_uring_cqe *cqe, struct counters_page *counters)
{
    if (!(cqe->flags & IORING_CQE_F_MORE))
        ingress->armed = false;
    if (buffers_complete((struct buffers *)ingress, cqe, 0, counters))
        ingress->failed = false;
    else if (cqe->res < 0 && cqe->res != -ENOBUFS && cqe->res != -ECANCELED)
        ingress->failed = true;
}

static void skip(struct frame *frame, size_t n)
{
    n = n < frame->length ? n : frame->length;
    frame->data += n;
    frame->length -= n;
}

/* What the link layer and the control message say about a frame: where it begins, whose it is, tagged, checksum. */
static void read_metadata(const struct buffers *buffers, struct io_uring_recvmsg_out *out, struct frame *frame)
{
    const struct sockaddr_ll *link = io_uring_recvmsg_name(out);
    struct msghdr shape = buffers->shape;
    struct cmsghdr *control = io_uring_recvmsg_cmsg_firsthdr(out, &shape);
    const uint8_t *virtio = NULL;
    uint8_t packet_type = PACKET_HOST;
    uint16_t vlan_tci = 0;
    uint32_t status = 0;

    if (out->namelen >= offsetof(struct sockaddr_ll, sll_addr) && link->sll_family == AF_PACKET)
        packet_type = link->sll_pkttype;
    for (; control; control = io_uring_recvmsg_cmsg_nexthdr(out, &shape, control)) {
        struct tpacket_auxdata auxiliary;

        if (control->cmsg_level != SOL_PACKET || control->cmsg_type != PACKET_AUXDATA ||
            control->cmsg_len < CMSG_LEN(sizeof(auxiliary)))
            continue;
        memcpy(&auxiliary, CMSG_DATA(control), sizeof(auxiliary));
        status = auxiliary.tp_status;
        vlan_tci = auxiliary.tp_vlan_tci;
        if (buffers->base.virtio && frame->length >= VIRTIO_HEADER) {
            virtio = frame->data;
            skip(frame, VIRTIO_HEADER);
        }
        skip(frame, auxiliary.tp_net);
    }
    ingress_judge(frame, status, vlan_tci, packet_type, !(out->flags & MSG_TRUNC), virtio);
}

static bool receive_next(struct ingress *ingress, uint32_t *slot, struct frame *frame)
{
    struct buffers *buffers = (struct buffers *)ingress;
    struct io_uring_recvmsg_out *out;
    uint16_t port;

    if (!buffers_next(buffers, slot, frame, &out, &port))
        return false;
    if (frame->reason == DROP_NONE)
        read_metadata(buffers, out, frame);
    return true;
}

static const struct ingress_kind receive_kind = {
    .enter = buffers_enter,
    .leave = buffers_leave,
    .wants_arming = receive_wants_arming,
    .arm = receive_arm,
    .complete = receive_complete,
    .next = receive_next,
    .give_back = buffers_give_back,
    .publish = buffers_publish,
    .is_drained = buffers_is_drained,
    .free = buffers_free,
};

/* SPDX-License-Identifier: Apache-2.0 */
#include "receive.h"

#include "table.h"

#include <errno.h>
#include <linux/if_packet.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>

enum {
    NAME_ROOM = 24, /* struct sockaddr_ll, rounded up so that the control messages are aligned */
    CONTROL_ROOM = CMSG_SPACE(sizeof(struct tpacket_auxdata)),
    HEAD_ROOM = sizeof(struct io_uring_recvmsg_out) + NAME_ROOM + CONTROL_ROOM,
    SLOT_ALIGNMENT = 64,
    SLOTS_MIN = 1,
    SLOTS_MAX = 2048,                   /* 10 ms of 200,000 packets/s */
    MEMORY_MAX = 16 * 1024 * 1024,      /* per ingress: 1024 slots of a 9000-byte MTU, 128 of the loopback's */
    MTU_MIN = 68, MTU_MAX = 65536,      /* RFC 791; the loopback's */
};

static_assert(sizeof(struct sockaddr_ll) <= NAME_ROOM, "room for the link-layer address");
static_assert((sizeof(struct io_uring_recvmsg_out) + NAME_ROOM) % sizeof(size_t) == 0, "control messages are aligned");
static_assert(SLOTS_MAX <= UINT16_MAX, "a buffer id is 16 bits");

static size_t round_up(size_t n, size_t to)
{
    return (n + to - 1) / to * to;
}

static void *map(size_t size)
{
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    return memory == MAP_FAILED ? NULL : memory;
}

static void put(struct ingress *ingress, uint32_t slot)
{
    io_uring_buf_ring_add(ingress->buffers, ingress->memory + slot * ingress->slot_size,
                          (unsigned)ingress->slot_size, (unsigned short)slot,
                          io_uring_buf_ring_mask(ingress->pool.size), (int)ingress->returned);
    ingress->returned++;
}

int ingress_new(struct ingress **out, uint8_t interface, int fd, uint32_t mtu, uint32_t slots)
{
    struct ingress *ingress;

    if (interface >= TABLE_INTERFACES_MAX || fd < 0 || mtu < MTU_MIN || mtu > MTU_MAX || slots > SLOTS_MAX ||
        (slots & (slots - 1)) != 0)
        return -EINVAL;
    ingress = calloc(1, sizeof(*ingress));
    if (!ingress)
        return -ENOMEM;
    ingress->fd = fd;
    ingress->interface = interface;
    ingress->statistics = true;
    ingress->slot_size = round_up(HEAD_ROOM + mtu, SLOT_ALIGNMENT);
    if (!slots)
        for (slots = SLOTS_MAX; slots > SLOTS_MIN && slots * ingress->slot_size > MEMORY_MAX;)
            slots /= 2;
    ingress->shape.msg_namelen = NAME_ROOM;
    ingress->shape.msg_controllen = CONTROL_ROOM;
    ingress->memory_size = slots * ingress->slot_size;
    ingress->memory = map(ingress->memory_size);
    ingress->buffers_size = slots * sizeof(struct io_uring_buf);
    ingress->buffers = map(ingress->buffers_size);
    ingress->queue = calloc(slots, sizeof(*ingress->queue));
    if (!ingress->memory || !ingress->buffers || !ingress->queue || pool_open(&ingress->pool, slots)) {
        ingress_free(ingress);
        return -ENOMEM;
    }
    *out = ingress;
    return 0;
}

void ingress_free(struct ingress *ingress)
{
    if (!ingress)
        return;
    if (ingress->memory)
        munmap(ingress->memory, ingress->memory_size);
    if (ingress->buffers)
        munmap(ingress->buffers, ingress->buffers_size);
    free(ingress->queue);
    pool_close(&ingress->pool);
    free(ingress);
}

int ingress_register(struct ingress *ingress, struct io_uring *ring)
{
    struct io_uring_buf_reg registration = {
        .ring_addr = (uint64_t)(uintptr_t)ingress->buffers,
        .ring_entries = ingress->pool.size,
        .bgid = ingress->interface,
    };
    int error = io_uring_register_buf_ring(ring, &registration, 0);

    if (error)
        return error;
    io_uring_buf_ring_init(ingress->buffers);
    for (uint32_t slot = 0; slot < ingress->pool.size; slot++)
        put(ingress, slot);
    ingress_publish(ingress);
    return 0;
}

void ingress_unregister(struct ingress *ingress, struct io_uring *ring)
{
    io_uring_unregister_buf_ring(ring, ingress->interface);
}

void ingress_complete(struct ingress *ingress, const struct io_uring_cqe *cqe, struct counters_page *counters)
{
    if (!(cqe->flags & IORING_CQE_F_MORE))
        ingress->armed = false;
    if (cqe->flags & IORING_CQE_F_BUFFER) {
        uint32_t slot = cqe->flags >> IORING_CQE_BUFFER_SHIFT;

        pool_take(&ingress->pool, slot);
        ingress->queue[(ingress->queue_head + ingress->queue_count++) & (ingress->pool.size - 1)] =
            (struct filled){slot, cqe->res > 0 ? (uint32_t)cqe->res : 0};
        ingress->failed = false;
    } else if (cqe->res == -ENOBUFS) {
        count(&counters->pool_exhausted, 1);
    } else if (cqe->res < 0 && cqe->res != -ECANCELED) {
        ingress->failed = true;
    }
}

/* What the link layer and the control message say about a frame: whose it is, tagged, checksum. */
static void read_metadata(const struct ingress *ingress, struct io_uring_recvmsg_out *out, struct frame *frame)
{
    const struct sockaddr_ll *link = io_uring_recvmsg_name(out);
    struct msghdr shape = ingress->shape;
    struct cmsghdr *control = io_uring_recvmsg_cmsg_firsthdr(out, &shape);

    if (out->namelen >= offsetof(struct sockaddr_ll, sll_addr) && link->sll_family == AF_PACKET &&
        link->sll_pkttype == PACKET_OTHERHOST)
        frame->reason = DROP_OTHER_HOST;
    if (out->flags & MSG_TRUNC)
        frame->reason = DROP_OVERSIZE;
    for (; control; control = io_uring_recvmsg_cmsg_nexthdr(out, &shape, control)) {
        struct tpacket_auxdata auxiliary;

        if (control->cmsg_level != SOL_PACKET || control->cmsg_type != PACKET_AUXDATA ||
            control->cmsg_len < CMSG_LEN(sizeof(auxiliary)))
            continue;
        memcpy(&auxiliary, CMSG_DATA(control), sizeof(auxiliary));
        if (auxiliary.tp_status & TP_STATUS_VLAN_VALID)
            frame->reason = DROP_VLAN_TAGGED;
        frame->checksum_vouched = auxiliary.tp_status & (TP_STATUS_CSUM_VALID | TP_STATUS_CSUMNOTREADY);
    }
}

bool ingress_next(struct ingress *ingress, uint32_t *slot, struct frame *frame)
{
    struct filled *filled = &ingress->queue[ingress->queue_head];
    struct io_uring_recvmsg_out *out;

    if (ingress->queue_count == 0)
        return false;
    ingress->queue_head = (ingress->queue_head + 1) & (ingress->pool.size - 1);
    ingress->queue_count--;
    *slot = filled->slot;
    *frame = (struct frame){0};
    out = (struct io_uring_recvmsg_out *)(ingress->memory + filled->slot * ingress->slot_size);
    if (filled->length < HEAD_ROOM) {
        frame->reason = DROP_TRUNCATED;
        return true;
    }
    frame->data = (const uint8_t *)out + HEAD_ROOM;
    frame->length = filled->length - HEAD_ROOM;
    read_metadata(ingress, out, frame);
    return true;
}

void ingress_return(struct ingress *ingress, uint32_t slot)
{
    put(ingress, slot);
}

void ingress_publish(struct ingress *ingress)
{
    if (ingress->returned)
        io_uring_buf_ring_advance(ingress->buffers, (int)ingress->returned);
    ingress->returned = 0;
}

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

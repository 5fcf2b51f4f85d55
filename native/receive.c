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
    LINK_ROOM = VIRTIO_HEADER + 32, /* what stands before the packet; Ethernet's header has 14 */
    SLOT_ALIGNMENT = 64,
    SLOTS_MIN = 1,
    SLOTS_MAX = 2048,                   /* 10 ms of 200,000 packets/s */
    MEMORY_MAX = 16 * 1024 * 1024,      /* per ingress: 1024 slots of a 9000-byte MTU, 128 of the loopback's */
    MTU_MIN = 68, MTU_MAX = 65536,      /* RFC 791; the loopback's */
};

static_assert(sizeof(struct sockaddr_ll) <= NAME_ROOM, "room for the link-layer address");
static_assert((sizeof(struct io_uring_recvmsg_out) + NAME_ROOM) % sizeof(size_t) == 0, "control messages are aligned");
static_assert(SLOTS_MAX <= UINT16_MAX, "a buffer id is 16 bits");

struct filled {
    uint32_t slot;
    uint32_t length; /* as the completion reported it */
};

struct receive {
    struct ingress base; /* the interface's slot number is also the buffer group's id */
    uint8_t *memory;
    size_t memory_size;
    size_t slot_size;
    struct io_uring_buf_ring *buffers;
    size_t buffers_size;
    uint32_t returned;    /* slots put into the buffer ring but not yet shown to the kernel */
    struct filled *queue; /* ring of pool.size entries: can never be full, a slot is in it at most once */
    uint32_t queue_head;
    uint32_t queue_count;
    struct msghdr shape; /* room for name and control in each slot */
};

static const struct ingress_kind receive_kind;

static struct receive *receive_of(struct ingress *ingress)
{
    return (struct receive *)ingress; /* base is its first member */
}

static size_t round_up(size_t n, size_t to)
{
    return (n + to - 1) / to * to;
}

static void *map(size_t size)
{
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    return memory == MAP_FAILED ? NULL : memory;
}

static void put(struct receive *receive, uint32_t slot)
{
    io_uring_buf_ring_add(receive->buffers, receive->memory + slot * receive->slot_size, (unsigned)receive->slot_size,
                          (unsigned short)slot, io_uring_buf_ring_mask(receive->base.pool.size),
                          (int)receive->returned);
    receive->returned++;
}

int receive_new(struct ingress **out, uint8_t interface, int fd, uint32_t mtu, uint32_t slots)
{
    struct receive *receive;

    if (interface >= TABLE_INTERFACES_MAX || fd < 0 || mtu < MTU_MIN || mtu > MTU_MAX || slots > SLOTS_MAX ||
        (slots & (slots - 1)) != 0)
        return -EINVAL;
    receive = calloc(1, sizeof(*receive));
    if (!receive)
        return -ENOMEM;
    receive->base = (struct ingress){.kind = &receive_kind, .fd = fd, .interface = interface, .statistics = true};
    receive->base.virtio = ingress_has_virtio(fd);
    receive->slot_size = round_up(HEAD_ROOM + LINK_ROOM + mtu, SLOT_ALIGNMENT);
    if (!slots)
        for (slots = SLOTS_MAX; slots > SLOTS_MIN && slots * receive->slot_size > MEMORY_MAX;)
            slots /= 2;
    receive->shape.msg_namelen = NAME_ROOM;
    receive->shape.msg_controllen = CONTROL_ROOM;
    receive->memory_size = slots * receive->slot_size;
    receive->memory = map(receive->memory_size);
    receive->buffers_size = slots * sizeof(struct io_uring_buf);
    receive->buffers = map(receive->buffers_size);
    receive->queue = calloc(slots, sizeof(*receive->queue));
    if (!receive->memory || !receive->buffers || !receive->queue || pool_open(&receive->base.pool, slots)) {
        ingress_free(&receive->base);
        return -ENOMEM;
    }
    *out = &receive->base;
    return 0;
}

static void receive_free(struct ingress *ingress)
{
    struct receive *receive = receive_of(ingress);

    if (receive->memory)
        munmap(receive->memory, receive->memory_size);
    if (receive->buffers)
        munmap(receive->buffers, receive->buffers_size);
    free(receive->queue);
    pool_close(&ingress->pool);
    free(receive);
}

static void receive_publish(struct ingress *ingress)
{
    struct receive *receive = receive_of(ingress);

    if (receive->returned)
        io_uring_buf_ring_advance(receive->buffers, (int)receive->returned);
    receive->returned = 0;
}

static int receive_enter(struct ingress *ingress, struct io_uring *ring)
{
    struct receive *receive = receive_of(ingress);
    struct io_uring_buf_reg registration = {
        .ring_addr = (uint64_t)(uintptr_t)receive->buffers,
        .ring_entries = ingress->pool.size,
        .bgid = ingress->interface,
    };
    int error = io_uring_register_buf_ring(ring, &registration, 0);

    if (error)
        return error;
    io_uring_buf_ring_init(receive->buffers);
    for (uint32_t slot = 0; slot < ingress->pool.size; slot++)
        put(receive, slot);
    receive_publish(ingress);
    return 0;
}

static void receive_leave(struct ingress *ingress, struct io_uring *ring)
{
    io_uring_unregister_buf_ring(ring, ingress->interface);
}

/* After an exhausted pool, only when a quarter is back: not one receive per slot. */
static bool receive_wants_arming(const struct ingress *ingress, bool looked_at)
{
    (void)looked_at; /* it is the receive that fetches the frames */
    return ingress->pool.free >= (ingress->pool.size + 3) / 4;
}

static void receive_arm(struct ingress *ingress, struct io_uring_sqe *sqe)
{
    io_uring_prep_recvmsg_multishot(sqe, ingress->fd, &receive_of(ingress)->shape, 0);
    sqe->flags |= IOSQE_BUFFER_SELECT;
    sqe->buf_group = ingress->interface;
}

static void receive_complete(struct ingress *ingress, const struct io_uring_cqe *cqe, struct counters_page *counters)
{
    struct receive *receive = receive_of(ingress);

    if (!(cqe->flags & IORING_CQE_F_MORE))
        ingress->armed = false;
    if (cqe->flags & IORING_CQE_F_BUFFER) {
        uint32_t slot = cqe->flags >> IORING_CQE_BUFFER_SHIFT;

        pool_take(&ingress->pool, slot);
        receive->queue[(receive->queue_head + receive->queue_count++) & (ingress->pool.size - 1)] =
            (struct filled){slot, cqe->res > 0 ? (uint32_t)cqe->res : 0};
        ingress->failed = false;
    } else if (cqe->res == -ENOBUFS) {
        count(&counters->pool_exhausted, 1);
    } else if (cqe->res < 0 && cqe->res != -ECANCELED) {
        ingress->failed = true;
    }
}

static void skip(struct frame *frame, size_t n)
{
    n = n < frame->length ? n : frame->length;
    frame->data += n;
    frame->length -= n;
}

/* What the link layer and the control message say about a frame: where it begins, whose it is, tagged, checksum. */
static void read_metadata(const struct receive *receive, struct io_uring_recvmsg_out *out, struct frame *frame)
{
    const struct sockaddr_ll *link = io_uring_recvmsg_name(out);
    struct msghdr shape = receive->shape;
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
        if (receive->base.virtio && frame->length >= VIRTIO_HEADER) {
            virtio = frame->data;
            skip(frame, VIRTIO_HEADER);
        }
        skip(frame, auxiliary.tp_net);
    }
    ingress_judge(frame, status, vlan_tci, packet_type, !(out->flags & MSG_TRUNC), virtio);
}

static bool receive_next(struct ingress *ingress, uint32_t *slot, struct frame *frame)
{
    struct receive *receive = receive_of(ingress);
    struct filled *filled = &receive->queue[receive->queue_head];
    struct io_uring_recvmsg_out *out;

    if (receive->queue_count == 0)
        return false;
    receive->queue_head = (receive->queue_head + 1) & (ingress->pool.size - 1);
    receive->queue_count--;
    *slot = filled->slot;
    *frame = (struct frame){0};
    out = (struct io_uring_recvmsg_out *)(receive->memory + filled->slot * receive->slot_size);
    if (filled->length < HEAD_ROOM) {
        frame->reason = DROP_TRUNCATED;
        return true;
    }
    frame->data = (const uint8_t *)out + HEAD_ROOM;
    frame->length = filled->length - HEAD_ROOM;
    read_metadata(receive, out, frame);
    return true;
}

static void receive_give_back(struct ingress *ingress, uint32_t slot)
{
    put(receive_of(ingress), slot);
}

static bool receive_is_drained(const struct ingress *ingress)
{
    return ((const struct receive *)ingress)->queue_count == 0;
}

static const struct ingress_kind receive_kind = {
    .enter = receive_enter,
    .leave = receive_leave,
    .wants_arming = receive_wants_arming,
    .arm = receive_arm,
    .complete = receive_complete,
    .next = receive_next,
    .give_back = receive_give_back,
    .publish = receive_publish,
    .is_drained = receive_is_drained,
    .free = receive_free,
};

/* SPDX-License-Identifier: Apache-2.0 */
#include "ring.h"

#include "table.h"
#include "whole.h"

#include <errno.h>
#include <linux/if_packet.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/socket.h>

enum {
    FRAMES_MAX = 1 << 20,
    /* Behind a frame's header lies the link-layer address; the packet is where tp_net says. */
    ADDRESS_AT = TPACKET_ALIGN(sizeof(struct tpacket2_hdr)),
    FRAME_MIN = ADDRESS_AT + sizeof(struct sockaddr_ll),
};

struct ring {
    struct ingress base;
    uint8_t *memory;
    size_t size;
    bool mapped; /* by us */
    bool found;  /* position is where the oldest frame is or will be */
    bool holes;  /* behind it, frames follow that lie behind one that was given back */
    struct ring_geometry geometry;
    uint32_t frames_per_block;
    uint32_t position; /* the next frame to read */
    struct wholes wholes;
};

static const struct ingress_kind ring_kind;

static struct ring *ring_of(struct ingress *ingress)
{
    return (struct ring *)ingress; /* base is its first member */
}

static struct tpacket2_hdr *frame_at(const struct ring *ring, uint32_t index)
{
    size_t offset = (size_t)(index / ring->frames_per_block) * ring->geometry.block_size +
                    (size_t)(index % ring->frames_per_block) * ring->geometry.frame_size;

    return (struct tpacket2_hdr *)(ring->memory + offset);
}

static uint32_t status_of(const struct ring *ring, uint32_t index)
{
    return __atomic_load_n(&frame_at(ring, index)->tp_status, __ATOMIC_ACQUIRE);
}

/* Filled by the kernel, and not one whose sends we are still waiting for. */
static bool is_unread(const struct ring *ring, uint32_t index)
{
    return ring->base.pool.slots[index].holders == 0 && (status_of(ring, index) & TP_STATUS_USER);
}

static uint32_t after(const struct ring *ring, uint32_t index)
{
    return index + 1 == ring->base.pool.size ? 0 : index + 1;
}

static uint32_t before(const struct ring *ring, uint32_t index)
{
    return index ? index - 1 : ring->base.pool.size - 1;
}

static bool is_older(const struct tpacket2_hdr *a, const struct tpacket2_hdr *b)
{
    return a->tp_sec != b->tp_sec ? a->tp_sec < b->tp_sec : a->tp_nsec < b->tp_nsec;
}

/* Where to go on in a ring of which we do not know that: at the oldest unread frame behind one that is not. A predecessor
 * that died may have given back some frames behind others that it had not, so there may be several of those. If all are
 * unread, at the one with the oldest time stamp. Without any there is nothing to tell where the kernel will go on. */
static bool find_oldest(struct ring *ring)
{
    uint32_t size = ring->base.pool.size, oldest = size, beginnings = 0;
    bool before_unread = is_unread(ring, size - 1), oldest_begins = false;

    for (uint32_t i = 0; i < size; i++) {
        bool unread = is_unread(ring, i), begins = unread && !before_unread;

        beginnings += begins;
        if (unread && begins >= oldest_begins &&
            (oldest == size || begins > oldest_begins || is_older(frame_at(ring, i), frame_at(ring, oldest)))) {
            oldest = i;
            oldest_begins = begins;
        }
        before_unread = unread;
    }
    ring->holes = beginnings > 1;
    if (oldest == size)
        return false;
    /* The kernel may have filled the one before while we looked. */
    for (uint32_t i = 0; oldest_begins && i < size && is_unread(ring, before(ring, oldest)); i++)
        oldest = before(ring, oldest);
    ring->position = oldest;
    return true;
}

static int ring_check(const struct ring_geometry *g)
{
    uint32_t per_block;

    if (g->frame_size < FRAME_MIN || g->frame_size % TPACKET_ALIGNMENT || g->block_size % TPACKET_ALIGNMENT ||
        g->block_size < g->frame_size || !g->blocks)
        return -EINVAL;
    per_block = g->block_size / g->frame_size;
    return g->blocks > FRAMES_MAX / per_block ? -EINVAL : 0;
}

int ring_new_over(struct ingress **out, uint8_t interface, int fd, const struct ring_geometry *geometry, void *memory)
{
    struct ring *ring;

    if (interface >= TABLE_INTERFACES_MAX || ring_check(geometry))
        return -EINVAL;
    ring = calloc(1, sizeof(*ring));
    if (!ring)
        return -ENOMEM;
    ring->base = (struct ingress){.kind = &ring_kind, .fd = fd, .interface = interface, .statistics = true};
    ring->geometry = *geometry;
    ring->frames_per_block = geometry->block_size / geometry->frame_size;
    ring->memory = memory;
    if (pool_open(&ring->base.pool, geometry->blocks * ring->frames_per_block) || wholes_open(&ring->wholes)) {
        ingress_free(&ring->base);
        return -ENOMEM;
    }
    *out = &ring->base;
    return 0;
}

int ring_new(struct ingress **out, uint8_t interface, int fd, const struct ring_geometry *geometry)
{
    size_t size = (size_t)geometry->block_size * geometry->blocks;
    void *memory;
    int error;

    if (fd < 0 || ring_check(geometry))
        return -EINVAL;
    memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (memory == MAP_FAILED)
        return -errno;
    error = ring_new_over(out, interface, fd, geometry, memory);
    if (error) {
        munmap(memory, size);
        return error;
    }
    ring_of(*out)->mapped = true;
    ring_of(*out)->size = size;
    (*out)->virtio = ingress_has_virtio(fd);
    return 0;
}

static void ring_free(struct ingress *ingress)
{
    struct ring *ring = ring_of(ingress);

    if (ring->mapped)
        munmap(ring->memory, ring->size);
    pool_close(&ingress->pool);
    wholes_close(&ring->wholes);
    free(ring);
}

static int ring_enter(struct ingress *ingress, struct io_uring *uring)
{
    (void)uring;
    ring_of(ingress)->found = find_oldest(ring_of(ingress));
    return 0;
}

static void ring_leave(struct ingress *ingress, struct io_uring *uring)
{
    (void)ingress;
    (void)uring;
}

static bool ring_wants_arming(const struct ingress *ingress, bool looked_at)
{
    const struct ring *ring = (const struct ring *)ingress;

    /* With frames in flight poll(2) would report those; their completions wake us in any case. A frame that came since
     * we last looked is reported at once. While we do not know where the next one is, or may be, poll(2) has us search. */
    return (!looked_at || !ring->found || ring->holes) && ring->base.pool.free == ring->base.pool.size;
}

static void ring_arm(struct ingress *ingress, struct io_uring_sqe *sqe)
{
    io_uring_prep_poll_add(sqe, ingress->fd, POLLIN);
}

static void ring_complete(struct ingress *ingress, const struct io_uring_cqe *cqe, struct counters_page *counters)
{
    struct ring *ring = ring_of(ingress);
    int error = 0;
    socklen_t size = sizeof(error);

    (void)counters;
    ingress->armed = false;
    if (cqe->res < 0) {
        ingress->failed = cqe->res != -ECANCELED;
        return;
    }
    if (cqe->res & POLLERR) {
        /* The interface went down: taking the error lets the next poll wait. */
        getsockopt(ingress->fd, SOL_SOCKET, SO_ERROR, &error, &size);
        ingress->failed = true;
    }
    if (!ring->found || !is_unread(ring, ring->position))
        ring->found |= find_oldest(ring);
}

/* The offsets in a header lie behind it and within the slot, in their order, and so do the bytes. */
static bool is_sound(const struct ring *ring, const struct tpacket2_hdr *header)
{
    uint32_t first = FRAME_MIN + (ring->base.virtio ? VIRTIO_HEADER : 0);

    return header->tp_mac >= first && header->tp_net >= header->tp_mac &&
           header->tp_net <= ring->geometry.frame_size &&
           header->tp_snaplen <= ring->geometry.frame_size - header->tp_mac &&
           header->tp_snaplen >= (uint32_t)(header->tp_net - header->tp_mac);
}

/* The frame of a slot that has not all of it. True if the whole was to be had. */
static bool read_whole(struct ring *ring, uint32_t index, const struct tpacket2_hdr *header, struct frame *frame)
{
    const uint8_t *link = (const uint8_t *)header + header->tp_mac;
    uint32_t link_length = header->tp_net - header->tp_mac;
    const uint8_t *whole;

    if (!(header->tp_status & TP_STATUS_COPY) || header->tp_len < link_length)
        return false;
    whole = wholes_take(&ring->wholes, ring->base.fd, index, ring->base.virtio ? VIRTIO_HEADER : 0, link,
                        header->tp_snaplen, header->tp_len);
    if (!whole)
        return false;
    frame->data = whole + link_length;
    frame->length = header->tp_len - link_length;
    return true;
}

static bool ring_next(struct ingress *ingress, uint32_t *slot, struct frame *frame)
{
    struct ring *ring = ring_of(ingress);
    const struct tpacket2_hdr *header;
    uint32_t index = ring->position;
    bool whole;

    /* What is not read when the ingress goes is the successor's. */
    ingress->needs_room = false;
    if (ingress->detaching || !ring->found || !is_unread(ring, index))
        return false;
    header = frame_at(ring, index);
    ingress->needs_room = header->tp_status & TP_STATUS_COPY && !wholes_has_room(&ring->wholes);
    if (ingress->needs_room)
        return false;
    pool_take(&ingress->pool, index);
    ring->position = after(ring, index);
    *slot = index;
    *frame = (struct frame){0};
    if (!is_sound(ring, header)) {
        frame->reason = DROP_TRUNCATED;
        return true;
    }
    frame->data = (const uint8_t *)header + header->tp_net;
    frame->arrived_ns = (uint64_t)header->tp_sec * 1000000000u + header->tp_nsec;
    frame->length = header->tp_snaplen - (header->tp_net - header->tp_mac);
    whole = header->tp_snaplen >= header->tp_len || read_whole(ring, index, header, frame);
    ingress_judge(frame, header->tp_status, header->tp_vlan_tci,
                  ((const struct sockaddr_ll *)((const uint8_t *)header + ADDRESS_AT))->sll_pkttype, whole,
                  ingress->virtio ? (const uint8_t *)header + header->tp_mac - VIRTIO_HEADER : NULL);
    return true;
}

static void ring_give_back(struct ingress *ingress, uint32_t slot)
{
    if (frame_at(ring_of(ingress), slot)->tp_status & TP_STATUS_COPY)
        wholes_release(&ring_of(ingress)->wholes, slot);
    __atomic_store_n(&frame_at(ring_of(ingress), slot)->tp_status, TP_STATUS_KERNEL, __ATOMIC_RELEASE);
}

static void ring_publish(struct ingress *ingress)
{
    (void)ingress;
}

static bool ring_is_drained(const struct ingress *ingress)
{
    (void)ingress;
    return true;
}

static const struct ingress_kind ring_kind = {
    .enter = ring_enter,
    .leave = ring_leave,
    .wants_arming = ring_wants_arming,
    .arm = ring_arm,
    .complete = ring_complete,
    .next = ring_next,
    .give_back = ring_give_back,
    .publish = ring_publish,
    .is_drained = ring_is_drained,
    .free = ring_free,
};

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fuzz_ring.c: a ring whose memory is any bytes. The first bytes of an input choose the geometry and whether frames have
 * a virtio header, the rest is the ring, as far as it goes.
 *
 * What has to hold: each slot is read at most once until it is given back, in a bounded number of steps; the bytes of
 * every frame lie behind its header and within its slot; a frame that came to harm has no bytes; what is given back is
 * the kernel's; no other byte of the ring is changed.
 */
#include "ring.h"

#include "check.h"
#include "fuzz.h"

#include <linux/if_packet.h>
#include <poll.h>

enum { GEOMETRY = 3, HEADER = TPACKET_ALIGN(sizeof(struct tpacket2_hdr)) + sizeof(struct sockaddr_ll) };

static size_t offset_of(const struct ring_geometry *g, uint32_t slot)
{
    uint32_t per_block = g->block_size / g->frame_size;

    return (size_t)(slot / per_block) * g->block_size + (size_t)(slot % per_block) * g->frame_size;
}

/* Take what is there, give every slot back or hold it, as the bits of `keep` say. */
static uint32_t drain(struct ingress *ingress, const struct ring_geometry *g, const uint8_t *memory, uint32_t keep)
{
    volatile uint8_t last;
    struct frame frame;
    uint32_t slot, taken = 0;

    while (ingress->kind->next(ingress, &slot, &frame)) {
        CHECK(slot < ingress->pool.size);
        CHECK(++taken <= ingress->pool.size);
        if (frame.reason == DROP_TRUNCATED) {
            CHECK(!frame.data && !frame.length);
        } else {
            const uint8_t *at = memory + offset_of(g, slot);

            CHECK(frame.data >= at + HEADER && frame.data <= at + g->frame_size);
            CHECK(frame.length <= (size_t)(at + g->frame_size - frame.data));
            if (frame.length)
                last = frame.data[frame.length - 1];
        }
        if (keep >> slot % 32 & 1)
            continue;
        CHECK(pool_release(&ingress->pool, slot));
        ingress->kind->give_back(ingress, slot);
    }
    (void)last;
    return taken;
}

static struct tpacket2_hdr *header_at(const struct ring_geometry *g, uint8_t *memory, uint32_t slot)
{
    return (struct tpacket2_hdr *)(memory + offset_of(g, slot));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct counters_page *page; /* not looked at by a ring */
    const struct io_uring_cqe cqe = {.res = POLLIN};
    struct ring_geometry g;
    struct ingress *ingress;
    uint8_t *memory, *before;
    size_t length;
    uint32_t keep, taken = 0;

    if (size < GEOMETRY)
        return 0;
    g.frame_size = 64 + data[0] % 8 * 16u;
    g.block_size = g.frame_size * (1 + data[0] / 8 % 4u) + data[0] / 32 * 16u;
    g.blocks = 1 + data[1] % 8u;
    keep = data[2] * UINT32_C(0x01010101);
    length = (size_t)g.block_size * g.blocks;
    memory = calloc(1, length);
    CHECK(memory);
    memcpy(memory, data + GEOMETRY, size - GEOMETRY < length ? size - GEOMETRY : length);
    before = exact_copy(memory, length);
    CHECK_EQUAL(ring_new_over(&ingress, 0, -1, &g, memory), 0);
    ingress->virtio = data[1] & 8;
    CHECK_EQUAL(ingress->kind->enter(ingress, NULL), 0);
    for (unsigned round = 0; round < 2; round++) {
        taken += drain(ingress, &g, memory, keep);
        ingress->kind->complete(ingress, &cqe, page);
    }
    taken += drain(ingress, &g, memory, keep);
    CHECK(taken <= ingress->pool.size); /* none was filled meanwhile */
    for (uint32_t slot = 0; slot < ingress->pool.size; slot++)
        if (ingress->pool.slots[slot].holders) {
            CHECK(header_at(&g, memory, slot)->tp_status & TP_STATUS_USER);
            CHECK(pool_release(&ingress->pool, slot));
            ingress->kind->give_back(ingress, slot);
        }
    CHECK_EQUAL(ingress->pool.free, ingress->pool.size);
    for (uint32_t slot = 0; slot < ingress->pool.size; slot++) {
        struct tpacket2_hdr *header = header_at(&g, memory, slot);

        CHECK(header->tp_status == TP_STATUS_KERNEL ||
              header->tp_status == header_at(&g, before, slot)->tp_status);
        header->tp_status = header_at(&g, before, slot)->tp_status;
    }
    CHECK(!memcmp(memory, before, length));
    ingress_free(ingress);
    free(before);
    free(memory);
    return 0;
}

#ifndef FUZZ_LIBFUZZER
/* Half of the seeds are noise, the others frames that make sense. */
static size_t fuzz_seed(uint8_t *out, uint64_t *state)
{
    size_t length = GEOMETRY + random_below(state, FUZZ_INPUT_MAX / 4 - GEOMETRY);
    bool sensible = random_below(state, 2);
    uint32_t frame_size;

    for (size_t i = 0; i < length; i++)
        out[i] = (uint8_t)random_next(state);
    if (!sensible)
        return length;
    out[0] &= 7; /* one frame per block, no rest */
    frame_size = 64 + out[0] * 16u;
    for (size_t at = GEOMETRY; at + frame_size <= length; at += frame_size) {
        const struct tpacket2_hdr header = {
            .tp_status = random_below(state, 4) ? (uint32_t)random_next(state) | TP_STATUS_USER : TP_STATUS_KERNEL,
            .tp_len = random_below(state, 256),
            .tp_snaplen = random_below(state, frame_size),
            .tp_mac = (uint16_t)random_below(state, frame_size + 2),
            .tp_net = (uint16_t)random_below(state, frame_size + 2),
            .tp_sec = random_below(state, 4),
            .tp_nsec = random_below(state, 4),
        };

        memcpy(out + at, &header, sizeof(header));
    }
    return length;
}
#endif

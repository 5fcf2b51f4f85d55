/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fuzz_reassembly.c: any fragments in any order. An input is a row of steps of STEP bytes; what comes out is compared with
 * a slow and simple model, which keeps a list of fragments and looks at all of them.
 *
 * What has to hold: a packet is complete when the model says so, and has the bytes of its fragments; each fragment ends
 * as part of a packet or lost, as in the model; a packet that is held stays as it is.
 */
#include "reassembly.h"

#include "check.h"
#include "fuzz.h"

enum {
    STEP = 8,
    STEPS_MAX = 4096 / STEP, /* of the longest input */
    PACKETS = 2 * REASSEMBLY_WAITING_MAX,
};

struct piece {
    bool there; /* it waits */
    bool more;
    uint8_t packet, variant;
    uint32_t at, end;
};

struct model {
    struct piece pieces[STEPS_MAX];
    unsigned count;
    struct {
        bool open, spoilt;
        unsigned number;
        uint64_t since_ns;
    } packets[PACKETS];
    unsigned open, last_number;
};

struct held {
    uint8_t handle, *copy;
    size_t length;
};

/* What a fragment at this place brings. */
static const uint8_t *content(size_t at, uint8_t variant)
{
    static uint8_t contents[2][2 << 16];

    if (!contents[1][0])
        for (size_t i = 0; i < sizeof(contents[0]); i++) {
            contents[0][i] = (uint8_t)(i * 5 + i / 256);
            contents[1][i] = (uint8_t)(contents[0][i] + 1);
        }
    return contents[variant] + at;
}

static uint32_t model_lose(struct model *m, unsigned packet)
{
    uint32_t lost = 0;

    for (unsigned i = 0; i < m->count; i++)
        if (m->pieces[i].there && m->pieces[i].packet == packet) {
            m->pieces[i].there = false;
            lost++;
        }
    return lost;
}

static uint32_t model_close(struct model *m, unsigned packet)
{
    m->packets[packet].open = false;
    m->open--;
    return model_lose(m, packet);
}

static uint32_t model_open(struct model *m, unsigned packet, uint64_t now_ns)
{
    uint32_t lost = 0;

    if (m->open == REASSEMBLY_WAITING_MAX) {
        unsigned oldest = PACKETS;

        for (unsigned i = 0; i < PACKETS; i++)
            if (m->packets[i].open && (oldest == PACKETS || m->packets[i].number < m->packets[oldest].number))
                oldest = i;
        lost = model_close(m, oldest);
    }
    m->open++;
    m->packets[packet].open = true;
    m->packets[packet].spoilt = false;
    m->packets[packet].number = ++m->last_number;
    m->packets[packet].since_ns = now_ns;
    return lost;
}

/* What reassembly_add has to do with a sound fragment. Returns the length of the packet if it is complete. */
static size_t model_add(struct model *m, const struct piece *new, uint64_t now_ns, uint32_t *lost)
{
    unsigned packet = new->packet;
    size_t there = new->end - new->at, length = new->more ? 0 : new->end;

    if (m->packets[packet].open && now_ns - m->packets[packet].since_ns >= REASSEMBLY_TIMEOUT_NS)
        *lost += model_close(m, packet);
    if (!m->packets[packet].open)
        *lost += model_open(m, packet, now_ns);
    if (m->packets[packet].spoilt) {
        ++*lost;
        return 0;
    }
    for (unsigned i = 0; i < m->count; i++) {
        const struct piece *old = &m->pieces[i];

        if (old->there && old->packet == packet && old->at == new->at && old->end == new->end &&
            old->more == new->more && old->variant == new->variant) {
            ++*lost;
            return 0;
        }
    }
    for (unsigned i = 0; i < m->count; i++) {
        const struct piece *old = &m->pieces[i];

        if (!old->there || old->packet != packet)
            continue;
        if ((old->at < new->end && new->at < old->end) || (!old->more && new->end > old->end) ||
            (!new->more && old->end > new->end)) {
            m->packets[packet].spoilt = true;
            *lost += model_lose(m, packet) + 1;
            return 0;
        }
        there += old->end - old->at;
        if (!old->more)
            length = old->end;
    }
    m->pieces[m->count] = *new;
    m->pieces[m->count++].there = true;
    if (there != length)
        return 0;
    return length;
}

/* The bytes are those of the model's fragments, and those are used up. */
static void take_complete(struct model *m, unsigned packet, const uint8_t *bytes)
{
    for (unsigned i = 0; i < m->count; i++) {
        const struct piece *p = &m->pieces[i];

        if (!p->there || p->packet != packet)
            continue;
        CHECK(!memcmp(bytes + 40 + p->at, content(p->at, p->variant), p->end - p->at));
        if (p->at == 0)
            CHECK_EQUAL(bytes[7], p->variant);
    }
    model_close(m, packet);
}

static void release(struct reassembly *r, struct held *held)
{
    size_t length;
    const uint8_t *bytes = reassembly_packet(r, held->handle, &length);

    CHECK_EQUAL(length, held->length);
    CHECK(!memcmp(bytes, held->copy, length));
    reassembly_release(r, held->handle);
    free(held->copy);
}

/* Bytes of a step: packet; what to do, in the lower bits, and flags; variant; place, in units; length. */
static bool describe(const uint8_t *step, struct piece *piece, struct packet_fragment *fragment)
{
    bool near = step[1] & 8; /* or else anywhere */
    uint32_t unit = near ? step[3] % 16u : (uint32_t)(step[3] << 8 | step[4]) & 0x1fff;
    uint32_t length = near ? step[5] % 4u * 8 : (uint32_t)(step[5] << 8 | step[6]) & 0xfff8;

    if (step[1] & 16)
        length += step[7] % 8u;
    *piece = (struct piece){
        .more = step[1] & 32,
        .packet = step[0] % PACKETS,
        .variant = step[2] & 1,
        .at = unit * 8,
        .end = unit * 8 + length,
    };
    *fragment = (struct packet_fragment){
        .source = {{0x20, 1, [15] = piece->packet & 2}},
        .destination = {{0xff, 5, [15] = 1}},
        .identification = piece->packet,
        .offset = piece->at,
        .length = length,
        .before = step[1] & 64 ? 8 : 0,
        .more = piece->more,
        .headless = step[1] & 128 && step[7] & 8,
    };
    return length && !(piece->more && length % 8) && fragment->before + piece->end <= 65535 && !fragment->headless;
}

static void step_add(struct reassembly *r, struct model *m, const uint8_t *step, uint64_t now_ns, struct held *held,
                     unsigned *held_count)
{
    uint8_t header[40] = {0x60}, *copy;
    struct packet_fragment fragment;
    struct piece piece;
    bool sound = describe(step, &piece, &fragment);
    uint32_t lost = 0, expected = 0;
    size_t length = 0;
    uint8_t handle;

    copy = exact_copy(content(piece.at, piece.variant), fragment.length);
    header[7] = piece.variant;
    fragment.header = header;
    fragment.piece = copy;
    handle = reassembly_add(r, &fragment, piece.packet & 1, piece.packet >> 6, now_ns, &lost);
    free(copy);
    if (sound)
        length = model_add(m, &piece, now_ns, &expected);
    else
        expected = 1;
    if (length && !handle) { /* only the headers before it can make it too long */
        CHECK(length > 65535 - 8);
        expected += model_close(m, piece.packet);
        length = 0;
    }
    CHECK_EQUAL(lost, expected);
    CHECK_EQUAL(handle != 0, length != 0);
    if (handle) {
        size_t got;
        const uint8_t *bytes = reassembly_packet(r, handle, &got);

        CHECK_EQUAL(got, 40 + length);
        CHECK_EQUAL(bytes[4] << 8 | bytes[5], length);
        take_complete(m, piece.packet, bytes);
        held[(*held_count)++] = (struct held){handle, exact_copy(bytes, got), got};
    }
    CHECK_EQUAL(reassembly_waits(r), m->open != 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct model m;
    struct held held[REASSEMBLY_HELD_MAX];
    struct reassembly *r = reassembly_new();
    unsigned held_count = 0;
    uint64_t now_ns = 1;

    CHECK(r);
    memset(&m, 0, sizeof(m));
    for (; size >= STEP && m.count < STEPS_MAX; data += STEP, size -= STEP) {
        uint32_t expected = 0;

        switch (data[1] & 7) {
        case 0:
            now_ns += data[2] * (REASSEMBLY_TIMEOUT_NS / 64);
            for (unsigned i = 0; i < PACKETS && data[3] & 1; i++)
                if (m.packets[i].open && now_ns - m.packets[i].since_ns >= REASSEMBLY_TIMEOUT_NS)
                    expected += model_close(&m, i);
            if (data[3] & 1)
                CHECK_EQUAL(reassembly_expire(r, now_ns), expected);
            break;
        case 1:
            for (unsigned i = 0; i < PACKETS && !data[2]; i++)
                if (m.packets[i].open && (i & 1) == (data[3] & 1u))
                    expected += model_close(&m, i);
            if (!data[2])
                CHECK_EQUAL(reassembly_forget(r, data[3] & 1), expected);
            if (held_count)
                release(r, &held[--held_count]);
            break;
        default:
            if (!reassembly_has_room(r)) {
                CHECK_EQUAL(held_count, REASSEMBLY_HELD_MAX);
                release(r, &held[--held_count]);
            }
            step_add(r, &m, data, now_ns, held, &held_count);
        }
    }
    while (held_count)
        release(r, &held[--held_count]);
    reassembly_free(r);
    return 0;
}

#ifndef FUZZ_LIBFUZZER
/* Packets of some fragments each, mostly in order, a few of them doubled, moved, or changed. */
static size_t fuzz_seed(uint8_t *out, uint64_t *state)
{
    size_t length = 0;

    for (unsigned packets = 1 + random_below(state, 8); packets; packets--) {
        uint8_t packet = (uint8_t)random_next(state);
        unsigned pieces = 1 + random_below(state, 6), room = 1 + random_below(state, 3);

        for (unsigned i = 0; i < pieces; i++) {
            unsigned at = random_below(state, 8) ? i : random_below(state, pieces);
            uint8_t step[STEP] = {packet, 2 | 8, 0, (uint8_t)(at * room), 0, (uint8_t)room, 0, 0};

            step[1] |= at + 1 < pieces ? 32 : 16;
            step[2] = !random_below(state, 20);
            step[7] = at + 1 < pieces ? 0 : (uint8_t)random_below(state, 8);
            memcpy(out + length, step, STEP);
            length += STEP;
        }
        if (!random_below(state, 4)) {
            const uint8_t step[STEP] = {0, (uint8_t)random_below(state, 2), (uint8_t)random_below(state, 64), 1};

            memcpy(out + length, step, STEP);
            length += STEP;
        }
    }
    return length;
}
#endif

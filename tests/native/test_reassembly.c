/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_reassembly.c: packets come out whole whatever the order of their fragments, what contradicts itself does not come
 * out at all, and of all that came in it is known what became of it.
 */
#include "reassembly.h"

#include "check.h"
#include "datagram.h"

enum { MAX = 65535, MTU = 1500, FRAGMENTS_MAX = 64, SHUFFLES = 300 };

static uint8_t body[MAX + 9];

/* A fragment as it could stand in a packet. */
struct piece {
    size_t at, length;
    bool more;
    uint8_t change; /* of its first byte */
};

/* Each with its own copy of what it brings, of exactly its length; and with its own idea of the header. */
struct given {
    struct packet_fragment fragment;
    uint8_t header[40];
    uint8_t *copy;
};

static void give(struct given *g, uint32_t id, const struct piece *piece)
{
    memset(g, 0, sizeof(*g));
    for (unsigned i = 0; i < sizeof(g->header); i++)
        g->header[i] = (uint8_t)(0x60 + piece->at / 8 + i);
    g->copy = exact_copy(body + piece->at, piece->length);
    if (piece->length)
        g->copy[0] ^= piece->change;
    g->fragment = (struct packet_fragment){
        .source = {{0x20, 1, [15] = 1}},
        .destination = {{0xff, 5, [15] = 2}},
        .identification = id,
        .header = g->header,
        .piece = g->copy,
        .length = piece->length,
        .offset = piece->at,
        .next = (uint8_t)(piece->at ? 99 : 17),
        .more = piece->more,
    };
}

static uint8_t add_at(struct reassembly *r, uint32_t id, struct piece piece, uint64_t now_ns, uint32_t *lost)
{
    struct given g;
    uint8_t handle;

    give(&g, id, &piece);
    handle = reassembly_add(r, &g.fragment, 1, 0, now_ns, lost);
    free(g.copy);
    return handle;
}

static uint8_t add(struct reassembly *r, uint32_t id, struct piece piece, uint32_t *lost)
{
    return add_at(r, id, piece, 0, lost);
}

/* The packet is the body's first `length` bytes, behind the header of the first fragment. */
static void check_packet(struct reassembly *r, uint8_t handle, size_t length)
{
    size_t got;
    const uint8_t *packet;

    CHECK(handle);
    packet = reassembly_packet(r, handle, &got);
    CHECK_EQUAL(got, 40 + length);
    CHECK_EQUAL(packet[4] << 8 | packet[5], length);
    CHECK_EQUAL(packet[6], 17);
    for (unsigned i = 0; i < 40; i++)
        if (i < 4 || i > 6)
            CHECK_EQUAL(packet[i], (uint8_t)(0x60 + i));
    CHECK_BYTES(packet + 40, body, length);
    reassembly_release(r, handle);
}

static unsigned cut(struct piece *pieces, size_t length, size_t room)
{
    unsigned count = 0;

    for (size_t at = 0; at < length; at += room)
        pieces[count++] = (struct piece){at, length - at < room ? length - at : room, at + room < length, 0};
    return count;
}

static void test_orders(void)
{
    static const size_t lengths[] = {9, 16, 17, 1449, 8008, 60000, 65534, 65535};
    uint64_t state = 1;

    for (unsigned round = 0; round < SHUFFLES; round++) {
        struct reassembly *r = reassembly_new();
        size_t length = lengths[round % (sizeof(lengths) / sizeof(*lengths))];
        struct piece pieces[FRAGMENTS_MAX];
        unsigned count = cut(pieces, length, length < 100 ? 8 : 1448);
        uint32_t lost = 0;

        check_case("%zu bytes, shuffle %u", length, round);
        CHECK(r && count > 1);
        for (unsigned i = count - 1; round > 7 && i > 0; i--) {
            unsigned j = random_below(&state, i + 1);
            struct piece other = pieces[i];

            pieces[i] = pieces[j];
            pieces[j] = other;
        }
        for (unsigned again = 0; again < 2; again++) {
            for (unsigned i = 0; i + 1 < count; i++) {
                CHECK_EQUAL(add(r, round, pieces[i], &lost), 0);
                CHECK(reassembly_waits(r));
            }
            check_packet(r, add(r, round, pieces[count - 1], &lost), length);
            CHECK(!reassembly_waits(r));
        }
        CHECK_EQUAL(lost, 0);
        reassembly_free(r);
    }
}

static void test_duplicates(void)
{
    struct reassembly *r = reassembly_new();
    uint32_t lost = 0;

    check_case("fragments twice");
    for (unsigned i = 0; i < 2; i++) {
        CHECK_EQUAL(add(r, 1, (struct piece){16, 5, false, 0}, &lost), 0);
        CHECK_EQUAL(add(r, 1, (struct piece){8, 8, true, 0}, &lost), 0);
    }
    CHECK_EQUAL(lost, 2);
    check_packet(r, add(r, 1, (struct piece){0, 8, true, 0}, &lost), 21);
    CHECK_EQUAL(lost, 2);
    check_case("a fragment of a packet that was complete begins another");
    CHECK_EQUAL(add(r, 1, (struct piece){0, 8, true, 0}, &lost), 0);
    CHECK_EQUAL(reassembly_forget(r, 2), 0);
    CHECK_EQUAL(reassembly_forget(r, 1), 1);
    CHECK(!reassembly_waits(r));
    reassembly_free(r);
}

/* What a packet before left behind an end is no part of the packet. */
static void test_remains(void)
{
    struct reassembly *r = reassembly_new();
    uint32_t lost = 0;

    check_case("remains of a packet before");
    CHECK_EQUAL(add(r, 1, (struct piece){8, 8, true, 0}, &lost), 0);
    CHECK_EQUAL(reassembly_forget(r, 1), 1);
    CHECK_EQUAL(add(r, 2, (struct piece){8, 3, false, 0}, &lost), 0);
    CHECK_EQUAL(add(r, 2, (struct piece){8, 8, true, 0}, &lost), 0);
    CHECK_EQUAL(lost, 2); /* no duplicate */
    CHECK_EQUAL(reassembly_forget(r, 1), 0);
    reassembly_free(r);
}

/* What is there at first, and what makes it a lost packet. */
static void test_contradictions(void)
{
    static const struct {
        const char *name;
        struct piece there[2], then;
    } cases[] = {
        {"the same place, other content", {{0, 16, true, 0}, {32, 8, true, 0}}, {0, 16, true, 1}},
        {"within another, same content", {{0, 24, true, 0}, {32, 8, true, 0}}, {8, 8, true, 0}},
        {"the beginning of another", {{0, 24, true, 0}, {32, 8, true, 0}}, {0, 8, true, 0}},
        {"the end of another", {{0, 24, true, 0}, {32, 8, true, 0}}, {16, 8, true, 0}},
        {"around another", {{8, 8, true, 0}, {32, 8, true, 0}}, {0, 24, true, 0}},
        {"two in one", {{0, 8, true, 0}, {8, 8, true, 0}}, {0, 16, true, 0}},
        {"over an end", {{0, 16, true, 0}, {32, 8, true, 0}}, {8, 16, true, 0}},
        {"over a beginning", {{0, 8, true, 0}, {32, 8, true, 0}}, {24, 16, true, 0}},
        {"over a word of units", {{504, 16, true, 0}, {0, 8, true, 0}}, {512, 16, true, 0}},
        {"the last one is not", {{0, 8, true, 0}, {16, 8, false, 0}}, {16, 8, true, 0}},
        {"it is the last one", {{0, 8, true, 0}, {16, 8, true, 0}}, {16, 8, false, 0}},
        {"two ends", {{0, 8, true, 0}, {16, 8, false, 0}}, {8, 8, false, 0}},
        {"an end before what is there", {{0, 8, true, 0}, {16, 8, true, 0}}, {8, 3, false, 0}},
        {"beyond the end", {{0, 8, true, 0}, {16, 8, false, 0}}, {24, 8, true, 0}},
        {"beyond an end within a unit", {{0, 8, true, 0}, {16, 3, false, 0}}, {16, 8, true, 0}},
        {"a longer last one", {{0, 8, true, 0}, {16, 3, false, 0}}, {16, 4, false, 0}},
    };

    for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
        struct reassembly *r = reassembly_new();
        uint32_t lost = 0;

        check_case("%s", cases[i].name);
        for (unsigned n = 0; n < 2; n++)
            CHECK_EQUAL(add(r, 1, cases[i].there[n], &lost), 0);
        CHECK_EQUAL(lost, 0);
        CHECK_EQUAL(add(r, 1, cases[i].then, &lost), 0);
        CHECK_EQUAL(lost, 3);
        /* Nothing of it is wanted any more, even if it were all there is. */
        CHECK_EQUAL(add(r, 1, (struct piece){0, 8, true, 0}, &lost), 0);
        CHECK_EQUAL(add(r, 1, (struct piece){8, 8, false, 0}, &lost), 0);
        CHECK_EQUAL(lost, 5);
        CHECK(reassembly_waits(r));
        CHECK_EQUAL(reassembly_expire(r, REASSEMBLY_TIMEOUT_NS), 0);
        CHECK(!reassembly_waits(r));
        CHECK_EQUAL(add(r, 1, (struct piece){0, 8, true, 0}, &lost), 0);
        check_packet(r, add(r, 1, (struct piece){8, 8, false, 0}, &lost), 16);
        CHECK_EQUAL(lost, 5);
        reassembly_free(r);
    }
}

static void test_unsound(void)
{
    static const struct {
        const char *name;
        struct piece piece;
        size_t before;
        bool headless, taken;
    } cases[] = {
        {.name = "empty", .piece = {8, 0, true, 0}},
        {.name = "empty, the last", .piece = {8, 0, false, 0}},
        {.name = "not a multiple of 8", .piece = {0, 1447, true, 0}},
        {.name = "the last need not be", .piece = {8, 1447, false, 0}, .taken = true},
        {.name = "as far as can be", .piece = {65528, 7, false, 0}, .taken = true},
        {.name = "beyond 65535", .piece = {65528, 8, false, 0}},
        {.name = "beyond 65535, far", .piece = {65528, 1448, true, 0}},
        {.name = "beyond 65535 with other headers", .piece = {65520, 8, true, 0}, .before = 8},
        {.name = "within with those", .piece = {65512, 8, true, 0}, .before = 8, .taken = true},
        {.name = "headers that do not end", .piece = {0, 8, true, 0}, .headless = true},
    };
    struct reassembly *r = reassembly_new();

    for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
        struct given g;
        uint32_t lost = 0;

        check_case("unsound: %s", cases[i].name);
        give(&g, 1, &(struct piece){0, 0, true, 0});
        free(g.copy);
        g.copy = calloc(1, cases[i].piece.length + 1);
        g.fragment.piece = g.copy;
        g.fragment.offset = cases[i].piece.at;
        g.fragment.length = cases[i].piece.length;
        g.fragment.more = cases[i].piece.more;
        g.fragment.before = cases[i].before;
        g.fragment.headless = cases[i].headless;
        CHECK_EQUAL(reassembly_add(r, &g.fragment, 1, 0, 0, &lost), 0);
        CHECK_EQUAL(lost, !cases[i].taken);
        CHECK_EQUAL(reassembly_waits(r), cases[i].taken);
        CHECK_EQUAL(reassembly_forget(r, 1), cases[i].taken);
        free(g.copy);
    }
    reassembly_free(r);
}

/* Only the first one has other headers, so that it is too long shows at the end. */
static void test_too_long(void)
{
    struct reassembly *r = reassembly_new();
    struct piece pieces[FRAGMENTS_MAX];
    unsigned count = cut(pieces, MAX, 1448);
    uint32_t lost = 0;

    check_case("too long");
    for (unsigned i = count; i-- > 0;) {
        struct given g;

        give(&g, 1, &pieces[i]);
        g.fragment.before = i ? 0 : 8;
        CHECK_EQUAL(reassembly_add(r, &g.fragment, 1, 0, 0, &lost), 0);
        CHECK_EQUAL(lost, i ? 0 : count);
        free(g.copy);
    }
    CHECK(!reassembly_waits(r));
    reassembly_free(r);
}

static void test_keys(void)
{
    const struct piece first = {0, 8, true, 0}, last = {8, 8, false, 0};
    struct reassembly *r = reassembly_new();
    struct given g;
    uint32_t lost = 0;

    check_case("what tells packets apart");
    CHECK_EQUAL(add(r, 1, first, &lost), 0);
    for (unsigned other = 0; other < 5; other++) {
        give(&g, other == 0 ? 2 : 1, &last);
        g.fragment.source.bytes[3] ^= other == 1;
        g.fragment.destination.bytes[15] ^= other == 2;
        CHECK_EQUAL(reassembly_add(r, &g.fragment, other == 3 ? 2 : 1, other == 4 ? 7 : 0, 0, &lost), 0);
        free(g.copy);
    }
    check_packet(r, add(r, 1, last, &lost), 16);
    CHECK_EQUAL(lost, 0);
    CHECK_EQUAL(reassembly_forget(r, 2), 1);
    CHECK_EQUAL(reassembly_forget(r, 1), 4);
    reassembly_free(r);
}

static void test_timeout(void)
{
    const uint64_t then = 5, late = then + REASSEMBLY_TIMEOUT_NS;
    struct reassembly *r = reassembly_new();
    uint32_t lost = 0;

    check_case("timeout");
    CHECK_EQUAL(add_at(r, 1, (struct piece){0, 8, true, 0}, then, &lost), 0);
    CHECK_EQUAL(add_at(r, 1, (struct piece){8, 8, true, 0}, late - 1, &lost), 0);
    CHECK_EQUAL(add_at(r, 2, (struct piece){0, 8, true, 0}, then + 1, &lost), 0);
    CHECK_EQUAL(reassembly_expire(r, late - 1), 0);
    CHECK_EQUAL(reassembly_expire(r, late), 2);
    CHECK_EQUAL(reassembly_expire(r, late), 0);
    CHECK(reassembly_waits(r));
    check_case("timeout that only shows by the next fragment");
    CHECK_EQUAL(add_at(r, 2, (struct piece){8, 8, false, 0}, late + 1, &lost), 0);
    CHECK_EQUAL(lost, 1);
    check_packet(r, add_at(r, 2, (struct piece){0, 8, true, 0}, late + 2, &lost), 16);
    CHECK_EQUAL(lost, 1);
    reassembly_free(r);
}

static void test_flood(void)
{
    struct reassembly *r = reassembly_new();
    const struct piece first = {0, 8, true, 0}, second = {8, 8, true, 0}, last = {16, 8, false, 0};
    uint32_t lost = 0;

    check_case("flood of first fragments");
    CHECK_EQUAL(add(r, 1, first, &lost), 0);
    CHECK_EQUAL(add(r, 1, second, &lost), 0);
    for (uint32_t id = 2; id <= REASSEMBLY_WAITING_MAX; id++)
        CHECK_EQUAL(add(r, id, first, &lost), 0);
    CHECK_EQUAL(lost, 0);
    CHECK_EQUAL(add(r, 1000, first, &lost), 0); /* the oldest is gone, with both fragments */
    CHECK_EQUAL(lost, 2);
    CHECK_EQUAL(add(r, 3, second, &lost), 0); /* no younger for it */
    for (uint32_t id = 2000; id < 12000; id++)
        CHECK_EQUAL(add(r, id, first, &lost), 0);
    CHECK_EQUAL(lost, 2 + 10000 + 1);
    CHECK_EQUAL(add(r, 11999, second, &lost), 0);
    check_packet(r, add(r, 11999, last, &lost), 24);
    CHECK_EQUAL(reassembly_forget(r, 1), REASSEMBLY_WAITING_MAX - 1);
    reassembly_free(r);
}

/* Complete packets stay as they are until they are released, whatever comes; there is room for so many. */
static void test_held(void)
{
    struct reassembly *r = reassembly_new();
    const struct piece first = {0, 8, true, 0}, last = {8, 8, false, 0};
    uint8_t handles[REASSEMBLY_HELD_MAX];
    uint32_t lost = 0;

    check_case("held packets");
    for (unsigned i = 0; i < REASSEMBLY_HELD_MAX; i++) {
        CHECK(reassembly_has_room(r));
        CHECK_EQUAL(add(r, i, first, &lost), 0);
        handles[i] = add(r, i, last, &lost);
        CHECK(handles[i]);
    }
    CHECK(!reassembly_has_room(r) && !reassembly_waits(r));
    for (uint32_t id = 0; id < 1000; id++)
        CHECK_EQUAL(add(r, id, (struct piece){0, 8, true, 0xff}, &lost), 0);
    CHECK_EQUAL(reassembly_expire(r, REASSEMBLY_TIMEOUT_NS) + lost, 1000);
    for (unsigned i = 0; i < REASSEMBLY_HELD_MAX; i++) {
        check_packet(r, handles[i], 16);
        CHECK(reassembly_has_room(r));
    }
    reassembly_free(r);
}

/* From the bytes of fragments to the packet, which parses: what is taken apart of each is right. */
static void test_bytes(void)
{
    static const uint8_t before[8] = {44}; /* destination options */
    struct reassembly *r = reassembly_new();
    uint8_t whole[40 + 8 + 4000], frame[40 + 16 + MTU + 6];
    const struct datagram6 datagram = {
        .source = {0x20, 1, [15] = 1}, .destination = {0xff, 5, [15] = 2}, .source_port = 4000,
        .destination_port = 5000, .hops = 9, .class = 0xb8, .next = 17, .payload = body, .payload_length = 4000,
    };
    size_t length = datagram6_write(whole, &datagram) - 40, at = 0;
    struct packet_fragment fragment;
    struct packet packet;
    uint32_t lost = 0;
    uint8_t handle = 0;

    check_case("from bytes");
    CHECK_EQUAL(packet_parse(whole, 40 + length, false, &packet), DROP_NONE);
    CHECK(!packet_parse_fragment(whole, 40 + length, &fragment));
    for (; at < length; at += 1440) {
        size_t taken = length - at < 1440 ? length - at : 1440, total = 40 + 16 + taken;
        bool more = at + taken < length;

        CHECK(!handle);
        memcpy(frame, whole, 40);
        write16(frame + 4, (unsigned)(16 + taken));
        frame[6] = 60;
        frame[7] = (uint8_t)(at ? 77 : 9); /* hop limit */
        memcpy(frame + 40, before, 8);
        memcpy(frame + 48, (const uint8_t[]){17, 0, 0, 0, 1, 2, 3, 4}, 8);
        write16(frame + 50, (unsigned)at | more);
        memcpy(frame + 56, whole + 40 + at, taken);
        memset(frame + total, 0xff, 6); /* padding */
        CHECK_EQUAL(packet_parse(frame, total + 6, true, &packet), DROP_FRAGMENT);
        CHECK(packet_parse_fragment(frame, total + 6, &fragment));
        CHECK(fragment.header == frame && fragment.piece == frame + 56 && fragment.length == taken);
        CHECK_BYTES(&fragment.identification, ((const uint8_t[]){1, 2, 3, 4}), 4);
        CHECK_EQUAL(fragment.offset, at);
        CHECK_EQUAL(fragment.before, 8);
        CHECK_EQUAL(fragment.more, more);
        CHECK(!fragment.headless);
        handle = reassembly_add(r, &fragment, 1, 0, 0, &lost);
    }
    CHECK(handle && !lost);
    {
        size_t got;
        const uint8_t *bytes = reassembly_packet(r, handle, &got);

        CHECK_EQUAL(got, 40 + length);
        CHECK_BYTES(bytes, whole, got);
        CHECK_EQUAL(packet_parse(bytes, got, false, &packet), DROP_NONE);
        CHECK_EQUAL(packet.ttl, 9);
        CHECK_EQUAL(packet.tos, 0xb8);
        CHECK_EQUAL(packet.payload_length, 4000);
    }
    reassembly_release(r, handle);
    reassembly_free(r);
}

static void test_headless(void)
{
    static const struct {
        const char *name;
        uint8_t next, bytes[24];
        size_t length, offset;
        bool headless;
    } cases[] = {
        {"a UDP header", 17, {0}, 8, 0, false},
        {"options, and UDP", 60, {17, 0}, 16, 0, false},
        {"options without UDP", 60, {17, 0}, 8, 0, true},
        {"options that end behind it", 60, {17, 2}, 16, 0, true},
        {"half a UDP header", 17, {0}, 4, 0, true},
        {"another fragment", 44, {17, 0, 0, 1}, 24, 0, true},
        {"no first fragment", 60, {17, 200}, 8, 8, false},
    };

    for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
        uint8_t frame[40 + 8 + 24] = {0x60, [6] = 44, [8] = 0x20, [24] = 0xff};
        struct packet_fragment fragment;

        check_case("first fragment with %s", cases[i].name);
        write16(frame + 4, (unsigned)(8 + cases[i].length));
        frame[40] = cases[i].next;
        write16(frame + 42, (unsigned)cases[i].offset | 1);
        memcpy(frame + 48, cases[i].bytes, cases[i].length);
        CHECK(packet_parse_fragment(frame, 48 + cases[i].length, &fragment));
        CHECK_EQUAL(fragment.headless, cases[i].headless);
        CHECK(!packet_parse_fragment(frame, 48 + cases[i].length - 1, &fragment));
    }
}

int main(void)
{
    for (size_t i = 0; i < sizeof(body); i++)
        body[i] = (uint8_t)(i * 7 + i / 251);
    test_orders();
    test_duplicates();
    test_remains();
    test_contradictions();
    test_unsound();
    test_too_long();
    test_keys();
    test_timeout();
    test_flood();
    test_held();
    test_bytes();
    test_headless();
    return 0;
}

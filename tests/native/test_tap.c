/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_tap.c: who watches a rule sees its packets with what became of them, nobody is waited for, and what could not be
 * shown is counted.
 *
 *     packet -- taps_take ... taps_settle --> writer --socketpair--> reader
 */
#include "tap.h"

#include "check.h"

#include <arpa/inet.h>
#include <errno.h>
#include <sys/socket.h>

enum { RULE = 7, OTHER_RULE = 8, SLOT = 3, SNAP = 64 };

#define ARRIVED_NS UINT64_C(1234567890123456789)

struct pair {
    int reader, writer;
};

static struct taps taps;
static uint8_t bytes_of_packet[1500];

static struct pair pair_open(void)
{
    int ends[2];

    CHECK_EQUAL(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK, 0, ends), 0);
    return (struct pair){ends[0], ends[1]};
}

static void pair_close(struct pair pair)
{
    close(pair.reader);
    close(pair.writer);
}

/* Of one datagram. */
static const struct packet parsed = {.vlan = 5, .payload_length = 1};

/* Bytes of an IPv4 packet of this length. */
static void ipv4(uint16_t length)
{
    memset(bytes_of_packet, 0x5a, sizeof(bytes_of_packet));
    bytes_of_packet[0] = 0x45;
    bytes_of_packet[2] = (uint8_t)(length >> 8);
    bytes_of_packet[3] = (uint8_t)length;
}

static uint16_t take(uint32_t rule, uint32_t outputs)
{
    ipv4(100);
    return taps_take(&taps, rule, outputs, SLOT, &parsed, bytes_of_packet, 100, ARRIVED_NS);
}

/* The next record; the number of bytes behind it, or -1 if there is none, and -2 at the end. */
static int next(struct pair pair, struct tap_record *record, uint8_t *bytes)
{
    static uint8_t received[sizeof(*record) + TAP_BYTES_MAX];
    ssize_t size = recv(pair.reader, received, sizeof(received), MSG_DONTWAIT);

    if (size <= 0)
        return size < 0 && errno == EAGAIN ? -1 : -2;
    CHECK(size >= (ssize_t)sizeof(*record));
    memcpy(record, received, sizeof(*record));
    memcpy(bytes, received + sizeof(*record), (size_t)size - sizeof(*record));
    return (int)(size - (ssize_t)sizeof(*record));
}

static void test_a_packet_is_shown(void)
{
    struct pair pair = pair_open();
    uint8_t bytes[TAP_BYTES_MAX];
    struct tap_record record;
    uint16_t name;

    check_case("a packet is shown");
    taps_init(&taps);
    CHECK_EQUAL(taps.open, 0);
    CHECK_EQUAL(taps_open(&taps, RULE, pair.writer, 10, SNAP), 0);
    CHECK_EQUAL(taps.open, 1);
    CHECK_EQUAL(take(OTHER_RULE, 1), 0);
    CHECK_EQUAL(next(pair, &record, bytes), -1);

    ipv4(30);
    name = taps_take(&taps, RULE, 2, SLOT, &parsed, bytes_of_packet, 46, ARRIVED_NS); /* padded, as Ethernet does */
    CHECK(name);
    CHECK_EQUAL(next(pair, &record, bytes), -1);
    taps_settle(&taps, name, DROP_NONE);
    CHECK_EQUAL(next(pair, &record, bytes), 30);
    CHECK_BYTES(bytes, bytes_of_packet, 30);
    CHECK_EQUAL(record.time_ns, ARRIVED_NS);
    CHECK_EQUAL(record.vlan, 5);
    CHECK_EQUAL(record.length, 30);
    CHECK_EQUAL(record.interface, SLOT);
    CHECK_EQUAL(record.datagrams, 1);
    CHECK_EQUAL(record.outputs, 2);
    CHECK_EQUAL(record.copies, 2);
    CHECK_EQUAL(record.reason, DROP_NONE);
    CHECK_EQUAL(record.drops, 0);
    CHECK_EQUAL(record.lost, 0);

    ipv4(1000);
    name = taps_take(&taps, RULE, 1, SLOT, &parsed, bytes_of_packet, 1000, 0);
    taps_settle(&taps, name, DROP_OWN);
    CHECK_EQUAL(next(pair, &record, bytes), SNAP);
    CHECK_EQUAL(record.length, 1000);
    CHECK_EQUAL(record.reason, DROP_OWN);
    CHECK_EQUAL(record.copies, 0);
    CHECK(record.time_ns > 1500000000000000000);

    bytes_of_packet[0] = 0x60; /* IPv6, whose header says the length of what is behind it */
    bytes_of_packet[4] = 0;
    bytes_of_packet[5] = 10;
    taps_settle(&taps, taps_take(&taps, RULE, 1, SLOT, &parsed, bytes_of_packet, 60, 0), DROP_NONE);
    CHECK_EQUAL(next(pair, &record, bytes), 50);
    CHECK_EQUAL(record.length, 50);

    CHECK_EQUAL(taps_close(&taps, pair.writer), 0);
    CHECK_EQUAL(taps_close(&taps, pair.writer), -ENOENT);
    CHECK_EQUAL(taps.open, 0);
    CHECK_EQUAL(take(RULE, 1), 0);
    pair_close(pair);
}

/* What came by an ordinary UDP socket, without headers, parses as what it was. */
static void test_headers_are_written(const char *what, union address source, union address destination, size_t head)
{
    const uint8_t payload[] = "hello";
    const struct packet sent = {.source = source, .destination = destination, .source_port = 4000,
                                .destination_port = 5000, .ttl = 9, .tos = 0xb8, .protocol = PROTOCOL_UDP,
                                .payload = payload, .payload_length = sizeof(payload)};
    struct pair pair = pair_open();
    uint8_t bytes[TAP_BYTES_MAX];
    struct tap_record record;
    struct packet read;

    check_case("headers of %s", what);
    taps_init(&taps);
    CHECK_EQUAL(taps_open(&taps, RULE, pair.writer, 10, SNAP), 0);
    CHECK_EQUAL(taps_open(&taps, RULE, pair.reader, 10, 30), 0);
    taps_settle(&taps, taps_take(&taps, RULE, 1, SLOT, &sent, NULL, sizeof(payload), 0), DROP_NONE);
    CHECK_EQUAL(next(pair, &record, bytes), head + sizeof(payload));
    CHECK_EQUAL(record.length, head + sizeof(payload));
    CHECK_EQUAL(packet_parse(bytes, head + sizeof(payload), false, &read), DROP_NONE);
    CHECK(address_equals(&read.source, &source) && address_equals(&read.destination, &destination));
    CHECK(read.source_port == 4000 && read.destination_port == 5000 && read.ttl == 9 && read.tos == 0xb8);
    CHECK_EQUAL(read.payload_length, sizeof(payload));
    CHECK_BYTES(read.payload, payload, sizeof(payload));
    CHECK_EQUAL(recv(pair.writer, bytes, sizeof(bytes), MSG_DONTWAIT), sizeof(record) + 30);
    pair_close(pair);
}

static void test_drops_of_outputs(void)
{
    struct pair pair = pair_open();
    uint8_t bytes[TAP_BYTES_MAX];
    struct tap_record record;
    const struct packet merged = {.payload_length = 1400, .segment = 35};
    uint16_t name;

    check_case("drops of outputs");
    taps_init(&taps);
    CHECK_EQUAL(taps_open(&taps, RULE, pair.writer, 10, 0), 0);
    name = take(RULE, 3);
    taps_drop(&taps, name, 41, 1, DROP_EGRESS_FULL);
    taps_drop(&taps, name, 43, 1, DROP_EGRESS_UNREACHABLE);
    taps_settle(&taps, name, DROP_NONE);
    CHECK_EQUAL(next(pair, &record, bytes), 0);
    CHECK_EQUAL(record.copies, 1);
    CHECK_EQUAL(record.drops, 2);
    CHECK_EQUAL(record.dropped[0].output, 41);
    CHECK_EQUAL(record.dropped[0].reason, DROP_EGRESS_FULL);
    CHECK_EQUAL(record.dropped[1].output, 43);
    CHECK_EQUAL(record.dropped[1].reason, DROP_EGRESS_UNREACHABLE);

    check_case("datagrams that were merged, and sent one by one");
    name = taps_take(&taps, RULE, 2, SLOT, &merged, bytes_of_packet, 1400, 0);
    for (unsigned i = 0; i < 15; i++)
        taps_drop(&taps, name, 41, 1, DROP_EGRESS_FULL);
    taps_settle(&taps, name, DROP_NONE);
    CHECK_EQUAL(next(pair, &record, bytes), 0);
    CHECK_EQUAL(record.datagrams, 40);
    CHECK_EQUAL(record.copies, 65);
    CHECK_EQUAL(record.drops, 1);

    check_case("more outputs than a record has room for");
    name = take(RULE, 20);
    for (unsigned i = 0; i < 20; i++)
        taps_drop(&taps, name, 100 + i, 1, DROP_EGRESS_FULL);
    taps_settle(&taps, name, DROP_EGRESS_FULL);
    CHECK_EQUAL(next(pair, &record, bytes), 0);
    CHECK_EQUAL(record.copies, 0);
    CHECK_EQUAL(record.drops, TAP_DROPS_MAX);
    CHECK_EQUAL(record.dropped[TAP_DROPS_MAX - 1].output, 100 + TAP_DROPS_MAX - 1);
    pair_close(pair);
}

static void test_the_end(void)
{
    struct pair pair = pair_open(), other = pair_open();
    uint8_t bytes[TAP_BYTES_MAX];
    struct tap_record record;
    uint16_t name;

    check_case("as many as were asked for");
    taps_init(&taps);
    CHECK_EQUAL(taps_open(&taps, RULE, pair.writer, 2, SNAP), 0);
    for (unsigned i = 0; i < 2; i++)
        taps_settle(&taps, take(RULE, 1), DROP_NONE);
    CHECK_EQUAL(taps.open, 0);
    CHECK_EQUAL(take(RULE, 1), 0);
    for (unsigned i = 0; i < 2; i++)
        CHECK_EQUAL(next(pair, &record, bytes), SNAP);
    CHECK_EQUAL(next(pair, &record, bytes), -1);
    CHECK_EQUAL(taps_close(&taps, pair.writer), 0);

    check_case("more are in hand than were asked for");
    CHECK_EQUAL(taps_open(&taps, RULE, pair.writer, 1, SNAP), 0);
    name = take(RULE, 1);
    taps_settle(&taps, take(RULE, 1), DROP_NONE);
    taps_settle(&taps, name, DROP_NONE);
    CHECK_EQUAL(next(pair, &record, bytes), SNAP);
    CHECK_EQUAL(next(pair, &record, bytes), -1);
    CHECK_EQUAL(taps_close(&taps, pair.writer), 0);

    check_case("closed with a packet in hand");
    CHECK_EQUAL(taps_open(&taps, RULE, pair.writer, 1, SNAP), 0);
    name = take(RULE, 1);
    CHECK_EQUAL(taps_close(&taps, pair.writer), 0);
    CHECK_EQUAL(taps_open(&taps, OTHER_RULE, other.writer, 1, SNAP), 0);
    taps_settle(&taps, name, DROP_NONE);
    CHECK_EQUAL(next(pair, &record, bytes), -1);
    CHECK_EQUAL(next(other, &record, bytes), -1);
    CHECK_EQUAL(taps_close(&taps, other.writer), 0);

    check_case("whoever watched is gone");
    CHECK_EQUAL(taps_open(&taps, RULE, pair.writer, 5, SNAP), 0);
    close(pair.reader);
    taps_settle(&taps, take(RULE, 1), DROP_NONE);
    CHECK_EQUAL(taps.open, 0);
    CHECK_EQUAL(take(RULE, 1), 0);
    CHECK_EQUAL(taps_close(&taps, pair.writer), 0);
    close(pair.writer);
    pair_close(other);
}

static void test_nobody_waits(void)
{
    struct pair pair = pair_open();
    uint8_t bytes[TAP_BYTES_MAX];
    struct tap_record record;
    unsigned shown = 0;
    uint64_t lost;

    check_case("nobody waits");
    taps_init(&taps);
    CHECK_EQUAL(taps_open(&taps, RULE, pair.writer, UINT64_MAX, SNAP), 0);
    for (unsigned i = 0; i < 100000; i++)
        taps_settle(&taps, take(RULE, 1), DROP_NONE);
    lost = taps.all[0].lost;
    CHECK(lost > 0 && lost < 100000);
    while (next(pair, &record, bytes) == SNAP) {
        CHECK_EQUAL(record.lost, 0);
        shown++;
    }
    CHECK_EQUAL(shown + lost, 100000);
    taps_settle(&taps, take(RULE, 1), DROP_NONE);
    CHECK_EQUAL(next(pair, &record, bytes), SNAP);
    CHECK_EQUAL(record.lost, lost);
    pair_close(pair);
}

static void test_more_in_hand_than_there_is_room_for(void)
{
    static uint16_t names[TAPPED_MAX];
    struct pair pair = pair_open();
    uint8_t bytes[TAP_BYTES_MAX];
    struct tap_record record;

    check_case("more in hand than there is room for");
    taps_init(&taps);
    CHECK_EQUAL(taps_open(&taps, RULE, pair.writer, UINT64_MAX, SNAP), 0);
    for (unsigned round = 1; round <= 2; round++) {
        for (unsigned i = 0; i < TAPPED_MAX; i++) {
            names[i] = take(RULE, 1);
            CHECK(names[i]);
        }
        CHECK_EQUAL(take(RULE, 1), 0);
        for (unsigned i = 0; i < TAPPED_MAX; i++) {
            taps_settle(&taps, names[(i * 7) % TAPPED_MAX], DROP_NONE);
            CHECK_EQUAL(next(pair, &record, bytes), SNAP);
            CHECK_EQUAL(record.lost, round);
        }
    }
    pair_close(pair);
}

static void test_several(void)
{
    struct pair pairs[TAPS_MAX + 1];
    uint8_t bytes[TAP_BYTES_MAX];
    struct tap_record record;

    check_case("several");
    taps_init(&taps);
    for (unsigned i = 0; i <= TAPS_MAX; i++)
        pairs[i] = pair_open();
    for (unsigned i = 0; i < TAPS_MAX; i++)
        CHECK_EQUAL(taps_open(&taps, i == 1 ? OTHER_RULE : RULE, pairs[i].writer, 3, 10 + i), 0);
    CHECK_EQUAL(taps_open(&taps, RULE, pairs[TAPS_MAX].writer, 3, SNAP), -EBUSY);
    CHECK_EQUAL(taps_open(&taps, RULE, pairs[0].writer, 3, SNAP), -EINVAL);
    taps_settle(&taps, take(RULE, 1), DROP_NONE);
    for (unsigned i = 0; i < TAPS_MAX; i++)
        CHECK_EQUAL(next(pairs[i], &record, bytes), i == 1 ? -1 : 10 + (int)i);
    CHECK_EQUAL(taps_close(&taps, pairs[2].writer), 0);
    CHECK_EQUAL(taps_open(&taps, RULE, pairs[TAPS_MAX].writer, 3, SNAP), 0);
    CHECK_EQUAL(taps.open, TAPS_MAX);
    for (unsigned i = 0; i <= TAPS_MAX; i++)
        pair_close(pairs[i]);
}

static void test_arguments(void)
{
    struct pair pair = pair_open();

    check_case("arguments");
    taps_init(&taps);
    CHECK_EQUAL(taps_open(&taps, RULE, -1, 1, SNAP), -EINVAL);
    CHECK_EQUAL(taps_open(&taps, RULE, pair.writer, 0, SNAP), -EINVAL);
    CHECK_EQUAL(taps_open(&taps, RULE, pair.writer, 1, TAP_BYTES_MAX + 1), -EINVAL);
    CHECK_EQUAL(taps_open(&taps, COUNTERS_RULES_MAX, pair.writer, 1, SNAP), -EINVAL);
    CHECK_EQUAL(taps_close(&taps, -1), -ENOENT);
    CHECK_EQUAL(taps.open, 0);
    pair_close(pair);
}

int main(void)
{
    test_a_packet_is_shown();
    test_headers_are_written("IPv4", address_from_ipv4(htonl(0xc0000201)), address_from_ipv4(htonl(0xe9fc0001)), 28);
    test_headers_are_written("IPv6", (union address){.bytes = {0x20, 1, 0x0d, 0xb8, [15] = 1}},
                             (union address){.bytes = {0xff, 0x3e, [15] = 1}}, 48);
    test_drops_of_outputs();
    test_the_end();
    test_nobody_waits();
    test_more_in_hand_than_there_is_room_for();
    test_several();
    test_arguments();
    return 0;
}

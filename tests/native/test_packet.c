/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_packet.c: every drop reason of packet_parse is reached by its cause and by nothing else, good packets come
 * through whole, and no input makes it look beyond the frame.
 */
#include "packet.h"

#include "check.h"
#include "datagram.h"

#include <arpa/inet.h>

enum {
    PAYLOAD_MAX = 1500,
    RANDOM_RUNS = 2000000,
    UDP = DATAGRAM_IP_HEADER, /* where the UDP header starts in a packet without options */
};

static uint8_t payload[PAYLOAD_MAX];

static const struct datagram good = {
    .source = 0xc0000201,      /* 192.0.2.1 */
    .destination = 0xe9fc0001, /* 233.252.0.1 */
    .source_port = 40000,
    .destination_port = 5000,
    .ttl = 17,
    .payload = payload,
};

enum seal { SEAL_NOTHING, SEAL_IP, SEAL_BOTH };

static const struct packet_case {
    const char *name;
    size_t payload_length;
    unsigned options;
    struct {
        unsigned at, width, value; /* width 0: no edit */
    } edits[3];
    enum seal seal;
    int padding; /* bytes behind the packet; negative: bytes missing */
    bool vouched;
    enum drop_reason expected;
    size_t expected_length; /* of the payload, if expected is DROP_NONE */
} cases[] = {
    {.name = "plain", .payload_length = 100, .expected_length = 100},
    {.name = "plain, vouched", .payload_length = 100, .vouched = true, .expected_length = 100},
    {.name = "odd payload", .payload_length = 101, .expected_length = 101},
    {.name = "one byte", .payload_length = 1, .expected_length = 1},
    {.name = "no payload", .payload_length = 0, .expected_length = 0},
    {.name = "largest of an Ethernet", .payload_length = 1472, .expected_length = 1472},
    {.name = "options", .payload_length = 10, .options = 1, .expected_length = 10},
    {.name = "all options, odd payload", .payload_length = 11, .options = 10, .expected_length = 11},
    {.name = "one byte of padding", .payload_length = 18, .padding = 1, .expected_length = 18},
    {.name = "short Ethernet frame", .payload_length = 1, .padding = 17, .expected_length = 1},
    {.name = "padding behind no payload", .payload_length = 0, .padding = 18, .expected_length = 0},
    {.name = "don't fragment", .payload_length = 8, .edits = {{6, 2, 0x4000}}, .seal = SEAL_IP, .expected_length = 8},
    {.name = "reserved flag", .payload_length = 8, .edits = {{6, 2, 0x8000}}, .seal = SEAL_IP, .expected_length = 8},
    {.name = "TTL 0", .payload_length = 8, .edits = {{8, 1, 0}}, .seal = SEAL_IP, .expected_length = 8},

    {.name = "one byte missing", .payload_length = 8, .padding = -1, .expected = DROP_TRUNCATED},
    {.name = "UDP header missing", .payload_length = 0, .padding = -8, .expected = DROP_TRUNCATED},
    {.name = "total length beyond the frame", .payload_length = 8, .edits = {{2, 2, 37}}, .seal = SEAL_IP,
     .expected = DROP_TRUNCATED},
    {.name = "total length 65535", .payload_length = 8, .edits = {{2, 2, 65535}}, .seal = SEAL_IP,
     .expected = DROP_TRUNCATED},
    {.name = "no room for a UDP header", .payload_length = 8, .edits = {{2, 2, 27}}, .seal = SEAL_IP,
     .expected = DROP_TRUNCATED},
    {.name = "IP header only", .payload_length = 8, .edits = {{2, 2, 20}}, .seal = SEAL_IP, .expected = DROP_TRUNCATED},
    {.name = "options up to the end", .payload_length = 32, .edits = {{0, 1, 0x4f}}, .seal = SEAL_IP,
     .expected = DROP_TRUNCATED},

    {.name = "version 6", .payload_length = 8, .edits = {{0, 1, 0x65}}, .seal = SEAL_IP, .expected = DROP_NOT_IPV4},
    {.name = "version 0", .payload_length = 8, .edits = {{0, 1, 0x05}}, .seal = SEAL_IP, .expected = DROP_NOT_IPV4},
    {.name = "version 15", .payload_length = 8, .edits = {{0, 1, 0xf5}}, .seal = SEAL_IP, .expected = DROP_NOT_IPV4},
    {.name = "total length 0", .payload_length = 8, .edits = {{2, 2, 0}}, .seal = SEAL_IP,
     .expected = DROP_BAD_IP_HEADER},
    {.name = "total length 19", .payload_length = 8, .edits = {{2, 2, 19}}, .seal = SEAL_IP,
     .expected = DROP_BAD_IP_HEADER},
    {.name = "header beyond total length", .payload_length = 8, .edits = {{0, 1, 0x4f}},
     .expected = DROP_BAD_IP_HEADER},

    {.name = "IP checksum off by one", .payload_length = 8, .edits = {{8, 1, 16}}, .expected = DROP_BAD_IP_CHECKSUM},
    {.name = "no IP checksum", .payload_length = 8, .edits = {{10, 2, 0}}, .expected = DROP_BAD_IP_CHECKSUM},
    {.name = "wrong IP checksum, vouched", .payload_length = 8, .edits = {{10, 2, 1}}, .vouched = true,
     .expected = DROP_BAD_IP_CHECKSUM},
    {.name = "wrong in the options", .payload_length = 8, .options = 2, .edits = {{27, 1, 0}},
     .expected = DROP_BAD_IP_CHECKSUM},

    {.name = "first fragment", .payload_length = 8, .edits = {{6, 2, 0x2000}}, .seal = SEAL_IP,
     .expected = DROP_FRAGMENT},
    {.name = "last fragment", .payload_length = 8, .edits = {{6, 2, 0x0001}}, .seal = SEAL_IP,
     .expected = DROP_FRAGMENT},
    {.name = "farthest fragment", .payload_length = 8, .edits = {{6, 2, 0x1fff}}, .seal = SEAL_IP,
     .expected = DROP_FRAGMENT},
    {.name = "fragment of something else", .payload_length = 8, .edits = {{6, 2, 0x3fff}, {9, 1, 6}}, .seal = SEAL_IP,
     .expected = DROP_FRAGMENT},

    {.name = "TCP", .payload_length = 32, .edits = {{9, 1, 6}}, .seal = SEAL_IP, .expected = DROP_NOT_UDP},
    {.name = "IGMP", .payload_length = 0, .edits = {{9, 1, 2}}, .seal = SEAL_IP, .expected = DROP_NOT_UDP},
    {.name = "UDP-Lite", .payload_length = 8, .edits = {{9, 1, 136}}, .seal = SEAL_IP, .expected = DROP_NOT_UDP},
    {.name = "protocol 0, no room", .payload_length = 0, .edits = {{9, 1, 0}, {2, 2, 20}}, .seal = SEAL_IP,
     .expected = DROP_NOT_UDP},

    {.name = "UDP length 0", .payload_length = 8, .edits = {{UDP + 4, 2, 0}}, .expected = DROP_BAD_UDP_LENGTH},
    {.name = "UDP length 7", .payload_length = 8, .edits = {{UDP + 4, 2, 7}}, .expected = DROP_BAD_UDP_LENGTH},
    {.name = "UDP length one too many", .payload_length = 8, .edits = {{UDP + 4, 2, 17}},
     .expected = DROP_BAD_UDP_LENGTH},
    {.name = "UDP length into the padding", .payload_length = 8, .edits = {{UDP + 4, 2, 17}}, .padding = 10,
     .expected = DROP_BAD_UDP_LENGTH},
    {.name = "UDP length 65535, vouched", .payload_length = 8, .edits = {{UDP + 4, 2, 65535}}, .vouched = true,
     .expected = DROP_BAD_UDP_LENGTH},
    {.name = "total length one too few", .payload_length = 8, .edits = {{2, 2, 35}}, .seal = SEAL_IP,
     .expected = DROP_BAD_UDP_LENGTH},

    {.name = "shorter than the IP payload", .payload_length = 8, .edits = {{UDP + 4, 2, 13}}, .seal = SEAL_BOTH,
     .expected_length = 5},
    {.name = "empty in a longer IP payload", .payload_length = 8, .edits = {{UDP + 4, 2, 8}}, .seal = SEAL_BOTH,
     .expected_length = 0},
    {.name = "shorter, checksum of the whole", .payload_length = 8, .edits = {{UDP + 4, 2, 13}},
     .expected = DROP_BAD_UDP_CHECKSUM},

    {.name = "wrong UDP checksum", .payload_length = 8, .edits = {{UDP + 6, 2, 0x1234}},
     .expected = DROP_BAD_UDP_CHECKSUM},
    {.name = "wrong UDP checksum, vouched", .payload_length = 8, .edits = {{UDP + 6, 2, 0x1234}}, .vouched = true,
     .expected_length = 8},
    {.name = "no UDP checksum", .payload_length = 8, .edits = {{UDP + 6, 2, 0}}, .expected_length = 8},
    {.name = "damaged payload", .payload_length = 9, .edits = {{UDP + 16, 1, 0xee}}, .expected = DROP_BAD_UDP_CHECKSUM},
    {.name = "damaged payload, no checksum", .payload_length = 9, .edits = {{UDP + 16, 1, 0xee}, {UDP + 6, 2, 0}},
     .expected_length = 9},
    {.name = "other destination than sent to", .payload_length = 8, .edits = {{19, 1, 2}}, .seal = SEAL_IP,
     .expected = DROP_BAD_UDP_CHECKSUM},
};

/* Parse from a block that ends where the frame ends; the result is checked against the block. */
static enum drop_reason parse_exactly(const uint8_t *frame, size_t length, bool vouched, struct packet *packet)
{
    uint8_t *copy = exact_copy(frame, length);
    enum drop_reason reason = packet_parse(copy, length, vouched, packet);

    CHECK(reason == DROP_NONE || (reason > DROP_NONE && reason < DROP_REASONS));
    if (reason == DROP_NONE) {
        size_t offset = (size_t)(packet->payload - copy);

        CHECK(packet->payload >= copy && offset >= 28 && offset <= length);
        CHECK(packet->payload_length <= length - offset);
        CHECK_EQUAL(packet->payload_length + 8, copy[offset - 4] << 8 | copy[offset - 3]);
        CHECK_EQUAL(offset, (copy[0] & 0xf) * 4 + 8);
        packet->payload = frame + offset;
    }
    free(copy);
    return reason;
}

static void run_case(const struct packet_case *c)
{
    uint8_t frame[PAYLOAD_MAX + DATAGRAM_HEADERS_MAX + 64] = {0};
    struct datagram datagram = good;
    struct packet packet;
    size_t length;

    check_case("%s", c->name);
    datagram.payload_length = c->payload_length;
    datagram.options = c->options;
    length = datagram_write(frame, &datagram);
    for (unsigned i = 0; i < 3; i++)
        if (c->edits[i].width == 1)
            frame[c->edits[i].at] = (uint8_t)c->edits[i].value;
        else if (c->edits[i].width == 2)
            write16(frame + c->edits[i].at, c->edits[i].value);
    if (c->seal == SEAL_BOTH)
        seal_udp(frame);
    if (c->seal != SEAL_NOTHING)
        seal_ip(frame);
    CHECK_EQUAL(parse_exactly(frame, (size_t)((int)length + c->padding), c->vouched, &packet), c->expected);
    if (c->expected != DROP_NONE)
        return;
    CHECK_EQUAL(packet.payload_length, c->expected_length);
    CHECK_BYTES(packet.payload, frame + DATAGRAM_IP_HEADER + 4 * c->options + DATAGRAM_UDP_HEADER, c->expected_length);
    CHECK_BYTES(packet.source.bytes, address_from_ipv4(htonl(good.source)).bytes, 16);
    CHECK_BYTES(packet.destination.bytes, address_from_ipv4(htonl(good.destination)).bytes, 16);
    CHECK_EQUAL(packet.source_port, good.source_port);
    CHECK_EQUAL(packet.destination_port, good.destination_port);
    CHECK_EQUAL(packet.ttl, frame[8]);
}

static void test_addresses(void)
{
    const uint8_t mapped[16] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 192, 0, 2, 1};

    check_case("mapped address");
    CHECK_BYTES(address_from_ipv4(htonl(good.source)).bytes, mapped, 16);
}

/* However much is missing from a good packet's end, that is the reason. */
static void test_truncation(void)
{
    uint8_t frame[DATAGRAM_HEADERS_MAX + 64];
    struct datagram datagram = good;
    struct packet packet;

    for (datagram.options = 0; datagram.options <= DATAGRAM_OPTIONS_MAX; datagram.options++)
        for (datagram.payload_length = 0; datagram.payload_length < 64; datagram.payload_length += 7) {
            size_t length = datagram_write(frame, &datagram);

            for (size_t left = 0; left < length; left++) {
                check_case("%u options, %zu bytes cut to %zu", datagram.options, length, left);
                CHECK_EQUAL(parse_exactly(frame, left, false, &packet), DROP_TRUNCATED);
                CHECK_EQUAL(parse_exactly(frame, left, true, &packet), DROP_TRUNCATED);
            }
            CHECK_EQUAL(parse_exactly(frame, length, false, &packet), DROP_NONE);
        }
}

static void test_header_lengths(void)
{
    for (unsigned words = 0; words < 16; words++)
        for (size_t payload_length = 0; payload_length < 64; payload_length++) {
            static const uint8_t zeros[64];
            uint8_t frame[DATAGRAM_HEADERS_MAX + 64];
            struct datagram datagram = good;
            enum drop_reason expected = DROP_NONE;
            struct packet packet;
            size_t length;

            check_case("IHL %u, %zu bytes of payload", words, payload_length);
            datagram.payload = zeros;
            datagram.payload_length = payload_length;
            length = datagram_write(frame, &datagram);
            frame[0] = (uint8_t)(0x40 | words);
            if (words * 4 <= length)
                seal_ip(frame);
            if (words < 5 || words * 4 > length)
                expected = DROP_BAD_IP_HEADER;
            else if (words * 4 + 8 > length)
                expected = DROP_TRUNCATED;
            else if (words > 5) /* where the UDP length is looked for lies a payload of zeros */
                expected = DROP_BAD_UDP_LENGTH;
            CHECK_EQUAL(parse_exactly(frame, length, false, &packet), expected);
        }
}

/* A computed checksum of zero is sent as 0xffff, and accepted like any other. */
static void test_checksum_of_ones(void)
{
    uint8_t frame[DATAGRAM_HEADERS_MAX + 2], bytes[2];
    struct datagram datagram = good;
    struct packet packet;
    unsigned found = 0;

    datagram.payload = bytes;
    datagram.payload_length = sizeof(bytes);
    for (unsigned value = 0; value < 65536; value++) {
        size_t length;

        write16(bytes, value);
        length = datagram_write(frame, &datagram);
        check_case("payload 0x%04x", value);
        CHECK_EQUAL(parse_exactly(frame, length, false, &packet), DROP_NONE);
        found += frame[UDP + 6] == 0xff && frame[UDP + 7] == 0xff;
    }
    CHECK(found > 0);
}

/* Damage good packets at random; what is still accepted lies within the frame (parse_exactly looks). */
static void test_random(void)
{
    uint64_t state = UINT64_C(0x6d6372656c6179);
    uint64_t seen[DROP_REASONS] = {0};
    uint8_t frame[DATAGRAM_HEADERS_MAX + 96] = {0};

    for (unsigned run = 0; run < RANDOM_RUNS; run++) {
        struct datagram datagram = good;
        bool vouched = random_below(&state, 2);
        struct packet packet;
        size_t length;

        check_case("random packet %u", run);
        datagram.options = random_below(&state, 4) ? 0 : random_below(&state, DATAGRAM_OPTIONS_MAX + 1);
        datagram.payload_length = random_below(&state, 64);
        length = datagram_write(frame, &datagram);
        for (unsigned edits = random_below(&state, 4); edits; edits--)
            frame[random_below(&state, (uint32_t)(random_below(&state, 2) ? length : 28))] =
                (uint8_t)random_next(&state);
        if (random_below(&state, 4) && (size_t)(frame[0] & 0xf) * 4 <= length)
            seal_ip(frame);
        if (!random_below(&state, 4))
            length = random_below(&state, (uint32_t)length + 32);
        seen[parse_exactly(frame, length, vouched, &packet)]++;
    }
    for (enum drop_reason reason = DROP_NONE; reason < DROP_REASONS; reason++) {
        bool parsers = reason <= DROP_BAD_UDP_CHECKSUM && reason != DROP_OVERSIZE;

        check_case("reason %d among random packets", reason);
        CHECK(parsers ? seen[reason] > 100 : seen[reason] == 0);
    }
}

int main(void)
{
    for (size_t i = 0; i < sizeof(payload); i++)
        payload[i] = (uint8_t)(i * 7 + 1);
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++)
        run_case(&cases[i]);
    test_addresses();
    test_truncation();
    test_header_lengths();
    test_checksum_of_ones();
    test_random();
    return 0;
}

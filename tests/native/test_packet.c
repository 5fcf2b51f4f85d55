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
    {.name = "type of service", .payload_length = 8, .edits = {{1, 1, 0xb9}}, .seal = SEAL_IP, .expected_length = 8},
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

    {.name = "version 5", .payload_length = 8, .edits = {{0, 1, 0x55}}, .seal = SEAL_IP, .expected = DROP_NOT_IP},
    {.name = "version 0", .payload_length = 8, .edits = {{0, 1, 0x05}}, .seal = SEAL_IP, .expected = DROP_NOT_IP},
    {.name = "version 15", .payload_length = 8, .edits = {{0, 1, 0xf5}}, .seal = SEAL_IP, .expected = DROP_NOT_IP},
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
        size_t header = copy[0] >> 4 == 4 ? (copy[0] & 0xfu) * 4 : DATAGRAM6_IP_HEADER;

        CHECK(packet->payload >= copy && offset <= length);
        CHECK(packet->payload_length <= length - offset);
        CHECK(packet->protocol == PROTOCOL_UDP || packet->protocol == PROTOCOL_ESP);
        if (packet->protocol == PROTOCOL_UDP) {
            CHECK(offset >= header + 8);
            CHECK_EQUAL(packet->payload_length + 8, copy[offset - 4] << 8 | copy[offset - 3]);
            header += 8;
        } else {
            CHECK(!packet->source_port && !packet->destination_port);
        }
        CHECK(copy[0] >> 4 == 4 ? offset == header : offset >= header);
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
    CHECK_EQUAL(packet.protocol, PROTOCOL_UDP);
    CHECK_EQUAL(packet.tos, frame[1]);
    CHECK_EQUAL(packet.vlan, 0);
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

/* ESP: all behind the header, with options and without, and nothing of the padding. */
static void test_esp(void)
{
    for (unsigned options = 0; options <= DATAGRAM_OPTIONS_MAX; options += 5)
        for (size_t payload_length = 0; payload_length < 3; payload_length++) {
            uint8_t frame[DATAGRAM_HEADERS_MAX + 64] = {0};
            struct datagram datagram = good;
            struct packet packet;
            size_t length;

            check_case("ESP, %u options, %zu bytes", options, payload_length);
            datagram.options = options;
            datagram.payload_length = payload_length;
            length = datagram_write(frame, &datagram);
            frame[9] = 50;
            seal_ip(frame);
            CHECK_EQUAL(parse_exactly(frame, length + 6, false, &packet), DROP_NONE);
            CHECK_EQUAL(packet.protocol, PROTOCOL_ESP);
            CHECK(packet.payload == frame + 20 + 4 * options);
            CHECK_EQUAL(packet.payload_length, 8 + payload_length);
        }
}

/* --- IPv6 ----------------------------------------------------------------------------------------------------------- */

static const struct datagram6 good6 = {
    .source = {0x20, 0x01, 0x0d, 0xb8, [15] = 1},
    .destination = {0xff, 0x3e, [12] = 0x80, [15] = 0x39},
    .source_port = 40000,
    .destination_port = 5000,
    .hops = 17,
    .class = 0xb9,
    .next = 17,
    .payload = payload,
};

/* Chains of extension headers: each is written as kind and length in bytes, and what its bytes 2 to 3 are. */
struct link {
    uint8_t kind;
    unsigned length;
    uint8_t third, fourth;
};

static const struct chain_case {
    const char *name;
    struct link links[12];
    unsigned count;
    uint8_t carried;
    enum drop_reason expected;
} chains[] = {
    {"none", {{0}}, 0, 17, DROP_NONE},
    {"ESP", {{0}}, 0, 50, DROP_NONE},
    {"TCP", {{0}}, 0, 6, DROP_NOT_UDP},
    {"no next header", {{0}}, 0, 59, DROP_NOT_UDP},
    {"ICMPv6", {{0}}, 0, 58, DROP_NOT_UDP},
    {"hop by hop", {{0, 8, 5, 2}}, 1, 17, DROP_NONE},
    {"hop by hop, long", {{0, 2048, 5, 2}}, 1, 17, DROP_NONE},
    {"destination options", {{60, 16, 1, 12}}, 1, 17, DROP_NONE},
    {"routing, no segments left", {{43, 24, 0, 0}}, 1, 17, DROP_NONE},
    {"routing, a segment left", {{43, 24, 0, 1}}, 1, 17, DROP_BAD_EXTENSION},
    {"atomic fragment", {{44, 8, 0, 0}}, 1, 17, DROP_NONE},
    {"atomic fragment, reserved bits", {{44, 8, 0, 6}}, 1, 17, DROP_NONE},
    {"first fragment", {{44, 8, 0, 1}}, 1, 17, DROP_FRAGMENT},
    {"last fragment", {{44, 8, 0, 8}}, 1, 17, DROP_FRAGMENT},
    {"far fragment", {{44, 8, 0x80, 0}}, 1, 17, DROP_FRAGMENT},
    {"fragment of something else", {{44, 8, 0, 1}}, 1, 6, DROP_FRAGMENT},
    {"authentication", {{51, 24, 0, 0}}, 1, 17, DROP_NONE},
    {"authentication of 12 bytes", {{51, 12, 0, 0}}, 1, 17, DROP_NONE},
    {"authentication of 8 bytes", {{51, 8, 0, 0}}, 1, 17, DROP_NONE},
    {"authenticated ESP", {{51, 24, 0, 0}}, 1, 50, DROP_NONE},
    {"in the recommended order", {{0, 8, 1, 4}, {60, 8, 1, 4}, {43, 8, 0, 0}, {44, 8, 0, 0}, {51, 24, 0, 0},
     {60, 8, 1, 4}}, 6, 17, DROP_NONE},
    {"as many as can be", {{60, 8, 1, 4}, {60, 8, 1, 4}, {60, 8, 1, 4}, {60, 8, 1, 4}, {60, 8, 1, 4}, {60, 8, 1, 4},
     {60, 8, 1, 4}, {60, 8, 1, 4}}, 8, 17, DROP_NONE},
    {"one too many", {{60, 8, 1, 4}, {60, 8, 1, 4}, {60, 8, 1, 4}, {60, 8, 1, 4}, {60, 8, 1, 4}, {60, 8, 1, 4},
     {60, 8, 1, 4}, {60, 8, 1, 4}, {60, 8, 1, 4}}, 9, 17, DROP_BAD_EXTENSION},
    {"a fragment that is one too many", {{60, 8, 1, 4}, {60, 8, 1, 4}, {60, 8, 1, 4}, {60, 8, 1, 4}, {60, 8, 1, 4},
     {60, 8, 1, 4}, {60, 8, 1, 4}, {60, 8, 1, 4}, {44, 8, 0, 1}}, 9, 17, DROP_BAD_EXTENSION},
};

static size_t write_chain(uint8_t *frame, const struct chain_case *c, size_t payload_length)
{
    uint8_t extensions[4096] = {0};
    struct datagram6 datagram = good6;
    size_t at = 0;

    for (unsigned i = 0; i < c->count; i++) {
        extensions[at] = i + 1 < c->count ? c->links[i + 1].kind : c->carried;
        extensions[at + 1] = (uint8_t)(c->links[i].kind == 51   ? c->links[i].length / 4 - 2
                                       : c->links[i].kind == 44 ? 0
                                                                : c->links[i].length / 8 - 1);
        extensions[at + 2] = c->links[i].third;
        extensions[at + 3] = c->links[i].fourth;
        at += c->links[i].length;
    }
    datagram.next = c->count ? c->links[0].kind : c->carried;
    datagram.extensions = extensions;
    datagram.extensions_length = at;
    datagram.payload_length = payload_length;
    return datagram6_write(frame, &datagram);
}

static void test_chain(const struct chain_case *c)
{
    uint8_t frame[4096 + 128] = {0};
    size_t length = write_chain(frame, c, 21), headers = length - 29;
    struct packet packet;

    check_case("IPv6, %s", c->name);
    CHECK_EQUAL(parse_exactly(frame, length, false, &packet), c->expected);
    if (c->expected != DROP_NONE)
        return;
    CHECK_EQUAL(packet.protocol, c->carried);
    CHECK_EQUAL(packet.ttl, 17);
    CHECK_EQUAL(packet.tos, 0xb9);
    CHECK_EQUAL(packet.vlan, 0);
    CHECK_BYTES(packet.source.bytes, good6.source, 16);
    CHECK_BYTES(packet.destination.bytes, good6.destination, 16);
    CHECK_EQUAL(packet.payload_length, c->carried == 17 ? 21 : 29);
    CHECK(packet.payload == frame + headers + (c->carried == 17 ? 8 : 0));
    if (c->carried == 17) {
        CHECK_EQUAL(packet.source_port, 40000);
        CHECK_EQUAL(packet.destination_port, 5000);
    }
    CHECK_EQUAL(parse_exactly(frame, length + 7, false, &packet), DROP_NONE); /* padding */
    CHECK_EQUAL(packet.payload_length, c->carried == 17 ? 21 : 29);
    for (size_t left = 0; left < length; left++) {
        check_case("IPv6, %s, cut to %zu", c->name, left);
        CHECK_EQUAL(parse_exactly(frame, left, true, &packet), DROP_TRUNCATED);
    }
    /* The same, and the IPv6 header says so. */
    for (size_t left = 41; left < length; left++) {
        enum drop_reason expected = left < headers                          ? DROP_BAD_EXTENSION
                                    : c->carried == 50                      ? DROP_NONE
                                    : left < headers + DATAGRAM_UDP_HEADER ? DROP_TRUNCATED
                                                                            : DROP_BAD_UDP_LENGTH;

        check_case("IPv6, %s, of %zu", c->name, left);
        write16(frame + 4, (unsigned)left - 40);
        CHECK_EQUAL(parse_exactly(frame, left, true, &packet), expected);
    }
}

static void test_ipv6(void)
{
    static const struct {
        const char *name;
        unsigned at, width, value;
        bool seal, vouched;
        enum drop_reason expected;
    } edits6[] = {
        {"payload length 0", 4, 2, 0, false, false, DROP_BAD_IP_HEADER},
        {"payload length one too many", 4, 2, 8 + 33, false, false, DROP_TRUNCATED},
        {"payload length 65535", 4, 2, 65535, false, true, DROP_TRUNCATED},
        {"flow label", 2, 2, 0xffff, false, false, DROP_NONE},
        {"hop limit 0", 7, 1, 0, false, false, DROP_NONE},
        {"no UDP checksum", 46, 2, 0, false, false, DROP_BAD_UDP_CHECKSUM},
        {"no UDP checksum, vouched", 46, 2, 0, false, true, DROP_BAD_UDP_CHECKSUM},
        {"wrong UDP checksum", 46, 2, 0x1234, false, false, DROP_BAD_UDP_CHECKSUM},
        {"wrong UDP checksum, vouched", 46, 2, 0x1234, false, true, DROP_NONE},
        {"another source", 23, 1, 2, false, false, DROP_BAD_UDP_CHECKSUM},
        {"another destination", 24, 1, 0xfe, false, false, DROP_BAD_UDP_CHECKSUM},
        {"damaged payload", 60, 1, 0xee, false, false, DROP_BAD_UDP_CHECKSUM},
        {"UDP length 7", 44, 2, 7, false, true, DROP_BAD_UDP_LENGTH},
        {"UDP length 0, as of a jumbogram", 44, 2, 0, false, true, DROP_BAD_UDP_LENGTH},
        {"UDP length one too many", 44, 2, 8 + 33, false, true, DROP_BAD_UDP_LENGTH},
        {"shorter than the IP payload", 44, 2, 8 + 31, true, false, DROP_NONE},
    };
    static const uint8_t mapped[16] = {[10] = 0xff, [11] = 0xff, [12] = 233, [13] = 252, [15] = 1};
    uint8_t frame[128];
    struct packet packet;

    for (size_t i = 0; i < sizeof(edits6) / sizeof(edits6[0]); i++) {
        size_t length = write_chain(frame, &chains[0], 32);

        check_case("IPv6, %s", edits6[i].name);
        if (edits6[i].width == 1)
            frame[edits6[i].at] = (uint8_t)edits6[i].value;
        else
            write16(frame + edits6[i].at, edits6[i].value);
        if (edits6[i].seal)
            seal_udp6(frame, 40);
        CHECK_EQUAL(parse_exactly(frame, length, edits6[i].vouched, &packet), edits6[i].expected);
    }
    check_case("IPv4 addresses in IPv6");
    for (unsigned at = 8; at <= 24; at += 16) {
        size_t length = write_chain(frame, &chains[0], 32);

        memcpy(frame + at, mapped, 16);
        seal_udp6(frame, 40);
        CHECK_EQUAL(parse_exactly(frame, length, false, &packet), DROP_BAD_IP_HEADER);
    }
}

/* Chains of random bytes: nothing is read beyond the frame, and no reason is given that has no cause in them. */
static void test_random6(void)
{
    static const uint8_t kinds[] = {0, 43, 44, 51, 60, 17, 50, 6};
    uint64_t state = UINT64_C(0x69707636);
    uint64_t seen[DROP_REASONS] = {0};

    for (unsigned run = 0; run < RANDOM_RUNS / 4; run++) {
        uint8_t frame[256];
        struct packet packet;
        size_t length = 40 + random_below(&state, 200);

        check_case("random IPv6 packet %u", run);
        for (size_t i = 0; i < length; i++)
            frame[i] = (uint8_t)(random_below(&state, 3) ? 0 : random_next(&state));
        for (size_t at = 40; at < length; at += 8) {
            frame[at] = kinds[random_below(&state, sizeof(kinds))];
            if (at + 1 < length)
                frame[at + 1] = (uint8_t)random_below(&state, 3);
        }
        frame[0] = 0x60;
        frame[6] = kinds[random_below(&state, sizeof(kinds))];
        write16(frame + 4, (unsigned)length - 40 - random_below(&state, 2) * random_below(&state, 9));
        seen[parse_exactly(frame, length, random_below(&state, 2), &packet)]++;
    }
    for (enum drop_reason reason = DROP_NONE; reason < DROP_REASONS; reason++) {
        bool parsers = (reason <= DROP_BAD_UDP_CHECKSUM && reason != DROP_OVERSIZE && reason != DROP_NOT_IP &&
                        reason != DROP_BAD_IP_CHECKSUM) || reason == DROP_BAD_EXTENSION;

        check_case("reason %d among random IPv6 packets", reason);
        CHECK(parsers ? seen[reason] > 100 : seen[reason] == 0);
    }
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
        CHECK(parsers ? seen[reason] > 100 : reason == DROP_BAD_EXTENSION || seen[reason] == 0);
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
    test_esp();
    for (size_t i = 0; i < sizeof(chains) / sizeof(chains[0]); i++)
        test_chain(&chains[i]);
    test_ipv6();
    test_random();
    test_random6();
    return 0;
}

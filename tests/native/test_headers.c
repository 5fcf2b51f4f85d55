/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_headers.c: what a copy's headers say, and their bytes: exactly as the RFCs draw them, with checksums computed by
 * datagram.h, and, whatever the copy, such that packet_parse reads from them what was written.
 */
#include "headers.h"

#include "check.h"
#include "datagram.h"

#include <arpa/inet.h>

enum { RANDOM_RUNS = 100000, PAYLOAD_MAX = 65535 };

static uint8_t payload[PAYLOAD_MAX];

static union address ipv4(uint32_t address)
{
    return address_from_ipv4(htonl(address));
}

static union address ipv6(const char *text)
{
    union address address;

    CHECK_EQUAL(inet_pton(AF_INET6, text, address.bytes), 1);
    return address;
}

/* --- the heading ---------------------------------------------------------------------------------------------------- */

static void test_ttl(void)
{
    static const struct {
        uint8_t rule, flags, came_with, leaves_with;
    } cases[] = {{0, 0, 64, 63}, {0, 0, 1, 1}, {0, 0, 0, 1}, {8, 0, 64, 8}, {0, OUTPUT_KEEP_TTL, 64, 64},
                 {0, OUTPUT_KEEP_TTL, 1, 1}, {0, OUTPUT_KEEP_TTL, 0, 1}, {255, 0, 1, 255}};

    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        const struct table_output output = {.ttl = cases[i].rule, .flags = cases[i].flags};
        const struct packet packet = {.ttl = cases[i].came_with};

        check_case("TTL, case %zu", i);
        CHECK_EQUAL(heading_ttl(&output, &packet), cases[i].leaves_with);
    }
    check_case("DSCP");
    for (unsigned tos = 0; tos < 256; tos++) {
        const struct table_output keep = {.tos = 46 << 2, .flags = OUTPUT_KEEP_DSCP}, set = {.tos = 46 << 2};
        const struct packet packet = {.tos = (uint8_t)tos};

        CHECK_EQUAL(heading_tos(&keep, &packet), tos / 4 * 4);
        CHECK_EQUAL(heading_tos(&set, &packet), 0xb8);
    }
}

/* Which address a copy comes from, and where a copy may go. Texts of IPv6; mapped ones are IPv4. */
static const struct {
    const char *name;
    enum way way;
    uint8_t flags;
    const char *source, *address;
    unsigned prefix;
    const char *packet_source, *packet_destination;
    const char *expected_source, *expected_destination; /* NULL: unreachable */
} choices[] = {
    {"a UDP socket's own", WAY_UDP4, 0, "::", "::ffff:10.0.0.1", 128, "::ffff:192.0.2.1", "::ffff:233.252.0.1", "::",
     "::ffff:10.0.0.1"},
    {"a UDP socket's, given", WAY_UDP4, 0, "::ffff:10.0.0.9", "::ffff:10.0.0.1", 128, "::ffff:192.0.2.1",
     "::ffff:233.252.0.1", "::ffff:10.0.0.9", "::ffff:10.0.0.1"},
    {"the interface's", WAY_FRAME, 0, "::", "::ffff:233.252.0.2", 128, "::ffff:192.0.2.1", "::ffff:233.252.0.1",
     "::ffff:198.51.100.1", "::ffff:233.252.0.2"},
    {"given", WAY_FRAME, 0, "::ffff:10.0.0.9", "::ffff:233.252.0.2", 128, "::ffff:192.0.2.1", "::ffff:233.252.0.1",
     "::ffff:10.0.0.9", "::ffff:233.252.0.2"},
    {"kept", WAY_FRAME, OUTPUT_KEEP_SOURCE, "::ffff:10.0.0.9", "::ffff:233.252.0.2", 128, "::ffff:192.0.2.1",
     "::ffff:233.252.0.1", "::ffff:192.0.2.1", "::ffff:233.252.0.2"},
    {"kept of the other family", WAY_FRAME, OUTPUT_KEEP_SOURCE, "::", "ff3e::2", 128, "::ffff:192.0.2.1",
     "::ffff:233.252.0.1", NULL, NULL},
    {"kept, a group's", WAY_FRAME, OUTPUT_KEEP_SOURCE, "::", "::ffff:233.252.0.2", 128, "::ffff:239.5.5.5",
     "::ffff:233.252.0.1", NULL, NULL},
    {"kept, everybody's", WAY_RAW4, OUTPUT_KEEP_SOURCE, "::", "::ffff:10.0.0.1", 128, "::ffff:255.255.255.255",
     "::ffff:233.252.0.1", NULL, NULL},
    {"kept, an IPv6 group's", WAY_FRAME, OUTPUT_KEEP_SOURCE, "::", "ff3e::2", 128, "ff02::1", "ff3e::1", NULL, NULL},
    {"kept, none, to a group", WAY_FRAME, OUTPUT_KEEP_SOURCE, "::", "::ffff:233.252.0.2", 128, "::ffff:0.0.0.0",
     "::ffff:233.252.0.1", "::ffff:0.0.0.0", "::ffff:233.252.0.2"},
    {"kept, none, to a host", WAY_RAW4, OUTPUT_KEEP_SOURCE, "::", "::ffff:10.0.0.1", 128, "::ffff:0.0.0.0",
     "::ffff:233.252.0.1", NULL, NULL},
    {"kept, none of IPv6, to a host", WAY_RAW6, OUTPUT_KEEP_SOURCE, "::", "2001:db8::2", 128, "::", "ff3e::1", NULL, NULL},
    {"the interface's, to a wide group", WAY_FRAME, 0, "::", "ff3e::2", 128, "2001:db8::1", "ff3e::1", "2001:db8:1::1",
     "ff3e::2"},
    {"the interface's, to the link", WAY_FRAME, 0, "::", "ff02::2", 128, "2001:db8::1", "ff3e::1", "fe80::1", "ff02::2"},
    {"the interface's, to a transient group of the link", WAY_FRAME, 0, "::", "ff12::2", 128, "2001:db8::1", "ff3e::1",
     "fe80::1", "ff12::2"},
    {"the interface's, to a site", WAY_FRAME, 0, "::", "ff05::2", 128, "2001:db8::1", "ff3e::1", "2001:db8:1::1",
     "ff05::2"},
    {"the interface's, to a neighbour", WAY_RAW6, 0, "::", "fe80::2", 128, "2001:db8::1", "ff3e::1", "fe80::1",
     "fe80::2"},
    {"the interface's, to fec0::/10", WAY_RAW6, 0, "::", "fec0::2", 128, "2001:db8::1", "ff3e::1", "2001:db8:1::1",
     "fec0::2"},
    {"a host as frame", WAY_FRAME, 0, "::", "::ffff:10.0.0.1", 128, "::ffff:192.0.2.1", "::ffff:233.252.0.1", NULL, NULL},
    {"all hosts as frame", WAY_FRAME, 0, "::", "::ffff:255.255.255.255", 128, "::ffff:192.0.2.1", "::ffff:233.252.0.1",
     "::ffff:198.51.100.1", "::ffff:255.255.255.255"},
    {"an IPv6 host as frame", WAY_FRAME, 0, "::", "2001:db8::2", 128, "2001:db8::1", "ff3e::1", NULL, NULL},
    {"the packet's destination", WAY_UDP4, 0, "::", "::", 0, "::ffff:192.0.2.1", "::ffff:233.252.0.1", "::",
     "::ffff:233.252.0.1"},
    {"the packet's destination, of the other family", WAY_UDP4, 0, "::", "::", 0, "2001:db8::1", "ff3e::1", NULL, NULL},
    {"the packet's destination, of the other family again", WAY_RAW6, 0, "::", "::", 0, "::ffff:192.0.2.1",
     "::ffff:233.252.0.1", NULL, NULL},
    {"another prefix", WAY_UDP4, 0, "::", "::ffff:239.7.0.0", 112, "::ffff:192.0.2.1", "::ffff:233.252.3.4", "::",
     "::ffff:239.7.3.4"},
    {"a prefix within a byte", WAY_UDP4, 0, "::", "::ffff:239.7.240.0", 116, "::ffff:192.0.2.1", "::ffff:233.252.63.4",
     "::", "::ffff:239.7.255.4"},
    {"a prefix of 127 bits", WAY_UDP6, 0, "::", "ff3e::10", 127, "2001:db8::1", "ff3e::ffff", "::", "ff3e::11"},
    {"a prefix of 8 bits", WAY_UDP6, 0, "::", "fd00::", 8, "2001:db8::1", "ff3e::ffff", "::", "fd3e::ffff"},
};

static void test_choices(void)
{
    const struct egress_link link = {.source4 = ipv4(0xc6336401), .source6_link = ipv6("fe80::1"),
                                     .source6 = ipv6("2001:db8:1::1"), .header = 14};

    for (size_t i = 0; i < sizeof(choices) / sizeof(choices[0]); i++) {
        const struct table_output output = {
            .way = choices[i].way, .flags = choices[i].flags, .source = ipv6(choices[i].source),
            .address = ipv6(choices[i].address), .prefix = (uint8_t)choices[i].prefix};
        const struct packet packet = {.source = ipv6(choices[i].packet_source), .ttl = 7, .tos = 0xff,
                                      .destination = ipv6(choices[i].packet_destination), .destination_port = 5000,
                                      .source_port = 40000, .protocol = PROTOCOL_UDP};
        struct heading heading;

        check_case("%s", choices[i].name);
        if (!choices[i].expected_source) {
            CHECK_EQUAL(heading_make(&heading, &output, &packet, &link), DROP_EGRESS_UNREACHABLE);
            continue;
        }
        CHECK_EQUAL(heading_make(&heading, &output, &packet, &link), DROP_NONE);
        CHECK_BYTES(heading.source.bytes, ipv6(choices[i].expected_source).bytes, 16);
        CHECK_BYTES(heading.destination.bytes, ipv6(choices[i].expected_destination).bytes, 16);
        CHECK_EQUAL(heading.destination_port, 5000);
        CHECK_EQUAL(heading.ttl, 6);
        CHECK_EQUAL(heading.tos, 0);
        CHECK_EQUAL(heading.protocol, PROTOCOL_UDP);
    }
}

static void test_ports_and_lengths(void)
{
    const struct egress_link none = {.header = 14};
    const struct egress_link link = {.source4 = ipv4(0xc6336401), .source6_link = ipv6("fe80::1")};
    struct packet packet = {.source_port = 40000, .destination_port = 5000, .protocol = PROTOCOL_UDP};
    struct table_output output = {.way = WAY_FRAME, .address = ipv4(0xe9fc0002), .prefix = 128};
    struct heading heading;

    check_case("no address");
    CHECK_EQUAL(heading_make(&heading, &output, &packet, &none), DROP_EGRESS_UNREACHABLE);
    check_case("ports");
    CHECK_EQUAL(heading_make(&heading, &output, &packet, &link), DROP_NONE);
    CHECK_EQUAL(heading.source_port, 40000);
    output.source_port = 7;
    output.port = 8;
    CHECK_EQUAL(heading_make(&heading, &output, &packet, &link), DROP_NONE);
    CHECK_EQUAL(heading.source_port, 7);
    CHECK_EQUAL(heading.destination_port, 8);
    output.flags = OUTPUT_KEEP_SOURCE_PORT;
    CHECK_EQUAL(heading_make(&heading, &output, &packet, &link), DROP_NONE);
    CHECK_EQUAL(heading.source_port, 40000);
    check_case("lengths");
    packet.payload_length = 65507;
    CHECK_EQUAL(heading_make(&heading, &output, &packet, &link), DROP_NONE);
    packet.payload_length++;
    CHECK_EQUAL(heading_make(&heading, &output, &packet, &link), DROP_EGRESS_ERROR);
    packet.segment = 1000; /* of several datagrams none is so long */
    CHECK_EQUAL(heading_make(&heading, &output, &packet, &link), DROP_NONE);
    packet.segment = 0;
    output.address = ipv6("ff3e::1"); /* there is no address but the link's */
    packet.payload_length = 65527;
    CHECK_EQUAL(heading_make(&heading, &output, &packet, &link), DROP_NONE);
    CHECK_BYTES(heading.source.bytes, link.source6_link.bytes, 16);
    packet.payload_length++;
    CHECK_EQUAL(heading_make(&heading, &output, &packet, &link), DROP_EGRESS_ERROR);
    packet.protocol = PROTOCOL_ESP;
    packet.payload_length = 65535;
    CHECK_EQUAL(heading_make(&heading, &output, &packet, &link), DROP_NONE);
}

/* --- bytes ---------------------------------------------------------------------------------------------------------- */

/* A frame with 5 bytes of payload, written by hand. */
static void test_exact_ipv4(void)
{
    static const uint8_t expected[] = {
        0x01, 0x00, 0x5e, 0x7c, 0x00, 0x01, 0x02, 0x00, 0x00, 0x00, 0x00, 0x09, 0x08, 0x00,
        0x45, 0xb8, 0x00, 0x21, 0x12, 0x34, 0x00, 0x00, 0x07, 0x11, 0, 0, 192, 0, 2, 1, 233, 252, 0, 1,
        0x9c, 0x40, 0x13, 0x88, 0x00, 0x0d, 0, 0,
    };
    const struct egress_link link = {.mac = {2, 0, 0, 0, 0, 9}, .header = 14};
    const struct framing framing = {.link = &link};
    struct heading heading = {
        .source = ipv4(0xc0000201), .destination = ipv4(0xe9fc0001), .source_port = 40000, .destination_port = 5000,
        .ttl = 7, .tos = 0xb8, .protocol = PROTOCOL_UDP};
    uint8_t packet[HEADERS_MAX + 5], sealed[HEADERS_MAX + 5];
    size_t length;

    check_case("bytes of IPv4");
    length = headers_write(packet, &heading, &framing, (const uint8_t *)"hello", 5, 0, 0xabcd1234);
    CHECK_EQUAL(length, sizeof(expected));
    memcpy(sealed, expected, sizeof(expected));
    memcpy(sealed + length, "hello", 5);
    seal_udp(sealed + 14);
    seal_ip(sealed + 14);
    CHECK_BYTES(packet, sealed, length);

    check_case("ESP over IPv4, without a link layer");
    heading.protocol = PROTOCOL_ESP;
    length = headers_write(packet, &heading, &(struct framing){0}, (const uint8_t *)"hello", 5, 0, 1);
    CHECK_EQUAL(length, 20);
    CHECK_EQUAL(packet[9], 50);
    CHECK_EQUAL(packet[3], 25);
    CHECK_EQUAL(checksum_add(0, packet, 20), 0xffff);

    check_case("broadcast");
    heading.destination = ipv4(0xffffffff);
    CHECK_EQUAL(headers_write(packet, &heading, &framing, (const uint8_t *)"hello", 5, 0, 1), 34);
    CHECK_BYTES(packet, ((const uint8_t[]){0xff, 0xff, 0xff, 0xff, 0xff, 0xff}), 6);

    check_case("the bit above 23");
    heading.destination = ipv4(0xef800102);
    headers_write(packet, &heading, &framing, (const uint8_t *)"hello", 5, 0, 1);
    CHECK_BYTES(packet, ((const uint8_t[]){0x01, 0x00, 0x5e, 0x00, 0x01, 0x02}), 6);
}

static void test_exact_ipv6(void)
{
    static const uint8_t expected[] = {
        0x33, 0x33, 0x80, 0, 0, 0x39, 0x02, 0x00, 0x00, 0x00, 0x00, 0x09, 0x86, 0xdd,
        0x6b, 0x80, 0, 0, 0x00, 0x0d, 17, 7,
        0x20, 0x01, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1,
        0xff, 0x3e, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x80, 0, 0, 0x39,
        0x9c, 0x40, 0x13, 0x88, 0x00, 0x0d, 0, 0,
    };
    const struct egress_link link = {.mac = {2, 0, 0, 0, 0, 9}, .header = 14};
    const struct framing framing = {.link = &link};
    const struct heading heading = {
        .source = ipv6("2001:db8::1"), .destination = ipv6("ff3e::8000:39"), .source_port = 40000,
        .destination_port = 5000, .ttl = 7, .tos = 0xb8, .protocol = PROTOCOL_UDP};
    uint8_t packet[HEADERS_MAX + 5], sealed[HEADERS_MAX + 5];
    size_t length;

    check_case("bytes of IPv6");
    length = headers_write(packet, &heading, &framing, (const uint8_t *)"hello", 5, 0, 1);
    CHECK_EQUAL(length, sizeof(expected));
    memcpy(sealed, expected, sizeof(expected));
    memcpy(sealed + length, "hello", 5);
    seal_udp6(sealed + 14, 40);
    CHECK_BYTES(packet, sealed, length);
}

/* What a receiver makes of a frame with a virtio header: the checksum is the complement of the sum from where it says. */
static void finish_checksum(uint8_t *frame, size_t start, size_t length)
{
    unsigned sum = ~checksum_add(0, frame + start, length - start) & 0xffff;

    write16(frame + start + 6, sum ? sum : 0xffff);
}

static void test_virtio(bool six, uint16_t segment)
{
    const struct egress_link link = {.mac = {2, 0, 0, 0, 0, 9}, .header = 14};
    const struct framing framing = {.link = &link, .virtio = true};
    const struct heading heading = {
        .source = six ? ipv6("2001:db8::1") : ipv4(0xc0000201),
        .destination = six ? ipv6("ff3e::8000:39") : ipv4(0xe9fc0001), .source_port = 40000, .destination_port = 5000,
        .ttl = 7, .tos = 0xb8, .protocol = PROTOCOL_UDP};
    static uint8_t frame[HEADERS_MAX + 3000];
    struct packet packet;
    uint16_t fields[4]; /* headers, segment, start, offset */
    const size_t ip = six ? 40 : 20, start = 14 + ip;
    size_t length;

    check_case("virtio header, IPv%d, segments of %u", six ? 6 : 4, segment);
    length = headers_write(frame, &heading, &framing, NULL, 3000, segment, 1);
    CHECK_EQUAL(length, 10 + start + 8);
    CHECK_EQUAL(frame[0], 1);
    CHECK_EQUAL(frame[1], segment ? 5 : 0);
    memcpy(fields, frame + 2, sizeof(fields));
    CHECK_EQUAL(fields[0], start + 8);
    CHECK_EQUAL(fields[1], segment);
    CHECK_EQUAL(fields[2], start);
    CHECK_EQUAL(fields[3], 6);
    memcpy(frame + length, payload, 3000);
    CHECK_EQUAL(packet_parse(frame + 24, length - 24 + 3000, false, &packet), DROP_BAD_UDP_CHECKSUM);
    finish_checksum(frame + 10, start, length - 10 + 3000);
    CHECK_EQUAL(packet_parse(frame + 24, length - 24 + 3000, false, &packet), DROP_NONE);
    CHECK_EQUAL(packet.payload_length, 3000);
}

static struct heading random_heading(uint64_t *state)
{
    struct heading heading = {
        .source_port = (uint16_t)random_next(state),
        .destination_port = (uint16_t)random_next(state),
        .ttl = (uint8_t)random_next(state),
        .tos = (uint8_t)random_next(state) & 0xfc,
        .protocol = random_below(state, 4) ? PROTOCOL_UDP : PROTOCOL_ESP,
    };
    bool six = random_below(state, 2);

    heading.source = six ? ipv6("2001:db8::") : ipv4((uint32_t)random_next(state));
    heading.destination = six ? ipv6("ff3e::") : ipv4(0xe0000000 | random_below(state, 1 << 28));
    for (unsigned i = 8; six && i < 16; i++) {
        heading.source.bytes[i] = (uint8_t)random_next(state);
        heading.destination.bytes[i] = (uint8_t)random_next(state);
    }
    return heading;
}

static void check_same(const struct heading *heading, const struct packet *packet, size_t at, size_t length)
{
    CHECK_BYTES(packet->source.bytes, heading->source.bytes, 16);
    CHECK_BYTES(packet->destination.bytes, heading->destination.bytes, 16);
    CHECK_EQUAL(packet->protocol, heading->protocol);
    CHECK_EQUAL(packet->ttl, heading->ttl);
    CHECK_EQUAL(packet->tos, heading->tos);
    CHECK_EQUAL(packet->source_port, heading->protocol == PROTOCOL_UDP ? heading->source_port : 0);
    CHECK_EQUAL(packet->destination_port, heading->protocol == PROTOCOL_UDP ? heading->destination_port : 0);
    CHECK_EQUAL(packet->payload_length, length);
    CHECK(!memcmp(packet->payload, payload + at, length));
}

/* Fragments put together by their own offsets are the datagram, and each is as long as can be but for the last. */
static void check_fragments(const struct heading *heading, size_t at, size_t length, uint32_t mtu, uint32_t id)
{
    static uint8_t whole[HEADERS_MAX + PAYLOAD_MAX], piece[HEADERS_MAX];
    const size_t ip = heading_is_ipv4(heading) ? 20 : 40, total = headers_cut_length(heading, length);
    const size_t room = headers_fragment_room(heading, mtu);
    size_t covered = 0;
    struct packet packet;
    bool more = true;

    CHECK(room >= 8 && room % 8 == 0);
    while (more) {
        const struct fragment fragment = headers_write_fragment(piece, heading, &(struct framing){0}, payload + at,
                                                                length, covered, room, id);
        const size_t headers = ip + (ip == 40 ? 8 : 0), behind = fragment.headers - headers + fragment.length;
        size_t offset;

        CHECK(headers + behind <= mtu);
        if (behind < total) /* else it is the only one, and no fragment but by its name */
            CHECK_EQUAL(packet_parse(piece, headers + behind, false, &packet), DROP_FRAGMENT);
        if (ip == 20) {
            CHECK_EQUAL(checksum_add(0, piece, 20), 0xffff);
            CHECK_EQUAL(piece[2] << 8 | piece[3], headers + behind);
            CHECK_EQUAL(piece[4] << 8 | piece[5], id & 0xffff);
            offset = (size_t)((piece[6] & 0x1f) << 8 | piece[7]) * 8;
            more = piece[6] & 0x20;
            CHECK(!(piece[6] & 0xc0));
        } else {
            CHECK_EQUAL(piece[6], 44);
            CHECK_EQUAL(piece[4] << 8 | piece[5], 8 + behind);
            CHECK_EQUAL(piece[40], heading->protocol);
            CHECK_EQUAL(piece[41], 0);
            offset = (size_t)(piece[42] << 8 | (piece[43] & 0xf8));
            more = piece[43] & 1;
            CHECK_EQUAL((uint32_t)piece[44] << 24 | piece[45] << 16 | piece[46] << 8 | piece[47], id);
        }
        CHECK_EQUAL(offset, covered);
        CHECK(!more || behind == room);
        memcpy(whole + ip + offset, piece + headers, fragment.headers - headers);
        memcpy(whole + ip + offset + fragment.headers - headers, payload + at + fragment.at, fragment.length);
        if (!covered)
            memcpy(whole, piece, ip);
        covered += behind;
    }
    CHECK_EQUAL(covered, total);
    if (ip == 20) {
        whole[6] = whole[7] = 0;
        write16(whole + 2, (unsigned)(ip + total));
        seal_ip(whole);
    } else {
        whole[6] = heading->protocol;
        write16(whole + 4, (unsigned)total);
    }
    CHECK_EQUAL(packet_parse(whole, ip + total, false, &packet), DROP_NONE);
    check_same(heading, &packet, at, length);
}

static void test_random(void)
{
    static uint8_t written[HEADERS_MAX + 2048];
    uint64_t state = UINT64_C(0x68656164);

    for (unsigned run = 0; run < RANDOM_RUNS; run++) {
        const struct egress_link link = {.mac = {2}, .header = random_below(&state, 2) ? 14 : 0};
        const struct framing framing = {.link = random_below(&state, 2) ? &link : NULL};
        const size_t front = framing.link ? link.header : 0;
        const struct heading heading = random_heading(&state);
        size_t length = random_below(&state, 1500), at = random_below(&state, 1000), headers;
        struct packet packet;

        check_case("random heading %u", run);
        length += heading.protocol == PROTOCOL_ESP && !length;
        headers = headers_write(written, &heading, &framing, payload + at, length, 0, (uint32_t)random_next(&state));
        CHECK(headers <= HEADERS_MAX);
        CHECK_EQUAL(headers, front + heading_length(&heading));
        memcpy(written + headers, payload + at, length);
        CHECK_EQUAL(packet_parse(written + front, headers - front + length, false, &packet), DROP_NONE);
        check_same(&heading, &packet, at, length);
        if (run % 16)
            continue;
        length = 1 + random_below(&state, run % 64 ? 5000 : 65507);
        check_fragments(&heading, at < 8 ? at : 8, length, HEADERS_MTU_MIN + random_below(&state, 3000),
                        (uint32_t)random_next(&state));
    }
    check_case("the largest");
    for (unsigned i = 0; i < 50; i++) {
        const struct heading heading = random_heading(&state);
        const size_t longest = heading.protocol == PROTOCOL_ESP ? 65515 : 65507;

        check_fragments(&heading, 0, heading_is_ipv4(&heading) ? longest : longest + 20, 1280, i);
        check_fragments(&heading, 0, heading_is_ipv4(&heading) ? longest : longest + 20, HEADERS_MTU_MIN, i);
    }
}

int main(void)
{
    for (size_t i = 0; i < sizeof(payload); i++)
        payload[i] = (uint8_t)(i * 7 + i / 251 + 1);
    test_ttl();
    test_choices();
    test_ports_and_lengths();
    test_exact_ipv4();
    test_exact_ipv6();
    test_virtio(false, 0);
    test_virtio(false, 1000);
    test_virtio(true, 0);
    test_virtio(true, 1000);
    test_random();
    return 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_ways.c: what each way's socket is given for a run: message headers, headers of ours, segments, fragments. Sends
 * are noted instead of made, byte by byte as the kernel would read them; test_egress.c has how runs come to be.
 */
#define _GNU_SOURCE /* struct in6_pktinfo */
#include "egress.h"

#include "check.h"
#include "datagram.h"

#include <arpa/inet.h>
#include <errno.h>

#ifndef UDP_SEGMENT
#define UDP_SEGMENT 103
#endif

enum { MTU = 1500, SENT_MAX = 2048, BYTES_MAX = 66000, COUNTER = 5, VIRTIO = 10, ETHERNET = 14 };

static struct sent {
    uint16_t index;
    uint8_t name[sizeof(struct sockaddr_in6)];
    socklen_t name_length;
    size_t length;
    uint8_t *bytes; /* of all iovecs */
    uint8_t control[CONTROL_MAX];
    size_t control_length;
} sent[SENT_MAX];

static struct runs runs;
static struct egress egress;
static struct ingress way_in;
static struct pool_slot slots[16];
static uint8_t payload[BYTES_MAX];
static unsigned sent_count, taken;

static union address address_of(const char *text)
{
    union address address;

    CHECK_EQUAL(inet_pton(AF_INET6, text, address.bytes), 1);
    return address;
}

static void note(void *context, struct run *run, uint16_t index)
{
    const struct msghdr *message = &run->message;
    struct sent *one = &sent[sent_count++];

    CHECK(context == &egress && sent_count <= SENT_MAX);
    *one = (struct sent){.index = index, .name_length = message->msg_namelen,
                         .control_length = message->msg_controllen};
    CHECK(one->name_length <= sizeof(one->name) && one->control_length <= sizeof(one->control));
    if (one->name_length)
        memcpy(one->name, message->msg_name, one->name_length);
    if (one->control_length)
        memcpy(one->control, message->msg_control, one->control_length);
    for (size_t i = 0; i < message->msg_iovlen; i++)
        one->length += message->msg_iov[i].iov_len;
    one->bytes = malloc(one->length + 1);
    CHECK(one->bytes);
    for (size_t i = 0, at = 0; i < message->msg_iovlen; at += message->msg_iov[i++].iov_len)
        if (message->msg_iov[i].iov_len)
            memcpy(one->bytes + at, message->msg_iov[i].iov_base, message->msg_iov[i].iov_len);
}

static void start(const char *name, enum way way, bool virtio, uint32_t mtu)
{
    check_case("%s", name);
    runs_init(&runs);
    egress = egress_of(0, way, -1, mtu, &(struct egress_link){
        .source4 = address_of("::ffff:198.51.100.1"), .source6_link = address_of("fe80::1"),
        .source6 = address_of("2001:db8:1::1"), .mac = {2, 0, 0, 0, 0, 9}, .header = ETHERNET});
    CHECK_EQUAL(egress.segmentation, !way_writes_headers(way));
    egress.virtio = virtio;
    egress.segmentation |= virtio;
    memset(slots, 0, sizeof(slots));
    way_in = (struct ingress){.pool = {.slots = slots, .size = 16, .free = 16}};
    for (uint32_t slot = 0; slot < 16; slot++)
        pool_take(&way_in.pool, slot);
    sent_count = taken = 0;
}

static struct table_output output_to(const char *address, uint16_t port)
{
    return (struct table_output){.address = address_of(address), .prefix = 128, .port = port, .way = egress.way,
                                 .counter = COUNTER, .ttl = 9};
}

static struct packet packet_of(size_t at, size_t length)
{
    return (struct packet){
        .source = address_of(egress.way == WAY_UDP6 || egress.way == WAY_RAW6 ? "2001:db8::1" : "::ffff:192.0.2.1"),
        .destination = address_of("::ffff:233.252.0.1"), .source_port = 40000, .destination_port = 5000, .ttl = 64,
        .protocol = PROTOCOL_UDP, .payload = payload + at, .payload_length = length};
}

static enum appended try_append(const struct table_output *output, const struct packet *packet, uint32_t slot)
{
    struct heading heading;

    CHECK_EQUAL(heading_make(&heading, output, packet, &egress.link), DROP_NONE);
    return runs_append(&runs, &egress, output, output->plain ? NULL : &heading, packet, &way_in, slot, note, &egress);
}

static void append(const struct table_output *output, const struct packet *packet, uint32_t slot)
{
    CHECK_EQUAL(try_append(output, packet, slot), APPENDED);
    pool_hold(&way_in.pool, slot);
}

static void flush(void)
{
    runs_flush(&runs, note, &egress);
}

/* Complete the oldest send; returns the run that is through with it, or NULL. */
static struct run *finish(int *result)
{
    CHECK(taken < sent_count);
    return runs_finish(&runs, sent[taken++].index, result);
}

static void finish_all(void)
{
    int result = 0;

    while (taken < sent_count) {
        struct run *run = finish(&result);

        CHECK_EQUAL(result, 0);
        if (run)
            runs_release(&runs, run);
    }
    CHECK_EQUAL(runs.in_use, 0);
    CHECK_EQUAL(runs.in_flight, 0);
    for (unsigned i = 0; i < sent_count; i++)
        free(sent[i].bytes);
    sent_count = taken = 0;
}

/* --- UDP sockets ---------------------------------------------------------------------------------------------------- */

/* The control message of this type, or NULL; its value is copied. */
static bool control_of(const struct sent *one, int level, int type, void *value, size_t length)
{
    struct msghdr message = {.msg_control = (void *)(uintptr_t)one->control, .msg_controllen = one->control_length};

    for (struct cmsghdr *c = CMSG_FIRSTHDR(&message); c; c = CMSG_NXTHDR(&message, c))
        if (c->cmsg_level == level && c->cmsg_type == type) {
            CHECK_EQUAL(c->cmsg_len, CMSG_LEN(length));
            memcpy(value, CMSG_DATA(c), length);
            return true;
        }
    return false;
}

static void test_udp4(enum way way)
{
    struct table_output output;
    struct packet packet;
    struct sockaddr_in name;
    struct in_pktinfo from;
    uint16_t segment;
    int value;

    start("UDP over IPv4", way, false, MTU);
    output = output_to("::ffff:10.0.0.1", 6000);
    output.plain = true;
    output.flags = OUTPUT_KEEP_DSCP;
    packet = packet_of(0, 100);
    append(&output, &packet, 0);
    packet.tos = 3; /* ECN is none of the DSCP */
    append(&output, &packet, 1);
    packet.tos = 0xb9;
    append(&output, &packet, 2);
    flush();
    CHECK_EQUAL(sent_count, 2);
    memcpy(&name, sent[0].name, sizeof(name));
    CHECK_EQUAL(sent[0].name_length, sizeof(name));
    CHECK_EQUAL(name.sin_family, AF_INET);
    CHECK_EQUAL(name.sin_port, htons(6000));
    CHECK_EQUAL(ntohl(name.sin_addr.s_addr), 0x0a000001);
    CHECK(control_of(&sent[0], IPPROTO_IP, IP_TTL, &value, sizeof(value)));
    CHECK_EQUAL(value, 9);
    CHECK(!control_of(&sent[0], IPPROTO_IP, IP_TOS, &value, sizeof(value)));
    CHECK(!control_of(&sent[0], IPPROTO_IP, IP_PKTINFO, &from, sizeof(from)));
    CHECK(control_of(&sent[0], IPPROTO_UDP, UDP_SEGMENT, &segment, sizeof(segment)));
    CHECK_EQUAL(segment, 100);
    CHECK_EQUAL(sent[0].length, 200);
    CHECK(control_of(&sent[1], IPPROTO_IP, IP_TOS, &value, sizeof(value)));
    CHECK_EQUAL(value, 0xb8);
    CHECK(!control_of(&sent[1], IPPROTO_UDP, UDP_SEGMENT, &segment, sizeof(segment)));
    finish_all();

    check_case("UDP over IPv4, from an address");
    output.source = address_of("::ffff:10.0.0.9");
    output.tos = 46 << 2;
    output.flags = 0;
    append(&output, &packet, 0);
    flush();
    CHECK(control_of(&sent[0], IPPROTO_IP, IP_PKTINFO, &from, sizeof(from)));
    CHECK_EQUAL(ntohl(from.ipi_spec_dst.s_addr), 0x0a000009);
    CHECK_EQUAL(from.ipi_ifindex, 0);
    CHECK(control_of(&sent[0], IPPROTO_IP, IP_TOS, &value, sizeof(value)));
    CHECK_EQUAL(value, 0xb8);
    finish_all();

    check_case("UDP over IPv4, where the packet went");
    output = output_to("::ffff:239.7.0.0", 0);
    output.prefix = 112;
    for (uint16_t i = 0; i < 6; i++) {
        packet.destination = address_of(i / 2 == 1 ? "::ffff:233.252.0.2" : "::ffff:233.252.0.1");
        packet.destination_port = i < 4 ? 5000 : 5001;
        append(&output, &packet, i);
    }
    flush();
    CHECK_EQUAL(sent_count, 3);
    for (unsigned i = 0; i < 3; i++) {
        memcpy(&name, sent[i].name, sizeof(name));
        CHECK_EQUAL(ntohl(name.sin_addr.s_addr), i == 1 ? 0xef070002 : 0xef070001);
        CHECK_EQUAL(ntohs(name.sin_port), i < 2 ? 5000 : 5001);
        CHECK_EQUAL(sent[i].length, 200);
    }
    finish_all();
}

static void test_udp6(enum way way)
{
    struct table_output output;
    struct packet packet;
    struct sockaddr_in6 name;
    struct in6_pktinfo from;
    uint16_t segment;
    int value;

    start("UDP over IPv6", way, false, MTU);
    output = output_to("ff3e::2", 6000);
    output.plain = true;
    packet = packet_of(0, MTU - 48);
    append(&output, &packet, 0);
    append(&output, &packet, 1);
    output.source = address_of("2001:db8::9");
    output.tos = 46 << 2;
    packet.payload_length++; /* for the kernel to cut */
    append(&output, &packet, 2);
    append(&output, &packet, 3);
    flush();
    CHECK_EQUAL(sent_count, 3);
    memcpy(&name, sent[0].name, sizeof(name));
    CHECK_EQUAL(sent[0].name_length, sizeof(name));
    CHECK_EQUAL(name.sin6_family, AF_INET6);
    CHECK_EQUAL(name.sin6_port, htons(6000));
    CHECK_EQUAL(name.sin6_scope_id, 0);
    CHECK_BYTES(name.sin6_addr.s6_addr, output.address.bytes, 16);
    CHECK(control_of(&sent[0], IPPROTO_IPV6, IPV6_HOPLIMIT, &value, sizeof(value)));
    CHECK_EQUAL(value, 9);
    CHECK(!control_of(&sent[0], IPPROTO_IPV6, IPV6_TCLASS, &value, sizeof(value)));
    CHECK(!control_of(&sent[0], IPPROTO_IPV6, IPV6_PKTINFO, &from, sizeof(from)));
    CHECK(control_of(&sent[0], IPPROTO_UDP, UDP_SEGMENT, &segment, sizeof(segment)));
    CHECK_EQUAL(segment, MTU - 48);
    for (unsigned i = 1; i < 3; i++) {
        CHECK(control_of(&sent[i], IPPROTO_IPV6, IPV6_TCLASS, &value, sizeof(value)));
        CHECK_EQUAL(value, 0xb8);
        CHECK(control_of(&sent[i], IPPROTO_IPV6, IPV6_PKTINFO, &from, sizeof(from)));
        CHECK_BYTES(from.ipi6_addr.s6_addr, output.source.bytes, 16);
        CHECK_EQUAL(from.ipi6_ifindex, 0);
        CHECK(!control_of(&sent[i], IPPROTO_UDP, UDP_SEGMENT, &segment, sizeof(segment)));
        CHECK_EQUAL(sent[i].length, MTU - 47);
    }
    finish_all();
}

/* --- headers of ours ------------------------------------------------------------------------------------------------ */

/* What was sent is this packet's payload, in a packet without fault that begins at `at` of it. */
static struct packet read_back(const struct sent *one, size_t at, const uint8_t *expected, size_t length)
{
    struct packet packet;

    CHECK_EQUAL(packet_parse(one->bytes + at, one->length - at, false, &packet), DROP_NONE);
    CHECK_EQUAL(packet.payload_length, length);
    CHECK_BYTES(packet.payload, expected, length);
    return packet;
}

static void test_raw(bool six)
{
    const char *to = six ? "2001:db8:2::2" : "::ffff:10.0.0.1";
    struct table_output output;
    struct packet packet, back;

    start(six ? "raw IPv6" : "raw IPv4", six ? WAY_RAW6 : WAY_RAW4, false, MTU);
    output = output_to(to, 6000);
    output.flags = OUTPUT_KEEP_SOURCE;
    packet = packet_of(7, 1001);
    append(&output, &packet, 0);
    append(&output, &packet, 1);
    flush();
    CHECK_EQUAL(sent_count, 2);
    for (unsigned i = 0; i < 2; i++) {
        back = read_back(&sent[i], 0, payload + 7, 1001);
        CHECK_EQUAL(back.source_port, 40000);
        CHECK_EQUAL(back.destination_port, 6000);
        CHECK_EQUAL(back.ttl, 9);
        CHECK_BYTES(back.source.bytes, packet.source.bytes, 16);
        CHECK_BYTES(back.destination.bytes, output.address.bytes, 16);
        CHECK_EQUAL(sent[i].control_length, 0);
        if (six) {
            struct sockaddr_in6 name;

            CHECK_EQUAL(sent[i].name_length, sizeof(name));
            memcpy(&name, sent[i].name, sizeof(name));
            CHECK_EQUAL(name.sin6_family, AF_INET6);
            CHECK_EQUAL(name.sin6_port, 0);
            CHECK_BYTES(name.sin6_addr.s6_addr, output.address.bytes, 16);
        } else {
            struct sockaddr_in name;

            CHECK_EQUAL(sent[i].name_length, sizeof(name));
            memcpy(&name, sent[i].name, sizeof(name));
            CHECK_EQUAL(name.sin_family, AF_INET);
            CHECK_EQUAL(name.sin_addr.s_addr, output.address.words[3]);
        }
    }
    CHECK(six || memcmp(sent[0].bytes + 4, sent[1].bytes + 4, 2)); /* identifications differ */
    finish_all();

    check_case("ESP");
    packet.protocol = PROTOCOL_ESP;
    output.port = 0;
    append(&output, &packet, 0);
    append(&output, &packet, 1);
    flush();
    CHECK_EQUAL(sent_count, 2);
    back = read_back(&sent[1], 0, payload + 7, 1001);
    CHECK_EQUAL(back.protocol, PROTOCOL_ESP);
    finish_all();
}

static void finish_checksum(uint8_t *frame, size_t start, size_t length)
{
    unsigned sum = ~checksum_add(0, frame + start, length - start) & 0xffff;

    write16(frame + start + 6, sum ? sum : 0xffff);
}

static void test_frames(void)
{
    struct table_output output;
    struct packet packet;
    uint16_t segment;

    start("frames, of several datagrams", WAY_FRAME, true, MTU);
    output = output_to("::ffff:233.252.0.2", 6000);
    output.source_port = 7;
    packet = packet_of(0, 1000);
    for (uint32_t i = 0; i < 3; i++) {
        packet.payload = payload + 1000 * i;
        append(&output, &packet, i);
    }
    flush();
    CHECK_EQUAL(sent_count, 1);
    CHECK_EQUAL(sent[0].name_length, 0);
    CHECK_EQUAL(sent[0].bytes[1], 5);
    memcpy(&segment, sent[0].bytes + 4, sizeof(segment));
    CHECK_EQUAL(segment, 1000);
    CHECK_BYTES(sent[0].bytes + VIRTIO, ((const uint8_t[]){1, 0, 0x5e, 0x7c, 0, 2, 2, 0, 0, 0, 0, 9, 8, 0}), ETHERNET);
    finish_checksum(sent[0].bytes + VIRTIO, ETHERNET + 20, sent[0].length - VIRTIO);
    packet = read_back(&sent[0], VIRTIO + ETHERNET, payload, 3000);
    CHECK_EQUAL(packet.source_port, 7);
    CHECK_BYTES(packet.source.bytes, egress.link.source4.bytes, 16);
    finish_all();

    /* Refused: the same datagrams one by one, and what comes later, too. */
    check_case("frames, segments refused");
    for (uint32_t i = 0; i < 3; i++) {
        packet = packet_of(1000 * i, 1000);
        append(&output, &packet, i);
    }
    flush();
    {
        int result = -EINVAL;
        struct run *run = finish(&result);

        CHECK(run && runs_refuse_segments(&runs, run, result));
    }
    CHECK(!egress.segmentation && runs_are_behind(&runs));
    CHECK(runs_send_again(&runs, note, &egress));
    CHECK_EQUAL(sent_count, 4);
    append(&output, &packet, 3);
    CHECK_EQUAL(sent_count, 5);
    for (uint32_t i = 1; i < 5; i++) {
        CHECK_EQUAL(sent[i].bytes[0], 1);
        CHECK_EQUAL(sent[i].bytes[1], 0);
        finish_checksum(sent[i].bytes + VIRTIO, ETHERNET + 20, sent[i].length - VIRTIO);
        read_back(&sent[i], VIRTIO + ETHERNET, payload + 1000 * (i < 4 ? i - 1 : 2), 1000);
    }
    finish_all();

    start("frames without virtio header", WAY_FRAME, false, MTU);
    output = output_to("ff3e::2", 6000);
    packet = packet_of(0, 1000);
    append(&output, &packet, 0);
    append(&output, &packet, 1);
    CHECK_EQUAL(sent_count, 2);
    CHECK_BYTES(sent[0].bytes, ((const uint8_t[]){0x33, 0x33, 0, 0, 0, 2, 2, 0, 0, 0, 0, 9, 0x86, 0xdd}), ETHERNET);
    read_back(&sent[1], ETHERNET, payload, 1000);
    finish_all();

    check_case("frames without link layer");
    egress.link.header = 0;
    append(&output, &packet, 0);
    packet = read_back(&sent[0], 0, payload, 1000);
    CHECK_BYTES(packet.source.bytes, egress.link.source6.bytes, 16);
    finish_all();
}

/* A packet of several datagrams, as segments of one frame, or of as many frames. */
static void test_merged(void)
{
    struct table_output output;
    struct packet packet;

    start("merged packet as one frame", WAY_FRAME, true, MTU);
    output = output_to("::ffff:233.252.0.2", 6000);
    packet = packet_of(0, 4500);
    packet.segment = 1000;
    append(&output, &packet, 0);
    CHECK_EQUAL(sent_count, 1);
    CHECK_EQUAL(sent[0].length, VIRTIO + ETHERNET + 28 + 4500);
    finish_all();

    check_case("merged packet as several frames");
    egress.segmentation = false;
    append(&output, &packet, 0);
    CHECK(runs_are_behind(&runs));
    CHECK(runs_send_again(&runs, note, &egress));
    CHECK_EQUAL(sent_count, 5);
    for (unsigned i = 0; i < 5; i++) {
        finish_checksum(sent[i].bytes + VIRTIO, ETHERNET + 20, sent[i].length - VIRTIO);
        read_back(&sent[i], VIRTIO + ETHERNET, payload + 1000 * i, i < 4 ? 1000 : 500);
    }
    finish_all();
}

/* --- fragments ------------------------------------------------------------------------------------------------------ */

/* Put sends `first` to `last` together by their own offsets, from `at` of each on, and read the datagram back. */
static void check_whole(unsigned first, unsigned last, size_t at, uint32_t mtu, const uint8_t *expected, size_t length)
{
    static uint8_t whole[BYTES_MAX + 100];
    bool six = sent[first].bytes[at] >> 4 == 6;
    const size_t ip = six ? 40 : 20, headers = six ? 48 : 20;
    struct packet packet;
    size_t total = 0;

    memcpy(whole, sent[first].bytes + at, ip);
    for (unsigned i = first; i <= last; i++) {
        const uint8_t *bytes = sent[i].bytes + at;
        size_t size = sent[i].length - at, offset;

        CHECK(size <= mtu);
        CHECK_EQUAL(packet_parse(bytes, size, false, &packet), DROP_FRAGMENT);
        offset = six ? (size_t)(bytes[42] << 8 | (bytes[43] & 0xf8)) : (size_t)((bytes[6] & 0x1f) << 8 | bytes[7]) * 8;
        CHECK_EQUAL(!(six ? bytes[43] & 1 : bytes[6] & 0x20), i == last);
        CHECK_BYTES(bytes + (six ? 44 : 4), sent[first].bytes + at + (six ? 44 : 4), six ? 4 : 2);
        memcpy(whole + ip + offset, bytes + headers, size - headers);
        total += size - headers;
    }
    if (six) {
        whole[6] = sent[first].bytes[at + 40];
        write16(whole + 4, (unsigned)total);
    } else {
        whole[6] = whole[7] = 0;
        write16(whole + 2, (unsigned)(ip + total));
        seal_ip(whole);
    }
    CHECK_EQUAL(packet_parse(whole, ip + total, false, &packet), DROP_NONE);
    CHECK_EQUAL(packet.payload_length, length);
    CHECK(!memcmp(packet.payload, expected, length));
}

static void test_fragments(enum way way, bool virtio, const char *to, uint8_t protocol)
{
    const size_t front = way == WAY_FRAME ? ETHERNET + (virtio ? VIRTIO : 0) : 0;
    struct table_output output;
    struct packet packet;
    bool six;

    start("fragments", way, virtio, MTU);
    check_case("fragments, way %d, protocol %u, to %s", way, protocol, to);
    output = output_to(to, 0);
    six = !address_is_ipv4(&output.address);
    packet = packet_of(3, 4000);
    packet.protocol = protocol;
    append(&output, &packet, 0);
    CHECK_EQUAL(sent_count, 3);
    CHECK(!runs_are_behind(&runs));
    check_whole(0, 2, front, MTU, payload + 3, 4000);
    for (unsigned i = 0; virtio && i < 3; i++)
        CHECK_BYTES(sent[i].bytes, ((const uint8_t[VIRTIO]){0}), VIRTIO);

    /* The datagram is through with its last fragment, whichever that is. */
    for (unsigned i = 0; i < 3; i++) {
        int result = 5;
        struct run *run = finish(&result);

        CHECK_EQUAL(run != NULL, i == 2);
        if (run) {
            CHECK_EQUAL(result, 0);
            CHECK_EQUAL(run->datagrams, 1);
            CHECK_EQUAL(run->bytes, 4000);
            CHECK_EQUAL(run->count, 1);
            CHECK_EQUAL(run->slots[0], 0);
            runs_release(&runs, run);
        }
    }
    finish_all();

    check_case("fragments, of which one does not leave");
    append(&output, &packet, 0);
    for (unsigned i = 0; i < 3; i++) {
        int result = i == 1 ? -ENOBUFS : 5;
        struct run *run = finish(&result);

        CHECK_EQUAL(run != NULL, i == 2);
        if (run) {
            CHECK_EQUAL(result, -ENOBUFS);
            CHECK(!runs_refuse_segments(&runs, run, result));
            runs_release(&runs, run);
        }
    }
    finish_all();

    check_case("exactly the MTU, and one more");
    packet.payload_length = MTU - (six ? 40 : 20) - (protocol == PROTOCOL_UDP ? 8 : 0);
    append(&output, &packet, 0);
    flush();
    CHECK_EQUAL(sent_count, 1);
    packet.payload_length++;
    append(&output, &packet, 0);
    CHECK_EQUAL(sent_count, 3);
    check_whole(1, 2, front, MTU, payload + 3, packet.payload_length);
    finish_all();
}

/* More fragments than there are runs: they go on when some have completed, and nothing overtakes them. */
static void test_many_fragments(void)
{
    struct table_output output;
    struct packet packet;
    struct run *run = NULL;
    unsigned finished = 0;

    start("more fragments than runs", WAY_RAW4, false, HEADERS_MTU_MIN);
    output = output_to("::ffff:10.0.0.1", 6000);
    packet = packet_of(0, 65507);
    append(&output, &packet, 0);
    CHECK(runs_are_behind(&runs));
    CHECK_EQUAL(sent_count, RUNS_MAX - 1);
    CHECK_EQUAL(try_append(&output, &packet, 1), NO_RUN_FREE);
    while (!run) {
        int result = 0;

        CHECK(sent_count < SENT_MAX);
        run = finish(&result);
        finished++;
        if (finished % 100 == 0)
            (void)runs_send_again(&runs, note, &egress);
        if (taken == sent_count && !run)
            CHECK(runs_send_again(&runs, note, &egress) || sent_count > taken);
    }
    CHECK_EQUAL(finished, sent_count);
    CHECK_EQUAL(sent_count, (65515 + 47) / 48);
    check_whole(0, sent_count - 1, 0, HEADERS_MTU_MIN, payload, 65507);
    runs_release(&runs, run);
    finish_all();
}

/* An identification of 0 is the kernel's to choose, another one for each fragment: there is none. */
static void test_identifications(void)
{
    enum { ENOUGH = 3 * 65536 };
    struct table_output output;
    struct packet packet;
    uint32_t last = 0;

    start("identifications", WAY_RAW4, false, MTU);
    output = output_to("::ffff:10.0.0.1", 6000);
    runs.identification = UINT32_MAX - 65536;
    for (unsigned i = 0; i < ENOUGH; i++) {
        uint32_t id;

        packet = packet_of(0, i % 1000 ? 10 : 2000);
        append(&output, &packet, 0);
        id = (uint32_t)sent[0].bytes[4] << 8 | sent[0].bytes[5];
        CHECK(id != 0 && id != last);
        CHECK(sent_count == 1 || !memcmp(sent[0].bytes + 4, sent[1].bytes + 4, 2));
        last = id;
        finish_all();
        CHECK(!pool_release(&way_in.pool, 0));
    }
}

/* A merged packet whose datagrams exceed this way's MTU: each in fragments of its own. */
static void test_merged_fragments(void)
{
    struct table_output output;
    struct packet packet;
    unsigned holders = 0, done = 0;

    start("fragments of a merged packet", WAY_RAW4, false, 600);
    output = output_to("::ffff:10.0.0.1", 6000);
    packet = packet_of(0, 2500);
    packet.segment = 1000;
    append(&output, &packet, 0);
    CHECK(runs_send_again(&runs, note, &egress));
    CHECK_EQUAL(sent_count, 5);
    check_whole(0, 1, 0, 600, payload, 1000);
    check_whole(2, 3, 0, 600, payload + 1000, 1000);
    read_back(&sent[4], 0, payload + 2000, 500);
    holders = slots[0].holders;
    CHECK_EQUAL(holders, 1 + 3);
    while (taken < sent_count) {
        int result = 0;
        struct run *run = finish(&result);

        if (run) {
            CHECK_EQUAL(run->datagrams, 1);
            CHECK(!pool_release(&way_in.pool, run->slots[0]));
            runs_release(&runs, run);
            done++;
        }
    }
    CHECK_EQUAL(done, 3);
    CHECK_EQUAL(slots[0].holders, 1);
    finish_all();
}

int main(void)
{
    for (size_t i = 0; i < sizeof(payload); i++)
        payload[i] = (uint8_t)(i * 7 + i / 251 + 1);
    test_udp4(WAY_UDP4);
    test_udp4(WAY_LOOP4);
    test_udp6(WAY_UDP6);
    test_udp6(WAY_LOOP6);
    test_raw(false);
    test_raw(true);
    test_frames();
    test_merged();
    for (unsigned esp = 0; esp < 2; esp++) {
        uint8_t protocol = esp ? PROTOCOL_ESP : PROTOCOL_UDP;

        test_fragments(WAY_RAW4, false, "::ffff:10.0.0.1", protocol);
        test_fragments(WAY_RAW6, false, "2001:db8:2::2", protocol);
        test_fragments(WAY_FRAME, false, "::ffff:233.252.0.2", protocol);
        test_fragments(WAY_FRAME, true, "::ffff:233.252.0.2", protocol);
        test_fragments(WAY_FRAME, true, "ff3e::2", protocol);
    }
    test_many_fragments();
    test_merged_fragments();
    test_identifications();
    return 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fuzz_packet.c: packet_parse on any bytes. The first byte of an input says how to continue, the rest is the frame:
 * bit 0 makes the IP header checksum right, bit 1 the UDP checksum, so that a fuzzer need not guess them.
 *
 * What has to hold for every frame: an accepted payload lies within it and is as long as the UDP header says, or for ESP
 * all that follows the IP headers; a vouched checksum changes the outcome from a bad checksum to accepted and in no other
 * way, but for a UDP checksum of 0 over IPv6, which stays bad; bytes behind the IP packet do not matter.
 */
#include "packet.h"

#include "datagram.h"
#include "fuzz.h"

#include <arpa/inet.h>

enum { HOW_SEAL_IP = 1, HOW_SEAL_UDP = 2 };

/* Where what an IPv6 packet carries begins, or 0 if its headers end beyond the frame, or are not to be skipped. */
static size_t carried_at(const uint8_t *frame, size_t length, uint8_t *kind)
{
    size_t at = DATAGRAM6_IP_HEADER;

    *kind = frame[6];
    for (unsigned i = 0; *kind == 0 || *kind == 43 || *kind == 44 || *kind == 51 || *kind == 60; i++) {
        size_t size;

        if (i == 8 || at + 8 > length)
            return 0;
        size = *kind == 44 ? 8 : *kind == 51 ? (frame[at + 1] + 2u) * 4 : (frame[at + 1] + 1u) * 8;
        if ((*kind == 43 && frame[at + 3]) || (*kind == 44 && (frame[at + 2] || frame[at + 3] & 0xf9)))
            return 0;
        *kind = frame[at];
        at += size;
    }
    return at <= length ? at : 0;
}

static void seal(uint8_t *frame, size_t length, unsigned how)
{
    size_t header_length = length ? (size_t)(frame[0] & 0xf) * 4 : 0;

    if (length >= DATAGRAM6_IP_HEADER && frame[0] >> 4 == 6) {
        uint8_t kind;
        size_t at = carried_at(frame, length, &kind);

        if (at && how & HOW_SEAL_UDP && at + DATAGRAM_UDP_HEADER <= length &&
            ((size_t)frame[at + 4] << 8 | frame[at + 5]) <= length - at)
            seal_udp6(frame, at);
        return;
    }
    if (length < DATAGRAM_IP_HEADER || header_length < DATAGRAM_IP_HEADER || header_length > length)
        return;
    if (how & HOW_SEAL_UDP && header_length + DATAGRAM_UDP_HEADER <= length &&
        ((size_t)frame[header_length + 4] << 8 | frame[header_length + 5]) <= length - header_length)
        seal_udp(frame);
    if (how & HOW_SEAL_IP)
        seal_ip(frame);
}

/* How long the IP packet is, as its header says. */
static size_t packet_length(const uint8_t *frame)
{
    return frame[0] >> 4 == 4 ? (size_t)frame[2] << 8 | frame[3]
                              : DATAGRAM6_IP_HEADER + ((size_t)frame[4] << 8 | frame[5]);
}

static void check_ip(const uint8_t *frame, size_t length, size_t carried, const struct packet *packet)
{
    uint8_t kind;

    if (frame[0] >> 4 == 4) {
        CHECK_EQUAL(carried, (frame[0] & 0xf) * 4);
        CHECK_EQUAL(frame[9], packet->protocol);
        CHECK_EQUAL((frame[6] << 8 | frame[7]) & 0x3fff, 0);
        CHECK_EQUAL(checksum_add(0, frame, carried), 0xffff);
        CHECK_EQUAL(packet->ttl, frame[8]);
        CHECK_EQUAL(packet->tos, frame[1]);
        CHECK_BYTES(packet->source.bytes + 12, frame + 12, 4);
        CHECK_BYTES(packet->destination.bytes + 12, frame + 16, 4);
        CHECK(address_is_ipv4(&packet->source) && address_is_ipv4(&packet->destination));
    } else {
        CHECK_EQUAL(frame[0] >> 4, 6);
        CHECK_EQUAL(carried, carried_at(frame, length, &kind));
        CHECK_EQUAL(kind, packet->protocol);
        CHECK_EQUAL(packet->ttl, frame[7]);
        CHECK_EQUAL(packet->tos, ((frame[0] << 8 | frame[1]) >> 4) & 0xff);
        CHECK_BYTES(packet->source.bytes, frame + 8, 16);
        CHECK_BYTES(packet->destination.bytes, frame + 24, 16);
        CHECK(!address_is_ipv4(&packet->source) && !address_is_ipv4(&packet->destination));
    }
}

static void check_accepted(const uint8_t *frame, size_t length, const struct packet *packet)
{
    size_t offset = (size_t)(packet->payload - frame);
    const uint8_t *udp = packet->payload - DATAGRAM_UDP_HEADER;

    CHECK(packet->payload >= frame && offset <= length && packet->payload_length <= length - offset);
    CHECK_EQUAL(packet->segment, 0);
    CHECK_EQUAL(packet->vlan, 0);
    if (packet->protocol == PROTOCOL_ESP) {
        check_ip(frame, length, offset, packet);
        CHECK_EQUAL(packet->payload_length, packet_length(frame) - offset);
        CHECK_EQUAL(packet->source_port | packet->destination_port, 0);
        return;
    }
    CHECK_EQUAL(packet->protocol, PROTOCOL_UDP);
    check_ip(frame, length, offset - DATAGRAM_UDP_HEADER, packet);
    CHECK_EQUAL(packet->payload_length, (udp[4] << 8 | udp[5]) - DATAGRAM_UDP_HEADER);
    CHECK(offset + packet->payload_length <= packet_length(frame));
    CHECK_EQUAL(packet->source_port, udp[0] << 8 | udp[1]);
    CHECK_EQUAL(packet->destination_port, udp[2] << 8 | udp[3]);
}

/* What is called a fragment of IPv6 has its piece within the packet, to its end. */
static void check_fragment(const uint8_t *frame, size_t length, enum drop_reason reason)
{
    struct packet_fragment fragment;
    bool is_fragment = packet_parse_fragment(frame, length, &fragment);

    CHECK_EQUAL(is_fragment, reason == DROP_FRAGMENT && frame[0] >> 4 == 6);
    if (!is_fragment)
        return;
    CHECK(fragment.header == frame && fragment.piece >= frame + DATAGRAM6_IP_HEADER + 8);
    CHECK(fragment.piece + fragment.length == frame + packet_length(frame) && packet_length(frame) <= length);
    CHECK_EQUAL(fragment.before, (size_t)(fragment.piece - frame) - DATAGRAM6_IP_HEADER - 8);
    CHECK(fragment.offset % 8 == 0 && fragment.offset <= 65528 && (fragment.offset || fragment.more));
    CHECK_BYTES(fragment.source.bytes, frame + 8, 16);
    CHECK_BYTES(fragment.destination.bytes, frame + 24, 16);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct packet packet, vouched, cut;
    enum drop_reason reason, reason_vouched;
    size_t length, total_length;
    uint8_t *frame;

    if (!size)
        return 0;
    length = size - 1;
    frame = exact_copy(data + 1, length);
    seal(frame, length, data[0]);
    reason = packet_parse(frame, length, false, &packet);
    reason_vouched = packet_parse(frame, length, true, &vouched);
    check_fragment(frame, length, reason);
    CHECK(reason_vouched != DROP_BAD_UDP_CHECKSUM || (frame[0] >> 4 == 6 && reason == DROP_BAD_UDP_CHECKSUM));
    CHECK(reason_vouched == reason || (reason == DROP_BAD_UDP_CHECKSUM && reason_vouched == DROP_NONE));
    if (reason_vouched == DROP_NONE) {
        check_accepted(frame, length, &vouched);
        total_length = packet_length(frame);
        CHECK(total_length <= length);
        CHECK_EQUAL(packet_parse(frame, total_length, true, &cut), DROP_NONE);
        CHECK(cut.payload == vouched.payload && cut.payload_length == vouched.payload_length);
        CHECK_EQUAL(packet_parse(frame, total_length - 1, true, &cut), DROP_TRUNCATED);
    }
    if (reason == DROP_NONE) {
        check_accepted(frame, length, &packet);
        CHECK(packet.payload == vouched.payload && packet.payload_length == vouched.payload_length);
    }
    free(frame);
    return 0;
}

#ifndef FUZZ_LIBFUZZER
/* An IPv6 packet with up to three extension headers that are as they should be. */
static size_t seed_ipv6(uint8_t *out, const uint8_t *payload, size_t length, uint64_t *state)
{
    static const uint8_t kinds[] = {0, 60, 43, 44, 51};
    uint8_t extensions[3 * 24] = {0}, next = random_below(state, 4) ? 17 : 50;
    size_t used = 0;
    struct datagram6 datagram = {
        .destination = {0xff, 0x3e, [15] = 1},
        .source = {0x20, 0x01, [15] = (uint8_t)random_next(state)},
        .source_port = (uint16_t)random_next(state),
        .destination_port = 5000,
        .hops = (uint8_t)random_next(state),
        .class = (uint8_t)random_next(state),
        .payload = payload,
        .payload_length = length,
    };

    datagram.next = next;
    for (unsigned count = random_below(state, 4); count; count--) { /* from the last to the first */
        uint8_t kind = kinds[random_below(state, sizeof(kinds))];
        size_t size = kind == 44 ? 8 : kind == 51 ? 12 : 8 * (1 + random_below(state, 3));

        memmove(extensions + size, extensions, used);
        memset(extensions, 0, size);
        extensions[0] = datagram.next;
        extensions[1] = (uint8_t)(kind == 44 ? 0 : kind == 51 ? 1 : size / 8 - 1);
        used += size;
        datagram.next = kind;
    }
    datagram.extensions = extensions;
    datagram.extensions_length = used;
    return datagram6_write(out, &datagram);
}

static size_t fuzz_seed(uint8_t *out, uint64_t *state)
{
    uint8_t payload[64];
    const struct datagram datagram = {
        .source = (uint32_t)random_next(state),
        .destination = 0xe9fc0001, /* 233.252.0.1 */
        .source_port = (uint16_t)random_next(state),
        .destination_port = 5000,
        .ttl = (uint8_t)random_next(state),
        .options = random_below(state, 3) ? 0 : random_below(state, DATAGRAM_OPTIONS_MAX + 1),
        .payload = payload,
        .payload_length = random_below(state, sizeof(payload)),
    };
    size_t length;

    for (size_t i = 0; i < sizeof(payload); i++)
        payload[i] = (uint8_t)random_next(state);
    out[0] = (uint8_t)random_below(state, 4);
    if (random_below(state, 2))
        return 1 + seed_ipv6(out + 1, payload, datagram.payload_length, state);
    length = datagram_write(out + 1, &datagram);
    if (!random_below(state, 4)) {
        out[1 + 9] = 50;
        seal_ip(out + 1);
    }
    return 1 + length;
}
#endif

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fuzz_packet.c: packet_parse on any bytes. The first byte of an input says how to continue, the rest is the frame:
 * bit 0 makes the IP header checksum right, bit 1 the UDP checksum, so that a fuzzer need not guess them.
 *
 * What has to hold for every frame: an accepted payload lies within it and is as long as the UDP header says; a vouched
 * checksum changes the outcome from a bad checksum to accepted and in no other way; bytes behind the IP total length do
 * not matter; the same frame gives the same outcome.
 */
#include "packet.h"

#include "datagram.h"
#include "fuzz.h"

#include <arpa/inet.h>

enum { HOW_SEAL_IP = 1, HOW_SEAL_UDP = 2 };

static void seal(uint8_t *frame, size_t length, unsigned how)
{
    size_t header_length = length ? (size_t)(frame[0] & 0xf) * 4 : 0;

    if (length < DATAGRAM_IP_HEADER || header_length < DATAGRAM_IP_HEADER || header_length > length)
        return;
    if (how & HOW_SEAL_UDP && header_length + DATAGRAM_UDP_HEADER <= length &&
        ((size_t)frame[header_length + 4] << 8 | frame[header_length + 5]) <= length - header_length)
        seal_udp(frame);
    if (how & HOW_SEAL_IP)
        seal_ip(frame);
}

static void check_accepted(const uint8_t *frame, size_t length, const struct packet *packet)
{
    size_t offset = (size_t)(packet->payload - frame);
    const uint8_t *udp = packet->payload - DATAGRAM_UDP_HEADER;

    CHECK(packet->payload >= frame && offset <= length && packet->payload_length <= length - offset);
    CHECK_EQUAL(offset, (frame[0] & 0xf) * 4 + DATAGRAM_UDP_HEADER);
    CHECK_EQUAL(packet->payload_length, (udp[4] << 8 | udp[5]) - DATAGRAM_UDP_HEADER);
    CHECK_EQUAL(frame[0] >> 4, 4);
    CHECK_EQUAL(frame[9], 17);
    CHECK_EQUAL((frame[6] << 8 | frame[7]) & 0x3fff, 0);
    CHECK_EQUAL(checksum_add(0, frame, offset - DATAGRAM_UDP_HEADER), 0xffff);
    CHECK_EQUAL(packet->source_port, udp[0] << 8 | udp[1]);
    CHECK_EQUAL(packet->destination_port, udp[2] << 8 | udp[3]);
    CHECK_EQUAL(packet->ttl, frame[8]);
    CHECK_BYTES(packet->source.bytes + 12, frame + 12, 4);
    CHECK_BYTES(packet->destination.bytes + 12, frame + 16, 4);
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
    CHECK(reason_vouched != DROP_BAD_UDP_CHECKSUM);
    CHECK_EQUAL(reason == DROP_BAD_UDP_CHECKSUM ? DROP_NONE : reason, reason_vouched);
    if (reason_vouched == DROP_NONE) {
        check_accepted(frame, length, &vouched);
        total_length = (size_t)frame[2] << 8 | frame[3];
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

    for (size_t i = 0; i < sizeof(payload); i++)
        payload[i] = (uint8_t)random_next(state);
    out[0] = (uint8_t)random_below(state, 4);
    return 1 + datagram_write(out + 1, &datagram);
}
#endif

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * packet.h: from the bytes of a frame to the datagram in it, or to the reason why not.
 *
 * Pure: no socket, no allocation, no state. Every byte is read through a cursor that knows how many are left. The input
 * is whatever a stranger put on the wire, starting at the network header.
 */
#ifndef MCRELAY_PACKET_H
#define MCRELAY_PACKET_H

#include "counters.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* An IPv6 address or an IPv4 address mapped into one (::ffff:a.b.c.d, RFC 4291 section 2.5.5.2), network byte order. */
union address {
    uint8_t bytes[16];
    uint32_t words[4];
};

/* Of what we relay, as in the IP header. */
enum { PROTOCOL_UDP = 17, PROTOCOL_ESP = 50 };

struct packet {
    union address source;
    union address destination;
    uint16_t source_port;      /* host byte order, 0 of ESP */
    uint16_t destination_port; /* likewise */
    uint8_t ttl;               /* or hop limit */
    uint8_t tos;               /* or traffic class: 6 bits of DSCP, 2 of ECN */
    uint8_t protocol;
    uint16_t vlan; /* 0: untagged. Filled in by whoever knows, as `segment` below */
    const uint8_t *payload; /* points into the frame */
    size_t payload_length;
    /* 0: the payload is one datagram's. Else it is those of several, each of this length but for the last, which may be
     * shorter. Filled in by whoever knows: packet_parse does not. */
    uint16_t segment;
};

/* Datagrams in one packet, at most: UDP_MAX_SEGMENTS of linux/udp.h (64 before Linux 6.9). */
enum { PACKET_DATAGRAMS_MAX = 128 };

/* Datagrams in the packet. */
static inline uint32_t packet_datagrams(const struct packet *packet)
{
    return packet->segment ? (uint32_t)((packet->payload_length + packet->segment - 1) / packet->segment) : 1;
}

/* Parse an IPv4 (RFC 791) or IPv6 packet (RFC 8200) of `length` bytes that carries UDP (RFC 768) or ESP (RFC 4303), whose
 * payload is all that follows the IP headers. `checksum_vouched`: the kernel or the device has verified the UDP
 * checksum, or has not filled it in yet (TP_STATUS_CSUM_VALID, TP_STATUS_CSUMNOTREADY): do not look at it. Bytes behind
 * the IP packet are link-layer padding and ignored. Returns DROP_NONE and fills `out`, or the reason, with `out`
 * undefined. `segment` and `vlan` of it are 0. */
enum drop_reason packet_parse(const uint8_t *data, size_t length, bool checksum_vouched, struct packet *out);

/* A fragment of an IPv6 packet (RFC 8200 section 4.5). */
struct packet_fragment {
    union address source;
    union address destination;
    uint32_t identification; /* as it stands in the packet */
    const uint8_t *header;   /* IPv6's own, in the frame */
    const uint8_t *piece;    /* what it brings of the packet, likewise */
    size_t length;
    size_t offset; /* of the piece */
    size_t before; /* bytes of extension headers in front of the fragment's, which each fragment has */
    uint8_t next;  /* kind of the header that the packet goes on with: the first one's counts */
    bool more;     /* it is not the last */
    bool headless; /* the first one, but not with all headers, which RFC 7112 wants there */
};

/* What packet_parse calls DROP_FRAGMENT, taken apart. False if it is none of IPv6. */
bool packet_parse_fragment(const uint8_t *data, size_t length, struct packet_fragment *out);

/* Map an IPv4 address in network byte order. */
static inline union address address_from_ipv4(uint32_t ipv4)
{
    union address mapped = {.words = {0, 0, 0, ipv4}};

    mapped.bytes[10] = 0xff;
    mapped.bytes[11] = 0xff;
    return mapped;
}

static inline bool address_is_ipv4(const union address *address)
{
    static const uint8_t mapped[12] = {[10] = 0xff, [11] = 0xff};

    return !memcmp(address->bytes, mapped, sizeof(mapped));
}

/* All 0: none, or any. */
static inline bool address_is_any(const union address *address)
{
    return !(address->words[0] | address->words[1] | address->words[2] | address->words[3]);
}

static inline bool address_equals(const union address *a, const union address *b)
{
    return !memcmp(a->bytes, b->bytes, sizeof(a->bytes));
}

#define ADDRESS_MULTIPLIER UINT64_C(0x9e3779b97f4a7c15)

/* Enough mixing that addresses counted up by one, as people number them, do not cluster; the upper bits are the best. The
 * multiplier is 2^64 divided by the golden ratio (Knuth, The Art of Computer Programming, 6.4). */
static inline uint64_t address_hash(const union address *address)
{
    uint64_t h = ((uint64_t)address->words[0] << 32 | address->words[1]) * ADDRESS_MULTIPLIER;

    return (h ^ ((uint64_t)address->words[2] << 32 | address->words[3])) * ADDRESS_MULTIPLIER;
}

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * headers.h: what the headers of a copy say, and, for the ways by which we write them, their bytes.
 *
 * A copy's heading is made from its output, from the packet and from what its interface has. UDP sockets are told of it
 * in a message header (egress.c); packet and raw sockets are given the headers themselves:
 *
 *     [virtio_net_hdr] [Ethernet] IPv4 or IPv6 [fragment header of IPv6] [UDP] payload
 *
 * With a virtio header the kernel or the device computes the UDP checksum and cuts the frame into datagrams. Without,
 * and in fragments, the checksum is computed here. IPv4 identifications are the caller's; the kernel counts up from them
 * where it cuts. "Don't fragment" is not set, as on the UDP sockets.
 *
 * Pure: what a fuzzer can run alone.
 */
#ifndef MCRELAY_HEADERS_H
#define MCRELAY_HEADERS_H

#include "table.h"

enum {
    HEADERS_VIRTIO = 10, /* sizeof(struct virtio_net_hdr) */
    HEADERS_IPV4 = 20,
    HEADERS_IPV6 = 40,
    HEADERS_IPV6_FRAGMENT = 8,
    HEADERS_UDP = 8,
    HEADERS_MAX = HEADERS_VIRTIO + ETHERNET_HEADER + HEADERS_IPV6 + HEADERS_IPV6_FRAGMENT + HEADERS_UDP,
    HEADERS_MTU_MIN = 68, /* RFC 791: a fragment of 8 bytes behind the longest header; what it says here is 48 and 16 */
    HEADERS_IP_MAX = 65535, /* total length of IPv4, payload length of IPv6 */
};

struct heading {
    union address source; /* of a UDP socket's: ANY if the kernel chooses */
    union address destination;
    uint16_t source_port; /* host byte order; of a UDP socket's not looked at */
    uint16_t destination_port;
    uint8_t ttl;
    uint8_t tos;
    uint8_t protocol;
};

/* Where the headers go. */
struct framing {
    const struct egress_link *link; /* NULL: to a raw socket, without link-layer header */
    bool virtio;
};

/* The TTL that a copy leaves with. Never 0, which would not leave. */
static inline uint8_t heading_ttl(const struct table_output *output, const struct packet *packet)
{
    uint8_t ttl = packet->ttl;

    if (output->ttl && !(output->flags & OUTPUT_KEEP_TTL))
        return output->ttl;
    if (!(output->flags & OUTPUT_KEEP_TTL) && ttl)
        ttl--;
    return ttl ? ttl : 1;
}

/* The DSCP in its place. Congestion was experienced on other ways than ours, if at all: ECN is 0. */
static inline uint8_t heading_tos(const struct table_output *output, const struct packet *packet)
{
    return output->flags & OUTPUT_KEEP_DSCP ? packet->tos & 0xfc : output->tos;
}

static inline bool heading_is_ipv4(const struct heading *heading)
{
    return address_is_ipv4(&heading->destination);
}

/* IP and UDP headers of each datagram. */
static inline size_t heading_length(const struct heading *heading)
{
    return (heading_is_ipv4(heading) ? HEADERS_IPV4 : HEADERS_IPV6) +
           (heading->protocol == PROTOCOL_UDP ? HEADERS_UDP : 0);
}

/* Make the heading of a packet's copy. DROP_NONE; DROP_EGRESS_UNREACHABLE if there is no address that it could come from,
 * or its destination is none for this way; DROP_EGRESS_ERROR if it is too long. */
enum drop_reason heading_make(struct heading *out, const struct table_output *output, const struct packet *packet,
                              const struct egress_link *link);

/* Write the headers of a datagram whose payload has `length` bytes, or of several of `segment` bytes each (but for the
 * last, which may be shorter) if that is not 0, which needs the virtio header. `payload` is read without it, for the
 * checksum. Returns how many bytes were written, HEADERS_MAX at most. */
size_t headers_write(uint8_t *to, const struct heading *heading, const struct framing *framing, const uint8_t *payload,
                     size_t length, uint16_t segment, uint32_t identification);

/* One fragment of a datagram. */
struct fragment {
    size_t headers; /* bytes written */
    size_t at;      /* of the payload, the piece that follows the headers */
    size_t length;
};

/* How many bytes a datagram has behind the IP header, to be cut into fragments. */
static inline size_t headers_cut_length(const struct heading *heading, size_t length)
{
    return length + (heading->protocol == PROTOCOL_UDP ? HEADERS_UDP : 0);
}

/* Bytes behind the IP header that a fragment has at most, of an interface with this MTU: a multiple of 8. */
static inline size_t headers_fragment_room(const struct heading *heading, uint32_t mtu)
{
    return (mtu - (heading_is_ipv4(heading) ? HEADERS_IPV4 : HEADERS_IPV6 + HEADERS_IPV6_FRAGMENT)) & ~(size_t)7;
}

/* Write the headers of the fragment that begins at byte `at` of those behind the IP header, `room` of them at most. */
struct fragment headers_write_fragment(uint8_t *to, const struct heading *heading, const struct framing *framing,
                                       const uint8_t *payload, size_t length, size_t at, size_t room,
                                       uint32_t identification);

#endif

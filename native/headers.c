/* SPDX-License-Identifier: Apache-2.0 */
#include "headers.h"

#include "checksum.h"

enum {
    VIRTIO_NEEDS_CHECKSUM = 1, /* VIRTIO_NET_HDR_F_NEEDS_CSUM */
    VIRTIO_SEGMENTS = 5,       /* VIRTIO_NET_HDR_GSO_UDP_L4 */
    UDP_CHECKSUM_AT = 6,
    IPV4_MORE_FRAGMENTS = 0x2000,
    IPV6_MORE_FRAGMENTS = 1,
    IPV6_FRAGMENT = 44,
    ETHERTYPE_IPV4 = 0x0800,
    ETHERTYPE_IPV6 = 0x86dd,
};

/* As in linux/virtio_net.h; numbers in the machine's byte order, as packet sockets take them. */
struct virtio_header {
    uint8_t flags;
    uint8_t kind;
    uint16_t headers;
    uint16_t segment;
    uint16_t checksum_start;
    uint16_t checksum_offset;
};

static_assert(sizeof(struct virtio_header) == HEADERS_VIRTIO, "as in linux/virtio_net.h");

static void write16(uint8_t *to, size_t value)
{
    to[0] = (uint8_t)(value >> 8);
    to[1] = (uint8_t)value;
}

static void write32(uint8_t *to, uint32_t value)
{
    write16(to, value >> 16);
    write16(to + 2, value & 0xffff);
}

/* --- the heading ---------------------------------------------------------------------------------------------------- */

static bool is_multicast_or_broadcast(const union address *address)
{
    if (!address_is_ipv4(address))
        return address->bytes[0] == 0xff;
    return address->bytes[12] >> 4 == 0xe || address->words[3] == UINT32_MAX;
}

/* fe80::/10, or multicast that does not leave the link. */
static bool is_link_local(const union address *address)
{
    return address->bytes[0] == 0xff ? (address->bytes[1] & 0xf) <= 2
                                     : address->bytes[0] == 0xfe && address->bytes[1] >> 6 == 2;
}

/* The first `prefix` bits of `address`, and the others of `rest`. */
static union address combine(const union address *address, unsigned prefix, const union address *rest)
{
    union address combined = *rest;
    unsigned whole = prefix / 8;

    memcpy(combined.bytes, address->bytes, whole);
    if (prefix % 8) {
        uint8_t mask = (uint8_t)(0xff00 >> prefix % 8);

        combined.bytes[whole] = (uint8_t)((address->bytes[whole] & mask) | (rest->bytes[whole] & ~mask));
    }
    return combined;
}

/* Whether a copy may say that it comes from there: from a host, or, on a link, from one that has no address yet. */
static bool may_be_source(const union address *source, const union address *destination)
{
    if (address_is_any(source) || (address_is_ipv4(source) && !source->words[3]))
        return is_multicast_or_broadcast(destination);
    if (address_is_ipv4(source))
        return source->bytes[12] && source->bytes[12] < 0xe0;
    return source->bytes[0] != 0xff;
}

/* Where a datagram comes from whose header we write. False if there is no such address. */
static bool choose_source(union address *out, const struct table_output *output, const struct packet *packet,
                          const struct egress_link *link, const union address *destination)
{
    bool ipv4 = address_is_ipv4(destination);

    if (output->flags & OUTPUT_KEEP_SOURCE) {
        *out = packet->source;
        if (!may_be_source(out, destination))
            return false;
    } else if (!address_is_any(&output->source)) {
        *out = output->source;
    } else {
        *out = ipv4                                                                  ? link->source4
               : is_link_local(destination) || address_is_any(&link->source6) ? link->source6_link
                                                                              : link->source6;
        if (address_is_any(out))
            return false;
    }
    return address_is_ipv4(out) == ipv4;
}

static bool is_of_family(enum way way, bool ipv4)
{
    if (way == WAY_FRAME)
        return true;
    return (way == WAY_UDP4 || way == WAY_LOOP4 || way == WAY_RAW4) == ipv4;
}

enum drop_reason heading_make(struct heading *out, const struct table_output *output, const struct packet *packet,
                              const struct egress_link *link)
{
    size_t longest = packet->segment ? packet->segment : packet->payload_length;

    out->destination = output->prefix == 128 ? output->address
                                             : combine(&output->address, output->prefix, &packet->destination);
    out->destination_port = output->port ? output->port : packet->destination_port;
    out->ttl = heading_ttl(output, packet);
    out->tos = heading_tos(output, packet);
    out->protocol = packet->protocol;
    if (!is_of_family(output->way, heading_is_ipv4(out)))
        return DROP_EGRESS_UNREACHABLE;
    if (!way_writes_headers(output->way)) {
        out->source = output->source;
        out->source_port = 0;
        return DROP_NONE;
    }
    if ((output->way == WAY_FRAME && !is_multicast_or_broadcast(&out->destination)) ||
        !choose_source(&out->source, output, packet, link, &out->destination))
        return DROP_EGRESS_UNREACHABLE;
    out->source_port = output->flags & OUTPUT_KEEP_SOURCE_PORT || !output->source_port ? packet->source_port
                                                                                       : output->source_port;
    longest += heading_length(out) - (heading_is_ipv4(out) ? 0 : HEADERS_IPV6);
    return longest > HEADERS_IP_MAX ? DROP_EGRESS_ERROR : DROP_NONE;
}

/* --- bytes ---------------------------------------------------------------------------------------------------------- */

/* RFC 1112 section 6.4, RFC 2464 section 7. */
static size_t write_ethernet(uint8_t *to, const struct heading *heading, const struct egress_link *link)
{
    const uint8_t *address = heading->destination.bytes;

    if (!heading_is_ipv4(heading)) {
        to[0] = to[1] = 0x33;
        memcpy(to + 2, address + 12, 4);
    } else if (heading->destination.words[3] == UINT32_MAX) {
        memset(to, 0xff, 6);
    } else {
        memcpy(to, (const uint8_t[]){0x01, 0x00, 0x5e, address[13] & 0x7f, address[14], address[15]}, 6);
    }
    memcpy(to + 6, link->mac, sizeof(link->mac));
    write16(to + 12, heading_is_ipv4(heading) ? ETHERTYPE_IPV4 : ETHERTYPE_IPV6);
    return ETHERNET_HEADER;
}

/* `fragment`: flags and offset, in units of 8 bytes. */
static size_t write_ipv4(uint8_t *to, const struct heading *heading, size_t length, uint16_t fragment,
                         uint32_t identification)
{
    uint16_t checksum;

    to[0] = 0x45;
    to[1] = heading->tos;
    write16(to + 2, HEADERS_IPV4 + length);
    write16(to + 4, identification & 0xffff);
    write16(to + 6, fragment);
    to[8] = heading->ttl;
    to[9] = heading->protocol;
    write16(to + 10, 0);
    memcpy(to + 12, heading->source.bytes + 12, 4);
    memcpy(to + 16, heading->destination.bytes + 12, 4);
    checksum = (uint16_t)~checksum_fold(checksum_sum(to, HEADERS_IPV4, 0));
    memcpy(to + 10, &checksum, sizeof(checksum));
    return HEADERS_IPV4;
}

static size_t write_ipv6(uint8_t *to, const struct heading *heading, size_t length, uint8_t next)
{
    write32(to, UINT32_C(6) << 28 | (uint32_t)heading->tos << 20);
    write16(to + 4, length);
    to[6] = next;
    to[7] = heading->ttl;
    memcpy(to + 8, heading->source.bytes, 16);
    memcpy(to + 24, heading->destination.bytes, 16);
    return HEADERS_IPV6;
}

/* The UDP header, with the sum of the pseudo header in place of the checksum. */
static size_t write_udp(uint8_t *to, const struct heading *heading, size_t length)
{
    const size_t from = heading_is_ipv4(heading) ? 12 : 0; /* of 16 bytes of address */
    const uint8_t tail[4] = {0, PROTOCOL_UDP, (uint8_t)((HEADERS_UDP + length) >> 8), (uint8_t)(HEADERS_UDP + length)};
    uint64_t sum = checksum_sum(heading->source.bytes + from, 16 - from, 0);
    uint16_t folded;

    sum = checksum_sum(heading->destination.bytes + from, 16 - from, sum);
    folded = checksum_fold(checksum_sum(tail, sizeof(tail), sum));
    write16(to, heading->source_port);
    write16(to + 2, heading->destination_port);
    write16(to + 4, HEADERS_UDP + length);
    memcpy(to + UDP_CHECKSUM_AT, &folded, sizeof(folded));
    return HEADERS_UDP;
}

/* Put the checksum in place of the pseudo header's sum. */
static void finish_udp(uint8_t *udp, const uint8_t *payload, size_t length)
{
    uint16_t checksum = (uint16_t)~checksum_fold(checksum_sum(payload, length, checksum_sum(udp, HEADERS_UDP, 0)));

    if (!checksum) /* which would mean that there is none */
        checksum = UINT16_MAX;
    memcpy(udp + UDP_CHECKSUM_AT, &checksum, sizeof(checksum));
}

/* What stands before the IP header: an empty virtio header, and the link layer's. */
static size_t write_front(uint8_t *to, const struct heading *heading, const struct framing *framing)
{
    size_t length = 0;

    if (framing->virtio) {
        memset(to, 0, HEADERS_VIRTIO);
        length = HEADERS_VIRTIO;
    }
    if (framing->link && framing->link->header)
        length += write_ethernet(to + length, heading, framing->link);
    return length;
}

size_t headers_write(uint8_t *to, const struct heading *heading, const struct framing *framing, const uint8_t *payload,
                     size_t length, uint16_t segment, uint32_t identification)
{
    const size_t behind = headers_cut_length(heading, length);
    size_t at = write_front(to, heading, framing);

    at += heading_is_ipv4(heading) ? write_ipv4(to + at, heading, behind, 0, identification)
                                   : write_ipv6(to + at, heading, behind, heading->protocol);
    if (heading->protocol != PROTOCOL_UDP)
        return at;
    write_udp(to + at, heading, length);
    if (framing->virtio) {
        const struct virtio_header virtio = {
            .flags = VIRTIO_NEEDS_CHECKSUM,
            .kind = segment ? VIRTIO_SEGMENTS : 0,
            .headers = (uint16_t)(at + HEADERS_UDP - HEADERS_VIRTIO),
            .segment = segment,
            .checksum_start = (uint16_t)(at - HEADERS_VIRTIO),
            .checksum_offset = UDP_CHECKSUM_AT,
        };

        memcpy(to, &virtio, sizeof(virtio));
    } else {
        finish_udp(to + at, payload, length);
    }
    return at + HEADERS_UDP;
}

struct fragment headers_write_fragment(uint8_t *to, const struct heading *heading, const struct framing *framing,
                                       const uint8_t *payload, size_t length, size_t at, size_t room,
                                       uint32_t identification)
{
    const size_t udp = heading->protocol == PROTOCOL_UDP ? HEADERS_UDP : 0, left = length + udp - at;
    const size_t taken = left < room ? left : room;
    const bool more = taken < left;
    struct fragment fragment = {.headers = write_front(to, heading, framing)};

    if (heading_is_ipv4(heading)) {
        fragment.headers += write_ipv4(to + fragment.headers, heading, taken,
                                       (uint16_t)(at / 8 | (more ? IPV4_MORE_FRAGMENTS : 0)), identification);
    } else {
        fragment.headers += write_ipv6(to + fragment.headers, heading, HEADERS_IPV6_FRAGMENT + taken, IPV6_FRAGMENT);
        to[fragment.headers] = heading->protocol;
        to[fragment.headers + 1] = 0;
        write16(to + fragment.headers + 2, at | (more ? IPV6_MORE_FRAGMENTS : 0));
        write32(to + fragment.headers + 4, identification);
        fragment.headers += HEADERS_IPV6_FRAGMENT;
    }
    if (at == 0 && udp) {
        write_udp(to + fragment.headers, heading, length);
        finish_udp(to + fragment.headers, payload, length);
        fragment.headers += HEADERS_UDP;
        fragment.length = taken - udp;
    } else {
        fragment.at = at - udp;
        fragment.length = taken;
    }
    return fragment;
}

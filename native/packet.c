/* SPDX-License-Identifier: Apache-2.0 */
#include "packet.h"

#include "checksum.h"

enum {
    IPV4_HEADER_MIN = 20,
    IPV4_MORE_FRAGMENTS = 0x2000,
    IPV4_OFFSET_MASK = 0x1fff,
    IPV6_HEADER = 40,
    IPV6_HOP_BY_HOP = 0,
    IPV6_ROUTING = 43,
    IPV6_FRAGMENT = 44,
    IPV6_AUTHENTICATION = 51,
    IPV6_DESTINATION = 60,
    IPV6_EXTENSIONS_MAX = 8, /* RFC 8200 has six kinds, of which one may be there twice */
    IPV6_MORE_FRAGMENTS = 1,
    IPV6_OFFSET_MASK = 0xfff8, /* in bytes */
    IPV6_FRAGMENT_HEADER = 8,
    UDP_HEADER = 8,
};

struct cursor {
    const uint8_t *at;
    size_t left;
};

/* The next `n` bytes, or NULL where there are fewer. */
static const uint8_t *take(struct cursor *c, size_t n)
{
    const uint8_t *bytes = c->at;

    if (n > c->left)
        return NULL;
    c->at += n;
    c->left -= n;
    return bytes;
}

static uint16_t read16(const uint8_t *p)
{
    return (uint16_t)(p[0] << 8 | p[1]);
}

static uint32_t copy32(const uint8_t *p)
{
    uint32_t word;

    memcpy(&word, p, sizeof(word));
    return word;
}

static bool sum_is_valid(uint64_t sum)
{
    return checksum_fold(sum) == 0xffff;
}

/* RFC 768, RFC 8200 section 8.1: over the pseudo header (addresses, protocol, UDP length) and the datagram. */
static bool udp_checksum_is_valid(const uint8_t *addresses, size_t addresses_length, const uint8_t *udp,
                                  size_t udp_length)
{
    uint8_t tail[4] = {0, PROTOCOL_UDP, (uint8_t)(udp_length >> 8), (uint8_t)udp_length};
    uint64_t sum = checksum_sum(addresses, addresses_length, 0);

    sum = checksum_sum(tail, sizeof(tail), sum);
    return sum_is_valid(checksum_sum(udp, udp_length, sum));
}

/* What follows the IP headers: UDP. `addresses` are those of the IP header, source and destination. */
static enum drop_reason parse_udp(struct cursor *c, const uint8_t *addresses, size_t addresses_length,
                                         bool vouched, struct packet *out)
{
    const uint8_t *udp = take(c, UDP_HEADER);
    size_t udp_length;

    if (!udp)
        return DROP_TRUNCATED;
    udp_length = read16(udp + 4);
    if (udp_length < UDP_HEADER || udp_length - UDP_HEADER > c->left)
        return DROP_BAD_UDP_LENGTH;
    /* A checksum of zero means that the sender computed none, which it must not over IPv6. */
    if (read16(udp + 6) == 0) {
        if (addresses_length > 8)
            return DROP_BAD_UDP_CHECKSUM;
    } else if (!vouched && !udp_checksum_is_valid(addresses, addresses_length, udp, udp_length)) {
        return DROP_BAD_UDP_CHECKSUM;
    }
    out->source_port = read16(udp);
    out->destination_port = read16(udp + 2);
    out->payload = c->at;
    out->payload_length = udp_length - UDP_HEADER;
    return DROP_NONE;
}

static void take_esp(const struct cursor *c, struct packet *out)
{
    out->source_port = 0;
    out->destination_port = 0;
    out->payload = c->at;
    out->payload_length = c->left;
}

static enum drop_reason parse_ipv4(const uint8_t *data, size_t length, bool vouched, struct packet *out)
{
    struct cursor c = {data, length};
    const uint8_t *ip = take(&c, IPV4_HEADER_MIN);
    size_t header_length, total_length;
    enum drop_reason reason;

    if (!ip)
        return DROP_TRUNCATED;
    header_length = (size_t)(ip[0] & 0xf) * 4;
    total_length = read16(ip + 2);
    if (header_length < IPV4_HEADER_MIN || total_length < header_length)
        return DROP_BAD_IP_HEADER;
    if (total_length > length)
        return DROP_TRUNCATED;
    c.left = total_length - IPV4_HEADER_MIN;
    if (!take(&c, header_length - IPV4_HEADER_MIN))
        return DROP_TRUNCATED;
    if (!sum_is_valid(checksum_sum(ip, header_length, 0)))
        return DROP_BAD_IP_CHECKSUM;
    if (read16(ip + 6) & (IPV4_MORE_FRAGMENTS | IPV4_OFFSET_MASK))
        return DROP_FRAGMENT;
    if (ip[9] == PROTOCOL_UDP) {
        reason = parse_udp(&c, ip + 12, 8, vouched, out);
        if (reason != DROP_NONE)
            return reason;
    } else if (ip[9] == PROTOCOL_ESP) {
        take_esp(&c, out);
    } else {
        return DROP_NOT_UDP;
    }
    out->source = address_from_ipv4(copy32(ip + 12));
    out->destination = address_from_ipv4(copy32(ip + 16));
    out->protocol = ip[9];
    out->ttl = ip[8];
    out->tos = ip[1];
    return DROP_NONE;
}

/* Skip the headers between IPv6's own and what it carries. `next` is the kind of the first, then of what is carried. For
 * DROP_FRAGMENT the cursor is behind the fragment's header. */
static enum drop_reason skip_extensions(struct cursor *c, uint8_t *next)
{
    for (unsigned skipped = 0;; skipped++) {
        const uint8_t *header;
        size_t more;

        if (*next != IPV6_HOP_BY_HOP && *next != IPV6_ROUTING && *next != IPV6_FRAGMENT &&
            *next != IPV6_AUTHENTICATION && *next != IPV6_DESTINATION)
            return DROP_NONE;
        if (skipped == IPV6_EXTENSIONS_MAX)
            return DROP_BAD_EXTENSION;
        header = take(c, 8);
        if (!header)
            return DROP_BAD_EXTENSION;
        more = *next == IPV6_FRAGMENT         ? 0
               : *next == IPV6_AUTHENTICATION ? header[1] * (size_t)4 /* RFC 4302: in words of 4 bytes, less 2 */
                                              : header[1] * (size_t)8;
        if (*next == IPV6_FRAGMENT && read16(header + 2) & (IPV6_OFFSET_MASK | IPV6_MORE_FRAGMENTS))
            return DROP_FRAGMENT;
        if (!take(c, more) || (*next == IPV6_ROUTING && header[3] != 0))
            return DROP_BAD_EXTENSION;
        *next = header[0];
    }
}

/* IPv6's own header, and the cursor at what follows, as far as it goes. */
static enum drop_reason begin_ipv6(struct cursor *c, union address *source, union address *destination)
{
    const uint8_t *ip = take(c, IPV6_HEADER);
    size_t payload_length;

    if (!ip)
        return DROP_TRUNCATED;
    payload_length = read16(ip + 4);
    memcpy(source->bytes, ip + 8, sizeof(source->bytes));
    memcpy(destination->bytes, ip + 24, sizeof(destination->bytes));
    /* Nothing, or a jumbogram (RFC 2675); and mapped addresses, which would pass for IPv4, are for use within hosts. */
    if (payload_length == 0 || address_is_ipv4(source) || address_is_ipv4(destination))
        return DROP_BAD_IP_HEADER;
    if (payload_length > c->left)
        return DROP_TRUNCATED;
    c->left = payload_length;
    return DROP_NONE;
}

static enum drop_reason parse_ipv6(const uint8_t *ip, size_t length, bool vouched, struct packet *out)
{
    struct cursor c = {ip, length};
    enum drop_reason reason = begin_ipv6(&c, &out->source, &out->destination);
    uint8_t next;

    if (reason != DROP_NONE)
        return reason;
    next = ip[6];
    reason = skip_extensions(&c, &next);
    if (reason != DROP_NONE)
        return reason;
    if (next == PROTOCOL_UDP) {
        reason = parse_udp(&c, ip + 8, 32, vouched, out);
        if (reason != DROP_NONE)
            return reason;
    } else if (next == PROTOCOL_ESP) {
        take_esp(&c, out);
    } else {
        return DROP_NOT_UDP;
    }
    out->protocol = next;
    out->ttl = ip[7];
    out->tos = (uint8_t)(ip[0] << 4 | ip[1] >> 4);
    return DROP_NONE;
}

enum drop_reason packet_parse(const uint8_t *data, size_t length, bool checksum_vouched, struct packet *out)
{
    if (length < IPV4_HEADER_MIN)
        return DROP_TRUNCATED;
    out->segment = 0;
    out->vlan = 0;
    if (data[0] >> 4 == 4)
        return parse_ipv4(data, length, checksum_vouched, out);
    if (data[0] >> 4 == 6)
        return parse_ipv6(data, length, checksum_vouched, out);
    return DROP_NOT_IP;
}

bool packet_parse_fragment(const uint8_t *data, size_t length, struct packet_fragment *out)
{
    struct cursor c = {data, length};
    const uint8_t *header;
    uint8_t next;

    if (length < IPV6_HEADER || data[0] >> 4 != 6 || begin_ipv6(&c, &out->source, &out->destination) != DROP_NONE)
        return false;
    next = data[6];
    if (skip_extensions(&c, &next) != DROP_FRAGMENT)
        return false;
    header = c.at - IPV6_FRAGMENT_HEADER;
    out->identification = copy32(header + 4);
    out->header = data;
    out->piece = c.at;
    out->length = c.left;
    out->offset = read16(header + 2) & IPV6_OFFSET_MASK;
    out->before = (size_t)(header - data) - IPV6_HEADER;
    out->next = next = header[0];
    out->more = read16(header + 2) & IPV6_MORE_FRAGMENTS;
    /* UDP's header has 8 bytes, and what is told apart of ESP as many. */
    out->headless = out->offset == 0 && (skip_extensions(&c, &next) != DROP_NONE || c.left < UDP_HEADER);
    return true;
}

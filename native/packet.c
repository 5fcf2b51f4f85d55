/* SPDX-License-Identifier: Apache-2.0 */
#include "packet.h"

#include <string.h>

enum {
    IPV4_HEADER_MIN = 20,
    IPV4_MORE_FRAGMENTS = 0x2000,
    IPV4_OFFSET_MASK = 0x1fff,
    PROTOCOL_UDP = 17,
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

/* The ones' complement sum of RFC 1071, over native-endian words: the sum is byte-order independent up to a swap, and
 * all we ask is whether it comes out as all ones. The caller folds. */
static uint64_t sum_words(const uint8_t *p, size_t n, uint64_t sum)
{
    for (; n >= 4; p += 4, n -= 4)
        sum += copy32(p);
    if (n >= 2) {
        uint16_t half;

        memcpy(&half, p, sizeof(half));
        sum += half;
        p += 2;
        n -= 2;
    }
    if (n) {
        uint8_t last[2] = {*p, 0};
        uint16_t half;

        memcpy(&half, last, sizeof(half));
        sum += half;
    }
    return sum;
}

static bool sum_is_valid(uint64_t sum)
{
    while (sum >> 16)
        sum = (sum & 0xffff) + (sum >> 16);
    return sum == 0xffff;
}

/* RFC 768: over the pseudo header (addresses, protocol, UDP length) and the datagram. */
static bool udp_checksum_is_valid(const uint8_t *addresses, const uint8_t *udp, size_t udp_length)
{
    uint8_t tail[4] = {0, PROTOCOL_UDP, (uint8_t)(udp_length >> 8), (uint8_t)udp_length};
    uint64_t sum = sum_words(addresses, 8, 0);

    sum = sum_words(tail, sizeof(tail), sum);
    return sum_is_valid(sum_words(udp, udp_length, sum));
}

enum drop_reason packet_parse(const uint8_t *data, size_t length, bool checksum_vouched, struct packet *out)
{
    struct cursor c = {data, length};
    const uint8_t *ip = take(&c, IPV4_HEADER_MIN);
    const uint8_t *udp;
    size_t header_length, total_length, udp_length;
    uint16_t fragment;

    if (!ip)
        return DROP_TRUNCATED;
    if (ip[0] >> 4 != 4)
        return DROP_NOT_IPV4;
    header_length = (size_t)(ip[0] & 0xf) * 4;
    total_length = read16(ip + 2);
    if (header_length < IPV4_HEADER_MIN || total_length < header_length)
        return DROP_BAD_IP_HEADER;
    if (total_length > length)
        return DROP_TRUNCATED;
    c.left = total_length - IPV4_HEADER_MIN;
    if (!take(&c, header_length - IPV4_HEADER_MIN))
        return DROP_TRUNCATED;
    if (!sum_is_valid(sum_words(ip, header_length, 0)))
        return DROP_BAD_IP_CHECKSUM;
    fragment = read16(ip + 6);
    if (fragment & (IPV4_MORE_FRAGMENTS | IPV4_OFFSET_MASK))
        return DROP_FRAGMENT;
    if (ip[9] != PROTOCOL_UDP)
        return DROP_NOT_UDP;
    udp = take(&c, UDP_HEADER);
    if (!udp)
        return DROP_TRUNCATED;
    udp_length = read16(udp + 4);
    if (udp_length < UDP_HEADER || udp_length - UDP_HEADER > c.left)
        return DROP_BAD_UDP_LENGTH;
    /* A checksum of zero means that the sender computed none. */
    if (!checksum_vouched && read16(udp + 6) != 0 && !udp_checksum_is_valid(ip + 12, udp, udp_length))
        return DROP_BAD_UDP_CHECKSUM;

    out->source = address_from_ipv4(copy32(ip + 12));
    out->destination = address_from_ipv4(copy32(ip + 16));
    out->source_port = read16(udp);
    out->destination_port = read16(udp + 2);
    out->ttl = ip[8];
    out->payload = c.at;
    out->payload_length = udp_length - UDP_HEADER;
    out->segment = 0;
    return DROP_NONE;
}

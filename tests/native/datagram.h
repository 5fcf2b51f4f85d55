/* SPDX-License-Identifier: Apache-2.0 */
/*
 * datagram.h: write UDP packets of IPv4 and IPv6, the good ones and, by editing and sealing them again, the bad ones.
 *
 * Checksums are computed byte by byte in network order, on purpose unlike native/packet.c, so that the two do not share
 * a mistake.
 */
#ifndef MCRELAY_TESTS_DATAGRAM_H
#define MCRELAY_TESTS_DATAGRAM_H

#include "check.h"

enum {
    DATAGRAM_IP_HEADER = 20,
    DATAGRAM_UDP_HEADER = 8,
    DATAGRAM_OPTIONS_MAX = 10, /* 32-bit words */
    DATAGRAM_HEADERS_MAX = DATAGRAM_IP_HEADER + 4 * DATAGRAM_OPTIONS_MAX + DATAGRAM_UDP_HEADER,
};

/* Numbers in host byte order. */
struct datagram {
    uint32_t source;
    uint32_t destination;
    uint16_t source_port;
    uint16_t destination_port;
    uint8_t ttl;
    unsigned options; /* 32-bit words of no-operation options */
    const uint8_t *payload;
    size_t payload_length;
};

static inline void write16(uint8_t *at, unsigned value)
{
    at[0] = (uint8_t)(value >> 8);
    at[1] = (uint8_t)value;
}

static inline void write32(uint8_t *at, uint32_t value)
{
    write16(at, value >> 16);
    write16(at + 2, value & 0xffff);
}

static inline unsigned checksum_add(unsigned sum, const uint8_t *bytes, size_t length)
{
    for (size_t i = 0; i < length; i++) {
        sum += i % 2 ? bytes[i] : (unsigned)bytes[i] << 8;
        sum = (sum & 0xffff) + (sum >> 16);
    }
    return sum;
}

/* Make the IP header checksum right for what the header says now. */
static inline void seal_ip(uint8_t *ip)
{
    size_t header_length = (size_t)(ip[0] & 0xf) * 4;

    write16(ip + 10, 0);
    write16(ip + 10, ~checksum_add(0, ip, header_length) & 0xffff);
}

/* Make the UDP checksum right for what the UDP header says now; its length has to lie within the packet. */
static inline void seal_udp(uint8_t *ip)
{
    uint8_t *udp = ip + (size_t)(ip[0] & 0xf) * 4;
    size_t udp_length = (size_t)udp[4] << 8 | udp[5];
    uint8_t pseudo[12];
    unsigned sum;

    memcpy(pseudo, ip + 12, 8);
    pseudo[8] = 0;
    pseudo[9] = 17;
    memcpy(pseudo + 10, udp + 4, 2);
    write16(udp + 6, 0);
    sum = ~checksum_add(checksum_add(0, pseudo, sizeof(pseudo)), udp, udp_length) & 0xffff;
    write16(udp + 6, sum ? sum : 0xffff); /* RFC 768: zero means none, so zero is sent as its other form */
}

/* The same over IPv6, with the UDP header at `at`. */
static inline void seal_udp6(uint8_t *ip, size_t at)
{
    uint8_t *udp = ip + at;
    size_t udp_length = (size_t)udp[4] << 8 | udp[5];
    uint8_t pseudo[40] = {0};
    unsigned sum;

    memcpy(pseudo, ip + 8, 32);
    memcpy(pseudo + 34, udp + 4, 2);
    pseudo[39] = 17;
    write16(udp + 6, 0);
    sum = ~checksum_add(checksum_add(0, pseudo, sizeof(pseudo)), udp, udp_length) & 0xffff;
    write16(udp + 6, sum ? sum : 0xffff);
}

/* Of IPv6; the extension headers, which begin with the kind of what follows each, are the caller's. */
struct datagram6 {
    uint8_t source[16], destination[16];
    uint16_t source_port, destination_port;
    uint8_t hops, class;
    uint8_t next; /* of IPv6's own header */
    const uint8_t *extensions;
    size_t extensions_length;
    const uint8_t *payload;
    size_t payload_length;
};

enum { DATAGRAM6_IP_HEADER = 40 };

/* Write it, as UDP whatever the headers say; returns its length. */
static inline size_t datagram6_write(uint8_t *out, const struct datagram6 *datagram)
{
    size_t at = DATAGRAM6_IP_HEADER + datagram->extensions_length;
    uint8_t *udp = out + at;

    memset(out, 0, at + DATAGRAM_UDP_HEADER);
    out[0] = (uint8_t)(0x60 | datagram->class >> 4);
    out[1] = (uint8_t)(datagram->class << 4);
    write16(out + 4, (unsigned)(at - DATAGRAM6_IP_HEADER + DATAGRAM_UDP_HEADER + datagram->payload_length));
    out[6] = datagram->next;
    out[7] = datagram->hops;
    memcpy(out + 8, datagram->source, 16);
    memcpy(out + 24, datagram->destination, 16);
    if (datagram->extensions_length)
        memcpy(out + DATAGRAM6_IP_HEADER, datagram->extensions, datagram->extensions_length);
    write16(udp, datagram->source_port);
    write16(udp + 2, datagram->destination_port);
    write16(udp + 4, (unsigned)(DATAGRAM_UDP_HEADER + datagram->payload_length));
    if (datagram->payload_length)
        memcpy(udp + DATAGRAM_UDP_HEADER, datagram->payload, datagram->payload_length);
    seal_udp6(out, at);
    return at + DATAGRAM_UDP_HEADER + datagram->payload_length;
}

/* Write a packet without fault into `out` (DATAGRAM_HEADERS_MAX and the payload fit); returns its length. */
static inline size_t datagram_write(uint8_t *out, const struct datagram *datagram)
{
    size_t header_length = DATAGRAM_IP_HEADER + 4 * (size_t)datagram->options;
    size_t length = header_length + DATAGRAM_UDP_HEADER + datagram->payload_length;
    uint8_t *udp = out + header_length;

    memset(out, 0, header_length + DATAGRAM_UDP_HEADER);
    out[0] = (uint8_t)(0x40 | header_length / 4);
    write16(out + 2, (unsigned)length);
    out[8] = datagram->ttl;
    out[9] = 17;
    write32(out + 12, datagram->source);
    write32(out + 16, datagram->destination);
    memset(out + DATAGRAM_IP_HEADER, 1, 4 * (size_t)datagram->options);
    write16(udp, datagram->source_port);
    write16(udp + 2, datagram->destination_port);
    write16(udp + 4, (unsigned)(DATAGRAM_UDP_HEADER + datagram->payload_length));
    if (datagram->payload_length)
        memcpy(udp + DATAGRAM_UDP_HEADER, datagram->payload, datagram->payload_length);
    seal_udp(out);
    seal_ip(out);
    return length;
}

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * payload.h: what a test datagram looks like, to the one that builds it and the one that takes it apart.
 *
 *     0       4       8               16              24                      size
 *     +-------+-------+---------------+---------------+-----------------------+
 *     | magic | flow  | sequence      | sent_ns       | padding               |
 *     +-------+-------+---------------+---------------+-----------------------+
 *
 * All numbers are big-endian. Sequences count from 0 in each flow; sent_ns is CLOCK_REALTIME, in nanoseconds, of the
 * moment before the send call. An RTP header of 12 bytes may stand in front.
 *
 * The padding is a window into one fixed pattern, shifted by (flow + sequence + sent_ns) % 61, so that a sender points
 * into the pattern instead of copying it, and a receiver compares in place. A flipped bit in one of the three numbers
 * changes their sum by a power of two, which 61, an odd prime, never divides: the shift changes and the damage is seen.
 * A datagram without padding shows no damage but that of its magic.
 *
 * Pure: no header of the system.
 */
#ifndef MCRELAY_PAYLOAD_H
#define MCRELAY_PAYLOAD_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum {
    PAYLOAD_MAGIC = 0x6d637231, /* "mcr1" */
    PAYLOAD_HEADER = 24,
    PAYLOAD_SHIFTS = 61,
    RTP_HEADER = 12,      /* RFC 3550, section 5.1, without sources or extension */
    DATAGRAM_MAX = 65507, /* 65535 less the IPv4 and UDP headers; what also fits IPv6 */
    PATTERN_SIZE = DATAGRAM_MAX + PAYLOAD_SHIFTS,
};

/* Byte i of the pattern is the top byte of x(i + 1), where x(0) is the magic and x(i + 1) = x(i) * 1664525 + 1013904223
 * modulo 2^32 (Numerical Recipes, "An Even Quicker Generator"). */
static inline void pattern_fill(uint8_t pattern[PATTERN_SIZE])
{
    uint32_t state = PAYLOAD_MAGIC;

    for (size_t i = 0; i < PATTERN_SIZE; i++) {
        state = state * 1664525u + 1013904223u;
        pattern[i] = (uint8_t)(state >> 24);
    }
}

static inline uint32_t payload_shift(uint32_t flow, uint64_t sequence, uint64_t sent_ns)
{
    return (uint32_t)((flow % PAYLOAD_SHIFTS + sequence % PAYLOAD_SHIFTS + sent_ns % PAYLOAD_SHIFTS) % PAYLOAD_SHIFTS);
}

/* The RTP clock of 90 kHz that video and MPEG-TS use (RFC 3551), modulo 2^32. */
static inline uint32_t rtp_ticks(uint64_t ns)
{
    return (uint32_t)(ns / 100000 * 9 + ns % 100000 * 9 / 100000);
}

static inline uint16_t load16(const uint8_t *from)
{
    return (uint16_t)(from[0] << 8 | from[1]);
}

static inline uint32_t load32(const uint8_t *from)
{
    uint32_t value;

    memcpy(&value, from, sizeof(value));
    return __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ ? __builtin_bswap32(value) : value;
}

static inline uint64_t load64(const uint8_t *from)
{
    return (uint64_t)load32(from) << 32 | load32(from + 4);
}

static inline void store16(uint8_t *to, uint16_t value)
{
    to[0] = (uint8_t)(value >> 8);
    to[1] = (uint8_t)value;
}

static inline void store32(uint8_t *to, uint32_t value)
{
    if (__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__)
        value = __builtin_bswap32(value);
    memcpy(to, &value, sizeof(value));
}

static inline void store64(uint8_t *to, uint64_t value)
{
    store32(to, (uint32_t)(value >> 32));
    store32(to + 4, (uint32_t)value);
}

static inline void payload_write_header(uint8_t *to, uint32_t flow, uint64_t sequence, uint64_t sent_ns)
{
    store32(to, PAYLOAD_MAGIC);
    store32(to + 4, flow);
    store64(to + 8, sequence);
    store64(to + 16, sent_ns);
}

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * checksum.h: the Internet checksum of RFC 1071, to be verified (packet.c) and to be written (headers.c).
 *
 * Sums are over words of the machine's byte order: a sum is the same in either order but for a swap of its bytes, which
 * a store in the machine's order undoes. 64 bits take 16 GiB of data before they overflow. Pure.
 */
#ifndef MCRELAY_CHECKSUM_H
#define MCRELAY_CHECKSUM_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* Add `n` bytes to a sum. What is added behind an odd number of bytes is wrong. */
static inline uint64_t checksum_sum(const uint8_t *p, size_t n, uint64_t sum)
{
    uint32_t word;
    uint16_t half;

    for (; n >= sizeof(word); p += sizeof(word), n -= sizeof(word)) {
        memcpy(&word, p, sizeof(word));
        sum += word;
    }
    if (n >= sizeof(half)) {
        memcpy(&half, p, sizeof(half));
        sum += half;
        p += sizeof(half);
        n -= sizeof(half);
    }
    if (n) {
        uint8_t last[2] = {*p, 0};

        memcpy(&half, last, sizeof(half));
        sum += half;
    }
    return sum;
}

/* The sum in 16 bits, not yet complemented. A sum of what carries its own checksum is 0xffff. */
static inline uint16_t checksum_fold(uint64_t sum)
{
    while (sum >> 16)
        sum = (sum & 0xffff) + (sum >> 16);
    return (uint16_t)sum;
}

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * limit.h: how much an output may send: a token bucket, kept as the time at which it will be full again.
 *
 * A bucket that fills with `rate` tokens a second and holds a burst is full after burst / rate seconds. So all that has
 * to be known of it is when it will be full; what is taken moves that time into the future, and may not move it farther
 * than the burst lasts. A bucket that was not used since is full.
 *
 * Outputs come and go, and a bucket stays where it is (by the output's counter). That time says nothing of what another
 * rate or another rule took, so the bucket knows whose it is: for anybody else, and for the same output with another
 * rate, it is full.
 *
 * Pure: the caller reads the clock.
 */
#ifndef MCRELAY_LIMIT_H
#define MCRELAY_LIMIT_H

#include "table.h"

enum {
    LIMIT_BURST_PER_S = 100,                 /* 10 ms of the rate */
    LIMIT_BURST_PACKETS = 16,                /* at least */
    LIMIT_BURST_BITS = 16 * 1500 * 8,        /* likewise */
    LIMIT_TICKS_PER_NS = 64,                 /* so that a bit of a fast rate is not nothing */
};

/* Of one output. All 0: nobody's yet. */
struct limit {
    uint64_t full_at; /* in ticks of the caller's clock */
    uint64_t rule;    /* id of the rule that it is of, and the rate that it was charged at */
    uint64_t rate;
    uint8_t rate_unit;
};

/* What an output's limit counts: `datagrams` of `bytes` of payload in all, each with `headers`. */
uint64_t limit_cost(const struct table_output *output, uint32_t datagrams, size_t bytes, size_t headers);

/* Whether so much may be sent at `now_ns` by an output of this rule. What exceeds the burst may if the bucket is full. */
bool limit_admits(const struct limit *limit, const struct table_output *output, uint64_t rule, uint64_t cost,
                  uint64_t now_ns);

/* It was sent. */
void limit_charge(struct limit *limit, const struct table_output *output, uint64_t rule, uint64_t cost,
                  uint64_t now_ns);

#endif

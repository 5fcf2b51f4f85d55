/* SPDX-License-Identifier: Apache-2.0 */
/*
 * pace.h: how long the engine waits before it looks for packets again.
 *
 * To be woken for each packet costs more than the packet. So at high rates the engine does not ask to be woken, but
 * looks again when some packets have come together; no packet waits longer for that than the latency budget. Where fewer
 * than PACE_COMPANY_MIN would come within the budget, nothing is gained, and it is woken by the first one.
 *
 * Pure: the caller reads the clock.
 */
#ifndef MCRELAY_PACE_H
#define MCRELAY_PACE_H

#include <stdint.h>

enum {
    PACE_COMPANY_MIN = 4,       /* packets: below that, a wake-up for each costs less than the delay is worth */
    PACE_WINDOW_NS = 200000,    /* over which the rate is measured: 4 budgets of the default */
    PACE_BUDGET_US_MAX = 10000, /* beyond that a ring of the default size overflows at 1 million packets/s */
};

struct pace {
    uint64_t budget_ns; /* 0: nothing ever waits */
    uint64_t window_began_ns;
    uint64_t window_packets;
    uint64_t expected; /* packets within the budget, at the rate of the last window */
};

/* A turn at time `now_ns` (of any clock that does not go back) took `packets`. Returns how many nanoseconds to wait before
 * the next turn, or 0 to be woken by the next packet. */
uint64_t pace_next(struct pace *pace, uint64_t now_ns, uint64_t packets);

#endif

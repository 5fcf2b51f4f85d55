/* SPDX-License-Identifier: Apache-2.0 */
#include "limit.h"

enum { NS_PER_S = 1000000000 };

/* What the bits of 128 datagrams of 64 KiB each become, at 1 bit/s, has room for 9 years of a clock beside it. */
static_assert((uint64_t)PACKET_DATAGRAMS_MAX * 65536 * 8 < UINT64_MAX / NS_PER_S / LIMIT_TICKS_PER_NS / 4, "fits");

/* How long the rate takes for so many. */
static uint64_t ticks(const struct table_output *output, uint64_t tokens)
{
    return tokens * NS_PER_S * LIMIT_TICKS_PER_NS / output->rate;
}

static uint64_t burst_ticks(const struct table_output *output)
{
    const uint64_t least = ticks(output, output->rate_unit == RATE_BITS ? LIMIT_BURST_BITS : LIMIT_BURST_PACKETS);
    const uint64_t usual = (uint64_t)NS_PER_S * LIMIT_TICKS_PER_NS / LIMIT_BURST_PER_S;

    return least > usual ? least : usual;
}

uint64_t limit_cost(const struct table_output *output, uint32_t datagrams, size_t bytes, size_t headers)
{
    return output->rate_unit == RATE_BITS ? 8 * (bytes + datagrams * headers) : datagrams;
}

/* How long it takes until the bucket is full. */
static uint64_t ticks_to_full(const struct limit *limit, const struct table_output *output, uint64_t rule, uint64_t now)
{
    if (limit->rule != rule || limit->rate != output->rate || limit->rate_unit != output->rate_unit)
        return 0; /* what was taken, another took */
    return limit->full_at > now ? limit->full_at - now : 0;
}

bool limit_admits(const struct limit *limit, const struct table_output *output, uint64_t rule, uint64_t cost,
                  uint64_t now_ns)
{
    const uint64_t left = ticks_to_full(limit, output, rule, now_ns * LIMIT_TICKS_PER_NS);

    return !left || left + ticks(output, cost) <= burst_ticks(output);
}

void limit_charge(struct limit *limit, const struct table_output *output, uint64_t rule, uint64_t cost, uint64_t now_ns)
{
    const uint64_t now = now_ns * LIMIT_TICKS_PER_NS;

    *limit = (struct limit){
        .full_at = now + ticks_to_full(limit, output, rule, now) + ticks(output, cost),
        .rule = rule,
        .rate = output->rate,
        .rate_unit = output->rate_unit,
    };
}

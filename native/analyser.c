/* SPDX-License-Identifier: Apache-2.0 */
#include "analyser.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>

static_assert((FLOW_SLOTS & (FLOW_SLOTS - 1)) == 0, "slots are found by a mask");
static_assert(FLOWS_MAX + FLOWS_SPARE < FLOW_SLOTS / 3 + 1, "the hash table stays sparse");
static_assert(FLOWS_MAX + FLOWS_SPARE < UINT16_MAX, "a slot holds an index plus one");
static_assert((uint64_t)FLOWS_MAX * WINDOW_BITS_MIN <= WINDOW_BITS_MAX, "all windows fit the budget");

/* What a datagram says of itself, whether in our header or in RTP's. */
struct statement {
    uint32_t flow;
    uint64_t sequence; /* of RTP the 16 bits on the wire, extended by extend() */
    uint64_t sent_ns;  /* only of ours */
    uint32_t rtp_timestamp;
    bool ours;
};

enum verdict { INTACT, CORRUPTED, FOREIGN };

int analyser_open(struct analyser **out, uint32_t flows, bool rtp)
{
    struct analyser *analyser;
    uint64_t bits = WINDOW_BITS_MAX;
    uint64_t *window;

    if (flows < 1 || flows > FLOWS_MAX)
        return -EINVAL;
    while (bits * flows > WINDOW_BITS_MAX)
        bits /= 2;
    analyser = calloc(1, sizeof(*analyser));
    if (!analyser)
        return -ENOMEM;
    analyser->rtp = rtp;
    analyser->flows_large = flows;
    analyser->flows_max = flows + FLOWS_SPARE;
    analyser->flows = calloc(analyser->flows_max, sizeof(*analyser->flows));
    analyser->windows = calloc(1, (bits * flows + (uint64_t)WINDOW_SPARE * FLOWS_SPARE) / 8);
    if (!analyser->flows || !analyser->windows) {
        analyser_close(analyser);
        return -ENOMEM;
    }
    window = analyser->windows;
    for (uint32_t i = 0; i < analyser->flows_max; i++) {
        uint64_t size = i < flows ? bits : WINDOW_SPARE;

        analyser->flows[i].window = window;
        analyser->flows[i].mask = size - 1;
        window += size / 64;
    }
    pattern_fill(analyser->pattern);
    *out = analyser;
    return 0;
}

void analyser_close(struct analyser *analyser)
{
    free(analyser->windows);
    free(analyser->flows);
    free(analyser);
}

/* The slot of a flow, or the free one where it would be. */
static uint16_t *find_slot(struct analyser *analyser, uint32_t id)
{
    uint32_t slot = (id * 2654435769u) >> 17; /* Knuth's multiplicative hash, to 15 bits */

    static_assert(FLOW_SLOTS == 1 << 15, "as many bits as the hash has");
    while (analyser->slots[slot] && analyser->flows[analyser->slots[slot] - 1].id != id)
        slot = (slot + 1) & (FLOW_SLOTS - 1);
    return &analyser->slots[slot];
}

static enum verdict read_ours(const struct analyser *analyser, const uint8_t *payload, size_t length,
                              struct statement *said)
{
    uint32_t shift;

    if (length < PAYLOAD_HEADER || load32(payload) != PAYLOAD_MAGIC)
        return FOREIGN;
    said->flow = load32(payload + 4);
    said->sequence = load64(payload + 8);
    said->sent_ns = load64(payload + 16);
    said->ours = true;
    if (length > DATAGRAM_MAX)
        return CORRUPTED;
    shift = payload_shift(said->flow, said->sequence, said->sent_ns);
    if (memcmp(payload + PAYLOAD_HEADER, analyser->pattern + shift, length - PAYLOAD_HEADER) != 0)
        return CORRUPTED;
    return INTACT;
}

static enum verdict read_rtp(const struct analyser *analyser, const uint8_t *datagram, size_t length,
                             struct statement *said)
{
    size_t header = RTP_HEADER;
    uint32_t ssrc;
    uint16_t sequence;
    enum verdict verdict;

    if (length < RTP_HEADER || datagram[0] >> 6 != 2)
        return FOREIGN;
    if ((datagram[1] & 0x7f) >= 64 && (datagram[1] & 0x7f) < 96) /* RTCP on the same port (RFC 5761, section 4) */
        return FOREIGN;
    header += (datagram[0] & 0x0f) * 4u; /* contributing sources */
    if (datagram[0] & 0x10) { /* an extension, its length in words */
        if (length < header + 4)
            return FOREIGN;
        header += 4 + load16(datagram + header + 2) * 4u;
    }
    if (length < header)
        return FOREIGN;
    sequence = load16(datagram + 2);
    ssrc = load32(datagram + 8);
    verdict = read_ours(analyser, datagram + header, length - header, said);
    said->ours = verdict != FOREIGN;
    if (verdict == CORRUPTED || (said->ours && (said->flow != ssrc || (uint16_t)said->sequence != sequence)))
        return CORRUPTED;
    said->flow = ssrc;
    said->sequence = sequence;
    said->rtp_timestamp = load32(datagram + 4);
    return INTACT;
}

/* The 16-bit sequence as the one next to the highest so far. A cycle is put below the first, for those that overtook. */
static uint64_t extend(const struct flow *flow, uint16_t sequence)
{
    uint64_t highest = flow->next - 1;

    if (!flow->received)
        return 0x10000 + sequence;
    return highest + (uint64_t)(int64_t)(int16_t)(sequence - (uint16_t)highest);
}

static void clear_window(struct flow *flow, uint64_t from, uint64_t to)
{
    if (to - from > flow->mask) {
        memset(flow->window, 0, (flow->mask + 1) / 8);
        return;
    }
    for (; from < to && from & 63; from++)
        flow->window[(from & flow->mask) >> 6] &= ~(UINT64_C(1) << (from & 63));
    for (; from + 64 <= to; from += 64)
        flow->window[(from & flow->mask) >> 6] = 0;
    for (; from < to; from++)
        flow->window[(from & flow->mask) >> 6] &= ~(UINT64_C(1) << (from & 63));
}

static uint32_t bucket_of(uint64_t latency_ns)
{
    uint32_t exponent;

    if (latency_ns < LATENCY_STEPS)
        return (uint32_t)latency_ns;
    exponent = 63 - (uint32_t)__builtin_clzll(latency_ns) - 7; /* 7 bits below the leading one choose the step */
    return (exponent + 1) * LATENCY_STEPS + (uint32_t)((latency_ns >> exponent) & (LATENCY_STEPS - 1));
}

static uint64_t middle_of(uint32_t bucket)
{
    uint32_t exponent;

    if (bucket < LATENCY_STEPS)
        return bucket;
    exponent = bucket / LATENCY_STEPS - 1;
    return ((uint64_t)(LATENCY_STEPS + bucket % LATENCY_STEPS) << exponent) + (UINT64_C(1) << exponent) / 2;
}

static_assert(LATENCY_STEPS == 1 << 7, "the seven of bucket_of");

static void note_latency(struct analyser *analyser, uint64_t sent_ns, uint64_t arrived_ns)
{
    uint64_t latency_ns = arrived_ns - sent_ns;

    if (arrived_ns < sent_ns || latency_ns >> LATENCY_BITS) {
        analyser->totals.clock_skew++;
        return;
    }
    analyser->histogram[bucket_of(latency_ns)]++;
    analyser->totals.latencies++;
    if (latency_ns > analyser->totals.latency_max_ns)
        analyser->totals.latency_max_ns = latency_ns;
}

static void note_jitter(struct flow *flow, const struct statement *said, uint64_t arrived_ns)
{
    int64_t transit, change;

    if (said->ours)
        transit = (int64_t)(arrived_ns - said->sent_ns);
    else
        transit = (int64_t)(rtp_ticks(arrived_ns) - said->rtp_timestamp);
    if (flow->received > 1) {
        if (said->ours) {
            uint64_t difference = (uint64_t)transit - (uint64_t)flow->transit;

            change = (int64_t)difference;
        } else {
            change = (int64_t)(int32_t)((uint32_t)transit - (uint32_t)flow->transit) * 100000 / 9;
        }
        /* Bounded, so that a clock that was set does not outweigh all that follows. */
        if (change < 0)
            change = change == INT64_MIN ? INT64_MAX : -change;
        if (change >> LATENCY_BITS == 0)
            flow->jitter_x16 += (uint64_t)change - ((flow->jitter_x16 + 8) >> 4);
    }
    flow->transit = transit;
}

void analyser_account(struct analyser *analyser, const uint8_t *datagram, size_t length, uint64_t arrived_ns)
{
    struct analyser_totals *totals = &analyser->totals;
    struct statement said = {0};
    uint64_t sequence, bit, *word;
    struct flow *flow;
    uint16_t *slot;
    enum verdict verdict;

    verdict = analyser->rtp ? read_rtp(analyser, datagram, length, &said)
                            : read_ours(analyser, datagram, length, &said);
    if (verdict == FOREIGN) {
        totals->foreign++;
        return;
    }
    if (!totals->first_ns)
        totals->first_ns = arrived_ns;
    if (arrived_ns > totals->last_ns)
        totals->last_ns = arrived_ns;
    if (verdict == CORRUPTED) {
        totals->corrupted++;
        return;
    }

    slot = find_slot(analyser, said.flow);
    if (!*slot) {
        if (totals->flows == analyser->flows_max) {
            totals->foreign++;
            return;
        }
        flow = &analyser->flows[totals->flows++];
        flow->id = said.flow;
        *slot = (uint16_t)totals->flows;
    } else {
        flow = &analyser->flows[*slot - 1];
    }

    sequence = analyser->rtp ? extend(flow, (uint16_t)said.sequence) : said.sequence;
    if (sequence >> 62) { /* no flow lives that long, and sums below do not overflow */
        totals->corrupted++;
        return;
    }
    if (!flow->received) {
        flow->lowest = sequence;
        flow->next = sequence;
    }
    word = &flow->window[(sequence & flow->mask) >> 6];
    bit = UINT64_C(1) << (sequence & 63);
    if (sequence >= flow->next) {
        uint64_t from = flow->next, used = flow->lowest + flow->mask + 1;

        if (sequence - flow->next >= LEAP_MAX) {
            totals->corrupted++;
            return;
        }
        /* The bits of sequences that are passed over may be those of a window ago. */
        if (sequence > from && sequence > used)
            clear_window(flow, from > used ? from : used, sequence);
        totals->expected += sequence + 1 - flow->next;
        flow->next = sequence + 1;
    } else if (sequence + flow->mask + 1 < flow->next) {
        totals->late++;
        return;
    } else if (*word & bit) {
        totals->duplicated++;
        return;
    } else {
        totals->reordered++;
        if (sequence < flow->lowest) {
            totals->expected += flow->lowest - sequence;
            flow->lowest = sequence;
        }
    }
    *word |= bit;
    flow->received++;
    totals->received++;
    totals->bytes += length;
    if (said.ours)
        note_latency(analyser, said.sent_ns, arrived_ns);
    note_jitter(flow, &said, arrived_ns);
}

uint64_t analyser_latency_ns(const struct analyser *analyser, double fraction)
{
    uint64_t total = analyser->totals.latencies, rank, seen = 0;

    if (!total)
        return 0;
    rank = (uint64_t)(fraction * (double)total + 0.5);
    rank = rank < 1 ? 1 : rank > total ? total : rank;
    for (uint32_t bucket = 0; bucket < LATENCY_BUCKETS; bucket++) {
        seen += analyser->histogram[bucket];
        if (seen >= rank) {
            uint64_t middle = middle_of(bucket);

            return middle < analyser->totals.latency_max_ns ? middle : analyser->totals.latency_max_ns;
        }
    }
    abort(); /* every latency is in a bucket */
}

double analyser_jitter_ns(const struct analyser *analyser)
{
    double sum = 0;
    uint32_t flows = 0;

    for (uint32_t i = 0; i < analyser->totals.flows; i++) {
        if (analyser->flows[i].received < 2)
            continue;
        sum += (double)analyser->flows[i].jitter_x16 / 16;
        flows++;
    }
    return flows ? sum / flows : -1;
}

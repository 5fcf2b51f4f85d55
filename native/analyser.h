/* SPDX-License-Identifier: Apache-2.0 */
/*
 * analyser.h: the account of test datagrams, or of any RTP stream: bytes and arrival times in, counters out.
 *
 * It knows no socket and no clock, and allocates only when it is opened. Of each flow it keeps one bit per sequence in a
 * sliding window, which makes duplicates and reordering exact as far back as the window reaches; what is older is
 * counted as late, since nobody can tell any more whether it came before. Latencies go into a log-linear histogram.
 *
 * The first `flows` flows to come get a window each of WINDOW_BITS_MAX / flows sequences (a power of two, 2^16 at
 * least); up to FLOWS_SPARE more, such as those of other senders to the same group, get WINDOW_SPARE. Memory is touched
 * as far as sequences come, so that the size of a window costs nothing by itself.
 */
#ifndef MCRELAY_ANALYSER_H
#define MCRELAY_ANALYSER_H

#include "payload.h"

#include <stdbool.h>

enum {
    FLOWS_MAX = 10000,           /* expected at one receiver: a socket for each is within common limits */
    FLOWS_SPARE = 64,            /* flows that nobody announced */
    FLOW_SLOTS = 32768,          /* of the hash table: at most a third full; a power of two */
    WINDOW_BITS_MAX = 1 << 30,   /* all announced flows together, 128 MiB; 18 minutes of 1,000,000 datagrams/s */
    WINDOW_BITS_MIN = 1 << 16,   /* of one of 10,000 flows */
    WINDOW_SPARE = 1 << 20,
    LEAP_MAX = 1 << 30,          /* no outage is this long: such a sequence is damage that escaped the padding check */
    LATENCY_BITS = 36,           /* of nanoseconds: 69 s; what is longer is a clock that is wrong */
    LATENCY_STEPS = 128,         /* buckets to each power of two: a bucket's middle is within 0.4 % */
    LATENCY_BUCKETS = (LATENCY_BITS - 6) * LATENCY_STEPS, /* values below 128 ns have a bucket each */
};

struct analyser_totals {
    uint64_t received;   /* distinct and intact; reordered ones among them, all that follow on top of it */
    uint64_t reordered;  /* came after one with a higher sequence (RFC 4737, section 3) */
    uint64_t duplicated; /* further intact copies */
    uint64_t late;       /* older than the window: a duplicate or not, nobody knows */
    uint64_t corrupted;  /* ours, but not as sent */
    uint64_t foreign;    /* not ours (or not RTP), or of more flows than there is room for */
    uint64_t clock_skew; /* received with an impossible latency: negative, or 69 s and more */
    uint64_t bytes;      /* payload of the received */
    uint64_t expected;   /* of each flow all from the lowest sequence that came to the highest; summed over flows */
    uint64_t first_ns;   /* arrival of the first and last datagram that was ours, 0 if none was */
    uint64_t last_ns;
    uint64_t latency_max_ns;
    uint64_t latencies; /* how many there are in the histogram */
    uint32_t flows;
};

struct flow {
    uint64_t *window;    /* bit (sequence % bits): this sequence has come, for sequences from next - bits to next - 1 */
    uint64_t lowest;     /* sequence that came */
    uint64_t next;       /* one more than the highest that came */
    uint64_t mask;       /* bits of the window less one */
    int64_t transit;     /* arrival less sending time of the latest, ns or RTP ticks */
    uint64_t jitter_x16; /* ns times 16 (RFC 3550, appendix A.8) */
    uint64_t received;
    uint32_t id;
};

struct analyser {
    struct analyser_totals totals;
    bool rtp;
    uint32_t flows_large; /* with a window of their share */
    uint32_t flows_max;
    struct flow *flows;
    uint64_t *windows;
    uint16_t slots[FLOW_SLOTS]; /* index into flows plus one; 0: free */
    uint64_t histogram[LATENCY_BUCKETS];
    uint8_t pattern[PATTERN_SIZE];
};

/* `flows`: announced, 1 to FLOWS_MAX. With `rtp` every RTP stream is a flow, by its SSRC and extended sequence.
 * 0, -EINVAL or -ENOMEM. */
int analyser_open(struct analyser **out, uint32_t flows, bool rtp);
void analyser_close(struct analyser *analyser);

/* Account for one datagram, which arrived at CLOCK_REALTIME `arrived_ns`. */
void analyser_account(struct analyser *analyser, const uint8_t *datagram, size_t length, uint64_t arrived_ns);

/* The latency in ns that `fraction` (0 to 1) of those in the histogram did not exceed, as the middle of its bucket;
 * 0 if there are none. */
uint64_t analyser_latency_ns(const struct analyser *analyser, double fraction);

/* Interarrival jitter in ns (RFC 3550, section 6.4.1), mean over flows of at least two datagrams; negative if there are
 * none. */
double analyser_jitter_ns(const struct analyser *analyser);

#endif

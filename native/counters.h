/* SPDX-License-Identifier: Apache-2.0 */
/*
 * counters.h: the shared page into which one data plane worker counts.
 *
 * The supervisor makes the page (a memfd), one worker writes it, anyone who was handed the descriptor reads it. The
 * layout is plain 64-bit words at fixed offsets, so that a reader in another language needs this file and nothing
 * else; src/mcrelay/counters.py states the same layout and a test compares the two. A page outlives the worker: its
 * successor goes on counting where the dead one stopped.
 *
 * Single writer per word, naturally aligned: a plain 64-bit store cannot tear on the platforms we build for, and
 * relaxed atomics say so to the compiler.
 *
 * What always holds when the worker is at rest; if it died, after the supervisor has counted what it had in hand:
 *     received  = forwarded + the sum of dropped[]            (packets)
 *     rule:   packets = forwarded + dropped                   (packets that matched it, less own and looped)
 *     output: rule's packets = its packets + the sum of its dropped[] + its interrupted   (copies)
 */
#ifndef MCRELAY_COUNTERS_H
#define MCRELAY_COUNTERS_H

#include <assert.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

/* A packet that came in fragments is received when it is complete, as one. Of IPv6, each fragment that did not become part
 * of a complete one is received and dropped when that is known; while it waits, it is counted nowhere. A worker that dies
 * takes such ones with it; what the kernel did not reassemble of IPv4 does not come here. */

/* Why a packet was not forwarded. A packet has exactly one reason; 0 means it has none. The order is part of the page's
 * layout: append, never reorder. A packet with several outputs is dropped only if no copy of it left, and then under the
 * first of the copies' reasons in this order. */
enum drop_reason {
    DROP_NONE = 0,
    DROP_TRUNCATED,          /* headers claim more bytes than the frame has */
    DROP_OVERSIZE,           /* reassembled beyond the interface's MTU, and not to be had whole */
    DROP_NOT_IP,             /* neither IPv4 nor IPv6 */
    DROP_BAD_IP_HEADER,      /* header length below 20 or beyond the total length */
    DROP_BAD_IP_CHECKSUM,
    DROP_FRAGMENT,           /* a fragment that no packet came of: others never came, came too late or contradict it */
    DROP_NOT_UDP,            /* nor ESP */
    DROP_BAD_UDP_LENGTH,     /* UDP length below 8 or beyond the IP payload */
    DROP_BAD_UDP_CHECKSUM,
    DROP_OTHER_HOST,         /* link-layer address of somebody else */
    DROP_VLAN_TAGGED,        /* tagged traffic never matches an untagged rule */
    DROP_NO_RULE,
    DROP_INGRESS_OVERRUN,    /* the kernel dropped it: the worker did not read fast enough */
    DROP_EGRESS_FULL,        /* the egress socket or queue had no room */
    DROP_EGRESS_UNREACHABLE, /* no route, no neighbour, interface down */
    DROP_EGRESS_REFUSED,     /* a packet filter forbids it */
    DROP_EGRESS_ERROR,       /* any other error of the send */
    DROP_MERGED,             /* several datagrams that a device merged into one frame, and not to be had whole */
    DROP_INTERRUPTED,        /* the worker died with it in hand; where it lay in a ring, its successor takes it up again */
    DROP_OWN,                /* matches a rule, but is our own traffic come back: its source is an address of this host */
    DROP_LOOP,               /* matches a rule that is suspended, since the same payload came round again and again */
    DROP_BAD_EXTENSION,      /* IPv6 extension headers that lie, are too many, or route elsewhere */
    DROP_EGRESS_LIMITED,     /* beyond the output's rate */
    DROP_PAUSED,             /* the output is paused */
    DROP_SPLIT_HORIZON,      /* the output would have sent it back where it came from */
    DROP_REASONS
};

enum {
    COUNTERS_VERSION = 3,
    COUNTERS_DROPS_MAX = 32,      /* room for later reasons without a new layout */
    COUNTERS_RULES_MAX = 16384,   /* 10,000 rules and room for those being replaced */
    COUNTERS_OUTPUTS_MAX = 65536, /* several outputs each; the file is sparse, unused ones cost nothing */
    COUNTERS_OUTPUT_DROPS = 7,    /* DROP_EGRESS_FULL to _ERROR and _LIMITED to DROP_SPLIT_HORIZON, in order */
    COUNTERS_INTERFACES_MAX = 64, /* as many as there are slots of interfaces */
    COUNTERS_INTERFACES_OFFSET = 2048,
    COUNTERS_RULES_OFFSET = 4096,
};

#define COUNTERS_MAGIC UINT64_C(0x6d6372656c617931) /* "mcrelay1" */

typedef _Atomic uint64_t counter;

struct counters_output {
    counter packets;
    counter bytes; /* payload bytes */
    counter dropped[COUNTERS_OUTPUT_DROPS];
    counter interrupted; /* DROP_INTERRUPTED */
    counter unused[6];
};

struct counters_rule {
    counter packets; /* that matched and were to be forwarded */
    counter bytes;   /* payload bytes of those */
    counter forwarded;
    counter dropped;
    /* What matched, but was not to be forwarded, is in none of the above. */
    counter own;                /* DROP_OWN */
    counter looped;             /* DROP_LOOP */
    counter suspensions;        /* times that the rule was suspended */
    counter suspended_until_ns; /* CLOCK_MONOTONIC, of the last time; 0: never, or the worker has died since */
};

/* Of one interface slot. What these count is counted in the totals, too. */
struct counters_interface {
    counter frames;           /* taken from its ingress */
    counter overruns;         /* DROP_INGRESS_OVERRUN */
    counter merged;           /* DROP_MERGED */
    counter segments_refused; /* not 0: datagrams leave it one by one */
};

struct counters_page {
    uint64_t magic;
    uint64_t version;
    counter frames_malformed; /* written by the worker's command side, not by the engine */
    uint64_t unused_header[5];

    counter received;       /* packets that reached the worker, including those the kernel dropped for it */
    counter received_bytes; /* payload bytes of those that were parsed */
    counter forwarded;      /* packets of which at least one copy left */
    counter copies;         /* datagrams sent */
    counter copies_bytes;   /* payload bytes sent */
    counter pool_exhausted; /* times that every receive slot was in use */
    counter pool_slots;     /* receive slots of all attached interfaces */
    counter pool_free;      /* of these, not in use */
    counter batches;        /* turns of the engine's loop in which packets were taken up */
    counter sends;          /* calls that sent those copies: several at once where they could be segments */
    counter segments_refused; /* runs that a device or path did not take as segments, and that left one by one */
    uint64_t unused_totals[5];
    counter dropped[COUNTERS_DROPS_MAX];

    uint8_t gap[COUNTERS_INTERFACES_OFFSET - 64 - 128 - 8 * COUNTERS_DROPS_MAX];
    struct counters_interface interfaces[COUNTERS_INTERFACES_MAX];
    struct counters_rule rules[COUNTERS_RULES_MAX];
    struct counters_output outputs[COUNTERS_OUTPUTS_MAX];
};

static_assert((int)DROP_REASONS <= (int)COUNTERS_DROPS_MAX, "a drop reason has no place in the page");
static_assert((int)(DROP_EGRESS_ERROR - DROP_EGRESS_FULL) + 1 + (int)(DROP_SPLIT_HORIZON - DROP_EGRESS_LIMITED) + 1 ==
                  (int)COUNTERS_OUTPUT_DROPS,
              "output drops are the reasons of outputs");
static_assert(offsetof(struct counters_page, received) == 64, "layout");
static_assert(offsetof(struct counters_page, dropped) == 192, "layout");
static_assert(offsetof(struct counters_page, interfaces) == COUNTERS_INTERFACES_OFFSET, "layout");
static_assert(offsetof(struct counters_page, rules) == COUNTERS_RULES_OFFSET, "layout");
static_assert(sizeof(struct counters_interface) == 32, "layout");
static_assert(sizeof(struct counters_rule) == 64, "layout");
static_assert(sizeof(struct counters_output) == 128, "layout");

/* Where an output counts a reason of its own: the index into its dropped[]. */
static inline unsigned counters_output_drop(enum drop_reason reason)
{
    return reason <= DROP_EGRESS_ERROR ? reason - DROP_EGRESS_FULL
                                       : reason - DROP_EGRESS_LIMITED + (DROP_EGRESS_ERROR - DROP_EGRESS_FULL) + 1u;
}

/* Single writer, so load and store instead of an atomic read-modify-write: no bus lock. */
static inline void count(counter *c, uint64_t n)
{
    atomic_store_explicit(c, atomic_load_explicit(c, memory_order_relaxed) + n, memory_order_relaxed);
}

static inline void count_set(counter *c, uint64_t value)
{
    atomic_store_explicit(c, value, memory_order_relaxed);
}

#endif

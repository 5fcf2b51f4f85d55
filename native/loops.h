/* SPDX-License-Identifier: Apache-2.0 */
/*
 * loops.h: which rules go round in circles by way of another relay, and for how long they are suspended for it.
 *
 * What another relay sends back to a rule's input comes from that relay's address, so it looks like anybody's traffic.
 * What gives it away is that a payload comes from its sender once and from the other relay ever after. So of each rule
 * one payload at a time is watched: how often it comes again from the same source (a repeat), and how often from the
 * first other source that it came from (a return). Many returns with few repeats are a loop. Not a loop are therefore
 * one sender's constant payload (no returns), redundant feeds of the same payloads (as many repeats as returns), and
 * many hosts with the same payload (each returns little).
 *
 * Sender and other relay are told apart by nothing but that, so the watch has to alternate between sources: one on a
 * payload as the other relay sent it never sees a return.
 *
 * A suspended rule forwards nothing, which ends the loop and lets what goes round in it drain away. If it begins again,
 * the next suspension is twice as long, 64 s at most; after the rule has been good for four times as long as it was
 * suspended for, it begins with 1 s again.
 *
 * A loop falls silent when its rule is suspended. If half a second later the payload still comes back from there, it was
 * none: the suspension ends, and that payload from that source is never held against the rule again.
 *
 * Pure: the caller reads the clock. What is judged costs a cache line and a few comparisons; payloads are compared by
 * length and both ends.
 */
#ifndef MCRELAY_LOOPS_H
#define MCRELAY_LOOPS_H

#include "packet.h"

#include <stdalign.h>

enum {
    LOOP_RETURNS_MIN = 32,        /* fewer may be chance, or somebody who says a thing a few times */
    LOOP_RETURNS_PER_REPEAT = 8,  /* that many returns for each time that the watched source sent the payload */
    LOOP_ALTERNATE_NS = 100000000, /* after which a packet of another source is watched instead */
    LOOP_WATCH_NS = 1000000000,   /* after which any other packet is */
    LOOP_RETURNING_NS = 2000000000, /* the same for a payload that comes back as from a loop, but not often enough yet */
    LOOP_SUSPENSION_S = 1,        /* the first; far longer than queues take to drain */
    LOOP_SUSPENSION_MAX_S = 64,
    LOOP_DRAIN_NS = 500000000,    /* into a suspension: what goes round has drained by then */
    LOOP_REST = 4,                /* suspensions' lengths without a loop, after which all is forgotten */
};

/* What is known of one rule. All zero: nothing. */
struct loop_watch {
    alignas(64) uint64_t rule; /* whose it is, so that a successor in its place starts anew */
    uint64_t suspended_until_ns;
    uint64_t armed_ns;
    uint64_t first, last; /* bytes of the payload, 8 of each end */
    uint32_t length;      /* of the payload */
    uint32_t source;      /* hash of its address */
    uint32_t returner;    /* likewise; if there were returns */
    uint32_t acquitted;   /* fingerprint of what is not held against the rule; 0: nothing */
    uint16_t repeats;     /* these two up to UINT16_MAX */
    uint16_t returns;
    uint8_t suspension_s; /* how long the last one was; 0: none to remember */
    bool is_armed;
};

static_assert(sizeof(struct loop_watch) == 64, "one cache line");

enum loop_verdict {
    LOOP_NONE,      /* forward the packet */
    LOOP_FOUND,     /* do not: the rule has just been suspended, until suspended_until_ns */
    LOOP_SUSPENDED, /* do not: it is suspended */
    LOOP_ACQUITTED, /* forward it: this was no loop, and the rule is suspended no longer */
};

/* One watch for each rule counter; NULL if there is no memory. */
struct loop_watch *loops_new(void);
void loops_free(struct loop_watch *watches);

/* Look at a packet that matched the rule with the id `rule`, at `now_ns` of any clock that does not go back. */
enum loop_verdict loops_judge(struct loop_watch *watch, uint64_t rule, const struct packet *packet, uint64_t now_ns);

#endif

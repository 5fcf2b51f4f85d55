/* SPDX-License-Identifier: Apache-2.0 */
/*
 * traffic.h: numbered datagrams under way through a rig, from ingress 0 to any of its receivers.
 *
 * A number's payload is its own in length and bytes. Each number has to arrive, intact, at all receivers of one of the
 * two sets `wanted` (bit r: receiver r) and nowhere else, once, and in order at each receiver. No more than RIG_WINDOW
 * are under way at a time.
 */
#ifndef MCRELAY_TESTS_TRAFFIC_H
#define MCRELAY_TESTS_TRAFFIC_H

#include "rig.h"

struct traffic {
    uint32_t count; /* how many to send */
    uint32_t sent;
    uint32_t done; /* arrived where wanted */
    uint32_t next[RIG_RECEIVERS];
    uint8_t wanted[2];
    uint8_t *seen; /* by number: where it arrived */
};

void traffic_open(struct traffic *traffic, uint32_t count, unsigned wanted, unsigned or_wanted);
/* Checks that all arrived, and nothing more. */
void traffic_close(struct rig *rig, struct traffic *traffic);
/* Take what arrived; true if something did. */
bool traffic_take(struct rig *rig, struct traffic *traffic);
/* Send what there is room for and take what arrived; true if anything happened. */
bool traffic_step(struct rig *rig, struct traffic *traffic);
/* Go on until so many arrived. */
void traffic_run(struct rig *rig, struct traffic *traffic, uint32_t done);
/* Wait until a step may do something, or an answer came. */
void traffic_wait(struct rig *rig, const struct traffic *traffic);

#endif

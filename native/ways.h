/* SPDX-License-Identifier: Apache-2.0 */
/*
 * ways.h: the kinds of socket by which a copy can leave an interface. src/mcrelay/ways.py says what each is, and states
 * the same numbers and the same layout; a test compares the two. Pure.
 */
#ifndef MCRELAY_WAYS_H
#define MCRELAY_WAYS_H

#include "packet.h"

enum way { WAY_UDP4, WAY_UDP6, WAY_LOOP4, WAY_LOOP6, WAY_FRAME, WAY_RAW4, WAY_RAW6, WAYS };

/* What we write into headers for an interface: its addresses, all 0 where it has none. */
struct egress_link {
    union address source4;      /* IPv4, mapped */
    union address source6_link; /* of link-local scope */
    union address source6;      /* of a wider scope */
    uint8_t mac[6];
    uint8_t header; /* bytes of the link-layer header: 14, Ethernet's, or 0 */
    uint8_t reserved;
};

enum { ETHERNET_HEADER = 14 };

static_assert(sizeof(struct egress_link) == 56, "layout shared with ways.py");

/* We write the IP header. */
static inline bool way_writes_headers(enum way way)
{
    return way >= WAY_FRAME;
}

#endif

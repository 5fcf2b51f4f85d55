/* SPDX-License-Identifier: Apache-2.0 */
/*
 * pool.h: who holds each receive slot.
 *
 * A slot is with the kernel (it may fill it), or held: by the engine while it looks at the packet, and once by every
 * send that reads from it. The last holder to let go gives it back, exactly once. The pool knows only indices; the
 * memory behind them and the way back to the kernel belong to the ingress.
 *
 * A wrong count here would send a stranger's bytes to a receiver, so a broken rule ends the process.
 */
#ifndef MCRELAY_POOL_H
#define MCRELAY_POOL_H

#include "counters.h"

#include <stdbool.h>
#include <stdint.h>

struct pool_slot {
    uint32_t holders;    /* 0: with the kernel. The engine, and each send that reads from it */
    uint32_t rule;       /* counter index of the rule that matched, POOL_NO_RULE if none did */
    uint8_t datagrams;   /* in the frame: several where a device merged them; they count as forwarded or not together */
    uint8_t reassembled; /* 0: the packet lies in the slot, else its handle: there (reassembly.h) */
    uint8_t copies_sent; /* 1 as soon as one copy left */
    uint8_t reason;      /* enum drop_reason, counted if no copy left */
    uint16_t tapped;     /* what tap.h calls it; 0: nobody watches */
};

#define POOL_NO_RULE UINT32_MAX

/* The engine and, of a merged frame that has to be sent datagram by datagram, 1024 outputs times 128 datagrams. */
enum { POOL_HOLDERS_MAX = 1 + 1024 * 128 };

struct pool {
    struct pool_slot *slots;
    uint32_t size;
    uint32_t free; /* slots with the kernel */
};

/* 0 or -ENOMEM. All slots start with the kernel. */
int pool_open(struct pool *pool, uint32_t size);
void pool_close(struct pool *pool);

/* The kernel filled slot `index`: the engine becomes its one holder. */
void pool_take(struct pool *pool, uint32_t index);
/* One more holder. */
void pool_hold(struct pool *pool, uint32_t index);
/* One holder less; true if it was the last and the slot goes back to the kernel. */
bool pool_release(struct pool *pool, uint32_t index);

#endif

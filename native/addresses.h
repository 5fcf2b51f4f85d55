/* SPDX-License-Identifier: Apache-2.0 */
/*
 * addresses.h: the addresses of this host. A packet that comes from one of them is our own traffic come back.
 *
 * Like a table, a set is built whole on the command side, never changed, and replaced between two batches. Pure.
 */
#ifndef MCRELAY_ADDRESSES_H
#define MCRELAY_ADDRESSES_H

#include "packet.h"

enum { ADDRESSES_MAX = 4096 }; /* a host with an address in each VLAN there can be; 128 KiB */

struct addresses;

/* Build a set from `length` bytes of addresses, 16 each as in union address; the same one twice is one. On success 0 and
 * *out; -EINVAL if there are more than ADDRESSES_MAX or half of one, -ENOMEM. */
int addresses_build(struct addresses **out, const uint8_t *packed, size_t length);

void addresses_free(struct addresses *addresses);

bool addresses_contain(const struct addresses *addresses, const union address *address);

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * reassembly.h: IPv6 packets put together from their fragments (RFC 8200 section 4.5).
 *
 * For IPv4 the kernel does this before packet sockets (PACKET_FANOUT_FLAG_DEFRAG); it has nothing of the kind for IPv6.
 * All fragments of a packet come to one worker, since IPv6 is steered by the destination alone.
 *
 * A fragment is copied, so that what it came in is free at once; a packet that is complete lies here until it is
 * released. Everything is bounded, whatever comes: so many packets may be incomplete, and another one takes the place of
 * the oldest; each has REASSEMBLY_TIMEOUT_NS from its first fragment on. A flood of fragments thus costs the fragments of
 * others, and nothing else.
 *
 * Fragments that overlap are somebody's attempt to have two readings of one packet: it is lost, and so is what still
 * comes of it (RFC 5722); likewise where two say where it ends, or one reaches beyond. The network may double a fragment,
 * though: one that is the same in place and content is lost alone. So is one that cannot be part of any packet: its
 * length not a multiple of 8 and not the last, without content, reaching beyond 65535 bytes; or the first of a packet
 * whose headers do not end in it (RFC 7112).
 *
 * Pure: the caller gives the time and sees to the counting. Each fragment that was added becomes part of one complete
 * packet, or is told of once as lost.
 */
#ifndef MCRELAY_REASSEMBLY_H
#define MCRELAY_REASSEMBLY_H

#include "packet.h"

#define REASSEMBLY_TIMEOUT_NS UINT64_C(2000000000) /* fragments come together, or one of them got lost */

enum {
    REASSEMBLY_WAITING_MAX = 64, /* incomplete packets: 4 MiB, as much as the kernel has for its own */
    REASSEMBLY_HELD_MAX = 64,    /* complete and not released yet: a batch of sends */
};

struct reassembly;

/* NULL: no memory. Takes some 8 MiB of address space; pages of it are used when packets are. */
struct reassembly *reassembly_new(void);
void reassembly_free(struct reassembly *reassembly);

/* Add a fragment that came by an interface with this VLAN id, while reassembly_has_room. Returns the handle, not 0, of
 * the packet that is complete with it, else 0. Adds to `lost` the fragments of which nothing will become any more. */
uint8_t reassembly_add(struct reassembly *reassembly, const struct packet_fragment *fragment, uint8_t interface,
                       uint16_t vlan, uint64_t now_ns, uint32_t *lost);

/* Another packet may become complete. */
bool reassembly_has_room(const struct reassembly *reassembly);

/* A complete packet, with IPv6's header as the first fragment had it, and none of the headers that each fragment had. */
const uint8_t *reassembly_packet(const struct reassembly *reassembly, uint8_t handle, size_t *length);
void reassembly_release(struct reassembly *reassembly, uint8_t handle);

/* Some packet is incomplete: reassembly_expire will have to be called. */
bool reassembly_waits(const struct reassembly *reassembly);

/* Lose what has waited for too long, or came by this interface. Returns how many fragments that were. */
uint32_t reassembly_expire(struct reassembly *reassembly, uint64_t now_ns);
uint32_t reassembly_forget(struct reassembly *reassembly, uint8_t interface);

#endif

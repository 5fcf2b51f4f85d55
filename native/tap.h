/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tap.h: packets of a rule, shown to somebody who watches, each with what became of it.
 *
 * A tap is a rule's counter and a socket (AF_UNIX, SOCK_SEQPACKET). A packet that matches the rule is noted when it is
 * taken up, whatever becomes of it, and when the last of its copies is done one record leaves by the socket: what
 * happened, and the packet's own bytes from its IP header on. The bytes are read where they lie, in the slot that the
 * packet holds until then; nothing is copied before the kernel does. Of what came by an ordinary UDP socket there are no
 * headers any more: they are written as they must have been.
 *
 * Nobody is waited for: a record that the socket has no room for is lost, counted, and the count stands in the next one.
 * A tap that has shown all that it was to show, or whose watcher is gone, does nothing any more but keep its place until
 * it is closed. Without taps a packet costs two comparisons with zero.
 */
#ifndef MCRELAY_TAP_H
#define MCRELAY_TAP_H

#include "headers.h"
#include "ingress.h"

enum {
    TAPS_MAX = 4,        /* open at once in one worker */
    TAPPED_MAX = 4096,   /* packets in hand; more than that are lost for the tap. They fit pool_slot.tapped */
    TAP_DROPS_MAX = 8,   /* outputs of which a record says why no copy left */
    TAP_BYTES_MAX = 65575, /* of a packet in a record: the longest IPv6 packet that is no jumbogram is 40 + 65535 */
};

struct tap_drop {
    uint32_t output; /* counter index */
    uint32_t reason; /* enum drop_reason */
};

/* What leaves by the socket, followed by the bytes of the packet. src/mcrelay/tap.py reads the same layout. */
struct tap_record {
    uint64_t time_ns;   /* since the epoch: when it arrived, or if that is not known, when the worker took it up */
    uint64_t lost;      /* packets of this tap so far of which there is no record */
    uint32_t length;    /* of the IP packet, of which no more bytes follow than were asked for */
    uint32_t copies;    /* datagrams that left, over all outputs */
    uint16_t interface; /* slot */
    uint16_t vlan;      /* 0: untagged */
    uint16_t datagrams; /* in the packet: several where a device merged them */
    uint16_t outputs;   /* of the rule */
    uint8_t reason;     /* enum drop_reason; DROP_NONE: a copy left */
    uint8_t drops;      /* in the following list, which has the first of them */
    uint8_t reserved[6];
    struct tap_drop dropped[TAP_DROPS_MAX];
};

static_assert(sizeof(struct tap_record) == 104, "layout shared with tap.py");

struct tap {
    int fd;        /* -1: none. Borrowed */
    bool is_over;  /* shows nothing any more */
    uint32_t rule; /* counter index */
    uint32_t snap; /* bytes of a packet, at most */
    uint64_t left; /* records */
    uint64_t lost;
};

/* A packet in hand. */
struct tapped {
    struct tap_record record;
    const uint8_t *data; /* where the packet lies, or what follows `head` */
    uint8_t head[HEADERS_MAX]; /* headers that the kernel has kept to itself, written anew */
    uint8_t head_length;
    uint32_t copies_dropped;
    uint16_t next_free; /* index + 1 */
    uint8_t taps;       /* a bit for each that it belongs to */
};

struct taps {
    unsigned open; /* how many can still show something; the engine looks at nothing else while it is 0 */
    uint16_t first_free; /* index + 1; 0: none */
    uint16_t fresh;      /* those from here on were never used */
    struct tap all[TAPS_MAX];
    struct tapped packets[TAPPED_MAX];
};

void taps_init(struct taps *taps);

/* Show the next `count` packets of the rule counted at `rule`, and no more than `snap` bytes of each, by `fd`. -EBUSY if
 * as many are open as there can be, -EINVAL for a descriptor that is in use here or a number out of range. */
int taps_open(struct taps *taps, uint32_t rule, int fd, uint64_t count, uint32_t snap);

/* The descriptor is out of use. -ENOENT if no tap has it. */
int taps_close(struct taps *taps, int fd);

/* Note a packet that matched a rule; 0 if nobody watches that. Else what to call it by, until taps_settle. `data`: the
 * packet from its IP header on, and perhaps padding behind it, `length` bytes that stay until then; NULL if there are no
 * headers, only the payload that `packet` has. `arrived_ns`: since the epoch; 0 if it is not known. */
uint16_t taps_take(struct taps *taps, uint32_t rule, uint32_t outputs, uint8_t interface, const struct packet *packet,
                   const uint8_t *data, size_t length, uint64_t arrived_ns);

/* Copies of some of its datagrams did not leave by an output. */
void taps_drop(struct taps *taps, uint16_t tapped, uint32_t output, uint32_t datagrams, enum drop_reason reason);

/* All is done: tell those who watch. `reason`: DROP_NONE if a copy left. */
void taps_settle(struct taps *taps, uint16_t tapped, enum drop_reason reason);

#endif

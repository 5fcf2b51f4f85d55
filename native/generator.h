/* SPDX-License-Identifier: Apache-2.0 */
/*
 * generator.h: builds test datagrams and sends them at a rate through a socket that somebody else opened.
 *
 * Datagram i belongs to block i / burst, block b to flow b % flows, and a flow's sequences count from 0. Consecutive
 * datagrams of one flow leave in one send that the kernel cuts apart (UDP_SEGMENT, udp(7)), if `segments` allows it, so
 * far as they are due; a path that refuses that gets plain sends, once, and the totals say so. Payloads are not copied
 * here: each datagram is a header and a place in the pattern.
 *
 * The pacing: datagram i is due i / rate seconds after the start, and what is due is sent, nothing ahead of its time.
 * Between two times that it wakes up there are WAKE_INTERVAL_NS at least, so that up to ALONE_RATE each datagram has a
 * time and a send of its own, and above that several leave together. It sleeps between them and never spins. A sender
 * that fell behind makes up for CATCH_UP_NS; beyond that the schedule is postponed.
 *
 * Every header is stamped right before the send call that takes it; one call takes at most CALL_DATAGRAMS_MAX.
 *
 * Errors are negative errno. Nothing is allocated after opening. Times are nanoseconds.
 */
#ifndef MCRELAY_GENERATOR_H
#define MCRELAY_GENERATOR_H

#include "payload.h"

#include <netinet/in.h>
#include <stdbool.h>
#include <sys/socket.h>

enum {
    CALL_MESSAGES_MAX = 16,          /* sends in one system call: more would only make the first stamps older */
    CALL_DATAGRAMS_MAX = 64,         /* UDP_MAX_SEGMENTS of kernels before 6.9 */
    WAKE_INTERVAL_NS = 50000,        /* a wake-up costs some microseconds: at most a tenth of the time */
    ALONE_RATE = 20000,              /* datagrams/s: one per WAKE_INTERVAL_NS */
    CATCH_UP_NS = 20000000,          /* more would measure the burst, not the rate */
    QUEUE_FULL_SLEEP_NS = 200000,    /* an interface's queue is full and drains by itself */
    ATTEMPTS_MAX = 1000,             /* at one datagram, before an error that should pass is one that stays */
};

struct generator_plan {
    uint64_t count;       /* datagrams, 0: no end */
    uint64_t duration_ns; /* 0: no end */
    double rate;          /* datagrams/s over all flows, 0: as fast as possible */
    uint32_t flows;
    uint32_t flow_id; /* of the first flow */
    uint32_t size;    /* of a datagram, with all headers above UDP's */
    uint32_t segments; /* most datagrams in one send, 1 to CALL_DATAGRAMS_MAX, at most DATAGRAM_MAX bytes together */
    uint32_t burst;    /* consecutive datagrams of a flow */
    bool rtp;          /* an RTP header before ours */
};

struct generator_totals {
    uint64_t sent;
    uint64_t retried;      /* sends repeated because the interface's queue was full or an earlier one was refused */
    uint64_t elapsed_ns;   /* since the first call of generator_run */
    uint64_t postponed_ns; /* by how much the schedule was, as the sender fell behind */
    uint32_t segments;     /* most in one send so far */
    int segments_refused;  /* the errno, 0 if they were not */
};

struct generator {
    struct generator_totals totals;
    struct generator_plan plan;
    int fd;
    uint32_t header; /* bytes before the padding */
    uint64_t start_ns;
    uint64_t woke_ns;
    double interval_ns;
    uint32_t attempts;
    uint8_t *addresses; /* one per flow; NULL: the socket is connected */
    uint32_t address_size;
    struct mmsghdr messages[CALL_MESSAGES_MAX];
    uint32_t message_datagrams[CALL_MESSAGES_MAX];
    _Alignas(struct cmsghdr) uint8_t control[CMSG_SPACE(sizeof(uint16_t))]; /* UDP_SEGMENT, the same in all messages */
    struct iovec pieces[2 * CALL_DATAGRAMS_MAX];
    uint8_t headers[CALL_DATAGRAMS_MAX][RTP_HEADER + PAYLOAD_HEADER];
    uint8_t pattern[PATTERN_SIZE];
};

/* `addresses`: a socket address of `address_size` bytes for each flow, copied; NULL if `fd`, a blocking UDP socket that
 * stays the caller's, is connected. 0, -EINVAL or -ENOMEM. */
int generator_open(struct generator **out, const struct generator_plan *plan, int fd, const uint8_t *addresses,
                   uint32_t address_size);
void generator_close(struct generator *generator);

/* Send for about `slice_ns`. 1: all is sent or the time is over; 0: call again; else what a send failed with. Returns
 * early after a signal. */
int generator_run(struct generator *generator, uint64_t slice_ns);

/* For tests: describe the next send call, of at most `due` datagrams, all stamped `now_ns`; how many messages it has. */
uint32_t generator_build(struct generator *generator, uint64_t due, uint64_t now_ns);

#endif

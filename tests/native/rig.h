/* SPDX-License-Identifier: Apache-2.0 */
/*
 * rig.h: a real engine on a thread of its own, with sockets that need no privilege.
 *
 *     feed[i] --socketpair--> ingress[i] --engine--> egress --127.0.0.1--> receivers[r]
 *
 * The ingress is a Unix datagram socket, into which a test writes whole IPv4 packets. No link-layer metadata comes with
 * them, so the engine verifies their UDP checksums. Its queue loses nothing, the feed waits for room (RIG_FEED_BYTES:
 * a dozen large packets). The receivers' queues would: a test that wants to see what arrives keeps no more than
 * RIG_WINDOW datagrams under way, so that what the engine sent is there, and what is not there it did not send.
 *
 * All waits are for a condition and have a deadline; a test that reaches it fails.
 */
#ifndef MCRELAY_TESTS_RIG_H
#define MCRELAY_TESTS_RIG_H

#include "check.h"
#include "counters.h"
#include "description.h"
#include "engine.h"

#include <poll.h>
#include <pthread.h>

enum {
    RIG_INGRESSES = 2,
    RIG_RECEIVERS = 4,
    RIG_WINDOW = 48,      /* of up to 1500 bytes each: fits the smallest usual receive buffer, 208 KiB */
    RIG_FEED_BYTES = 16384, /* the kernel doubles it, and counts its own overhead */
    RIG_TICKETS = 4096,   /* commands of one engine */
    RIG_MTU = 1500,
    RIG_LOOPBACK_MTU = 65536, /* of the egress */
    RIG_PAYLOAD_MAX = RIG_MTU - 28,
    RIG_DEADLINE_MS = 20000,
};

#define RIG_LOOPBACK UINT32_C(0x7f000001)
#define RIG_GROUP UINT32_C(0xe9fc0001) /* 233.252.0.1 */
enum { RIG_PORT = 5000 };

struct rig {
    struct engine *engine;
    struct counters_page *page; /* stays when the engine is replaced, as in a worker's life */
    int command_fd, answer_fd;
    pthread_t thread;
    bool running;
    int run_result;
    int feed[RIG_INGRESSES], ingress[RIG_INGRESSES];
    int egress;
    int receivers[RIG_RECEIVERS];
    uint16_t ports[RIG_RECEIVERS];
    bool answered[RIG_TICKETS];
    int results[RIG_TICKETS];
};

/* Sockets, a page, and an engine that does not run yet. */
void rig_open(struct rig *rig);
/* Stops the engine if it runs. What a sanitizer finds left is the engine's. */
void rig_close(struct rig *rig);

/* Run the engine on its thread; stop it, join, and check its result and its page. */
void rig_run(struct rig *rig);
void rig_stop(struct rig *rig);
/* After the engine's thread was told to stop by other means. */
void rig_join(struct rig *rig);
/* Close the engine and open another on the same sockets and page. */
void rig_replace_engine(struct rig *rig);

/* Take the answers that are there; true if there was one. */
bool rig_take_answers(struct rig *rig);
/* Wait for the answer to a command, and return its result. */
int rig_answer(struct rig *rig, int64_t ticket);
/* Attach a socket as egress of this way on an interface slot. */
int64_t rig_attach_egress(struct rig *rig, unsigned interface, enum way way, int fd, uint32_t mtu);
/* Attach the egress on interface slot 0, for WAY_UDP4, then ingress `i` on slot `i`. Set the rules before, if packets wait there. */
void rig_attach(struct rig *rig, unsigned i, uint32_t slots);
/* Set these rules, check the answer, and free the description. */
void rig_set_rules(struct rig *rig, struct description *rules);
/* The usual rule: RIG_GROUP:RIG_PORT from interface slot 0 to receivers 0 to `count` - 1, each at its counter. */
void rig_describe(const struct rig *rig, struct description *rules, unsigned count, uint8_t ttl);

/* Wait for any of these; the deadline passing is a failure. */
void rig_wait(struct pollfd *polled, unsigned count);

/* Write a packet to ingress `i`; rig_try_feed does not wait for room, and is false if there is none. */
bool rig_try_feed(struct rig *rig, unsigned i, const uint8_t *packet, size_t length);
void rig_feed(struct rig *rig, unsigned i, const uint8_t *packet, size_t length);
/* The same for a datagram to RIG_GROUP:RIG_PORT. */
bool rig_try_send(struct rig *rig, unsigned i, uint8_t ttl, const uint8_t *payload, size_t length);
/* Fill ingress 0 up, then wait until it has room again, an answer came or receiver 1 got something. */
void rig_flood(struct rig *rig);
void rig_send(struct rig *rig, unsigned i, uint8_t ttl, const uint8_t *payload, size_t length);

/* Take the next datagram of receiver `r`, RIG_PAYLOAD_MAX bytes at most; -1 if there is none. rig_receive waits for it.
 * `ttl` (may be NULL) is the one that it came with. */
ssize_t rig_try_receive(struct rig *rig, unsigned r, uint8_t *payload, int *ttl);
size_t rig_receive(struct rig *rig, unsigned r, uint8_t *payload, int *ttl);

/* Wait until `received` packets in all were taken and dealt with, every slot is free and the engine at rest. */
void rig_wait_received(struct rig *rig, uint64_t received);
/* The identities of counters.h, for an engine at rest; with those of each rule in `rules` and its outputs. */
void rig_check_counters(const struct rig *rig, const struct description *rules);

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * engine.h: the packet's way through one worker, on a thread of its own. The only header of native/ that is public.
 *
 * Two threads touch an engine. Its own calls engine_run and stays in it until told to stop. The command side calls
 * everything else, from one thread: it hands commands over through a bounded queue and an eventfd, and takes the
 * answers the same way. The engine blocks in io_uring when there is nothing to do.
 *
 * Commands take effect between two batches, when no send is in flight: what a command replaced (a table, a socket) is
 * out of use when its answer is there. Descriptors are borrowed: the caller closes them, after the answer to the
 * command that takes them out of use.
 *
 * Errors are negative errno values.
 */
#ifndef MCRELAY_ENGINE_H
#define MCRELAY_ENGINE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct engine;
struct counters_page;

struct engine_answer {
    uint64_t ticket; /* of the command */
    int result;      /* 0 or negative errno */
};

/* How long packets may wait, and what the engine may cost for it. */
struct engine_pace {
    uint32_t latency_budget_us; /* at high rates a packet may wait so long for others, which then cost less; 0: none waits */
    bool busy_poll;             /* never sleep: a whole core for the lowest latency */
};

/* Make an engine that counts into `counters` (mapped writable by the caller, who unmaps it after engine_close).
 * `command_fd` and `answer_fd` are non-blocking eventfds: the engine waits on the first and signals the second.
 * -ENOMEM; -EPERM or -ENOSYS where the kernel has no io_uring for us; -EINVAL then, too, or where it cannot restrict a
 * ring to what the engine submits, or for a budget above PACE_BUDGET_US_MAX. */
int engine_open(struct engine **out, struct counters_page *counters, int command_fd, int answer_fd,
                struct engine_pace pace);

/* Forward until engine_stop is through: all packets taken from the sockets are dealt with, all sends complete. Returns
 * 0 then, or the error that ended it early. */
int engine_run(struct engine *engine);

/* After engine_run has returned (or was never called). */
void engine_close(struct engine *engine);

/* Commands: each returns a ticket > 0, whose answer comes later, or a negative errno at once, and then nothing was
 * changed: -EBUSY if too many answers are outstanding, -EINVAL for wrong arguments. */

/* Receive IP packets from the packet socket `fd` as those of interface slot `interface`, by io_uring receives of at most
 * `mtu` bytes into `slots` slots (a power of two, or 0 for the default), or from the ring that was set up on it with this
 * geometry (struct tpacket_req). On a `loopback` device packets from own addresses are as good as any. Answer -EEXIST if
 * the slot has an ingress, -ECANCELED behind a stop. */
int64_t engine_attach_receive(struct engine *engine, unsigned interface, int fd, bool loopback, uint32_t mtu,
                              uint32_t slots);
int64_t engine_attach_ring(struct engine *engine, unsigned interface, int fd, bool loopback, uint32_t block_size,
                           uint32_t blocks, uint32_t frame_size);
/* Receive from ordinary UDP sockets (datagrams.h), which are added and removed one by one; each has a number of the
 * caller's. A datagram is addressed to the port that its socket is bound to. Answers: -ENOENT if the slot has no such ingress
 * or the ingress no such socket, -EEXIST if it has one of this number, -ENFILE if it has too many. */
int64_t engine_attach_datagrams(struct engine *engine, unsigned interface, bool loopback, uint32_t slots);
int64_t engine_add_socket(struct engine *engine, unsigned interface, int fd, uint32_t number);
int64_t engine_remove_socket(struct engine *engine, unsigned interface, uint32_t number);
/* Answer -ENOENT if the slot has none. */
int64_t engine_detach_ingress(struct engine *engine, unsigned interface);
/* Send through the socket `fd` for outputs on interface slot `interface` that have this way (enum way of ways.h); it
 * replaces one that was there. `link` is a struct egress_link. -EINVAL for an MTU below 68, too, where we write headers. */
int64_t engine_attach_egress(struct engine *engine, unsigned interface, unsigned way, int fd, uint32_t mtu,
                             const uint8_t *link, size_t length);
int64_t engine_detach_egress(struct engine *engine, unsigned interface, unsigned way);
/* Forward by these rules (table.h says how they are described) and no others. */
int64_t engine_set_rules(struct engine *engine, const uint8_t *records, size_t length);
/* These are the addresses of this host (addresses.h says how they are described), and no others: what comes from one of
 * them is not forwarded. None until then. */
int64_t engine_set_own_addresses(struct engine *engine, const uint8_t *packed, size_t length);
/* Show the next `count` packets of the rule counted at `rule` by the socket `fd` (tap.h says how), no more than `snap`
 * bytes of each. Answer -EBUSY if too many taps are open, -EINVAL for a number out of range. */
int64_t engine_open_tap(struct engine *engine, uint32_t rule, int fd, uint64_t count, uint32_t snap);
/* Answer -ENOENT if it is none's. */
int64_t engine_close_tap(struct engine *engine, int fd);
/* Does nothing; the answer shows that the engine's thread works. */
int64_t engine_probe(struct engine *engine);
/* Answer -EALREADY behind another stop. */
int64_t engine_stop(struct engine *engine);

/* Take the next answer; 1 if there was one, else 0. Drain after answer_fd became readable and was read. */
int engine_answer(struct engine *engine, struct engine_answer *answer);

#endif

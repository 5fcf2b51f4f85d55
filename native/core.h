/* SPDX-License-Identifier: Apache-2.0 */
/*
 * core.h: what the parts of an engine share: its state, and who does what with it. Of no interest to anybody else.
 *
 *     engine.c     the loop, what io_uring completes, upkeep of what is attached
 *     forward.c    the way of packets, from an ingress to the runs of their outputs
 *     commands.c   commands and their answers, on both threads
 */
#ifndef MCRELAY_CORE_H
#define MCRELAY_CORE_H

#include "addresses.h"
#include "egress.h"
#include "engine.h"
#include "limit.h"
#include "loops.h"
#include "pace.h"
#include "reassembly.h"
#include "tap.h"

#include <liburing.h>

enum { COMMANDS_MAX = 64 }; /* outstanding; a table counts as one however many rules it has. Power of two */

static_assert((COMMANDS_MAX & (COMMANDS_MAX - 1)) == 0, "queue indices are masked");

/* A completion says what it is by its user_data: kind in the top byte, index below. The command notification is 0. */
enum kind { KIND_COMMAND = 0, KIND_SEND, KIND_RECEIVE, KIND_CANCEL, KIND_TIMER };

static inline uint64_t user_data(enum kind kind, uint32_t index)
{
    return (uint64_t)kind << 56 | index;
}

enum command_kind {
    ATTACH_INGRESS, DETACH_INGRESS, ADD_SOCKET, REMOVE_SOCKET, ATTACH_EGRESS, DETACH_EGRESS, SET_RULES,
    SET_OWN_ADDRESSES, OPEN_TAP, CLOSE_TAP, PROBE, STOP,
};

struct command {
    enum command_kind kind;
    uint64_t ticket;
    unsigned interface;
    enum way way;
    int fd;                      /* ADD_SOCKET, OPEN_TAP, CLOSE_TAP */
    uint32_t number;             /* of that, and of REMOVE_SOCKET */
    struct egress egress;        /* ATTACH_EGRESS */
    struct ingress *ingress;     /* ATTACH_INGRESS */
    struct table *table;         /* SET_RULES */
    struct addresses *addresses; /* SET_OWN_ADDRESSES */
    struct {                     /* OPEN_TAP */
        uint64_t count;
        uint32_t rule;
        uint32_t snap;
    } tap;
};

/* The answer carries back what the command side has to free. */
struct answer {
    struct engine_answer public;
    struct ingress *ingress;
    struct table *table;
    struct addresses *addresses;
};

/* One producer, one consumer: each index is written by one thread. Never full, since no more than COMMANDS_MAX commands
 * are outstanding. */
struct command_queue {
    struct command items[COMMANDS_MAX];
    _Atomic uint32_t head; /* consumer */
    _Atomic uint32_t tail; /* producer */
};

struct answer_queue {
    struct answer items[COMMANDS_MAX];
    _Atomic uint32_t head;
    _Atomic uint32_t tail;
};

struct engine {
    struct io_uring ring;
    struct counters_page *counters;
    int command_fd;
    int answer_fd;

    /* The engine's thread. */
    struct ingress *ingress[TABLE_INTERFACES_MAX];  /* by slot */
    struct ingress *attached[TABLE_INTERFACES_MAX]; /* the same without gaps */
    unsigned attached_count;
    unsigned turn;      /* index into attached of the interface whose turn it is */
    unsigned turn_left; /* packets that it may still have */
    struct egress egress[TABLE_EGRESSES]; /* by table_egress */
    struct table *table;
    struct addresses *own; /* NULL: not known yet */
    struct loop_watch *watches; /* by rule counter */
    struct reassembly *reassembly;
    struct limit limits[COUNTERS_OUTPUTS_MAX];
    uint64_t now_ns; /* of this turn, once somebody has asked; else 0 */
    bool timer_armed;
    bool active; /* packets came since the timer last fired */
    bool commands_waiting;
    bool stopping;
    bool busy_poll;
    struct pace pace;
    uint64_t wait_ns; /* before the next turn; 0: until something happens */
    uint64_t taken;   /* packets of this turn */
    uint64_t stop_ticket;
    struct { /* the packet whose copies are being prepared; rule NULL: none */
        struct ingress *ingress;
        uint32_t slot;
        const struct table_rule *rule;
        uint32_t next_output;
        struct packet packet;
    } current;

    /* The command side. */
    uint64_t last_ticket;
    uint32_t outstanding;

    struct taps taps; /* the engine's thread's */
    struct command_queue commands;
    struct answer_queue answers;
    struct runs runs;
};

/* --- engine.c ------------------------------------------------------------------------------------------------------- */

struct io_uring_sqe *core_submission(struct engine *engine);

/* The time of this turn: one reading has to do for all its packets. */
uint64_t core_turn_ns(struct engine *engine);

/* Let an ingress leave; the command `ticket` is answered when it has. 0: nobody waits for it. */
void core_start_detach(struct engine *engine, struct ingress *ingress, uint64_t ticket);

/* --- forward.c ------------------------------------------------------------------------------------------------------ */

/* Gather what came in into runs and send those. True if the batch ended before the packets did. A waiting command lets
 * the current packet finish and nothing new begin, so that it comes to its turn. */
bool forward_batch(struct engine *engine);

/* Count fragments that no packet came of. */
void forward_fragments_lost(struct engine *engine, uint32_t lost);

/* The send of run `index` has completed. */
void forward_sent(struct engine *engine, uint16_t index, int result);

/* --- commands.c ----------------------------------------------------------------------------------------------------- */

/* Execute what waits. Between two batches: no run is in use and no packet is half prepared. */
void commands_execute(struct engine *engine);

void commands_answer(struct engine *engine, struct answer given);

/* Free what is in the queues; the engine's thread has ended. */
void commands_drain(struct engine *engine);

#endif

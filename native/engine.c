/* SPDX-License-Identifier: Apache-2.0 */
#include "engine.h"

#include "addresses.h"
#include "egress.h"
#include "loops.h"
#include "pace.h"
#include "receive.h"
#include "ring.h"

#include <errno.h>
#include <liburing.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum {
    SUBMISSIONS = 1024,  /* all sends, a receive and a cancel per interface, timer, command poll */
    COMPLETIONS = 8192,  /* a full pool and all sends; the kernel keeps what exceeds it aside */
    COMMANDS_MAX = 64,   /* outstanding; a table counts as one however many rules it has. Power of two */
    PACKETS_PER_TURN = 64, /* of one interface, before the next one's turn */
    PACKETS_PER_BATCH = 512, /* gathered into runs before they are sent: enough for 64 segments of several flows */
    GATHERED_MAX = 64, /* completions that end a wait for company before its time */
    PAYLOAD_AT = 32, /* in most packets: behind the headers of IPv4 and UDP, 28 bytes, and well into the first 8 of it */
    STATISTICS_MS = 100,   /* how often the sockets are asked for overruns while packets come */
};

static_assert((int)RUNS_MAX + 2 * (int)TABLE_INTERFACES_MAX + 2 <= (int)SUBMISSIONS, "a turn's submissions fit");
static_assert(POOL_HOLDERS_MAX == 1 + (int)TABLE_OUTPUTS_PER_RULE_MAX * (int)PACKET_DATAGRAMS_MAX,
              "a send for each datagram and output, and the engine");
static_assert((int)COUNTERS_INTERFACES_MAX == (int)TABLE_INTERFACES_MAX, "one set of counters for each slot");
static_assert((COMMANDS_MAX & (COMMANDS_MAX - 1)) == 0, "queue indices are masked");

/* A completion says what it is by its user_data: kind in the top byte, index below. The command notification is 0. */
enum kind { KIND_COMMAND = 0, KIND_SEND, KIND_RECEIVE, KIND_CANCEL, KIND_TIMER };

static uint64_t user_data(enum kind kind, uint32_t index)
{
    return (uint64_t)kind << 56 | index;
}

enum command_kind {
    ATTACH_INGRESS, DETACH_INGRESS, ATTACH_EGRESS, DETACH_EGRESS, SET_RULES, SET_OWN_ADDRESSES,
    PROBE, STOP,
};

struct command {
    enum command_kind kind;
    uint64_t ticket;
    unsigned interface;
    int fd;
    uint32_t mtu;
    struct ingress *ingress;     /* ATTACH_INGRESS */
    struct table *table;         /* SET_RULES */
    struct addresses *addresses; /* SET_OWN_ADDRESSES */
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
    struct egress egress[TABLE_INTERFACES_MAX];
    struct table *table;
    struct addresses *own; /* NULL: not known yet */
    struct loop_watch *watches; /* by rule counter */
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

    struct command_queue commands;
    struct answer_queue answers;
    struct runs runs;
};

/* --- packets ------------------------------------------------------------------------------------------------------ */

static struct io_uring_sqe *submission(struct engine *engine)
{
    struct io_uring_sqe *sqe = io_uring_get_sqe(&engine->ring);

    while (!sqe) { /* cannot happen by the count above; a submission makes room in any case */
        io_uring_submit(&engine->ring);
        sqe = io_uring_get_sqe(&engine->ring);
    }
    return sqe;
}

/* The last holder of a slot let go: settle what became of the packet and give the slot back. */
static void settle(struct engine *engine, struct ingress *ingress, uint32_t slot)
{
    struct counters_page *counters = engine->counters;
    const struct pool_slot *state = &ingress->pool.slots[slot];

    if (state->copies_sent)
        count(&counters->forwarded, state->datagrams);
    else
        count(&counters->dropped[state->reason], state->datagrams);
    if (state->rule != POOL_NO_RULE) {
        struct counters_rule *rule = &counters->rules[state->rule];

        count(state->copies_sent ? &rule->forwarded : &rule->dropped, state->datagrams);
    }
    ingress->kind->give_back(ingress, slot);
}

static void release(struct engine *engine, struct ingress *ingress, uint32_t slot)
{
    if (pool_release(&ingress->pool, slot))
        settle(engine, ingress, slot);
}

/* Copies of `datagrams` of the slot's, of one output, did not leave. */
static void drop_copies(struct engine *engine, struct ingress *ingress, uint32_t slot, uint32_t output,
                        uint32_t datagrams, enum drop_reason reason)
{
    struct pool_slot *state = &ingress->pool.slots[slot];

    if (state->reason == DROP_NONE || reason < state->reason)
        state->reason = (uint8_t)reason;
    count(&engine->counters->outputs[output].dropped[reason - DROP_EGRESS_FULL], datagrams);
}

static void run_done(struct engine *engine, uint16_t index, int result)
{
    struct run *run = runs_finish(&engine->runs, index);
    struct counters_page *counters = engine->counters;
    struct counters_output *output = &counters->outputs[run->output];

    if (result >= 0) {
        count(&output->packets, run->datagrams);
        count(&output->bytes, run->bytes);
        count(&counters->copies, run->datagrams);
        count(&counters->copies_bytes, run->bytes);
        count(&counters->sends, 1);
        for (uint16_t i = 0; i < run->count; i++)
            run->ingress->pool.slots[run->slots[i]].copies_sent = 1;
    } else if (runs_refuse_segments(&engine->runs, index, result)) {
        count(&counters->segments_refused, 1);
        count(&counters->interfaces[run->egress->interface].segments_refused, 1);
        return; /* the run keeps its slots until its datagrams are sent again */
    } else {
        for (uint16_t i = 0; i < run->count; i++)
            drop_copies(engine, run->ingress, run->slots[i], run->output, run->datagrams / run->count,
                        send_drop_reason(result));
    }
    for (uint16_t i = 0; i < run->count; i++)
        release(engine, run->ingress, run->slots[i]);
    runs_release(&engine->runs, index);
}

static void submit_run(void *context, struct run *run, uint16_t index)
{
    struct engine *engine = context;
    struct io_uring_sqe *sqe = submission(engine);

    io_uring_prep_sendmsg(sqe, run->egress->fd, &run->message, MSG_DONTWAIT | MSG_NOSIGNAL);
    sqe->user_data = user_data(KIND_SEND, index);
}

static uint64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now); /* needs no system call */
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* The time of this turn: one reading has to do for all its packets. */
static uint64_t turn_ns(struct engine *engine)
{
    if (!engine->now_ns)
        engine->now_ns = now_ns();
    return engine->now_ns;
}

/* Whether a packet that matched a rule is to be forwarded at all; what is not counts for the rule in a word of its own. */
static enum drop_reason admit(struct engine *engine, const struct ingress *ingress, const struct packet *packet,
                              const struct table_rule *rule)
{
    struct counters_rule *counters = &engine->counters->rules[rule->counter];
    struct loop_watch *watch = &engine->watches[rule->counter];
    enum loop_verdict verdict;

    if (engine->own && !ingress->loopback && addresses_contain(engine->own, &packet->source)) {
        count(&counters->own, packet_datagrams(packet));
        return DROP_OWN;
    }
    verdict = loops_judge(watch, rule->hash, packet, turn_ns(engine));
    if (verdict == LOOP_NONE)
        return DROP_NONE;
    if (verdict != LOOP_SUSPENDED)
        count_set(&counters->suspended_until_ns, watch->suspended_until_ns);
    if (verdict == LOOP_ACQUITTED)
        return DROP_NONE;
    if (verdict == LOOP_FOUND)
        count(&counters->suspensions, 1);
    count(&counters->looped, packet_datagrams(packet));
    return DROP_LOOP;
}

/* Look at a packet just taken from an ingress queue: make it the current one, or drop it. */
static void begin(struct engine *engine, struct ingress *ingress, uint32_t slot, const struct frame *frame)
{
    struct pool_slot *state = &ingress->pool.slots[slot];
    struct packet *packet = &engine->current.packet;
    const struct table_rule *rule = NULL;
    enum drop_reason reason = frame->reason;

    engine->active = true;
    count(&engine->counters->received, 1);
    count(&engine->counters->interfaces[ingress->interface].frames, 1);
    if (reason == DROP_NONE) {
        __builtin_prefetch(frame->data + PAYLOAD_AT); /* loops_judge reads the payload's beginning: 100 ns from memory */
        reason = packet_parse(frame->data, frame->length, frame->checksum_vouched, packet);
    }
    if (reason == DROP_NONE) {
        packet->segment = frame->segment < packet->payload_length ? frame->segment : 0;
        if (packet_datagrams(packet) > PACKET_DATAGRAMS_MAX)
            reason = DROP_MERGED;
    }
    if (reason == DROP_NONE) {
        state->datagrams = (uint16_t)packet_datagrams(packet);
        count(&engine->counters->received, state->datagrams - 1u);
        count(&engine->counters->received_bytes, packet->payload_length);
        rule = engine->table ? table_find(engine->table, &packet->destination, packet->destination_port,
                                          ingress->interface)
                             : NULL;
        reason = rule ? admit(engine, ingress, packet, rule) : DROP_NO_RULE;
    }
    if (reason != DROP_NONE) {
        if (reason == DROP_MERGED)
            count(&engine->counters->interfaces[ingress->interface].merged, 1);
        state->reason = (uint8_t)reason;
        release(engine, ingress, slot);
        return;
    }
    state->rule = rule->counter;
    count(&engine->counters->rules[rule->counter].packets, state->datagrams);
    count(&engine->counters->rules[rule->counter].bytes, packet->payload_length);
    engine->current.ingress = ingress;
    engine->current.slot = slot;
    engine->current.rule = rule;
    engine->current.next_output = 0;
}

/* Append the copies of the current packet to their runs. False if the runs ran out: go on after some have completed. */
static bool copy_current(struct engine *engine)
{
    struct ingress *ingress = engine->current.ingress;
    uint32_t slot = engine->current.slot;
    const struct table_rule *rule = engine->current.rule;

    while (engine->current.next_output < rule->outputs_count) {
        const struct table_output *output = &rule->outputs[engine->current.next_output];
        struct egress *egress = &engine->egress[output->egress];

        if (egress->fd < 0) {
            drop_copies(engine, ingress, slot, output->counter, ingress->pool.slots[slot].datagrams,
                        DROP_EGRESS_UNREACHABLE);
        } else {
            if (runs_append(&engine->runs, egress, output, &engine->current.packet, ingress, slot, submit_run,
                            engine) == NO_RUN_FREE)
                return false;
            pool_hold(&ingress->pool, slot);
        }
        engine->current.next_output++;
    }
    engine->current.rule = NULL;
    release(engine, ingress, slot);
    return true;
}

/* The next packet of any interface, taking turns: one that is flooded does not keep the others waiting. */
static bool next_packet(struct engine *engine)
{
    /* Each interface once, and the first one again if only its turn was over. */
    for (unsigned tried = 0; tried <= engine->attached_count; tried++) {
        struct frame frame;
        uint32_t slot;

        if (engine->turn >= engine->attached_count)
            engine->turn = 0;
        if (engine->turn_left && engine->attached_count &&
            engine->attached[engine->turn]->kind->next(engine->attached[engine->turn], &slot, &frame)) {
            engine->turn_left--;
            begin(engine, engine->attached[engine->turn], slot, &frame);
            return true;
        }
        engine->turn++;
        engine->turn_left = PACKETS_PER_TURN;
    }
    return false;
}

/* Gather what came in into runs and send those. True if the batch ended before the packets did. A waiting command lets
 * the current packet finish and nothing new begin, so that it comes to its turn. */
static bool forward(struct engine *engine)
{
    unsigned taken = 0;
    bool blocked = !runs_send_again(&engine->runs, submit_run, engine) ||
                   (engine->current.rule && !copy_current(engine));

    while (!blocked && !engine->commands_waiting && taken < PACKETS_PER_BATCH && next_packet(engine)) {
        taken++;
        /* What has to be sent datagram by datagram goes before anything that came later. */
        blocked = (engine->current.rule && !copy_current(engine)) || engine->runs.refused_count;
    }
    runs_flush(&engine->runs, submit_run, engine);
    engine->taken += taken;
    /* Where only completions are missing, nobody has to wait for company. */
    for (unsigned i = 0; i < engine->attached_count; i++)
        blocked |= engine->attached[i]->needs_room;
    return taken == PACKETS_PER_BATCH || blocked;
}

/* --- upkeep ------------------------------------------------------------------------------------------------------- */

static void arm_command_poll(struct engine *engine)
{
    struct io_uring_sqe *sqe = submission(engine);

    /* Poll, then read(2): a read submitted to io_uring on a non-blocking descriptor does not wait, it fails. */
    io_uring_prep_poll_add(sqe, engine->command_fd, POLLIN);
    sqe->user_data = user_data(KIND_COMMAND, 0);
}

static void arm(struct engine *engine, struct ingress *ingress)
{
    struct io_uring_sqe *sqe = submission(engine);

    ingress->kind->arm(ingress, sqe);
    sqe->user_data = user_data(KIND_RECEIVE, ingress->interface);
    ingress->armed = true;
}

static void arm_timer(struct engine *engine)
{
    static struct __kernel_timespec interval = {.tv_nsec = STATISTICS_MS * 1000000LL};
    struct io_uring_sqe *sqe = submission(engine);

    io_uring_prep_timeout(sqe, &interval, 0, 0);
    sqe->user_data = user_data(KIND_TIMER, 0);
    engine->timer_armed = true;
}

static void count_overruns(struct engine *engine, struct ingress *ingress)
{
    uint32_t overruns = ingress_overruns(ingress);

    if (!overruns)
        return;
    engine->active = true;
    count(&engine->counters->received, overruns);
    count(&engine->counters->dropped[DROP_INGRESS_OVERRUN], overruns);
    count(&engine->counters->interfaces[ingress->interface].overruns, overruns);
}

static void timer_fired(struct engine *engine)
{
    engine->timer_armed = false;
    engine->active = false;
    for (unsigned i = 0; i < engine->attached_count; i++) {
        engine->attached[i]->failed = false;
        count_overruns(engine, engine->attached[i]);
    }
}

static void answer(struct engine *engine, struct answer given)
{
    uint32_t tail = atomic_load_explicit(&engine->answers.tail, memory_order_relaxed);
    const uint64_t one = 1;
    ssize_t written;

    engine->answers.items[tail & (COMMANDS_MAX - 1)] = given;
    atomic_store_explicit(&engine->answers.tail, tail + 1, memory_order_release);
    written = write(engine->answer_fd, &one, sizeof(one));
    (void)written; /* EAGAIN: the counter is full, so it is signalled */
}

/* An ingress leaves when its receive has ended, what it had taken is dealt with and every slot is back. True if it has
 * left. */
static bool finish_detach(struct engine *engine, struct ingress *ingress)
{
    if (ingress->armed || !ingress->kind->is_drained(ingress) || ingress->pool.free != ingress->pool.size)
        return false;
    count_overruns(engine, ingress);
    ingress->kind->leave(ingress, &engine->ring);
    engine->ingress[ingress->interface] = NULL;
    for (unsigned i = 0; i < engine->attached_count; i++)
        if (engine->attached[i] == ingress) {
            engine->attached[i] = engine->attached[--engine->attached_count];
            break;
        }
    if (ingress->detach_ticket)
        answer(engine, (struct answer){.public.ticket = ingress->detach_ticket, .ingress = ingress});
    else
        ingress_free(ingress); /* at the stop, when nobody waits for it */
    return true;
}

static void upkeep(struct engine *engine)
{
    uint64_t slots = 0, free = 0;

    /* Backwards, since the one that is looked at may leave. */
    for (unsigned i = engine->attached_count; i-- > 0;) {
        struct ingress *ingress = engine->attached[i];

        ingress->kind->publish(ingress);
        slots += ingress->pool.size;
        free += ingress->pool.free;
        if (ingress->detaching) {
            uint32_t size = ingress->pool.size;

            if (finish_detach(engine, ingress)) {
                slots -= size;
                free -= size;
            }
        } else if (ingress->failed) {
            engine->active = true; /* the timer lets it try again */
        } else if (!ingress->armed && ingress->kind->wants_arming(ingress, engine->busy_poll || engine->wait_ns)) {
            arm(engine, ingress);
        }
    }
    count_set(&engine->counters->pool_slots, slots);
    count_set(&engine->counters->pool_free, free);
    count(&engine->counters->batches, 1);
    if (engine->active && !engine->timer_armed && !engine->stopping)
        arm_timer(engine);
}

static void start_detach(struct engine *engine, struct ingress *ingress, uint64_t ticket)
{
    ingress->detaching = true;
    ingress->detach_ticket = ticket;
    if (ingress->armed) {
        struct io_uring_sqe *sqe = submission(engine);

        io_uring_prep_cancel64(sqe, user_data(KIND_RECEIVE, ingress->interface), 0);
        sqe->user_data = user_data(KIND_CANCEL, ingress->interface);
    }
}

/* --- commands, on the engine's thread ------------------------------------------------------------------------------ */

static int execute_attach(struct engine *engine, struct command *command)
{
    struct ingress *ingress = command->ingress;
    int error = engine->stopping                      ? -ECANCELED
                : engine->ingress[command->interface] ? -EEXIST
                                                      : ingress->kind->enter(ingress, &engine->ring);

    if (error)
        return error;
    engine->ingress[command->interface] = ingress;
    engine->attached[engine->attached_count++] = ingress;
    return 0;
}

static void execute(struct engine *engine, struct command *command)
{
    struct answer given = {.public.ticket = command->ticket};
    struct ingress *ingress;

    switch (command->kind) {
    case ATTACH_INGRESS:
        given.public.result = execute_attach(engine, command);
        if (given.public.result)
            given.ingress = command->ingress;
        break;
    case DETACH_INGRESS:
        ingress = engine->ingress[command->interface];
        if (ingress && !ingress->detaching) {
            start_detach(engine, ingress, command->ticket);
            return;
        }
        given.public.result = -ENOENT;
        break;
    case ATTACH_EGRESS:
        engine->egress[command->interface] =
            (struct egress){.fd = command->fd, .mtu = command->mtu, .segmentation = true,
                            .interface = (uint8_t)command->interface};
        break;
    case DETACH_EGRESS:
        given.public.result = engine->egress[command->interface].fd < 0 ? -ENOENT : 0;
        engine->egress[command->interface].fd = -1;
        break;
    case SET_RULES:
        given.table = engine->table;
        engine->table = command->table;
        break;
    case SET_OWN_ADDRESSES:
        given.addresses = engine->own;
        engine->own = command->addresses;
        break;
    case PROBE:
        break;
    case STOP:
        if (engine->stopping) {
            given.public.result = -EALREADY;
            break;
        }
        engine->stopping = true;
        engine->stop_ticket = command->ticket;
        for (unsigned i = 0; i < engine->attached_count; i++)
            if (!engine->attached[i]->detaching)
                start_detach(engine, engine->attached[i], 0);
        return;
    }
    answer(engine, given);
}

/* Between two batches: no run is in use and no packet is half prepared. */
static bool at_rest(const struct engine *engine)
{
    return !engine->runs.in_use && !engine->current.rule;
}

static void execute_commands(struct engine *engine)
{
    uint32_t head = atomic_load_explicit(&engine->commands.head, memory_order_relaxed);

    engine->commands_waiting = false;
    while (head != atomic_load_explicit(&engine->commands.tail, memory_order_acquire)) {
        execute(engine, &engine->commands.items[head & (COMMANDS_MAX - 1)]);
        atomic_store_explicit(&engine->commands.head, ++head, memory_order_release);
    }
}

/* --- the loop ------------------------------------------------------------------------------------------------------ */

static void complete(struct engine *engine, const struct io_uring_cqe *cqe)
{
    uint32_t index = (uint32_t)cqe->user_data;
    uint64_t notified;
    ssize_t size;

    switch ((enum kind)(cqe->user_data >> 56)) {
    case KIND_COMMAND:
        size = read(engine->command_fd, &notified, sizeof(notified));
        (void)size; /* EAGAIN: a notification already taken; the queue is looked at all the same */
        engine->commands_waiting = true;
        arm_command_poll(engine);
        break;
    case KIND_SEND:
        run_done(engine, (uint16_t)index, cqe->res);
        break;
    case KIND_RECEIVE:
        engine->ingress[index]->kind->complete(engine->ingress[index], cqe, engine->counters);
        break;
    case KIND_CANCEL:
        break; /* the receive's own last completion tells that it has ended */
    case KIND_TIMER:
        timer_fired(engine);
        break;
    }
}

static void reap(struct engine *engine)
{
    struct io_uring_cqe *cqe;
    unsigned head, seen = 0;

    io_uring_for_each_cqe(&engine->ring, head, cqe) {
        complete(engine, cqe);
        seen++;
    }
    io_uring_cq_advance(&engine->ring, seen);
}

/* Nothing for the kernel to do, and nothing that it has for us. */
static bool is_quiet(const struct io_uring *ring)
{
    return !io_uring_sq_ready(ring) && !io_uring_cq_ready(ring) &&
           !(IO_URING_READ_ONCE(*ring->sq.kflags) & (IORING_SQ_TASKRUN | IORING_SQ_CQ_OVERFLOW));
}

/* Submit what was prepared, and wait for what the next turn is for. */
static int enter(struct engine *engine, bool more)
{
    struct __kernel_timespec timeout = {.tv_nsec = (long long)engine->wait_ns};
    struct io_uring_cqe *first;
    int error;

    if (engine->busy_poll && is_quiet(&engine->ring))
        return 0;
    if (engine->busy_poll || more)
        return io_uring_submit_and_get_events(&engine->ring);
    if (!engine->wait_ns)
        return io_uring_submit_and_wait(&engine->ring, 1);
    error = io_uring_submit_and_wait_timeout(&engine->ring, &first, GATHERED_MAX, &timeout, NULL);
    return error == -ETIME ? 0 : error;
}

int engine_run(struct engine *engine)
{
    int error = io_uring_enable_rings(&engine->ring);
    bool more = false;

    if (error < 0)
        return error;
    arm_command_poll(engine);
    while (!engine->stopping || engine->attached_count) {
        error = enter(engine, more);
        /* EBUSY, EAGAIN: completions have to be taken first. */
        if (error < 0 && error != -EINTR && error != -EBUSY && error != -EAGAIN)
            return error;
        reap(engine);
        engine->taken = 0;
        engine->now_ns = 0;
        do {
            if (engine->commands_waiting && at_rest(engine))
                execute_commands(engine);
            more = forward(engine);
        } while (engine->commands_waiting && at_rest(engine));
        if (engine->pace.budget_ns)
            engine->wait_ns = pace_next(&engine->pace, turn_ns(engine), engine->taken);
        upkeep(engine);
    }
    answer(engine, (struct answer){.public.ticket = engine->stop_ticket});
    return 0;
}

/* What is submitted to a ring passes no system call filter, so this one takes only what is submitted above: whoever gets
 * hold of the process can open no file and no socket by it. In force once it is enabled. */
static int restrict_ring(struct io_uring *ring)
{
    struct io_uring_restriction allowed[] = {
        {.opcode = IORING_RESTRICTION_SQE_OP, .sqe_op = IORING_OP_POLL_ADD},
        {.opcode = IORING_RESTRICTION_SQE_OP, .sqe_op = IORING_OP_RECVMSG},
        {.opcode = IORING_RESTRICTION_SQE_OP, .sqe_op = IORING_OP_SENDMSG},
        {.opcode = IORING_RESTRICTION_SQE_OP, .sqe_op = IORING_OP_TIMEOUT},
        {.opcode = IORING_RESTRICTION_SQE_OP, .sqe_op = IORING_OP_ASYNC_CANCEL},
        {.opcode = IORING_RESTRICTION_SQE_FLAGS_ALLOWED, .sqe_flags = IOSQE_BUFFER_SELECT},
        {.opcode = IORING_RESTRICTION_REGISTER_OP, .register_op = IORING_REGISTER_PBUF_RING},
        {.opcode = IORING_RESTRICTION_REGISTER_OP, .register_op = IORING_UNREGISTER_PBUF_RING},
    };

    return io_uring_register_restrictions(ring, allowed, sizeof(allowed) / sizeof(*allowed));
}

/* --- the command side ---------------------------------------------------------------------------------------------- */

int engine_open(struct engine **out, struct counters_page *counters, int command_fd, int answer_fd,
                struct engine_pace pace)
{
    /* Disabled until engine_run, because the ring belongs to the thread that enables it (SINGLE_ISSUER). With
     * DEFER_TASKRUN receives are completed when we ask, in a batch, instead of by interrupting us. */
    struct io_uring_params params = {
        .flags = IORING_SETUP_R_DISABLED | IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN |
                 IORING_SETUP_CQSIZE | (pace.busy_poll ? IORING_SETUP_TASKRUN_FLAG : 0),
        .cq_entries = COMPLETIONS,
    };
    struct engine *engine;
    int error;

    if (pace.latency_budget_us > PACE_BUDGET_US_MAX)
        return -EINVAL;
    engine = calloc(1, sizeof(*engine));
    if (!engine)
        return -ENOMEM;
    engine->watches = loops_new();
    error = engine->watches ? io_uring_queue_init_params(SUBMISSIONS, &engine->ring, &params) : -ENOMEM;
    if (error < 0) {
        loops_free(engine->watches);
        free(engine);
        return error;
    }
    error = restrict_ring(&engine->ring);
    if (error < 0) {
        io_uring_queue_exit(&engine->ring);
        loops_free(engine->watches);
        free(engine);
        return error;
    }
    engine->counters = counters;
    engine->command_fd = command_fd;
    engine->answer_fd = answer_fd;
    engine->busy_poll = pace.busy_poll;
    engine->pace.budget_ns = pace.busy_poll ? 0 : (uint64_t)pace.latency_budget_us * 1000;
    for (unsigned i = 0; i < TABLE_INTERFACES_MAX; i++)
        engine->egress[i].fd = -1;
    runs_init(&engine->runs);
    *out = engine;
    return 0;
}

void engine_close(struct engine *engine)
{
    struct engine_answer ignored;
    uint32_t head = atomic_load(&engine->commands.head);

    io_uring_queue_exit(&engine->ring);
    while (engine_answer(engine, &ignored))
        ;
    for (; head != atomic_load(&engine->commands.tail); head++) {
        struct command *command = &engine->commands.items[head & (COMMANDS_MAX - 1)];

        ingress_free(command->ingress);
        table_free(command->table);
        addresses_free(command->addresses);
    }
    for (unsigned i = 0; i < engine->attached_count; i++)
        ingress_free(engine->attached[i]);
    table_free(engine->table);
    addresses_free(engine->own);
    loops_free(engine->watches);
    free(engine);
}

static int64_t submit(struct engine *engine, struct command command)
{
    uint32_t tail = atomic_load_explicit(&engine->commands.tail, memory_order_relaxed);
    const uint64_t one = 1;
    ssize_t written;

    if (engine->outstanding == COMMANDS_MAX)
        return -EBUSY;
    engine->outstanding++;
    command.ticket = ++engine->last_ticket;
    engine->commands.items[tail & (COMMANDS_MAX - 1)] = command;
    atomic_store_explicit(&engine->commands.tail, tail + 1, memory_order_release);
    written = write(engine->command_fd, &one, sizeof(one));
    (void)written; /* EAGAIN: the counter is full, so it is signalled */
    return (int64_t)command.ticket;
}

static int64_t submit_ingress(struct engine *engine, unsigned interface, bool loopback, struct ingress *ingress)
{
    int64_t ticket;

    ingress->loopback = loopback;
    ticket = submit(engine, (struct command){.kind = ATTACH_INGRESS, .interface = interface, .ingress = ingress});
    if (ticket < 0)
        ingress_free(ingress);
    return ticket;
}

int64_t engine_attach_receive(struct engine *engine, unsigned interface, int fd, bool loopback, uint32_t mtu,
                              uint32_t slots)
{
    struct ingress *ingress;
    int error = interface < TABLE_INTERFACES_MAX ? receive_new(&ingress, (uint8_t)interface, fd, mtu, slots) : -EINVAL;

    return error ? error : submit_ingress(engine, interface, loopback, ingress);
}

int64_t engine_attach_ring(struct engine *engine, unsigned interface, int fd, bool loopback, uint32_t block_size,
                           uint32_t blocks, uint32_t frame_size)
{
    const struct ring_geometry geometry = {block_size, blocks, frame_size};
    struct ingress *ingress;
    int error = interface < TABLE_INTERFACES_MAX ? ring_new(&ingress, (uint8_t)interface, fd, &geometry) : -EINVAL;

    return error ? error : submit_ingress(engine, interface, loopback, ingress);
}

static int64_t submit_plain(struct engine *engine, enum command_kind kind, unsigned interface)
{
    if (interface >= TABLE_INTERFACES_MAX)
        return -EINVAL;
    return submit(engine, (struct command){.kind = kind, .interface = interface});
}

int64_t engine_detach_ingress(struct engine *engine, unsigned interface)
{
    return submit_plain(engine, DETACH_INGRESS, interface);
}

int64_t engine_attach_egress(struct engine *engine, unsigned interface, int fd, uint32_t mtu)
{
    if (interface >= TABLE_INTERFACES_MAX || fd < 0)
        return -EINVAL;
    return submit(engine, (struct command){.kind = ATTACH_EGRESS, .interface = interface, .fd = fd, .mtu = mtu});
}

int64_t engine_detach_egress(struct engine *engine, unsigned interface)
{
    return submit_plain(engine, DETACH_EGRESS, interface);
}

int64_t engine_set_rules(struct engine *engine, const uint8_t *records, size_t length)
{
    struct table *table;
    int64_t ticket;
    int error = table_build(&table, records, length);

    if (error)
        return error;
    ticket = submit(engine, (struct command){.kind = SET_RULES, .table = table});
    if (ticket < 0)
        table_free(table);
    return ticket;
}

int64_t engine_set_own_addresses(struct engine *engine, const uint8_t *packed, size_t length)
{
    struct addresses *addresses;
    int64_t ticket;
    int error = addresses_build(&addresses, packed, length);

    if (error)
        return error;
    ticket = submit(engine, (struct command){.kind = SET_OWN_ADDRESSES, .addresses = addresses});
    if (ticket < 0)
        addresses_free(addresses);
    return ticket;
}

int64_t engine_probe(struct engine *engine)
{
    return submit_plain(engine, PROBE, 0);
}

int64_t engine_stop(struct engine *engine)
{
    return submit_plain(engine, STOP, 0);
}

int engine_answer(struct engine *engine, struct engine_answer *out)
{
    uint32_t head = atomic_load_explicit(&engine->answers.head, memory_order_relaxed);
    struct answer *answer;

    if (head == atomic_load_explicit(&engine->answers.tail, memory_order_acquire))
        return 0;
    answer = &engine->answers.items[head & (COMMANDS_MAX - 1)];
    *out = answer->public;
    ingress_free(answer->ingress);
    table_free(answer->table);
    addresses_free(answer->addresses);
    atomic_store_explicit(&engine->answers.head, head + 1, memory_order_release);
    engine->outstanding--;
    return 1;
}

/* SPDX-License-Identifier: Apache-2.0 */
/* engine.c: the loop, what io_uring completes, and the upkeep of what is attached. See core.h. */
#include "core.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

enum {
    SUBMISSIONS = 1024,  /* all sends, a receive and a cancel per packet socket, timer, command poll */
    COMPLETIONS = 8192,  /* a full pool and all sends; the kernel keeps what exceeds it aside */
    GATHERED_MAX = 64, /* completions that end a wait for company before its time */
    STATISTICS_MS = 100,   /* how often the sockets are asked for overruns while packets come */
};

static_assert((int)RUNS_MAX + 2 * (int)TABLE_INTERFACES_MAX + 2 <= (int)SUBMISSIONS,
              "a turn's submissions fit, but for ordinary sockets");
static_assert((int)COUNTERS_INTERFACES_MAX == (int)TABLE_INTERFACES_MAX, "one set of counters for each slot");

struct io_uring_sqe *core_submission(struct engine *engine)
{
    struct io_uring_sqe *sqe = io_uring_get_sqe(&engine->ring);

    /* Full only where hundreds of ordinary sockets (datagrams.h) are armed, or cancelled, in one turn: as many again as
     * the interfaces have, which the count above leaves out. A submission makes room. */
    while (!sqe) {
        io_uring_submit(&engine->ring);
        sqe = io_uring_get_sqe(&engine->ring);
    }
    return sqe;
}

static uint64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now); /* needs no system call */
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

uint64_t core_turn_ns(struct engine *engine)
{
    if (!engine->now_ns)
        engine->now_ns = now_ns();
    return engine->now_ns;
}

/* --- upkeep ------------------------------------------------------------------------------------------------------- */

static void arm_command_poll(struct engine *engine)
{
    struct io_uring_sqe *sqe = core_submission(engine);

    /* Poll, then read(2): a read submitted to io_uring on a non-blocking descriptor does not wait, it fails. */
    io_uring_prep_poll_add(sqe, engine->command_fd, POLLIN);
    sqe->user_data = user_data(KIND_COMMAND, 0);
}

static void arm(struct engine *engine, struct ingress *ingress)
{
    struct io_uring_sqe *sqe = core_submission(engine);

    sqe->user_data = user_data(KIND_RECEIVE, ingress->interface);
    ingress->kind->arm(ingress, sqe);
    ingress->armed = true;
}

static void arm_timer(struct engine *engine)
{
    static struct __kernel_timespec interval = {.tv_nsec = STATISTICS_MS * 1000000LL};
    struct io_uring_sqe *sqe = core_submission(engine);

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
    if (reassembly_waits(engine->reassembly)) {
        forward_fragments_lost(engine, reassembly_expire(engine->reassembly, core_turn_ns(engine)));
        engine->active = true; /* the timer goes on */
    }
}

/* Cancel what waits at sockets that go, and answer for those that have gone. */
static void see_off_sockets(struct engine *engine, struct ingress *ingress)
{
    const struct ingress_sockets *sockets = ingress->kind->sockets;
    uint64_t ticket;
    uint32_t part;

    while (sockets->cancel(ingress, &part)) {
        struct io_uring_sqe *sqe = core_submission(engine);

        io_uring_prep_cancel64(sqe, user_data(KIND_RECEIVE, part << INGRESS_PART_SHIFT | ingress->interface), 0);
        sqe->user_data = user_data(KIND_CANCEL, ingress->interface);
    }
    while ((ticket = sockets->ended(ingress)) != 0)
        commands_answer(engine, (struct answer){.public.ticket = ticket});
}

/* An ingress leaves when its receive has ended, what it had taken is dealt with and every slot is back. True if it has
 * left. */
static bool finish_detach(struct engine *engine, struct ingress *ingress)
{
    if (ingress->armed || !ingress->kind->is_drained(ingress) || ingress->pool.free != ingress->pool.size)
        return false;
    count_overruns(engine, ingress);
    forward_fragments_lost(engine, reassembly_forget(engine->reassembly, ingress->interface));
    ingress->kind->leave(ingress, &engine->ring);
    engine->ingress[ingress->interface] = NULL;
    for (unsigned i = 0; i < engine->attached_count; i++)
        if (engine->attached[i] == ingress) {
            engine->attached[i] = engine->attached[--engine->attached_count];
            break;
        }
    if (ingress->detach_ticket)
        commands_answer(engine, (struct answer){.public.ticket = ingress->detach_ticket, .ingress = ingress});
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
        if (ingress->kind->sockets)
            see_off_sockets(engine, ingress);
        slots += ingress->pool.size;
        free += ingress->pool.free;
        if (ingress->detaching) {
            uint32_t size = ingress->pool.size;

            if (finish_detach(engine, ingress)) {
                slots -= size;
                free -= size;
            }
            continue;
        }
        engine->active |= ingress->failed; /* the timer lets it try again */
        while ((ingress->kind->sockets || !(ingress->failed || ingress->armed)) &&
               ingress->kind->wants_arming(ingress, engine->busy_poll || engine->wait_ns))
            arm(engine, ingress);
    }
    count_set(&engine->counters->pool_slots, slots);
    count_set(&engine->counters->pool_free, free);
    count(&engine->counters->batches, engine->taken > 0);
    if (engine->active && !engine->timer_armed && !engine->stopping)
        arm_timer(engine);
}

void core_start_detach(struct engine *engine, struct ingress *ingress, uint64_t ticket)
{
    ingress->detaching = true;
    ingress->detach_ticket = ticket;
    if (ingress->armed && !ingress->kind->sockets) {
        struct io_uring_sqe *sqe = core_submission(engine);

        io_uring_prep_cancel64(sqe, user_data(KIND_RECEIVE, ingress->interface), 0);
        sqe->user_data = user_data(KIND_CANCEL, ingress->interface);
    }
}

/* Between two batches: no run is in use and no packet is half prepared. */
static bool at_rest(const struct engine *engine)
{
    return !engine->runs.in_use && !engine->current.rule;
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
        forward_sent(engine, (uint16_t)index, cqe->res);
        break;
    case KIND_RECEIVE:
        index &= (1u << INGRESS_PART_SHIFT) - 1;
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
                commands_execute(engine);
            more = forward_batch(engine);
        } while (engine->commands_waiting && at_rest(engine));
        if (engine->pace.budget_ns)
            engine->wait_ns = pace_next(&engine->pace, core_turn_ns(engine), engine->taken);
        upkeep(engine);
    }
    commands_answer(engine, (struct answer){.public.ticket = engine->stop_ticket});
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

/* --- life ----------------------------------------------------------------------------------------------------------- */

static void free_memory(struct engine *engine)
{
    reassembly_free(engine->reassembly);
    loops_free(engine->watches);
    free(engine);
}

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
    engine->reassembly = reassembly_new();
    error = engine->watches && engine->reassembly ? io_uring_queue_init_params(SUBMISSIONS, &engine->ring, &params)
                                                  : -ENOMEM;
    if (error < 0) {
        free_memory(engine);
        return error;
    }
    error = restrict_ring(&engine->ring);
    if (error < 0) {
        io_uring_queue_exit(&engine->ring);
        free_memory(engine);
        return error;
    }
    engine->counters = counters;
    engine->command_fd = command_fd;
    engine->answer_fd = answer_fd;
    engine->busy_poll = pace.busy_poll;
    engine->pace.budget_ns = pace.busy_poll ? 0 : (uint64_t)pace.latency_budget_us * 1000;
    for (unsigned i = 0; i < TABLE_EGRESSES; i++)
        engine->egress[i].fd = -1;
    runs_init(&engine->runs);
    taps_init(&engine->taps);
    engine->runs.identification = (uint32_t)now_ns() | 1; /* not that of an engine before, or of another worker */
    *out = engine;
    return 0;
}

void engine_close(struct engine *engine)
{
    io_uring_queue_exit(&engine->ring);
    commands_drain(engine);
    for (unsigned i = 0; i < engine->attached_count; i++)
        ingress_free(engine->attached[i]);
    table_free(engine->table);
    addresses_free(engine->own);
    free_memory(engine);
}

/* SPDX-License-Identifier: Apache-2.0 */
/* forward.c: the way of packets, from an ingress to the runs of their outputs. See core.h. */
#include "core.h"

enum {
    PACKETS_PER_TURN = 64, /* of one interface, before the next one's turn */
    PACKETS_PER_BATCH = 512, /* gathered into runs before they are sent: enough for 64 segments of several flows */
    PAYLOAD_AT = 32, /* in most packets: behind the headers of IPv4 and UDP, 28 bytes, and well into the first 8 of it */
};

static_assert(POOL_HOLDERS_MAX == 1 + (int)TABLE_OUTPUTS_PER_RULE_MAX * (int)PACKET_DATAGRAMS_MAX,
              "a send for each datagram and output, and the engine");
static_assert((int)PACKET_DATAGRAMS_MAX <= (int)UINT8_MAX, "a slot counts its datagrams in a byte");

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
    if (state->tapped)
        taps_settle(&engine->taps, state->tapped, state->copies_sent ? DROP_NONE : (enum drop_reason)state->reason);
    if (state->reassembled)
        reassembly_release(engine->reassembly, state->reassembled);
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
    count(&engine->counters->outputs[output].dropped[counters_output_drop(reason)], datagrams);
    if (state->tapped)
        taps_drop(&engine->taps, state->tapped, output, datagrams, reason);
}

void forward_sent(struct engine *engine, uint16_t index, int result)
{
    struct run *run = runs_finish(&engine->runs, index, &result);
    struct counters_page *counters = engine->counters;
    struct counters_output *output;

    if (!run)
        return; /* a fragment, and not the last */
    output = &counters->outputs[run->output];
    if (result >= 0) {
        count(&output->packets, run->datagrams);
        count(&output->bytes, run->bytes);
        count(&counters->copies, run->datagrams);
        count(&counters->copies_bytes, run->bytes);
        count(&counters->sends, 1);
        for (uint16_t i = 0; i < run->count; i++)
            run->ingress->pool.slots[run->slots[i]].copies_sent = 1;
    } else if (runs_refuse_segments(&engine->runs, run, result)) {
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
    runs_release(&engine->runs, run);
}

static void submit_run(void *context, struct run *run, uint16_t index)
{
    struct engine *engine = context;
    struct io_uring_sqe *sqe = core_submission(engine);

    io_uring_prep_sendmsg(sqe, run->egress->fd, &run->message, MSG_DONTWAIT | MSG_NOSIGNAL);
    sqe->user_data = user_data(KIND_SEND, index);
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
    verdict = loops_judge(watch, rule->id, packet, core_turn_ns(engine));
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

void forward_fragments_lost(struct engine *engine, uint32_t lost)
{
    count(&engine->counters->received, lost);
    count(&engine->counters->dropped[DROP_FRAGMENT], lost);
}

/* A frame that packet_parse has called a fragment: with the last one of its packet, that is what the frame is from now on,
 * parsed, and the slot is its. False if there is no packet: the slot is given back, and what is to be counted has been. */
static bool reassemble(struct engine *engine, struct ingress *ingress, uint32_t slot, const struct frame *frame,
                       struct packet *packet, enum drop_reason *reason)
{
    struct packet_fragment fragment;
    uint32_t lost = 0;
    uint8_t handle;
    const uint8_t *data;
    size_t length;

    if (!packet_parse_fragment(frame->data, frame->length, &fragment))
        return true;
    handle = reassembly_add(engine->reassembly, &fragment, ingress->interface, frame->vlan, core_turn_ns(engine), &lost);
    forward_fragments_lost(engine, lost);
    if (!handle) {
        pool_release(&ingress->pool, slot);
        ingress->kind->give_back(ingress, slot);
        return false;
    }
    ingress->pool.slots[slot].reassembled = handle;
    data = reassembly_packet(engine->reassembly, handle, &length);
    *reason = packet_parse(data, length, false, packet); /* one of fragments of fragments remains a fragment */
    return true;
}

/* Note the current packet, if somebody watches its rule. */
static uint16_t tap(struct engine *engine, const struct ingress *ingress, const struct frame *frame, uint8_t reassembled,
                    const struct table_rule *rule)
{
    const uint8_t *data = frame->packet ? NULL : frame->data;
    size_t length = frame->length;

    if (reassembled)
        data = reassembly_packet(engine->reassembly, reassembled, &length);
    return taps_take(&engine->taps, rule->counter, rule->outputs_count, ingress->interface, &engine->current.packet, data,
                     length, frame->arrived_ns);
}

/* Look at a packet just taken from an ingress queue: make it the current one, or drop it. */
static void begin(struct engine *engine, struct ingress *ingress, uint32_t slot, const struct frame *frame)
{
    struct pool_slot *state = &ingress->pool.slots[slot];
    struct packet *packet = &engine->current.packet;
    const struct table_rule *rule = NULL;
    enum drop_reason reason = frame->reason;

    engine->active = true;
    count(&engine->counters->interfaces[ingress->interface].frames, 1);
    if (reason == DROP_NONE && frame->packet) {
        *packet = *frame->packet;
    } else if (reason == DROP_NONE) {
        __builtin_prefetch(frame->data + PAYLOAD_AT); /* loops_judge reads the payload's beginning: 100 ns from memory */
        reason = packet_parse(frame->data, frame->length, frame->checksum_vouched, packet);
        if (reason == DROP_FRAGMENT && !reassemble(engine, ingress, slot, frame, packet, &reason))
            return;
    }
    count(&engine->counters->received, 1);
    if (reason == DROP_NONE) {
        packet->vlan = frame->vlan;
        packet->segment = frame->segment < packet->payload_length ? frame->segment : 0;
        if (packet_datagrams(packet) > PACKET_DATAGRAMS_MAX)
            reason = DROP_MERGED;
    }
    if (reason == DROP_NONE) {
        state->datagrams = (uint8_t)packet_datagrams(packet);
        count(&engine->counters->received, state->datagrams - 1u);
        count(&engine->counters->received_bytes, packet->payload_length);
        rule = engine->table ? table_find(engine->table, packet, ingress->interface) : NULL;
        reason = rule ? admit(engine, ingress, packet, rule) : packet->vlan ? DROP_VLAN_TAGGED : DROP_NO_RULE;
        if (engine->taps.open && rule)
            state->tapped = tap(engine, ingress, frame, state->reassembled, rule);
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

/* Whether a copy for an output that is not plain may leave, and with which heading. */
static enum drop_reason weigh(struct engine *engine, const struct table_output *output, const struct packet *packet,
                              struct heading *heading, uint64_t *cost)
{
    const uint64_t rule = engine->current.rule->id;
    const struct egress *egress = &engine->egress[output->egress];
    enum drop_reason reason;

    if (output->flags & OUTPUT_PAUSED)
        return DROP_PAUSED;
    if (output->flags & OUTPUT_SPLIT_HORIZON)
        return DROP_SPLIT_HORIZON;
    if (egress->fd < 0)
        return DROP_EGRESS_UNREACHABLE;
    reason = heading_make(heading, output, packet, &egress->link);
    if (reason != DROP_NONE || output->rate_unit == RATE_NONE)
        return reason;
    *cost = limit_cost(output, packet_datagrams(packet), packet->payload_length, heading_length(heading));
    if (!limit_admits(&engine->limits[output->counter], output, rule, *cost, core_turn_ns(engine)))
        return DROP_EGRESS_LIMITED;
    return DROP_NONE;
}

/* Append the copies of the current packet to their runs. False if the runs ran out: go on after some have completed. */
static bool copy_current(struct engine *engine)
{
    struct ingress *ingress = engine->current.ingress;
    uint32_t slot = engine->current.slot;
    const struct table_rule *rule = engine->current.rule;
    const struct packet *packet = &engine->current.packet;

    while (engine->current.next_output < rule->outputs_count) {
        const struct table_output *output = &rule->outputs[engine->current.next_output];
        struct egress *egress = &engine->egress[output->egress];
        enum drop_reason reason = egress->fd < 0 ? DROP_EGRESS_UNREACHABLE : DROP_NONE;
        struct heading heading;
        uint64_t cost = 0;

        if (!output->plain)
            reason = weigh(engine, output, packet, &heading, &cost);
        if (reason != DROP_NONE) {
            drop_copies(engine, ingress, slot, output->counter, ingress->pool.slots[slot].datagrams, reason);
        } else {
            if (runs_append(&engine->runs, egress, output, output->plain ? NULL : &heading, packet, ingress, slot,
                            submit_run, engine) == NO_RUN_FREE)
                return false;
            pool_hold(&ingress->pool, slot);
            if (cost)
                limit_charge(&engine->limits[output->counter], output, rule->id, cost, core_turn_ns(engine));
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

bool forward_batch(struct engine *engine)
{
    unsigned taken = 0;
    bool blocked = !runs_send_again(&engine->runs, submit_run, engine) ||
                   (engine->current.rule && !copy_current(engine)) || !reassembly_has_room(engine->reassembly);

    while (!blocked && !engine->commands_waiting && taken < PACKETS_PER_BATCH && next_packet(engine)) {
        taken++;
        /* What has to be sent datagram by datagram, or in fragments, goes before anything that came later. */
        blocked = (engine->current.rule && !copy_current(engine)) || runs_are_behind(&engine->runs) ||
                  !reassembly_has_room(engine->reassembly);
    }
    runs_flush(&engine->runs, submit_run, engine);
    engine->taken += taken;
    /* Where only completions are missing, nobody has to wait for company. */
    for (unsigned i = 0; i < engine->attached_count; i++)
        blocked |= engine->attached[i]->needs_room;
    return taken == PACKETS_PER_BATCH || blocked;
}

/* SPDX-License-Identifier: Apache-2.0 */
#include "loops.h"

#include <stdlib.h>
#include <string.h>

struct loop_watch *loops_new(void)
{
    const size_t size = COUNTERS_RULES_MAX * sizeof(struct loop_watch);
    struct loop_watch *watches = aligned_alloc(alignof(struct loop_watch), size);

    if (watches)
        memset(watches, 0, size);
    return watches;
}

void loops_free(struct loop_watch *watches)
{
    free(watches);
}

static uint32_t source_of(const struct packet *packet)
{
    return (uint32_t)(address_hash(&packet->source) >> 32);
}

static uint64_t first_of(const struct packet *packet)
{
    uint64_t bytes = 0;

    if (packet->payload_length >= sizeof(bytes))
        memcpy(&bytes, packet->payload, sizeof(bytes));
    else
        memcpy(&bytes, packet->payload, packet->payload_length);
    return bytes;
}

static uint64_t last_of(const struct packet *packet)
{
    uint64_t bytes;

    if (packet->payload_length < sizeof(bytes))
        return first_of(packet);
    memcpy(&bytes, packet->payload + packet->payload_length - sizeof(bytes), sizeof(bytes));
    return bytes;
}

static bool is_watched(const struct loop_watch *watch, const struct packet *packet)
{
    return watch->length == packet->payload_length && watch->first == first_of(packet) &&
           watch->last == last_of(packet);
}

static bool is_returning(const struct loop_watch *watch)
{
    return watch->returns >= LOOP_RETURNS_PER_REPEAT * (UINT64_C(1) + watch->repeats);
}

/* Of the watched payload and who returns it; never 0. */
static uint32_t fingerprint(const struct loop_watch *watch)
{
    uint64_t mixed = watch->first * UINT64_C(0x9e3779b97f4a7c15) ^ watch->last * UINT64_C(0xc2b2ae3d27d4eb4f) ^
                     ((uint64_t)watch->length << 32 | watch->returner) * UINT64_C(0x165667b19e3779f9);

    return (uint32_t)(mixed >> 32) | 1;
}

static void count_up(uint16_t *counted)
{
    if (*counted < UINT16_MAX)
        (*counted)++;
}

/* Whether this packet is to be watched instead. */
static bool is_due(const struct loop_watch *watch, const struct packet *packet, uint64_t now_ns)
{
    const uint64_t age_ns = now_ns - watch->armed_ns;

    if (!watch->is_armed)
        return true;
    if (age_ns <= LOOP_ALTERNATE_NS)
        return false;
    if (is_returning(watch))
        return age_ns > LOOP_RETURNING_NS;
    return age_ns > LOOP_WATCH_NS || watch->source != source_of(packet);
}

static void arm(struct loop_watch *watch, const struct packet *packet, uint64_t now_ns)
{
    watch->is_armed = true;
    watch->armed_ns = now_ns;
    watch->length = (uint32_t)packet->payload_length;
    watch->first = first_of(packet);
    watch->last = last_of(packet);
    watch->source = source_of(packet);
    watch->repeats = 0;
    watch->returns = 0;
}

/* Whether a suspended rule's payload comes back although the rule does not send it. */
static bool is_no_loop(const struct loop_watch *watch, const struct packet *packet, uint64_t now_ns)
{
    const uint64_t left_ns = watch->suspended_until_ns - now_ns;

    return left_ns + LOOP_DRAIN_NS <= watch->suspension_s * UINT64_C(1000000000) && is_watched(watch, packet) &&
           source_of(packet) == watch->returner;
}

static void acquit(struct loop_watch *watch, uint64_t now_ns)
{
    watch->acquitted = fingerprint(watch);
    watch->suspended_until_ns = now_ns;
    watch->suspension_s = 0;
}

static void suspend(struct loop_watch *watch, uint64_t now_ns)
{
    const uint64_t second_ns = 1000000000;
    uint64_t last_ns = watch->suspension_s * second_ns;

    if (now_ns - watch->suspended_until_ns >= LOOP_REST * last_ns)
        watch->suspension_s = LOOP_SUSPENSION_S;
    else if (watch->suspension_s < LOOP_SUSPENSION_MAX_S)
        watch->suspension_s *= 2;
    watch->suspended_until_ns = now_ns + watch->suspension_s * second_ns;
    watch->is_armed = false;
}

enum loop_verdict loops_judge(struct loop_watch *watch, uint64_t rule, const struct packet *packet, uint64_t now_ns)
{
    uint32_t source;

    if (watch->rule != rule)
        *watch = (struct loop_watch){.rule = rule};
    if (now_ns < watch->suspended_until_ns) {
        if (!is_no_loop(watch, packet, now_ns))
            return LOOP_SUSPENDED;
        acquit(watch, now_ns);
        return LOOP_ACQUITTED;
    }
    if (is_due(watch, packet, now_ns)) {
        arm(watch, packet, now_ns);
        return LOOP_NONE;
    }
    if (!is_watched(watch, packet))
        return LOOP_NONE;
    source = source_of(packet);
    if (source == watch->source) {
        count_up(&watch->repeats);
    } else if (!watch->returns || source == watch->returner) {
        watch->returner = source;
        count_up(&watch->returns);
    }
    if (watch->returns < LOOP_RETURNS_MIN || !is_returning(watch) || fingerprint(watch) == watch->acquitted)
        return LOOP_NONE;
    suspend(watch, now_ns);
    return LOOP_FOUND;
}

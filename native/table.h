/* SPDX-License-Identifier: Apache-2.0 */
/*
 * table.h: the compiled rules of one worker, as the engine looks them up.
 *
 * A table is built whole from a binary description, never changed, and replaced between two batches: what the engine
 * reads never moves under it. Building and freeing happen on the command side, so the engine allocates nothing.
 *
 * The description is a sequence of records, native byte order: a `struct table_rule_record` followed by as many
 * `struct table_output_record` as it says. src/mcrelay/rules.py writes the same layout.
 */
#ifndef MCRELAY_TABLE_H
#define MCRELAY_TABLE_H

#include "packet.h"

enum {
    /* Interfaces a worker can know. Slots are small numbers given out by the supervisor, so that a rule keeps its slot
     * when its interface is re-created with another index. */
    TABLE_INTERFACES_MAX = 64,
    TABLE_OUTPUTS_PER_RULE_MAX = 1024,
};

struct table_rule_record {
    uint8_t group[16];
    uint16_t port; /* host byte order, as all numbers here */
    uint16_t ingress; /* interface slot */
    uint16_t outputs; /* records that follow */
    uint16_t reserved;
    uint32_t counter; /* index into counters_page.rules */
    uint32_t reserved2;
};

struct table_output_record {
    uint8_t address[16];
    uint16_t port;
    uint16_t egress; /* interface slot */
    uint8_t ttl; /* 0: one less than it came with, never below 1 */
    uint8_t reserved[3];
    uint32_t counter; /* index into counters_page.outputs */
    uint32_t reserved2;
};

static_assert(sizeof(struct table_rule_record) == 32, "layout shared with rules.py");
static_assert(sizeof(struct table_output_record) == 32, "layout shared with rules.py");

struct table_output {
    union address address;
    uint32_t counter;
    uint16_t port;
    uint8_t egress;
    uint8_t ttl;
};

struct table_rule {
    union address group;
    uint16_t port;
    uint8_t ingress;
    uint32_t counter;
    uint32_t outputs_count;
    const struct table_output *outputs;
    uint64_t hash; /* of group, port and ingress: tells the rule from others in tables before and after this one */
};

struct table;

/* Build a table from `length` bytes of records. On success 0 and *out; -EINVAL if the description is not one (wrong
 * length, a number out of range, the same input twice), -ENOMEM. */
int table_build(struct table **out, const uint8_t *records, size_t length);

void table_free(struct table *table);

uint32_t table_rules(const struct table *table);

/* The rule for a datagram to `group`:`port` that came in on interface slot `ingress`, or NULL. */
const struct table_rule *table_find(const struct table *table, const union address *group, uint16_t port,
                                    uint8_t ingress);

#endif

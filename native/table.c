/* SPDX-License-Identifier: Apache-2.0 */
#include "table.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

struct table {
    uint32_t rules_count;
    uint32_t mask; /* buckets - 1; at most half of the buckets are used, so a probe always ends */
    uint32_t *buckets; /* index into rules + 1, 0 = empty */
    struct table_rule *rules;
    struct table_output *outputs;
};

static uint64_t hash(const union address *group, uint16_t port, uint8_t ingress)
{
    uint64_t h = address_hash(group);

    return (h ^ h >> 29 ^ ((uint64_t)port << 8 | ingress)) * ADDRESS_MULTIPLIER;
}

/* Where the search for a hash begins: its upper bits are the best. */
static uint32_t bucket(const struct table *table, uint64_t hash)
{
    return (uint32_t)(hash >> 32) & table->mask;
}

static bool matches(const struct table_rule *rule, const union address *group, uint16_t port, uint8_t ingress)
{
    return rule->port == port && rule->ingress == ingress &&
           memcmp(rule->group.bytes, group->bytes, sizeof(group->bytes)) == 0;
}

/* Count rules and outputs and check that the records fill the description exactly. */
static int measure(const uint8_t *records, size_t length, size_t *rules, size_t *outputs)
{
    size_t at = 0;

    *rules = 0;
    *outputs = 0;
    while (at < length) {
        struct table_rule_record record;
        size_t needed;

        if (length - at < sizeof(record))
            return -EINVAL;
        memcpy(&record, records + at, sizeof(record));
        at += sizeof(record);
        needed = record.outputs * sizeof(struct table_output_record);
        if (record.outputs == 0 || record.outputs > TABLE_OUTPUTS_PER_RULE_MAX || length - at < needed ||
            record.ingress >= TABLE_INTERFACES_MAX || record.counter >= COUNTERS_RULES_MAX)
            return -EINVAL;
        at += needed;
        *rules += 1;
        *outputs += record.outputs;
    }
    if (*rules > COUNTERS_RULES_MAX || *outputs > COUNTERS_OUTPUTS_MAX)
        return -EINVAL;
    return 0;
}

static int add_output(struct table_output *output, const uint8_t *bytes)
{
    struct table_output_record record;

    memcpy(&record, bytes, sizeof(record));
    if (record.egress >= TABLE_INTERFACES_MAX || record.counter >= COUNTERS_OUTPUTS_MAX)
        return -EINVAL;
    memcpy(output->address.bytes, record.address, sizeof(record.address));
    output->port = record.port;
    output->egress = (uint8_t)record.egress;
    output->ttl = record.ttl;
    output->counter = record.counter;
    return 0;
}

static int add_rule(struct table *table, const struct table_rule_record *record, const struct table_output *outputs)
{
    struct table_rule *rule = &table->rules[table->rules_count];
    uint32_t at;

    memcpy(rule->group.bytes, record->group, sizeof(record->group));
    rule->port = record->port;
    rule->ingress = (uint8_t)record->ingress;
    rule->counter = record->counter;
    rule->outputs_count = record->outputs;
    rule->outputs = outputs;
    if (table_find(table, &rule->group, rule->port, rule->ingress))
        return -EINVAL;
    rule->hash = hash(&rule->group, rule->port, rule->ingress);
    at = bucket(table, rule->hash);
    while (table->buckets[at])
        at = (at + 1) & table->mask;
    table->buckets[at] = ++table->rules_count;
    return 0;
}

int table_build(struct table **out, const uint8_t *records, size_t length)
{
    size_t rules, outputs, at = 0, next_output = 0, buckets = 2;
    struct table *table;
    int error = measure(records, length, &rules, &outputs);

    if (error)
        return error;
    while (buckets < rules * 2)
        buckets *= 2;
    table = calloc(1, sizeof(*table));
    if (!table)
        return -ENOMEM;
    table->mask = (uint32_t)buckets - 1;
    table->buckets = calloc(buckets, sizeof(*table->buckets));
    table->rules = calloc(rules + 1, sizeof(*table->rules)); /* + 1: calloc(0) may be NULL */
    table->outputs = calloc(outputs + 1, sizeof(*table->outputs));
    if (!table->buckets || !table->rules || !table->outputs) {
        table_free(table);
        return -ENOMEM;
    }
    while (at < length && !error) {
        struct table_rule_record record;
        struct table_output *first = &table->outputs[next_output];

        memcpy(&record, records + at, sizeof(record));
        at += sizeof(record);
        for (size_t i = 0; i < record.outputs && !error; i++) {
            error = add_output(&table->outputs[next_output++], records + at);
            at += sizeof(struct table_output_record);
        }
        if (!error)
            error = add_rule(table, &record, first);
    }
    if (error) {
        table_free(table);
        return error;
    }
    *out = table;
    return 0;
}

void table_free(struct table *table)
{
    if (!table)
        return;
    free(table->buckets);
    free(table->rules);
    free(table->outputs);
    free(table);
}

uint32_t table_rules(const struct table *table)
{
    return table->rules_count;
}

const struct table_rule *table_find(const struct table *table, const union address *group, uint16_t port,
                                    uint8_t ingress)
{
    uint32_t at = bucket(table, hash(group, port, ingress));

    while (table->buckets[at]) {
        const struct table_rule *rule = &table->rules[table->buckets[at] - 1];

        if (matches(rule, group, port, ingress))
            return rule;
        at = (at + 1) & table->mask;
    }
    return NULL;
}

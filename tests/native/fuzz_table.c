/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fuzz_table.c: table_build on any bytes. What has to hold: a description is refused, with nothing made of it, or each
 * of its rules is found with what the record says, within the limits that the engine relies on (it indexes counters and
 * interfaces without looking again), and a rule that is not in it is not found.
 */
#include "table.h"

#include "check.h"
#include "description.h"
#include "fuzz.h"

#include <errno.h>

static void check_rule(const struct table *table, const struct table_rule_record *record, const uint8_t *outputs)
{
    union address group;
    const struct table_rule *rule;

    memcpy(group.bytes, record->group, sizeof(group.bytes));
    rule = table_find(table, &group, record->port, (uint8_t)record->ingress);
    CHECK(rule);
    CHECK_BYTES(rule->group.bytes, record->group, sizeof(record->group));
    CHECK_EQUAL(rule->port, record->port);
    CHECK_EQUAL(rule->ingress, record->ingress);
    CHECK(rule->ingress < TABLE_INTERFACES_MAX);
    CHECK_EQUAL(rule->counter, record->counter);
    CHECK(rule->counter < COUNTERS_RULES_MAX);
    CHECK_EQUAL(rule->outputs_count, record->outputs);
    CHECK(rule->outputs_count > 0 && rule->outputs_count <= TABLE_OUTPUTS_PER_RULE_MAX);
    for (uint32_t i = 0; i < rule->outputs_count; i++) {
        const struct table_output *output = &rule->outputs[i];
        struct table_output_record expected;

        memcpy(&expected, outputs + i * sizeof(expected), sizeof(expected));
        CHECK_BYTES(output->address.bytes, expected.address, sizeof(expected.address));
        CHECK_EQUAL(output->port, expected.port);
        CHECK_EQUAL(output->ttl, expected.ttl);
        CHECK_EQUAL(output->egress, expected.egress);
        CHECK(output->egress < TABLE_INTERFACES_MAX);
        CHECK_EQUAL(output->counter, expected.counter);
        CHECK(output->counter < COUNTERS_OUTPUTS_MAX);
    }
    CHECK(!table_find(table, &group, record->port, TABLE_INTERFACES_MAX));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct table *table = NULL;
    uint8_t *records = exact_copy(data, size);
    int error = table_build(&table, records, size);
    uint32_t rules = 0;

    free(records); /* a table keeps nothing of its description */
    if (error) {
        CHECK_EQUAL(error, -EINVAL);
        CHECK(!table);
        return 0;
    }
    CHECK(table);
    for (size_t at = 0; at < size; rules++) {
        struct table_rule_record record;

        CHECK(size - at > sizeof(record));
        memcpy(&record, data + at, sizeof(record));
        at += sizeof(record);
        CHECK(record.outputs * sizeof(struct table_output_record) <= size - at);
        check_rule(table, &record, data + at);
        at += record.outputs * sizeof(struct table_output_record);
    }
    CHECK_EQUAL(table_rules(table), rules);
    table_free(table);
    return 0;
}

#ifndef FUZZ_LIBFUZZER
static size_t fuzz_seed(uint8_t *out, uint64_t *state)
{
    struct description description = {0};
    size_t length;

    for (uint32_t rules = random_below(state, 6); rules; rules--) {
        uint16_t outputs = (uint16_t)(1 + random_below(state, 5));

        /* Few different inputs, so that some are there twice. */
        description_rule(&description, 0xe9fc0000 + random_below(state, 16), 5000, (uint16_t)random_below(state, 4),
                         outputs, random_below(state, COUNTERS_RULES_MAX));
        for (; outputs; outputs--)
            description_output(&description, 0xc6336401, (uint16_t)random_next(state),
                               (uint16_t)random_below(state, TABLE_INTERFACES_MAX), (uint8_t)random_next(state),
                               random_below(state, COUNTERS_OUTPUTS_MAX));
    }
    length = description.length;
    CHECK(length <= FUZZ_INPUT_MAX);
    if (length)
        memcpy(out, description.bytes, length);
    description_free(&description);
    return length;
}
#endif

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fuzz_table.c: table_build on any bytes. What has to hold: a description is refused, with nothing made of it, or each
 * packet finds the rule that one who looks at all of them finds, with what its record says, within the limits that the
 * engine relies on (it indexes counters and interfaces without looking again).
 */
#include "table.h"

#include "check.h"
#include "description.h"
#include "fuzz.h"

#include <errno.h>

static void check_outputs(const struct table_rule *rule, const uint8_t *outputs)
{
    for (uint32_t i = 0; i < rule->outputs_count; i++) {
        const struct table_output *output = &rule->outputs[i];
        struct table_output_record expected;

        memcpy(&expected, outputs + i * sizeof(expected), sizeof(expected));
        CHECK_BYTES(output->address.bytes, expected.address, sizeof(expected.address));
        CHECK_BYTES(output->source.bytes, expected.source, sizeof(expected.source));
        CHECK_EQUAL(output->port, expected.port);
        CHECK_EQUAL(output->source_port, expected.source_port);
        CHECK_EQUAL(output->ttl, expected.ttl);
        CHECK_EQUAL(output->tos, expected.dscp << 2);
        CHECK_EQUAL(output->flags, expected.flags);
        CHECK_EQUAL(output->rate, expected.rate);
        CHECK_EQUAL(output->rate_unit, expected.rate_unit);
        CHECK_EQUAL(output->prefix, expected.prefix);
        CHECK(output->prefix <= 128);
        CHECK_EQUAL(output->way, expected.way);
        CHECK_EQUAL(output->egress, table_egress(expected.egress, expected.way));
        CHECK(output->egress < TABLE_EGRESSES);
        CHECK_EQUAL(output->counter, expected.counter);
        CHECK(output->counter < COUNTERS_OUTPUTS_MAX);
        CHECK(!output->plain || (output->port && output->prefix == 128 && output->way < WAY_FRAME && !output->rate));
        CHECK(!output->rate_unit == !output->rate);
    }
}

/* The rule of a packet is that of whoever looks at all records. */
static void check_packet(const struct table *table, const uint8_t *data, size_t size, const struct packet *packet,
                         unsigned ingress)
{
    const struct table_rule *rule = table_find(table, packet, (uint8_t)ingress);
    struct table_rule_record record;
    const uint8_t *outputs;

    if (!description_find(data, size, packet, ingress, &record, &outputs)) {
        CHECK(!rule);
        return;
    }
    CHECK(rule);
    CHECK_EQUAL(rule->id, record.id);
    CHECK_BYTES(rule->group.bytes, record.group, sizeof(record.group));
    CHECK_BYTES(rule->source.bytes, record.source, sizeof(record.source));
    CHECK_EQUAL(rule->counter, record.counter);
    CHECK(rule->counter < COUNTERS_RULES_MAX);
    CHECK_EQUAL(rule->outputs_count, record.outputs);
    CHECK(rule->outputs_count > 0 && rule->outputs_count <= TABLE_OUTPUTS_PER_RULE_MAX);
    check_outputs(rule, outputs);
}

/* Packets that a rule takes, and some that it only just does not. */
static void check_rule(const struct table *table, const uint8_t *data, size_t size,
                       const struct table_rule_record *record)
{
    struct packet packet = {.destination_port = record->port, .vlan = record->vlan, .protocol = record->protocol};

    memcpy(packet.source.bytes, record->source, sizeof(packet.source.bytes));
    memcpy(packet.destination.bytes, record->group, sizeof(packet.destination.bytes));
    check_packet(table, data, size, &packet, record->ingress);
    CHECK(table_find(table, &packet, (uint8_t)record->ingress) ||
          (record->prefix < 96 && address_is_ipv4(&packet.destination)));
    CHECK(!table_find(table, &packet, TABLE_INTERFACES_MAX));
    packet.vlan ^= 1;
    check_packet(table, data, size, &packet, record->ingress);
    packet.vlan ^= 1;
    packet.destination_port ^= 1;
    check_packet(table, data, size, &packet, record->ingress);
    packet.source.bytes[15] ^= 1;
    check_packet(table, data, size, &packet, record->ingress);
    for (unsigned byte = 0; byte < 16; byte++) {
        packet.destination.bytes[byte] ^= 1;
        check_packet(table, data, size, &packet, record->ingress);
        packet.destination.bytes[byte] ^= 1;
    }
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
        check_rule(table, data, size, &record);
        at += record.outputs * sizeof(struct table_output_record);
    }
    CHECK_EQUAL(table_rules(table), rules);
    table_free(table);
    return 0;
}

#ifndef FUZZ_LIBFUZZER
static void seed_output(struct description *description, uint8_t protocol, bool ipv4, uint64_t *state)
{
    static const uint8_t ways[2][4] = {{WAY_UDP6, WAY_LOOP6, WAY_FRAME, WAY_RAW6},
                                       {WAY_UDP4, WAY_LOOP4, WAY_FRAME, WAY_RAW4}};
    struct table_output_record record = {
        .counter = random_below(state, COUNTERS_OUTPUTS_MAX),
        .egress = (uint16_t)random_below(state, TABLE_INTERFACES_MAX),
        .way = ways[ipv4][protocol == PROTOCOL_ESP ? 2 + random_below(state, 2) : random_below(state, 4)],
        .prefix = (uint8_t)(random_below(state, 2) ? 128 : random_below(state, 129)),
        .ttl = (uint8_t)random_next(state),
        .dscp = (uint8_t)random_below(state, 64),
        .flags = (uint8_t)(random_below(state, 64) & (OUTPUT_KEEP_TTL | OUTPUT_KEEP_DSCP | OUTPUT_PAUSED)),
        .rate_unit = (uint8_t)random_below(state, 3),
    };
    union address address = address_from_ipv4(htonl(0xc6336401));

    if (!ipv4)
        address.bytes[0] = 0xff;
    memcpy(record.address, address.bytes, sizeof(record.address));
    record.rate = record.rate_unit ? 1 + random_below(state, 1000) : 0;
    record.port = protocol == PROTOCOL_ESP ? 0 : (uint16_t)random_next(state);
    description_append(description, &record, sizeof(record));
}

static size_t fuzz_seed(uint8_t *out, uint64_t *state)
{
    struct description description = {0};
    size_t length;

    for (uint32_t rules = random_below(state, 6); rules; rules--) {
        bool ipv4 = random_below(state, 2), esp = !random_below(state, 4);
        unsigned prefix = random_below(state, 2) ? 128 : (ipv4 ? 124 : 112) + random_below(state, ipv4 ? 5 : 17);
        /* Few different inputs, so that some are there twice, and some packets have several to choose from. */
        struct table_rule_record record = {
            .id = random_next(state),
            .port = esp || random_below(state, 2) ? 0 : 5000,
            .ingress = (uint16_t)random_below(state, 2),
            .outputs = (uint16_t)(1 + random_below(state, 3)),
            .vlan = (uint16_t)(random_below(state, 4) ? 0 : 100 + random_below(state, 2)),
            .prefix = (uint8_t)prefix,
            .protocol = esp ? PROTOCOL_ESP : PROTOCOL_UDP,
            .counter = random_below(state, COUNTERS_RULES_MAX),
        };
        union address group = address_from_ipv4(htonl(0xe9fc0000 + random_below(state, 4)));
        union address source = address_from_ipv4(htonl(0xc0000201));

        if (!ipv4) {
            group.bytes[0] = 0xff;
            source.bytes[0] = 0x20;
        }
        for (unsigned bit = prefix; bit < 128; bit++)
            group.bytes[bit / 8] &= (uint8_t)~(0x80 >> bit % 8);
        memcpy(record.group, group.bytes, sizeof(record.group));
        if (random_below(state, 2))
            memcpy(record.source, source.bytes, sizeof(record.source));
        description_append(&description, &record, sizeof(record));
        for (unsigned outputs = record.outputs; outputs; outputs--)
            seed_output(&description, record.protocol, ipv4, state);
    }
    length = description.length;
    CHECK(length <= FUZZ_INPUT_MAX);
    if (length)
        memcpy(out, description.bytes, length);
    description_free(&description);
    return length;
}
#endif

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_table.c: a table finds all the rules that it was built from and no other, and is built from nothing but a
 * correct description.
 */
#include "table.h"

#include "description.h"

#include <errno.h>

enum {
    MANY_RULES = 10000,
    RANDOM_RUNS = 200000,
    RULE = sizeof(struct table_rule_record),
    WITH_OUTPUT = RULE + sizeof(struct table_output_record),
};

#define GROUP UINT32_C(0xe9fc0000) /* 233.252.0.0 */
#define OUTPUT UINT32_C(0xc6336401) /* 198.51.100.1 */

static const struct table_rule *find(const struct table *table, uint32_t group, unsigned port, unsigned ingress)
{
    const struct packet packet = {.destination = address_from_ipv4(htonl(group)),
                                  .destination_port = (uint16_t)port, .protocol = PROTOCOL_UDP};

    return table_find(table, &packet, (uint8_t)ingress);
}

static struct table *build(const struct description *description)
{
    struct table *table = NULL;

    CHECK_EQUAL(description_build(description, &table), 0);
    CHECK(table);
    return table;
}

static void refuse(struct description *description, const char *name)
{
    struct table *table = NULL;

    check_case("%s", name);
    CHECK_EQUAL(description_build(description, &table), -EINVAL);
    CHECK(!table);
    description_free(description);
}

static void test_empty(void)
{
    struct table *table;

    check_case("no rules");
    CHECK_EQUAL(table_build(&table, NULL, 0), 0);
    CHECK_EQUAL(table_rules(table), 0);
    CHECK(!find(table, GROUP, 5000, 0));
    CHECK(!find(table, 0, 0, 0));
    table_free(table);
    table_free(NULL);
}

static void test_one(void)
{
    struct description description = {0};
    const struct packet unmapped = {.destination = {.words = {0, 0, 0, htonl(GROUP)}}, .destination_port = 5000,
                                    .protocol = PROTOCOL_UDP};
    const struct table_rule *rule;
    struct table *table;

    check_case("one rule");
    description_rule(&description, GROUP, 5000, 63, 2, COUNTERS_RULES_MAX - 1);
    description_output(&description, OUTPUT, 6000, 63, 8, COUNTERS_OUTPUTS_MAX - 1);
    description_output(&description, OUTPUT + 1, 6001, 0, 0, 0);
    table = build(&description);
    description_free(&description);
    CHECK_EQUAL(table_rules(table), 1);
    rule = find(table, GROUP, 5000, 63);
    CHECK(rule);
    CHECK_EQUAL(rule->id, COUNTERS_RULES_MAX);
    CHECK_EQUAL(rule->counter, COUNTERS_RULES_MAX - 1);
    CHECK_EQUAL(rule->outputs_count, 2);
    CHECK_BYTES(rule->outputs[0].address.bytes, address_from_ipv4(htonl(OUTPUT)).bytes, 16);
    CHECK_EQUAL(rule->outputs[0].port, 6000);
    CHECK_EQUAL(rule->outputs[0].egress, table_egress(63, WAY_UDP4));
    CHECK(rule->outputs[0].plain);
    CHECK_EQUAL(rule->outputs[0].ttl, 8);
    CHECK_EQUAL(rule->outputs[0].counter, COUNTERS_OUTPUTS_MAX - 1);
    CHECK_BYTES(rule->outputs[1].address.bytes, address_from_ipv4(htonl(OUTPUT + 1)).bytes, 16);
    CHECK_EQUAL(rule->outputs[1].ttl, 0);
    CHECK(!find(table, GROUP + 1, 5000, 63));
    CHECK(!find(table, GROUP, 5001, 63));
    CHECK(!find(table, GROUP, 5000, 62));
    CHECK(!table_find(table, &unmapped, 63)); /* ::233.252.0.0 is another address */
    table_free(table);
}

/* How a set of rules is numbered: the group, port and ingress of rule `i`. */
struct numbering {
    const char *name;
    uint32_t group_step;
    unsigned port_step, ingress_step;
};

static const struct numbering numberings[] = {
    {"groups counted up", 1, 0, 0},
    {"groups counted up by 256", 256, 0, 0},
    {"groups counted up by 65536", 65536, 0, 0},
    {"one group, ports counted up", 0, 1, 0},
    {"groups and ports counted up", 1, 1, 0},
    {"groups counted up, interfaces in turn", 1, 0, 1},
};

static void test_many(const struct numbering *numbering, unsigned count)
{
    struct description description = {0};
    struct table *table;

    check_case("%u rules: %s", count, numbering->name);
    for (unsigned i = 0; i < count; i++) {
        description_rule(&description, GROUP + i * numbering->group_step, (uint16_t)(5000 + i * numbering->port_step),
                         (uint16_t)(i * numbering->ingress_step % TABLE_INTERFACES_MAX), 1, i);
        description_output(&description, OUTPUT, (uint16_t)i, 1, 0, i);
    }
    table = build(&description);
    description_free(&description);
    CHECK_EQUAL(table_rules(table), count);
    for (unsigned i = 0; i < count; i++) {
        uint32_t group = GROUP + i * numbering->group_step;
        unsigned port = 5000 + i * numbering->port_step;
        unsigned ingress = i * numbering->ingress_step % TABLE_INTERFACES_MAX;
        const struct table_rule *rule = find(table, group, port, ingress);

        CHECK(rule);
        CHECK_EQUAL(rule->counter, i);
        CHECK_EQUAL(rule->outputs->port, (uint16_t)i);
        CHECK(!find(table, group, port, (ingress + 1) % TABLE_INTERFACES_MAX));
        CHECK(!find(table, group ^ 0x80000000, port, ingress));
        CHECK(!find(table, group, port ^ 0x8000, ingress));
    }
    table_free(table);
}

/* One group on every interface, at several ports: only the exact combination is found. */
static void test_same_group(void)
{
    struct description description = {0};
    struct table *table;

    check_case("one group everywhere");
    for (unsigned i = 0; i < TABLE_INTERFACES_MAX * 4; i++) {
        description_rule(&description, GROUP, (uint16_t)(i % 4 * 0x100 + 1), (uint16_t)(i / 4), 1, i);
        description_output(&description, OUTPUT, 1, 1, 0, i);
    }
    table = build(&description);
    description_free(&description);
    for (unsigned port = 0; port < 0x500; port++)
        for (unsigned ingress = 0; ingress < 256; ingress++) {
            const struct table_rule *rule = find(table, GROUP, port, ingress);

            CHECK_EQUAL(rule != NULL, port % 0x100 == 1 && port < 0x400 && ingress < TABLE_INTERFACES_MAX);
            CHECK(!rule || rule->counter == ingress * 4 + port / 0x100);
        }
    table_free(table);
}

/* `rules` rules of `outputs` outputs each, with one more output for the first `more` of them. */
static void describe(struct description *description, unsigned rules, unsigned outputs, unsigned more)
{
    for (unsigned i = 0; i < rules; i++) {
        unsigned count = outputs + (i < more);

        description_rule(description, GROUP + i, 5000, 0, (uint16_t)count, i % COUNTERS_RULES_MAX);
        for (unsigned output = 0; output < count; output++)
            description_output(description, OUTPUT, 6000, 0, 0, output);
    }
}

static void expect(struct description *description, const char *name, unsigned rules)
{
    struct table *table;

    check_case("%s", name);
    table = build(description);
    CHECK_EQUAL(table_rules(table), rules);
    table_free(table);
    description_free(description);
}

static void test_limits(void)
{
    struct description d = {0};

    describe(&d, 1, TABLE_OUTPUTS_PER_RULE_MAX, 0);
    expect(&d, "most outputs of a rule", 1);
    describe(&d, 1, TABLE_OUTPUTS_PER_RULE_MAX, 1);
    refuse(&d, "one output too many");
    describe(&d, COUNTERS_RULES_MAX, COUNTERS_OUTPUTS_MAX / COUNTERS_RULES_MAX, 0);
    expect(&d, "most rules with most outputs", COUNTERS_RULES_MAX);
    describe(&d, COUNTERS_RULES_MAX, COUNTERS_OUTPUTS_MAX / COUNTERS_RULES_MAX, 1);
    refuse(&d, "one output too many of all rules");
    describe(&d, COUNTERS_RULES_MAX + 1, 1, 0);
    refuse(&d, "one rule too many");
}

static void test_refused(void)
{
    struct description d = {0};

    for (size_t length = 1; length < 2 * WITH_OUTPUT; length++) {
        if (length == WITH_OUTPUT)
            continue;
        describe(&d, 2, 1, 0);
        d.length = length;
        refuse(&d, "cut short");
    }
    describe(&d, 1, 1, 0);
    description_append(&d, "", 1);
    refuse(&d, "one byte too long");
    description_rule(&d, GROUP, 5000, 0, 0, 0);
    refuse(&d, "no outputs");
    describe(&d, 1, 1, 0);
    description_rule(&d, GROUP + 1, 5000, 0, 65535, 0);
    refuse(&d, "more outputs than a table has");
    description_rule(&d, GROUP, 5000, TABLE_INTERFACES_MAX, 1, 0);
    description_output(&d, OUTPUT, 6000, 0, 0, 0);
    refuse(&d, "ingress out of range");
    description_rule(&d, GROUP, 5000, 256, 1, 0);
    description_output(&d, OUTPUT, 6000, 0, 0, 0);
    refuse(&d, "ingress that looks like 0 in 8 bits");
    description_rule(&d, GROUP, 5000, 0, 1, COUNTERS_RULES_MAX);
    description_output(&d, OUTPUT, 6000, 0, 0, 0);
    refuse(&d, "rule counter out of range");
    description_rule(&d, GROUP, 5000, 0, 1, 0);
    description_output(&d, OUTPUT, 6000, TABLE_INTERFACES_MAX, 0, 0);
    refuse(&d, "egress out of range");
    description_rule(&d, GROUP, 5000, 0, 1, 0);
    description_output(&d, OUTPUT, 6000, 0, 0, COUNTERS_OUTPUTS_MAX);
    refuse(&d, "output counter out of range");
    describe(&d, 100, 1, 0);
    description_rule(&d, GROUP + 50, 5000, 0, 1, 101);
    description_output(&d, OUTPUT + 1, 6001, 1, 0, 101);
    refuse(&d, "the same input twice");
}

/* One rule with one output, of which `edit` has made something else. */
static void describe_edited(struct description *d, void (*edit)(struct table_rule_record *, struct table_output_record *))
{
    struct table_rule_record rule;
    struct table_output_record output;

    describe(d, 1, 1, 0);
    memcpy(&rule, d->bytes, sizeof(rule));
    memcpy(&output, d->bytes + sizeof(rule), sizeof(output));
    edit(&rule, &output);
    memcpy(d->bytes, &rule, sizeof(rule));
    memcpy(d->bytes + sizeof(rule), &output, sizeof(output));
}

#define EDIT(name, ...)                                                                                                \
    static void edit_##name(struct table_rule_record *r, struct table_output_record *o)                                \
    {                                                                                                                  \
        (void)r;                                                                                                       \
        (void)o;                                                                                                       \
        __VA_ARGS__;                                                                                                   \
    }

EDIT(prefix_too_long, r->prefix = 129)
EDIT(bits_behind_prefix, r->prefix = 120; r->group[15] = 1)
EDIT(prefix, r->prefix = 120)
EDIT(prefix_0, r->prefix = 0; memset(r->group, 0, 16))
EDIT(tcp, r->protocol = 6)
EDIT(esp_with_port, r->protocol = PROTOCOL_ESP; o->way = WAY_FRAME; o->port = 0)
EDIT(esp_by_udp, r->protocol = PROTOCOL_ESP; r->port = 0; o->port = 0)
EDIT(esp_to_port, r->protocol = PROTOCOL_ESP; r->port = 0; o->way = WAY_RAW4)
EDIT(esp, r->protocol = PROTOCOL_ESP; r->port = 0; o->port = 0; o->way = WAY_RAW4)
EDIT(any_port, r->port = 0)
EDIT(vlan, r->vlan = 4094)
EDIT(vlan_4095, r->vlan = 4095)
EDIT(rule_reserved, r->reserved[1] = 1)
EDIT(source_of_ipv6, r->source[0] = 0x20)
EDIT(way_unknown, o->way = WAYS)
EDIT(udp6_to_ipv4, o->way = WAY_UDP6)
EDIT(loop6_to_ipv4, o->way = WAY_LOOP6)
EDIT(raw6_to_ipv4, o->way = WAY_RAW6)
EDIT(udp4_to_ipv6, o->address[0] = 0xff)
EDIT(raw4_to_ipv6, o->way = WAY_RAW4; o->address[0] = 0xff)
EDIT(frame_to_ipv6, o->way = WAY_FRAME; o->address[0] = 0xff)
EDIT(udp6, o->way = WAY_UDP6; o->address[0] = 0xff)
EDIT(udp4_from_ipv6, o->source[0] = 0x20)
EDIT(output_prefix_too_long, o->prefix = 129)
EDIT(output_prefix, o->prefix = 0; o->way = WAY_UDP6)
EDIT(rate_without_unit, o->rate = 1)
EDIT(unit_without_rate, o->rate_unit = RATE_BITS)
EDIT(unit_unknown, o->rate = 1; o->rate_unit = 3)
EDIT(rate, o->rate = 1; o->rate_unit = RATE_BITS)
EDIT(dscp, o->dscp = 63)
EDIT(dscp_64, o->dscp = 64)
EDIT(flags_unknown, o->flags = 64)
EDIT(flags_all, o->flags = 63; o->way = WAY_FRAME)
EDIT(udp_keeps_source, o->flags = OUTPUT_KEEP_SOURCE)
EDIT(udp_keeps_source_port, o->flags = OUTPUT_KEEP_SOURCE_PORT)
EDIT(udp_from_port, o->source_port = 1)
EDIT(raw_from_port, o->source_port = 1; o->way = WAY_RAW4)
EDIT(output_reserved, o->reserved[7] = 1)
EDIT(follows, o->port = 0)

static const struct {
    const char *name;
    void (*edit)(struct table_rule_record *, struct table_output_record *);
    bool accepted;
} edits[] = {
#define REFUSED(name) {#name, edit_##name, false}
#define ACCEPTED(name) {#name, edit_##name, true}
    REFUSED(prefix_too_long), REFUSED(bits_behind_prefix), ACCEPTED(prefix), ACCEPTED(prefix_0), REFUSED(tcp),
    REFUSED(esp_with_port), REFUSED(esp_by_udp), REFUSED(esp_to_port), ACCEPTED(esp), ACCEPTED(any_port),
    ACCEPTED(vlan), REFUSED(vlan_4095), REFUSED(rule_reserved), REFUSED(source_of_ipv6), REFUSED(way_unknown),
    REFUSED(udp6_to_ipv4), REFUSED(loop6_to_ipv4), REFUSED(raw6_to_ipv4), REFUSED(udp4_to_ipv6),
    REFUSED(raw4_to_ipv6), ACCEPTED(frame_to_ipv6), ACCEPTED(udp6), REFUSED(udp4_from_ipv6),
    REFUSED(output_prefix_too_long), ACCEPTED(output_prefix), REFUSED(rate_without_unit), REFUSED(unit_without_rate),
    REFUSED(unit_unknown), ACCEPTED(rate), ACCEPTED(dscp), REFUSED(dscp_64), REFUSED(flags_unknown),
    ACCEPTED(flags_all), REFUSED(udp_keeps_source), REFUSED(udp_keeps_source_port), REFUSED(udp_from_port),
    ACCEPTED(raw_from_port), REFUSED(output_reserved), ACCEPTED(follows),
};

static void test_edits(void)
{
    for (size_t i = 0; i < sizeof(edits) / sizeof(edits[0]); i++) {
        struct description d = {0};

        describe_edited(&d, edits[i].edit);
        if (edits[i].accepted)
            expect(&d, edits[i].name, 1);
        else
            refuse(&d, edits[i].name);
    }
}

static void test_twice(void)
{
    struct description d = {0};

    description_rule(&d, GROUP, 5000, 0, 2, 0);
    description_output(&d, OUTPUT, 6000, 0, 0, 7);
    description_output(&d, OUTPUT + 1, 6000, 0, 0, 7);
    refuse(&d, "two outputs of a rule with one counter");
    description_rule(&d, GROUP, 5000, 0, 1, 0);
    description_output(&d, OUTPUT, 6000, 0, 0, 7);
    description_rule(&d, GROUP, 5000, 1, 1, 0);
    description_output(&d, OUTPUT, 6000, 0, 0, 7);
    expect(&d, "a rule on two interfaces", 2);
}

/* Rules of all shapes in random order, all of which take some packets in common: found is the most specific. */
static void test_shapes(void)
{
    enum { RULES = 300, PACKETS = 200000 };
    static const unsigned prefixes[] = {0, 8, 64, 95, 96, 100, 104, 112, 120, 121, 127, 128};
    uint64_t state = UINT64_C(0x736861706573);
    struct description d = {0};
    struct table *table = NULL;
    unsigned found = 0, missed = 0;

    check_case("shapes");
    for (uint32_t i = 0; i < RULES;) {
        bool ipv4 = random_below(&state, 2);
        unsigned prefix = prefixes[random_below(&state, sizeof(prefixes) / sizeof(prefixes[0]))];
        struct table_rule_record record = {
            .id = i, .counter = i, .outputs = 1, .prefix = (uint8_t)prefix,
            .port = random_below(&state, 2) ? 0 : (uint16_t)(5000 + random_below(&state, 2)),
            .protocol = random_below(&state, 4) ? PROTOCOL_UDP : PROTOCOL_ESP,
            .vlan = (uint16_t)random_below(&state, 2),
        };
        struct table_output_record output = {.way = WAY_FRAME, .prefix = 0, .counter = i};
        union address group = address_from_ipv4(htonl(GROUP + random_below(&state, 4)));

        if (ipv4 ? prefix < 96 : prefix == 0)
            continue;
        if (!ipv4)
            group.bytes[0] = 0xff;
        if (record.protocol == PROTOCOL_ESP)
            record.port = 0;
        for (unsigned bit = prefix; bit < 128; bit++)
            group.bytes[bit / 8] &= (uint8_t)~(0x80 >> bit % 8);
        memcpy(record.group, group.bytes, sizeof(record.group));
        if (random_below(&state, 2)) {
            memcpy(record.source, address_from_ipv4(htonl(OUTPUT + random_below(&state, 2))).bytes, 16);
            if (!ipv4)
                record.source[0] = 0x20;
        }
        description_append(&d, &record, sizeof(record));
        description_append(&d, &output, sizeof(output));
        if (description_build(&d, &table) == 0) {
            table_free(table);
            i++;
        } else { /* it was there already */
            d.length -= WITH_OUTPUT;
            if (i > RULES / 2)
                break;
        }
    }
    CHECK_EQUAL(description_build(&d, &table), 0);
    for (unsigned i = 0; i < PACKETS; i++) {
        struct packet packet = {
            .destination = address_from_ipv4(htonl(GROUP + random_below(&state, 512))),
            .source = address_from_ipv4(htonl(OUTPUT + random_below(&state, 3))),
            .destination_port = (uint16_t)(random_below(&state, 8) ? 5000 + random_below(&state, 3) : 0),
            .protocol = random_below(&state, 4) ? PROTOCOL_UDP : PROTOCOL_ESP,
            .vlan = (uint16_t)random_below(&state, 3),
        };
        const struct table_rule *rule;
        struct table_rule_record record;

        if (random_below(&state, 2)) {
            packet.destination.bytes[0] = 0xff;
            packet.source.bytes[0] = 0x20;
        }
        if (!random_below(&state, 16))
            packet.source = (union address){0};
        rule = table_find(table, &packet, 0);
        if (description_find(d.bytes, d.length, &packet, 0, &record, NULL)) {
            CHECK(rule);
            CHECK_EQUAL(rule->counter, record.counter);
            found++;
        } else {
            CHECK(!rule);
            missed++;
        }
    }
    CHECK(found > PACKETS / 10 && missed > PACKETS / 10);
    table_free(table);
    description_free(&d);
}

/* Damaged descriptions are either refused or make a table; nothing is read behind their end (the block ends there). */
static void test_random(void)
{
    uint64_t state = UINT64_C(0x7461626c65);
    unsigned built = 0, refused = 0;

    for (unsigned run = 0; run < RANDOM_RUNS; run++) {
        struct description d = {0};
        struct table *table = NULL;

        check_case("random description %u", run);
        describe(&d, 1 + random_below(&state, 3), 1 + random_below(&state, 3), random_below(&state, 2));
        for (unsigned damages = random_below(&state, 3); damages; damages--)
            d.bytes[random_below(&state, (uint32_t)d.length)] = (uint8_t)random_next(&state);
        if (!random_below(&state, 8))
            d.length = random_below(&state, (uint32_t)d.length);
        if (description_build(&d, &table) == 0) {
            built++;
            (void)find(table, (uint32_t)random_next(&state), 0, 0);
        } else {
            CHECK(!table);
            refused++;
        }
        table_free(table);
        description_free(&d);
    }
    check_case("random descriptions");
    CHECK(built > RANDOM_RUNS / 10 && refused > RANDOM_RUNS / 10);
}

int main(void)
{
    test_empty();
    test_one();
    for (size_t i = 0; i < sizeof(numberings) / sizeof(numberings[0]); i++) {
        test_many(&numberings[i], 1);
        test_many(&numberings[i], MANY_RULES);
    }
    test_same_group();
    test_limits();
    test_refused();
    test_edits();
    test_twice();
    test_shapes();
    test_random();
    return 0;
}

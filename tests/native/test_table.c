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
    RECORD = sizeof(struct table_rule_record),
};

#define GROUP UINT32_C(0xe9fc0000) /* 233.252.0.0 */
#define OUTPUT UINT32_C(0xc6336401) /* 198.51.100.1 */

static const struct table_rule *find(const struct table *table, uint32_t group, unsigned port, unsigned ingress)
{
    union address address = address_from_ipv4(htonl(group));

    return table_find(table, &address, (uint16_t)port, (uint8_t)ingress);
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
    const union address unmapped = {.words = {0, 0, 0, htonl(GROUP)}};
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
    CHECK_EQUAL(rule->port, 5000);
    CHECK_EQUAL(rule->ingress, 63);
    CHECK_EQUAL(rule->counter, COUNTERS_RULES_MAX - 1);
    CHECK_EQUAL(rule->outputs_count, 2);
    CHECK_BYTES(rule->outputs[0].address.bytes, address_from_ipv4(htonl(OUTPUT)).bytes, 16);
    CHECK_EQUAL(rule->outputs[0].port, 6000);
    CHECK_EQUAL(rule->outputs[0].egress, 63);
    CHECK_EQUAL(rule->outputs[0].ttl, 8);
    CHECK_EQUAL(rule->outputs[0].counter, COUNTERS_OUTPUTS_MAX - 1);
    CHECK_BYTES(rule->outputs[1].address.bytes, address_from_ipv4(htonl(OUTPUT + 1)).bytes, 16);
    CHECK_EQUAL(rule->outputs[1].ttl, 0);
    CHECK(!find(table, GROUP + 1, 5000, 63));
    CHECK(!find(table, GROUP, 5001, 63));
    CHECK(!find(table, GROUP, 5000, 62));
    CHECK(!table_find(table, &unmapped, 5000, 63)); /* ::233.252.0.0 is another address */
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
        description_rule(&description, GROUP, (uint16_t)(i % 4 * 0x100), (uint16_t)(i / 4), 1, i);
        description_output(&description, OUTPUT, 1, 1, 0, i);
    }
    table = build(&description);
    description_free(&description);
    for (unsigned port = 0; port < 0x500; port++)
        for (unsigned ingress = 0; ingress < 256; ingress++) {
            const struct table_rule *rule = find(table, GROUP, port, ingress);

            CHECK_EQUAL(rule != NULL, port % 0x100 == 0 && port < 0x400 && ingress < TABLE_INTERFACES_MAX);
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

    for (size_t length = 1; length < 4 * RECORD; length++) {
        if (length == 2 * RECORD)
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

/* Any bytes are either refused or make a table; nothing is read behind their end (the block ends there). */
static void test_random(void)
{
    uint64_t state = UINT64_C(0x7461626c65);
    unsigned built = 0;

    for (unsigned run = 0; run < RANDOM_RUNS; run++) {
        struct description d = {0};
        uint32_t length = random_below(&state, 8) * RECORD;
        struct table *table = NULL;

        check_case("random description %u", run);
        if (random_below(&state, 8) == 0)
            length += random_below(&state, RECORD);
        while (d.length < length) {
            uint8_t byte = (uint8_t)(random_below(&state, 3) ? 0 : random_next(&state));

            /* Few outputs, so that some descriptions come out right. */
            if (d.length % RECORD == 20)
                byte = (uint8_t)random_below(&state, 3);
            else if (d.length % RECORD > 18 && d.length % RECORD < 28 && random_below(&state, 40))
                byte = 0;
            description_append(&d, &byte, 1);
        }
        if (description_build(&d, &table) == 0) {
            built += table_rules(table) > 0;
            (void)find(table, (uint32_t)random_next(&state), 0, 0);
        } else {
            CHECK(!table);
        }
        table_free(table);
        description_free(&d);
    }
    check_case("random descriptions");
    CHECK(built > RANDOM_RUNS / 100);
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
    test_random();
    return 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_limit.c: an output sends its burst at once, and then its rate, to the last packet; neither a long silence nor an
 * hour of traffic is held against it or for it.
 */
#include "limit.h"

#include "check.h"

#define MS UINT64_C(1000000)
#define SECOND UINT64_C(1000000000)

static struct table_output output_of(uint64_t rate, enum rate_unit unit)
{
    return (struct table_output){.rate = rate, .rate_unit = (uint8_t)unit};
}

static bool try_as(uint64_t rule, struct limit *limit, const struct table_output *output, uint64_t cost, uint64_t now_ns)
{
    if (!limit_admits(limit, output, rule, cost, now_ns))
        return false;
    limit_charge(limit, output, rule, cost, now_ns);
    return true;
}

static bool try(struct limit *limit, const struct table_output *output, uint64_t cost, uint64_t now_ns)
{
    return try_as(1, limit, output, cost, now_ns);
}

/* How many of a cost are admitted at once. */
static unsigned burst(struct limit *limit, const struct table_output *output, uint64_t cost, uint64_t now_ns)
{
    unsigned admitted = 0;

    while (try(limit, output, cost, now_ns))
        admitted++;
    return admitted;
}

static void test_bursts(void)
{
    static const struct {
        uint64_t rate;
        enum rate_unit unit;
        uint64_t cost;
        unsigned expected;
    } cases[] = {
        {1, RATE_PACKETS, 1, 16},         {1600, RATE_PACKETS, 1, 16},           {10000, RATE_PACKETS, 1, 100},
        {1000000, RATE_PACKETS, 1, 10000}, {1, RATE_BITS, 12000, 16},            {100000000, RATE_BITS, 12000, 83},
        {1000, RATE_BITS, 65535 * 8, 1},  {UINT64_C(10000000000), RATE_BITS, 12000, 8333},
        {10000, RATE_PACKETS, 128, 1}, /* more than the burst, as one frame: only if the bucket is full */
    };

    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++)
        for (uint64_t now = 0; now < 3; now++) { /* from the start on, and whenever it was silent for long */
            const struct table_output output = output_of(cases[i].rate, cases[i].unit);
            struct limit limit = {0};
            const uint64_t year = 365 * 86400 * SECOND;

            check_case("burst of %" PRIu64 ", unit %d, cost %" PRIu64, cases[i].rate, cases[i].unit, cases[i].cost);
            CHECK_EQUAL(burst(&limit, &output, cases[i].cost, now * year), cases[i].expected);
            CHECK_EQUAL(burst(&limit, &output, cases[i].cost, now * year), 0);
            CHECK_EQUAL(burst(&limit, &output, cases[i].cost, (now + 1) * year), cases[i].expected);
        }
}

/* Offered twice as much as may leave, for ten seconds: what leaves is the rate and one burst. */
static void test_rate(uint64_t rate, enum rate_unit unit, uint64_t cost)
{
    const struct table_output output = output_of(rate, unit);
    const uint64_t gap_ns = SECOND * cost / rate / 2, first = 123456789;
    struct limit limit = {0};
    uint64_t sent = 0, expected = rate * 10 / cost, bursts = 16 + rate / 100 / cost;

    check_case("%" PRIu64 " a second, unit %d, cost %" PRIu64, rate, unit, cost);
    CHECK(gap_ns > 0);
    for (uint64_t now = first; now < first + 10 * SECOND; now += gap_ns)
        sent += try(&limit, &output, cost, now);
    CHECK(sent >= expected - expected / 500 && sent <= expected + expected / 500 + bursts);
}

/* Exactly the rate loses nothing, however fast. */
static void test_no_loss(uint64_t rate, enum rate_unit unit, uint64_t cost)
{
    const struct table_output output = output_of(rate, unit);
    struct limit limit = {0};

    check_case("no loss at %" PRIu64 " a second", rate);
    for (uint64_t i = 0; i < 1000000; i++)
        CHECK(try(&limit, &output, cost, SECOND + i * cost * SECOND / rate));
}

/* What is refused costs nothing, and another rate counts at once. */
static void test_refused(void)
{
    const struct table_output slow = output_of(1000, RATE_PACKETS), fast = output_of(100000, RATE_PACKETS);
    struct limit limit = {0};

    check_case("refused");
    CHECK_EQUAL(burst(&limit, &slow, 1, SECOND), 16);
    for (unsigned i = 0; i < 1000; i++)
        CHECK(!try(&limit, &slow, 1, SECOND));
    CHECK(try(&limit, &slow, 1, SECOND + MS));
    CHECK(!try(&limit, &slow, 1, SECOND + MS));
    CHECK_EQUAL(burst(&limit, &fast, 1, SECOND + 20 * MS), 1000);
}

/* What one output owes, another that gets its place does not pay: of another rule, with another rate, or in another
 * unit. At the slowest rate a burst is owed for 16 seconds, or for two days in bits. */
static void test_inherited(void)
{
    const struct table_output packets = output_of(1, RATE_PACKETS), bits = output_of(1, RATE_BITS);
    const struct table_output fast = output_of(100000000, RATE_BITS), other = output_of(2, RATE_PACKETS);
    struct limit limit = {0};

    check_case("inherited");
    CHECK_EQUAL(burst(&limit, &bits, 12000, SECOND), 16);
    CHECK_EQUAL(burst(&limit, &fast, 12000, 2 * SECOND), 83);
    CHECK_EQUAL(burst(&limit, &packets, 1, 2 * SECOND), 16);
    CHECK_EQUAL(burst(&limit, &bits, 12000, 2 * SECOND), 16);
    CHECK_EQUAL(burst(&limit, &packets, 1, 2 * SECOND), 16);
    CHECK_EQUAL(burst(&limit, &other, 1, 2 * SECOND), 16);
    CHECK(!try(&limit, &other, 1, 2 * SECOND));
    for (unsigned i = 0; i < 16; i++)
        CHECK(try_as(2, &limit, &other, 1, 2 * SECOND));
    CHECK(!try_as(2, &limit, &other, 1, 2 * SECOND)); /* it owes what it took itself */
    CHECK(try_as(2, &limit, &other, 1, 3 * SECOND));
    CHECK(try_as(0, &limit, &other, 1, 3 * SECOND)); /* an id is any number */
}

static void test_cost(void)
{
    const struct table_output bits = output_of(1, RATE_BITS), packets = output_of(1, RATE_PACKETS);

    check_case("cost");
    CHECK_EQUAL(limit_cost(&bits, 1, 1000, 28), 8 * 1028);
    CHECK_EQUAL(limit_cost(&bits, 3, 3000, 48), 8 * 3144);
    CHECK_EQUAL(limit_cost(&packets, 1, 1000, 28), 1);
    CHECK_EQUAL(limit_cost(&packets, 3, 3000, 28), 3);
}

int main(void)
{
    test_bursts();
    test_rate(1000, RATE_PACKETS, 1);
    test_rate(333, RATE_PACKETS, 1);
    test_rate(100000, RATE_PACKETS, 1);
    test_rate(10000000, RATE_BITS, 8224);
    test_rate(1000000000, RATE_BITS, 12000);
    test_no_loss(1000000, RATE_PACKETS, 1);
    test_no_loss(UINT64_C(100000000000), RATE_BITS, 12000);
    test_refused();
    test_inherited();
    test_cost();
    return 0;
}

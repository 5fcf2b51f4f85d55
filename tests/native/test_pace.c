/* SPDX-License-Identifier: Apache-2.0 */
/* test_pace.c: when the engine waits for company, and that it never does so without it or beyond its budget. */
#include "pace.h"

#include "check.h"

enum { US = 1000, MS = 1000000 };

/* Packets at an even rate, `interval_ns` apart, for `duration_ns`, in turns as pace_next says; a turn that waits for the
 * next packet comes with it. Returns the last answer, and checks every one. */
static uint64_t run(struct pace *pace, uint64_t *now_ns, uint64_t interval_ns, uint64_t duration_ns)
{
    uint64_t end = *now_ns + duration_ns, wait = pace_next(pace, *now_ns, 0);

    while (*now_ns < end) {
        uint64_t step = wait ? wait : interval_ns;

        CHECK(wait == 0 || wait == pace->budget_ns);
        *now_ns += step;
        wait = pace_next(pace, *now_ns, step / interval_ns);
    }
    return wait;
}

static void test_rates(uint64_t budget_ns)
{
    struct pace pace = {.budget_ns = budget_ns};
    uint64_t now_ns = 12345, company = budget_ns / PACE_COMPANY_MIN;

    check_case("budget of %llu ns", (unsigned long long)budget_ns);
    CHECK_EQUAL(run(&pace, &now_ns, 10 * MS, 100 * MS), 0);
    CHECK_EQUAL(run(&pace, &now_ns, company * 2, 100 * MS), 0);
    CHECK_EQUAL(run(&pace, &now_ns, company / 2, 100 * MS), budget_ns);
    CHECK_EQUAL(run(&pace, &now_ns, company * 2, 100 * MS), 0);
    CHECK_EQUAL(run(&pace, &now_ns, 1000, 100 * MS), budget_ns);
}

static void test_silence(void)
{
    struct pace pace = {.budget_ns = 50 * US};
    uint64_t now_ns = 0;
    unsigned turns = 0;

    check_case("packets cease");
    CHECK_EQUAL(run(&pace, &now_ns, 1000, 10 * MS), 50 * US);
    while (pace_next(&pace, now_ns, 0)) {
        now_ns += 50 * US;
        CHECK(++turns <= 2 * PACE_WINDOW_NS / (50 * US));
    }
    check_case("a burst after a long silence");
    now_ns += UINT64_C(3600) * 1000 * MS;
    CHECK_EQUAL(pace_next(&pace, now_ns, 500), 0);
}

static void test_none(void)
{
    struct pace pace = {.budget_ns = 0};
    uint64_t now_ns = 0;

    check_case("no budget");
    CHECK_EQUAL(run(&pace, &now_ns, 100, MS), 0);
}

int main(void)
{
    test_none();
    test_rates(20 * US);
    test_rates(50 * US);
    test_rates(1000 * US);
    test_rates((uint64_t)PACE_BUDGET_US_MAX * US);
    test_silence();
    return 0;
}

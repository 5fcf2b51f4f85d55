/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_engine_life.c: whatever ends, an ingress or the engine, and under whatever load: no packet is lost or forgotten
 * to be counted, the successor goes on with the next one, and nothing stays allocated. rig.h draws the wiring.
 */
#include "traffic.h"

#include <errno.h>

enum { ROUNDS = 30, PER_ROUND = 100 };

static int64_t attach(struct rig *rig, unsigned interface)
{
    return engine_attach_receive(rig->engine, interface, rig->ingress[0], false, RIG_MTU, 4);
}

static int64_t set_rules(struct rig *rig, const struct description *rules)
{
    return engine_set_rules(rig->engine, rules->bytes, rules->length);
}

/* What a detached ingress had not taken waits in the socket; what it had taken is forwarded before the answer. */
static void test_detach_during_traffic(void)
{
    struct description rules = {0};
    struct traffic traffic;
    struct rig rig;

    check_case("detach during traffic");
    rig_open(&rig);
    rig_run(&rig);
    rig_attach(&rig, 0, 1);
    rig_describe(&rig, &rules, 2, 0);
    rig_set_rules(&rig, &rules);
    traffic_open(&traffic, ROUNDS * PER_ROUND, 0x3, 0);
    for (unsigned round = 0; round < ROUNDS; round++) {
        int64_t ticket;

        traffic_run(&rig, &traffic, (round + 1) * PER_ROUND - 50);
        ticket = engine_detach_ingress(rig.engine, 0);
        CHECK_EQUAL(rig_answer(&rig, engine_detach_ingress(rig.engine, 0)), -ENOENT); /* on its way out, or gone */
        CHECK_EQUAL(rig_answer(&rig, ticket), 0);
        CHECK_EQUAL(rig.page->received, rig.page->forwarded);
        traffic_take(&rig, &traffic);
        CHECK_EQUAL(traffic.done, rig.page->forwarded);
        rig_attach(&rig, 0, 1u << round % 12);
    }
    traffic_run(&rig, &traffic, traffic.count);
    traffic_close(&rig, &traffic);
    rig_close(&rig);
}

/* Stopped under load again and again, each time followed by a new engine on the same sockets and page. */
static void test_successors(void)
{
    struct description rules = {0};
    struct traffic traffic;
    struct rig rig;

    rig_open(&rig);
    traffic_open(&traffic, ROUNDS * PER_ROUND, 0x3, 0);
    for (unsigned round = 0; round < ROUNDS; round++) {
        int64_t ticket;

        check_case("engine number %u", round);
        if (round)
            rig_replace_engine(&rig);
        rig_run(&rig);
        rig_describe(&rig, &rules, 2, 0);
        rig_set_rules(&rig, &rules);
        rig_attach(&rig, 0, 1u << round % 12);
        traffic_run(&rig, &traffic, (round + 1) * PER_ROUND - 50);
        ticket = engine_stop(rig.engine);
        while (!rig.answered[ticket]) { /* packets go on coming */
            if (!traffic_step(&rig, &traffic))
                traffic_wait(&rig, &traffic);
            rig_take_answers(&rig);
        }
        rig_join(&rig);
        traffic_take(&rig, &traffic);
        CHECK_EQUAL(rig.page->received, rig.page->forwarded);
        CHECK_EQUAL(traffic.done, rig.page->forwarded);
        CHECK(traffic.sent >= rig.page->received);
    }
    check_case("the last engine");
    rig_replace_engine(&rig);
    rig_run(&rig);
    rig_describe(&rig, &rules, 2, 0);
    rig_set_rules(&rig, &rules);
    rig_attach(&rig, 0, 4);
    traffic_run(&rig, &traffic, traffic.count);
    rig_stop(&rig);
    traffic_close(&rig, &traffic);
    CHECK_EQUAL(rig.page->received, ROUNDS * PER_ROUND);
    rig_close(&rig);
}

/* Closed without a run, with commands taken; then with answers and late commands that nobody deals with. What they hold
 * is freed, which a leak checker sees. */
static void test_close(void)
{
    struct description rules = {0};
    struct rig rig;

    check_case("close without run");
    rig_open(&rig);
    rig_replace_engine(&rig);
    rig_describe(&rig, &rules, 3, 0);
    CHECK(set_rules(&rig, &rules) > 0);
    CHECK(attach(&rig, 0) > 0);
    CHECK(engine_stop(rig.engine) > 0);
    CHECK(set_rules(&rig, &rules) > 0);
    rig_replace_engine(&rig);

    check_case("close with answers not taken");
    rig_run(&rig);
    CHECK(set_rules(&rig, &rules) > 0);
    CHECK(set_rules(&rig, &rules) > 0);
    CHECK(attach(&rig, 0) > 0);
    CHECK(attach(&rig, 0) > 0);
    CHECK(engine_stop(rig.engine) > 0);
    rig_join(&rig);
    CHECK(set_rules(&rig, &rules) > 0);
    CHECK(attach(&rig, 1) > 0);
    description_free(&rules);
    rig_close(&rig);
}

/* Commands are taken before the engine runs, the stop among them. What is on its way out has its answer. */
static void test_stop_before_run(void)
{
    struct rig rig;

    check_case("stop before run");
    rig_open(&rig);
    CHECK_EQUAL(attach(&rig, 0), 1);
    CHECK_EQUAL(attach(&rig, 1), 2);
    CHECK_EQUAL(engine_detach_ingress(rig.engine, 0), 3);
    CHECK_EQUAL(engine_stop(rig.engine), 4);
    rig_run(&rig);
    rig_join(&rig);
    rig_take_answers(&rig);
    for (unsigned ticket = 1; ticket <= 4; ticket++) {
        CHECK(rig.answered[ticket]);
        CHECK_EQUAL(rig.results[ticket], 0);
    }
    rig_close(&rig);
}

/* Whoever stops twice gets two answers. */
static void test_stop_twice(void)
{
    struct rig rig;

    check_case("stop twice");
    rig_open(&rig);
    CHECK_EQUAL(attach(&rig, 0), 1);
    CHECK_EQUAL(engine_stop(rig.engine), 2);
    CHECK_EQUAL(engine_stop(rig.engine), 3);
    rig_run(&rig);
    rig_join(&rig);
    rig_take_answers(&rig);
    CHECK(rig.answered[1] && rig.answered[2] && rig.answered[3]);
    CHECK_EQUAL(rig.results[2], 0);
    CHECK_EQUAL(rig.results[3], -EALREADY);
    rig_close(&rig);
}

/* An ingress that arrives behind the stop does not keep the engine running. */
static void test_attach_behind_stop(void)
{
    struct rig rig;

    check_case("attach behind stop");
    rig_open(&rig);
    CHECK_EQUAL(engine_stop(rig.engine), 1);
    CHECK_EQUAL(attach(&rig, 0), 2);
    rig_run(&rig);
    rig_join(&rig);
    rig_take_answers(&rig);
    CHECK(rig.answered[1] && rig.answered[2]);
    CHECK_EQUAL(rig.results[1], 0);
    CHECK_EQUAL(rig.results[2], -ECANCELED);
    rig_close(&rig);
}

int main(void)
{
    test_detach_during_traffic();
    test_successors();
    test_close();
    test_stop_before_run();
    test_stop_twice();
    test_attach_behind_stop();
    return 0;
}

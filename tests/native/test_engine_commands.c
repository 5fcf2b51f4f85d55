/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_engine_commands.c: each accepted command has one answer, is told apart from what came before and after it, and
 * takes effect between two packets. rig.h draws the wiring.
 */
#include "traffic.h"

#include <dirent.h>
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum {
    OUTSTANDING_MAX = 64,
    RULE_CHANGES = 1000,
    COPIES = 1000, /* more than the engine sends in a turn, and no multiple: some packets take three turns */
    COPY_CHANGES = 50,
    PACKETS_BEFORE_CHANGE_MAX = 100,
};

static int64_t attach(struct rig *rig, unsigned interface)
{
    return engine_attach_receive(rig->engine, interface, rig->ingress[0], false, RIG_MTU, 4);
}

static int64_t set_rules(struct rig *rig, const struct description *rules)
{
    return engine_set_rules(rig->engine, rules->bytes, rules->length);
}

static void test_answers(void)
{
    struct rig rig;

    check_case("answers");
    rig_open(&rig);
    rig_run(&rig);
    for (unsigned round = 0; round < 3; round++) { /* nothing is left behind that a second time would meet */
        CHECK_EQUAL(rig_answer(&rig, engine_detach_ingress(rig.engine, 63)), -ENOENT);
        CHECK_EQUAL(rig_answer(&rig, engine_detach_egress(rig.engine, 63, WAY_UDP4)), -ENOENT);
        CHECK_EQUAL(rig_answer(&rig, attach(&rig, 63)), 0);
        CHECK_EQUAL(rig_answer(&rig, attach(&rig, 63)), -EEXIST);
        CHECK_EQUAL(rig_answer(&rig, rig_attach_egress(&rig, 63, WAY_UDP4, rig.egress, RIG_LOOPBACK_MTU)), 0);
        CHECK_EQUAL(rig_answer(&rig, rig_attach_egress(&rig, 63, WAY_UDP4, rig.egress, RIG_LOOPBACK_MTU)), 0);
        CHECK_EQUAL(rig_answer(&rig, engine_detach_egress(rig.engine, 63, WAY_UDP4)), 0);
        CHECK_EQUAL(rig_answer(&rig, engine_detach_ingress(rig.engine, 63)), 0);
    }
    CHECK_EQUAL(rig_answer(&rig, engine_set_rules(rig.engine, NULL, 0)), 0);
    rig_close(&rig);
}

static void expect_slots(const struct rig *rig, uint64_t slots)
{
    /* Written behind the answer, at the end of a turn. */
    for (unsigned waited_ms = 0; waited_ms < 2000; waited_ms++) {
        if (rig->page->pool_slots == slots && rig->page->pool_free == slots)
            break;
        poll(NULL, 0, 1);
    }
    CHECK_EQUAL(rig->page->pool_slots, slots);
    CHECK_EQUAL(rig->page->pool_free, slots);
}

/* The page says how many slots the attached interfaces have: none, once the only one is detached. */
static void test_slots_counted(void)
{
    struct rig rig;

    check_case("slots counted");
    rig_open(&rig);
    rig_run(&rig);
    rig_attach(&rig, 0, 8);
    expect_slots(&rig, 8);
    rig_attach(&rig, 1, 2);
    expect_slots(&rig, 10);
    CHECK_EQUAL(rig_answer(&rig, engine_detach_ingress(rig.engine, 0)), 0);
    expect_slots(&rig, 2);
    CHECK_EQUAL(rig_answer(&rig, engine_detach_ingress(rig.engine, 1)), 0);
    expect_slots(&rig, 0);
    rig_close(&rig);
}

/* How often the other threads of this process have gone to sleep: the engine's, and nobody else's. */
static uint64_t sleeps(void)
{
    DIR *tasks = opendir("/proc/self/task");
    uint64_t sum = 0;

    CHECK(tasks != NULL);
    for (const struct dirent *task; (task = readdir(tasks));) {
        char path[64], line[128];
        FILE *status;

        if (atoi(task->d_name) <= 0 || atoi(task->d_name) == getpid())
            continue;
        snprintf(path, sizeof(path), "/proc/self/task/%d/status", atoi(task->d_name));
        status = fopen(path, "r");
        while (status && fgets(line, sizeof(line), status))
            if (!strncmp(line, "voluntary_ctxt_switches:", 24))
                sum += strtoull(line + 24, NULL, 10);
        if (status)
            fclose(status);
    }
    closedir(tasks);
    return sum;
}

/* Processor time that the engine's thread uses while nothing is asked of it, for so long. */
static int64_t used_ms(const struct rig *rig, int while_ms)
{
    struct timespec before, after;
    clockid_t clock;

    CHECK_EQUAL(pthread_getcpuclockid(rig->thread, &clock), 0);
    CHECK_EQUAL(clock_gettime(clock, &before), 0);
    poll(NULL, 0, while_ms);
    CHECK_EQUAL(clock_gettime(clock, &after), 0);
    return (after.tv_sec - before.tv_sec) * 1000 + (after.tv_nsec - before.tv_nsec) / 1000000;
}

/* With nothing to do the engine sleeps; after a packet its timer lets it turn twice more. */
static void test_idle(void)
{
    uint64_t before;
    struct rig rig;

    check_case("idle");
    rig_open(&rig);
    rig_run(&rig);
    rig_attach(&rig, 0, 4);
    rig_send(&rig, 0, 64, (const uint8_t *)"one", 3);
    rig_wait_received(&rig, 1);
    before = sleeps();
    CHECK(used_ms(&rig, 300) < 30); /* it does not spin; longer only means more chances to fail */
    CHECK(sleeps() - before < 10);
    rig_close(&rig);
}

/* A batch is a turn in which packets were taken up; commands and the timer make turns, too. */
static void test_batches(void)
{
    struct rig rig;

    check_case("batches");
    rig_open(&rig);
    rig_run(&rig);
    rig_attach(&rig, 0, 4);
    CHECK_EQUAL(rig_answer(&rig, engine_set_rules(rig.engine, NULL, 0)), 0);
    CHECK_EQUAL(rig.page->batches, 0);
    for (unsigned sent = 1; sent <= 3; sent++) {
        rig_send(&rig, 0, 64, (const uint8_t *)"one", 3);
        rig_wait_received(&rig, sent);
        for (unsigned i = 0; i < 5; i++)
            CHECK_EQUAL(rig_answer(&rig, engine_set_rules(rig.engine, NULL, 0)), 0);
        CHECK_EQUAL(rig.page->batches, sent);
    }
    rig_close(&rig);
}

/* A descriptor that cannot be received from is tried again by the timer, not all the time, and can be detached. */
static void test_broken_ingress(void)
{
    uint64_t before;
    struct rig rig;

    check_case("ingress that cannot be received from");
    rig_open(&rig);
    rig_run(&rig);
    CHECK_EQUAL(rig_answer(&rig, engine_attach_receive(rig.engine, 0, rig.command_fd, false, RIG_MTU, 4)), 0);
    before = sleeps();
    CHECK(used_ms(&rig, 300) < 30);
    CHECK(sleeps() - before < 20);
    CHECK_EQUAL(rig_answer(&rig, engine_detach_ingress(rig.engine, 0)), 0);
    CHECK_EQUAL(rig.page->received, 0);
    rig_close(&rig);
}

static void test_arguments(void)
{
    struct description rules = {0};
    struct rig rig;

    check_case("arguments");
    rig_open(&rig);
    CHECK_EQUAL(attach(&rig, 64), -EINVAL);
    CHECK_EQUAL(attach(&rig, 256), -EINVAL); /* 0, if it were cut to 8 bits too early */
    CHECK_EQUAL(engine_attach_receive(rig.engine, 0, -1, false, RIG_MTU, 4), -EINVAL);
    CHECK_EQUAL(engine_attach_receive(rig.engine, 0, rig.ingress[0], false, 67, 4), -EINVAL);
    CHECK_EQUAL(engine_attach_receive(rig.engine, 0, rig.ingress[0], false, RIG_MTU, 3), -EINVAL);
    CHECK_EQUAL(engine_detach_ingress(rig.engine, 64), -EINVAL);
    CHECK_EQUAL(rig_attach_egress(&rig, 64, WAY_UDP4, rig.egress, RIG_LOOPBACK_MTU), -EINVAL);
    CHECK_EQUAL(rig_attach_egress(&rig, 0, WAY_UDP4, -1, RIG_LOOPBACK_MTU), -EINVAL);
    CHECK_EQUAL(engine_detach_egress(rig.engine, 64, WAY_UDP4), -EINVAL);
    rig_describe(&rig, &rules, 1, 0);
    CHECK_EQUAL(engine_set_rules(rig.engine, rules.bytes, rules.length - 1), -EINVAL);
    description_free(&rules);
    CHECK_EQUAL(engine_set_own_addresses(rig.engine, (const uint8_t *)"fifteen bytes..", 15), -EINVAL);
    rig_run(&rig);
    CHECK(!rig_take_answers(&rig));
    CHECK_EQUAL(rig_answer(&rig, engine_detach_egress(rig.engine, 0, WAY_UDP4)), -ENOENT); /* the first one taken */
    CHECK(rig.answered[1]);
    rig_close(&rig);
}

static void test_busy(void)
{
    struct engine_answer answer;
    struct description rules = {0};
    struct rig rig;

    check_case("too many commands");
    rig_open(&rig);
    rig_describe(&rig, &rules, 1, 0);
    for (unsigned round = 0; round < 3; round++) {
        int64_t first = set_rules(&rig, &rules);

        CHECK(first > 0);
        for (unsigned i = 1; i < OUTSTANDING_MAX; i++)
            CHECK_EQUAL(set_rules(&rig, &rules), first + i);
        if (round == 0) { /* not running: nothing can be answered meanwhile */
            CHECK_EQUAL(set_rules(&rig, &rules), -EBUSY);
            CHECK_EQUAL(attach(&rig, 0), -EBUSY);
            CHECK_EQUAL(engine_detach_ingress(rig.engine, 0), -EBUSY);
            CHECK_EQUAL(rig_attach_egress(&rig, 0, WAY_UDP4, rig.egress, RIG_LOOPBACK_MTU), -EBUSY);
            CHECK_EQUAL(engine_detach_egress(rig.engine, 0, WAY_UDP4), -EBUSY);
            CHECK_EQUAL(engine_stop(rig.engine), -EBUSY);
            CHECK(!engine_answer(rig.engine, &answer));
            rig_run(&rig);
        }
        CHECK_EQUAL(rig_answer(&rig, first + OUTSTANDING_MAX - 1), 0);
        for (unsigned i = 0; i < OUTSTANDING_MAX; i++) /* in order, so all are there with the last */
            CHECK(rig.answered[first + i]);
    }
    description_free(&rules);
    rig_close(&rig);
}

/* Two rule sets by turns while packets flow: each packet goes by one of them, whole. */
static void test_rules_during_traffic(uint32_t slots)
{
    struct description sets[2] = {{0}, {0}}, both = {0};
    int64_t tickets[OUTSTANDING_MAX];
    unsigned changed = 0, answered = 0;
    struct traffic traffic;
    struct rig rig;

    check_case("rules changed during traffic, %u slots", slots);
    rig_open(&rig);
    rig_run(&rig);
    rig_attach(&rig, 0, slots);
    for (unsigned set = 0; set < 2; set++) {
        description_rule(&sets[set], RIG_GROUP, RIG_PORT, 0, 2, set);
        for (unsigned i = 2 * set; i < 2 * set + 2; i++)
            description_output(&sets[set], RIG_LOOPBACK, rig.ports[i], 0, 0, i);
        description_append(&both, sets[set].bytes, sets[set].length);
    }
    CHECK_EQUAL(rig_answer(&rig, set_rules(&rig, &sets[1])), 0);
    traffic_open(&traffic, 100000, 0x3, 0xc);
    traffic_run(&rig, &traffic, 100);
    while (answered < RULE_CHANGES) {
        for (; changed < RULE_CHANGES && changed - answered < 4; changed++) {
            tickets[changed % OUTSTANDING_MAX] = set_rules(&rig, &sets[changed % 2]);
            CHECK(tickets[changed % OUTSTANDING_MAX] > 0);
        }
        /* At least one packet for each change, so that the packets cannot all pass before or behind the changes. */
        traffic_run(&rig, &traffic, traffic.done + 1);
        rig_take_answers(&rig);
        for (; answered < changed && rig.answered[tickets[answered % OUTSTANDING_MAX]]; answered++)
            CHECK_EQUAL(rig.results[tickets[answered % OUTSTANDING_MAX]], 0);
    }
    CHECK(traffic.sent + 100 < traffic.count);
    CHECK_EQUAL(rig_answer(&rig, set_rules(&rig, &sets[0])), 0);
    traffic.count = traffic.sent + 100;
    traffic_run(&rig, &traffic, traffic.count);
    rig_wait_received(&rig, traffic.count);
    CHECK_EQUAL(rig.page->rules[0].forwarded + rig.page->rules[1].forwarded, traffic.count);
    CHECK(rig.page->rules[0].forwarded >= 100 && rig.page->rules[1].forwarded >= 100);
    rig_check_counters(&rig, &both);
    traffic_close(&rig, &traffic);
    for (unsigned set = 0; set < 2; set++)
        description_free(&sets[set]);
    description_free(&both);
    rig_close(&rig);
}

/* Packets whose copies do not fit into one turn, without a pause: a command waits for the copies of the packet that is
 * under way, whose rule it may take away, and for no other packet. */
static void test_rules_between_packets(void)
{
    struct description sets[2] = {{0}, {0}}, both = {0};
    struct rig rig;

    check_case("rules changed between packets of many copies");
    rig_open(&rig);
    rig_run(&rig);
    for (unsigned set = 0; set < 2; set++) {
        description_rule(&sets[set], RIG_GROUP, RIG_PORT, 0, COPIES, set);
        for (unsigned i = 0; i < COPIES; i++)
            description_output(&sets[set], RIG_LOOPBACK, rig.ports[2 + set], 0, 0, set * COPIES + i);
        description_append(&both, sets[set].bytes, sets[set].length);
    }
    CHECK_EQUAL(rig_answer(&rig, set_rules(&rig, &sets[0])), 0);
    rig_attach(&rig, 0, 16);
    for (unsigned change = 1; change <= COPY_CHANGES; change++) {
        uint64_t before = rig.page->received;
        int64_t ticket = set_rules(&rig, &sets[change % 2]);

        CHECK(ticket > 0);
        while (!rig.answered[ticket]) {
            CHECK(rig.page->received - before < PACKETS_BEFORE_CHANGE_MAX);
            rig_flood(&rig);
            rig_take_answers(&rig);
        }
        CHECK_EQUAL(rig.results[ticket], 0);
    }
    rig_stop(&rig);
    rig_check_counters(&rig, &both);
    CHECK_EQUAL(rig.page->forwarded, rig.page->received);
    CHECK_EQUAL(rig.page->copies, rig.page->received * COPIES);
    for (unsigned set = 0; set < 2; set++)
        description_free(&sets[set]);
    description_free(&both);
    rig_close(&rig);
}

int main(void)
{
    test_answers();
    test_slots_counted();
    test_idle();
    test_batches();
    test_broken_ingress();
    test_arguments();
    test_busy();
    test_rules_during_traffic(4);
    test_rules_during_traffic(0);
    test_rules_between_packets();
    return 0;
}

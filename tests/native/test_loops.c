/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_loops.c: what goes round by way of another relay is found and suspended, and nothing else is. Time is what the
 * test says.
 */
#include "loops.h"

#include "check.h"

#include <arpa/inet.h>

enum {
    MS = 1000000,
    CIRCULATING_MAX = 4096,
    PAYLOAD = 64,
};

#define SECOND UINT64_C(1000000000)
#define START (UINT64_C(1000) * SECOND)
#define SENDER UINT32_C(0xcb00710a) /* 203.0.113.10 */
#define RELAY UINT32_C(0xc0000263)  /* 192.0.2.99 */
#define RULE UINT64_C(0x1234567890abcdef)

static enum loop_verdict judge(struct loop_watch *watch, uint32_t source, const uint8_t *payload, size_t length,
                               uint64_t now_ns)
{
    uint8_t *exact = exact_copy(payload, length);
    const struct packet packet = {
        .source = address_from_ipv4(htonl(source)), .payload = exact, .payload_length = length};
    enum loop_verdict verdict = loops_judge(watch, RULE, &packet, now_ns);

    free(exact);
    return verdict;
}

/* A payload of the usual length that has this number. */
static enum loop_verdict pass(struct loop_watch *watch, uint32_t source, uint32_t number, uint64_t now_ns)
{
    uint8_t payload[PAYLOAD] = {0};

    memcpy(payload, &number, sizeof(number));
    return judge(watch, source, payload, sizeof(payload), now_ns);
}

/* One payload goes round every `round_ns`, from now on. Returns when the loop was found, or 0 if it was not within
 * `patience_ns`. */
static uint64_t circulate(struct loop_watch *watch, uint32_t number, uint64_t now_ns, uint64_t round_ns,
                          uint64_t patience_ns)
{
    uint64_t end = now_ns + patience_ns;

    CHECK_EQUAL(pass(watch, SENDER, number, now_ns), LOOP_NONE);
    for (now_ns += round_ns; now_ns < end; now_ns += round_ns) {
        enum loop_verdict verdict = pass(watch, RELAY, number, now_ns);

        if (verdict == LOOP_FOUND)
            return now_ns;
        CHECK_EQUAL(verdict, LOOP_NONE);
    }
    return 0;
}

static void test_one_payload(void)
{
    static const uint64_t rounds_ns[] = {100, 50000, MS, 10 * MS};

    for (size_t i = 0; i < sizeof(rounds_ns) / sizeof(rounds_ns[0]); i++) {
        struct loop_watch watch = {0};
        uint64_t found;

        check_case("one payload goes round in %llu ns", (unsigned long long)rounds_ns[i]);
        found = circulate(&watch, 1, START, rounds_ns[i], SECOND);
        CHECK_EQUAL(found, START + LOOP_RETURNS_MIN * rounds_ns[i]);
        CHECK_EQUAL(watch.suspended_until_ns, found + SECOND);
    }
}

/* A sender of one new payload each millisecond, all of which go round `returns` times in each millisecond, in a rule
 * whose watch may have begun with a payload as the other relay sent it. */
static void test_storm(unsigned returns, bool begun_by_relay)
{
    struct loop_watch watch = {0};
    uint64_t now_ns = START;
    enum loop_verdict verdict = LOOP_NONE;

    check_case("a storm that goes round %u times a millisecond%s", returns, begun_by_relay ? ", begun by the relay" : "");
    if (begun_by_relay)
        pass(&watch, RELAY, CIRCULATING_MAX, now_ns);
    for (uint32_t newest = 0; verdict == LOOP_NONE; newest++) {
        CHECK(newest < 250);
        verdict = pass(&watch, SENDER, newest, now_ns);
        for (unsigned round = 0; round < returns; round++)
            for (uint32_t old = 0; old <= newest && verdict == LOOP_NONE; old++)
                verdict = pass(&watch, RELAY, old, now_ns);
        now_ns += MS;
    }
    CHECK_EQUAL(verdict, LOOP_FOUND);
}

static void test_constant_payload(void)
{
    struct loop_watch watch = {0};

    check_case("one sender's constant payload");
    for (uint64_t now_ns = START; now_ns < START + 5 * SECOND; now_ns += 5000)
        CHECK_EQUAL(pass(&watch, SENDER, 1, now_ns), LOOP_NONE);
}

/* Two feeds of the same payloads, `skew` packets apart; with `distinct` false it is the same payload for ever. */
static void test_two_feeds(uint32_t skew, bool distinct)
{
    struct loop_watch watch = {0};
    uint64_t now_ns = START;

    check_case("two feeds, %u packets apart, %s payloads", skew, distinct ? "distinct" : "equal");
    for (uint32_t number = 0; number < 300000; number++) {
        CHECK_EQUAL(pass(&watch, SENDER, distinct ? number : 1, now_ns), LOOP_NONE);
        if (number >= skew)
            CHECK_EQUAL(pass(&watch, RELAY, distinct ? number - skew : 1, now_ns), LOOP_NONE);
        now_ns += 10000;
    }
}

/* A constant payload whose source changes for good, and back, every half a second. */
static void test_changing_source(void)
{
    struct loop_watch watch = {0};

    check_case("one source after the other");
    for (uint64_t at = 0; at < 20 * SECOND; at += MS)
        CHECK_EQUAL(pass(&watch, at / (SECOND / 2) % 2 ? SENDER : RELAY, 1, START + at), LOOP_NONE);
}

static void test_many_sources(void)
{
    struct loop_watch watch = {0};
    uint64_t state = UINT64_C(0x6c6f6f7073);

    check_case("many hosts with the same payload");
    for (unsigned i = 0; i < 500000; i++)
        CHECK_EQUAL(pass(&watch, SENDER + random_below(&state, 100), 1, START + i * UINT64_C(10000)), LOOP_NONE);
}

/* 31 returns of a payload, and the 32nd as `payload`: not the same one. */
static void almost(const uint8_t *watched, const uint8_t *payload, size_t length, size_t other_length)
{
    struct loop_watch watch = {0};

    CHECK_EQUAL(judge(&watch, SENDER, watched, length, START), LOOP_NONE);
    for (unsigned i = 1; i < LOOP_RETURNS_MIN; i++)
        CHECK_EQUAL(judge(&watch, RELAY, watched, length, START + i), LOOP_NONE);
    CHECK_EQUAL(judge(&watch, RELAY, payload, other_length, START + 50), LOOP_NONE);
    CHECK_EQUAL(judge(&watch, SENDER + 1, watched, length, START + 51), LOOP_NONE); /* a third source */
    CHECK_EQUAL(judge(&watch, RELAY, watched, length, START + 52), LOOP_FOUND);
}

static void test_comparison(void)
{
    static const size_t lengths[] = {0, 1, 7, 8, 9, 15, 16, 17, 1472};
    static const uint8_t zeros[1473];
    uint8_t watched[1473], other[1473];

    for (size_t i = 0; i < sizeof(watched); i++)
        watched[i] = other[i] = (uint8_t)(i * 7 + 1);
    for (size_t i = 0; i < sizeof(lengths) / sizeof(lengths[0]); i++) {
        const size_t length = lengths[i];

        check_case("payloads of %zu bytes", length);
        almost(zeros, zeros, length, length + 1);
        for (size_t at = 0; at < length; at++) {
            if (at >= 8 && at + 8 < length)
                continue; /* between the ends */
            other[at] ^= 0x80;
            almost(watched, other, length, length);
            other[at] ^= 0x80;
        }
    }
}

/* The sender repeats itself: it takes eight returns for each time. */
static void test_repeats(void)
{
    struct loop_watch watch = {0};

    check_case("a sender that repeats itself");
    for (unsigned i = 0; i < 10; i++)
        CHECK_EQUAL(pass(&watch, SENDER, 1, START), LOOP_NONE); /* 9 repeats */
    for (unsigned i = 1; i < 10 * LOOP_RETURNS_PER_REPEAT; i++)
        CHECK_EQUAL(pass(&watch, RELAY, 1, START + i), LOOP_NONE);
    CHECK_EQUAL(pass(&watch, RELAY, 1, START + 80), LOOP_FOUND);
}

/* What returns too slowly for a loop is not watched for ever. */
static void test_slow_returns(void)
{
    struct loop_watch watch = {0};

    check_case("32 returns in more than two seconds");
    CHECK_EQUAL(circulate(&watch, 1, START, 70 * MS, 10 * SECOND), 0);
    check_case("watched for two seconds, and not longer");
    watch = (struct loop_watch){0};
    CHECK_EQUAL(pass(&watch, SENDER, 1, START), LOOP_NONE);
    for (unsigned i = 1; i < LOOP_RETURNS_MIN; i++)
        CHECK_EQUAL(pass(&watch, RELAY, 1, START + i), LOOP_NONE);
    CHECK_EQUAL(pass(&watch, SENDER, 2, START + 2 * SECOND + 1), LOOP_NONE);
    for (unsigned i = 0; i < 10; i++)
        CHECK_EQUAL(pass(&watch, RELAY, 1, START + 2 * SECOND + 2), LOOP_NONE);
}

/* A sender whose watched payload does not come back sends another one, which does. */
static void test_next_payload(void)
{
    struct loop_watch watch = {0};
    uint64_t found;

    check_case("the next payload");
    for (uint64_t at = 0; at <= SECOND; at += MS)
        CHECK_EQUAL(pass(&watch, SENDER, 1, START + at), LOOP_NONE);
    found = circulate(&watch, 2, START + SECOND + MS, MS, SECOND);
    CHECK_EQUAL(found, START + SECOND + MS + LOOP_RETURNS_MIN * MS);
}

/* A loop that is there again whenever the suspension ends. */
static void test_suspensions(void)
{
    static const unsigned seconds[] = {1, 2, 4, 8, 16, 32, 64, 64, 64};
    struct loop_watch watch = {0};
    uint64_t now_ns = START;

    for (size_t i = 0; i < sizeof(seconds) / sizeof(seconds[0]); i++) {
        check_case("suspension %zu", i);
        now_ns = circulate(&watch, 1, now_ns, MS, SECOND);
        CHECK(now_ns);
        CHECK_EQUAL(watch.suspended_until_ns, now_ns + seconds[i] * SECOND);
        for (unsigned rest = 0; rest < 3; rest++)
            CHECK_EQUAL(pass(&watch, SENDER + rest, rest, now_ns + rest), LOOP_SUSPENDED);
        now_ns = watch.suspended_until_ns;
        CHECK_EQUAL(pass(&watch, RELAY, 2, now_ns - 1), LOOP_SUSPENDED);
    }
    check_case("after less than four times as long");
    now_ns = circulate(&watch, 1, now_ns + 4 * 64 * SECOND - 33 * MS, MS, SECOND);
    CHECK_EQUAL(watch.suspended_until_ns, now_ns + 64 * SECOND);
    check_case("after four times as long");
    now_ns = circulate(&watch, 1, watch.suspended_until_ns + 4 * 64 * SECOND, MS, SECOND);
    CHECK_EQUAL(watch.suspended_until_ns, now_ns + SECOND);
}

static void test_reused_counter(void)
{
    const struct packet packet = {.source = address_from_ipv4(htonl(SENDER)), .payload = (const uint8_t *)""};
    struct loop_watch watch = {0};
    uint64_t found;

    check_case("another rule with the same counter");
    found = circulate(&watch, 1, START, MS, SECOND);
    CHECK_EQUAL(pass(&watch, SENDER, 2, found + 1), LOOP_SUSPENDED);
    CHECK_EQUAL(loops_judge(&watch, RULE + 1, &packet, found + 2), LOOP_NONE);
    found = circulate(&watch, 1, found + 3, MS, SECOND);
    CHECK_EQUAL(watch.suspended_until_ns, found + SECOND); /* its first */
}

/* Two sources of one constant payload, one of them a hundred times as fast: as from a loop, but it does not fall silent. */
static void test_acquittal(void)
{
    struct loop_watch watch = {0};
    uint64_t began = circulate(&watch, 1, START, MS, SECOND), now_ns = began;

    check_case("what goes on during a suspension");
    CHECK(began);
    for (; now_ns < began + LOOP_DRAIN_NS; now_ns += MS)
        CHECK_EQUAL(pass(&watch, RELAY, 1, now_ns), LOOP_SUSPENDED);
    CHECK_EQUAL(pass(&watch, RELAY, 1, now_ns), LOOP_ACQUITTED);
    CHECK_EQUAL(watch.suspended_until_ns, now_ns);
    for (uint64_t end = now_ns + 10 * SECOND; now_ns < end; now_ns += MS)
        CHECK_EQUAL(pass(&watch, now_ns / MS % 100 ? RELAY : SENDER, 1, now_ns), LOOP_NONE);
    /* Another payload is another matter, and its first suspension is a second's. */
    now_ns = circulate(&watch, 2, now_ns + 2 * SECOND, MS, SECOND);
    CHECK(now_ns);
    CHECK_EQUAL(watch.suspended_until_ns, now_ns + SECOND);
}

/* Neither another payload, nor the same from another source, nor what drains shows that it was none. */
static void test_no_acquittal(void)
{
    struct loop_watch watch = {0};
    uint64_t began = circulate(&watch, 1, START, MS, SECOND);

    check_case("what does not end a suspension");
    CHECK_EQUAL(pass(&watch, RELAY, 1, began + LOOP_DRAIN_NS - 1), LOOP_SUSPENDED);
    CHECK_EQUAL(pass(&watch, RELAY, 2, began + LOOP_DRAIN_NS), LOOP_SUSPENDED);
    CHECK_EQUAL(pass(&watch, SENDER, 1, began + LOOP_DRAIN_NS), LOOP_SUSPENDED);
    CHECK_EQUAL(pass(&watch, RELAY, 1, began + LOOP_DRAIN_NS), LOOP_ACQUITTED);
}

static void test_memory(void)
{
    struct loop_watch *watches = loops_new();

    check_case("a watch for each rule");
    CHECK(watches);
    CHECK_EQUAL((uintptr_t)watches % 64, 0);
    CHECK_EQUAL(pass(&watches[0], SENDER, 1, 1), LOOP_NONE);
    CHECK_EQUAL(pass(&watches[COUNTERS_RULES_MAX - 1], SENDER, 1, 1), LOOP_NONE);
    loops_free(watches);
    loops_free(NULL);
}

int main(void)
{
    test_one_payload();
    test_storm(1, false);
    test_storm(1, true);
    test_storm(10, true);
    test_constant_payload();
    test_two_feeds(0, true);
    test_two_feeds(0, false);
    test_two_feeds(100, true);
    test_two_feeds(100, false);
    test_changing_source();
    test_many_sources();
    test_comparison();
    test_repeats();
    test_slow_returns();
    test_next_payload();
    test_suspensions();
    test_reused_counter();
    test_acquittal();
    test_no_acquittal();
    test_memory();
    return 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_analyser.c: the account of datagrams, made here byte by byte: every kind of fault is counted as what it is, also
 * where windows come round again, beside a plain list of what has come; latencies land in the right bucket; and RTP
 * streams that are not ours are accounted for by what RTP says.
 */
#include "analyser.h"

#include "check.h"

#include <errno.h>

enum { SIZE = 100, SECOND = 1000000000, LATENCY = 50000, RANDOM_RUNS = 300000, RANDOM_SEQUENCES = 1 << 20 };

static const uint64_t start_ns = UINT64_C(1700000000) * SECOND;

static struct analyser *opened(uint32_t flows, bool rtp)
{
    struct analyser *analyser;

    CHECK_EQUAL(analyser_open(&analyser, flows, rtp), 0);
    return analyser;
}

static void build(uint8_t *to, size_t size, uint32_t flow, uint64_t sequence, uint64_t sent_ns)
{
    static uint8_t pattern[PATTERN_SIZE];

    pattern_fill(pattern);
    payload_write_header(to, flow, sequence, sent_ns);
    memcpy(to + PAYLOAD_HEADER, pattern + (flow % 61 + sequence % 61 + sent_ns % 61) % 61, size - PAYLOAD_HEADER);
}

static void account_exactly(struct analyser *analyser, const uint8_t *bytes, size_t length, uint64_t arrived_ns)
{
    uint8_t *copy = exact_copy(bytes, length);

    analyser_account(analyser, copy, length, arrived_ns);
    free(copy);
}

static void arrive(struct analyser *analyser, uint32_t flow, uint64_t sequence)
{
    uint8_t datagram[PAYLOAD_HEADER]; /* without padding: quick to build */

    payload_write_header(datagram, flow, sequence, start_ns);
    analyser_account(analyser, datagram, sizeof(datagram), start_ns + LATENCY);
}

/* received, expected, reordered, duplicated, late, corrupted, foreign */
static void check_totals(const struct analyser *analyser, const uint64_t totals[7])
{
    CHECK_EQUAL(analyser->totals.received, totals[0]);
    CHECK_EQUAL(analyser->totals.expected, totals[1]);
    CHECK_EQUAL(analyser->totals.reordered, totals[2]);
    CHECK_EQUAL(analyser->totals.duplicated, totals[3]);
    CHECK_EQUAL(analyser->totals.late, totals[4]);
    CHECK_EQUAL(analyser->totals.corrupted, totals[5]);
    CHECK_EQUAL(analyser->totals.foreign, totals[6]);
}

static void test_pattern(void)
{
    static const uint8_t first[] = {0x90, 0x9c, 0x6e, 0x0e};
    uint8_t pattern[PATTERN_SIZE];

    check_case("the pattern is fixed");
    pattern_fill(pattern);
    CHECK_BYTES(pattern, first, sizeof(first));
}

static const struct order {
    const char *name;
    uint64_t sequences[8];
    size_t count;
    uint64_t totals[7];
} orders[] = {
    {"in order", {0, 1, 2, 3}, 4, {4, 4, 0, 0, 0, 0, 0}},
    {"a gap", {0, 1, 5, 6}, 4, {4, 7, 0, 0, 0, 0, 0}},
    {"joined late", {700, 701, 703}, 3, {3, 4, 0, 0, 0, 0, 0}},
    {"reordered at the start", {2, 0, 1, 3}, 4, {4, 4, 2, 0, 0, 0, 0}},
    {"reordered", {0, 2, 1, 5, 3, 4}, 6, {6, 6, 3, 0, 0, 0, 0}},
    {"duplicated", {0, 1, 1, 2, 0, 3, 1}, 7, {4, 4, 0, 3, 0, 0, 0}},
    {"far apart", {0, 1000000, 999999, 1000000}, 4, {3, 1000001, 1, 1, 0, 0, 0}},
    {"no outage is that long", {0, LEAP_MAX + 1, 1}, 3, {2, 2, 0, 0, 0, 1, 0}},
    {"no flow is that long", {UINT64_C(1) << 62, 4}, 2, {1, 1, 0, 0, 0, 1, 0}},
};

static void test_orders(void)
{
    for (size_t i = 0; i < sizeof(orders) / sizeof(orders[0]); i++) {
        struct analyser *analyser = opened(1, false);

        check_case("%s", orders[i].name);
        for (size_t at = 0; at < orders[i].count; at++)
            arrive(analyser, 0, orders[i].sequences[at]);
        check_totals(analyser, orders[i].totals);
        analyser_close(analyser);
    }
}

/* A window that has come round many times: what left it is late, what is in it is known. */
static void test_window(void)
{
    struct analyser *analyser = opened(FLOWS_MAX, false);
    uint64_t sequence = 0;

    check_case("a window's end");
    for (; sequence < 3 * WINDOW_BITS_MIN; sequence++)
        arrive(analyser, 9, sequence);
    arrive(analyser, 9, sequence - WINDOW_BITS_MIN);
    CHECK_EQUAL(analyser->totals.duplicated, 1);
    arrive(analyser, 9, sequence - WINDOW_BITS_MIN - 1);
    CHECK_EQUAL(analyser->totals.late, 1);
    arrive(analyser, 9, sequence + 100); /* those passed over were set a window ago */
    for (uint64_t passed = sequence; passed < sequence + 100; passed++)
        arrive(analyser, 9, passed);
    CHECK_EQUAL(analyser->totals.reordered, 100);
    arrive(analyser, 9, sequence + 100 + 2 * WINDOW_BITS_MIN); /* all of it */
    arrive(analyser, 9, sequence + 100 + 2 * WINDOW_BITS_MIN - 77);
    CHECK_EQUAL(analyser->totals.reordered, 101);
    CHECK_EQUAL(analyser->totals.duplicated, 1);
    analyser_close(analyser);
}

/* Beside a list of all that has come. */
static void test_random(void)
{
    static bool come[RANDOM_SEQUENCES];
    struct analyser *analyser = opened(FLOWS_MAX, false);
    uint64_t state = UINT64_C(0x616e616c), next = 0, totals[7] = {0}, lowest = RANDOM_SEQUENCES;

    for (unsigned run = 0; run < RANDOM_RUNS && next < RANDOM_SEQUENCES - 100000; run++) {
        uint32_t kind = random_below(&state, 100);
        uint64_t sequence = next;

        check_case("random datagram %u", run);
        if (kind >= 98 && next > 0)
            sequence = random_below(&state, (uint32_t)next); /* anywhere before */
        else if (kind >= 80 && next > 200)
            sequence = next - random_below(&state, 200);
        else if (kind >= 60)
            sequence = next + random_below(&state, 10);
        else if (kind == 0)
            sequence = next + random_below(&state, 2 * WINDOW_BITS_MIN) / (1 + random_below(&state, 100));
        arrive(analyser, 7, sequence);
        if (sequence >= next) {
            next = sequence + 1;
        } else if (sequence + WINDOW_BITS_MIN < next) {
            totals[4]++;
            continue;
        } else if (come[sequence]) {
            totals[3]++;
            continue;
        } else {
            totals[2]++;
        }
        come[sequence] = true;
        lowest = sequence < lowest ? sequence : lowest;
        totals[0]++;
        totals[1] = next - lowest;
        check_totals(analyser, totals);
    }
    CHECK(totals[2] > 1000 && totals[3] > 1000 && totals[4] > 100 && next > 3 * WINDOW_BITS_MIN);
    analyser_close(analyser);
}

static void test_every_flipped_bit(void)
{
    struct analyser *analyser = opened(1, false);
    uint64_t corrupted = 0, foreign = 0;
    uint8_t good[SIZE], damaged[SIZE];

    build(good, SIZE, 3, 1234, start_ns);
    for (size_t at = 0; at < SIZE; at++) {
        for (unsigned bit = 0; bit < 8; bit++) {
            check_case("byte %zu, bit %u", at, bit);
            memcpy(damaged, good, SIZE);
            damaged[at] ^= (uint8_t)(1u << bit);
            account_exactly(analyser, damaged, SIZE, start_ns + LATENCY);
            at < 4 ? foreign++ : corrupted++;
            check_totals(analyser, (uint64_t[7]){0, 0, 0, 0, 0, corrupted, foreign});
        }
    }
    account_exactly(analyser, good, SIZE, start_ns + LATENCY);
    CHECK_EQUAL(analyser->totals.received, 1);
    CHECK_EQUAL(analyser->totals.bytes, SIZE);
    analyser_close(analyser);
}

static void test_lengths(void)
{
    static uint8_t longest[DATAGRAM_MAX + 1];
    struct analyser *analyser = opened(1, false);
    uint8_t datagram[SIZE + 1] = {0};

    check_case("lengths");
    account_exactly(analyser, datagram, 0, start_ns);
    build(datagram, SIZE, 0, 0, start_ns);
    for (size_t length = 0; length < PAYLOAD_HEADER; length++)
        account_exactly(analyser, datagram, length, start_ns);
    CHECK_EQUAL(analyser->totals.foreign, PAYLOAD_HEADER + 1);
    datagram[SIZE] = (uint8_t)(datagram[SIZE - 1] + 1); /* longer than sent */
    account_exactly(analyser, datagram, SIZE + 1, start_ns);
    CHECK_EQUAL(analyser->totals.corrupted, 1);
    build(longest, DATAGRAM_MAX, 60, 60, start_ns); /* the last window of the pattern at its longest, or near it */
    account_exactly(analyser, longest, DATAGRAM_MAX, start_ns);
    CHECK_EQUAL(analyser->totals.received, 1);
    account_exactly(analyser, longest, DATAGRAM_MAX + 1, start_ns);
    CHECK_EQUAL(analyser->totals.corrupted, 2);
    analyser_close(analyser);
}

static void test_flows(void)
{
    struct analyser *analyser = opened(2, false), *most = opened(FLOWS_MAX, false);

    check_case("flows");
    for (uint32_t flow = 0; flow < 2 + FLOWS_SPARE; flow++)
        for (uint64_t sequence = 0; sequence < 3; sequence++)
            arrive(analyser, flow * 0x01010101u, sequence);
    CHECK_EQUAL(analyser->totals.flows, 2 + FLOWS_SPARE);
    arrive(analyser, 12345, 0);
    check_totals(analyser, (uint64_t[7]){3 * (2 + FLOWS_SPARE), 3 * (2 + FLOWS_SPARE), 0, 0, 0, 0, 1});
    analyser_close(analyser);
    for (uint64_t sequence = 0; sequence < 2; sequence++)
        for (uint32_t flow = 0; flow < FLOWS_MAX + FLOWS_SPARE; flow++)
            arrive(most, flow, sequence);
    CHECK_EQUAL(most->totals.received, 2 * (FLOWS_MAX + FLOWS_SPARE));
    CHECK_EQUAL(most->totals.duplicated, 0);
    analyser_close(most);
    CHECK_EQUAL(analyser_open(&analyser, 0, false), -EINVAL);
    CHECK_EQUAL(analyser_open(&analyser, FLOWS_MAX + 1, false), -EINVAL);
}

static void arrive_after(struct analyser *analyser, uint64_t sequence, int64_t latency_ns)
{
    uint8_t datagram[PAYLOAD_HEADER];

    payload_write_header(datagram, 0, sequence, start_ns);
    analyser_account(analyser, datagram, sizeof(datagram), start_ns + (uint64_t)latency_ns);
}

static void test_latency(void)
{
    uint64_t sequence = 0;
    struct analyser *analyser = opened(1, false);

    /* Of one datagram, at every scale. */
    for (uint64_t latency = 1; latency < UINT64_C(60) * SECOND; latency += latency / 13 + 1) {
        check_case("a latency of %" PRIu64 " ns", latency);
        memset(analyser->histogram, 0, sizeof(analyser->histogram));
        analyser->totals.latencies = analyser->totals.latency_max_ns = 0;
        arrive_after(analyser, sequence++, (int64_t)latency);
        CHECK(analyser_latency_ns(analyser, 0.5) <= latency);
        CHECK(analyser_latency_ns(analyser, 0.5) * 1000 >= latency * 992);
        CHECK_EQUAL(analyser->totals.latency_max_ns, latency);
    }
    analyser_close(analyser);
    check_case("percentiles");
    sequence = 0;
    analyser = opened(1, false);
    CHECK_EQUAL(analyser_latency_ns(analyser, 0.5), 0);
    for (; sequence < 1000; sequence++)
        arrive_after(analyser, sequence, sequence < 980 ? 100 : sequence < 999 ? 2000 : 120);
    CHECK_EQUAL(analyser_latency_ns(analyser, 0), 100);
    CHECK_EQUAL(analyser_latency_ns(analyser, 0.98), 100);
    CHECK_EQUAL(analyser_latency_ns(analyser, 0.981), 120);
    CHECK(analyser_latency_ns(analyser, 0.982) > 1980);
    CHECK_EQUAL(analyser_latency_ns(analyser, 1), 2000);
    check_case("clocks that differ");
    arrive_after(analyser, sequence++, -1);
    arrive_after(analyser, sequence++, INT64_C(1) << LATENCY_BITS);
    arrive_after(analyser, sequence++, (INT64_C(1) << LATENCY_BITS) - 1);
    CHECK_EQUAL(analyser->totals.clock_skew, 2);
    CHECK_EQUAL(analyser->totals.latencies, 1001);
    CHECK_EQUAL(analyser->totals.received, 1003);
    analyser_close(analyser);
}

static void test_jitter(void)
{
    struct analyser *analyser = opened(1, false);

    check_case("jitter");
    CHECK(analyser_jitter_ns(analyser) < 0);
    arrive_after(analyser, 0, 1000);
    CHECK(analyser_jitter_ns(analyser) < 0);
    arrive_after(analyser, 1, 1000);
    CHECK_EQUAL(analyser_jitter_ns(analyser), 0);
    arrive_after(analyser, 2, 2600);
    CHECK_EQUAL(analyser_jitter_ns(analyser), 100);
    /* Of a latency that goes to and fro by 1600 ns, it approaches that. */
    for (uint64_t sequence = 3; sequence < 1000; sequence++)
        arrive_after(analyser, sequence, sequence % 2 ? 1000 : 2600);
    CHECK(analyser_jitter_ns(analyser) > 1590 && analyser_jitter_ns(analyser) <= 1601);
    /* A clock that was set does not outweigh it. */
    arrive_after(analyser, 1000, -SECOND * INT64_C(1000));
    CHECK(analyser_jitter_ns(analyser) <= 1601);
    analyser_close(analyser);
}

static size_t build_rtp(uint8_t *to, uint16_t sequence, uint32_t timestamp, uint32_t ssrc)
{
    memset(to, 0, RTP_HEADER + 20);
    to[0] = 0x80;
    to[1] = 33; /* MPEG-TS */
    store16(to + 2, sequence);
    store32(to + 4, timestamp);
    store32(to + 8, ssrc);
    to[RTP_HEADER] = 0x47;
    return RTP_HEADER + 20;
}

static void test_rtp(void)
{
    static const uint16_t sequences[] = {65533, 65535, 65534, 0, 2, 2, 3, 65532, 1};
    struct analyser *analyser = opened(1, true);
    uint8_t datagram[SIZE];
    size_t length;

    check_case("a stranger's RTP");
    for (size_t i = 0; i < sizeof(sequences) / sizeof(sequences[0]); i++) {
        length = build_rtp(datagram, sequences[i], (uint32_t)(i * 90), 0xdeadbeef);
        account_exactly(analyser, datagram, length, start_ns + i * 1000000);
    }
    check_totals(analyser, (uint64_t[7]){8, 8, 3, 1, 0, 0, 0});
    CHECK_EQUAL(analyser->totals.latencies, 0);
    CHECK(analyser_jitter_ns(analyser) < 100000);

    check_case("several cycles");
    for (uint32_t i = 4; i < 200000; i++)
        analyser_account(analyser, datagram, build_rtp(datagram, (uint16_t)i, i, 0xdeadbeef), start_ns);
    CHECK_EQUAL(analyser->totals.received, 8 + 200000 - 4);
    CHECK_EQUAL(analyser->totals.expected, 8 + 200000 - 4);
    analyser_close(analyser);

    check_case("not RTP");
    analyser = opened(1, true);
    length = build_rtp(datagram, 0, 0, 1);
    for (size_t part = 0; part < RTP_HEADER; part++)
        account_exactly(analyser, datagram, part, start_ns);
    datagram[0] = 0x40; /* version 1 */
    account_exactly(analyser, datagram, length, start_ns);
    datagram[0] = 0x80;
    datagram[1] = 200; /* an RTCP sender report */
    account_exactly(analyser, datagram, length, start_ns);
    datagram[1] = 33;
    datagram[0] = 0x86; /* six sources, room for five */
    account_exactly(analyser, datagram, length, start_ns);
    datagram[0] = 0x90; /* an extension that is longer than the datagram */
    store16(datagram + RTP_HEADER + 2, 5);
    account_exactly(analyser, datagram, length, start_ns);
    account_exactly(analyser, datagram, RTP_HEADER + 3, start_ns);
    CHECK_EQUAL(analyser->totals.foreign, RTP_HEADER + 5);
    store16(datagram + RTP_HEADER + 2, 4);
    account_exactly(analyser, datagram, length, start_ns);
    CHECK_EQUAL(analyser->totals.received, 1);
    analyser_close(analyser);

    check_case("ours in RTP");
    analyser = opened(1, true);
    build_rtp(datagram, 1234, 0, 5);
    build(datagram + RTP_HEADER, SIZE - RTP_HEADER, 5, 0x10000 + 1234, start_ns);
    account_exactly(analyser, datagram, SIZE, start_ns + LATENCY);
    CHECK_EQUAL(analyser->totals.received, 1);
    CHECK_EQUAL(analyser->totals.latency_max_ns, LATENCY);
    datagram[3] ^= 1; /* the sequences differ */
    account_exactly(analyser, datagram, SIZE, start_ns + LATENCY);
    datagram[3] ^= 1;
    datagram[11] ^= 1; /* SSRC and flow do */
    account_exactly(analyser, datagram, SIZE, start_ns + LATENCY);
    datagram[11] ^= 1;
    datagram[SIZE - 1] ^= 1;
    account_exactly(analyser, datagram, SIZE, start_ns + LATENCY);
    CHECK_EQUAL(analyser->totals.corrupted, 3);
    analyser_close(analyser);
}

int main(void)
{
    test_pattern();
    test_orders();
    test_window();
    test_random();
    test_every_flipped_bit();
    test_lengths();
    test_flows();
    test_latency();
    test_jitter();
    test_rtp();
    return 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_egress.c: how datagrams become runs and runs become sends. Sends are noted here instead of made: each as the
 * message header that the kernel would read, at the time when it would.
 */
#include "egress.h"

#include "check.h"

#include <errno.h>
#include <netinet/udp.h>

#ifndef UDP_SEGMENT
#define UDP_SEGMENT 103
#endif

enum {
    MTU = 1500,
    OUTPUTS = RUNS_MAX + 8,
    SENT_MAX = 4096,
    FULL = RUN_BYTES_MAX,
    HEADERS = 28,
    SEGMENT_MAX = MTU - HEADERS,
    MANY = RUNS_MAX - RUNS_RESERVED, /* runs that may be open or in flight */
};

static struct sent {
    uint16_t index, count;
    uint32_t output, bytes;
    uint32_t slots[SEGMENTS_MAX];
} sent[SENT_MAX];

static struct runs runs;
static struct egress egress;
static struct ingress ways_in[2];
static uint8_t payload[FULL + 1];
static unsigned sent_count, checked, finished;
static uint32_t next_slot;

static struct table_output outputs[OUTPUTS][2]; /* by counter, with their TTL and with that of the packet */

static struct table_output output_of(uint32_t counter)
{
    return (struct table_output){
        .address = address_from_ipv4(htonl(0xc0000200 + counter % 256)), .counter = counter,
        .port = (uint16_t)(6000 + counter), .ttl = 9, .prefix = 128, .plain = true};
}

/* The run as a message: addressed to its output, its payloads within segments of one length, its TTL, no more. */
static void note(void *context, struct run *run, uint16_t index)
{
    const struct msghdr *message = &run->message;
    const struct sockaddr_in *address = message->msg_name;
    const struct table_output output = output_of(run->output);
    struct cmsghdr *control = CMSG_FIRSTHDR(message);
    uint16_t segment = 0;
    uint32_t bytes = 0;
    int ttl;

    CHECK(context == &egress);
    CHECK(run == &runs.all[index] && run->egress == &egress);
    CHECK_EQUAL(message->msg_namelen, sizeof(*address));
    CHECK_EQUAL(address->sin_family, AF_INET);
    CHECK_EQUAL(ntohs(address->sin_port), output.port);
    CHECK_EQUAL(address->sin_addr.s_addr, output.address.words[3]);
    CHECK(control && control->cmsg_level == IPPROTO_IP && control->cmsg_type == IP_TTL);
    CHECK_EQUAL(control->cmsg_len, CMSG_LEN(sizeof(ttl)));
    memcpy(&ttl, CMSG_DATA(control), sizeof(ttl));
    CHECK_EQUAL(ttl, run->heading.ttl);
    control = CMSG_NXTHDR((struct msghdr *)(uintptr_t)message, control);
    CHECK_EQUAL(control != NULL, run->count > 1);
    CHECK_EQUAL(message->msg_iovlen, run->count);
    CHECK(run->count > 0 && run->count <= SEGMENTS_MAX);
    if (control) {
        CHECK(control->cmsg_level == IPPROTO_UDP && control->cmsg_type == UDP_SEGMENT);
        CHECK_EQUAL(control->cmsg_len, CMSG_LEN(sizeof(segment)));
        memcpy(&segment, CMSG_DATA(control), sizeof(segment));
        CHECK(segment > 0 && segment + HEADERS <= MTU && egress.segmentation);
        CHECK(!CMSG_NXTHDR((struct msghdr *)(uintptr_t)message, control));
    }
    for (uint16_t i = 0; i < run->count; i++) {
        size_t length = message->msg_iov[i].iov_len;

        CHECK(message->msg_iov[i].iov_base == payload);
        CHECK(!segment || length == segment || (i == run->count - 1 && length && length < segment));
        bytes += (uint32_t)length;
    }
    CHECK_EQUAL(run->bytes, bytes);
    CHECK(bytes <= RUN_BYTES_MAX);
    CHECK(sent_count < SENT_MAX);
    sent[sent_count] = (struct sent){.index = index, .count = run->count, .output = run->output, .bytes = bytes};
    memcpy(sent[sent_count++].slots, run->slots, run->count * sizeof(run->slots[0]));
}

static void start(const char *name)
{
    check_case("%s", name);
    runs_init(&runs);
    egress = egress_of(0, WAY_UDP4, -1, MTU, &(struct egress_link){0});
    sent_count = checked = finished = 0;
    next_slot = 0;
}

static enum appended try_append(uint32_t counter, size_t length, uint8_t rule_ttl, uint8_t came_with, unsigned way_in)
{
    struct table_output *output = &outputs[counter][!rule_ttl];
    const struct packet packet = {
        .ttl = came_with, .payload = payload, .payload_length = length, .protocol = PROTOCOL_UDP};

    *output = output_of(counter);
    output->ttl = rule_ttl;
    return runs_append(&runs, &egress, output, NULL, &packet, &ways_in[way_in], next_slot, note, &egress);
}

/* Datagrams are numbered: by their slots. */
static void append(uint32_t counter, size_t length)
{
    CHECK_EQUAL(try_append(counter, length, 9, 64, 0), APPENDED);
    next_slot++;
}

static void flush(void)
{
    runs_flush(&runs, note, &egress);
    CHECK_EQUAL(runs.open_count, 0);
}

/* The next send that was noted: `count` datagrams from slot `first` on. */
static void expect(uint32_t counter, uint32_t first, unsigned count)
{
    CHECK(checked < sent_count);
    CHECK_EQUAL(sent[checked].output, counter);
    CHECK_EQUAL(sent[checked].count, count);
    for (unsigned i = 0; i < count; i++)
        CHECK_EQUAL(sent[checked].slots[i], first + i);
    checked++;
}

static void expect_no_more(void)
{
    CHECK_EQUAL(checked, sent_count);
}

static void finish(uint16_t index)
{
    int result = 0;

    CHECK(runs_finish(&runs, index, &result) == &runs.all[index]);
}

/* Complete all sends so far; then nothing is in use. */
static void end(void)
{
    expect_no_more();
    for (; finished < sent_count; finished++) {
        finish(sent[finished].index);
        runs_release(&runs, &runs.all[sent[finished].index]);
    }
    CHECK_EQUAL(runs.in_use, 0);
    CHECK_EQUAL(runs.in_flight, 0);
    CHECK_EQUAL(runs.open_count, 0);
    for (unsigned i = 0; i < COUNTERS_OUTPUTS_MAX; i++)
        CHECK_EQUAL(runs.of_output[i], 0);
}

/* Lengths of one output's datagrams, and how many of them each send has. */
static const struct grouping {
    const char *name;
    unsigned lengths[12]; /* up to 0; EMPTY is a length of 0 */
    unsigned counts[12];
} groupings[] = {
#define EMPTY UINT32_MAX
    {"one", {100}, {1}},
    {"equal lengths", {100, 100, 100}, {3}},
    {"a shorter one ends the run", {100, 100, 50, 50, 50}, {3, 2}},
    {"shorter and shorter", {100, 99, 98, 97}, {2, 2}},
    {"a longer one begins a run", {100, 100, 101, 101}, {2, 2}},
    {"an empty one goes alone", {100, 100, EMPTY, 100, 100}, {2, 1, 2}},
    {"empty ones go alone", {EMPTY, EMPTY, 1, 1}, {1, 1, 2}},
    {"the largest segments", {SEGMENT_MAX, SEGMENT_MAX, SEGMENT_MAX}, {3}},
    {"above the MTU", {SEGMENT_MAX + 1, SEGMENT_MAX + 1, SEGMENT_MAX, SEGMENT_MAX}, {1, 1, 2}},
    {"above the MTU behind a run", {SEGMENT_MAX, SEGMENT_MAX + 1, SEGMENT_MAX}, {1, 1, 1}},
    {"the largest datagram", {10, FULL, 10, 10}, {1, 1, 2}},
};

static void test_grouping(const struct grouping *g)
{
    uint32_t first = 0;

    start(g->name);
    for (unsigned i = 0; g->lengths[i]; i++)
        append(3, g->lengths[i] == EMPTY ? 0 : g->lengths[i]);
    flush();
    for (unsigned i = 0; g->counts[i]; i++) {
        expect(3, first, g->counts[i]);
        first += g->counts[i];
    }
    end();
}

static void test_limits(void)
{
    start("64 segments");
    for (unsigned i = 0; i < 2 * SEGMENTS_MAX; i++)
        append(0, 1);
    expect(0, 0, SEGMENTS_MAX);
    expect(0, SEGMENTS_MAX, SEGMENTS_MAX);
    flush();
    end();

    start("bytes of a run");
    for (unsigned i = 0; i < 50; i++)
        append(0, SEGMENT_MAX);
    flush();
    expect(0, 0, FULL / SEGMENT_MAX);
    expect(0, FULL / SEGMENT_MAX, 50 - FULL / SEGMENT_MAX);
    end();

    start("as many bytes as can be");
    for (unsigned i = 0; i < 44; i++)
        append(0, SEGMENT_MAX);
    append(0, FULL - 44 * SEGMENT_MAX);
    expect(0, 0, 45);
    CHECK_EQUAL(sent[0].bytes, FULL);
    for (unsigned i = 0; i < 44; i++)
        append(0, SEGMENT_MAX);
    append(0, FULL - 44 * SEGMENT_MAX + 1);
    flush();
    expect(0, 45, 44);
    expect(0, 89, 1);
    end();
}

/* What a run has in common: the TTL that its datagrams leave with, and the ingress that holds them. */
static void test_common(void)
{
    static const struct {
        uint8_t rule, came_with, way_in;
        bool with_first;
    } cases[] = {{0, 64, 0, true}, {63, 1, 0, false}, {0, 65, 0, false}, {62, 64, 0, false}, {0, 64, 1, false}};

    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        start("TTL and ingress");
        CHECK_EQUAL(try_append(0, 10, 0, 64, 0), APPENDED);
        next_slot++;
        CHECK_EQUAL(try_append(0, 10, cases[i].rule, cases[i].came_with, cases[i].way_in), APPENDED);
        flush();
        CHECK_EQUAL(sent_count, cases[i].with_first ? 1 : 2);
        expect(0, 0, cases[i].with_first ? 2 : 1);
        if (!cases[i].with_first)
            expect(0, 1, 1);
        end();
    }
}

/* Many outputs, random lengths: whatever the runs, each output's datagrams leave once and in order. */
static void test_order(void)
{
    enum { DATAGRAMS = 2000, SOME = 20 };
    static uint32_t outputs[DATAGRAMS];
    uint32_t seen[SOME], total = 0;
    uint64_t state = 7;

    start("order");
    for (unsigned i = 0; i < DATAGRAMS; i++) {
        if (runs.in_use > RUNS_MAX / 2)
            for (; finished < sent_count; finished++) {
                finish(sent[finished].index);
                runs_release(&runs, &runs.all[sent[finished].index]);
            }
        outputs[i] = random_below(&state, SOME);
        append(outputs[i], random_below(&state, 3) * 100);
        if (random_below(&state, 100) == 0)
            flush();
    }
    flush();
    memset(seen, 0, sizeof(seen));
    for (; checked < sent_count; checked++)
        for (uint16_t i = 0; i < sent[checked].count; i++, total++) {
            uint32_t slot = sent[checked].slots[i], output = sent[checked].output;

            CHECK_EQUAL(outputs[slot], output);
            CHECK(slot + 1 > seen[output]);
            seen[output] = slot + 1;
        }
    CHECK_EQUAL(total, DATAGRAMS);
    end();
}

/* All runs but those reserved open or in flight. */
static void fill_up(void)
{
    for (uint32_t i = 0; i < MANY; i++)
        append(i, 10);
    CHECK_EQUAL(try_append(RUNS_MAX, 10, 9, 64, 0), NO_RUN_FREE);
}

static void test_full(void)
{
    start("no run free");
    fill_up();
    expect_no_more();
    append(5, 10); /* an open run grows all the same */
    CHECK_EQUAL(try_append(RUNS_MAX, 10, 9, 64, 0), NO_RUN_FREE);
    flush();
    CHECK_EQUAL(runs.in_flight, MANY);
    for (uint32_t i = 0; i < MANY; i++) {
        CHECK_EQUAL(sent[i].count, 1 + (i == 5));
        checked++;
    }
    CHECK_EQUAL(try_append(RUNS_MAX, 10, 9, 64, 0), NO_RUN_FREE);
    finish(sent[300].index);
    runs_release(&runs, &runs.all[sent[300].index]);
    append(RUNS_MAX, 10);
    CHECK_EQUAL(try_append(0, 10, 9, 64, 0), NO_RUN_FREE);
    flush();
    expect(RUNS_MAX, MANY + 1, 1);
    CHECK_EQUAL(sent[MANY].index, sent[300].index);
    sent[300] = sent[--sent_count]; /* its run is in flight once */
    checked--;
    end();

    start("no run free for what does not fit the open one");
    fill_up();
    CHECK_EQUAL(try_append(5, 11, 9, 64, 0), NO_RUN_FREE);
    expect(5, 5, 1); /* that one has left all the same */
    finish(sent[finished].index);
    runs_release(&runs, &runs.all[sent[finished++].index]);
    append(5, 11);
    flush();
    CHECK_EQUAL(sent_count, MANY + 1);
    checked = sent_count;
    end();
}

/* Complete the next send as refused. */
static void refuse_next(int error)
{
    uint16_t index = sent[finished++].index;

    finish(index);
    CHECK(runs_refuse_segments(&runs, &runs.all[index], error));
}

static void test_refused(int error)
{
    start("refused segments");
    check_case("segments refused with %s", strerror(-error));
    for (unsigned i = 0; i < 5; i++)
        append(1, 10);
    append(1, 9);
    for (unsigned i = 0; i < 3; i++)
        append(2, 20);
    flush();
    expect(1, 0, 6);
    expect(2, 6, 3);
    refuse_next(error);
    refuse_next(error);
    CHECK(!egress.segmentation);
    CHECK_EQUAL(runs.in_use, 2);
    CHECK(runs_send_again(&runs, note, &egress));
    for (uint32_t i = 0; i < 9; i++)
        expect(i < 6 ? 1 : 2, i, 1);
    CHECK_EQUAL(sent[2 + 5].bytes, 9);
    CHECK_EQUAL(runs.in_use, 9);
    CHECK(runs_send_again(&runs, note, &egress));
    append(1, 10); /* at once and alone, from now on */
    append(1, 10);
    expect(1, 9, 1);
    expect(1, 10, 1);
    end();
}

static void test_not_refused(void)
{
    static const int results[] = {-EAGAIN, -ENETUNREACH, -EPERM, -ENOBUFS};

    for (size_t i = 0; i < sizeof(results) / sizeof(results[0]); i++) {
        start("an error of several that is none of segments");
        append(0, 10);
        append(0, 10);
        flush();
        CHECK(!runs_refuse_segments(&runs, &runs.all[sent[0].index], results[i]));
        CHECK(egress.segmentation);
        expect(0, 0, 2);
        end();
    }
    start("an error of one");
    append(0, 10);
    flush();
    CHECK(!runs_refuse_segments(&runs, &runs.all[sent[0].index], -EIO));
    CHECK(!runs_refuse_segments(&runs, &runs.all[sent[0].index], -EINVAL));
    CHECK(egress.segmentation);
    expect(0, 0, 1);
    end();
}

/* All runs in use, and `refused` of them are to be sent again: the reserve is enough, one datagram after the other. */
static void test_refused_full(unsigned refused)
{
    enum { EACH = 4 };
    uint32_t next[OUTPUTS] = {0};
    unsigned again = 0, first;
    bool all;

    start("refused");
    check_case("%u refused, no run free but the reserve", refused);
    for (uint32_t i = 0; i < MANY; i++)
        for (unsigned copy = 0; copy < EACH; copy++)
            append(i, 10); /* slots EACH * i and following */
    flush();
    CHECK_EQUAL(sent_count, MANY);
    first = sent_count;
    for (unsigned i = 0; i < refused; i++)
        refuse_next(-EIO);
    do {
        all = runs_send_again(&runs, note, &egress);
        for (; first + again < sent_count; again++) {
            const struct sent *one = &sent[first + again];

            CHECK_EQUAL(one->count, 1);
            CHECK(one->output < refused);
            CHECK_EQUAL(one->slots[0], EACH * one->output + next[one->output]);
            next[one->output]++;
        }
        /* Of what is in flight, the newest completes. */
        finish(sent[first + again - 1].index);
        runs_release(&runs, &runs.all[sent[first + again - 1].index]);
        sent[first + again - 1].count = 0; /* done */
    } while (!all);
    CHECK_EQUAL(again, EACH * refused);
    for (unsigned i = 0; i < refused; i++)
        CHECK_EQUAL(next[i], EACH);
    for (unsigned i = finished; i < sent_count; i++)
        if (sent[i].count) {
            finish(sent[i].index);
            runs_release(&runs, &runs.all[sent[i].index]);
        }
    finished = checked = sent_count;
    end();
}

int main(void)
{
    for (size_t i = 0; i < sizeof(groupings) / sizeof(groupings[0]); i++)
        test_grouping(&groupings[i]);
    test_limits();
    test_common();
    test_order();
    test_full();
    test_refused(-EIO);
    test_refused(-EINVAL);
    test_refused(-EMSGSIZE);
    test_not_refused();
    test_refused_full(1);
    test_refused_full(2);
    test_refused_full(MANY);
    return 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_generator.c: what the generator would send, read back from the description of the system call: which datagrams
 * are in which message, for which flow, and that each is what the analyser takes for intact. Nothing is sent.
 */
#include "generator.h"

#include "analyser.h"
#include "check.h"

#include <errno.h>
#include <netinet/udp.h>

static const uint64_t now_ns = UINT64_C(1700000000123456789);

/* One datagram of a message, gathered. */
static size_t gather(const struct msghdr *message, size_t place, uint8_t *to)
{
    const struct iovec *pieces = &message->msg_iov[2 * place];

    memcpy(to, pieces[0].iov_base, pieces[0].iov_len);
    memcpy(to + pieces[0].iov_len, pieces[1].iov_base, pieces[1].iov_len);
    return pieces[0].iov_len + pieces[1].iov_len;
}

static const struct shape {
    const char *name;
    struct generator_plan plan;
    uint64_t due;
    uint32_t calls;
    uint32_t first[4]; /* datagrams in the first messages of the first call; 0: no such message */
} shapes[] = {
    {"one flow", {.flows = 1, .size = 1000, .segments = 64, .burst = 1}, 1000, 5, {64}},
    {"one flow, large", {.flows = 1, .size = 9000, .segments = 7, .burst = 1}, 16, 5, {7, 7, 2}},
    {"plain", {.flows = 1, .size = 1000, .segments = 1, .burst = 1}, 3, 5, {1, 1, 1}},
    {"one due", {.flows = 1, .size = 24, .segments = 64, .burst = 1}, 1, 5, {1}},
    {"flows in turn", {.flows = 3, .size = 100, .segments = 64, .burst = 1}, 64, 9, {1, 1, 1, 1}},
    {"bursts", {.flows = 3, .size = 100, .segments = 4, .burst = 6}, 64, 9, {4, 2, 4, 2}},
    {"bursts cut short", {.flows = 2, .size = 100, .segments = 64, .burst = 6}, 4, 9, {4}},
    {"RTP", {.flows = 2, .flow_id = 4000000000u, .size = 36, .segments = 64, .burst = 2, .rtp = true}, 64, 9, {2, 2}},
    {"largest", {.flows = 1, .size = DATAGRAM_MAX, .segments = 1, .burst = 1}, 64, 2, {1, 1}},
};

static void test_shape(const struct shape *shape)
{
    static uint8_t datagram[DATAGRAM_MAX];
    const struct generator_plan *plan = &shape->plan;
    uint8_t addresses[4 * sizeof(struct sockaddr_in)] = {0};
    struct generator *generator;
    struct analyser *analyser;
    uint64_t index = 0;

    check_case("%s", shape->name);
    for (uint32_t flow = 0; flow < plan->flows; flow++)
        addresses[flow * sizeof(struct sockaddr_in)] = (uint8_t)flow;
    CHECK_EQUAL(generator_open(&generator, plan, -1, plan->flows > 1 ? addresses : NULL,
                               plan->flows > 1 ? sizeof(struct sockaddr_in) : 0), 0);
    CHECK_EQUAL(analyser_open(&analyser, plan->flows, plan->rtp), 0);
    for (uint32_t call = 0; call < shape->calls; call++) {
        uint32_t messages = generator_build(generator, shape->due, now_ns);

        CHECK(messages >= 1 && messages <= CALL_MESSAGES_MAX);
        for (uint32_t at = 0; call == 0 && at < 4 && shape->first[at]; at++)
            CHECK_EQUAL(generator->message_datagrams[at], shape->first[at]);
        for (uint32_t at = 0; at < messages; at++) {
            const struct msghdr *message = &generator->messages[at].msg_hdr;
            uint32_t count = generator->message_datagrams[at];
            uint32_t flow = (uint32_t)(index / plan->burst % plan->flows);

            CHECK_EQUAL(message->msg_iovlen, 2 * count);
            CHECK_EQUAL(message->msg_control != NULL, count > 1);
            if (count > 1) {
                uint16_t segment;

                CHECK_EQUAL(CMSG_FIRSTHDR(message)->cmsg_type, UDP_SEGMENT);
                memcpy(&segment, CMSG_DATA(CMSG_FIRSTHDR(message)), sizeof(segment));
                CHECK_EQUAL(segment, plan->size);
            }
            CHECK_EQUAL(message->msg_name != NULL, plan->flows > 1);
            if (message->msg_name)
                CHECK_EQUAL(*(uint8_t *)message->msg_name, flow);
            for (uint32_t place = 0; place < count; place++) {
                const uint8_t *header = datagram + (plan->rtp ? RTP_HEADER : 0);

                CHECK_EQUAL(gather(message, place, datagram), plan->size);
                CHECK_EQUAL(load32(header + 4), plan->flow_id + flow);
                CHECK_EQUAL(load64(header + 8),
                            index / plan->burst / plan->flows * plan->burst + index % plan->burst);
                analyser_account(analyser, datagram, plan->size, now_ns + 1000);
                index++;
            }
            generator->totals.sent += count;
        }
    }
    CHECK_EQUAL(analyser->totals.received, index);
    CHECK_EQUAL(analyser->totals.expected, index);
    CHECK_EQUAL(analyser->totals.reordered, 0);
    CHECK_EQUAL(analyser->totals.latency_max_ns, 1000);
    analyser_close(analyser);
    generator_close(generator);
}

static const struct generator_plan refused[] = {
    {.flows = 0, .size = 100, .segments = 1, .burst = 1},
    {.flows = 1, .size = 23, .segments = 1, .burst = 1},
    {.flows = 1, .size = 35, .segments = 1, .burst = 1, .rtp = true},
    {.flows = 1, .size = DATAGRAM_MAX + 1, .segments = 1, .burst = 1},
    {.flows = 1, .size = 100, .segments = 0, .burst = 1},
    {.flows = 1, .size = 100, .segments = 65, .burst = 1},
    {.flows = 1, .size = 1024, .segments = 64, .burst = 1}, /* 65536 bytes */
    {.flows = 1, .size = 100, .segments = 1, .burst = 0},
    {.flows = 2, .size = 100, .segments = 1, .burst = 1}, /* without addresses */
};

int main(void)
{
    struct generator *generator;

    for (size_t i = 0; i < sizeof(shapes) / sizeof(shapes[0]); i++)
        test_shape(&shapes[i]);
    for (size_t i = 0; i < sizeof(refused) / sizeof(refused[0]); i++) {
        check_case("refused plan %zu", i);
        CHECK_EQUAL(generator_open(&generator, &refused[i], -1, NULL, 0), -EINVAL);
    }
    return 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
/* rig.c: see rig.h. */
#define _GNU_SOURCE /* pthread_timedjoin_np */
#include "rig.h"

#include "datagram.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>

static int64_t now_ms(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000) + now.tv_nsec / 1000000;
}

void rig_wait(struct pollfd *polled, unsigned count)
{
    int64_t deadline = now_ms() + RIG_DEADLINE_MS;
    int ready;

    do
        ready = poll(polled, count, (int)(deadline - now_ms()));
    while (ready < 0 && errno == EINTR);
    if (ready <= 0)
        check_failed(__FILE__, __LINE__, "nothing happened for %d ms", RIG_DEADLINE_MS);
}

/* --- life --------------------------------------------------------------------------------------------------------- */

static void open_receiver(struct rig *rig, unsigned r)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(RIG_LOOPBACK)};
    socklen_t size = sizeof(address);
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    int yes = 1, room = 1 << 20;

    CHECK(fd >= 0);
    CHECK_EQUAL(bind(fd, (struct sockaddr *)&address, size), 0);
    CHECK_EQUAL(getsockname(fd, (struct sockaddr *)&address, &size), 0);
    CHECK_EQUAL(setsockopt(fd, IPPROTO_IP, IP_RECVTTL, &yes, sizeof(yes)), 0);
    CHECK_EQUAL(setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &room, sizeof(room)), 0);
    rig->receivers[r] = fd;
    rig->ports[r] = ntohs(address.sin_port);
}

void rig_open(struct rig *rig)
{
    const int room = RIG_FEED_BYTES;

    *rig = (struct rig){0};
    rig->page = mmap(NULL, sizeof(*rig->page), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(rig->page != MAP_FAILED);
    rig->command_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    rig->answer_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    CHECK(rig->command_fd >= 0 && rig->answer_fd >= 0);
    for (unsigned i = 0; i < RIG_INGRESSES; i++) {
        int ends[2];

        CHECK_EQUAL(socketpair(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends), 0);
        rig->feed[i] = ends[0];
        rig->ingress[i] = ends[1];
        CHECK_EQUAL(setsockopt(ends[0], SOL_SOCKET, SO_SNDBUF, &room, sizeof(room)), 0);
    }
    rig->egress = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    CHECK(rig->egress >= 0);
    for (unsigned r = 0; r < RIG_RECEIVERS; r++)
        open_receiver(rig, r);
    CHECK_EQUAL(engine_open(&rig->engine, rig->page, rig->command_fd, rig->answer_fd, (struct engine_pace){0}), 0);
}

void rig_close(struct rig *rig)
{
    if (rig->running)
        rig_stop(rig);
    if (rig->engine)
        engine_close(rig->engine);
    CHECK_EQUAL(close(rig->command_fd), 0);
    CHECK_EQUAL(close(rig->answer_fd), 0);
    CHECK_EQUAL(close(rig->egress), 0);
    for (unsigned i = 0; i < RIG_INGRESSES; i++) {
        CHECK_EQUAL(close(rig->feed[i]), 0);
        CHECK_EQUAL(close(rig->ingress[i]), 0);
    }
    for (unsigned r = 0; r < RIG_RECEIVERS; r++)
        CHECK_EQUAL(close(rig->receivers[r]), 0);
    CHECK_EQUAL(munmap(rig->page, sizeof(*rig->page)), 0);
}

static void *thread_main(void *argument)
{
    struct rig *rig = argument;

    rig->run_result = engine_run(rig->engine);
    return NULL;
}

void rig_run(struct rig *rig)
{
    CHECK(!rig->running);
    CHECK_EQUAL(pthread_create(&rig->thread, NULL, thread_main, rig), 0);
    rig->running = true;
}

void rig_join(struct rig *rig)
{
    struct timespec deadline;

    clock_gettime(CLOCK_REALTIME, &deadline);
    deadline.tv_sec += RIG_DEADLINE_MS / 1000;
    if (pthread_timedjoin_np(rig->thread, NULL, &deadline))
        check_failed(__FILE__, __LINE__, "the engine does not stop");
    rig->running = false;
    CHECK_EQUAL(rig->run_result, 0);
    CHECK_EQUAL(rig->page->pool_free, rig->page->pool_slots);
    rig_check_counters(rig, NULL);
}

void rig_stop(struct rig *rig)
{
    int64_t ticket = engine_stop(rig->engine);

    CHECK(ticket > 0);
    CHECK_EQUAL(rig_answer(rig, ticket), 0);
    rig_join(rig);
}

void rig_replace_engine(struct rig *rig)
{
    CHECK(!rig->running);
    engine_close(rig->engine);
    memset(rig->answered, 0, sizeof(rig->answered));
    CHECK_EQUAL(engine_open(&rig->engine, rig->page, rig->command_fd, rig->answer_fd, (struct engine_pace){0}), 0);
}

/* --- commands ----------------------------------------------------------------------------------------------------- */

bool rig_take_answers(struct rig *rig)
{
    struct engine_answer answer;
    uint64_t signalled;
    bool any = false;

    if (read(rig->answer_fd, &signalled, sizeof(signalled)) < 0)
        CHECK_EQUAL(errno, EAGAIN);
    while (engine_answer(rig->engine, &answer)) {
        CHECK(answer.ticket > 0 && answer.ticket < RIG_TICKETS);
        CHECK(!rig->answered[answer.ticket]);
        rig->answered[answer.ticket] = true;
        rig->results[answer.ticket] = answer.result;
        any = true;
    }
    return any;
}

int rig_answer(struct rig *rig, int64_t ticket)
{
    if (ticket <= 0)
        check_failed(__FILE__, __LINE__, "the command was refused: %s", strerror((int)-ticket));
    CHECK(ticket < RIG_TICKETS);
    while (!rig->answered[ticket])
        if (!rig_take_answers(rig))
            rig_wait(&(struct pollfd){.fd = rig->answer_fd, .events = POLLIN}, 1);
    return rig->results[ticket];
}

int64_t rig_attach_egress(struct rig *rig, unsigned interface, enum way way, int fd, uint32_t mtu)
{
    const struct egress_link link = {
        .source4 = address_from_ipv4(htonl(RIG_LOOPBACK)), .mac = {2, 0, 0, 0, 0, 1}, .header = ETHERNET_HEADER};

    return engine_attach_egress(rig->engine, interface, way, fd, mtu, (const uint8_t *)&link, sizeof(link));
}

void rig_attach(struct rig *rig, unsigned i, uint32_t slots)
{
    CHECK_EQUAL(rig_answer(rig, rig_attach_egress(rig, 0, WAY_UDP4, rig->egress, RIG_LOOPBACK_MTU)), 0);
    CHECK_EQUAL(rig_answer(rig, engine_attach_receive(rig->engine, i, rig->ingress[i], false, RIG_MTU, slots)), 0);
}

void rig_set_rules(struct rig *rig, struct description *rules)
{
    uint8_t *exact = exact_copy(rules->bytes, rules->length);
    int64_t ticket = engine_set_rules(rig->engine, exact, rules->length);

    free(exact);
    CHECK_EQUAL(rig_answer(rig, ticket), 0);
    description_free(rules);
}

void rig_describe(const struct rig *rig, struct description *rules, unsigned count, uint8_t ttl)
{
    description_rule(rules, RIG_GROUP, RIG_PORT, 0, (uint16_t)count, 0);
    for (unsigned r = 0; r < count; r++)
        description_output(rules, RIG_LOOPBACK, rig->ports[r], 0, ttl, r);
}

/* --- traffic ------------------------------------------------------------------------------------------------------ */

bool rig_try_feed(struct rig *rig, unsigned i, const uint8_t *packet, size_t length)
{
    ssize_t written = send(rig->feed[i], packet, length, 0);

    if (written < 0) {
        CHECK_EQUAL(errno, EAGAIN);
        return false;
    }
    CHECK_EQUAL(written, length);
    return true;
}

void rig_feed(struct rig *rig, unsigned i, const uint8_t *packet, size_t length)
{
    while (!rig_try_feed(rig, i, packet, length))
        rig_wait(&(struct pollfd){.fd = rig->feed[i], .events = POLLOUT}, 1);
}

static size_t make_packet(uint8_t *packet, uint8_t ttl, const uint8_t *payload, size_t length)
{
    const struct datagram datagram = {
        .source = 0xc0000201, /* 192.0.2.1 */
        .destination = RIG_GROUP,
        .source_port = 40000,
        .destination_port = RIG_PORT,
        .ttl = ttl,
        .payload = payload,
        .payload_length = length,
    };

    CHECK(length <= RIG_PAYLOAD_MAX);
    return datagram_write(packet, &datagram);
}

bool rig_try_send(struct rig *rig, unsigned i, uint8_t ttl, const uint8_t *payload, size_t length)
{
    uint8_t packet[RIG_MTU];

    return rig_try_feed(rig, i, packet, make_packet(packet, ttl, payload, length));
}

void rig_send(struct rig *rig, unsigned i, uint8_t ttl, const uint8_t *payload, size_t length)
{
    uint8_t packet[RIG_MTU];

    rig_feed(rig, i, packet, make_packet(packet, ttl, payload, length));
}

void rig_flood(struct rig *rig)
{
    struct pollfd polled[] = {
        {.fd = rig->feed[0], .events = POLLOUT},
        {.fd = rig->answer_fd, .events = POLLIN},
        {.fd = rig->receivers[1], .events = POLLIN},
    };

    while (rig_try_send(rig, 0, 64, (const uint8_t *)"busy", 4))
        ;
    rig_wait(polled, 3);
}

ssize_t rig_try_receive(struct rig *rig, unsigned r, uint8_t *payload, int *ttl)
{
    _Alignas(struct cmsghdr) uint8_t control[CMSG_SPACE(sizeof(int))];
    struct iovec room = {payload, RIG_PAYLOAD_MAX};
    struct msghdr message = {
        .msg_iov = &room, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof(control)};
    ssize_t length = recvmsg(rig->receivers[r], &message, 0);
    struct cmsghdr *header;

    if (length < 0) {
        CHECK_EQUAL(errno, EAGAIN);
        return -1;
    }
    CHECK(!(message.msg_flags & (MSG_TRUNC | MSG_CTRUNC)));
    header = CMSG_FIRSTHDR(&message);
    CHECK(header && header->cmsg_level == IPPROTO_IP && header->cmsg_type == IP_TTL);
    if (ttl)
        memcpy(ttl, CMSG_DATA(header), sizeof(*ttl));
    return length;
}

size_t rig_receive(struct rig *rig, unsigned r, uint8_t *payload, int *ttl)
{
    ssize_t length;

    while ((length = rig_try_receive(rig, r, payload, ttl)) < 0)
        rig_wait(&(struct pollfd){.fd = rig->receivers[r], .events = POLLIN}, 1);
    return (size_t)length;
}

/* --- counters ----------------------------------------------------------------------------------------------------- */

static uint64_t all_dropped(const struct counters_page *page)
{
    uint64_t dropped = 0;

    for (unsigned reason = 0; reason < COUNTERS_DROPS_MAX; reason++)
        dropped += page->dropped[reason];
    return dropped;
}

void rig_wait_received(struct rig *rig, uint64_t received)
{
    const struct counters_page *page = rig->page;
    int64_t deadline = now_ms() + RIG_DEADLINE_MS;

    /* A page cannot be waited for, only looked at. */
    while (page->received < received || page->forwarded + all_dropped(page) < received ||
           page->pool_free != page->pool_slots) {
        if (now_ms() > deadline)
            check_failed(__FILE__, __LINE__,
                         "%" PRIu64 " of %" PRIu64 " packets received, %" PRIu64 " forwarded, %" PRIu64
                         " dropped, %" PRIu64 " of %" PRIu64 " slots free",
                         page->received, received, page->forwarded, all_dropped(page), page->pool_free,
                         page->pool_slots);
        poll(NULL, 0, 1);
    }
    CHECK_EQUAL(page->received, received);
    /* The answer to a command, whatever it says, comes between two batches. */
    CHECK_EQUAL(rig_answer(rig, engine_detach_egress(rig->engine, TABLE_INTERFACES_MAX - 1, WAY_UDP4)), -ENOENT);
}

void rig_check_counters(const struct rig *rig, const struct description *rules)
{
    const struct counters_page *page = rig->page;
    uint64_t forwarded = 0, copies = 0, bytes = 0;

    CHECK_EQUAL(page->received, page->forwarded + all_dropped(page));
    CHECK_EQUAL(page->dropped[DROP_NONE], 0);
    for (unsigned i = 0; i < COUNTERS_RULES_MAX; i++) {
        const struct counters_rule *rule = &page->rules[i];

        CHECK_EQUAL(rule->packets, rule->forwarded + rule->dropped);
        forwarded += rule->forwarded;
    }
    for (unsigned i = 0; i < COUNTERS_OUTPUTS_MAX; i++) {
        copies += page->outputs[i].packets;
        bytes += page->outputs[i].bytes;
    }
    CHECK_EQUAL(page->forwarded, forwarded);
    CHECK_EQUAL(page->copies, copies);
    CHECK_EQUAL(page->copies_bytes, bytes);
    for (size_t at = 0; rules && at < rules->length;) {
        struct table_rule_record rule;
        struct table_output_record output;

        memcpy(&rule, rules->bytes + at, sizeof(rule));
        at += sizeof(rule);
        for (unsigned i = 0; i < rule.outputs; i++, at += sizeof(output)) {
            const struct counters_output *counters;
            uint64_t seen = 0;

            memcpy(&output, rules->bytes + at, sizeof(output));
            counters = &page->outputs[output.counter];
            for (unsigned reason = 0; reason < COUNTERS_OUTPUT_DROPS; reason++)
                seen += counters->dropped[reason];
            CHECK_EQUAL(page->rules[rule.counter].packets, counters->packets + seen);
        }
    }
}

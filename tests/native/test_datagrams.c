/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_datagrams.c: ordinary UDP sockets as an ingress. What their control messages say is tested with the kernel's part
 * played here: a slot is written as io_uring_prep_recvmsg_multishot(3) says, a completion names it. That sockets come and
 * go while an engine runs is tested with real ones.
 */
#include "datagrams.h"

#include "rig.h"

#include <errno.h>
#include <netinet/in.h>
#include <sys/mman.h>
#include <sys/socket.h>

enum { SLOTS = 4, PAYLOAD = 60, SOCKETS = 3, LEVEL_UDP = 17, CONTROL_UDP_GRO = 104 };

static struct ingress *ingress;
static struct counters_page *page;
static int fds[SOCKETS];
static uint16_t ports[SOCKETS];

static int open_socket(int family, uint16_t *port)
{
    union {
        struct sockaddr any;
        struct sockaddr_in v4;
        struct sockaddr_in6 v6;
    } name = {.any.sa_family = (sa_family_t)family};
    socklen_t size = family == AF_INET ? sizeof(name.v4) : sizeof(name.v6);
    int fd = socket(family, SOCK_DGRAM | SOCK_CLOEXEC, 0), yes = 1;

    CHECK(fd >= 0);
    if (family == AF_INET) {
        name.v4.sin_addr.s_addr = htonl(RIG_LOOPBACK);
        CHECK_EQUAL(setsockopt(fd, IPPROTO_IP, IP_PKTINFO, &yes, sizeof(yes)), 0);
        CHECK_EQUAL(setsockopt(fd, IPPROTO_IP, IP_RECVTTL, &yes, sizeof(yes)), 0);
    }
    CHECK_EQUAL(bind(fd, &name.any, size), 0);
    CHECK_EQUAL(getsockname(fd, &name.any, &size), 0);
    *port = ntohs(family == AF_INET ? name.v4.sin_port : name.v6.sin6_port);
    return fd;
}

static void send_to(uint16_t port, uint32_t number)
{
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(RIG_LOOPBACK)};
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

    CHECK_EQUAL(sendto(fd, &number, sizeof(number), 0, (struct sockaddr *)&to, sizeof(to)), sizeof(number));
    close(fd);
}

/* --- metadata ----------------------------------------------------------------------------------------------------- */

/* Arm the next socket, as an engine does. Which one it is. */
static uint32_t arm(const struct msghdr **shape)
{
    struct io_uring_sqe sqe;

    memset(&sqe, 0, sizeof(sqe));
    sqe.user_data = ingress->interface;
    CHECK(ingress->kind->wants_arming(ingress, false));
    ingress->kind->arm(ingress, &sqe);
    ingress->armed = true;
    CHECK_EQUAL(sqe.opcode, IORING_OP_RECVMSG);
    CHECK_EQUAL(sqe.buf_group, ingress->interface);
    CHECK(sqe.flags & IOSQE_BUFFER_SELECT);
    CHECK_EQUAL(sqe.user_data & 0xff, ingress->interface);
    if (shape)
        *shape = (const struct msghdr *)(uintptr_t)sqe.addr;
    return (uint32_t)(sqe.user_data >> INGRESS_PART_SHIFT);
}

static void complete(uint32_t part, uint32_t slot, int result, bool more)
{
    struct io_uring_cqe cqe = {
        .user_data = (uint64_t)part << INGRESS_PART_SHIFT | ingress->interface,
        .res = result,
        .flags = (result >= 0 ? slot << IORING_CQE_BUFFER_SHIFT | IORING_CQE_F_BUFFER : 0) |
                 (more ? IORING_CQE_F_MORE : 0),
    };

    ingress->kind->complete(ingress, &cqe, page);
}

static struct frame next(uint32_t expected)
{
    struct frame frame;
    uint32_t slot;

    CHECK(ingress->kind->next(ingress, &slot, &frame));
    CHECK_EQUAL(slot, expected);
    CHECK(pool_release(&ingress->pool, slot));
    return frame;
}

static const struct msghdr *shape;

static size_t head_room(void)
{
    return sizeof(struct io_uring_recvmsg_out) + shape->msg_namelen + shape->msg_controllen;
}

static uint8_t *slot_memory(uint32_t part, uint32_t slot)
{
    complete(part, slot, (int)head_room(), true);
    return (uint8_t *)(uintptr_t)next(slot).data - head_room();
}

struct writing {
    uint8_t *at;
    size_t written;
};

static void control(struct writing *writing, int level, int type, const void *data, size_t size)
{
    struct cmsghdr header = {.cmsg_level = level, .cmsg_type = type, .cmsg_len = CMSG_LEN(size)};

    CHECK(writing->written + CMSG_SPACE(size) <= shape->msg_controllen);
    memcpy(writing->at + writing->written, &header, sizeof(header));
    memcpy(writing->at + writing->written + CMSG_LEN(0), data, size);
    writing->written += CMSG_SPACE(size);
}

static const union address group4 = {.bytes = {[10] = 0xff, [11] = 0xff, [12] = 239, [13] = 1, [14] = 2, [15] = 3}};
static const union address group6 = {.bytes = {0xff, 0x3e, [15] = 5}};

static const struct control_case {
    const char *name;
    int family;
    bool destination;
    int ttl;     /* 0: not told */
    int segment; /* likewise */
    int tos;     /* -1: likewise */
    uint32_t flags;
    enum drop_reason expected;
} cases[] = {
    {.name = "IPv4", .family = AF_INET, .destination = true, .ttl = 7, .tos = 0xb8},
    {.name = "IPv6", .family = AF_INET6, .destination = true, .ttl = 255, .tos = 0},
    {.name = "IPv4, merged", .family = AF_INET, .destination = true, .ttl = 1, .segment = 20, .tos = 1},
    {.name = "IPv6, merged", .family = AF_INET6, .destination = true, .ttl = 1, .segment = 59, .tos = 1},
    {.name = "IPv4 without a destination", .family = AF_INET, .ttl = 7, .tos = -1, .expected = DROP_TRUNCATED},
    {.name = "IPv6 without a destination", .family = AF_INET6, .ttl = 7, .tos = -1, .expected = DROP_TRUNCATED},
    {.name = "from nowhere", .family = AF_UNSPEC, .destination = true, .tos = -1, .expected = DROP_TRUNCATED},
    {.name = "cut off", .family = AF_INET, .destination = true, .ttl = 7, .tos = 0, .flags = MSG_TRUNC,
     .expected = DROP_OVERSIZE},
};

static void test_control(const struct control_case *c, uint32_t part, uint32_t slot)
{
    uint8_t *memory = slot_memory(part, slot);
    struct io_uring_recvmsg_out out = {.flags = c->flags, .payloadlen = PAYLOAD};
    struct writing writing = {.at = memory + sizeof(out) + shape->msg_namelen};
    struct sockaddr_in v4 = {.sin_family = AF_INET, .sin_port = htons(4000), .sin_addr.s_addr = htonl(0xc0000201)};
    struct sockaddr_in6 v6 = {.sin6_family = AF_INET6, .sin6_port = htons(4000)};
    bool ipv6 = c->family == AF_INET6;
    uint8_t tos = (uint8_t)c->tos;
    struct frame frame;

    check_case("%s", c->name);
    memset(memory, 0xa5, head_room() + PAYLOAD); /* whatever was there before */
    memcpy(&v6.sin6_addr, group6.bytes, sizeof(v6.sin6_addr));
    out.namelen = ipv6 ? sizeof(v6) : c->family == AF_INET ? sizeof(v4) : 0;
    memcpy(memory + sizeof(out), ipv6 ? (void *)&v6 : (void *)&v4, ipv6 ? sizeof(v6) : sizeof(v4));
    if (c->destination && ipv6) {
        struct { uint8_t address[16]; unsigned interface; } info = {.interface = 3};

        memcpy(info.address, group6.bytes, sizeof(info.address));
        control(&writing, IPPROTO_IPV6, IPV6_PKTINFO, &info, sizeof(info));
    } else if (c->destination) {
        struct { int interface; uint8_t local[4]; uint8_t address[4]; } info = {.interface = 3, .local = {192, 0, 2, 1}};

        memcpy(info.address, group4.bytes + 12, sizeof(info.address));
        control(&writing, IPPROTO_IP, IP_PKTINFO, &info, sizeof(info));
    }
    if (c->ttl)
        control(&writing, ipv6 ? IPPROTO_IPV6 : IPPROTO_IP, ipv6 ? IPV6_HOPLIMIT : IP_TTL, &c->ttl, sizeof(c->ttl));
    if (c->tos >= 0 && ipv6)
        control(&writing, IPPROTO_IPV6, IPV6_TCLASS, &c->tos, sizeof(c->tos));
    else if (c->tos >= 0)
        control(&writing, IPPROTO_IP, IP_TOS, &tos, sizeof(tos));
    if (c->segment)
        control(&writing, LEVEL_UDP, CONTROL_UDP_GRO, &c->segment, sizeof(c->segment));
    out.controllen = (uint32_t)writing.written;
    memcpy(memory, &out, sizeof(out));
    complete(part, slot, (int)head_room() + PAYLOAD, true);
    frame = next(slot);
    CHECK_EQUAL(frame.reason, c->expected);
    if (c->expected)
        return;
    CHECK(frame.packet);
    CHECK(frame.packet->payload == memory + head_room());
    CHECK_EQUAL(frame.packet->payload_length, PAYLOAD);
    CHECK_EQUAL(frame.packet->ttl, c->ttl);
    CHECK_EQUAL(frame.packet->tos, c->tos);
    CHECK_EQUAL(frame.packet->protocol, PROTOCOL_UDP);
    CHECK_EQUAL(frame.packet->vlan, 0);
    CHECK_EQUAL(frame.packet->source_port, 4000);
    CHECK_EQUAL(frame.packet->destination_port, ports[part]);
    CHECK_EQUAL(frame.segment, c->segment);
    CHECK_BYTES(frame.packet->destination.bytes, (ipv6 ? group6 : group4).bytes, 16);
    if (ipv6)
        CHECK_BYTES(frame.packet->source.bytes, group6.bytes, 16);
    else
        CHECK_BYTES(frame.packet->source.bytes + 10, ((uint8_t[]){0xff, 0xff, 192, 0, 2, 1}), 6);
}

/* A completion that cannot hold a datagram gives its slot back like any other. */
static void test_short_completions(uint32_t part)
{
    const int results[] = {0, 1, (int)head_room() - 1};

    for (size_t i = 0; i < sizeof(results) / sizeof(results[0]); i++) {
        check_case("completion with result %d", results[i]);
        complete(part, 0, results[i], true);
        CHECK_EQUAL(next(0).reason, DROP_TRUNCATED);
    }
}

/* A socket whose receive failed waits for the timer, and keeps no other from being armed. */
static void test_ends(uint32_t part)
{
    const struct ingress_sockets *sockets = ingress->kind->sockets;
    uint64_t exhausted = page->pool_exhausted;
    uint32_t other, cancelled;

    check_case("out of slots");
    complete(part, 0, -ENOBUFS, false);
    CHECK(!ingress->armed && !ingress->failed);
    CHECK_EQUAL(page->pool_exhausted, exhausted + 1);
    CHECK_EQUAL(arm(NULL), part);
    CHECK(!ingress->kind->wants_arming(ingress, false));

    check_case("failed");
    complete(part, 0, -ENETDOWN, false);
    CHECK(!ingress->armed && ingress->failed);
    CHECK(!ingress->kind->wants_arming(ingress, false));
    CHECK_EQUAL(sockets->add(ingress, fds[1], 1), 0);
    other = arm(NULL);
    CHECK(other != part);
    CHECK(!ingress->kind->wants_arming(ingress, false));
    ingress->failed = false;
    CHECK_EQUAL(arm(NULL), part);

    check_case("removed");
    CHECK_EQUAL(sockets->add(ingress, fds[1], 1), -EEXIST);
    CHECK_EQUAL(sockets->remove(ingress, 7, 70), -ENOENT);
    CHECK(!sockets->cancel(ingress, &cancelled));
    CHECK_EQUAL(sockets->remove(ingress, 1, 71), 0);
    CHECK_EQUAL(sockets->remove(ingress, 1, 72), -ENOENT);
    CHECK(sockets->cancel(ingress, &cancelled));
    CHECK_EQUAL(cancelled, other);
    CHECK(!sockets->cancel(ingress, &cancelled));
    CHECK_EQUAL(sockets->ended(ingress), 0);
    complete(other, 2, (int)head_room(), true); /* it came before */
    complete(other, 0, -ECANCELED, false);
    CHECK_EQUAL(sockets->ended(ingress), 71);
    CHECK_EQUAL(sockets->ended(ingress), 0);
    CHECK_EQUAL(next(2).length, 0);

    check_case("removed when it failed, and when it was not armed");
    CHECK_EQUAL(sockets->add(ingress, fds[1], 1), 0);
    CHECK_EQUAL(sockets->remove(ingress, 1, 73), 0);
    CHECK_EQUAL(sockets->ended(ingress), 73);
    CHECK_EQUAL(sockets->remove(ingress, 0, 74), 0);
    complete(part, 0, -ENETDOWN, false);
    CHECK(!sockets->cancel(ingress, &cancelled));
    CHECK_EQUAL(sockets->ended(ingress), 74);
    CHECK(!ingress->armed);
    CHECK(!ingress->kind->wants_arming(ingress, false));
}

static void test_too_many(void)
{
    const struct ingress_sockets *sockets = ingress->kind->sockets;

    check_case("too many sockets");
    for (uint32_t i = 0; i < DATAGRAM_SOCKETS_MAX; i++)
        CHECK_EQUAL(sockets->add(ingress, fds[0], i), 0);
    CHECK_EQUAL(sockets->add(ingress, fds[0], DATAGRAM_SOCKETS_MAX), -ENFILE);
    CHECK_EQUAL(sockets->remove(ingress, 5, 1), 0);
    CHECK_EQUAL(sockets->ended(ingress), 1);
    CHECK_EQUAL(sockets->add(ingress, fds[0], DATAGRAM_SOCKETS_MAX), 0);
    check_case("a socket of another sort");
    CHECK_EQUAL(sockets->add(ingress, 0, 5000), -EINVAL);
}

/* What does not fit a socket's queue is counted when somebody asks, once. */
static void test_drops(void)
{
    const struct ingress_sockets *sockets = ingress->kind->sockets;
    int room = 1; /* as little as there may be */

    check_case("drops");
    CHECK_EQUAL(setsockopt(fds[2], SOL_SOCKET, SO_RCVBUF, &room, sizeof(room)), 0);
    CHECK_EQUAL(sockets->remove(ingress, 6, 1), 0);
    CHECK_EQUAL(sockets->ended(ingress), 1);
    CHECK_EQUAL(sockets->add(ingress, fds[2], 6), 0);
    CHECK_EQUAL(ingress_overruns(ingress), 0);
    for (uint32_t i = 0; i < 1000; i++)
        send_to(ports[2], i);
    CHECK(ingress_overruns(ingress) > 0);
    CHECK_EQUAL(ingress_overruns(ingress), 0);
}

static void test_sizes(void)
{
    struct ingress *refused = NULL;

    check_case("sizes");
    CHECK_EQUAL(datagrams_new(&refused, 64, SLOTS), -EINVAL);
    CHECK_EQUAL(datagrams_new(&refused, 0, 3), -EINVAL);
    CHECK_EQUAL(datagrams_new(&refused, 0, 4096), -EINVAL);
    CHECK(!refused);
    CHECK_EQUAL(datagrams_new(&refused, 0, 0), 0);
    ingress_free(refused);
}

/* --- an engine ---------------------------------------------------------------------------------------------------- */

static void expect_at(struct rig *rig, unsigned r, uint32_t number)
{
    uint8_t payload[RIG_PAYLOAD_MAX];
    int ttl;

    CHECK_EQUAL(rig_receive(rig, r, payload, &ttl), sizeof(number));
    CHECK_BYTES(payload, &number, sizeof(number));
    CHECK_EQUAL(ttl, 63);
}

static void test_engine(void)
{
    struct description rules = {0};
    struct rig rig;

    check_case("engine");
    rig_open(&rig);
    rig_run(&rig);
    for (uint16_t i = 0; i < 2; i++) {
        description_rule(&rules, RIG_LOOPBACK, ports[i], 3, 1, i);
        description_output(&rules, RIG_LOOPBACK, rig.ports[i], 0, 0, i);
    }
    CHECK_EQUAL(rig_answer(&rig, rig_attach_egress(&rig, 0, WAY_UDP4, rig.egress, RIG_LOOPBACK_MTU)), 0);
    CHECK_EQUAL(rig_answer(&rig, engine_set_rules(rig.engine, rules.bytes, rules.length)), 0);
    CHECK_EQUAL(rig_answer(&rig, engine_add_socket(rig.engine, 3, fds[0], 10)), -ENOENT);
    CHECK_EQUAL(engine_attach_datagrams(rig.engine, 64, true, 0), -EINVAL);
    CHECK_EQUAL(engine_add_socket(rig.engine, 64, fds[0], 10), -EINVAL);
    CHECK_EQUAL(engine_add_socket(rig.engine, 3, -1, 10), -EINVAL);
    CHECK_EQUAL(rig_answer(&rig, engine_attach_datagrams(rig.engine, 3, true, 8)), 0);
    CHECK_EQUAL(rig_answer(&rig, engine_attach_datagrams(rig.engine, 3, true, 8)), -EEXIST);
    for (uint32_t round = 0; round < 20; round++) {
        uint64_t received = rig.page->received;

        send_to(ports[0], round); /* it waits */
        CHECK_EQUAL(rig_answer(&rig, engine_add_socket(rig.engine, 3, fds[0], 10)), 0);
        CHECK_EQUAL(rig_answer(&rig, engine_add_socket(rig.engine, 3, fds[1], 10)), -EEXIST);
        CHECK_EQUAL(rig_answer(&rig, engine_add_socket(rig.engine, 3, fds[1], 11)), 0);
        expect_at(&rig, 0, round);
        for (uint32_t i = 0; i < 20; i++) { /* more than there are slots */
            send_to(ports[0], i);
            send_to(ports[1], 1000 + i);
        }
        for (uint32_t i = 0; i < 20; i++) {
            expect_at(&rig, 0, i);
            expect_at(&rig, 1, 1000 + i);
        }
        rig_wait_received(&rig, received + 41);
        /* One goes, the other goes on; then all of them at once. */
        CHECK_EQUAL(rig_answer(&rig, engine_remove_socket(rig.engine, 3, 10)), 0);
        CHECK_EQUAL(rig_answer(&rig, engine_remove_socket(rig.engine, 3, 10)), -ENOENT);
        send_to(ports[1], 7);
        expect_at(&rig, 1, 7);
        if (round % 2) {
            CHECK_EQUAL(rig_answer(&rig, engine_detach_ingress(rig.engine, 3)), 0);
            CHECK_EQUAL(rig_answer(&rig, engine_remove_socket(rig.engine, 3, 11)), -ENOENT);
            CHECK_EQUAL(rig_answer(&rig, engine_attach_datagrams(rig.engine, 3, true, 8)), 0);
        } else {
            CHECK_EQUAL(rig_answer(&rig, engine_remove_socket(rig.engine, 3, 11)), 0);
        }
    }
    CHECK_EQUAL(rig_answer(&rig, engine_add_socket(rig.engine, 3, fds[0], 10)), 0); /* the engine's stop finds it */
    description_free(&rules);
    rig_close(&rig);
}

/* What was dropped before a socket was added was somebody else's to count. */
static void test_overruns(void)
{
    struct rig rig;

    check_case("overruns");
    rig_open(&rig);
    rig_run(&rig);
    for (uint32_t i = 0; i < 1000; i++)
        send_to(ports[2], i);
    CHECK_EQUAL(rig_answer(&rig, engine_attach_datagrams(rig.engine, 3, true, 8)), 0);
    CHECK_EQUAL(rig_answer(&rig, engine_add_socket(rig.engine, 3, fds[2], 10)), 0);
    for (unsigned waited_ms = 0; waited_ms < RIG_DEADLINE_MS && !rig.page->dropped[DROP_NO_RULE]; waited_ms++)
        poll(NULL, 0, 1);
    CHECK_EQUAL(rig_answer(&rig, engine_detach_ingress(rig.engine, 3)), 0);
    CHECK_EQUAL(rig.page->dropped[DROP_INGRESS_OVERRUN], 0);
    CHECK(rig.page->dropped[DROP_NO_RULE] > 0 && rig.page->dropped[DROP_NO_RULE] < 1000);
    rig_close(&rig);
}

int main(void)
{
    page = mmap(NULL, sizeof(*page), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(page != MAP_FAILED);
    for (unsigned i = 0; i < SOCKETS; i++)
        fds[i] = open_socket(AF_INET, &ports[i]);
    CHECK_EQUAL(datagrams_new(&ingress, 5, SLOTS), 0);
    CHECK(!ingress->kind->wants_arming(ingress, false));
    CHECK_EQUAL(ingress->kind->sockets->add(ingress, fds[0], 0), 0);
    CHECK_EQUAL(arm(&shape), 0);
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++)
        test_control(&cases[i], 0, (uint32_t)(i % SLOTS));
    test_short_completions(0);
    test_ends(0);
    test_too_many();
    test_drops();
    ingress_free(ingress);
    test_sizes();
    test_engine();
    test_overruns();
    for (unsigned i = 0; i < SOCKETS; i++)
        close(fds[i]);
    munmap(page, sizeof(*page));
    return 0;
}

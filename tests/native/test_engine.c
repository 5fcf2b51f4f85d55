/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_engine.c: what comes out of an engine for what goes in, and how it is counted. rig.h draws the wiring.
 */
#include "traffic.h"

#include "datagram.h"
#include "egress.h"

#include <errno.h>

enum { BURST = 5000, TURNS = 5, PACKETS_BEFORE_TURN_MAX = 100, WAITING = 8 };

/* An engine that forwards RIG_GROUP:RIG_PORT of ingress 0 to the first `outputs` receivers. */
static void open_forwarding(struct rig *rig, uint32_t slots, unsigned outputs, uint8_t ttl)
{
    struct description rules = {0};

    rig_open(rig);
    rig_run(rig);
    rig_attach(rig, 0, slots);
    rig_describe(rig, &rules, outputs, ttl);
    rig_set_rules(rig, &rules);
}

static void test_burst(uint32_t slots, unsigned outputs)
{
    struct description rules = {0};
    struct traffic traffic;
    struct rig rig;

    check_case("burst, %u slots, %u outputs", slots, outputs);
    open_forwarding(&rig, slots, outputs, 0);
    traffic_open(&traffic, BURST, (1u << outputs) - 1, 0);
    traffic_run(&rig, &traffic, BURST);
    rig_wait_received(&rig, BURST);
    traffic_close(&rig, &traffic);
    rig_describe(&rig, &rules, outputs, 0);
    rig_check_counters(&rig, &rules);
    description_free(&rules);
    CHECK_EQUAL(rig.page->forwarded, BURST);
    CHECK_EQUAL(rig.page->copies, BURST * outputs);
    CHECK_EQUAL(rig.page->rules[0].bytes, rig.page->received_bytes);
    CHECK_EQUAL(rig.page->copies_bytes, rig.page->received_bytes * outputs);
    CHECK(rig.page->sends > 0 && rig.page->sends <= rig.page->copies);
    CHECK_EQUAL(rig.page->segments_refused, 0);
    if (slots)
        CHECK_EQUAL(rig.page->pool_slots, slots);
    rig_close(&rig);
}

static void test_ttl(void)
{
    static const struct {
        uint8_t rule, came_with;
        int leaves_with;
    } cases[] = {{0, 64, 63}, {0, 255, 254}, {0, 2, 1}, {0, 1, 1}, {0, 0, 1}, {8, 64, 8}, {1, 64, 1}, {255, 1, 255}};

    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        uint8_t payload[RIG_PAYLOAD_MAX];
        struct rig rig;
        int ttl = 0;

        check_case("TTL %u by rule %u", cases[i].came_with, cases[i].rule);
        open_forwarding(&rig, 4, 1, cases[i].rule);
        rig_send(&rig, 0, cases[i].came_with, (const uint8_t *)"ttl", 3);
        CHECK_EQUAL(rig_receive(&rig, 0, payload, &ttl), 3);
        CHECK_EQUAL(ttl, cases[i].leaves_with);
        rig_close(&rig);
    }
}

/* A datagram without payload is one; a frame without bytes is none, and does not end the receiving. */
static void test_empty(void)
{
    uint8_t payload[RIG_PAYLOAD_MAX];
    struct rig rig;

    check_case("empty payloads and frames");
    open_forwarding(&rig, 2, 2, 0);
    for (unsigned i = 0; i < 10; i++) {
        rig_send(&rig, 0, 64, NULL, 0);
        rig_feed(&rig, 0, NULL, 0);
        CHECK_EQUAL(rig_receive(&rig, 0, payload, NULL), 0);
        CHECK_EQUAL(rig_receive(&rig, 1, payload, NULL), 0);
    }
    rig_wait_received(&rig, 20);
    CHECK_EQUAL(rig.page->forwarded, 10);
    CHECK_EQUAL(rig.page->dropped[DROP_TRUNCATED], 10);
    CHECK_EQUAL(rig.page->copies, 20);
    CHECK_EQUAL(rig.page->copies_bytes, 0);
    rig_close(&rig);
}

/* Every reason that a packet itself can give, among packets that are forwarded all the same. */
static void test_dropped(void)
{
    static const struct {
        enum drop_reason reason;
        unsigned at, value; /* the byte that makes it so */
        bool seal;
        int grow;
    } cases[] = {
        {DROP_TRUNCATED, 0, 0x45, false, -1},
        {DROP_OVERSIZE, 0, 0x45, false, 2 * RIG_MTU},
        {DROP_NOT_IP, 0, 0x55, true, 0},
        {DROP_BAD_IP_HEADER, 0, 0x44, true, 0},
        {DROP_BAD_IP_CHECKSUM, 8, 63, false, 0},
        {DROP_FRAGMENT, 6, 0x20, true, 0},
        {DROP_NOT_UDP, 9, 6, true, 0},
        {DROP_BAD_UDP_LENGTH, 24, 0xff, false, 0},
        {DROP_BAD_UDP_CHECKSUM, 30, 'x', false, 0}, /* also shows that the payload is not vouched for here */
        {DROP_NO_RULE, 19, 2, true, 0},
    };
    const struct datagram good = {.source = 0xc0000201, .destination = RIG_GROUP, .destination_port = RIG_PORT,
                                  .ttl = 64, .payload = (const uint8_t *)"good", .payload_length = 4};
    const unsigned count = sizeof(cases) / sizeof(cases[0]);
    uint8_t packet[3 * RIG_MTU] = {0}, payload[RIG_PAYLOAD_MAX];
    struct rig rig;

    open_forwarding(&rig, 4, 1, 0);
    for (unsigned i = 0; i < count; i++) {
        size_t length = datagram_write(packet, &good);

        check_case("dropped for reason %d", cases[i].reason);
        rig_feed(&rig, 0, packet, length);
        packet[cases[i].at] = (uint8_t)cases[i].value;
        if (cases[i].reason == DROP_NO_RULE)
            seal_udp(packet);
        if (cases[i].seal)
            seal_ip(packet);
        rig_feed(&rig, 0, packet, (size_t)((int)length + cases[i].grow));
        CHECK_EQUAL(rig_receive(&rig, 0, payload, NULL), 4);
        rig_wait_received(&rig, 2 * (i + 1));
        CHECK_EQUAL(rig.page->dropped[cases[i].reason], 1);
        CHECK_EQUAL(rig.page->forwarded, i + 1);
        CHECK(rig_try_receive(&rig, 0, payload, NULL) < 0);
    }
    rig_close(&rig);
}

static void test_no_rules(void)
{
    struct description none = {0};
    struct rig rig;

    check_case("no rules");
    rig_open(&rig);
    rig_run(&rig);
    rig_attach(&rig, 0, 4);
    for (unsigned i = 0; i < 100; i++)
        rig_send(&rig, 0, 64, (const uint8_t *)"never set", 9);
    rig_wait_received(&rig, 100);
    rig_set_rules(&rig, &none);
    for (unsigned i = 0; i < 100; i++)
        rig_send(&rig, 0, 64, (const uint8_t *)"an empty set", 12);
    rig_wait_received(&rig, 200);
    CHECK_EQUAL(rig.page->dropped[DROP_NO_RULE], 200);
    CHECK_EQUAL(rig.page->copies, 0);
    rig_close(&rig);
}

/* To a receiver, from a multicast address: an invalid argument. */
static void output_from_nowhere(struct description *rules, uint32_t counter)
{
    const union address source = address_from_ipv4(htonl(RIG_GROUP)), address = address_from_ipv4(htonl(RIG_LOOPBACK));
    struct table_output_record record = {.port = 9, .counter = counter, .prefix = 128};

    memcpy(record.address, address.bytes, sizeof(record.address));
    memcpy(record.source, source.bytes, sizeof(record.source));
    description_append(rules, &record, sizeof(record));
}

/* Sends that cannot leave: counted at their output, and at the packet if no copy left. */
static void test_egress_errors(void)
{
    struct description rules = {0};
    uint8_t payload[RIG_PAYLOAD_MAX];
    struct counters_page *page;
    struct rig rig;
    int only_ipv6, yes = 1;

    check_case("egress errors");
    rig_open(&rig);
    rig_run(&rig);
    rig_attach(&rig, 0, 4);
    page = rig.page;
    /* A socket for IPv6 alone has no route to an IPv4 address, on any machine that knows IPv6. */
    only_ipv6 = socket(AF_INET6, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (only_ipv6 >= 0) {
        CHECK_EQUAL(setsockopt(only_ipv6, IPPROTO_IPV6, IPV6_V6ONLY, &yes, sizeof(yes)), 0);
        CHECK_EQUAL(rig_answer(&rig, rig_attach_egress(&rig, 2, WAY_UDP4, only_ipv6, RIG_LOOPBACK_MTU)), 0);
    } /* else the slot has no egress, which counts the same */
    description_rule(&rules, RIG_GROUP, RIG_PORT, 0, 5, 7);
    description_output(&rules, RIG_LOOPBACK, rig.ports[0], 63, 0, 10); /* no egress attached */
    description_output(&rules, 0x7fffffff, 9, 0, 0, 11);               /* lo's broadcast, without SO_BROADCAST */
    output_from_nowhere(&rules, 12);
    description_output(&rules, RIG_LOOPBACK, 9, 2, 0, 13);
    description_output(&rules, RIG_LOOPBACK, rig.ports[0], 0, 0, 14);
    rig_set_rules(&rig, &rules);
    rig_send(&rig, 0, 64, (const uint8_t *)"some", 4);
    CHECK_EQUAL(rig_receive(&rig, 0, payload, NULL), 4);
    rig_wait_received(&rig, 1);
    CHECK_EQUAL(page->forwarded, 1);
    CHECK_EQUAL(page->rules[7].forwarded, 1);
    CHECK_EQUAL(page->outputs[10].dropped[DROP_EGRESS_UNREACHABLE - DROP_EGRESS_FULL], 1);
    CHECK_EQUAL(page->outputs[11].dropped[DROP_EGRESS_REFUSED - DROP_EGRESS_FULL], 1);
    CHECK_EQUAL(page->outputs[12].dropped[DROP_EGRESS_ERROR - DROP_EGRESS_FULL], 1);
    CHECK_EQUAL(page->outputs[13].dropped[DROP_EGRESS_UNREACHABLE - DROP_EGRESS_FULL], 1);
    CHECK_EQUAL(page->outputs[14].packets, 1);

    /* The usual output instead, and its egress taken away: now no copy leaves. */
    rig_describe(&rig, &rules, 1, 0);
    rig_set_rules(&rig, &rules);
    CHECK_EQUAL(rig_answer(&rig, engine_detach_egress(rig.engine, 0, WAY_UDP4)), 0);
    rig_send(&rig, 0, 64, (const uint8_t *)"none", 4);
    rig_wait_received(&rig, 2);
    CHECK_EQUAL(page->dropped[DROP_EGRESS_UNREACHABLE], 1);
    CHECK_EQUAL(page->rules[0].dropped, 1);
    CHECK_EQUAL(rig_answer(&rig, rig_attach_egress(&rig, 0, WAY_UDP4, rig.egress, RIG_LOOPBACK_MTU)), 0);
    /* Of several reasons the first in their order counts, whichever copy it was of. */
    for (unsigned turned = 0; turned < 2; turned++) {
        description_rule(&rules, RIG_GROUP, RIG_PORT, 0, 2, 8);
        if (!turned)
            output_from_nowhere(&rules, 15);
        description_output(&rules, 0x7fffffff, 9, 0, 0, 16);
        if (turned)
            output_from_nowhere(&rules, 15);
        rig_set_rules(&rig, &rules);
        rig_send(&rig, 0, 64, (const uint8_t *)"none", 4);
        rig_wait_received(&rig, 3 + turned);
        CHECK_EQUAL(page->dropped[DROP_EGRESS_REFUSED], 1 + turned);
        CHECK_EQUAL(page->rules[8].dropped, 1 + turned);
    }
    CHECK(rig_try_receive(&rig, 0, payload, NULL) < 0);
    rig_close(&rig);
    if (only_ipv6 >= 0)
        CHECK_EQUAL(close(only_ipv6), 0);
}

static void test_send_reasons(void)
{
    static const struct {
        int error;
        enum drop_reason reason;
    } cases[] = {
        {EAGAIN, DROP_EGRESS_FULL}, {ENOBUFS, DROP_EGRESS_FULL}, {ENOMEM, DROP_EGRESS_FULL},
        {ENETUNREACH, DROP_EGRESS_UNREACHABLE}, {EHOSTUNREACH, DROP_EGRESS_UNREACHABLE},
        {ENETDOWN, DROP_EGRESS_UNREACHABLE}, {ENODEV, DROP_EGRESS_UNREACHABLE},
        {EPERM, DROP_EGRESS_REFUSED}, {EACCES, DROP_EGRESS_REFUSED},
        {EINVAL, DROP_EGRESS_ERROR}, {EMSGSIZE, DROP_EGRESS_ERROR}, {ECANCELED, DROP_EGRESS_ERROR},
    };

    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        check_case("%s", strerror(cases[i].error));
        CHECK_EQUAL(send_drop_reason(-cases[i].error), cases[i].reason);
    }
}

/* More outputs than there are sends: the copies of one packet go out in several turns, from one slot. */
static void test_many_outputs(void)
{
    struct description rules = {0}, again = {0};
    struct rig rig;

    check_case("most outputs");
    rig_open(&rig);
    rig_run(&rig);
    rig_attach(&rig, 0, 1);
    description_rule(&rules, RIG_GROUP, RIG_PORT, 0, TABLE_OUTPUTS_PER_RULE_MAX, 0);
    for (unsigned i = 0; i < TABLE_OUTPUTS_PER_RULE_MAX; i++)
        description_output(&rules, RIG_LOOPBACK, rig.ports[i % RIG_RECEIVERS], 0, 0, i);
    description_append(&again, rules.bytes, rules.length);
    rig_set_rules(&rig, &rules);
    for (unsigned i = 0; i < 20; i++)
        rig_send(&rig, 0, 64, (const uint8_t *)"many", 4);
    rig_wait_received(&rig, 20);
    rig_check_counters(&rig, &again);
    description_free(&again);
    CHECK_EQUAL(rig.page->forwarded, 20);
    CHECK_EQUAL(rig.page->copies, 20 * TABLE_OUTPUTS_PER_RULE_MAX);
    for (unsigned i = 0; i < TABLE_OUTPUTS_PER_RULE_MAX; i++)
        CHECK_EQUAL(rig.page->outputs[i].packets, 20);
    rig_close(&rig);
}

/* An interface that always has packets waiting, each with more copies than a turn sends, leaves room for another. */
static void test_turns(void)
{
    struct description rules = {0};
    uint8_t payload[RIG_PAYLOAD_MAX];
    struct rig rig;
    uint64_t before;

    check_case("interfaces take turns");
    rig_open(&rig);
    rig_run(&rig);
    rig_attach(&rig, 0, 16);
    rig_attach(&rig, 1, 16);
    description_rule(&rules, RIG_GROUP, RIG_PORT, 0, TABLE_OUTPUTS_PER_RULE_MAX, 0);
    for (unsigned i = 0; i < TABLE_OUTPUTS_PER_RULE_MAX; i++)
        description_output(&rules, RIG_LOOPBACK, rig.ports[0], 0, 0, i);
    description_rule(&rules, RIG_GROUP, RIG_PORT, 1, 1, 1);
    description_output(&rules, RIG_LOOPBACK, rig.ports[1], 0, 0, TABLE_OUTPUTS_PER_RULE_MAX);
    rig_set_rules(&rig, &rules);
    for (unsigned turn = 0; turn < TURNS; turn++) {
        rig_flood(&rig);
        before = rig.page->rules[0].packets;
        rig_send(&rig, 1, 64, (const uint8_t *)"turn", 4);
        while (rig_try_receive(&rig, 1, payload, NULL) < 0) {
            CHECK(rig.page->rules[0].packets - before < PACKETS_BEFORE_TURN_MAX);
            rig_flood(&rig);
        }
        CHECK_BYTES(payload, "turn", 4);
    }
    rig_close(&rig);
}

/* Packets of one length that waited leave as segments of few sends, unless their egress refuses: it does without UDP
 * checksums (SO_NO_CHECK: EINVAL), and then all of them leave one by one, in order, and none is lost. */
static void test_segments(bool refused)
{
    struct description rules = {0};
    uint8_t payload[RIG_PAYLOAD_MAX];
    struct rig rig;
    int yes = 1;

    check_case("segments%s", refused ? " refused" : "");
    rig_open(&rig);
    if (refused)
        CHECK_EQUAL(setsockopt(rig.egress, SOL_SOCKET, SO_NO_CHECK, &yes, sizeof(yes)), 0);
    rig_describe(&rig, &rules, 2, 0);
    rig_run(&rig);
    rig_set_rules(&rig, &rules);
    for (uint8_t i = 0; i < WAITING; i++)
        rig_send(&rig, 0, 64, &i, 1);
    rig_attach(&rig, 0, 64);
    for (uint8_t i = 0; i < WAITING; i++)
        for (unsigned r = 0; r < 2; r++) {
            CHECK_EQUAL(rig_receive(&rig, r, payload, NULL), 1);
            CHECK_EQUAL(payload[0], i);
        }
    rig_wait_received(&rig, WAITING);
    CHECK_EQUAL(rig.page->copies, 2 * WAITING);
    CHECK_EQUAL(rig.page->forwarded, WAITING);
    if (refused) {
        CHECK_EQUAL(rig.page->sends, 2 * WAITING);
        CHECK(rig.page->segments_refused > 0);
    } else {
        CHECK(rig.page->sends < WAITING); /* two, as a rule */
        CHECK_EQUAL(rig.page->segments_refused, 0);
    }
    rig_close(&rig);
}

int main(void)
{
    test_burst(4, 1);
    test_burst(4, 3);
    test_burst(1, 1);
    test_burst(2048, 3);
    test_burst(0, 1);
    test_segments(false);
    test_segments(true);
    test_ttl();
    test_empty();
    test_dropped();
    test_no_rules();
    test_egress_errors();
    test_send_reasons();
    test_many_outputs();
    test_turns();
    return 0;
}

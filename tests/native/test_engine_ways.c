/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_engine_ways.c: what an engine does with outputs of all kinds, and how it counts that. rig.h draws the wiring. A
 * Unix datagram socket stands for a packet socket where frames go out: it takes them as they are and gives them back.
 */
#define _GNU_SOURCE /* memfd_create */
#include "rig.h"

#include "datagram.h"

#include <errno.h>
#include <linux/if_packet.h>
#include <sys/mman.h>
#include <sys/socket.h>

enum { FRAME_MAX = 2048, ETHERNET = 14, FAR = 3 /* interface slot of other egress */ };

static const uint8_t *const text = (const uint8_t *)"what goes in";

static struct table_output_record output_record(const struct rig *rig, unsigned receiver, uint32_t counter)
{
    struct table_output_record record = {.port = rig->ports[receiver], .counter = counter, .way = WAY_UDP4,
                                         .prefix = 128, .flags = OUTPUT_KEEP_DSCP};

    memcpy(record.address, address_from_ipv4(htonl(RIG_LOOPBACK)).bytes, sizeof(record.address));
    return record;
}

/* A rule for RIG_GROUP:RIG_PORT with these outputs. */
static void set_outputs(struct rig *rig, const struct table_output_record *outputs, unsigned count)
{
    struct description rules = {0};

    description_rule(&rules, RIG_GROUP, RIG_PORT, 0, (uint16_t)count, 0);
    description_append(&rules, outputs, count * sizeof(*outputs));
    rig_set_rules(rig, &rules);
}

static uint64_t output_dropped(const struct rig *rig, uint32_t counter, enum drop_reason reason)
{
    return rig->page->outputs[counter].dropped[counters_output_drop(reason)];
}

static void open_rig(struct rig *rig, const char *name)
{
    check_case("%s", name);
    rig_open(rig);
    rig_run(rig);
    rig_attach(rig, 0, 64);
}

static void test_not_sent(void)
{
    uint8_t payload[RIG_PAYLOAD_MAX];
    struct table_output_record outputs[4];
    struct rig rig;

    open_rig(&rig, "outputs that send nothing");
    for (unsigned i = 0; i < 4; i++)
        outputs[i] = output_record(&rig, 0, i);
    outputs[0].flags |= OUTPUT_PAUSED;
    outputs[1].flags |= OUTPUT_SPLIT_HORIZON;
    outputs[2].flags |= OUTPUT_PAUSED | OUTPUT_SPLIT_HORIZON;
    set_outputs(&rig, outputs, 4);
    rig_send(&rig, 0, 64, text, 5);
    CHECK_EQUAL(rig_receive(&rig, 0, payload, NULL), 5);
    rig_wait_received(&rig, 1);
    CHECK_EQUAL(rig.page->forwarded, 1);
    CHECK_EQUAL(rig.page->copies, 1);
    CHECK_EQUAL(output_dropped(&rig, 0, DROP_PAUSED), 1);
    CHECK_EQUAL(output_dropped(&rig, 1, DROP_SPLIT_HORIZON), 1);
    CHECK_EQUAL(output_dropped(&rig, 2, DROP_PAUSED), 1);
    CHECK_EQUAL(rig.page->outputs[3].packets, 1);

    check_case("no copy left, for several reasons");
    set_outputs(&rig, outputs, 3);
    rig_send(&rig, 0, 64, text, 5);
    rig_wait_received(&rig, 2);
    CHECK_EQUAL(rig.page->dropped[DROP_PAUSED], 1);
    set_outputs(&rig, outputs + 1, 1);
    rig_send(&rig, 0, 64, text, 5);
    rig_wait_received(&rig, 3);
    CHECK_EQUAL(rig.page->dropped[DROP_SPLIT_HORIZON], 1);
    CHECK(rig_try_receive(&rig, 0, payload, NULL) < 0);
    rig_close(&rig);
}

/* At 1 bit a second nothing but the burst leaves, and one output's limit is not another's. */
static void test_limit(void)
{
    enum { SENT = 40, LENGTH = 1172, BURST = 16 * 1500 / (LENGTH + 28) };
    static uint8_t payload[RIG_PAYLOAD_MAX];
    struct table_output_record outputs[2];
    struct rig rig;

    open_rig(&rig, "limit");
    outputs[0] = output_record(&rig, 0, 0);
    outputs[0].rate = 1;
    outputs[0].rate_unit = RATE_BITS;
    outputs[1] = output_record(&rig, 1, 1);
    set_outputs(&rig, outputs, 2);
    for (unsigned i = 0; i < SENT; i++) {
        rig_send(&rig, 0, 64, payload, LENGTH);
        rig_wait_received(&rig, i + 1);
        CHECK_EQUAL(rig_receive(&rig, 1, payload, NULL), LENGTH);
        CHECK_EQUAL(rig_try_receive(&rig, 0, payload, NULL), i < BURST ? LENGTH : -1);
    }
    CHECK_EQUAL(rig.page->outputs[0].packets, BURST);
    CHECK_EQUAL(output_dropped(&rig, 0, DROP_EGRESS_LIMITED), SENT - BURST);
    CHECK_EQUAL(rig.page->outputs[1].packets, SENT);
    CHECK_EQUAL(rig.page->forwarded, SENT);
    set_outputs(&rig, outputs, 1);
    rig_send(&rig, 0, 64, payload, LENGTH);
    rig_wait_received(&rig, SENT + 1);
    CHECK_EQUAL(rig.page->dropped[DROP_EGRESS_LIMITED], 1);
    rig_close(&rig);
}

/* Any port of a prefix, sent to the same port; of two rules that could, the more specific. */
static void test_wide_rule(void)
{
    struct description rules = {0};
    struct table_rule_record rule = {.id = 1, .outputs = 1, .prefix = 96 + 24, .protocol = PROTOCOL_UDP};
    struct table_output_record output;
    uint8_t payload[RIG_PAYLOAD_MAX], packet[FRAME_MAX];
    struct rig rig;
    int ttl;

    open_rig(&rig, "any port of a prefix");
    memcpy(rule.group, address_from_ipv4(htonl(RIG_GROUP & 0xffffff00)).bytes, sizeof(rule.group));
    output = output_record(&rig, 0, 0);
    output.port = 0;
    output.flags |= OUTPUT_KEEP_TTL;
    description_append(&rules, &rule, sizeof(rule));
    description_append(&rules, &output, sizeof(output));
    description_rule(&rules, RIG_GROUP, rig.ports[1], 0, 1, 1);
    description_output(&rules, RIG_LOOPBACK, rig.ports[3], 0, 0, 1);
    rig_set_rules(&rig, &rules);
    for (unsigned r = 0; r < 3; r++) {
        const struct datagram datagram = {.source = 0xc0000201, .destination = RIG_GROUP, .source_port = 4000,
                                          .destination_port = rig.ports[r], .ttl = 5, .payload = text,
                                          .payload_length = 5};

        rig_feed(&rig, 0, packet, datagram_write(packet, &datagram));
        CHECK_EQUAL(rig_receive(&rig, r == 1 ? 3 : r, payload, &ttl), 5);
        CHECK_EQUAL(ttl, r == 1 ? 4 : 5);
    }
    rig_wait_received(&rig, 3);
    CHECK_EQUAL(rig.page->rules[0].forwarded, 2);
    CHECK_EQUAL(rig.page->rules[1].forwarded, 1);
    rig_close(&rig);
}

/* --- frames --------------------------------------------------------------------------------------------------------- */

static struct table_output_record frame_record(uint32_t counter)
{
    struct table_output_record record = {.port = 6000, .counter = counter, .way = WAY_FRAME, .prefix = 128,
                                         .egress = FAR, .ttl = 9, .flags = OUTPUT_KEEP_SOURCE};

    memcpy(record.address, address_from_ipv4(htonl(0xe9fc0002)).bytes, sizeof(record.address));
    return record;
}

static size_t receive_frame(int fd, uint8_t *frame)
{
    ssize_t length = -1;

    while (length < 0) {
        length = recv(fd, frame, FRAME_MAX, MSG_DONTWAIT);
        if (length < 0) {
            CHECK_EQUAL(errno, EAGAIN);
            rig_wait(&(struct pollfd){.fd = fd, .events = POLLIN}, 1);
        }
    }
    return (size_t)length;
}

static void test_frames(void)
{
    struct table_output_record output = frame_record(0);
    uint8_t frame[FRAME_MAX];
    struct packet packet;
    struct rig rig;
    size_t length, covered = 0;
    int ends[2];

    open_rig(&rig, "frames");
    CHECK_EQUAL(socketpair(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0, ends), 0);
    CHECK_EQUAL(rig_answer(&rig, rig_attach_egress(&rig, FAR, WAY_FRAME, ends[0], 600)), 0);
    set_outputs(&rig, &output, 1);
    rig_send(&rig, 0, 64, text, 12);
    length = receive_frame(ends[1], frame);
    CHECK_EQUAL(length, ETHERNET + 28 + 12);
    CHECK_EQUAL(packet_parse(frame + ETHERNET, length - ETHERNET, false, &packet), DROP_NONE);
    CHECK_BYTES(packet.payload, text, 12);
    CHECK_BYTES(packet.source.bytes, address_from_ipv4(htonl(0xc0000201)).bytes, 16);
    CHECK_EQUAL(packet.ttl, 9);

    check_case("fragments of frames");
    rig_send(&rig, 0, 64, frame, 1200);
    for (unsigned i = 0; i < 3; i++) {
        length = receive_frame(ends[1], frame);
        CHECK(length <= ETHERNET + 600);
        CHECK_EQUAL(packet_parse(frame + ETHERNET, length - ETHERNET, false, &packet), DROP_FRAGMENT);
        covered += length - ETHERNET - 20;
    }
    CHECK_EQUAL(covered, 1208);
    rig_wait_received(&rig, 2);
    CHECK_EQUAL(rig.page->outputs[0].packets, 2);
    CHECK_EQUAL(rig.page->outputs[0].bytes, 1212);
    CHECK_EQUAL(rig.page->forwarded, 2);

    check_case("no address to come from");
    output.flags = 0;
    set_outputs(&rig, &output, 1);
    rig_send(&rig, 0, 64, text, 12); /* from the interface's */
    length = receive_frame(ends[1], frame);
    CHECK_EQUAL(packet_parse(frame + ETHERNET, length - ETHERNET, false, &packet), DROP_NONE);
    CHECK_BYTES(packet.source.bytes, address_from_ipv4(htonl(RIG_LOOPBACK)).bytes, 16);
    memset(output.address, 0, 16);
    output.address[0] = 0xff;
    output.address[1] = 0x3e;
    set_outputs(&rig, &output, 1);
    rig_send(&rig, 0, 64, text, 12); /* over IPv6 it has none */
    rig_wait_received(&rig, 4);
    CHECK_EQUAL(output_dropped(&rig, 0, DROP_EGRESS_UNREACHABLE), 1);
    rig_close(&rig);
    CHECK_EQUAL(close(ends[0]), 0);
    CHECK_EQUAL(close(ends[1]), 0);
}

/* Nobody reads: of a datagram in fragments some may leave, but it counts once, and the engine goes on. */
static void test_full(void)
{
    enum { SENT = 200 };
    const struct table_output_record outputs[] = {frame_record(0)};
    struct table_output_record both[2] = {outputs[0]};
    uint8_t frame[FRAME_MAX] = {0};
    struct rig rig;
    int ends[2], room = 4096;

    open_rig(&rig, "a full egress");
    CHECK_EQUAL(socketpair(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0, ends), 0);
    CHECK_EQUAL(setsockopt(ends[0], SOL_SOCKET, SO_SNDBUF, &room, sizeof(room)), 0);
    CHECK_EQUAL(rig_answer(&rig, rig_attach_egress(&rig, FAR, WAY_FRAME, ends[0], 200)), 0);
    both[1] = output_record(&rig, 0, 1);
    set_outputs(&rig, both, 2);
    for (unsigned i = 0; i < SENT; i++) {
        rig_send(&rig, 0, 64, frame, 1000);
        CHECK_EQUAL(rig_receive(&rig, 0, frame, NULL), 1000);
    }
    rig_wait_received(&rig, SENT);
    CHECK_EQUAL(rig.page->outputs[0].packets + output_dropped(&rig, 0, DROP_EGRESS_FULL), SENT);
    CHECK(output_dropped(&rig, 0, DROP_EGRESS_FULL) >= SENT - 20);
    CHECK_EQUAL(rig.page->outputs[1].packets, SENT);
    CHECK_EQUAL(rig.page->forwarded, SENT);
    rig_close(&rig);
    CHECK_EQUAL(close(ends[0]), 0);
    CHECK_EQUAL(close(ends[1]), 0);
}

/* --- IPv6 ----------------------------------------------------------------------------------------------------------- */

/* From an IPv6 packet with extension headers to a receiver at ::1, if this machine has that. */
static void test_ipv6(void)
{
    static const uint8_t extension[8] = {17, 0, 1, 4};
    const struct datagram6 datagram = {
        .source = {0x20, 0x01, 0x0d, 0xb8, [15] = 1}, .destination = {0xff, 0x3e, [15] = 1}, .source_port = 4000,
        .destination_port = 5000, .hops = 20, .class = 0xb9, .next = 60, .extensions = extension,
        .extensions_length = sizeof(extension), .payload = text, .payload_length = 12};
    struct table_rule_record rule = {.id = 9, .outputs = 1, .prefix = 128, .protocol = PROTOCOL_UDP, .port = 5000};
    struct table_output_record output = {.way = WAY_UDP6, .prefix = 128, .flags = OUTPUT_KEEP_DSCP, .egress = FAR};
    _Alignas(struct cmsghdr) uint8_t control[256];
    uint8_t packet[FRAME_MAX], payload[FRAME_MAX];
    struct iovec room = {payload, sizeof(payload)};
    struct msghdr message = {.msg_iov = &room, .msg_iovlen = 1, .msg_control = control,
                             .msg_controllen = sizeof(control)};
    struct sockaddr_in6 name = {.sin6_family = AF_INET6, .sin6_addr = IN6ADDR_LOOPBACK_INIT};
    socklen_t size = sizeof(name);
    struct description rules = {0};
    int receiver = socket(AF_INET6, SOCK_DGRAM | SOCK_CLOEXEC, 0), egress = socket(AF_INET6, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    int yes = 1, seen = 0;
    struct rig rig;

    if (receiver < 0 || egress < 0 || bind(receiver, (struct sockaddr *)&name, size) < 0)
        return;
    open_rig(&rig, "IPv6");
    CHECK_EQUAL(getsockname(receiver, (struct sockaddr *)&name, &size), 0);
    CHECK_EQUAL(setsockopt(receiver, IPPROTO_IPV6, IPV6_RECVHOPLIMIT, &yes, sizeof(yes)), 0);
    CHECK_EQUAL(setsockopt(receiver, IPPROTO_IPV6, IPV6_RECVTCLASS, &yes, sizeof(yes)), 0);
    CHECK_EQUAL(rig_answer(&rig, rig_attach_egress(&rig, FAR, WAY_UDP6, egress, RIG_LOOPBACK_MTU)), 0);
    memcpy(rule.group, datagram.destination, sizeof(rule.group));
    memcpy(output.address, &name.sin6_addr, sizeof(output.address));
    output.port = ntohs(name.sin6_port);
    description_append(&rules, &rule, sizeof(rule));
    description_append(&rules, &output, sizeof(output));
    rig_set_rules(&rig, &rules);
    rig_feed(&rig, 0, packet, datagram6_write(packet, &datagram));
    rig_wait(&(struct pollfd){.fd = receiver, .events = POLLIN}, 1);
    CHECK_EQUAL(recvmsg(receiver, &message, MSG_DONTWAIT), 12);
    CHECK_BYTES(payload, text, 12);
    for (struct cmsghdr *c = CMSG_FIRSTHDR(&message); c; c = CMSG_NXTHDR(&message, c)) {
        int value;

        memcpy(&value, CMSG_DATA(c), sizeof(value));
        if (c->cmsg_type == IPV6_HOPLIMIT)
            CHECK_EQUAL(value, 19);
        if (c->cmsg_type == IPV6_TCLASS)
            CHECK_EQUAL(value, 0xb8);
        seen++;
    }
    CHECK_EQUAL(seen, 2);
    rig_wait_received(&rig, 1);
    CHECK_EQUAL(rig.page->forwarded, 1);
    rig_close(&rig);
    CHECK_EQUAL(close(receiver), 0);
    CHECK_EQUAL(close(egress), 0);
}

/* --- VLANs ---------------------------------------------------------------------------------------------------------- */

/* A ring in a memory file: frames that are there when it is attached are all that ever come. Tagged ones are only for
 * rules of their VLAN, and untagged ones for the others. */
static void test_vlans(void)
{
    enum { FRAMES = 4, SIZE = 4096, AT = 128 };
    static const struct {
        uint32_t status;
        uint16_t tci;
    } tags[FRAMES] = {{0, 0}, {TP_STATUS_VLAN_VALID, 0x2007}, {TP_STATUS_VLAN_VALID, 8}, {TP_STATUS_VLAN_VALID, 0x2000}};
    struct description rules = {0};
    struct table_rule_record tagged = {.id = 2, .outputs = 1, .prefix = 128, .protocol = PROTOCOL_UDP,
                                       .port = RIG_PORT, .counter = 1, .vlan = 7, .ingress = 1};
    struct table_output_record output;
    uint8_t payload[RIG_PAYLOAD_MAX], *memory;
    struct rig rig;
    int fd = memfd_create("ring", MFD_CLOEXEC);

    CHECK(fd >= 0);
    CHECK_EQUAL(ftruncate(fd, FRAMES * SIZE), 0);
    memory = mmap(NULL, FRAMES * SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    CHECK(memory != MAP_FAILED);
    for (unsigned i = 0; i < FRAMES; i++) {
        const uint8_t number = (uint8_t)i;
        const struct datagram datagram = {.source = 0xc0000201, .destination = RIG_GROUP, .source_port = 4000,
                                          .destination_port = RIG_PORT, .ttl = 5, .payload = &number,
                                          .payload_length = 1};
        struct tpacket2_hdr header = {.tp_status = TP_STATUS_USER | tags[i].status, .tp_mac = AT, .tp_net = AT,
                                      .tp_vlan_tci = tags[i].tci};

        header.tp_len = header.tp_snaplen = (uint32_t)datagram_write(memory + i * SIZE + AT, &datagram);
        memcpy(memory + i * SIZE, &header, sizeof(header));
    }
    open_rig(&rig, "VLANs");
    memcpy(tagged.group, address_from_ipv4(htonl(RIG_GROUP)).bytes, sizeof(tagged.group));
    output = output_record(&rig, 1, 1);
    description_rule(&rules, RIG_GROUP, RIG_PORT, 1, 1, 0);
    description_output(&rules, RIG_LOOPBACK, rig.ports[0], 0, 0, 0);
    description_append(&rules, &tagged, sizeof(tagged));
    description_append(&rules, &output, sizeof(output));
    rig_set_rules(&rig, &rules);
    CHECK_EQUAL(rig_answer(&rig, engine_attach_ring(rig.engine, 1, fd, false, SIZE, FRAMES, SIZE)), 0);
    CHECK_EQUAL(rig_receive(&rig, 0, payload, NULL), 1);
    CHECK_EQUAL(payload[0], 0);
    CHECK_EQUAL(rig_receive(&rig, 1, payload, NULL), 1);
    CHECK_EQUAL(payload[0], 1);
    CHECK_EQUAL(rig_receive(&rig, 0, payload, NULL), 1);
    CHECK_EQUAL(payload[0], 3); /* of a priority and no VLAN */
    CHECK_EQUAL(rig_answer(&rig, engine_detach_ingress(rig.engine, 1)), 0);
    CHECK_EQUAL(rig.page->received, FRAMES);
    CHECK_EQUAL(rig.page->dropped[DROP_VLAN_TAGGED], 1);
    CHECK_EQUAL(rig.page->rules[0].forwarded, 2);
    CHECK_EQUAL(rig.page->rules[1].forwarded, 1);
    rig_close(&rig);
    CHECK_EQUAL(munmap(memory, FRAMES * SIZE), 0);
    CHECK_EQUAL(close(fd), 0);
}

static void test_arguments(void)
{
    const struct egress_link link = {.header = 14}, odd = {.header = 13};
    const uint8_t *bytes = (const uint8_t *)&link;
    struct rig rig;

    check_case("arguments of an egress");
    rig_open(&rig);
    CHECK_EQUAL(engine_attach_egress(rig.engine, 0, WAYS, rig.egress, 1500, bytes, sizeof(link)), -EINVAL);
    CHECK_EQUAL(engine_attach_egress(rig.engine, 0, WAY_RAW4, rig.egress, 67, bytes, sizeof(link)), -EINVAL);
    CHECK_EQUAL(engine_attach_egress(rig.engine, 0, WAY_UDP4, rig.egress, 1500, bytes, sizeof(link) - 1), -EINVAL);
    CHECK_EQUAL(engine_attach_egress(rig.engine, 0, WAY_UDP4, rig.egress, 1500, (const uint8_t *)&odd, sizeof(odd)),
                -EINVAL);
    CHECK_EQUAL(engine_detach_egress(rig.engine, 0, WAYS), -EINVAL);
    rig_run(&rig);
    for (enum way way = 0; way < WAYS; way++)
        CHECK_EQUAL(rig_answer(&rig, rig_attach_egress(&rig, 2, way, rig.egress, 1500)), 0);
    for (enum way way = 0; way < WAYS; way++) {
        CHECK_EQUAL(rig_answer(&rig, engine_detach_egress(rig.engine, 2, way)), 0);
        CHECK_EQUAL(rig_answer(&rig, engine_detach_egress(rig.engine, 2, way)), -ENOENT);
    }
    rig_close(&rig);
}

int main(void)
{
    test_not_sent();
    test_limit();
    test_wide_rule();
    test_frames();
    test_full();
    test_ipv6();
    test_vlans();
    test_arguments();
    return 0;
}

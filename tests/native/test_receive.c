/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_receive.c: what an ingress makes of a filled slot's metadata. The kernel's part is played here: a slot is
 * written as io_uring_prep_recvmsg_multishot(3) says, a completion names it. So the link-layer facts that only a
 * privileged packet socket would deliver are tested without one.
 */
#include "receive.h"

#include "check.h"

#include <errno.h>
#include <linux/if_packet.h>
#include <sys/mman.h>

enum { MTU = 1500, SLOTS = 4, FRAME = 60 };

static struct ingress *ingress;
static struct counters_page *page;

/* The room that an ingress asks for in front of each frame, as it tells the kernel when it arms. */
static const struct msghdr *shape_of(struct ingress *any)
{
    struct io_uring_sqe sqe;

    memset(&sqe, 0, sizeof(sqe));
    any->kind->arm(any, &sqe);
    CHECK_EQUAL(sqe.opcode, IORING_OP_RECVMSG);
    CHECK_EQUAL(sqe.fd, any->fd);
    CHECK_EQUAL(sqe.buf_group, any->interface);
    CHECK(sqe.flags & IOSQE_BUFFER_SELECT);
    return (const struct msghdr *)(uintptr_t)sqe.addr;
}

static size_t head_room(void)
{
    const struct msghdr *shape = shape_of(ingress);

    return sizeof(struct io_uring_recvmsg_out) + shape->msg_namelen + shape->msg_controllen;
}

static void complete_of(struct ingress *any, uint32_t slot, int result, bool more)
{
    struct io_uring_cqe cqe = {
        .res = result,
        .flags = slot << IORING_CQE_BUFFER_SHIFT | IORING_CQE_F_BUFFER | (more ? IORING_CQE_F_MORE : 0),
    };

    any->kind->complete(any, &cqe, page);
}

/* Where a slot lies, which a frame in it tells. */
static uint8_t *slot_of(struct ingress *any, uint32_t slot)
{
    struct frame frame;
    uint32_t taken;

    complete_of(any, slot, (int)head_room(), true);
    CHECK(any->kind->next(any, &taken, &frame));
    CHECK_EQUAL(taken, slot);
    CHECK(pool_release(&any->pool, slot));
    return (uint8_t *)(uintptr_t)frame.data - head_room();
}

static uint8_t *slot_memory(uint32_t slot)
{
    return slot_of(ingress, slot);
}

/* Slots lie one behind the other. */
static size_t slot_size_of(struct ingress *any)
{
    CHECK(any->pool.size > 1);
    return (size_t)(slot_of(any, 1) - slot_of(any, 0));
}

static void complete(uint32_t slot, int result, bool more)
{
    complete_of(ingress, slot, result, more);
}

/* What the kernel writes for one packet. */
static const struct metadata_case {
    const char *name;
    uint32_t flags;
    uint8_t packet_type;
    uint32_t status; /* of the control message */
    uint16_t vlan_tci;
    uint16_t expected_vlan;
    int level, type;
    bool no_name, no_control;
    enum drop_reason expected;
    bool expected_vouched;
} cases[] = {
    {.name = "multicast", .packet_type = PACKET_MULTICAST, .status = TP_STATUS_USER},
    {.name = "for this host", .packet_type = PACKET_HOST, .status = TP_STATUS_USER},
    {.name = "checksum seen to", .packet_type = PACKET_MULTICAST, .status = TP_STATUS_CSUM_VALID,
     .expected_vouched = true},
    {.name = "checksum not filled in yet", .packet_type = PACKET_HOST, .status = TP_STATUS_CSUMNOTREADY,
     .expected_vouched = true},
    {.name = "for another host", .packet_type = PACKET_OTHERHOST, .status = TP_STATUS_USER,
     .expected = DROP_OTHER_HOST},
    {.name = "tagged", .packet_type = PACKET_MULTICAST, .status = TP_STATUS_VLAN_VALID, .vlan_tci = 0x6123,
     .expected_vlan = 0x123},
    {.name = "priority alone", .packet_type = PACKET_MULTICAST, .status = TP_STATUS_VLAN_VALID, .vlan_tci = 0x6000},
    {.name = "no tag", .packet_type = PACKET_MULTICAST, .status = TP_STATUS_USER, .vlan_tci = 0x6123},
    {.name = "tagged, for another host", .packet_type = PACKET_OTHERHOST, .status = TP_STATUS_VLAN_VALID, .vlan_tci = 5,
     .expected_vlan = 5, .expected = DROP_OTHER_HOST},
    {.name = "cut off", .packet_type = PACKET_MULTICAST, .flags = MSG_TRUNC, .expected = DROP_OVERSIZE},
    {.name = "no metadata", .no_name = true, .no_control = true},
    {.name = "another host's type without a name", .packet_type = PACKET_OTHERHOST, .no_name = true},
    {.name = "control message of another level", .packet_type = PACKET_HOST, .level = SOL_SOCKET,
     .status = TP_STATUS_CSUM_VALID | TP_STATUS_VLAN_VALID},
    {.name = "control message of another type", .packet_type = PACKET_HOST, .type = PACKET_STATISTICS,
     .status = TP_STATUS_CSUM_VALID | TP_STATUS_VLAN_VALID},
};

static void test_metadata(const struct metadata_case *c, uint32_t slot)
{
    uint8_t *memory = slot_memory(slot);
    struct io_uring_recvmsg_out out = {.flags = c->flags, .payloadlen = FRAME};
    struct sockaddr_ll link = {.sll_family = AF_PACKET, .sll_pkttype = c->packet_type, .sll_halen = 6};
    struct cmsghdr control = {.cmsg_level = c->level ? c->level : SOL_PACKET,
                              .cmsg_type = c->type ? c->type : PACKET_AUXDATA,
                              .cmsg_len = CMSG_LEN(sizeof(struct tpacket_auxdata))};
    struct tpacket_auxdata auxiliary = {.tp_status = c->status, .tp_vlan_tci = c->vlan_tci};
    struct frame frame;
    uint32_t taken;

    check_case("%s", c->name);
    out.namelen = c->no_name ? 0 : sizeof(link);
    out.controllen = c->no_control ? 0 : (uint32_t)CMSG_SPACE(sizeof(auxiliary));
    memset(memory, 0xa5, slot_size_of(ingress)); /* whatever was there before */
    memcpy(memory, &out, sizeof(out));
    memcpy(memory + sizeof(out), &link, sizeof(link));
    if (!c->no_control) {
        memcpy(memory + sizeof(out) + shape_of(ingress)->msg_namelen, &control, sizeof(control));
        memcpy(memory + sizeof(out) + shape_of(ingress)->msg_namelen + CMSG_LEN(0), &auxiliary, sizeof(auxiliary));
    }
    complete(slot, (int)head_room() + FRAME, true);
    CHECK(ingress->kind->next(ingress, &taken, &frame));
    CHECK_EQUAL(taken, slot);
    CHECK(frame.data == memory + head_room());
    CHECK_EQUAL(frame.length, FRAME);
    CHECK_EQUAL(frame.reason, c->expected);
    CHECK_EQUAL(frame.vlan, c->expected_vlan);
    CHECK_EQUAL(frame.checksum_vouched, c->expected_vouched);
    CHECK(!ingress->kind->next(ingress, &taken, &frame));
    CHECK(pool_release(&ingress->pool, slot));
    ingress->kind->give_back(ingress, slot);
    ingress->kind->publish(ingress);
}

/* A completion that cannot hold a packet is a truncated frame and gives its slot back like any other. */
static void test_short_completions(void)
{
    const int results[] = {-EFAULT, 0, 1, (int)head_room() - 1};

    for (size_t i = 0; i < sizeof(results) / sizeof(results[0]); i++) {
        struct frame frame;
        uint32_t slot;

        check_case("completion with result %d", results[i]);
        complete(0, results[i], true);
        CHECK(ingress->kind->next(ingress, &slot, &frame));
        CHECK_EQUAL(frame.reason, DROP_TRUNCATED);
        CHECK(pool_release(&ingress->pool, slot));
    }
}

/* Slots are handed on in the order of their completions, which need not be that of their numbers. */
static void test_order(void)
{
    const uint32_t order[SLOTS] = {2, 0, 3, 1};

    check_case("order");
    memset(slot_memory(0), 0, SLOTS * slot_size_of(ingress));
    for (unsigned round = 0; round < 5; round++) { /* the queue's ends wrap at different places */
        struct frame frame;
        uint32_t slot;

        for (unsigned i = 0; i < SLOTS - round % 2; i++)
            complete(order[i], (int)head_room() + (int)i, true);
        CHECK_EQUAL(ingress->pool.free, round % 2);
        for (unsigned i = 0; i < SLOTS - round % 2; i++) {
            CHECK(ingress->kind->next(ingress, &slot, &frame));
            CHECK_EQUAL(slot, order[i]);
            CHECK_EQUAL(frame.length, i);
            CHECK(pool_release(&ingress->pool, slot));
        }
        CHECK(!ingress->kind->next(ingress, &slot, &frame));
    }
}

static void test_ends(void)
{
    struct io_uring_cqe cqe = {.res = -ENOBUFS};
    uint64_t exhausted = page->pool_exhausted;
    struct frame frame;
    uint32_t slot;

    check_case("out of slots");
    ingress->armed = true;
    ingress->kind->complete(ingress, &cqe, page);
    CHECK(!ingress->armed && !ingress->failed);
    CHECK_EQUAL(page->pool_exhausted, exhausted + 1);
    check_case("cancelled");
    cqe.res = -ECANCELED;
    ingress->armed = true;
    ingress->kind->complete(ingress, &cqe, page);
    CHECK(!ingress->armed && !ingress->failed);
    check_case("interface down");
    cqe.res = -ENETDOWN;
    ingress->armed = true;
    ingress->kind->complete(ingress, &cqe, page);
    CHECK(!ingress->armed && ingress->failed);
    check_case("last completion with a packet");
    ingress->armed = true;
    complete(1, (int)head_room(), false);
    CHECK(!ingress->armed && !ingress->failed);
    CHECK(ingress->kind->next(ingress, &slot, &frame));
    CHECK(pool_release(&ingress->pool, slot));
    CHECK(!ingress->kind->next(ingress, &slot, &frame));
}

static void refuse(const char *name, unsigned interface, int fd, uint32_t mtu, uint32_t slots)
{
    struct ingress *refused = NULL;

    check_case("%s", name);
    CHECK_EQUAL(receive_new(&refused, (uint8_t)interface, fd, mtu, slots), -EINVAL);
    CHECK(!refused);
}

static void test_sizes(void)
{
    refuse("interface out of range", 64, 0, MTU, SLOTS);
    refuse("no descriptor", 0, -1, MTU, SLOTS);
    refuse("MTU too small", 0, 0, 67, SLOTS);
    refuse("MTU too large", 0, 0, 65537, SLOTS);
    refuse("slots not a power of two", 0, 0, MTU, 3);
    refuse("too many slots", 0, 0, MTU, 4096);
    for (uint32_t mtu = 68; mtu <= 65536; mtu = mtu < 65536 && mtu * 2 > 65536 ? 65536 : mtu * 2) {
        struct ingress *any;

        check_case("default slots for an MTU of %u", mtu);
        CHECK_EQUAL(receive_new(&any, 63, 0, mtu, 0), 0);
        CHECK(any->pool.size > 0 && (any->pool.size & (any->pool.size - 1)) == 0);
        CHECK(any->pool.size * slot_size_of(any) <= 16 * 1024 * 1024);
        CHECK(slot_size_of(any) >= head_room() + mtu);
        ingress_free(any);
    }
    ingress_free(NULL);
}

static size_t pages_mapped(void)
{
    FILE *file = fopen("/proc/self/statm", "r");
    size_t pages;

    CHECK(file);
    CHECK_EQUAL(fscanf(file, "%zu", &pages), 1);
    fclose(file);
    return pages;
}

/* The slots are mapped, not allocated: a leak checker does not miss them, the process's size tells. */
static void test_unmapped(void)
{
    const unsigned rounds = 4000, tolerated = rounds / 4; /* pages; a round maps one for the slot, one for the ring */
    struct ingress *any;
    size_t before;

    check_case("what was mapped is unmapped");
    before = pages_mapped();
    for (unsigned round = 0; round < rounds; round++) {
        CHECK_EQUAL(receive_new(&any, 1, 0, MTU, 1), 0);
        ingress_free(any);
    }
    CHECK(pages_mapped() <= before + tolerated);
}

int main(void)
{
    page = mmap(NULL, sizeof(*page), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(page != MAP_FAILED);
    CHECK_EQUAL(receive_new(&ingress, 5, 0, MTU, SLOTS), 0);
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++)
        test_metadata(&cases[i], (uint32_t)(i % SLOTS));
    test_short_completions();
    test_order();
    test_ends();
    test_sizes();
    test_unmapped();
    ingress_free(ingress);
    munmap(page, sizeof(*page));
    return 0;
}

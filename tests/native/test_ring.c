/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_ring.c: reading a ring that kernel and worker share. The kernel's part is played here, in a heap block of the
 * ring's exact size: frames are written as packet(7) and linux/if_packet.h say (TPACKET_V2), their status last.
 */
#include "ring.h"

#include "check.h"
#include "whole.h"

#include <errno.h>
#include <linux/if_packet.h>
#include <linux/virtio_net.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(at, size) ((void)(at), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(at, size) ((void)(at), (void)(size))
#endif

enum {
    FRAME_SIZE = 128,
    PER_BLOCK = 3,
    REST = 64, /* at the end of a block, too small for a frame */
    BLOCK_BYTES = PER_BLOCK * FRAME_SIZE + REST,
    BLOCKS = 3,
    FRAMES = BLOCKS * PER_BLOCK,
    ADDRESS_AT = TPACKET_ALIGN(sizeof(struct tpacket2_hdr)),
    NET = TPACKET_ALIGN(ADDRESS_AT + sizeof(struct sockaddr_ll)),
    ROOM = FRAME_SIZE - NET,
};

static const struct ring_geometry geometry = {BLOCK_BYTES, BLOCKS, FRAME_SIZE};
static uint8_t *memory;
static struct ingress *ingress;
static struct counters_page *page;

static struct tpacket2_hdr *header_at(uint32_t slot)
{
    return (struct tpacket2_hdr *)(memory + slot / PER_BLOCK * BLOCK_BYTES + slot % PER_BLOCK * FRAME_SIZE);
}

static uint32_t status_at(uint32_t slot)
{
    return __atomic_load_n(&header_at(slot)->tp_status, __ATOMIC_ACQUIRE);
}

static void set_status(uint32_t slot, uint32_t status)
{
    __atomic_store_n(&header_at(slot)->tp_status, status, __ATOMIC_RELEASE);
}

/* All of a frame but its status, which says that it is there. */
static struct tpacket2_hdr *prepare(uint32_t slot, uint32_t number)
{
    struct tpacket2_hdr *header = header_at(slot);
    const struct sockaddr_ll link = {.sll_family = AF_PACKET, .sll_pkttype = PACKET_MULTICAST, .sll_halen = 6};

    CHECK_EQUAL(status_at(slot), TP_STATUS_KERNEL);
    memset((uint8_t *)header + sizeof(header->tp_status), 0xa5, FRAME_SIZE - sizeof(header->tp_status));
    header->tp_len = header->tp_snaplen = sizeof(number);
    header->tp_mac = header->tp_net = NET;
    header->tp_sec = 1000 + number / 2; /* pairs share a second */
    header->tp_nsec = number % 2;
    memcpy((uint8_t *)header + ADDRESS_AT, &link, sizeof(link));
    memcpy((uint8_t *)header + NET, &number, sizeof(number));
    return header;
}

static void fill(uint32_t slot, uint32_t number)
{
    prepare(slot, number);
    set_status(slot, TP_STATUS_USER);
}

static void open_memory(void)
{
    memory = calloc(BLOCKS, BLOCK_BYTES);
    CHECK(memory);
    for (unsigned block = 0; block < BLOCKS; block++) /* nobody has business there */
        ASAN_POISON_MEMORY_REGION(memory + block * BLOCK_BYTES + PER_BLOCK * FRAME_SIZE, REST);
}

static void open_ingress(void)
{
    CHECK_EQUAL(ring_new_over(&ingress, 5, 0, &geometry, memory), 0);
    CHECK_EQUAL(ingress->pool.size, FRAMES);
    CHECK_EQUAL(ingress->interface, 5);
    CHECK_EQUAL(ingress->kind->enter(ingress, NULL), 0);
}

static void open_ring(void)
{
    open_memory();
    open_ingress();
}

static void close_ring(void)
{
    ingress->kind->leave(ingress, NULL);
    ingress_free(ingress);
    ASAN_UNPOISON_MEMORY_REGION(memory, BLOCKS * BLOCK_BYTES);
    free(memory); /* still ours */
}

static void complete(int result)
{
    const struct io_uring_cqe cqe = {.res = result};

    ingress->armed = true;
    ingress->kind->complete(ingress, &cqe, page);
    CHECK(!ingress->armed);
}

static void expect_none(void)
{
    struct frame frame;
    uint32_t slot;

    CHECK(!ingress->kind->next(ingress, &slot, &frame));
    CHECK(ingress->kind->is_drained(ingress));
}

static void expect(uint32_t slot, uint32_t number)
{
    struct frame frame;
    uint32_t taken, read;

    CHECK(ingress->kind->next(ingress, &taken, &frame));
    CHECK_EQUAL(taken, slot);
    CHECK_EQUAL(frame.reason, DROP_NONE);
    CHECK_EQUAL(frame.checksum_vouched, false);
    CHECK_EQUAL(frame.length, sizeof(read));
    CHECK(frame.data == (uint8_t *)header_at(slot) + NET);
    memcpy(&read, frame.data, sizeof(read));
    CHECK_EQUAL(read, number);
    CHECK_EQUAL(ingress->pool.slots[slot].holders, 1);
    CHECK_EQUAL(status_at(slot), TP_STATUS_USER); /* ours as long as it is held */
}

static void give_back(uint32_t slot)
{
    CHECK(pool_release(&ingress->pool, slot));
    ingress->kind->give_back(ingress, slot);
    ingress->kind->publish(ingress);
    CHECK_EQUAL(status_at(slot), TP_STATUS_KERNEL);
}

/* One to all frames at a time, round and round. */
static void test_order(void)
{
    for (unsigned at_a_time = 1; at_a_time <= FRAMES; at_a_time++) {
        uint32_t number = 0;

        check_case("%u frames at a time", at_a_time);
        open_ring();
        expect_none();
        for (unsigned round = 0; round < 3 * FRAMES; round++) {
            for (unsigned i = 0; i < at_a_time; i++)
                fill((number + i) % FRAMES, number + i);
            complete(POLLIN);
            for (unsigned i = 0; i < at_a_time; i++)
                expect((number + i) % FRAMES, number + i);
            expect_none();
            for (unsigned i = 0; i < at_a_time; i++)
                give_back((number + i) % FRAMES);
            expect_none();
            number += at_a_time;
        }
        CHECK_EQUAL(ingress->pool.free, FRAMES);
        close_ring();
    }
}

/* Held slots stay USER: they are not read again when their turn comes round, nor while others come back first. */
static void test_held(void)
{
    check_case("held slots");
    open_ring();
    for (uint32_t i = 0; i < FRAMES; i++)
        fill(i, i);
    complete(POLLIN);
    for (uint32_t i = 0; i < FRAMES; i++)
        expect(i, i);
    expect_none();
    CHECK(!ingress->kind->wants_arming(ingress, false));
    CHECK_EQUAL(ingress->pool.free, 0);
    for (uint32_t i = FRAMES; i-- > 1;)
        give_back(i);
    expect_none();
    complete(POLLIN);
    expect_none();
    pool_hold(&ingress->pool, 0); /* one more send, of which the first completes */
    CHECK(!pool_release(&ingress->pool, 0));
    expect_none();
    CHECK(!ingress->kind->wants_arming(ingress, false));
    give_back(0);
    expect_none();
    CHECK(ingress->kind->wants_arming(ingress, false));
    fill(0, 77);
    expect(0, 77);
    give_back(0);
    close_ring();
}

/* A frame whose status is not yet written is not there, whatever else is. */
static void test_not_there_yet(void)
{
    check_case("status not written yet");
    open_ring();
    prepare(0, 1);
    complete(POLLIN);
    expect_none();
    set_status(0, TP_STATUS_USER);
    complete(POLLIN);
    expect(0, 1);
    prepare(1, 2);
    expect_none();
    set_status(1, TP_STATUS_USER);
    expect(1, 2);
    close_ring();
}

static const struct header_case {
    const char *name;
    uint32_t status; /* besides USER */
    uint8_t packet_type;
    uint32_t net, snaplen, len;
    enum drop_reason expected;
    bool vouched;
} header_cases[] = {
    {"multicast", 0, PACKET_MULTICAST, NET, 20, 20, DROP_NONE, false},
    {"for this host", 0, PACKET_HOST, NET, 20, 20, DROP_NONE, false},
    {"for another host", 0, PACKET_OTHERHOST, NET, 20, 20, DROP_OTHER_HOST, false},
    {"tagged", TP_STATUS_VLAN_VALID, PACKET_MULTICAST, NET, 20, 20, DROP_NONE, false},
    {"tag protocol known", TP_STATUS_VLAN_TPID_VALID, PACKET_MULTICAST, NET, 20, 20, DROP_NONE, false},
    {"checksum seen to", TP_STATUS_CSUM_VALID, PACKET_MULTICAST, NET, 20, 20, DROP_NONE, true},
    {"checksum not filled in", TP_STATUS_CSUMNOTREADY, PACKET_HOST, NET, 20, 20, DROP_NONE, true},
    {"the kernel lost some before", TP_STATUS_LOSING, PACKET_HOST, NET, 20, 20, DROP_NONE, false},
    {"cut off", 0, PACKET_MULTICAST, NET, ROOM, ROOM + 1, DROP_OVERSIZE, false},
    {"cut off by far", 0, PACKET_MULTICAST, NET, ROOM, UINT32_MAX, DROP_OVERSIZE, false},
    {"the whole slot", 0, PACKET_MULTICAST, NET, ROOM, ROOM, DROP_NONE, false},
    {"longer than it is", 0, PACKET_MULTICAST, NET, 20, 19, DROP_NONE, false},
    {"no bytes", 0, PACKET_MULTICAST, NET, 0, 0, DROP_NONE, false},
    {"no bytes, at the end", 0, PACKET_MULTICAST, FRAME_SIZE, 0, 0, DROP_NONE, false},
    {"one byte, at the end", 0, PACKET_MULTICAST, FRAME_SIZE - 1, 1, 1, DROP_NONE, false},
    {"one byte behind the end", 0, PACKET_MULTICAST, FRAME_SIZE, 1, 1, DROP_TRUNCATED, false},
    {"one byte too many", 0, PACKET_MULTICAST, NET, ROOM + 1, ROOM + 1, DROP_TRUNCATED, false},
    {"as many as fit in 32 bits", 0, PACKET_MULTICAST, NET, UINT32_MAX, UINT32_MAX, DROP_TRUNCATED, false},
    {"sum of 0 in 32 bits", 0, PACKET_MULTICAST, NET, -(uint32_t)NET, -(uint32_t)NET, DROP_TRUNCATED, false},
    {"sum of the slot in 32 bits", 0, PACKET_HOST, NET + 16, UINT32_MAX - NET, 20, DROP_TRUNCATED, false},
    {"no place", 0, PACKET_MULTICAST, 0, 20, 20, DROP_TRUNCATED, false},
    {"in the address", 0, PACKET_MULTICAST, ADDRESS_AT + sizeof(struct sockaddr_ll) - 1, 20, 20, DROP_TRUNCATED, false},
    {"beyond the slot", 0, PACKET_MULTICAST, FRAME_SIZE + 1, 0, 0, DROP_TRUNCATED, false},
    {"as far as can be", 0, PACKET_MULTICAST, UINT16_MAX, UINT32_MAX, UINT32_MAX, DROP_TRUNCATED, false},
};

/* In the last slot of a block and of the ring, where one byte too many is nobody's. */
static void test_header(const struct header_case *c, uint32_t slot)
{
    struct tpacket2_hdr *header;
    struct frame frame;
    uint32_t taken;
    unsigned sum = 0;

    check_case("%s, slot %u", c->name, slot);
    open_ring();
    header = prepare(slot, 0);
    ((struct sockaddr_ll *)((uint8_t *)header + ADDRESS_AT))->sll_pkttype = c->packet_type;
    header->tp_mac = header->tp_net = (uint16_t)c->net;
    header->tp_snaplen = c->snaplen;
    header->tp_len = c->len;
    header->tp_vlan_tci = 0xe123;
    set_status(slot, TP_STATUS_USER | c->status);
    complete(POLLIN);
    CHECK(ingress->kind->next(ingress, &taken, &frame));
    CHECK_EQUAL(taken, slot);
    CHECK_EQUAL(frame.reason, c->expected);
    CHECK_EQUAL(frame.vlan, c->status & TP_STATUS_VLAN_VALID ? 0x123 : 0);
    CHECK_EQUAL(frame.checksum_vouched, c->vouched);
    CHECK_EQUAL(frame.length, c->expected == DROP_TRUNCATED ? 0 : c->snaplen);
    for (size_t i = 0; i < frame.length; i++)
        sum += frame.data[i];
    CHECK(!frame.length || sum);
    give_back(slot);
    expect_none();
    close_ring();
}

static void test_hostile(void)
{
    check_case("all bits set");
    open_memory();
    for (uint32_t slot = 0; slot < FRAMES; slot++)
        memset(header_at(slot), 0xff, FRAME_SIZE);
    open_ingress();
    for (uint32_t slot = 0; slot < FRAMES; slot++) {
        struct frame frame;
        uint32_t taken;

        CHECK(ingress->kind->next(ingress, &taken, &frame));
        CHECK_EQUAL(taken, slot);
        CHECK_EQUAL(frame.reason, DROP_TRUNCATED);
        CHECK_EQUAL(frame.length, 0);
    }
    expect_none();
    for (uint32_t slot = 0; slot < FRAMES; slot++)
        give_back(slot);
    close_ring();
}

/* A ring that somebody else has read from: `count` frames unread, from slot `first` on, and the kernel behind them. */
static void test_start(uint32_t first, uint32_t count, bool late)
{
    check_case("%u unread from slot %u on%s", count, first, late ? ", come after the start" : "");
    open_memory();
    if (late)
        open_ingress();
    for (uint32_t i = 0; i < count; i++)
        fill((first + i) % FRAMES, i);
    if (late)
        complete(POLLIN);
    else
        open_ingress();
    for (uint32_t i = 0; i < count; i++)
        expect((first + i) % FRAMES, i);
    expect_none();
    for (uint32_t i = 0; i < count; i++)
        give_back((first + i) % FRAMES);
    for (uint32_t i = count; i < count + FRAMES; i++) {
        fill((first + i) % FRAMES, i);
        complete(POLLIN);
        expect((first + i) % FRAMES, i);
        give_back((first + i) % FRAMES);
    }
    close_ring();
}

static void test_detaching(void)
{
    check_case("detaching");
    open_ring();
    fill(0, 0);
    fill(1, 1);
    complete(POLLIN);
    expect(0, 0);
    ingress->detaching = true;
    expect_none();
    give_back(0);
    complete(-ECANCELED);
    CHECK(!ingress->failed);
    expect_none();
    CHECK_EQUAL(status_at(1), TP_STATUS_USER);
    ingress_free(ingress);
    check_case("successor");
    fill(2, 2);
    open_ingress();
    expect(1, 1);
    expect(2, 2);
    expect_none();
    close_ring();
}

static void test_waiting(void)
{
    struct io_uring_sqe sqe;

    check_case("waiting");
    open_ring();
    CHECK(ingress->kind->wants_arming(ingress, false));
    CHECK(ingress->kind->wants_arming(ingress, true)); /* to know where the next frame will be */
    memset(&sqe, 0, sizeof(sqe));
    ingress->kind->arm(ingress, &sqe);
    CHECK_EQUAL(sqe.opcode, IORING_OP_POLL_ADD);
    CHECK_EQUAL(sqe.fd, ingress->fd);
    fill(4, 4);
    expect_none();
    complete(POLLIN);
    expect(4, 4);
    CHECK(!ingress->kind->wants_arming(ingress, false)); /* it is held */
    give_back(4);
    CHECK(ingress->kind->wants_arming(ingress, false));
    CHECK(!ingress->kind->wants_arming(ingress, true)); /* that is known now, also after a wake-up for nothing */
    complete(POLLIN);
    CHECK(!ingress->kind->wants_arming(ingress, true));
    fill(5, 5);
    expect(5, 5);
    give_back(5);
    complete(-EBADF);
    CHECK(ingress->failed);
    ingress->failed = false;
    complete(POLLERR | POLLIN);
    CHECK(ingress->failed);
    close_ring();
}

/* Frames with a link-layer header of LINK bytes, and a virtio header before that. */
enum { LINK = 14, MAC = NET + VIRTIO_HEADER, BEHIND_LINK = MAC + LINK };

static struct tpacket2_hdr *prepare_linked(uint32_t slot, uint8_t kind, uint16_t segment)
{
    struct tpacket2_hdr *header = prepare(slot, 0);
    const struct virtio_net_hdr virtio = {.gso_type = kind, .gso_size = segment};

    header->tp_mac = MAC;
    header->tp_net = BEHIND_LINK;
    header->tp_len = header->tp_snaplen = LINK + 4;
    memcpy((uint8_t *)header + NET, &virtio, sizeof(virtio));
    return header;
}

static void test_virtio(uint8_t kind, uint16_t segment, uint16_t expected)
{
    struct frame frame;
    uint32_t slot;

    check_case("virtio header of kind %u, segments of %u", kind, segment);
    open_ring();
    ingress->virtio = true;
    prepare_linked(0, kind, segment);
    set_status(0, TP_STATUS_USER);
    complete(POLLIN);
    CHECK(ingress->kind->next(ingress, &slot, &frame));
    CHECK_EQUAL(frame.reason, DROP_NONE);
    CHECK_EQUAL(frame.segment, expected);
    CHECK_EQUAL(frame.length, 4);
    CHECK(frame.data == (uint8_t *)header_at(0) + BEHIND_LINK);
    give_back(0);
    close_ring();
}

static void test_unsound_link(void)
{
    static const struct {
        uint16_t mac, net;
        uint32_t snaplen;
    } cases[] = {
        {ADDRESS_AT + sizeof(struct sockaddr_ll) + VIRTIO_HEADER - 1, BEHIND_LINK, 20}, /* the virtio header would begin in the address */
        {BEHIND_LINK, MAC, 20},              /* the packet before its header */
        {MAC, BEHIND_LINK, LINK - 1},        /* not even the header */
        {MAC, FRAME_SIZE + 1, FRAME_SIZE},   /* behind the slot */
        {MAC, BEHIND_LINK, FRAME_SIZE - MAC + 1},
    };

    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        struct tpacket2_hdr *header;
        struct frame frame;
        uint32_t slot;

        check_case("unsound link header %zu", i);
        open_ring();
        ingress->virtio = true;
        header = prepare_linked(FRAMES - 1, VIRTIO_NET_HDR_GSO_NONE, 0);
        header->tp_mac = cases[i].mac;
        header->tp_net = cases[i].net;
        header->tp_snaplen = cases[i].snaplen;
        set_status(FRAMES - 1, TP_STATUS_USER);
        complete(POLLIN);
        CHECK(ingress->kind->next(ingress, &slot, &frame));
        CHECK_EQUAL(frame.reason, DROP_TRUNCATED);
        CHECK(!frame.data && !frame.length);
        give_back(FRAMES - 1);
        close_ring();
    }
}

/* The kernel's part for a frame that is longer than its slot: LONG bytes all in all, of which the slot has what fits. */
enum { LONG = 3000, FITS = FRAME_SIZE - MAC };

static void send_copy(int queue, uint8_t number)
{
    uint8_t copy[VIRTIO_HEADER + LONG];

    memset(copy, number, sizeof(copy));
    CHECK_EQUAL(send(queue, copy, sizeof(copy), 0), (ssize_t)sizeof(copy));
}

static void fill_long(uint32_t slot, int queue, uint8_t number, uint8_t kind, uint16_t segment, uint32_t more_status)
{
    struct tpacket2_hdr *header = prepare_linked(slot, kind, segment);

    header->tp_len = LONG;
    header->tp_snaplen = FITS;
    memset((uint8_t *)header + MAC, number, FITS);
    if (queue >= 0)
        send_copy(queue, number);
    set_status(slot, TP_STATUS_USER | more_status);
}

static void expect_long(uint32_t slot, uint8_t number, enum drop_reason reason)
{
    struct frame frame;
    uint32_t taken;

    CHECK(ingress->kind->next(ingress, &taken, &frame));
    CHECK_EQUAL(taken, slot);
    CHECK_EQUAL(frame.reason, reason);
    if (reason != DROP_NONE)
        return;
    CHECK_EQUAL(frame.length, LONG - LINK);
    for (size_t i = 0; i < frame.length; i++)
        CHECK_EQUAL(frame.data[i], number);
}

static void test_whole(void)
{
    struct frame frame;
    uint32_t slot;
    int queue[2];

    check_case("frames longer than their slots");
    CHECK_EQUAL(socketpair(AF_UNIX, SOCK_DGRAM, 0, queue), 0);
    open_ring();
    ingress->virtio = true;
    ingress->fd = queue[0];
    fill_long(0, queue[1], 7, VIRTIO_NET_HDR_GSO_NONE, 0, TP_STATUS_COPY);
    fill_long(1, queue[1], 8, 5, 100, TP_STATUS_COPY);
    fill_long(2, -1, 9, VIRTIO_NET_HDR_GSO_NONE, 0, 0); /* the kernel had no room for a copy */
    fill_long(3, -1, 9, 5, 100, 0);
    complete(POLLIN);
    expect_long(0, 7, DROP_NONE);
    expect_long(1, 8, DROP_NONE);
    expect_long(2, 9, DROP_OVERSIZE);
    expect_long(3, 9, DROP_MERGED);
    for (uint32_t slot = 0; slot < 4; slot++)
        give_back(slot);

    check_case("a predecessor took copies and died");
    fill_long(4, -1, 1, VIRTIO_NET_HDR_GSO_NONE, 0, TP_STATUS_COPY);
    fill_long(5, -1, 2, VIRTIO_NET_HDR_GSO_NONE, 0, TP_STATUS_COPY);
    fill_long(6, queue[1], 3, VIRTIO_NET_HDR_GSO_NONE, 0, TP_STATUS_COPY);
    fill_long(7, queue[1], 4, VIRTIO_NET_HDR_GSO_NONE, 0, TP_STATUS_COPY);
    complete(POLLIN);
    expect_long(4, 1, DROP_OVERSIZE);
    expect_long(5, 2, DROP_OVERSIZE);
    expect_long(6, 3, DROP_NONE);
    expect_long(7, 4, DROP_NONE);
    for (uint32_t slot = 4; slot < 8; slot++)
        give_back(slot);

    check_case("a copy whose slot went without it");
    send_copy(queue[1], 77);
    fill_long(8, queue[1], 5, VIRTIO_NET_HDR_GSO_NONE, 0, TP_STATUS_COPY);
    fill_long(0, queue[1], 6, VIRTIO_NET_HDR_GSO_NONE, 0, TP_STATUS_COPY);
    complete(POLLIN);
    expect_long(8, 5, DROP_NONE);
    expect_long(0, 6, DROP_NONE);
    give_back(8);
    give_back(0);

    check_case("copies that belong to no slot");
    for (uint8_t stale = 100; stale < 103; stale++)
        send_copy(queue[1], stale);
    for (uint32_t i = 1; i <= WHOLES_MAX + 2; i++) {
        fill_long(i % FRAMES, i == 1 ? queue[1] : -1, 9, VIRTIO_NET_HDR_GSO_NONE, 0, TP_STATUS_COPY);
        complete(POLLIN);
        CHECK(ingress->kind->next(ingress, &slot, &frame));
        give_back(i % FRAMES);
    }
    fill_long((WHOLES_MAX + 3) % FRAMES, queue[1], 10, VIRTIO_NET_HDR_GSO_NONE, 0, TP_STATUS_COPY);
    complete(POLLIN);
    expect_long((WHOLES_MAX + 3) % FRAMES, 10, DROP_NONE); /* in the end all is as it was */
    give_back((WHOLES_MAX + 3) % FRAMES);
    close_ring();
    open_ring();
    ingress->virtio = true;
    ingress->fd = queue[0];

    check_case("no copy is there");
    fill_long(0, -1, 5, VIRTIO_NET_HDR_GSO_NONE, 0, TP_STATUS_COPY);
    complete(POLLIN);
    expect_long(0, 5, DROP_OVERSIZE);
    give_back(0);
    close_ring();
    close(queue[0]);
    close(queue[1]);
}

/* As many as can be held; the next waits in the ring until one is given back. */
static void test_whole_full(void)
{
    const struct ring_geometry roomy = {FRAME_SIZE * (WHOLES_MAX + 1), 1, FRAME_SIZE};
    struct frame frame;
    uint8_t *outer = memory;
    uint32_t slot;
    int queue[2];

    check_case("every buffer is held");
    CHECK_EQUAL(socketpair(AF_UNIX, SOCK_DGRAM, 0, queue), 0);
    memory = calloc(WHOLES_MAX + 1, FRAME_SIZE);
    CHECK(memory);
    CHECK_EQUAL(ring_new_over(&ingress, 5, queue[0], &roomy, memory), 0);
    ingress->virtio = true;
    for (uint32_t i = 0; i <= WHOLES_MAX; i++) {
        struct tpacket2_hdr *header = (struct tpacket2_hdr *)(memory + i * FRAME_SIZE);
        const struct virtio_net_hdr virtio = {.gso_type = 0};
        uint8_t copy[VIRTIO_HEADER + LONG] = {0};

        header->tp_len = LONG;
        header->tp_snaplen = FITS;
        header->tp_mac = MAC;
        header->tp_net = BEHIND_LINK;
        memcpy((uint8_t *)header + NET, &virtio, sizeof(virtio));
        header->tp_status = TP_STATUS_USER | TP_STATUS_COPY;
        if (i == 0)
            CHECK_EQUAL(ingress->kind->enter(ingress, NULL), 0);
        CHECK_EQUAL(send(queue[1], copy, sizeof(copy), 0), (ssize_t)sizeof(copy));
        CHECK_EQUAL(ingress->kind->next(ingress, &slot, &frame), i < WHOLES_MAX);
    }
    CHECK_EQUAL(ingress->pool.free, 1);
    CHECK(pool_release(&ingress->pool, 3));
    ingress->kind->give_back(ingress, 3);
    close(queue[1]);
    CHECK(ingress->kind->next(ingress, &slot, &frame));
    CHECK_EQUAL(slot, WHOLES_MAX);
    CHECK_EQUAL(frame.reason, DROP_NONE);
    ingress->kind->leave(ingress, NULL);
    ingress_free(ingress);
    free(memory);
    memory = outer;
    close(queue[0]);
}

/* A predecessor died and had given back one between others: the frames behind the hole have to be searched for, also by an
 * engine that looks by itself. */
static void test_holes(void)
{
    check_case("a hole between unread frames");
    open_memory();
    fill(2, 0);
    fill(3, 1);
    fill(5, 2);
    open_ingress();
    CHECK(ingress->kind->wants_arming(ingress, true));
    expect(2, 0);
    expect(3, 1);
    expect_none();
    give_back(2);
    give_back(3);
    CHECK(ingress->kind->wants_arming(ingress, true));
    complete(POLLIN);
    expect(5, 2);
    give_back(5);
    CHECK(!ingress->kind->wants_arming(ingress, true));
    close_ring();
}

static void refuse(const char *name, unsigned interface, uint32_t block_size, uint32_t blocks, uint32_t frame_size)
{
    const struct ring_geometry impossible = {block_size, blocks, frame_size};
    struct ingress *refused = NULL;
    uint8_t none[1];

    check_case("%s", name);
    CHECK_EQUAL(ring_new_over(&refused, (uint8_t)interface, 0, &impossible, none), -EINVAL);
    CHECK_EQUAL(ring_new(&refused, (uint8_t)interface, -1, &impossible), -EINVAL);
    CHECK(!refused);
}

static void test_geometry(void)
{
    struct ingress *refused = NULL;

    refuse("interface out of range", 64, 4096, 1, 2048);
    refuse("no blocks", 0, 4096, 0, 2048);
    refuse("no block size", 0, 0, 1, 2048);
    refuse("no frame size", 0, 4096, 1, 0);
    refuse("no room for the address", 0, 4096, 1, 48);
    refuse("frames not aligned", 0, 4096, 1, 2040);
    refuse("frame larger than its block", 0, 4096, 1, 4112);
    refuse("too many frames", 0, 4096, (1 << 20) / 2 + 1, 2048);
    refuse("more frames than 32 bits count", 0, 0x80000000, UINT32_MAX, 64);
    check_case("not a packet socket");
    CHECK(ring_new(&refused, 0, 0, &(struct ring_geometry){4096, 1, 2048}) < 0);
    CHECK_EQUAL(ring_new(&refused, 0, -1, &geometry), -EINVAL);
    CHECK(!refused);
}

int main(void)
{
    page = mmap(NULL, sizeof(*page), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(page != MAP_FAILED);
    test_order();
    test_held();
    test_not_there_yet();
    for (size_t i = 0; i < sizeof(header_cases) / sizeof(header_cases[0]); i++) {
        test_header(&header_cases[i], PER_BLOCK - 1);
        test_header(&header_cases[i], FRAMES - 1);
    }
    test_hostile();
    for (uint32_t first = 0; first < FRAMES; first++)
        for (uint32_t count = 1; count <= FRAMES; count++) {
            test_start(first, count, false);
            test_start(first, count, true);
        }
    for (uint8_t kind = 0; kind < 8; kind++)
        test_virtio(kind, 100, kind == 5 ? 100 : 0);
    test_unsound_link();
    test_whole();
    test_whole_full();
    test_holes();
    test_detaching();
    test_waiting();
    test_geometry();
    munmap(page, sizeof(*page));
    return 0;
}

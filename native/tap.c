/* SPDX-License-Identifier: Apache-2.0 */
#include "tap.h"

#include <errno.h>
#include <sys/socket.h>
#include <time.h>

static_assert((int)TAPPED_MAX < UINT16_MAX, "an index + 1 fits");
static_assert((int)TAPS_MAX <= 8, "a bit for each");

void taps_init(struct taps *taps)
{
    taps->open = 0;
    taps->first_free = 0;
    taps->fresh = 0;
    for (unsigned i = 0; i < TAPS_MAX; i++)
        taps->all[i] = (struct tap){.fd = -1};
}

static struct tap *find(struct taps *taps, int fd)
{
    for (unsigned i = 0; i < TAPS_MAX; i++)
        if (taps->all[i].fd == fd)
            return &taps->all[i];
    return NULL;
}

int taps_open(struct taps *taps, uint32_t rule, int fd, uint64_t count, uint32_t snap)
{
    struct tap *tap;

    if (fd < 0 || !count || snap > TAP_BYTES_MAX || rule >= COUNTERS_RULES_MAX || find(taps, fd))
        return -EINVAL;
    tap = find(taps, -1);
    if (!tap)
        return -EBUSY;
    *tap = (struct tap){.fd = fd, .rule = rule, .snap = snap, .left = count};
    taps->open++;
    return 0;
}

static void end(struct taps *taps, struct tap *tap)
{
    if (!tap->is_over)
        taps->open--;
    tap->is_over = true;
}

int taps_close(struct taps *taps, int fd)
{
    struct tap *tap = fd < 0 ? NULL : find(taps, fd);
    unsigned index;

    if (!tap)
        return -ENOENT;
    end(taps, tap);
    tap->fd = -1;
    index = (unsigned)(tap - taps->all);
    /* What it has in hand is not for whoever is next in its place. */
    for (unsigned i = 0; i < taps->fresh; i++)
        taps->packets[i].taps &= (uint8_t)~(1u << index);
    return 0;
}

static uint8_t watching(const struct taps *taps, uint32_t rule)
{
    unsigned bits = 0;

    for (unsigned i = 0; i < TAPS_MAX; i++)
        if (taps->all[i].fd >= 0 && !taps->all[i].is_over && taps->all[i].rule == rule)
            bits |= 1u << i;
    return (uint8_t)bits;
}

/* The length that the IP header says. A packet that matched a rule was parsed, so it has that many bytes; behind it an
 * Ethernet frame may be padded. */
static size_t packet_length(const uint8_t *data, size_t length)
{
    size_t said = length;

    if (length >= 4 && data[0] >> 4 == 4)
        said = (size_t)data[2] << 8 | data[3];
    else if (length >= 6 && data[0] >> 4 == 6)
        said = 40 + ((size_t)data[4] << 8 | data[5]);
    return said < length ? said : length;
}

static size_t write_head(uint8_t *to, const struct packet *packet)
{
    const struct framing framing = {.link = NULL};
    const struct heading heading = {
        .source = packet->source,
        .destination = packet->destination,
        .source_port = packet->source_port,
        .destination_port = packet->destination_port,
        .ttl = packet->ttl,
        .tos = packet->tos,
        .protocol = packet->protocol,
    };

    return headers_write(to, &heading, &framing, packet->payload, packet->payload_length, 0, 0);
}

static uint64_t wall_clock_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_REALTIME, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

uint16_t taps_take(struct taps *taps, uint32_t rule, uint32_t outputs, uint8_t interface, const struct packet *packet,
                   const uint8_t *data, size_t length, uint64_t arrived_ns)
{
    uint8_t bits = watching(taps, rule);
    struct tapped *tapped;
    uint16_t name;

    if (!bits)
        return 0;
    if (taps->first_free) {
        name = taps->first_free;
        taps->first_free = taps->packets[name - 1].next_free;
    } else if (taps->fresh < TAPPED_MAX) {
        name = ++taps->fresh;
    } else {
        for (unsigned i = 0; i < TAPS_MAX; i++)
            taps->all[i].lost += bits >> i & 1;
        return 0;
    }
    tapped = &taps->packets[name - 1];
    *tapped = (struct tapped){
        .record = {.time_ns = arrived_ns ? arrived_ns : wall_clock_ns(), .interface = interface, .vlan = packet->vlan,
                   .datagrams = (uint16_t)packet_datagrams(packet), .outputs = (uint16_t)outputs},
        .data = data ? data : packet->payload,
        .taps = bits,
    };
    if (!data)
        tapped->head_length = (uint8_t)write_head(tapped->head, packet);
    tapped->record.length =
        (uint32_t)(data ? packet_length(data, length) : tapped->head_length + packet->payload_length);
    return name;
}

void taps_drop(struct taps *taps, uint16_t tapped, uint32_t output, uint32_t datagrams, enum drop_reason reason)
{
    struct tapped *packet = &taps->packets[tapped - 1];
    struct tap_record *record = &packet->record;

    packet->copies_dropped += datagrams;
    for (unsigned i = 0; i < record->drops; i++)
        if (record->dropped[i].output == output)
            return; /* of several datagrams the first that did not leave says why */
    if (record->drops < TAP_DROPS_MAX)
        record->dropped[record->drops++] = (struct tap_drop){output, reason};
}

/* One record, or one more lost. */
static void show(struct taps *taps, struct tap *tap, struct tapped *packet)
{
    size_t length = packet->record.length < tap->snap ? packet->record.length : tap->snap;
    size_t head = packet->head_length < length ? packet->head_length : length;
    struct iovec parts[] = {
        {&packet->record, sizeof(packet->record)},
        {packet->head, head},
        {(void *)(uintptr_t)packet->data, length - head}, /* sendmsg only reads it */
    };
    const struct msghdr message = {.msg_iov = parts, .msg_iovlen = 3};

    packet->record.lost = tap->lost;
    if (sendmsg(tap->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0) {
        if (!--tap->left)
            end(taps, tap);
    } else if (errno == EAGAIN || errno == ENOBUFS || errno == ENOMEM || errno == EMSGSIZE || errno == EINTR) {
        tap->lost++;
    } else {
        end(taps, tap); /* nobody is there */
    }
}

void taps_settle(struct taps *taps, uint16_t tapped, enum drop_reason reason)
{
    struct tapped *packet = &taps->packets[tapped - 1];
    struct tap_record *record = &packet->record;

    record->reason = (uint8_t)reason;
    record->copies = reason == DROP_NONE ? (uint32_t)record->datagrams * record->outputs - packet->copies_dropped : 0;
    for (unsigned i = 0; i < TAPS_MAX; i++)
        if (packet->taps >> i & 1 && !taps->all[i].is_over)
            show(taps, &taps->all[i], packet);
    packet->taps = 0;
    packet->next_free = taps->first_free;
    taps->first_free = tapped;
}

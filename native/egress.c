/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE /* struct in6_pktinfo */
#include "egress.h"

#include <errno.h>
#include <netinet/udp.h>
#include <stdio.h>
#include <stdlib.h>

#ifndef UDP_SEGMENT
#define UDP_SEGMENT 103 /* linux/udp.h */
#endif

static_assert((RUNS_MAX & (RUNS_MAX - 1)) == 0, "the ring of refused runs is masked");
static_assert(RUNS_MAX < UINT16_MAX, "index + 1 fits");
static_assert(sizeof(struct in6_pktinfo) == PKTINFO_MAX && sizeof(struct in_pktinfo) <= PKTINFO_MAX, "room for either");
static_assert((int)HEADERS_VIRTIO == (int)VIRTIO_HEADER, "the same on both ways");

/* What an MTU leaves behind these headers. */
static uint16_t room_behind(uint32_t mtu, uint32_t headers)
{
    return mtu > headers + UINT16_MAX ? UINT16_MAX : mtu > headers ? (uint16_t)(mtu - headers) : 0;
}

struct egress egress_of(unsigned interface, enum way way, int fd, uint32_t mtu, const struct egress_link *link)
{
    bool virtio = way == WAY_FRAME && ingress_has_virtio(fd);

    return (struct egress){
        .fd = fd,
        .mtu = mtu,
        .room = {room_behind(mtu, HEADERS_IPV4 + HEADERS_UDP), room_behind(mtu, HEADERS_IPV6 + HEADERS_UDP)},
        .interface = (uint8_t)interface,
        .way = (uint8_t)way,
        .segmentation = !way_writes_headers(way) || virtio,
        .virtio = virtio,
        .link = *link,
    };
}

void runs_init(struct runs *runs)
{
    memset(runs, 0, sizeof(*runs));
    runs->identification = 1;
    for (uint16_t i = 0; i < RUNS_MAX; i++)
        runs->all[i].next_free = i + 1;
}

static uint16_t index_of(const struct runs *runs, const struct run *run)
{
    return (uint16_t)(run - runs->all);
}

/* A free run. The last `reserve` are kept. */
static struct run *take(struct runs *runs, uint16_t reserve)
{
    struct run *run;

    if (runs->in_use + reserve >= RUNS_MAX)
        return NULL;
    run = &runs->all[runs->first_free];
    runs->first_free = run->next_free;
    runs->in_use++;
    return run;
}

static void add(struct run *run, const uint8_t *payload, size_t length, uint32_t slot)
{
    run->payloads[run->count].iov_base = (void *)(uintptr_t)payload; /* read only by a send */
    run->payloads[run->count].iov_len = length;
    run->slots[run->count] = slot;
    run->count++;
    run->datagrams++;
    run->bytes += (uint32_t)length;
}

/* All that a run says but its heading and payloads. */
static void describe(struct run *run, struct egress *egress, struct ingress *ingress, const struct table_output *output)
{
    run->ingress = ingress;
    run->egress = egress;
    run->of = output;
    run->output = output->counter;
    run->count = 0;
    run->datagrams = 0;
    run->bytes = 0;
    run->again = 0;
    run->error = 0;
    run->pending = 0;
    run->whole = 0;
}

/* --- message headers ------------------------------------------------------------------------------------------------ */

static uint8_t *put_control(uint8_t *at, int level, int type, const void *value, size_t length)
{
    struct cmsghdr *control = (struct cmsghdr *)(void *)at;

    control->cmsg_level = level;
    control->cmsg_type = type;
    control->cmsg_len = CMSG_LEN(length);
    memcpy(CMSG_DATA(control), value, length);
    return at + CMSG_SPACE(length);
}

/* IP_TTL as a control message also holds for multicast (ip(7) names only IP_MULTICAST_TTL, a per-socket value). */
static uint8_t *seal_ipv4(struct run *run)
{
    const struct heading *heading = &run->heading;
    const int ttl = heading->ttl, tos = heading->tos;
    uint8_t *at = put_control(run->control, IPPROTO_IP, IP_TTL, &ttl, sizeof(ttl));

    if (tos)
        at = put_control(at, IPPROTO_IP, IP_TOS, &tos, sizeof(tos));
    if (heading->source.words[3]) {
        const struct in_pktinfo from = {.ipi_spec_dst.s_addr = heading->source.words[3]};

        at = put_control(at, IPPROTO_IP, IP_PKTINFO, &from, sizeof(from));
    }
    run->address.ipv4.sin_family = AF_INET;
    run->address.ipv4.sin_port = htons(heading->destination_port);
    run->address.ipv4.sin_addr.s_addr = heading->destination.words[3];
    run->message.msg_namelen = sizeof(run->address.ipv4);
    return at;
}

static uint8_t *seal_ipv6(struct run *run)
{
    const struct heading *heading = &run->heading;
    const int hops = heading->ttl, class = heading->tos;
    uint8_t *at = put_control(run->control, IPPROTO_IPV6, IPV6_HOPLIMIT, &hops, sizeof(hops));

    if (class)
        at = put_control(at, IPPROTO_IPV6, IPV6_TCLASS, &class, sizeof(class));
    if (!address_is_any(&heading->source)) {
        struct in6_pktinfo from = {0};

        memcpy(&from.ipi6_addr, heading->source.bytes, sizeof(from.ipi6_addr));
        at = put_control(at, IPPROTO_IPV6, IPV6_PKTINFO, &from, sizeof(from));
    }
    run->address.ipv6 = (struct sockaddr_in6){.sin6_family = AF_INET6, .sin6_port = htons(heading->destination_port)};
    memcpy(&run->address.ipv6.sin6_addr, heading->destination.bytes, sizeof(run->address.ipv6.sin6_addr));
    run->message.msg_namelen = sizeof(run->address.ipv6);
    return at;
}

static void seal_for_udp(struct run *run)
{
    uint8_t *end = run->egress->way == WAY_UDP4 || run->egress->way == WAY_LOOP4 ? seal_ipv4(run) : seal_ipv6(run);

    if (run->datagrams > 1)
        end = put_control(end, IPPROTO_UDP, UDP_SEGMENT, &run->segment, sizeof(run->segment));
    run->message.msg_name = &run->address;
    run->message.msg_iov = run->payloads;
    run->message.msg_iovlen = run->count;
    run->message.msg_control = run->control;
    run->message.msg_controllen = (size_t)(end - run->control);
}

/* A packet socket is bound to its interface, a raw one is told where to. */
static void seal_with_headers(struct run *run, size_t headers)
{
    run->head = (struct iovec){run->headers, headers};
    run->message = (struct msghdr){.msg_iov = &run->head, .msg_iovlen = 1u + run->count};
    if (run->egress->way == WAY_FRAME)
        return;
    run->message.msg_name = &run->address;
    if (run->egress->way == WAY_RAW4) {
        run->address.ipv4 = (struct sockaddr_in){
            .sin_family = AF_INET, .sin_addr.s_addr = run->heading.destination.words[3]};
        run->message.msg_namelen = sizeof(run->address.ipv4);
    } else {
        run->address.ipv6 = (struct sockaddr_in6){.sin6_family = AF_INET6};
        memcpy(&run->address.ipv6.sin6_addr, run->heading.destination.bytes, 16);
        run->message.msg_namelen = sizeof(run->address.ipv6);
    }
}

static struct framing framing_of(const struct egress *egress)
{
    return (struct framing){.link = egress->way == WAY_FRAME ? &egress->link : NULL, .virtio = egress->virtio};
}

/* So many datagrams have got their identifications. The next one's is not 0 in the 16 bits of IPv4: raw sockets fill that
 * in, each fragment with another. */
static void identify(struct runs *runs, uint32_t datagrams)
{
    runs->identification += datagrams;
    if (!(runs->identification & UINT16_MAX))
        runs->identification++;
}

/* Fill the message header of a run that grows no more. */
static void seal(struct runs *runs, struct run *run)
{
    if (way_writes_headers(run->egress->way)) {
        const struct framing framing = framing_of(run->egress);

        seal_with_headers(run, headers_write(run->headers, &run->heading, &framing, run->payloads[0].iov_base,
                                             run->bytes, run->datagrams > 1 ? run->segment : 0,
                                             runs->identification));
        identify(runs, run->datagrams);
    } else {
        seal_for_udp(run);
    }
}

static void submit_run(struct runs *runs, struct run *run, runs_submit *submit, void *context)
{
    seal(runs, run);
    runs->in_flight++;
    submit(context, run, index_of(runs, run));
}

/* --- fragments ------------------------------------------------------------------------------------------------------ */

/* We write the headers of a single datagram that exceeds the MTU. */
static bool has_to_be_cut(const struct run *run, size_t length)
{
    return length > run->room && way_writes_headers(run->egress->way);
}

static void begin_to_cut(struct runs *runs, struct run *run)
{
    run->cut = 0;
    run->identification = runs->identification;
    identify(runs, 1);
    runs->cutting = (uint16_t)(index_of(runs, run) + 1);
}

static void write_fragment(struct run *fragment, const struct run *whole)
{
    const struct framing framing = framing_of(whole->egress);
    const struct iovec *payload = &whole->payloads[0];
    struct fragment written;

    describe(fragment, whole->egress, whole->ingress, whole->of);
    fragment->heading = whole->heading;
    written = headers_write_fragment(fragment->headers, &whole->heading, &framing, payload->iov_base, payload->iov_len,
                                     whole->cut, headers_fragment_room(&whole->heading, whole->egress->mtu),
                                     whole->identification);
    fragment->payloads[0].iov_base = (uint8_t *)payload->iov_base + written.at;
    fragment->payloads[0].iov_len = written.length;
    fragment->count = 1;
    seal_with_headers(fragment, written.headers);
}

/* Prepare fragments of the run that is being cut, if there is one. False if there was no free run for all. */
static bool cut(struct runs *runs, runs_submit *submit, void *context)
{
    struct run *whole;
    size_t length;

    if (!runs->cutting)
        return true;
    whole = &runs->all[runs->cutting - 1];
    length = headers_cut_length(&whole->heading, whole->payloads[0].iov_len);
    while (whole->cut < length) {
        struct run *fragment = take(runs, 0);

        if (!fragment)
            return false;
        write_fragment(fragment, whole);
        fragment->whole = runs->cutting;
        whole->cut += (uint32_t)headers_fragment_room(&whole->heading, whole->egress->mtu);
        whole->pending++;
        runs->in_flight++;
        submit(context, fragment, index_of(runs, fragment));
    }
    runs->cutting = 0;
    return true;
}

/* --- runs ----------------------------------------------------------------------------------------------------------- */

/* The open run at this place of the list grows no more. */
static void close_open(struct runs *runs, struct run *run, runs_submit *submit, void *context)
{
    uint16_t last = runs->open[--runs->open_count];

    runs->open[run->open_place] = last;
    runs->all[last].open_place = run->open_place;
    runs->of_output[run->output] = 0;
    submit_run(runs, run, submit, context);
}

static bool same_flow(const struct heading *a, const struct heading *b)
{
    return a->source_port == b->source_port && a->destination_port == b->destination_port &&
           a->protocol == b->protocol && address_equals(&a->destination, &b->destination) &&
           address_equals(&a->source, &b->source);
}

/* Whether the run has room for one more that is to leave with this heading (of a plain output NULL, since it is the
 * output's). An empty datagram would leave no trace in a run: it goes alone. */
static bool fits(const struct run *run, const struct egress *egress, const struct table_output *output,
                 const struct heading *heading, const struct ingress *ingress, size_t length, uint8_t ttl, uint8_t tos)
{
    return length > 0 && run->of == output && run->ttl == ttl && run->tos == tos && run->ingress == ingress &&
           run->egress == egress && length <= run->segment && run->bytes + length <= RUN_BYTES_MAX &&
           (!heading || same_flow(&run->heading, heading));
}

static void set_heading(struct run *run, const struct table_output *output, const struct heading *heading, uint8_t ttl,
                        uint8_t tos)
{
    run->ttl = ttl;
    run->tos = tos;
    if (heading) {
        run->heading = *heading;
        run->room = heading->protocol == PROTOCOL_UDP
                        ? run->egress->room[!heading_is_ipv4(heading)]
                        : room_behind(run->egress->mtu, (uint32_t)heading_length(heading));
        return;
    }
    run->heading.source = output->source;
    run->heading.destination = output->address;
    run->heading.destination_port = output->port;
    run->heading.ttl = ttl;
    run->heading.tos = tos;
    run->heading.protocol = PROTOCOL_UDP;
    run->room = run->egress->room[output->way == WAY_UDP6 || output->way == WAY_LOOP6];
}

/* Queue a run to be sent datagram by datagram. */
static void refuse(struct runs *runs, struct run *run)
{
    runs->refused[(runs->refused_head + runs->refused_count++) & (RUNS_MAX - 1)] = index_of(runs, run);
}

static void send_merged(struct runs *runs, struct run *run, const struct packet *packet, uint32_t slot,
                        runs_submit *submit, void *context)
{
    add(run, packet->payload, packet->payload_length, slot);
    run->datagrams = packet_datagrams(packet);
    run->segment = packet->segment;
    if (run->egress->segmentation && run->datagrams <= SEGMENTS_MAX && run->segment <= run->room)
        submit_run(runs, run, submit, context);
    else
        refuse(runs, run);
}

enum appended runs_append(struct runs *runs, struct egress *egress, const struct table_output *output,
                          const struct heading *heading, const struct packet *packet, struct ingress *ingress,
                          uint32_t slot, runs_submit *submit, void *context)
{
    uint8_t ttl = heading_ttl(output, packet), tos = heading_tos(output, packet);
    size_t length = packet->payload_length;
    uint16_t place = runs->of_output[output->counter];
    struct run *run = place ? &runs->all[place - 1] : NULL;

    if (run && (packet->segment || !fits(run, egress, output, heading, ingress, length, ttl, tos))) {
        close_open(runs, run, submit, context);
        run = NULL;
    }
    if (!run) {
        run = runs->cutting ? NULL : take(runs, RUNS_RESERVED);
        if (!run)
            return NO_RUN_FREE;
        describe(run, egress, ingress, output);
        set_heading(run, output, heading, ttl, tos);
        if (packet->segment) {
            send_merged(runs, run, packet, slot, submit, context);
            return APPENDED;
        }
        if (has_to_be_cut(run, length)) {
            add(run, packet->payload, length, slot);
            begin_to_cut(runs, run);
            cut(runs, submit, context);
            return APPENDED;
        }
        run->segment = (uint16_t)length;
        run->open_place = runs->open_count;
        runs->open[runs->open_count++] = index_of(runs, run);
        runs->of_output[output->counter] = (uint16_t)(index_of(runs, run) + 1);
    }
    add(run, packet->payload, length, slot);
    /* Empty datagrams, those above the MTU and those that are not of UDP cannot be segments; a shorter one is the last of
     * its run. */
    if (!egress->segmentation || length == 0 || length > run->room || run->count == SEGMENTS_MAX ||
        length < run->segment || run->heading.protocol != PROTOCOL_UDP)
        close_open(runs, run, submit, context);
    return APPENDED;
}

void runs_flush(struct runs *runs, runs_submit *submit, void *context)
{
    for (uint16_t i = 0; i < runs->open_count; i++) {
        struct run *run = &runs->all[runs->open[i]];

        runs->of_output[run->output] = 0;
        submit_run(runs, run, submit, context);
    }
    runs->open_count = 0;
}

struct run *runs_finish(struct runs *runs, uint16_t index, int *result)
{
    struct run *run = &runs->all[index], *whole;

    if (index >= RUNS_MAX || runs->in_flight == 0) {
        fprintf(stderr, "mcrelay: completion of a send that was not in flight\n");
        abort();
    }
    runs->in_flight--;
    if (!run->whole)
        return run;
    whole = &runs->all[run->whole - 1];
    if (*result < 0 && !whole->error)
        whole->error = *result;
    whole->pending--;
    *result = whole->error;
    if (whole->pending || runs->cutting == run->whole)
        whole = NULL;
    runs_release(runs, run);
    return whole;
}

void runs_release(struct runs *runs, struct run *run)
{
    run->next_free = runs->first_free;
    runs->first_free = index_of(runs, run);
    runs->in_use--;
}

bool runs_refuse_segments(struct runs *runs, struct run *run, int result)
{
    /* EIO: the device cannot; EINVAL, or EMSGSIZE in newer kernels: a segment exceeds the path's MTU, or this kernel knows
     * no segments. */
    if (run->datagrams < 2 || (result != -EIO && result != -EINVAL && result != -EMSGSIZE))
        return false;
    run->egress->segmentation = false;
    refuse(runs, run);
    return true;
}

/* Datagram `number` of a refused run, as a run of its own, which takes over the refused one's hold on the slot, or takes
 * another if there are more to come from there. */
static void send_one(struct runs *runs, const struct run *refused, uint32_t number, struct run *run,
                     runs_submit *submit, void *context)
{
    bool merged = refused->count < refused->datagrams;
    const struct iovec *payload = &refused->payloads[merged ? 0 : number];
    uint32_t slot = refused->slots[merged ? 0 : number];
    size_t at = merged ? (size_t)number * refused->segment : 0, left = payload->iov_len - at;

    describe(run, refused->egress, refused->ingress, refused->of);
    run->heading = refused->heading;
    run->room = refused->room;
    add(run, (const uint8_t *)payload->iov_base + at, merged && left > refused->segment ? refused->segment : left, slot);
    if (merged && number + 1 < refused->datagrams)
        pool_hold(&refused->ingress->pool, slot);
    if (has_to_be_cut(run, run->bytes))
        begin_to_cut(runs, run);
    else
        submit_run(runs, run, submit, context);
}

bool runs_send_again(struct runs *runs, runs_submit *submit, void *context)
{
    if (!cut(runs, submit, context))
        return false;
    while (runs->refused_count) {
        uint16_t index = runs->refused[runs->refused_head];
        struct run *refused = &runs->all[index];

        while (refused->again < refused->datagrams) {
            struct run *run = take(runs, RUNS_RESERVED - 1); /* there is always one to come for refused runs */

            if (!run)
                return false;
            send_one(runs, refused, refused->again++, run, submit, context);
            if (!cut(runs, submit, context))
                return false;
        }
        runs->refused_head = (runs->refused_head + 1) & (RUNS_MAX - 1);
        runs->refused_count--;
        runs_release(runs, refused);
    }
    return true;
}

enum drop_reason send_drop_reason(int result)
{
    switch (-result) {
    case EAGAIN:
    case ENOBUFS:
    case ENOMEM:
        return DROP_EGRESS_FULL;
    case ENETUNREACH:
    case EHOSTUNREACH:
    case ENETDOWN:
    case EHOSTDOWN:
    case EADDRNOTAVAIL:
    case ENODEV:
    case ENXIO:
        return DROP_EGRESS_UNREACHABLE;
    case EPERM:
    case EACCES:
        return DROP_EGRESS_REFUSED;
    default:
        return DROP_EGRESS_ERROR;
    }
}

/* SPDX-License-Identifier: Apache-2.0 */
#include "egress.h"

#include <errno.h>
#include <netinet/udp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifndef UDP_SEGMENT
#define UDP_SEGMENT 103 /* linux/udp.h */
#endif

static_assert((RUNS_MAX & (RUNS_MAX - 1)) == 0, "the ring of refused runs is masked");
static_assert(RUNS_MAX < UINT16_MAX, "index + 1 fits");

void runs_init(struct runs *runs)
{
    memset(runs, 0, sizeof(*runs));
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

/* All that a run says but its payloads. */
static void describe(struct run *run, struct egress *egress, struct ingress *ingress, uint32_t output, uint8_t ttl)
{
    run->ingress = ingress;
    run->egress = egress;
    run->output = output;
    run->ttl = ttl;
    run->count = 0;
    run->datagrams = 0;
    run->bytes = 0;
    run->again = 0;
}

/* Fill the message header of a run that grows no more. */
static void seal(struct run *run)
{
    struct cmsghdr *control = (struct cmsghdr *)run->control;
    int ttl = run->ttl;
    size_t size = CMSG_SPACE(sizeof(ttl));

    /* IP_TTL as a control message also holds for multicast (ip(7) names only IP_MULTICAST_TTL, a per-socket value). */
    control->cmsg_level = IPPROTO_IP;
    control->cmsg_type = IP_TTL;
    control->cmsg_len = CMSG_LEN(sizeof(ttl));
    memcpy(CMSG_DATA(control), &ttl, sizeof(ttl));
    if (run->datagrams > 1) {
        uint16_t segment = run->segment;

        control = (struct cmsghdr *)(run->control + size);
        control->cmsg_level = IPPROTO_UDP;
        control->cmsg_type = UDP_SEGMENT;
        control->cmsg_len = CMSG_LEN(sizeof(segment));
        memcpy(CMSG_DATA(control), &segment, sizeof(segment));
        size += CMSG_SPACE(sizeof(segment));
    }
    run->message = (struct msghdr){
        .msg_name = &run->address,
        .msg_namelen = sizeof(run->address),
        .msg_iov = run->payloads,
        .msg_iovlen = run->count,
        .msg_control = run->control,
        .msg_controllen = size,
    };
}

static void submit_run(struct runs *runs, struct run *run, runs_submit *submit, void *context)
{
    seal(run);
    runs->in_flight++;
    submit(context, run, index_of(runs, run));
}

/* The open run at this place of the list grows no more. */
static void close_open(struct runs *runs, struct run *run, runs_submit *submit, void *context)
{
    uint16_t last = runs->open[--runs->open_count];

    runs->open[run->open_place] = last;
    runs->all[last].open_place = run->open_place;
    runs->of_output[run->output] = 0;
    submit_run(runs, run, submit, context);
}

/* An empty datagram would leave no trace in a run: it goes alone. Two outputs never share a counter; should they, their
 * datagrams must not share a run, which has one address. */
static bool fits(const struct run *run, const struct egress *egress, const struct table_output *output,
                 const struct ingress *ingress, size_t length, uint8_t ttl)
{
    return length > 0 && run->ttl == ttl && run->ingress == ingress && run->egress == egress &&
           run->address.sin_addr.s_addr == output->address.words[3] && run->address.sin_port == htons(output->port) &&
           length <= run->payloads[0].iov_len && run->bytes + length <= RUN_BYTES_MAX;
}

static void set_address(struct run *run, const struct table_output *output)
{
    run->address.sin_family = AF_INET;
    run->address.sin_port = htons(output->port);
    run->address.sin_addr.s_addr = output->address.words[3];
}

static bool fits_mtu(const struct egress *egress, size_t length)
{
    return length + HEADERS <= egress->mtu;
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
    if (run->egress->segmentation && run->datagrams <= SEGMENTS_MAX && fits_mtu(run->egress, run->segment))
        submit_run(runs, run, submit, context);
    else
        refuse(runs, run);
}

enum appended runs_append(struct runs *runs, struct egress *egress, const struct table_output *output,
                          const struct packet *packet, struct ingress *ingress, uint32_t slot, runs_submit *submit,
                          void *context)
{
    uint8_t ttl = output->ttl ? output->ttl : packet->ttl > 1 ? (uint8_t)(packet->ttl - 1) : 1;
    size_t length = packet->payload_length;
    uint16_t place = runs->of_output[output->counter];
    struct run *run = place ? &runs->all[place - 1] : NULL;

    if (run && (packet->segment || !fits(run, egress, output, ingress, length, ttl))) {
        close_open(runs, run, submit, context);
        run = NULL;
    }
    if (!run) {
        run = take(runs, 1);
        if (!run)
            return NO_RUN_FREE;
        describe(run, egress, ingress, output->counter, ttl);
        set_address(run, output);
        if (packet->segment) {
            send_merged(runs, run, packet, slot, submit, context);
            return APPENDED;
        }
        run->segment = (uint16_t)length;
        run->open_place = runs->open_count;
        runs->open[runs->open_count++] = index_of(runs, run);
        runs->of_output[output->counter] = (uint16_t)(index_of(runs, run) + 1);
    }
    add(run, packet->payload, length, slot);
    /* Empty datagrams and those above the MTU cannot be segments; a shorter one is the last of its run. */
    if (!egress->segmentation || length == 0 || !fits_mtu(egress, length) || run->count == SEGMENTS_MAX ||
        length < run->payloads[0].iov_len)
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

struct run *runs_finish(struct runs *runs, uint16_t index)
{
    if (index >= RUNS_MAX || runs->in_flight == 0) {
        fprintf(stderr, "mcrelay: completion of a send that was not in flight\n");
        abort();
    }
    runs->in_flight--;
    return &runs->all[index];
}

void runs_release(struct runs *runs, uint16_t index)
{
    runs->all[index].next_free = runs->first_free;
    runs->first_free = index;
    runs->in_use--;
}

bool runs_refuse_segments(struct runs *runs, uint16_t index, int result)
{
    struct run *run = &runs->all[index];

    /* EIO: the device cannot; EINVAL, or EMSGSIZE in newer kernels: a segment exceeds the path's MTU. */
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

    describe(run, refused->egress, refused->ingress, refused->output, refused->ttl);
    run->address = refused->address;
    add(run, (const uint8_t *)payload->iov_base + at, merged && left > refused->segment ? refused->segment : left, slot);
    if (merged && number + 1 < refused->datagrams)
        pool_hold(&refused->ingress->pool, slot);
    submit_run(runs, run, submit, context);
}

bool runs_send_again(struct runs *runs, runs_submit *submit, void *context)
{
    while (runs->refused_count) {
        uint16_t index = runs->refused[runs->refused_head];
        struct run *refused = &runs->all[index];

        while (refused->again < refused->datagrams) {
            struct run *run = take(runs, 0); /* there is always one to come for refused runs */

            if (!run)
                return false;
            send_one(runs, refused, refused->again++, run, submit, context);
        }
        runs->refused_head = (runs->refused_head + 1) & (RUNS_MAX - 1);
        runs->refused_count--;
        runs_release(runs, index);
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

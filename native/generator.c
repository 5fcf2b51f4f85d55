/* SPDX-License-Identifier: Apache-2.0 */
#include "generator.h"

#include <assert.h>
#include <errno.h>
#include <netinet/udp.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <time.h>

#ifndef UDP_SEGMENT
#define UDP_SEGMENT 103 /* linux/udp.h */
#endif

static const uint64_t second_ns = 1000000000;

static_assert(ALONE_RATE == 1000000000 / WAKE_INTERVAL_NS, "above it, several are due per wake-up");

static uint64_t clock_ns(clockid_t clock)
{
    struct timespec now;

    clock_gettime(clock, &now);
    return (uint64_t)now.tv_sec * second_ns + (uint64_t)now.tv_nsec;
}

int generator_open(struct generator **out, const struct generator_plan *plan, int fd, const uint8_t *addresses,
                   uint32_t address_size)
{
    uint32_t header = PAYLOAD_HEADER + (plan->rtp ? RTP_HEADER : 0);
    struct generator *generator;
    struct cmsghdr *control;
    uint16_t segment = (uint16_t)plan->size;

    if (!plan->flows || !plan->burst || plan->size < header || plan->size > DATAGRAM_MAX || plan->rate < 0)
        return -EINVAL;
    if (!plan->segments || plan->segments > CALL_DATAGRAMS_MAX ||
        (plan->segments > 1 && plan->segments * plan->size > DATAGRAM_MAX))
        return -EINVAL;
    if (addresses && (!address_size || address_size > sizeof(struct sockaddr_in6)))
        return -EINVAL;
    if (!addresses && plan->flows > 1)
        return -EINVAL;
    generator = calloc(1, sizeof(*generator));
    if (!generator)
        return -ENOMEM;
    generator->plan = *plan;
    generator->fd = fd;
    generator->header = header;
    generator->interval_ns = plan->rate > 0 ? (double)second_ns / plan->rate : 0;
    if (addresses) {
        generator->address_size = address_size;
        generator->addresses = malloc((size_t)plan->flows * address_size);
        if (!generator->addresses) {
            generator_close(generator);
            return -ENOMEM;
        }
        memcpy(generator->addresses, addresses, (size_t)plan->flows * address_size);
    }
    pattern_fill(generator->pattern);
    control = (struct cmsghdr *)generator->control;
    control->cmsg_level = IPPROTO_UDP;
    control->cmsg_type = UDP_SEGMENT;
    control->cmsg_len = CMSG_LEN(sizeof(segment));
    memcpy(CMSG_DATA(control), &segment, sizeof(segment));
    *out = generator;
    return 0;
}

void generator_close(struct generator *generator)
{
    free(generator->addresses);
    free(generator);
}

static void build_datagram(struct generator *generator, uint32_t place, uint32_t flow, uint64_t sequence,
                           uint64_t now_ns)
{
    struct iovec *pieces = &generator->pieces[2 * place];
    uint8_t *header = generator->headers[place];
    uint32_t id = generator->plan.flow_id + flow;

    if (generator->plan.rtp) {
        header[0] = 2 << 6; /* the version; no padding, extension or sources */
        header[1] = 96;     /* the first dynamic payload type (RFC 3551, section 6) */
        store16(header + 2, (uint16_t)sequence);
        store32(header + 4, rtp_ticks(now_ns));
        store32(header + 8, id);
        header += RTP_HEADER;
    }
    payload_write_header(header, id, sequence, now_ns);
    pieces[0].iov_base = generator->headers[place];
    pieces[0].iov_len = generator->header;
    pieces[1].iov_base = generator->pattern + payload_shift(id, sequence, now_ns);
    pieces[1].iov_len = generator->plan.size - generator->header;
}

uint32_t generator_build(struct generator *generator, uint64_t due, uint64_t now_ns)
{
    const struct generator_plan *plan = &generator->plan;
    uint64_t index = generator->totals.sent;
    uint32_t messages = 0, place = 0;

    if (due > CALL_DATAGRAMS_MAX)
        due = CALL_DATAGRAMS_MAX;
    while (place < due && messages < CALL_MESSAGES_MAX) {
        uint64_t block = index / plan->burst, offset = index % plan->burst;
        uint32_t flow = (uint32_t)(block % plan->flows);
        uint64_t sequence = block / plan->flows * plan->burst + offset;
        /* A single flow's datagrams are adjacent however many there are. */
        uint64_t adjacent = plan->flows == 1 ? due : plan->burst - offset;
        struct msghdr *message = &generator->messages[messages].msg_hdr;
        uint32_t count = plan->segments;

        if (count > adjacent)
            count = (uint32_t)adjacent;
        if (count > due - place)
            count = (uint32_t)due - place;
        if (generator->addresses) {
            message->msg_name = generator->addresses + (size_t)flow * generator->address_size;
            message->msg_namelen = generator->address_size;
        }
        message->msg_iov = &generator->pieces[2 * place];
        message->msg_iovlen = 2 * count;
        message->msg_control = count > 1 ? generator->control : NULL;
        message->msg_controllen = count > 1 ? sizeof(generator->control) : 0;
        for (uint32_t i = 0; i < count; i++)
            build_datagram(generator, place++, flow, sequence + i, now_ns);
        generator->message_datagrams[messages++] = count;
        index += count;
    }
    return messages;
}

/* One send call. 0 also when it is to be tried again. */
static int send_due(struct generator *generator, uint64_t due)
{
    uint32_t messages = generator_build(generator, due, clock_ns(CLOCK_REALTIME));
    int sent = sendmmsg(generator->fd, generator->messages, messages, 0);

    if (sent >= 0) {
        for (int i = 0; i < sent; i++) {
            generator->totals.sent += generator->message_datagrams[i];
            if (generator->message_datagrams[i] > generator->totals.segments)
                generator->totals.segments = generator->message_datagrams[i];
        }
        generator->attempts = 0;
        return 0;
    }
    switch (errno) {
    case EIO: /* the device cannot; EINVAL, or EMSGSIZE in newer kernels: a segment exceeds the path's MTU */
    case EINVAL:
    case EMSGSIZE:
        if (generator->message_datagrams[0] < 2)
            return -errno;
        generator->totals.segments_refused = errno;
        generator->plan.segments = 1;
        return 0;
    case ENOBUFS:
    case EAGAIN:
    case ECONNREFUSED: /* of an earlier datagram; this one was not sent */
        if (++generator->attempts > ATTEMPTS_MAX)
            return -errno;
        generator->totals.retried++;
        if (errno != ECONNREFUSED)
            clock_nanosleep(CLOCK_MONOTONIC, 0, &(struct timespec){.tv_nsec = QUEUE_FULL_SLEEP_NS}, NULL);
        return 0;
    default:
        return -errno;
    }
}

/* Datagrams due after `elapsed_ns`, of which none is ahead of its time. */
static uint64_t due_after(struct generator *generator, uint64_t elapsed_ns)
{
    struct generator_totals *totals = &generator->totals;
    double late_ns, most_ns = CATCH_UP_NS > generator->interval_ns ? CATCH_UP_NS : generator->interval_ns;

    if (!generator->interval_ns)
        return CALL_DATAGRAMS_MAX;
    late_ns = (double)(elapsed_ns - totals->postponed_ns) - (double)totals->sent * generator->interval_ns;
    if (late_ns < 0)
        return 0;
    if (late_ns > most_ns) {
        totals->postponed_ns += (uint64_t)(late_ns - most_ns);
        late_ns = most_ns;
    }
    return (uint64_t)(late_ns / generator->interval_ns) + 1;
}

static void sleep_until(uint64_t at_ns)
{
    struct timespec at = {.tv_sec = (time_t)(at_ns / second_ns), .tv_nsec = (long)(at_ns % second_ns)};

    clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &at, NULL);
}

int generator_run(struct generator *generator, uint64_t slice_ns)
{
    const struct generator_plan *plan = &generator->plan;
    struct generator_totals *totals = &generator->totals;
    uint64_t now = clock_ns(CLOCK_MONOTONIC), until = now + slice_ns, end, wake, due;
    int result;

    if (!generator->start_ns) {
        generator->start_ns = generator->woke_ns = now;
        prctl(PR_SET_TIMERSLACK, 1UL, 0UL, 0UL, 0UL); /* 50 us by default: as much as a wake-up interval */
    }
    end = plan->duration_ns ? generator->start_ns + plan->duration_ns : UINT64_MAX;
    for (;; now = clock_ns(CLOCK_MONOTONIC)) {
        totals->elapsed_ns = now - generator->start_ns;
        if ((plan->count && totals->sent >= plan->count) || now >= end)
            return 1;
        if (now >= until)
            return 0;
        due = due_after(generator, totals->elapsed_ns);
        if (plan->count && due > plan->count - totals->sent)
            due = plan->count - totals->sent;
        if (due) {
            result = send_due(generator, plan->rate > 0 && plan->rate <= ALONE_RATE ? 1 : due);
            if (result == -EINTR)
                return 0;
            if (result < 0)
                return result;
            continue;
        }
        wake = generator->start_ns + totals->postponed_ns + (uint64_t)((double)totals->sent * generator->interval_ns) + 1;
        if (wake < generator->woke_ns + WAKE_INTERVAL_NS)
            wake = generator->woke_ns + WAKE_INTERVAL_NS;
        if (wake > until)
            wake = until;
        if (wake > end)
            wake = end;
        sleep_until(wake);
        generator->woke_ns = clock_ns(CLOCK_MONOTONIC);
        if (generator->woke_ns < wake)
            return 0; /* a signal */
    }
}

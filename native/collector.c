/* SPDX-License-Identifier: Apache-2.0 */
#include "collector.h"

#include <errno.h>
#include <netinet/in.h>
#include <netinet/udp.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <unistd.h>

#ifndef UDP_GRO
#define UDP_GRO 104 /* linux/udp.h */
#endif

static uint64_t to_ns(const struct timespec *time)
{
    return (uint64_t)time->tv_sec * 1000000000 + (uint64_t)time->tv_nsec;
}

static uint64_t clock_ns(clockid_t clock)
{
    struct timespec now;

    clock_gettime(clock, &now);
    return to_ns(&now);
}

int collector_open(struct collector **out, struct analyser *analyser, const int *fds, uint32_t count)
{
    struct collector *collector = calloc(1, sizeof(*collector));
    int error = -ENOMEM;

    if (!collector)
        return -ENOMEM;
    collector->analyser = analyser;
    collector->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (collector->epoll_fd < 0) {
        error = -errno;
        goto failed;
    }
    collector->memory = malloc((size_t)RECEIVES_MAX * BUFFER_STRIDE);
    if (!collector->memory)
        goto failed;
    for (uint32_t i = 0; i < count; i++) {
        struct epoll_event event = {.events = EPOLLIN, .data.fd = fds[i]};

        if (epoll_ctl(collector->epoll_fd, EPOLL_CTL_ADD, fds[i], &event)) {
            error = -errno;
            goto failed;
        }
    }
    for (uint32_t i = 0; i < RECEIVES_MAX; i++) {
        struct msghdr *message = &collector->messages[i].msg_hdr;

        collector->buffers[i].iov_base = collector->memory + (size_t)i * BUFFER_STRIDE;
        collector->buffers[i].iov_len = BUFFER_SIZE;
        message->msg_iov = &collector->buffers[i];
        message->msg_iovlen = 1;
        message->msg_control = collector->controls[i];
    }
    *out = collector;
    return 0;

failed:
    collector_close(collector);
    return error;
}

void collector_close(struct collector *collector)
{
    if (collector->epoll_fd >= 0)
        close(collector->epoll_fd);
    free(collector->memory);
    free(collector);
}

/* What the kernel says beside the bytes. `segment`: length of each datagram of a run, as it was for one. */
static uint64_t read_control(struct msghdr *message, uint32_t *segment)
{
    uint64_t arrived_ns = 0;

    for (struct cmsghdr *control = CMSG_FIRSTHDR(message); control; control = CMSG_NXTHDR(message, control)) {
        if (control->cmsg_level == SOL_SOCKET && control->cmsg_type == SCM_TIMESTAMPNS) {
            struct timespec time;

            memcpy(&time, CMSG_DATA(control), sizeof(time));
            arrived_ns = to_ns(&time);
        } else if (control->cmsg_level == IPPROTO_UDP && control->cmsg_type == UDP_GRO) {
            int size;

            memcpy(&size, CMSG_DATA(control), sizeof(size));
            if (size > 0 && (uint32_t)size < *segment)
                *segment = (uint32_t)size;
        }
    }
    return arrived_ns ? arrived_ns : clock_ns(CLOCK_REALTIME);
}

/* Account for what was received. True if `wanted` is reached; the rest stays in hand. */
static bool account(struct collector *collector, uint64_t wanted)
{
    struct analyser *analyser = collector->analyser;

    while (collector->next < collector->have) {
        struct mmsghdr *message = &collector->messages[collector->next];
        const uint8_t *bytes = collector->buffers[collector->next].iov_base;
        uint32_t length = message->msg_len, segment = length;
        uint64_t arrived_ns = read_control(&message->msg_hdr, &segment);

        do { /* once also for an empty datagram */
            uint32_t left = length - collector->next_offset;
            uint32_t size = left < segment ? left : segment;

            if (wanted && analyser->totals.received >= wanted)
                return true;
            analyser_account(analyser, bytes + collector->next_offset, size, arrived_ns);
            collector->next_offset += size;
        } while (collector->next_offset < length);
        collector->next_offset = 0;
        collector->next++;
    }
    return wanted && analyser->totals.received >= wanted;
}

/* How many messages were received, 0 if there were none, or negative errno. */
static int receive(struct collector *collector, int fd)
{
    int received;

    for (uint32_t i = 0; i < RECEIVES_MAX; i++)
        collector->messages[i].msg_hdr.msg_controllen = sizeof(collector->controls[i]);
    received = recvmmsg(fd, collector->messages, RECEIVES_MAX, MSG_DONTWAIT, NULL);
    /* ECONNREFUSED and the like are news of what this host sent from the same port, not of what it receives. */
    if (received < 0)
        return errno == EAGAIN || errno == EINTR || errno == ECONNREFUSED ? 0 : -errno;
    collector->next = collector->next_offset = 0;
    collector->have = (uint32_t)received;
    return received;
}

/* Which sockets have something to read. 0 or negative errno. */
static int look(struct collector *collector, uint64_t wait_ns)
{
    struct epoll_event events[READY_MAX];
    int found = epoll_wait(collector->epoll_fd, events, READY_MAX, (int)((wait_ns + 999999) / 1000000));

    collector->ready_next = collector->ready_have = 0;
    if (found < 0)
        return -errno;
    for (int i = 0; i < found; i++)
        collector->ready[collector->ready_have++] = events[i].data.fd;
    return 0;
}

int collector_run(struct collector *collector, uint64_t slice_ns, uint64_t wanted, bool drain)
{
    uint64_t until = clock_ns(CLOCK_MONOTONIC) + slice_ns, now;
    bool rested = true;
    int result;

    for (;;) {
        if (account(collector, wanted))
            return 1;
        now = clock_ns(CLOCK_MONOTONIC);
        if (now >= until)
            return 0;
        if (collector->ready_next < collector->ready_have) {
            result = receive(collector, collector->ready[collector->ready_next]);
            if (result < 0)
                return result;
            /* A socket that filled all buffers has more; where there are others, they get their turn first. */
            if (result < RECEIVES_MAX || collector->ready_have > 1)
                collector->ready_next++;
            rested = false;
            continue;
        }
        result = look(collector, rested && !drain ? until - now : 0);
        if (result == -EINTR)
            return 0;
        if (result < 0)
            return result;
        if (collector->ready_have)
            continue;
        if (drain)
            return 1;
        if (!rested && clock_nanosleep(CLOCK_MONOTONIC, 0, &(struct timespec){.tv_nsec = REST_NS}, NULL) == EINTR)
            return 0;
        rested = true;
    }
}

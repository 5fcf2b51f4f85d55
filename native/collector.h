/* SPDX-License-Identifier: Apache-2.0 */
/*
 * collector.h: takes datagrams from sockets that somebody else opened, and hands them to the analyser.
 *
 * The time of arrival is the kernel's (SO_TIMESTAMPNS, which the opener sets; CLOCK_REALTIME), so that it does not
 * matter when this loop gets round to it: it rests for REST_NS when all is read, and so reads many at once. Runs that
 * the kernel hands over whole (UDP_GRO, which the opener sets) are taken apart here; all of a run have one time.
 *
 * Memory: RECEIVES_MAX buffers, allocated when opened. Errors are negative errno. Times are nanoseconds.
 */
#ifndef MCRELAY_COLLECTOR_H
#define MCRELAY_COLLECTOR_H

#include "analyser.h"

#include <sys/socket.h>
#include <time.h>

enum {
    RECEIVES_MAX = 32,          /* in one system call */
    BUFFER_SIZE = 65536,        /* the longest run that the kernel hands over, and more than any datagram */
    BUFFER_STRIDE = BUFFER_SIZE + 17 * 64, /* so that the buffers' beginnings do not share cache sets */
    REST_NS = 100000,           /* 100 datagrams at 1,000,000/s; the receive buffer holds hundreds of times as many */
    READY_MAX = 64,             /* sockets looked at before the clock is */
};

struct collector {
    struct analyser *analyser;
    int epoll_fd;
    uint32_t next, have;    /* received messages: the one in hand, and how many */
    uint32_t next_offset;   /* in the one in hand: bytes accounted for */
    int ready[READY_MAX]; /* sockets that had something to read */
    uint32_t ready_next, ready_have;
    struct mmsghdr messages[RECEIVES_MAX];
    struct iovec buffers[RECEIVES_MAX];
    _Alignas(struct cmsghdr) uint8_t controls[RECEIVES_MAX][CMSG_SPACE(sizeof(struct timespec)) +
                                                            CMSG_SPACE(sizeof(int))];
    uint8_t *memory;
};

/* The descriptors and the analyser stay the caller's, and live as long as the collector. 0 or negative errno. */
int collector_open(struct collector **out, struct analyser *analyser, const int *fds, uint32_t count);
void collector_close(struct collector *collector);

/* Account for what arrives within about `slice_ns`. 1: as many distinct datagrams as `wanted` (0: no such end) have been
 * received since the analyser was opened, and what came after the last of them is still there for the next call;
 * 0: call again, also after a signal. With `drain`, return 1 as soon as nothing is left to read. */
int collector_run(struct collector *collector, uint64_t slice_ns, uint64_t wanted, bool drain);

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * egress.h: datagrams on their way out, gathered into runs.
 *
 * The cost of sending is the way through the kernel's stack, some microseconds a call, whatever the size. So datagrams
 * of one output that come in one batch leave as one send where that can be: equal lengths (the last may be shorter),
 * equal TTL, cut apart again by the kernel or the device (UDP_SEGMENT, udp(7)). Nothing waits for company here: a batch
 * is what was there; pace.h has how long the engine lets one gather.
 *
 * A run owns its message header, addresses and control data from its opening to its completion, so that the rule it came
 * from may be replaced meanwhile; the payloads stay in the ingress's slots, of each of which the run is a holder. Sends
 * never wait for room (MSG_DONTWAIT): a full egress is a drop of that output and delays no other. It also means that a
 * send completes while it is submitted, so datagrams of one flow leave in the order in which they came.
 *
 * A device or a path that refuses segments is known by the error of a run of several; that run, and all later ones of
 * the interface, leave as plain sends. A single datagram of the same batch may have left before that first run. A packet that holds several datagrams already, because a device merged them, is a
 * run of its own.
 */
#ifndef MCRELAY_EGRESS_H
#define MCRELAY_EGRESS_H

#include "ingress.h"
#include "table.h"

#include <netinet/in.h>

enum {
    SEGMENTS_MAX = 64,       /* UDP_MAX_SEGMENTS of kernels before 6.9 */
    RUN_BYTES_MAX = 65507,   /* payload of the largest IPv4 datagram */
    RUNS_MAX = 512,          /* in flight or open; 1.6 KiB each */
    HEADERS = 20 + 8,        /* IPv4 and UDP, that a segment needs below the MTU */
};

struct egress {
    int fd;            /* -1: not attached */
    uint32_t mtu;
    uint8_t interface; /* slot number */
    bool segmentation; /* not refused so far */
};

struct run {
    struct msghdr message;
    struct sockaddr_in address;
    _Alignas(struct cmsghdr) uint8_t control[CMSG_SPACE(sizeof(int)) + CMSG_SPACE(sizeof(uint16_t))];
    struct ingress *ingress; /* whose slots the payloads lie in */
    struct egress *egress;
    uint32_t output;    /* counter index */
    uint32_t bytes;     /* of all payloads */
    uint32_t datagrams; /* as many as payloads; of a merged packet more */
    uint32_t again;     /* of a refused run: datagrams that were prepared a second time */
    uint16_t count;     /* of payloads */
    uint16_t segment;   /* length of each datagram but the last, which may be shorter; with datagrams > 1 */
    uint16_t next_free;
    uint16_t open_place; /* in runs.open */
    uint8_t ttl;
    struct iovec payloads[SEGMENTS_MAX];
    uint32_t slots[SEGMENTS_MAX];
};

struct runs {
    struct run all[RUNS_MAX];
    uint16_t first_free;
    uint16_t in_use;
    uint16_t in_flight;
    uint16_t open[RUNS_MAX]; /* indices of runs that may grow */
    uint16_t open_count;
    uint16_t refused[RUNS_MAX]; /* ring of runs to be sent again, plainly */
    uint16_t refused_head;
    uint16_t refused_count;
    uint16_t of_output[COUNTERS_OUTPUTS_MAX]; /* index + 1 of the output's open run */
};

void runs_init(struct runs *runs);

/* What a caller must do next. */
enum appended {
    APPENDED,      /* the datagram belongs to a run; the caller holds the slot for it */
    NO_RUN_FREE,   /* nothing has changed: submit, and try again after a completion */
};

/* Called with a run that is complete: submit it, then runs_finish(index) when it has completed. */
typedef void runs_submit(void *context, struct run *run, uint16_t index);

/* Add a datagram to the open run of an output, or open one; runs that cannot grow any more are passed to `submit`. A
 * merged packet that cannot leave as segments is queued to be sent by runs_send_again. */
enum appended runs_append(struct runs *runs, struct egress *egress, const struct table_output *output,
                          const struct packet *packet, struct ingress *ingress, uint32_t slot, runs_submit *submit,
                          void *context);

/* Submit every open run. */
void runs_flush(struct runs *runs, runs_submit *submit, void *context);

/* Take the run out of flight. The pointer is good until runs_release. */
struct run *runs_finish(struct runs *runs, uint16_t index);
void runs_release(struct runs *runs, uint16_t index);

/* The run, finished with `result`, was refused because it has segments: queue it to be sent again, plainly, and use no
 * segments on its interface any more. False if that is not why, and the result stands. */
bool runs_refuse_segments(struct runs *runs, uint16_t index, int result);

/* Prepare the datagrams of refused runs one by one; false if there was no free run for all. The refused run's slots pass
 * to the new ones. */
bool runs_send_again(struct runs *runs, runs_submit *submit, void *context);

/* Why a send with this result (negative errno) did not leave. */
enum drop_reason send_drop_reason(int result);

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * egress.h: datagrams on their way out, gathered into runs.
 *
 * The cost of sending is the way through the kernel's stack, some microseconds a call, whatever the size. So datagrams
 * of one output that come in one batch leave as one send where that can be: equal lengths (the last may be shorter),
 * equal TTL, cut apart again by the kernel or the device (UDP_SEGMENT, udp(7)). Nothing waits for company here: a batch
 * is what was there; pace.h has how long the engine lets one gather.
 *
 * A run owns its message header, addresses, headers and control data from its opening to its completion; the payloads
 * stay in the ingress's slots, of each of which the run is a holder. Sends never wait for room (MSG_DONTWAIT): a full
 * egress is a drop of that output and delays no other. It also means that a send completes while it is submitted, so
 * datagrams of one flow leave in the order in which they came.
 *
 * A device or a path that refuses segments is known by the error of a run of several; that run, and all later ones of
 * the egress, leave as plain sends. A single datagram of the same batch may have left before that first run. A packet
 * that holds several datagrams already, because a device merged them, is a run of its own.
 *
 * By which socket a run leaves, and what is written for it, is its way's (ways.h, headers.h): to UDP sockets we give
 * payloads and say in control messages what the headers are to be; to packet and raw sockets we give the headers, too.
 * What exceeds the MTU the kernel cuts into fragments for UDP sockets; for the others it is done here, one run for each
 * fragment, and the datagram's own run completes with the last of those.
 */
#ifndef MCRELAY_EGRESS_H
#define MCRELAY_EGRESS_H

#include "headers.h"
#include "ingress.h"

#include <netinet/in.h>

enum {
    SEGMENTS_MAX = 64,       /* UDP_MAX_SEGMENTS of kernels before 6.9 */
    RUN_BYTES_MAX = 65507,   /* payload of the largest IPv4 datagram */
    RUNS_MAX = 512,          /* in flight or open; 1.8 KiB each */
    RUNS_RESERVED = 2,       /* for what is sent again, and for its fragments */
    PKTINFO_MAX = 20,        /* sizeof(struct in6_pktinfo) */
    /* TTL, DSCP, source address and segment. */
    CONTROL_MAX = CMSG_SPACE(sizeof(int)) * 2 + CMSG_SPACE(PKTINFO_MAX) + CMSG_SPACE(sizeof(uint16_t)),
};

struct egress {
    int fd; /* -1: not attached */
    uint32_t mtu;
    uint16_t room[2];  /* for the payload of a UDP datagram below the MTU, over IPv4 and IPv6 */
    uint8_t interface; /* slot number */
    uint8_t way;       /* enum way */
    bool segmentation; /* possible, and not refused so far */
    bool virtio;       /* of `frame`: before each frame stands a struct virtio_net_hdr */
    struct egress_link link;
};

struct run {
    /* What is looked at for each datagram: one cache line. */
    _Alignas(64) const struct table_output *of; /* of the table, which is not replaced while there are runs */
    struct egress *egress;
    struct ingress *ingress; /* whose slots the payloads lie in */
    uint32_t output;         /* counter index */
    uint32_t bytes;          /* of all payloads */
    uint32_t datagrams;      /* as many as payloads; of a merged packet more; of a fragment none */
    uint16_t count;          /* of payloads */
    uint16_t segment; /* length of each datagram but the last, which may be shorter; with datagrams > 1 */
    uint16_t room;    /* for the payload of a datagram, below the MTU */
    uint8_t ttl, tos; /* the heading's */
    uint16_t open_place; /* in runs.open */
    uint16_t next_free;
    uint16_t pending; /* its fragments in flight */
    uint16_t whole;   /* of a fragment: index + 1 of the run it is of */
    int error;        /* of its fragments, the first one */

    struct msghdr message;
    struct heading heading;
    uint32_t again; /* of a refused run: datagrams that were prepared a second time */
    uint32_t cut;   /* of a run in fragments: bytes behind the IP header that have been prepared */
    uint32_t identification;
    union {
        struct sockaddr_in ipv4;
        struct sockaddr_in6 ipv6;
    } address;
    union { /* UDP sockets have the first, the others the second */
        _Alignas(struct cmsghdr) uint8_t control[CONTROL_MAX];
        uint8_t headers[HEADERS_MAX];
    };
    struct iovec head; /* our headers; behind it, as the kernel reads them, the payloads */
    struct iovec payloads[SEGMENTS_MAX];
    uint32_t slots[SEGMENTS_MAX];
};

static_assert(offsetof(struct run, message) <= 64, "one cache line");
static_assert(offsetof(struct run, payloads) == offsetof(struct run, head) + sizeof(struct iovec), "one array");

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
    uint16_t cutting; /* index + 1 of the run of which fragments are still to be prepared; 0: none */
    uint32_t identification; /* of the next IP packet that we write the header of; its lower half is never 0 */
    uint16_t of_output[COUNTERS_OUTPUTS_MAX]; /* index + 1 of the output's open run */
};

/* An egress whose socket is `fd`, which tells what it can do. */
struct egress egress_of(unsigned interface, enum way way, int fd, uint32_t mtu, const struct egress_link *link);

void runs_init(struct runs *runs);

/* What a caller must do next. */
enum appended {
    APPENDED,      /* the datagram belongs to a run; the caller holds the slot for it */
    NO_RUN_FREE,   /* nothing has changed: submit, and try again after a completion */
};

/* Called with a run that is complete: submit it, then runs_finish(index) when it has completed. */
typedef void runs_submit(void *context, struct run *run, uint16_t index);

/* Add a datagram to the open run of an output, or open one; runs that cannot grow any more are passed to `submit`. A
 * merged packet that cannot leave as segments is queued to be sent by runs_send_again. `heading`: heading_make's; NULL
 * of a plain output. */
enum appended runs_append(struct runs *runs, struct egress *egress, const struct table_output *output,
                          const struct heading *heading, const struct packet *packet, struct ingress *ingress,
                          uint32_t slot, runs_submit *submit, void *context);

/* Submit every open run. */
void runs_flush(struct runs *runs, runs_submit *submit, void *context);

/* Take the run out of flight, which has completed with *result. Returns the run that is through with that, good until
 * runs_release; for a fragment the one that it is of, with its result, if it was the last, else NULL. */
struct run *runs_finish(struct runs *runs, uint16_t index, int *result);
void runs_release(struct runs *runs, struct run *run);

/* The run, finished with `result`, was refused because it has segments: queue it to be sent again, plainly, and use no
 * segments on its egress any more. False if that is not why, and the result stands. */
bool runs_refuse_segments(struct runs *runs, struct run *run, int result);

/* Something has to be sent before what comes later: by runs_send_again. */
static inline bool runs_are_behind(const struct runs *runs)
{
    return runs->refused_count || runs->cutting;
}

/* Prepare the datagrams of refused runs one by one, and fragments; false if there was no free run for all. The refused
 * run's slots pass to the new ones. */
bool runs_send_again(struct runs *runs, runs_submit *submit, void *context);

/* Why a send with this result (negative errno) did not leave. */
enum drop_reason send_drop_reason(int result);

#endif

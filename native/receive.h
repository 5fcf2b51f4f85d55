/* SPDX-License-Identifier: Apache-2.0 */
/*
 * receive.h: ingress `recv`: one multishot io_uring receive per packet socket, into slots of a provided-buffer ring.
 *
 * An ingress owns its slots' memory, their accounting and the queue of filled ones. It borrows the socket: the
 * supervisor opened it and keeps it, so packets that arrive while no worker runs wait there for the next one. It knows
 * nothing of rules.
 *
 * Kernel facts: one armed receive fills as many slots as packets arrive and posts a completion for each, naming the slot
 * in the completion's flags; it ends with ENOBUFS when the buffer ring is empty (the packets stay in the socket's
 * queue), and then has to be armed again. A filled slot starts with struct io_uring_recvmsg_out, the link-layer address
 * and the control messages (io_uring_prep_recvmsg_multishot(3)).
 */
#ifndef MCRELAY_RECEIVE_H
#define MCRELAY_RECEIVE_H

#include "pool.h"

#include <liburing.h>
#include <stddef.h>

/* One frame as it lies in a slot, from the network header on. */
struct frame {
    const uint8_t *data;
    size_t length;
    enum drop_reason reason; /* what the metadata alone already says, or DROP_NONE */
    bool checksum_vouched;
};

struct filled {
    uint32_t slot;
    uint32_t length; /* as the completion reported it */
};

struct ingress {
    int fd;
    uint8_t interface; /* slot number, also the buffer group id */
    bool armed;        /* a receive is in flight */
    bool detaching;
    bool failed;       /* the last receive ended with an error: armed again by the timer, not at once */
    bool statistics;   /* the socket can tell how many packets the kernel dropped */
    uint64_t detach_ticket;

    struct pool pool;
    uint8_t *memory;
    size_t memory_size;
    size_t slot_size;
    struct io_uring_buf_ring *buffers;
    size_t buffers_size;
    uint32_t returned; /* slots put into the buffer ring but not yet shown to the kernel */

    struct filled *queue; /* ring of pool.size entries: can never be full, a slot is in it at most once */
    uint32_t queue_head;
    uint32_t queue_count;

    struct msghdr shape; /* room for name and control in each slot */
};

/* Allocate an ingress for packets of up to `mtu` bytes; `slots` 0 chooses. The file descriptor stays the caller's.
 * 0, -EINVAL or -ENOMEM. Called on the command side. */
int ingress_new(struct ingress **out, uint8_t interface, int fd, uint32_t mtu, uint32_t slots);
void ingress_free(struct ingress *ingress);

/* The rest runs on the engine's thread. */

int ingress_register(struct ingress *ingress, struct io_uring *ring);
void ingress_unregister(struct ingress *ingress, struct io_uring *ring);

/* Take note of one completion of the receive: queue the slot that it filled, or remember that the receive ended. */
void ingress_complete(struct ingress *ingress, const struct io_uring_cqe *cqe, struct counters_page *counters);

/* Take the oldest filled slot out of the queue; false if there is none. */
bool ingress_next(struct ingress *ingress, uint32_t *slot, struct frame *frame);

/* Give a slot back to the kernel. Seen by it after the next ingress_publish. */
void ingress_return(struct ingress *ingress, uint32_t slot);
void ingress_publish(struct ingress *ingress);

/* Packets that the kernel dropped on this socket since the last call (PACKET_STATISTICS, packet(7)). */
uint32_t ingress_overruns(struct ingress *ingress);

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * buffers.h: what the ingresses have in common that io_uring fills: slots of one size in memory of our own, handed to
 * the kernel by a ring of provided buffers, and the filled ones in the order in which the kernel told of them.
 *
 * It is the first part of such an ingress, which adds what it waits at (receive.c one packet socket, datagrams.c several
 * UDP sockets) and how a slot is read. The functions that take a struct ingress are that kind's own, as they are.
 *
 * Kernel facts: a receive with IOSQE_BUFFER_SELECT takes the next buffer of its group and names it in its completion's
 * flags. What is put into the ring counts when its tail is moved on. A filled slot starts with struct
 * io_uring_recvmsg_out and the room for name and control messages that `shape` says, and then comes what was received
 * (io_uring_prep_recvmsg_multishot(3)).
 */
#ifndef MCRELAY_BUFFERS_H
#define MCRELAY_BUFFERS_H

#include "ingress.h"

#include <sys/socket.h>

enum { BUFFERS_SLOTS_MAX = 2048 };

static_assert(BUFFERS_SLOTS_MAX <= UINT16_MAX, "a buffer id is 16 bits");

struct filled {
    uint32_t slot;
    uint32_t length; /* as the completion reported it */
    uint16_t port;   /* whatever the ingress noted: its socket may be gone by the time that this is looked at */
};

struct buffers {
    struct ingress base; /* the interface's slot number is also the buffer group's id */
    struct msghdr shape; /* room for name and control in each slot */
    uint8_t *memory;
    size_t memory_size;
    size_t slot_size;
    struct io_uring_buf_ring *ring;
    size_t ring_size;
    uint32_t returned;    /* slots put into the ring but not yet shown to the kernel */
    struct filled *queue; /* ring of pool.size entries: can never be full, a slot is in it at most once */
    uint32_t queue_head;
    uint32_t queue_count;
};

/* Make `slots` slots (a power of two) of `slot_size` bytes, for an ingress whose base is set. 0 or -ENOMEM; to be freed
 * in both cases. Called on the command side, as is buffers_free, which frees the ingress that this is the first part
 * of. */
int buffers_open(struct buffers *buffers, uint32_t slots, size_t slot_size);
void buffers_free(struct ingress *ingress);

int buffers_enter(struct ingress *ingress, struct io_uring *ring);
void buffers_leave(struct ingress *ingress, struct io_uring *ring);
void buffers_give_back(struct ingress *ingress, uint32_t slot);
void buffers_publish(struct ingress *ingress);
bool buffers_is_drained(const struct ingress *ingress);

/* Enough of them are with the kernel for another receive: after an exhausted pool a quarter, not one receive per slot. */
bool buffers_suffice(const struct ingress *ingress);

/* Prepare a receive from `fd`. */
void buffers_arm(struct buffers *buffers, struct io_uring_sqe *sqe, int fd);

/* Note the slot that a completion names, and the pool's exhaustion. True if it names one. */
bool buffers_complete(struct buffers *buffers, const struct io_uring_cqe *cqe, uint16_t port,
                      struct counters_page *counters);

/* Take the oldest filled slot; false if there is none. `frame` has what was received, and `out` its description and
 * `port` what was noted; or it has DROP_TRUNCATED as its reason, and nothing else is set. */
bool buffers_next(struct buffers *buffers, uint32_t *slot, struct frame *frame, struct io_uring_recvmsg_out **out,
                  uint16_t *port);

#endif

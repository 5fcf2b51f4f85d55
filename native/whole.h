/* SPDX-License-Identifier: Apache-2.0 */
/*
 * whole.h: frames that are longer than a slot of their ring, read whole from the socket's queue.
 *
 * Slots are sized by the interface's MTU. What exceeds it, a datagram that the kernel reassembled from fragments or
 * several that a device merged, the kernel cuts off in its slot, and queues a copy of all of it on the socket
 * (PACKET_COPY_THRESH of packet(7); the slot's status has TP_STATUS_COPY). Slots and copies come in the same order, so
 * the next copy belongs to the next such slot.
 *
 * They part ways where a worker took a copy and died before it gave the slot back, and where a copy could not be read
 * when its slot's turn came (an interface that went down leaves an error on the socket). So a copy is compared with what
 * its slot has. One that is not the slot's is kept for a later slot, and the one behind it is looked at as well: if that
 * is the slot's, the first has no slot any more. The copy of a slot that neither belongs to is lost.
 */
#ifndef MCRELAY_WHOLE_H
#define MCRELAY_WHOLE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    WHOLES_MAX = 32,         /* held at once; sends complete while they are submitted, so few are */
    WHOLE_BYTES = 66 * 1024, /* virtio header, link-layer header, and the longest IP packet: 65535 bytes */
};

struct wholes {
    uint8_t *memory;            /* WHOLES_MAX buffers, backed by pages as they are used */
    uint32_t holder[WHOLES_MAX]; /* slot + 1; 0: free */
    struct {
        uint32_t buffer;
        size_t length;
    } waiting[2]; /* copies that were read, oldest first, and whose slot has not come yet */
    uint32_t waiting_count;
    uint32_t misses; /* slots in a row that none of those belongs to */
};

/* 0 or -ENOMEM. */
int wholes_open(struct wholes *wholes);
void wholes_close(struct wholes *wholes);

/* A buffer is free. */
bool wholes_has_room(const struct wholes *wholes);

/* Take the copy that belongs to `slot`, which begins with these bytes (behind the virtio header, if there is one, of
 * `skip` bytes) and has `length` of them in all. Returns where it lies, until wholes_release, or NULL if it is lost. */
const uint8_t *wholes_take(struct wholes *wholes, int fd, uint32_t slot, size_t skip, const uint8_t *beginning,
                           size_t beginning_length, size_t length);

/* The slot is given back; it need not hold one. */
void wholes_release(struct wholes *wholes, uint32_t slot);

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * ingress.h: what the engine needs of a way in: frames out of it, slots back into it.
 *
 * Three kinds stand behind it: ring.c (frames in a ring that is mapped from the packet socket), receive.c (io_uring
 * receives into buffers of our own, buffers.h) and datagrams.c (the same from ordinary UDP sockets). An ingress owns its
 * slots and their accounting. It borrows the socket: the supervisor opened it and keeps it, so packets that arrive while
 * no worker runs wait there for the next one. It knows nothing of rules.
 */
#ifndef MCRELAY_INGRESS_H
#define MCRELAY_INGRESS_H

#include "packet.h"
#include "pool.h"

#include <liburing.h>
#include <stddef.h>

enum { VIRTIO_HEADER = 10 }; /* sizeof(struct virtio_net_hdr) */

/* One frame as it lies in a slot, from the network header on. */
struct frame {
    const uint8_t *data;
    size_t length;
    uint16_t segment; /* see struct packet: a frame that a device merged from several, or left to be cut into several */
    uint16_t vlan;    /* id of its tag; 0: it has none */
    enum drop_reason reason; /* what the metadata alone already says, or DROP_NONE */
    bool checksum_vouched;
    uint64_t arrived_ns; /* since the epoch; 0: the kernel has not said */
    const struct packet *packet; /* NULL, or what is in it, which the kernel has taken apart. Until the next frame */
};

/* A completion's index has the interface's slot in its lower bits, and above it which of an ingress's sockets it is of. */
enum { INGRESS_PART_SHIFT = 8, INGRESS_PARTS_MAX = 1 << 16 };

struct ingress;

/* Of a kind that receives from several sockets, which come and go. `wants_arming` and `arm` are then about the next one of
 * them that nothing waits for, and `arm` adds which it is to user_data. */
struct ingress_sockets {
    /* 0, -EINVAL for a socket of another sort, -EEXIST for a number in use, -ENFILE if there are too many. */
    int (*add)(struct ingress *ingress, int fd, uint32_t number);
    /* 0, and ended() tells when, or -ENOENT. */
    int (*remove)(struct ingress *ingress, uint32_t number, uint64_t ticket);
    /* The ticket of a socket that was removed, and of which nothing is in flight any more; 0 if there is none. */
    uint64_t (*ended)(struct ingress *ingress);
    /* The next socket whose waiting has to be cancelled; false if there is none. */
    bool (*cancel)(struct ingress *ingress, uint32_t *part);
    /* Datagrams that they have dropped since the last call. */
    uint32_t (*overruns)(struct ingress *ingress);
};

/* All on the engine's thread but free. */
struct ingress_kind {
    /* Begin and end to work on this io_uring. */
    int (*enter)(struct ingress *ingress, struct io_uring *ring);
    void (*leave)(struct ingress *ingress, struct io_uring *ring);
    /* Prepare what waits for frames; only if it does not wait already and there is reason to. `looked_at`: the engine
     * will look for frames soon, whether or not it is woken. */
    bool (*wants_arming)(const struct ingress *ingress, bool looked_at);
    void (*arm)(struct ingress *ingress, struct io_uring_sqe *sqe);
    /* Take note of a completion of that. */
    void (*complete)(struct ingress *ingress, const struct io_uring_cqe *cqe, struct counters_page *counters);
    /* Take the oldest frame; false if there is none. The engine becomes its slot's one holder. */
    bool (*next)(struct ingress *ingress, uint32_t *slot, struct frame *frame);
    /* Give a slot back to the kernel. Seen by it after publish at the latest. */
    void (*give_back)(struct ingress *ingress, uint32_t slot);
    void (*publish)(struct ingress *ingress);
    /* Nothing is left that was taken from the kernel and not given to the engine. */
    bool (*is_drained)(const struct ingress *ingress);
    void (*free)(struct ingress *ingress);
    const struct ingress_sockets *sockets; /* NULL: it has one, from beginning to end */
};

struct ingress {
    const struct ingress_kind *kind;
    int fd;
    uint8_t interface; /* slot number */
    bool armed;        /* something is in flight that waits for frames */
    bool detaching;
    bool failed;     /* waiting ended with an error: armed again by the timer, not at once */
    bool statistics; /* the socket can tell how many packets the kernel dropped */
    bool needs_room; /* the next frame waits for sends to complete */
    bool virtio;     /* before the link-layer header stands a struct virtio_net_hdr (PACKET_VNET_HDR) */
    bool loopback;   /* of a loopback device: local programs send on it from addresses of this host */
    uint64_t detach_ticket;
    struct pool pool;
};

/* Packets that the kernel dropped on this socket since the last call (PACKET_STATISTICS, packet(7)). */
uint32_t ingress_overruns(struct ingress *ingress);

/* Whether packets of this socket come with a struct virtio_net_hdr. */
bool ingress_has_virtio(int fd);

/* What the link layer says about a frame, whichever way it is told: tp_status bits, tp_vlan_tci and sll_pkttype of
 * packet(7), whether the slot has all of it, and its virtio header (linux/virtio_net.h; NULL if it has none). */
void ingress_judge(struct frame *frame, uint32_t status, uint16_t vlan_tci, uint8_t packet_type, bool whole,
                   const uint8_t *virtio);

static inline void ingress_free(struct ingress *ingress)
{
    if (ingress)
        ingress->kind->free(ingress);
}

#endif

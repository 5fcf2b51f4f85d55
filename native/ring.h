/* SPDX-License-Identifier: Apache-2.0 */
/*
 * ring.h: ingress `ring`: frames in a ring that kernel and worker share (PACKET_RX_RING with TPACKET_V2, packet(7)).
 *
 * The ring belongs to the socket, not to the process: the supervisor sets it up and keeps the socket, a worker maps it.
 * A worker that takes over goes on at the oldest frame that is not given back, which are those that its predecessor had
 * not read and those whose sends it had not seen completed.
 *
 * Kernel facts: a frame's slot belongs to whom its tp_status says (TP_STATUS_USER: to us). The kernel fills slots in
 * order and stops at one that is not its own, counting a drop. tp_status is written last by the kernel and must be
 * written last by us, hence acquire and release. poll(2) reports POLLIN while the slot before the kernel's next is ours.
 * A frame is larger than its slot where tp_snaplen < tp_len; whole.h says how it is had all the same. With
 * PACKET_VNET_HDR, a struct virtio_net_hdr ends where the link-layer header begins, at tp_mac.
 */
#ifndef MCRELAY_RING_H
#define MCRELAY_RING_H

#include "ingress.h"

/* As in struct tpacket_req: the socket's ring was set up with these. */
struct ring_geometry {
    uint32_t block_size;
    uint32_t blocks;
    uint32_t frame_size;
};

/* Map the ring of packet socket `fd`. 0, -EINVAL if the geometry cannot be, -ENOMEM, or the error of mmap(2). The file
 * descriptor stays the caller's. Called on the command side. */
int ring_new(struct ingress **out, uint8_t interface, int fd, const struct ring_geometry *geometry);

/* For tests and fuzzing: the same over any memory of blocks * block_size bytes, which stays the caller's. */
int ring_new_over(struct ingress **out, uint8_t interface, int fd, const struct ring_geometry *geometry, void *memory);

#endif

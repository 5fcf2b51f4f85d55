/* SPDX-License-Identifier: Apache-2.0 */
/*
 * receive.h: ingress `recv`: one multishot io_uring receive per packet socket, into slots of a provided-buffer ring.
 *
 * Kernel facts: one armed receive fills as many slots as packets arrive and posts a completion for each, naming the slot
 * in the completion's flags; it ends with ENOBUFS when the buffer ring is empty (the packets stay in the socket's
 * queue), and then has to be armed again. A filled slot starts with struct io_uring_recvmsg_out, the link-layer address
 * and the control messages (io_uring_prep_recvmsg_multishot(3)). Where one of those is PACKET_AUXDATA, what follows
 * begins with the virtio header, if the socket has them, and the link-layer header, and its tp_net says how long the
 * latter is; else it begins with the packet.
 */
#ifndef MCRELAY_RECEIVE_H
#define MCRELAY_RECEIVE_H

#include "ingress.h"

/* Allocate an ingress for packets of up to `mtu` bytes; `slots` 0 chooses. The file descriptor stays the caller's.
 * 0, -EINVAL or -ENOMEM. Called on the command side. */
int receive_new(struct ingress **out, uint8_t interface, int fd, uint32_t mtu, uint32_t slots);

#endif

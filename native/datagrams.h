/* SPDX-License-Identifier: Apache-2.0 */
/*
 * datagrams.h: the ingress of rootless mode: ordinary UDP sockets, one multishot io_uring receive for each, all into the
 * slots of one provided-buffer ring.
 *
 * The kernel has taken the packet apart and verified it; what it is told by is the address that it came from and control
 * messages, so a frame of this ingress is a packet already. The sockets come and go one by one, as rules' ports do: the
 * ingress is made without any. Each is known by a number of the caller's.
 *
 * Kernel facts: IP_PKTINFO and IPV6_RECVPKTINFO tell the destination, IP_RECVTTL and IPV6_RECVHOPLIMIT the TTL,
 * IP_RECVTOS and IPV6_RECVTCLASS the TOS byte (ip(7), ipv6(7)); the destination's port is the one that the socket is bound
 * to. With UDP_GRO datagrams that a device merged come as one, with the length of each (udp(7)). A slot has room for the
 * longest datagram that there is; what is not written of it takes no memory. SO_MEMINFO tells how many datagrams a socket
 * has dropped, because its queue was full or, which is rare, because their checksum was wrong.
 */
#ifndef MCRELAY_DATAGRAMS_H
#define MCRELAY_DATAGRAMS_H

#include "ingress.h"

enum { DATAGRAM_SOCKETS_MAX = 1024 }; /* of an interface: as many ports, each of either address family */

/* Allocate an ingress without sockets; `slots` (a power of two) 0 chooses. 0, -EINVAL or -ENOMEM. Called on the command
 * side. */
int datagrams_new(struct ingress **out, uint8_t interface, uint32_t slots);

#endif

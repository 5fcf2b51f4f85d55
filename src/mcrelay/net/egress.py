"""The sockets by which copies leave an interface, one kind for each way out (ways.py).

Functions open and return sockets; the supervisor keeps them, and workers without any privilege only send through them.
So everything that takes privilege is said to a socket once, before it is handed out. Knows nothing of rules, nor of
workers beyond a number of them.

Kernel facts:
- SO_BINDTODEVICE makes a socket's packets leave by the interface whatever the routes of others say, and gives
  destinations of link-local scope the scope they need. It overrides a policy that would choose another interface.
- Whether copies of a multicast packet come back to receivers on this host is the sending socket's matter
  (IP_MULTICAST_LOOP, IPV6_MULTICAST_LOOP), hence the ways loop4 and loop6.
- Path MTU discovery is off: a relay must not turn a smaller MTU further down the path into silence, so routers may
  fragment IPv4, and packets of our own host are fragmented by the kernel to the interface's MTU. A device whose MTU is
  below 1280 does not speak IPv6 at all.
- A source address that is no local one takes a transparent socket (IP_TRANSPARENT, IPV6_TRANSPARENT), which says to
  routing and to the control messages of ip(7) and RFC 3542 that it may be anyone's.
- A UDP socket for IPv6 also sends to mapped IPv4 addresses, unless it is IPV6_V6ONLY. A raw one never does.
- A packet socket of protocol 0 receives nothing. What is sent through it passes the interface's queue, where frames of
  several datagrams are cut apart (PACKET_VNET_HDR, since Linux 6.2 for UDP). PACKET_QDISC_BYPASS would bypass both the
  queue and that.
- A raw socket of IPPROTO_RAW writes its own headers and receives nothing but packets of protocol 255. Connection
  tracking, where it is on, would put its fragments together again (IP_NODEFRAG).
"""

from __future__ import annotations

import socket
import struct
from contextlib import ExitStack, suppress
from typing import Final

from mcrelay.errors import SystemRefusal
from mcrelay.net.filters import receive_nothing, remedy
from mcrelay.net.interfaces import Interface
from mcrelay.net.sockets import PACKET_VNET_HDR, SOL_PACKET, tells_merged_datagrams
from mcrelay.ways import Way

# Constants that the socket module lacks (asm-generic/socket.h, linux/in.h, linux/in6.h).
SO_SNDBUFFORCE: Final = 32
IP_MTU_DISCOVER: Final = 10
IP_NODEFRAG: Final = 22
IP_PMTUDISC_DONT: Final = 0
IPV6_MTU_DISCOVER: Final = 23
IPV6_PMTUDISC_DONT: Final = 0
IPV6_HDRINCL: Final = 36
IPV6_TRANSPARENT: Final = 75

SEND_BUFFER: Final = 4 * 1024 * 1024  # bytes of kernel memory, which the kernel doubles


def open_egress(interface: Interface, way: Way, workers: int) -> list[socket.socket]:
    """One socket for each worker, whose packets leave by the interface. It never receives anything. SystemRefusal if
    the kernel does not give it."""
    with ExitStack() as stack:
        sockets = []
        try:
            for _ in range(workers):
                sock = stack.enter_context(_socket(way))
                receive_nothing(sock)
                _set_send_buffer(sock)
                if way is Way.FRAME:
                    _prepare_frames(sock, interface)
                else:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.name.encode())
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
                    if sock.family == socket.AF_INET:
                        _prepare_ipv4(sock, way, interface)
                    else:
                        _prepare_ipv6(sock, way, interface)
                sockets.append(sock)
        except OSError as error:
            raise SystemRefusal(
                f"cannot send on {interface.name}: {error.strerror}", remedy(error, interface)
            ) from None
        stack.pop_all()
        return sockets


def _socket(way: Way) -> socket.socket:
    match way:
        case Way.UDP4 | Way.LOOP4:
            return socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        case Way.UDP6 | Way.LOOP6:
            return socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        case Way.FRAME:
            return socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        case Way.RAW4:
            return socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
        case Way.RAW6:
            return socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_RAW)


def _set_send_buffer(sock: socket.socket) -> None:
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, SEND_BUFFER)
    except PermissionError:  # rootless: as much as net.core.wmem_max allows
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)


def _prepare_ipv4(sock: socket.socket, way: Way, interface: Interface) -> None:
    device = struct.pack("=4s4si", b"", b"", interface.index)  # struct ip_mreqn
    sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, device)
    sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, int(way is Way.LOOP4))
    sock.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DONT)
    with suppress(PermissionError):  # rootless: then a source is one of this host's
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_TRANSPARENT, 1)
    if way is Way.RAW4:
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_HDRINCL, 1)
        sock.setsockopt(socket.IPPROTO_IP, IP_NODEFRAG, 1)


def _prepare_ipv6(sock: socket.socket, way: Way, interface: Interface) -> None:
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, interface.index)
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_LOOP, int(way is Way.LOOP6))
    sock.setsockopt(socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER, IPV6_PMTUDISC_DONT)
    with suppress(PermissionError):
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_TRANSPARENT, 1)
    if way is Way.RAW6:
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_HDRINCL, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)


def _prepare_frames(sock: socket.socket, interface: Interface) -> None:
    if tells_merged_datagrams():
        sock.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    sock.bind((interface.name, 0))

"""Packet sockets in their fanout group, through which packets come in.

Functions open and return sockets; the supervisor keeps them. Knows nothing of rules or workers beyond a number of them.

Kernel facts:
- A packet socket sees a packet before the reverse-path check and the firewall; that is what lets mcrelay relay sources
  that the host has no route to (packet(7)).
- A packet socket receives from the moment it is bound, and everything until it has joined its fanout group. So it is
  bound with a filter that drops all, and gets its real filter when the whole group stands.
- The fanout program returns an index into the group's members in the order in which they joined. When the interface
  goes down they all leave, and when it comes up join again in the order in which the sockets were made: so that has to
  be the workers' order, too.
- Bound to ETH_P_ALL it sees every protocol, and before others do: before a VLAN device or a bridge takes the packet,
  and before traffic control and netfilter's ingress hook. A VLAN tag stands beside the packet by then, so the protocol
  is the one behind the tag. What is not IP costs a run of the filter.
- It would also see what this host sends. A fanout group does unless its first member says otherwise
  (PACKET_FANOUT_FLAG_IGNORE_OUTGOING), which older kernels do not know: so the filters look at the packet's type, too.
- PACKET_FANOUT_FLAG_DEFRAG reassembles IPv4 alone, without a look at VLAN tags. Fragments of IPv6 come as they are
  (native/reassembly.c).
- PACKET_VNET_HDR (SOCK_RAW only) tells which frames hold several datagrams that a device merged. Before Linux 6.2 it
  knows no such frames of UDP and has the kernel drop them, uncounted by anyone who could say why.
- PACKET_COPY_THRESH queues a copy of each frame that is longer than its slot in the ring.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from typing import Final

from mcrelay.errors import SystemRefusal
from mcrelay.limits import RING_RESERVE, RingGeometry
from mcrelay.net.admission import Admission
from mcrelay.net.filters import receive_nothing, remedy, set_filter, set_program
from mcrelay.net.interfaces import Interface
from mcrelay.steering import steering_program, udp_filter

# Constants that the socket module lacks (asm-generic/socket.h, linux/if_packet.h, linux/if_ether.h, linux/in.h).
SO_RCVBUFFORCE: Final = 33
PACKET_RX_RING: Final = 5
PACKET_COPY_THRESH: Final = 7
PACKET_AUXDATA: Final = 8
PACKET_VERSION: Final = 10
PACKET_RESERVE: Final = 12
PACKET_VNET_HDR: Final = 15
TPACKET_V2: Final = 1
PACKET_FANOUT: Final = 18
PACKET_FANOUT_DATA: Final = 22
PACKET_IGNORE_OUTGOING: Final = 23
PACKET_FANOUT_CBPF: Final = 6
PACKET_FANOUT_FLAG_UNIQUEID: Final = 0x2000
PACKET_FANOUT_FLAG_IGNORE_OUTGOING: Final = 0x4000
PACKET_FANOUT_FLAG_DEFRAG: Final = 0x8000
SOL_PACKET: Final = 263
ETH_P_ALL: Final = 0x0003

# Bytes of kernel memory per packet socket, which the kernel doubles: about 14,000 packets of 1000 bytes.
RECEIVE_BUFFER: Final = 16 * 1024 * 1024


_libc = ctypes.CDLL(None, use_errno=True)


def open_ingress(
    interface: Interface,
    workers: int,
    ring: RingGeometry | None = None,
    prepared: list[socket.socket] | None = None,
    admission: Admission | None = None,
) -> list[socket.socket]:
    """One packet socket for each worker, together one fanout group over what `admission` admits of the interface's
    incoming packets, or over all of them that a rule could be for; each with a ring of its own, or to be received
    from. `prepared`, if given, are sockets of prepare_ingress for the same ring, and are the caller's no more."""
    with ExitStack() as stack:
        group: int | None = None
        try:
            sockets = prepared if prepared is not None else prepare_ingress(workers, ring)
            for sock in sockets:
                stack.callback(sock.close)
            for sock in sockets:
                sock.bind((interface.name, ETH_P_ALL))
                group = _join_fanout(sock, group)
            set_program(sockets[0], SOL_PACKET, PACKET_FANOUT_DATA, steering_program())
            for sock in sockets:
                if admission:
                    admission.attach(sock)
                else:
                    set_filter(sock, udp_filter(interface.network))
        except OSError as error:
            raise SystemRefusal(
                f"cannot receive on {interface.name}: {error.strerror}", remedy(error, interface)
            ) from None
        stack.pop_all()
        return sockets


def prepare_ingress(workers: int, ring: RingGeometry | None) -> list[socket.socket]:
    """Packet sockets that are bound to nothing yet and take nothing. OSError if they cannot be had.

    To set up a ring takes tens of milliseconds, since the kernel waits for its other cores (synchronize_net); all of
    them at once take as long as one."""
    with ExitStack() as stack, ThreadPoolExecutor(workers) as threads:
        sockets = [stack.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)) for _ in range(workers)]
        preparing = [threads.submit(_prepare_ingress, sock, ring) for sock in sockets]
        wait(preparing)
        for one in preparing:
            one.result()  # raises what went wrong
        stack.pop_all()
        return sockets


def is_bound(sock: socket.socket, interface: Interface) -> bool:
    """Whether the packet socket still is bound to the interface, by whatever name that goes now."""
    try:
        return socket.if_nametoindex(sock.getsockname()[0]) == interface.index
    except OSError:  # it is bound to nothing
        return False


def tells_merged_datagrams() -> bool:
    """Whether this kernel says which frames hold several datagrams (VIRTIO_NET_HDR_GSO_UDP_L4)."""
    major, minor = os.uname().release.split("-")[0].split(".")[:2]
    return (int(major), int(minor)) >= (6, 2)


def _prepare_ingress(sock: socket.socket, ring: RingGeometry | None) -> None:
    """Have a packet socket that is not bound yet take nothing, and as much as will fit when it does."""
    receive_nothing(sock)
    sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER)
    sock.setsockopt(SOL_PACKET, PACKET_AUXDATA, 1)
    sock.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    if tells_merged_datagrams():
        sock.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    if ring is not None:
        _set_up_ring(sock, ring)


def _set_up_ring(sock: socket.socket, ring: RingGeometry) -> None:
    frames = ring.block_size // ring.frame_size * ring.blocks
    sock.setsockopt(SOL_PACKET, PACKET_VERSION, TPACKET_V2)
    sock.setsockopt(SOL_PACKET, PACKET_RESERVE, RING_RESERVE)
    sock.setsockopt(SOL_PACKET, PACKET_COPY_THRESH, 1)
    geometry = struct.pack("=IIII", ring.block_size, ring.blocks, ring.frame_size, frames)
    # Not by the socket's method, which would keep all other threads waiting for as long as the kernel takes.
    if _libc.setsockopt(sock.fileno(), SOL_PACKET, PACKET_RX_RING, geometry, len(geometry)) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def _join_fanout(sock: socket.socket, group: int | None) -> int:
    """Join the group, or found one with an id that nobody uses. Returns its id."""
    kind = PACKET_FANOUT_CBPF | PACKET_FANOUT_FLAG_DEFRAG | PACKET_FANOUT_FLAG_IGNORE_OUTGOING
    if group is None:
        kind |= PACKET_FANOUT_FLAG_UNIQUEID
    sock.setsockopt(SOL_PACKET, PACKET_FANOUT, (kind << 16 | (group or 0)) - (1 << 32 if kind & 0x8000 else 0))
    return sock.getsockopt(SOL_PACKET, PACKET_FANOUT) & 0xFFFF

"""Every privileged socket: packet sockets in their fanout group, egress sockets, group memberships.

Functions open and return sockets; the supervisor keeps them. Knows nothing of rules or workers beyond a number of them.

Kernel facts:
- A packet socket sees a packet before the reverse-path check and the firewall; that is what lets mcrelay relay sources
  that the host has no route to (packet(7)).
- A packet socket receives from the moment it is bound, and everything until it has joined its fanout group. So it is
  bound with a filter that drops all, and gets its real filter when the whole group stands.
- The fanout program returns an index into the group's members in the order in which they joined. When the interface
  goes down they all leave, and when it comes up join again in the order in which the sockets were made: so that has to
  be the workers' order, too.
- Without PACKET_IGNORE_OUTGOING (Linux 4.20) a packet socket also sees what this host sends.
- PACKET_VNET_HDR (SOCK_RAW only) tells which frames hold several datagrams that a device merged. Before Linux 6.2 it
  knows no such frames of UDP and has the kernel drop them, uncounted by anyone who could say why.
- PACKET_COPY_THRESH queues a copy of each frame that is longer than its slot in the ring.
- igmp_max_memberships (20 by default) counts per socket, not per host: open as many sockets as it takes (ip(7)).
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from ipaddress import IPv4Address
from typing import Final

from mcrelay.errors import SystemRefusal
from mcrelay.limits import RING_RESERVE, RingGeometry
from mcrelay.net.admission import Admission
from mcrelay.net.interfaces import Interface
from mcrelay.steering import Instruction, drop_filter, steering_program, udp_filter

# Constants that the socket module lacks (asm-generic/socket.h, linux/if_packet.h, linux/if_ether.h, linux/in.h).
SO_ATTACH_FILTER: Final = 26
SO_RCVBUFFORCE: Final = 33
SO_SNDBUFFORCE: Final = 32
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
PACKET_FANOUT_FLAG_DEFRAG: Final = 0x8000
SOL_PACKET: Final = 263
ETH_P_IP: Final = 0x0800
IP_MTU_DISCOVER: Final = 10
IP_PMTUDISC_DONT: Final = 0

# Bytes of kernel memory per packet socket, which the kernel doubles: about 14,000 packets of 1000 bytes.
RECEIVE_BUFFER: Final = 16 * 1024 * 1024
SEND_BUFFER: Final = 4 * 1024 * 1024


_libc = ctypes.CDLL(None, use_errno=True)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))  # struct sock_fprog


def _set_program(sock: socket.socket, level: int, option: int, program: Sequence[Instruction]) -> None:
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    description = _Program(len(program), ctypes.addressof(buffer))
    sock.setsockopt(level, option, bytes(description))


def open_ingress(
    interface: Interface,
    workers: int,
    ring: RingGeometry | None = None,
    prepared: list[socket.socket] | None = None,
    admission: Admission | None = None,
) -> list[socket.socket]:
    """One packet socket for each worker, together one fanout group over the interface's incoming IPv4 UDP, or what of
    it `admission` admits; each with a ring of its own, or to be received from. `prepared`, if given, are sockets of
    prepare_ingress for the same ring, and are the caller's no more."""
    with ExitStack() as stack:
        group: int | None = None
        try:
            sockets = prepared if prepared is not None else prepare_ingress(workers, ring)
            for sock in sockets:
                stack.callback(sock.close)
            for sock in sockets:
                sock.bind((interface.name, ETH_P_IP))
                group = _join_fanout(sock, group)
            _set_program(sockets[0], SOL_PACKET, PACKET_FANOUT_DATA, steering_program())
            for sock in sockets:
                if admission:
                    admission.attach(sock)
                else:
                    _set_program(sock, socket.SOL_SOCKET, SO_ATTACH_FILTER, udp_filter(interface.network))
        except OSError as error:
            raise SystemRefusal(
                f"cannot receive on {interface.name}: {error.strerror}", _remedy(error, interface)
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
    _set_program(sock, socket.SOL_SOCKET, SO_ATTACH_FILTER, drop_filter())
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
    kind = PACKET_FANOUT_CBPF | PACKET_FANOUT_FLAG_DEFRAG
    if group is None:
        kind |= PACKET_FANOUT_FLAG_UNIQUEID
    sock.setsockopt(SOL_PACKET, PACKET_FANOUT, (kind << 16 | (group or 0)) - (1 << 32 if kind & 0x8000 else 0))
    return sock.getsockopt(SOL_PACKET, PACKET_FANOUT) & 0xFFFF


def open_egress(interface: Interface, workers: int) -> list[socket.socket]:
    """One UDP socket for each worker, whose datagrams leave by the interface with a source address and port of the
    kernel's choice. It never receives anything."""
    with ExitStack() as stack:
        sockets = []
        try:
            for _ in range(workers):
                sock = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
                _set_program(sock, socket.SOL_SOCKET, SO_ATTACH_FILTER, drop_filter())
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.name.encode())
                sock.setsockopt(
                    socket.IPPROTO_IP,
                    socket.IP_MULTICAST_IF,
                    struct.pack("=4s4si", b"", b"", interface.index),
                )
                # Copies for receivers on this very host are not asked for, and would come back in.
                sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 0)
                # A relay must not turn a smaller MTU further down the path into silence: let routers fragment.
                sock.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DONT)
                sock.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, SEND_BUFFER)
                sockets.append(sock)
        except OSError as error:
            raise SystemRefusal(
                f"cannot send on {interface.name}: {error.strerror}", _remedy(error, interface)
            ) from None
        stack.pop_all()
        return sockets


def _remedy(error: OSError, interface: Interface) -> str:
    if error.errno in (errno.EPERM, errno.EACCES):
        return "run mcrelay as root or with CAP_NET_RAW and CAP_NET_ADMIN"
    if error.errno in (errno.ENODEV, errno.ENXIO, errno.ENETDOWN):
        return f"see 'ip link show {interface.name}'"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "raise the limit of open files (ulimit -n)"
    return "see the kernel's log (dmesg)"


class Memberships:
    """The groups that this host has joined for its rules. Owns the sockets that hold them; one goes when its last group
    does."""

    def __init__(self) -> None:
        self._holder: dict[tuple[int, IPv4Address], socket.socket] = {}
        self._held: Counter[socket.socket] = Counter()  # how many groups
        self._roomy: list[socket.socket] = []  # sockets that may hold more; the last one is asked first

    def join(self, interface: Interface, group: IPv4Address) -> None:
        """SystemRefusal if the kernel does not."""
        if (interface.index, group) in self._holder:
            return
        request = _membership(interface.index, group)
        while self._roomy:
            if self._add(self._roomy[-1], request, interface, group):
                self._note(self._roomy[-1], interface, group)
                return
            self._roomy.pop()
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            joined = self._add(sock, request, interface, group)
        except BaseException:
            sock.close()
            raise
        if not joined:
            sock.close()
            raise SystemRefusal(
                f"cannot join {group} on {interface.name}: the kernel allows no membership at all",
                "raise it: sysctl net.ipv4.igmp_max_memberships=20",
            )
        self._roomy.append(sock)
        self._note(sock, interface, group)

    def _note(self, sock: socket.socket, interface: Interface, group: IPv4Address) -> None:
        self._holder[interface.index, group] = sock
        self._held[sock] += 1

    def _add(self, sock: socket.socket, request: bytes, interface: Interface, group: IPv4Address) -> bool:
        """False if the socket holds all that it may."""
        try:
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, request)
        except OSError as error:
            if error.errno == errno.ENOBUFS:
                return False
            raise SystemRefusal(
                f"cannot join {group} on {interface.name}: {error.strerror}", _remedy(error, interface)
            ) from None
        return True

    def leave(self, index: int, group: IPv4Address) -> None:
        """Leave a group, if joined; that its interface is gone, and the membership with it, is as good."""
        sock = self._holder.pop((index, group), None)
        if sock is None:
            return
        try:
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_DROP_MEMBERSHIP, _membership(index, group))
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.ENODEV):
                raise
        self._held[sock] -= 1
        if self._held[sock]:
            if sock not in self._roomy:
                self._roomy.append(sock)
            return
        del self._held[sock]
        if sock in self._roomy:
            self._roomy.remove(sock)
        sock.close()

    def holders(self) -> Iterator[tuple[socket.socket, list[tuple[int, IPv4Address]]]]:
        """Each socket, and what it is a member of: interface index and group."""
        by_socket: dict[socket.socket, list[tuple[int, IPv4Address]]] = {}
        for member, sock in self._holder.items():
            by_socket.setdefault(sock, []).append(member)
        return iter(by_socket.items())

    def adopt(self, sock: socket.socket, members: list[tuple[int, IPv4Address]]) -> None:
        """A socket that is a member of these."""
        self._holder.update(dict.fromkeys(members, sock))
        self._held[sock] = len(members)
        self._roomy.append(sock)

    def close(self) -> None:
        for sock in self._held:
            sock.close()
        self._holder.clear()
        self._held.clear()
        self._roomy.clear()


def _membership(index: int, group: IPv4Address) -> bytes:
    return struct.pack("=4s4si", group.packed, b"", index)  # struct ip_mreqn

"""The sockets of test traffic: plain UDP sockets, opened by whoever types `mcrelay send` or `mcrelay receive`.

Uses privilege where the user has it and does without where possible: a larger receive buffer, and the binding of a
unicast socket to an interface. Refusals become errors that say what would be right.

Kernel facts:
- A multicast socket receives what any socket of the host joined, unless IP_MULTICAST_ALL is off.
- igmp_max_memberships (20) is per socket. A datagram to a group is offered to every socket that is bound to its port
  and to no address, and each looks through its memberships; those bound to the group are found by a hash. So each group
  has a socket of its own, bound to it, as long as descriptors suffice, and else shares one with 19 others.
- SO_TIMESTAMPNS stamps a datagram where the kernel takes it from the device. UDP_GRO lets runs of equal datagrams stay
  in one piece up to the reader (udp(7)).
"""

from __future__ import annotations

import errno
import resource
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from ipaddress import IPv4Address, IPv6Address
from typing import Final, Protocol

from mcrelay.errors import NotPermitted, SystemRefusal, UsageError

# Constants that the socket module lacks (asm-generic/socket.h, linux/in.h, linux/in6.h, linux/udp.h).
IP_MULTICAST_ALL: Final = 49
IPV6_MULTICAST_ALL: Final = 29
SO_RCVBUFFORCE: Final = 33
SO_TIMESTAMPNS: Final = 35
SO_MEMINFO: Final = 55
SK_MEMINFO_DROPS: Final = 8  # which 32-bit word of SO_MEMINFO
UDP_GRO: Final = 104

RECEIVE_BUFFER: Final = 64 << 20  # of all sockets together; doubled by the kernel: 50 ms at 1,000,000 datagrams/s
RECEIVE_BUFFER_MIN: Final = 1 << 20  # of one
SEND_BUFFER: Final = 1 << 20  # some runs of 64 KiB
MEMBERSHIPS_PER_SOCKET: Final = 20
DESCRIPTORS_OTHERWISE: Final = 64  # that the program has open for anything else
NAMES_SHOWN: Final = 20


class Target(Protocol):
    @property
    def address(self) -> IPv4Address | IPv6Address: ...
    @property
    def port(self) -> int: ...
    @property
    def interface(self) -> str | None: ...


def pack_addresses(targets: Sequence[Target]) -> bytes:
    """Their socket addresses in the kernel's form, one after the other."""
    index = _index(targets[0])
    if targets[0].address.version == 4:
        return b"".join(
            struct.pack("=H", socket.AF_INET) + struct.pack("!H4s8x", target.port, target.address.packed)
            for target in targets
        )
    return b"".join(
        struct.pack("=H", socket.AF_INET6)
        + struct.pack("!HI16s", target.port, 0, target.address.packed)
        + struct.pack("=I", index)
        for target in targets
    )


def open_sender(targets: Sequence[Target], ttl: int, source: str | None) -> socket.socket:
    """One socket for all of them; connected if there is one. OSError if it cannot be."""
    first = targets[0]
    index = _index(first)
    ipv6 = first.address.version == 6
    with ExitStack() as stack:
        sock = stack.enter_context(socket.socket(_family(first), socket.SOCK_DGRAM))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        if first.address.is_multicast and ipv6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, index)
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, ttl)
        elif first.address.is_multicast:
            local = socket.inet_aton(source or "0.0.0.0")
            request = struct.pack("=4s4si", bytes(4), local, index)  # struct ip_mreqn
            _for_source(source, sock.setsockopt, socket.IPPROTO_IP, socket.IP_MULTICAST_IF, request)
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, ttl)
        else:
            if first.interface:
                _bind_to_interface(sock, first)
            if ipv6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, ttl)
            else:
                sock.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, ttl)
        if source is not None:
            local_address = (source, 0, 0, index) if ipv6 else (source, 0)
            _for_source(source, sock.bind, local_address)
        if len(targets) == 1:
            sock.connect(_socket_address(first, index))
        stack.pop_all()
        return sock


def _for_source(source: str | None, call: object, *arguments: object) -> None:
    assert callable(call)
    try:
        call(*arguments)
    except OSError as error:
        if error.errno != errno.EADDRNOTAVAIL or source is None:
            raise
        raise UsageError(
            f"--source {source} is no address of this host", "'ip -brief address' lists those that are"
        ) from None


@contextmanager
def open_receivers(targets: Sequence[Target]) -> Iterator[list[socket.socket]]:
    """Sockets that get what is sent to them, from now on."""
    first = targets[0]
    index = _index(first)
    groups_apart = first.address.is_multicast and len({target.port for target in targets}) == 1
    room = _raise_descriptor_limit() - DESCRIPTORS_OTHERWISE
    per_socket = 1 if len(targets) <= room or not groups_apart else MEMBERSHIPS_PER_SOCKET
    needed = -(-len(targets) // per_socket)
    if needed > room:
        raise SystemRefusal(
            f"{len(targets)} flows take {needed} sockets, and {max(room, 0)} may be opened",
            "allow more open files ('ulimit -Hn' shows the limit), or use fewer flows",
        )
    size = max(RECEIVE_BUFFER // needed, RECEIVE_BUFFER_MIN)
    with ExitStack() as stack:
        sockets = []
        for at in range(0, len(targets), per_socket):
            some = targets[at : at + per_socket]
            try:
                sock = stack.enter_context(socket.socket(_family(first), socket.SOCK_DGRAM))
                _prepare_receiver(sock, size)
                if first.address.is_multicast:
                    _join(sock, some, index)
                else:
                    if first.interface:
                        _bind_to_interface(sock, first)
                    sock.bind(_socket_address(some[0], index))
            except OSError as error:
                raise _receive_refusal(error, some[0]) from None
            sockets.append(sock)
        yield sockets


def _prepare_receiver(sock: socket.socket, size: int) -> None:
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, size)
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
    sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
    with suppress(OSError):  # without it, runs are taken apart before they get here
        sock.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)


def _join(sock: socket.socket, targets: Sequence[Target], index: int) -> None:
    """Bind, and join the groups; several receivers on one host get a copy each."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    ipv6 = targets[0].address.version == 6
    if ipv6:
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_MULTICAST_ALL, 0)
    else:
        sock.setsockopt(socket.IPPROTO_IP, IP_MULTICAST_ALL, 0)
    if len(targets) == 1:
        sock.bind(_socket_address(targets[0], index))
    else:
        sock.bind(("::" if ipv6 else "", targets[0].port))
    for target in targets:
        if ipv6:
            request = struct.pack("=16si", target.address.packed, index)  # struct ipv6_mreq
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, request)
        else:
            request = struct.pack("=4s4si", target.address.packed, bytes(4), index)  # struct ip_mreqn
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, request)


def receive_buffer(sock: socket.socket) -> int:
    """Bytes of kernel memory, which a datagram takes more of than its length."""
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)


def dropped(sock: socket.socket) -> int:
    """Datagrams that the kernel dropped because the socket was full."""
    words = sock.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, 64)
    return int(struct.unpack_from("=I", words, 4 * SK_MEMINFO_DROPS)[0])


def _family(target: Target) -> socket.AddressFamily:
    return socket.AF_INET if target.address.version == 4 else socket.AF_INET6


def _socket_address(target: Target, index: int) -> tuple[str, int] | tuple[str, int, int, int]:
    if target.address.version == 4:
        return str(target.address), target.port
    # Only addresses of a link's own need to say which link.
    scoped = target.address.is_link_local or target.address.is_multicast
    return str(target.address), target.port, 0, index if scoped else 0


def _index(target: Target) -> int:
    if target.interface is None:
        return 0
    try:
        return socket.if_nametoindex(target.interface)
    except OSError:
        names = [name for _index, name in socket.if_nameindex()]
        more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
        raise UsageError(
            f"there is no interface {target.interface!r}", f"this host has {', '.join(names[:NAMES_SHOWN])}{more}"
        ) from None


def _bind_to_interface(sock: socket.socket, target: Target) -> None:
    assert target.interface
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, target.interface.encode())
    except PermissionError:
        raise NotPermitted(
            f"binding to {target.interface} takes CAP_NET_RAW",
            f"run it with sudo, or leave out %{target.interface} for a unicast target",
        ) from None


def _raise_descriptor_limit() -> int:
    """The soft limit of open files up to the hard one; how many that is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard if hard != resource.RLIM_INFINITY else 1 << 20


def _receive_refusal(error: OSError, target: Target) -> SystemRefusal | NotPermitted | UsageError:
    what = f"cannot receive from {target}: {error.strerror}"
    match error.errno:
        case errno.EADDRNOTAVAIL if not target.address.is_multicast:
            return UsageError(
                f"cannot receive at {target}: it is no address of this host",
                "use a group, or one that 'ip -brief address' lists",
            )
        case errno.ENODEV | errno.EADDRNOTAVAIL:
            return SystemRefusal(what, "name an interface that takes multicast: ADDRESS:PORT%INTERFACE")
        case errno.EADDRINUSE:
            return SystemRefusal(what, "another program has the port: 'ss -lunp' shows which")
        case errno.EACCES | errno.EPERM:
            return NotPermitted(what, "use a port of 1024 or more, or run it with sudo")
        case errno.ENOBUFS | errno.ENOMEM:
            return SystemRefusal(what, "the kernel allows no more memberships: use fewer flows")
        case _:
            return SystemRefusal(what, "check the address and the interface")

"""Datagrams: what ordinary UDP sockets tell of a packet, for engine `reference` in rootless mode.

The same in plain Python as native/datagrams.h, which explains it. The kernel has taken the packet apart and verified
it.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from typing import Any, Final

# linux/in.h, linux/udp.h, asm-generic/socket.h, linux/sock_diag.h
IP_PKTINFO: Final = 8
UDP_GRO: Final = 104
SO_MEMINFO: Final = 55
MEMINFO: Final = struct.Struct("=9I")  # the last word: how many were dropped
PKTINFO4: Final = struct.Struct("=i4s4s")  # struct in_pktinfo: interface, local address, destination
PKTINFO6: Final = struct.Struct("=16sI")  # struct in6_pktinfo: destination, interface
MAPPED: Final = b"\0" * 10 + b"\xff\xff"
ROOM: Final = 65535  # the longest payload, or as much of several that a device merged
CONTROL_ROOM: Final = socket.CMSG_SPACE(PKTINFO6.size) + 3 * socket.CMSG_SPACE(4)


@dataclass(frozen=True, slots=True)
class Datagram:
    source: bytes  # 16 bytes, as all addresses
    destination: bytes
    source_port: int
    port: int
    ttl: int
    tos: int
    payload: memoryview
    segment: int  # length of each of several in the payload but the last; 0: it is one


@dataclass(slots=True)
class Port:
    """One of the sockets of an interface."""

    sock: socket.socket
    drops: int = 0  # that it had told of so far

    def __post_init__(self) -> None:
        self.drops = self._drops()

    def receive(self) -> Datagram | None:
        """The next one; None if it does not say where it went. OSError if there is none."""
        data, control, _flags, address = self.sock.recvmsg(ROOM, CONTROL_ROOM, socket.MSG_DONTWAIT)
        return _read(memoryview(data), control, address, self.sock.getsockname()[1])

    def new_drops(self) -> int:
        """Datagrams that it has dropped since this was asked last."""
        before, self.drops = self.drops, self._drops()
        return (self.drops - before) % 2**32

    def _drops(self) -> int:
        drops: int = MEMINFO.unpack(self.sock.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, MEMINFO.size))[-1]
        return drops


def _read(payload: memoryview, control: list[tuple[int, int, bytes]], address: Any, port: int) -> Datagram | None:
    destination = None
    ttl = tos = segment = 0
    for level, kind, told in control:
        match level, kind:
            case socket.IPPROTO_IP, 8:  # IP_PKTINFO
                destination = MAPPED + PKTINFO4.unpack(told)[2]
            case socket.IPPROTO_IPV6, socket.IPV6_PKTINFO:
                destination = PKTINFO6.unpack(told)[0]
            case (socket.IPPROTO_IP, socket.IP_TTL) | (socket.IPPROTO_IPV6, socket.IPV6_HOPLIMIT):
                ttl = int.from_bytes(told, "little") & 255
            case (socket.IPPROTO_IP, socket.IP_TOS) | (socket.IPPROTO_IPV6, socket.IPV6_TCLASS):
                tos = told[0]
            case socket.IPPROTO_UDP, 104:  # UDP_GRO
                segment = struct.unpack("=i", told)[0]
    if destination is None:
        return None
    source = (
        MAPPED + socket.inet_aton(address[0])
        if len(address) == 2
        else socket.inet_pton(socket.AF_INET6, address[0].partition("%")[0])
    )
    if segment >= len(payload):
        segment = 0
    return Datagram(source, destination, address[1], port, ttl, tos, payload, segment)

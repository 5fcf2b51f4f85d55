"""Exits of engine `reference`: one copy of a packet through the socket of its way out.

Owns what a copy looks like (addresses, ports, TTL and DSCP, from the packet and the leg) and how each of the ways of
ways.py sends it: by control messages where the kernel writes the headers, else as bytes of headers.py. Counts nothing:
the caller gets the name of the reason if the copy did not leave. The sockets are the caller's (net/egress.py).

Kernel facts:
- IP_TTL and IP_TOS as control messages are for one datagram (ip(7)), and so are IPV6_HOPLIMIT and IPV6_TCLASS
  (RFC 3542). Unlike the socket's options they take no TTL of 0, which nobody may send anyway.
- IP_PKTINFO and IPV6_PKTINFO choose the source address; that of a stranger, on sockets that are transparent.
- With IP_HDRINCL the kernel fills in an identification of 0, and the header's checksum (raw(7)).
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from mcrelay.engines.headers import Headers, ethernet, is_ipv4, is_link_local, may_be_source, payload_max
from mcrelay.engines.parsing import SOL_PACKET, VIRTIO, Packet
from mcrelay.entries import EXACT, Leg, LegFlag
from mcrelay.ways import ANY, Link, Way

# linux/in.h, linux/in6.h, linux/if_packet.h
IP_PKTINFO: Final = 8
PACKET_VNET_HDR: Final = 15
PKTINFO4: Final = struct.Struct("=i4s4s")  # struct in_pktinfo: interface, source, nothing
PKTINFO6: Final = struct.Struct("=16sI")  # struct in6_pktinfo: source, interface
NUMBER: Final = struct.Struct("=i")

IPV4_WAYS: Final = (Way.UDP4, Way.LOOP4, Way.RAW4)
UDP_WAYS: Final = (Way.UDP4, Way.UDP6, Way.LOOP4, Way.LOOP6)

SEND_ERRORS: Final = {
    errno.EAGAIN: "egress_full",
    errno.ENOBUFS: "egress_full",
    errno.ENOMEM: "egress_full",
    errno.ENETUNREACH: "egress_unreachable",
    errno.EHOSTUNREACH: "egress_unreachable",
    errno.ENETDOWN: "egress_unreachable",
    errno.EHOSTDOWN: "egress_unreachable",
    errno.EADDRNOTAVAIL: "egress_unreachable",
    errno.ENODEV: "egress_unreachable",
    errno.ENXIO: "egress_unreachable",
    errno.EPERM: "egress_refused",
    errno.EACCES: "egress_refused",
}

Control = tuple[int, int, bytes]


def destination_of(leg: Leg, packet: Packet) -> bytes:
    """The leg's address as far as its prefix goes, and the packet's behind that."""
    behind = (1 << (EXACT - leg.prefix)) - 1
    ours, theirs = int.from_bytes(leg.address), int.from_bytes(packet.destination)
    return (ours & ~behind | theirs & behind).to_bytes(16)


def ttl_of(leg: Leg, packet: Packet) -> int:
    if leg.flags & LegFlag.KEEP_TTL:
        return max(1, packet.ttl)  # 0 would not leave
    return leg.ttl or max(1, packet.ttl - 1)


def dscp_of(leg: Leg, packet: Packet) -> int:
    return packet.dscp if leg.flags & LegFlag.KEEP_DSCP else leg.dscp


@dataclass(slots=True)
class Exit:
    """One way out of one interface. `mtu` is the longest IP packet that may leave whole."""

    way: Way
    sock: socket.socket
    mtu: int
    link: Link
    is_virtio: bool = field(init=False, default=False)  # frames begin with a struct virtio_net_hdr
    _identification: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.is_virtio = self.way is Way.FRAME and bool(self.sock.getsockopt(SOL_PACKET, PACKET_VNET_HDR))

    def refusal(self, leg: Leg, packet: Packet) -> str | None:
        """Why no copy of the packet can leave here, whatever the kernel says."""
        destination = destination_of(leg, packet)
        if leg.way is not Way.FRAME and is_ipv4(destination) != (leg.way in IPV4_WAYS):
            return "egress_unreachable"
        if leg.way in UDP_WAYS:
            return None
        source = self._source(leg, packet, destination)
        if source is None or is_ipv4(source) != is_ipv4(destination):
            return "egress_unreachable"
        if leg.way is Way.FRAME and ethernet(self.link.mac, destination) is None:
            return "egress_unreachable"  # to a host, for whose address somebody would have to ask
        if max(map(len, packet.datagrams)) > payload_max(destination, packet.protocol):
            return "egress_error"
        return None

    def send(self, leg: Leg, packet: Packet, payload: memoryview) -> str | None:
        """The reason if the copy did not leave."""
        try:
            if leg.way in UDP_WAYS:
                self._send_datagram(leg, packet, payload)
            else:
                self._send_packets(leg, packet, payload)
        except OSError as error:
            return SEND_ERRORS.get(error.errno or 0, "egress_error")
        return None

    def _send_datagram(self, leg: Leg, packet: Packet, payload: memoryview) -> None:
        destination = destination_of(leg, packet)
        ttl, dscp = ttl_of(leg, packet), dscp_of(leg, packet)
        control: list[Control]
        if leg.way in (Way.UDP4, Way.LOOP4):
            control = [(socket.IPPROTO_IP, socket.IP_TTL, NUMBER.pack(ttl))]
            if dscp:
                control.append((socket.IPPROTO_IP, socket.IP_TOS, NUMBER.pack(dscp << 2)))
            if leg.source != ANY:
                control.append((socket.IPPROTO_IP, IP_PKTINFO, PKTINFO4.pack(0, leg.source[12:], b"")))
            self._send([payload], control, destination, leg.port or packet.port)
        else:
            control = [(socket.IPPROTO_IPV6, socket.IPV6_HOPLIMIT, NUMBER.pack(ttl))]
            if dscp:
                control.append((socket.IPPROTO_IPV6, socket.IPV6_TCLASS, NUMBER.pack(dscp << 2)))
            if leg.source != ANY:
                control.append((socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, PKTINFO6.pack(leg.source, 0)))
            self._send([payload], control, destination, leg.port or packet.port)

    def _send_packets(self, leg: Leg, packet: Packet, payload: memoryview) -> None:
        """With headers of our own, in fragments if need be; the first that does not leave is the last."""
        destination = destination_of(leg, packet)
        keeps_port = leg.flags & LegFlag.KEEP_SOURCE_PORT or not leg.source_port
        self._identification = self._identification % 0xFFFF + 1  # never 0, which raw sockets fill in
        source = self._source(leg, packet, destination)
        assert source is not None  # see refusal()
        headers = Headers(
            source=source,
            destination=destination,
            source_port=packet.source_port if keeps_port else leg.source_port,
            port=leg.port or packet.port,
            protocol=packet.protocol,
            ttl=ttl_of(leg, packet),
            dscp=dscp_of(leg, packet),
            identification=self._identification,
        )
        front = bytes(VIRTIO.size) if self.is_virtio else b""
        if leg.way is Way.FRAME and self.link.header:
            link_header = ethernet(self.link.mac, destination)
            assert link_header is not None  # see refusal()
            front += link_header
        for ip_packet in headers.packets(payload, self.mtu):
            if leg.way is Way.FRAME:
                self.sock.sendmsg([front, ip_packet], [], socket.MSG_DONTWAIT)
            else:
                self._send([ip_packet], [], destination, 0)

    def _send(self, parts: Sequence[bytes | memoryview], control: list[Control], to: bytes, port: int) -> None:
        if is_ipv4(to):
            address = (socket.inet_ntop(socket.AF_INET, to[12:]), port)
        else:
            address = (socket.inet_ntop(socket.AF_INET6, to), port)
        self.sock.sendmsg(parts, control, socket.MSG_DONTWAIT, address)

    def _source(self, leg: Leg, packet: Packet, destination: bytes) -> bytes | None:
        """The source address of headers of our own; None if there is none."""
        if leg.flags & LegFlag.KEEP_SOURCE:
            return packet.source if may_be_source(packet.source, destination) else None
        if leg.source != ANY:
            return leg.source
        if is_ipv4(destination):
            source = self.link.source4
        elif is_link_local(destination) or self.link.source6 == ANY:
            source = self.link.source6_link
        else:
            source = self.link.source6
        return source if source != ANY else None

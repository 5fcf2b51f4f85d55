"""Headers that engine `reference` writes itself: Ethernet, IPv4, IPv6 and UDP, and the fragments of what is too long.

A packet here is one copy of an output of the ways `frame`, `raw4` and `raw6` (ways.py), whose source the kernel would
not let a UDP socket choose. Addresses have 16 bytes, IPv4 mapped; both of a packet are of one IP version. Pure.

Facts relied on:
- A router may cut IPv4 packets (no DF), but not IPv6 ones (RFC 8200, section 4.5), so the only one who can make
  fragments of the interface's MTU is the one who writes the header.
- A frame through a socket with PACKET_VNET_HDR begins with a struct virtio_net_hdr, which may be all zero: one packet,
  checksums complete.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from mcrelay.engines.parsing import FRAGMENT, MAPPED_PREFIX, checksum_sum, pseudo_header
from mcrelay.entries import UDP

IPV4_HEADER: Final = 20
IPV6_HEADER: Final = 40
UDP_HEADER: Final = 8
FRAGMENT_HEADER: Final = 8
LENGTH_MAX: Final = 65535  # of what the 16 bits of a length say: an IPv4 packet, or what follows the IPv6 header
MORE_FRAGMENTS4: Final = 0x2000
MORE_FRAGMENTS6: Final = 1
BROADCAST: Final = MAPPED_PREFIX + b"\xff" * 4
NO_IPV4: Final = MAPPED_PREFIX + bytes(4)
ETHERTYPE_IPV4: Final = 0x0800
ETHERTYPE_IPV6: Final = 0x86DD


def is_ipv4(address: bytes) -> bool:
    return address.startswith(MAPPED_PREFIX)


def is_link_local(address: bytes) -> bool:
    """Of IPv6: a host's (fe80::/10), or a group that does not leave the link (ff02::/16, with whatever flags)."""
    return (address[0] == 0xFE and address[1] & 0xC0 == 0x80) or (address[0] == 0xFF and address[1] & 0x0F <= 2)


def ip_length(destination: bytes, protocol: int, payload: int) -> int:
    """Bytes of the IP packet with so many bytes of payload."""
    header = IPV4_HEADER if is_ipv4(destination) else IPV6_HEADER
    return header + (UDP_HEADER if protocol == UDP else 0) + payload


def payload_max(destination: bytes, protocol: int) -> int:
    """Bytes of the longest payload that fits such a packet, in fragments or not."""
    header = IPV4_HEADER if is_ipv4(destination) else 0
    return LENGTH_MAX - header - (UDP_HEADER if protocol == UDP else 0)


@dataclass(frozen=True, slots=True)
class Headers:
    """What the headers of one packet say."""

    source: bytes
    destination: bytes
    source_port: int
    port: int
    protocol: int
    ttl: int
    dscp: int
    identification: int  # of fragments: tells them from those of other packets

    def packets(self, payload: memoryview, mtu: int) -> Iterator[bytes]:
        """The IP packet with this payload, of payload_max() at most, in fragments if it is longer than `mtu`."""
        body = bytes(payload) if self.protocol != UDP else self._udp(payload)
        if is_ipv4(self.destination):
            yield from self._ipv4_packets(body, mtu)
        else:
            yield from self._ipv6_packets(body, mtu)

    def _udp(self, payload: memoryview) -> bytes:
        length = UDP_HEADER + len(payload)
        without = struct.pack("!HHHH", self.source_port, self.port, length, 0) + payload
        checksum = ~checksum_sum(pseudo_header(self.source, self.destination, UDP, without) + without) & 0xFFFF
        # One that is zero is sent as its other representation: zero itself means "none".
        return without[:6] + struct.pack("!H", checksum or 0xFFFF) + payload

    def _ipv4_packets(self, body: bytes, mtu: int) -> Iterator[bytes]:
        room = len(body) if IPV4_HEADER + len(body) <= mtu else (mtu - IPV4_HEADER) // 8 * 8
        for at in range(0, max(1, len(body)), max(1, room)):
            part = body[at : at + room]
            more = MORE_FRAGMENTS4 if at + room < len(body) else 0
            yield self._ipv4(len(part), at // 8 | more) + part

    def _ipv4(self, length: int, fragment: int) -> bytes:
        header = struct.pack(
            "!BBHHHBBH4s4s",
            0x45,
            self.dscp << 2,
            IPV4_HEADER + length,
            self.identification & 0xFFFF,
            fragment,
            self.ttl,
            self.protocol,
            0,
            self.source[12:],
            self.destination[12:],
        )
        return header[:10] + struct.pack("!H", ~checksum_sum(header) & 0xFFFF) + header[12:]

    def _ipv6_packets(self, body: bytes, mtu: int) -> Iterator[bytes]:
        if IPV6_HEADER + len(body) <= mtu:
            yield self._ipv6(len(body), self.protocol) + body
            return
        room = (mtu - IPV6_HEADER - FRAGMENT_HEADER) // 8 * 8
        for at in range(0, len(body), room):
            part = body[at : at + room]
            more = MORE_FRAGMENTS6 if at + room < len(body) else 0
            fragment = struct.pack("!BBHI", self.protocol, 0, at | more, self.identification)
            yield self._ipv6(FRAGMENT_HEADER + len(part), FRAGMENT) + fragment + part

    def _ipv6(self, length: int, following: int) -> bytes:
        first_word = 6 << 28 | self.dscp << 22
        return struct.pack("!IHBB", first_word, length, following, self.ttl) + self.source + self.destination


def may_be_source(source: bytes, destination: bytes) -> bool:
    """Whether a copy may say that it comes from there: from a host, or, on a link, from one that has no address yet."""
    if source in (bytes(16), NO_IPV4):
        return _is_to_several(destination)
    if is_ipv4(source):
        return 0 < source[12] < 0xE0
    return source[0] != 0xFF


def _is_to_several(address: bytes) -> bool:
    return address[12] & 0xF0 == 0xE0 or address == BROADCAST if is_ipv4(address) else address[0] == 0xFF


def ethernet(mac: bytes, destination: bytes) -> bytes | None:
    """The link-layer header to a group or to everybody; None if the destination is neither."""
    if is_ipv4(destination):
        if destination == BROADCAST:
            to = b"\xff" * 6
        elif destination[12] & 0xF0 == 0xE0:  # RFC 1112, section 6.4
            to = bytes((0x01, 0x00, 0x5E, destination[13] & 0x7F, destination[14], destination[15]))
        else:
            return None
        return to + mac + struct.pack("!H", ETHERTYPE_IPV4)
    if destination[0] != 0xFF:
        return None
    return b"\x33\x33" + destination[12:] + mac + struct.pack("!H", ETHERTYPE_IPV6)  # RFC 2464, section 7

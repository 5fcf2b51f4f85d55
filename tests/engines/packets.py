"""Packets as bytes, for the engine tests: IPv4 and IPv6, UDP and ESP, extension headers and fragments.

Independent of the engines, whose output is compared with it. Correct by default; what a stranger could get wrong can be
given. `comparable` takes a captured packet and leaves out what the kernel may choose.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, ip_address

from lab.frames import SOURCE_MAC, internet_checksum

UDP, ESP, FRAGMENT = 17, 50, 44
IPV4_TYPE, IPV6_TYPE, VLAN_TYPE = 0x0800, 0x86DD, 0x8100


def ip_packet(
    source: str,
    destination: str,
    body: bytes,
    *,
    protocol: int = UDP,
    ttl: int = 8,
    dscp: int = 0,
    ecn: int = 0,
    fragment: int = 0,  # of IPv4: flags and offset
    identification: int = 0,
    extensions: bytes = b"",  # of IPv6: headers in front of the body; `protocol` is the first one's
    length: int | None = None,
    flow_label: int = 0,
    options: bytes = b"",  # of IPv4, a multiple of 4 bytes
) -> bytes:
    from_, to = ip_address(source), ip_address(destination)
    tos = dscp << 2 | ecn
    if isinstance(from_, IPv4Address):
        total = 20 + len(options) + len(body) if length is None else length
        first = 0x45 + len(options) // 4
        head = struct.pack("!BBHHHBBH", first, tos, total, identification, fragment, ttl, protocol, 0)
        head += from_.packed + to.packed + options
        return head[:10] + struct.pack("!H", internet_checksum(head)) + head[12:] + body
    total = len(extensions) + len(body) if length is None else length
    first = 6 << 28 | tos << 20 | flow_label
    return struct.pack("!IHBB", first, total, protocol, ttl) + from_.packed + to.packed + extensions + body


def udp(
    source: str, destination: str, source_port: int, port: int, payload: bytes, checksum: int | None = None
) -> bytes:
    """Header and payload."""
    header = struct.pack("!HHHH", source_port, port, 8 + len(payload), 0)
    if checksum is None:
        checksum = internet_checksum(_pseudo_header(source, destination, 8 + len(payload)) + header + payload) or 0xFFFF
    return header[:6] + struct.pack("!H", checksum) + payload


def _pseudo_header(source: str, destination: str, length: int) -> bytes:
    packed = ip_address(source).packed + ip_address(destination).packed
    return packed + struct.pack("!II", length, UDP)  # of IPv4, too: there are zeros more


@dataclass(frozen=True)
class Datagram:
    """A UDP datagram in a packet."""

    source: str
    destination: str
    source_port: int
    port: int
    payload: bytes
    ttl: int = 8
    dscp: int = 0
    ecn: int = 0

    @property
    def packet(self) -> bytes:
        body = udp(self.source, self.destination, self.source_port, self.port, self.payload)
        return ip_packet(self.source, self.destination, body, ttl=self.ttl, dscp=self.dscp, ecn=self.ecn)


def option_header(following: int, words: int = 0, *, kind: int = 0) -> bytes:
    """Hop-by-hop or destination options, or with `kind` a routing header, of 8 bytes and so many times 8 more."""
    return bytes((following, words, kind, 0)) + bytes(4 + 8 * words)


def fragment_header(following: int, offset: int, identification: int, *, more: bool) -> bytes:
    """`offset` in bytes."""
    return struct.pack("!BBHI", following, 0, offset | more, identification)


def ethernet(
    packet: bytes, *, source_mac: str = SOURCE_MAC, destination_mac: str | None = None, vlan: int | None = None
) -> bytes:
    """A frame around a packet; the MAC address of a group is derived from it. `vlan`: the tag's TCI."""
    is_ipv6 = packet[0] >> 4 == 6
    if destination_mac is None:
        destination_mac = _group_mac(packet[24:40] if is_ipv6 else packet[16:20])
    tag = b"" if vlan is None else struct.pack("!HH", VLAN_TYPE, vlan)
    macs = bytes.fromhex((destination_mac + source_mac).replace(":", ""))
    return macs + tag + struct.pack("!H", IPV6_TYPE if is_ipv6 else IPV4_TYPE) + packet


def _group_mac(address: bytes) -> str:
    if len(address) == 16:
        return (b"\x33\x33" + address[12:]).hex(":")
    if address == b"\xff" * 4:
        return "ff:ff:ff:ff:ff:ff"
    return bytes((1, 0, 0x5E, address[1] & 0x7F, address[2], address[3])).hex(":")


def comparable(packet: bytes, *, any_source_port: bool = False) -> bytes:
    """Without what the kernel or the engine may choose: identifications, flow labels, link-layer padding, and with
    `any_source_port` that. Checksums, which have to be right, are zero; except for the UDP checksum of a fragment."""
    if packet[0] >> 4 == 4:
        packet = packet[: int.from_bytes(packet[2:4])]
        assert internet_checksum(packet[:20]) == 0, "wrong IP checksum"
        at, protocol = 20, packet[9]
        addresses = packet[12:20]
        is_fragment = bool(int.from_bytes(packet[6:8]) & 0x3FFF)
        packet = packet[:4] + b"\0\0" + packet[6:10] + b"\0\0" + packet[12:]
    else:
        packet = packet[: 40 + int.from_bytes(packet[4:6])]
        at, protocol = 40, packet[6]
        addresses = packet[8:40]
        is_fragment = protocol == FRAGMENT
        packet = packet[:1] + bytes((packet[1] & 0xF0, 0, 0)) + packet[4:]
        if is_fragment:
            packet = packet[:44] + bytes(4) + packet[48:]
    if protocol != UDP or is_fragment:
        return packet
    segment = packet[at:]
    if segment[6:8] != b"\0\0":
        pseudo_header = addresses + struct.pack("!II", len(segment), UDP)
        assert internet_checksum(pseudo_header + segment) == 0, "wrong UDP checksum"
    source_port = b"\0\0" if any_source_port else segment[:2]
    return packet[:at] + source_port + segment[2:6] + (b"\0\0" if segment[6:8] != b"\0\0" else b"no") + segment[8:]


def carried(frame: bytes) -> int | None:
    """The protocol in an Ethernet frame of IP (of IPv6 the first header's), if it is UDP, ESP or a fragment; None for
    any other frame."""
    protocol = {b"\x08\x00": frame[23], b"\x86\xdd": frame[20]}.get(frame[12:14])
    return protocol if protocol in (UDP, ESP, FRAGMENT) else None


def is_last(packet: bytes) -> bool:
    """The last fragment of a packet, or a whole one."""
    if packet[0] >> 4 == 4:
        return not packet[6] & 0x20
    return packet[6] != FRAGMENT or not packet[43] & 1


def reassembled(packets: list[bytes]) -> bytes:
    """The body of all fragments of one packet."""
    parts: dict[int, bytes] = {}
    for packet in packets:
        if packet[0] >> 4 == 4:
            parts[(int.from_bytes(packet[6:8]) & 0x1FFF) * 8] = packet[20 : int.from_bytes(packet[2:4])]
        else:
            parts[int.from_bytes(packet[42:44]) & 0xFFF8] = packet[48:]
    whole = b""
    for at, part in sorted(parts.items()):
        assert at == len(whole), "a gap or an overlap"
        whole += part
    return whole

"""Parsing of engine `reference`: what a packet socket gave, taken apart into a packet that rules can be asked about.

IPv4 (RFC 791) and IPv6 (RFC 8200), UDP (RFC 768) and ESP (RFC 4303), in the order of the checks of native/packet.c: a
packet with two faults has one reason, and it has to be the same one in every engine. A refusal is a Drop with the
reason's name; there is never a guess. Knows nothing of rules, and opens no socket.

Kernel facts:
- A VLAN tag is taken out of the frame before a packet socket sees it, and stands in the auxiliary data (packet(7)).
- TP_STATUS_CSUMNOTREADY: the sender is this machine, and left the checksum to a device that never had to compute it.
  TP_STATUS_CSUM_VALID: a device has verified it.
- Of a frame of several datagrams (struct virtio_net_hdr says so), the UDP header is one that covers all of them.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field, replace
from typing import Final

from mcrelay.engines.reassembly import Fragment
from mcrelay.entries import ESP, UDP

# linux/if_packet.h, linux/virtio_net.h
PACKET_OTHERHOST: Final = 3
PACKET_AUXDATA: Final = 8
SOL_PACKET: Final = 263
TP_STATUS_CSUMNOTREADY: Final = 1 << 3
TP_STATUS_VLAN_VALID: Final = 1 << 4
TP_STATUS_CSUM_VALID: Final = 1 << 7
AUXDATA: Final = struct.Struct("=IIIHHHH")  # struct tpacket_auxdata: status, sizes, offset of the network header, tag
VIRTIO: Final = struct.Struct(
    "=BBHHHH"
)  # struct virtio_net_hdr: flags, kind, lengths of headers and segments, checksum
VIRTIO_NET_HDR_GSO_UDP_L4: Final = 5
VLAN_ID: Final = 0xFFF  # of a tag; the other bits are a priority

MAPPED_PREFIX: Final = b"\0" * 10 + b"\xff\xff"

HOP_BY_HOP: Final = 0
ROUTING: Final = 43
FRAGMENT: Final = 44
AUTHENTICATION: Final = 51
DESTINATION_OPTIONS: Final = 60
EXTENSIONS_MAX: Final = 8  # headers in front of UDP: more have no use but to keep somebody busy


class Drop(Exception):
    """The packet is not forwarded; the argument is the reason's name."""


class Fragmented(Drop):
    """The packet is one of several fragments, of IPv6."""

    def __init__(self, fragment: Fragment) -> None:
        super().__init__("fragment")
        self.fragment = fragment


@dataclass(frozen=True, slots=True)
class Packet:
    source: bytes  # 16 bytes, like all addresses
    destination: bytes
    source_port: int  # 0 of ESP, like the other
    port: int
    protocol: int
    ttl: int  # or hop limit
    dscp: int
    payload: memoryview
    segment: int = 0  # length of each of several datagrams in the payload but the last; 0: it is one
    whole: memoryview | None = field(default=None, compare=False, repr=False)  # from the IP header on, if it has come

    @property
    def datagrams(self) -> list[memoryview]:
        if not self.segment:
            return [self.payload]
        return [self.payload[at : at + self.segment] for at in range(0, len(self.payload), self.segment)]


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame from its network header on, and what the kernel said of it."""

    data: memoryview
    vlan: int = 0  # 0: untagged
    segment: int = 0
    vouched: bool = False  # for the checksum


def unwrap(data: memoryview, control: list[tuple[int, int, bytes]], address: object, *, virtio: bool) -> Frame:
    """What recvmsg gave of a packet socket, taken apart; Drop for what is not ours to forward."""
    segment = status = network = tag = 0
    if virtio:
        _flags, kind, _header_length, size, _start, _offset = VIRTIO.unpack_from(data)
        segment = size if kind == VIRTIO_NET_HDR_GSO_UDP_L4 else 0
        data = data[VIRTIO.size :]
    for level, message, payload in control:
        if level == SOL_PACKET and message == PACKET_AUXDATA and len(payload) >= AUXDATA.size:
            status, _length, _captured, _link, network, tag, _tag_protocol = AUXDATA.unpack_from(payload)
    if isinstance(address, tuple) and len(address) >= 3 and address[2] == PACKET_OTHERHOST:
        raise Drop("other_host")
    return Frame(
        data[network:],
        vlan=tag & VLAN_ID if status & TP_STATUS_VLAN_VALID else 0,
        segment=segment,
        vouched=bool(status & (TP_STATUS_CSUM_VALID | TP_STATUS_CSUMNOTREADY)),
    )


def parse(data: memoryview, *, checksum_vouched: bool) -> Packet:
    """A UDP or ESP packet from its network header on, or Drop."""
    if len(data) < 20:
        raise Drop("truncated")
    version = data[0] >> 4
    if version == 4:
        return replace(_parse_ipv4(data, checksum_vouched=checksum_vouched), whole=data)
    if version == 6:
        return replace(_parse_ipv6(data, checksum_vouched=checksum_vouched), whole=data)
    raise Drop("not_ip")


def _parse_ipv4(data: memoryview, *, checksum_vouched: bool) -> Packet:
    header_length = (data[0] & 15) * 4
    total_length = int.from_bytes(data[2:4], "big")
    if header_length < 20 or total_length < header_length:
        raise Drop("bad_ip_header")
    if total_length > len(data):
        raise Drop("truncated")
    if checksum_sum(data[:header_length]) != 0xFFFF:
        raise Drop("bad_ip_checksum")
    if int.from_bytes(data[6:8], "big") & 0x3FFF:
        raise Drop("fragment")
    return _transport(
        data[header_length:total_length],
        protocol=data[9],
        source=MAPPED_PREFIX + bytes(data[12:16]),
        destination=MAPPED_PREFIX + bytes(data[16:20]),
        ttl=data[8],
        dscp=data[1] >> 2,
        checksum_vouched=checksum_vouched,
    )


def _parse_ipv6(data: memoryview, *, checksum_vouched: bool) -> Packet:
    if len(data) < 40:
        raise Drop("truncated")
    payload_length = int.from_bytes(data[4:6], "big")
    if payload_length == 0:  # a jumbogram (RFC 2675), or nothing
        raise Drop("bad_ip_header")
    if 40 + payload_length > len(data):
        raise Drop("truncated")
    source, destination = bytes(data[8:24]), bytes(data[24:40])
    if source.startswith(MAPPED_PREFIX) or destination.startswith(MAPPED_PREFIX):
        raise Drop("bad_ip_header")  # no packet of IPv6 has such, and it is not to pass for one of IPv4
    protocol, body = _skip_extensions(data[6], data[40 : 40 + payload_length])
    if protocol == FRAGMENT:
        raise Fragmented(_fragment(data, body, before=payload_length - len(body)))
    return _transport(
        body,
        protocol=protocol,
        source=source,
        destination=destination,
        ttl=data[7],
        dscp=int.from_bytes(data[:2], "big") >> 6 & 0x3F,
        checksum_vouched=checksum_vouched,
    )


def _skip_extensions(protocol: int, body: memoryview) -> tuple[int, memoryview]:
    """What is behind the extension headers, or a real fragment's header and what is behind it."""
    skipped = 0
    while protocol in (HOP_BY_HOP, ROUTING, FRAGMENT, AUTHENTICATION, DESTINATION_OPTIONS):
        skipped += 1
        if skipped > EXTENSIONS_MAX or len(body) < 8:
            raise Drop("bad_extension")
        if protocol == FRAGMENT:
            length = 8
        elif protocol == AUTHENTICATION:
            length = (body[1] + 2) * 4  # RFC 4302
        else:
            length = (body[1] + 1) * 8
        if length > len(body):
            raise Drop("bad_extension")
        if protocol == ROUTING and body[3]:  # its destination is another one
            raise Drop("bad_extension")
        if protocol == FRAGMENT and int.from_bytes(body[2:4], "big") & 0xFFF9:
            break
        protocol, body = body[0], body[length:]
    return protocol, body


def _fragment(data: memoryview, header: memoryview, *, before: int) -> Fragment:
    """`header` is the fragment's, and what is behind it."""
    where = int.from_bytes(header[2:4])
    offset = where & 0xFFF8
    headless = False
    if offset == 0:
        try:
            carried, rest = _skip_extensions(header[0], header[8:])
            headless = carried == FRAGMENT or len(rest) < 8
        except Drop:
            headless = True
    return Fragment(
        source=bytes(data[8:24]),
        destination=bytes(data[24:40]),
        identification=bytes(header[4:8]),
        header=bytes(data[:40]),
        next=header[0],
        before=before,
        offset=offset,
        more=bool(where & 1),
        piece=bytes(header[8:]),
        headless=headless,
    )


def _transport(
    body: memoryview,
    *,
    protocol: int,
    source: bytes,
    destination: bytes,
    ttl: int,
    dscp: int,
    checksum_vouched: bool,
) -> Packet:
    """What follows the IP headers."""
    if protocol == ESP:
        return Packet(source, destination, 0, 0, protocol, ttl, dscp, body)
    if protocol != UDP:
        raise Drop("not_udp")
    if len(body) < 8:
        raise Drop("truncated")
    source_port, port, length, checksum = struct.unpack_from("!HHHH", body)
    if not 8 <= length <= len(body):
        raise Drop("bad_udp_length")
    body = body[:length]
    if not checksum and not source.startswith(MAPPED_PREFIX):  # RFC 8200, section 8.1
        raise Drop("bad_udp_checksum")
    if (
        checksum
        and not checksum_vouched
        and checksum_sum(pseudo_header(source, destination, UDP, body) + body) != 0xFFFF
    ):
        raise Drop("bad_udp_checksum")
    return Packet(source, destination, source_port, port, protocol, ttl, dscp, body[8:])


def pseudo_header(source: bytes, destination: bytes, protocol: int, body: memoryview | bytes) -> bytes:
    """What a checksum covers beside the packet's body (RFC 768; RFC 8200, section 8.1)."""
    if source.startswith(MAPPED_PREFIX):
        return source[12:] + destination[12:] + struct.pack("!HH", protocol, len(body))
    return source + destination + struct.pack("!II", len(body), protocol)


def checksum_sum(data: memoryview | bytes) -> int:
    """The ones' complement sum of RFC 1071, 0xffff where it includes a right checksum."""
    padded = bytes(data) + b"\0" * (len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(padded) // 2}H", padded))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total

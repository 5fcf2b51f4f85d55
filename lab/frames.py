"""Ethernet frames as bytes: taking apart what was captured, building what is to be injected. No sockets.

The decoders are for well-formed traffic: a frame that is not what is asked for, or is cut short, gives
None, never an exception. The builders produce correct frames by default; every field that a hostile sender
could get wrong can be given explicitly, and then goes into the frame as it is.

    frame = ethernet_ipv4_udp("192.0.2.9", "239.1.1.1", 4000, 5000, b"hello")  # correct
    frame = ethernet_ipv4_udp("192.0.2.9", "239.1.1.1", 4000, 5000, b"hello", udp_length=9999)  # lies

IGMP as in RFC 2236 (v1 and v2) and RFC 3376 (v3); the multicast MAC address as in RFC 1112, section 6.4.
"""

from __future__ import annotations

import ipaddress
import struct
from dataclasses import dataclass
from typing import NamedTuple

ETHERTYPE_IPV4 = 0x0800
ETHERTYPE_VLAN = 0x8100
PROTOCOL_IGMP = 2
PROTOCOL_UDP = 17

ETHERNET = struct.Struct("!6s6sH")
IPV4 = struct.Struct("!BBHHHBBH4s4s")
UDP = struct.Struct("!HHHH")

FLAG_DONT_FRAGMENT = 0x4000
FLAG_MORE_FRAGMENTS = 0x2000
FRAGMENT_OFFSET_MASK = 0x1FFF

SOURCE_MAC = "02:00:00:00:00:01"  # locally administered; nobody answers to it
ROUTER_ALERT = bytes((0x94, 0x04, 0x00, 0x00))  # RFC 2113; IGMP v2 and v3 require it

IGMP_QUERY = 0x11
IGMP_V1_REPORT = 0x12
IGMP_V2_REPORT = 0x16
IGMP_LEAVE = 0x17
IGMP_V3_REPORT = 0x22

# Record types of a v3 report.
MODE_IS_INCLUDE = 1
MODE_IS_EXCLUDE = 2
CHANGE_TO_INCLUDE = 3
CHANGE_TO_EXCLUDE = 4
ALLOW_NEW_SOURCES = 5
BLOCK_OLD_SOURCES = 6


class UdpDatagram(NamedTuple):
    source: str
    destination: str
    source_port: int
    destination_port: int
    ttl: int
    payload: bytes
    destination_mac: str
    checksum: int
    checksum_valid: bool | None  # None when the sender computed none

    def __str__(self) -> str:
        return (
            f"UDP {self.source}:{self.source_port} -> {self.destination}:{self.destination_port}"
            f" ttl {self.ttl}, {len(self.payload)} bytes"
        )


class GroupRecord(NamedTuple):
    kind: int  # CHANGE_TO_EXCLUDE and so on
    group: str
    sources: tuple[str, ...]


@dataclass(frozen=True)
class IgmpMessage:
    type: int  # IGMP_V3_REPORT and so on
    source: str
    destination: str
    records: tuple[GroupRecord, ...]  # of a v3 report
    groups: tuple[str, ...]  # all groups named, of whatever type; empty for a general query

    def joins(self, group: str) -> bool:
        """Whether it reports membership: of any version, for any source or for some."""
        if self.type in (IGMP_V1_REPORT, IGMP_V2_REPORT):
            return group in self.groups
        return any(record.group == group and _is_membership(record) for record in self.records)

    def leaves(self, group: str) -> bool:
        """Whether it ends the membership of the whole group."""
        if self.type == IGMP_LEAVE:
            return group in self.groups
        return any(
            record.group == group and record.kind == CHANGE_TO_INCLUDE and not record.sources for record in self.records
        )


def _is_membership(record: GroupRecord) -> bool:
    if record.kind in (MODE_IS_EXCLUDE, CHANGE_TO_EXCLUDE):
        return True
    return record.kind in (MODE_IS_INCLUDE, CHANGE_TO_INCLUDE, ALLOW_NEW_SOURCES) and bool(record.sources)


# --- taking apart ---


class _Packet(NamedTuple):
    source: bytes
    destination: bytes
    protocol: int
    ttl: int
    fragment: int  # flags and offset
    body: bytes


def _decode_ipv4(frame: bytes) -> _Packet | None:
    if len(frame) < ETHERNET.size + IPV4.size or frame[12:14] != b"\x08\x00":
        return None
    packet = frame[ETHERNET.size :]
    first, _tos, length, _id, fragment, ttl, protocol, _sum, source, destination = IPV4.unpack_from(packet)
    header_length = (first & 15) * 4
    if first >> 4 != 4 or not IPV4.size <= header_length <= length <= len(packet):
        return None
    # Short frames are padded: the packet ends where its length says, not where the frame does.
    return _Packet(source, destination, protocol, ttl, fragment, packet[header_length:length])


def decode_udp(frame: bytes) -> UdpDatagram | None:
    """The UDP datagram in an untagged Ethernet frame, or None; also None for a fragment of one."""
    packet = _decode_ipv4(frame)
    if packet is None or packet.protocol != PROTOCOL_UDP or len(packet.body) < UDP.size:
        return None
    if packet.fragment & (FLAG_MORE_FRAGMENTS | FRAGMENT_OFFSET_MASK):
        return None
    source_port, destination_port, length, checksum = UDP.unpack_from(packet.body)
    if not UDP.size <= length <= len(packet.body):
        return None
    segment = packet.body[:length]
    pseudo_header = packet.source + packet.destination + struct.pack("!HH", PROTOCOL_UDP, length)
    return UdpDatagram(
        source=_text(packet.source),
        destination=_text(packet.destination),
        source_port=source_port,
        destination_port=destination_port,
        ttl=packet.ttl,
        payload=segment[UDP.size :],
        destination_mac=frame[:6].hex(":"),
        checksum=checksum,
        # A sum over correct data and its own checksum is zero.
        checksum_valid=internet_checksum(pseudo_header + segment) == 0 if checksum else None,
    )


def decode_igmp(frame: bytes) -> IgmpMessage | None:
    """The IGMP message in an untagged Ethernet frame, or None."""
    packet = _decode_ipv4(frame)
    if packet is None or packet.protocol != PROTOCOL_IGMP or len(packet.body) < 8:
        return None
    body = packet.body
    kind = body[0]
    records: list[GroupRecord] = []
    if kind == IGMP_V3_REPORT:
        position = 8
        for _ in range(int.from_bytes(body[6:8])):
            if position + 8 > len(body):
                return None
            record_kind, auxiliary_words, source_count = struct.unpack_from("!BBH", body, position)
            end_of_sources = position + 8 + 4 * source_count
            if end_of_sources > len(body):
                return None
            sources = (_text(body[at : at + 4]) for at in range(position + 8, end_of_sources, 4))
            records.append(GroupRecord(record_kind, _text(body[position + 4 : position + 8]), tuple(sources)))
            position = end_of_sources + 4 * auxiliary_words
        groups = tuple(record.group for record in records)
    elif kind in (IGMP_QUERY, IGMP_V1_REPORT, IGMP_V2_REPORT, IGMP_LEAVE):
        groups = () if body[4:8] == bytes(4) else (_text(body[4:8]),)
    else:
        return None
    return IgmpMessage(kind, _text(packet.source), _text(packet.destination), tuple(records), groups)


def _text(address: bytes) -> str:
    return str(ipaddress.IPv4Address(address))


# --- building ---


def internet_checksum(data: bytes) -> int:
    """RFC 1071."""
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def multicast_mac(group: str) -> str:
    """01:00:5e and the low 23 bits of the group."""
    low = int(ipaddress.IPv4Address(group)) & 0x7F_FFFF
    return (0x0100_5E00_0000 | low).to_bytes(6).hex(":")


def ethernet_ipv4(
    source: str,
    destination: str,
    protocol: int,
    body: bytes,
    *,
    ttl: int = 8,
    tos: int = 0,
    identification: int = 0,
    dont_fragment: bool = False,
    more_fragments: bool = False,
    fragment_offset: int = 0,  # in units of 8 bytes
    options: bytes = b"",
    ip_version: int = 4,
    ip_header_words: int | None = None,
    ip_length: int | None = None,
    ip_checksum: int | None = None,
    source_mac: str = SOURCE_MAC,
    destination_mac: str | None = None,
    vlan: int | None = None,  # TCI
    ethertype: int = ETHERTYPE_IPV4,
) -> bytes:
    """A frame around `body`. The MAC address of a group is derived; for a unicast address give the host's."""
    if destination_mac is None:
        if not ipaddress.IPv4Address(destination).is_multicast:
            raise ValueError(f"{destination} is unicast: a destination_mac is needed")
        destination_mac = multicast_mac(destination)
    words = 5 + (len(options) + 3) // 4
    fragment = (
        (FLAG_DONT_FRAGMENT if dont_fragment else 0)
        | (FLAG_MORE_FRAGMENTS if more_fragments else 0)
        | (fragment_offset & FRAGMENT_OFFSET_MASK)
    )
    header = bytearray(4 * words)
    IPV4.pack_into(
        *(header, 0),
        ip_version << 4 | (words if ip_header_words is None else ip_header_words),
        tos,
        4 * words + len(body) if ip_length is None else ip_length,
        identification,
        fragment,
        ttl,
        protocol,
        0,
        ipaddress.IPv4Address(source).packed,
        ipaddress.IPv4Address(destination).packed,
    )
    header[IPV4.size : IPV4.size + len(options)] = options
    struct.pack_into("!H", header, 10, internet_checksum(bytes(header)) if ip_checksum is None else ip_checksum)
    tag = b"" if vlan is None else struct.pack("!HH", ETHERTYPE_VLAN, vlan)
    return _mac(destination_mac) + _mac(source_mac) + tag + struct.pack("!H", ethertype) + bytes(header) + body


def udp_segment(
    source: str,
    destination: str,
    source_port: int,
    destination_port: int,
    payload: bytes,
    *,
    udp_length: int | None = None,
    udp_checksum: int | None = None,
) -> bytes:
    """UDP header and payload; the addresses are for the checksum. For fragments, cut this into bodies."""
    length = UDP.size + len(payload) if udp_length is None else udp_length
    if udp_checksum is None:
        pseudo_header = ipaddress.IPv4Address(source).packed + ipaddress.IPv4Address(destination).packed
        pseudo_header += struct.pack("!HH", PROTOCOL_UDP, length & 0xFFFF)
        header = UDP.pack(source_port, destination_port, length, 0)
        # A computed zero is sent as its other representation: zero itself means "none".
        udp_checksum = internet_checksum(pseudo_header + header + payload) or 0xFFFF
    return UDP.pack(source_port, destination_port, length, udp_checksum) + payload


def ethernet_ipv4_udp(
    source: str,
    destination: str,
    source_port: int,
    destination_port: int,
    payload: bytes = b"",
    *,
    ttl: int = 8,
    udp_length: int | None = None,
    udp_checksum: int | None = None,  # 0: none
    identification: int = 0,
    dont_fragment: bool = False,
    options: bytes = b"",
    ip_version: int = 4,
    ip_header_words: int | None = None,
    ip_length: int | None = None,
    ip_checksum: int | None = None,
    source_mac: str = SOURCE_MAC,
    destination_mac: str | None = None,
    vlan: int | None = None,
) -> bytes:
    """A frame with one UDP datagram, correct but for what is given explicitly."""
    segment = udp_segment(
        *(source, destination, source_port, destination_port, payload),
        udp_length=udp_length,
        udp_checksum=udp_checksum,
    )
    return ethernet_ipv4(
        *(source, destination, PROTOCOL_UDP, segment),
        ttl=ttl,
        identification=identification,
        dont_fragment=dont_fragment,
        options=options,
        ip_version=ip_version,
        ip_header_words=ip_header_words,
        ip_length=ip_length,
        ip_checksum=ip_checksum,
        source_mac=source_mac,
        destination_mac=destination_mac,
        vlan=vlan,
    )


def igmp_query(
    source: str,
    group: str = "0.0.0.0",
    *,
    version: int = 3,
    max_response_code: int = 10,
    checksum: int | None = None,
) -> bytes:
    """A frame with a general query or one for `group`: hosts answer with reports, of the query's version."""
    body = struct.pack("!BBH4s", IGMP_QUERY, max_response_code, 0, ipaddress.IPv4Address(group).packed)
    if version == 3:
        body += bytes((2, 125, 0, 0))  # robustness 2, query interval 125 s, no sources
    value = internet_checksum(body) if checksum is None else checksum
    body = body[:2] + value.to_bytes(2) + body[4:]
    destination = "224.0.0.1" if group == "0.0.0.0" else group
    return ethernet_ipv4(source, destination, PROTOCOL_IGMP, body, ttl=1, tos=0xC0, options=ROUTER_ALERT)


def _mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))

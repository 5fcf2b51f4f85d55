"""Sightings: frames that came in, as facts for a diagnosis.

Reads what a relay and the network around it turn on: whom a frame was for, its VLAN, addresses and port, TTL, length,
checksums, and questions of IGMP and MLD queriers. Takes damaged frames as they are: what cannot be read is left out. It
is slow and looks at seconds, where native/packet.c is fast and looks at all. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Final, Literal

from mcrelay.facts import Arrival, Flow, FlowKey, Querier, Sightings
from mcrelay.rules import Address

FLOWS_MAX: Final = 2000  # distinct ones that are remembered
EXTENSIONS_MAX: Final = 8

ICMP6: Final = 58
IGMP: Final = 2
UDP: Final = 17
ESP: Final = 50
AH: Final = 51
FRAGMENT: Final = 44
EXTENSIONS: Final = (0, 43, 60)  # hop-by-hop, routing, destination options: all of one form
IGMP_QUERY: Final = 0x11
MLD_QUERY: Final = 130
PROTOCOLS: Final[dict[int, Literal["udp", "esp"]]] = {UDP: "udp", ESP: "esp"}


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame as a packet socket gives it, from the link-layer header on."""

    data: bytes
    network: int  # where the IP header begins
    interface: str
    arrival: Arrival
    vlan: int | None = None
    sums_checkable: bool = True  # nobody left them to a device, which has not filled them in yet


@dataclass(frozen=True, slots=True)
class _Packet:
    source: Address
    destination: Address
    protocol: int
    ttl: int
    length: int  # of the packet, as its header has it
    payload: bytes  # behind the IP headers, as far as it is there
    payload_length: int
    header_sum_wrong: bool
    is_fragment: bool
    offset: int  # of a fragment, in the datagram that it is of

    @property
    def is_first(self) -> bool:
        return not self.offset


def take(seen: Sightings, frame: Frame) -> None:
    """Account for one frame."""
    packet = _read(frame.data[frame.network :])
    if packet is None:
        return
    if packet.protocol in (IGMP, ICMP6):
        if querier := _querier(packet, frame.interface):
            seen.queriers.add(querier)
        return
    protocol = PROTOCOLS.get(packet.protocol)
    if protocol is None:
        return
    port = None
    if protocol == "udp" and packet.is_first and len(packet.payload) >= 8:
        port = int.from_bytes(packet.payload[2:4], "big")
    key = FlowKey(frame.interface, frame.vlan, packet.source, packet.destination, protocol, port)
    flow = seen.flows.get(key)
    if flow is None:
        if len(seen.flows) >= FLOWS_MAX:
            return
        flow = seen.flows[key] = Flow()
    _count(flow, frame, packet, protocol)


def _count(flow: Flow, frame: Frame, packet: _Packet, protocol: str) -> None:
    flow.packets += 1
    flow.ttl_min = min(flow.ttl_min, packet.ttl)
    flow.ttl_max = max(flow.ttl_max, packet.ttl)
    flow.length_max = max(flow.length_max, packet.length)
    flow.fragments += packet.is_fragment
    if packet.is_fragment:
        flow.fragmented_max = max(flow.fragmented_max, packet.offset + packet.payload_length)
    flow.arrivals.add(frame.arrival)
    if packet.destination.is_multicast and frame.network >= 14 and frame.data[:6] != multicast_mac(packet.destination):
        flow.wrong_macs.add(frame.data[:6].hex(":"))
    whole = len(packet.payload) >= packet.payload_length
    if frame.sums_checkable and whole and not packet.is_fragment:
        flow.checked += 1
        flow.bad_checksums += packet.header_sum_wrong or (protocol == "udp" and not _udp_sum_is_right(packet))


def multicast_mac(group: Address) -> bytes:
    """RFC 1112 section 6.4, RFC 2464 section 7."""
    if group.version == 4:
        return b"\x01\x00\x5e" + (int(group) & 0x7FFFFF).to_bytes(3, "big")
    return b"\x33\x33" + group.packed[12:]


def _read(data: bytes) -> _Packet | None:
    if not data:
        return None
    match data[0] >> 4:
        case 4:
            return _read_4(data)
        case 6:
            return _read_6(data)
    return None


def _read_4(data: bytes) -> _Packet | None:
    header = (data[0] & 15) * 4
    if header < 20 or len(data) < header:
        return None
    length = int.from_bytes(data[2:4], "big")
    fragment = int.from_bytes(data[6:8], "big")
    payload_length = max(0, length - header)
    return _Packet(
        source=IPv4Address(data[12:16]),
        destination=IPv4Address(data[16:20]),
        protocol=data[9],
        ttl=data[8],
        length=length,
        payload=data[header : header + payload_length],
        payload_length=payload_length,
        header_sum_wrong=_sum(data[:header]) != 0xFFFF,
        is_fragment=bool(fragment & 0x3FFF),
        offset=(fragment & 0x1FFF) * 8,
    )


def _read_6(data: bytes) -> _Packet | None:
    if len(data) < 40:
        return None
    length = 40 + int.from_bytes(data[4:6], "big")
    kind, at = data[6], 40
    is_fragment, offset = False, 0
    for _ in range(EXTENSIONS_MAX):
        if kind not in (*EXTENSIONS, FRAGMENT, AH) or len(data) < at + 8:
            break
        if kind == FRAGMENT:
            field = int.from_bytes(data[at + 2 : at + 4], "big")
            is_fragment, offset = bool(field & 0xFFF9), field & 0xFFF8  # the field's low bits are flags
            size = 8
        elif kind == AH:
            size = (data[at + 1] + 2) * 4
        else:
            size = (data[at + 1] + 1) * 8
        kind, at = data[at], at + size
        if offset:
            break
    return _Packet(
        source=IPv6Address(data[8:24]),
        destination=IPv6Address(data[24:40]),
        protocol=kind,
        ttl=data[7],
        length=length,
        payload=data[at:length],
        payload_length=max(0, length - at),
        header_sum_wrong=False,
        is_fragment=is_fragment,
        offset=offset,
    )


def _querier(packet: _Packet, interface: str) -> Querier | None:
    if not packet.payload or not packet.is_first:
        return None
    kind = packet.payload[0]
    if packet.protocol == IGMP and kind == IGMP_QUERY and packet.payload_length >= 8:
        version = 3 if packet.payload_length >= 12 else 2 if packet.payload[1:2] != b"\0" else 1
        return Querier(interface, packet.source, f"IGMPv{version}")
    if packet.protocol == ICMP6 and kind == MLD_QUERY and packet.payload_length >= 24:
        return Querier(interface, packet.source, f"MLDv{2 if packet.payload_length >= 28 else 1}")
    return None


def _udp_sum_is_right(packet: _Packet) -> bool:
    stated = packet.payload[6:8]
    if stated == b"\0\0":
        return packet.source.version == 4  # none was made, which IPv6 does not permit (RFC 8200 section 8.1)
    length = int.from_bytes(packet.payload[4:6], "big")
    pseudo = packet.source.packed + packet.destination.packed + length.to_bytes(4, "big") + UDP.to_bytes(4, "big")
    return _sum(pseudo + packet.payload[:length]) == 0xFFFF


def _sum(data: bytes) -> int:
    """The ones' complement sum (RFC 1071); 0xFFFF over data that hold their checksum."""
    if len(data) % 2:
        data += b"\0"
    # 2**16 is 1 modulo 0xFFFF: the number that all words are together leaves the remainder that their sum leaves.
    return int.from_bytes(data, "big") % 0xFFFF or 0xFFFF

"""Tapped packets: the records that data planes write of them, and the words for one of them.

Owns the layout of a record (native/tap.h has the same), and what a person reads: addresses out of a packet's own
headers, and what became of it. Packets are whatever a stranger put on the wire, cut off anywhere, so nothing of them is
shown but numbers and addresses that were made into text here. Knows nothing of sockets, clocks or terminals.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from mcrelay.api import OutputDrop, TappedPacket
from mcrelay.counters import DROP_REASONS
from mcrelay.documents import Packet, PacketHeaders

DROPS_MAX: Final = 8  # outputs of which a record says why no copy left
RECORD: Final = struct.Struct("=QQIIHHHHBB6x")
DROP: Final = struct.Struct("=II")
RECORD_BYTES: Final = RECORD.size + DROPS_MAX * DROP.size  # what stands before a packet's bytes

UDP: Final = 17
ESP: Final = 50
PROTOCOLS: Final = {UDP: "UDP", ESP: "ESP"}
EXTENSIONS: Final = {0, 43, 60}  # of IPv6: hop-by-hop and destination options, routing; 8 * (length + 1) bytes
FRAGMENT: Final = 44
AUTHENTICATION: Final = 51  # 4 * (length + 2) bytes
EXTENSIONS_MAX: Final = 8
HEX_ROW: Final = 16


@dataclass(slots=True)
class Record:
    """A record without the packet's bytes; native/tap.h says what each is."""

    time_ns: int
    length: int
    interface: int
    outputs: int
    datagrams: int = 1
    vlan: int = 0
    copies: int = 0
    reason: int = 0
    lost: int = 0
    dropped: list[tuple[int, int]] = field(default_factory=list)

    def pack(self) -> bytes:
        listed = self.dropped[:DROPS_MAX]
        head = RECORD.pack(
            *(self.time_ns, self.lost, self.length, self.copies, self.interface, self.vlan, self.datagrams),
            *(self.outputs, self.reason, len(listed)),
        )
        return (head + b"".join(DROP.pack(*drop) for drop in listed)).ljust(RECORD_BYTES, b"\0")


def read_record(data: bytes) -> tuple[Record, bytes]:
    """A record, and the packet's bytes behind it. ValueError if it is none."""
    if len(data) < RECORD_BYTES:
        raise ValueError(f"{len(data)} bytes are no record")
    time_ns, lost, length, copies, interface, vlan, datagrams, outputs, reason, drops = RECORD.unpack_from(data)
    dropped = [DROP.unpack_from(data, RECORD.size + n * DROP.size) for n in range(min(drops, DROPS_MAX))]
    record = Record(time_ns, length, interface, outputs, datagrams, vlan, copies, reason, lost, dropped)
    return record, data[RECORD_BYTES:]


def tapped_packet(
    record: Record, data: bytes, worker: int, interfaces: Mapping[int, str], outputs: Mapping[int, str]
) -> TappedPacket:
    """The same for a client. `interfaces` are the names by slot, `outputs` the texts by counter."""
    return TappedPacket(
        time_ns=record.time_ns,
        worker=worker,
        interface=interfaces.get(record.interface, f"slot {record.interface}"),
        vlan=record.vlan,
        length=record.length,
        datagrams=record.datagrams,
        outputs=record.outputs,
        copies=record.copies,
        verdict=_reason(record.reason) if record.reason else "forwarded",
        dropped=tuple(
            OutputDrop(output=outputs.get(counter, f"counter {counter}"), reason=_reason(reason))
            for counter, reason in record.dropped
        ),
        data=data,
    )


def _reason(number: int) -> str:
    return DROP_REASONS[number] if number < len(DROP_REASONS) else f"reason {number}"


# --- headers ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Headers:
    """What a packet says of itself, as far as it is there."""

    source: IPv4Address | IPv6Address
    destination: IPv4Address | IPv6Address
    ttl: int
    dscp: int
    protocol: int
    source_port: int | None = None  # of UDP
    destination_port: int | None = None
    payload_at: int | None = None  # where the payload begins


def read_headers(data: bytes) -> Headers | None:
    """None if not even the addresses are there."""
    version = data[0] >> 4 if data else 0
    if version == 4 and len(data) >= 20:
        source: IPv4Address | IPv6Address = IPv4Address(data[12:16])
        destination: IPv4Address | IPv6Address = IPv4Address(data[16:20])
        ttl, dscp, protocol, at = data[8], data[1] >> 2, data[9], (data[0] & 15) * 4
    elif version == 6 and len(data) >= 40:
        source, destination = IPv6Address(data[8:24]), IPv6Address(data[24:40])
        ttl, dscp = data[7], (data[0] & 15) << 2 | data[1] >> 6
        protocol, at = _behind_extensions(data, data[6], 40)
    else:
        return None
    if protocol == UDP and len(data) >= at + 8:
        ports = struct.unpack_from("!HH", data, at)
        return Headers(source, destination, ttl, dscp, protocol, ports[0], ports[1], at + 8)
    return Headers(source, destination, ttl, dscp, protocol, payload_at=at if protocol == ESP else None)


def _behind_extensions(data: bytes, protocol: int, at: int) -> tuple[int, int]:
    for _ in range(EXTENSIONS_MAX):
        if protocol not in EXTENSIONS | {FRAGMENT, AUTHENTICATION} or len(data) < at + 8:
            break
        length = data[at + 1]
        size = 8 if protocol == FRAGMENT else 4 * (length + 2) if protocol == AUTHENTICATION else 8 * (length + 1)
        protocol, at = data[at], at + size
    return protocol, at


def _end(address: IPv4Address | IPv6Address, port: int | None) -> str:
    text = f"[{address}]" if address.version == 6 and port is not None else str(address)
    return text if port is None else f"{text}:{port}"


# --- words -----------------------------------------------------------------------------------------------------------


def verdict_text(packet: TappedPacket) -> str:
    """What became of it, in a phrase."""
    reasons = ", ".join(f"{drop.output}: {drop.reason}" for drop in packet.dropped)
    if packet.verdict != "forwarded":
        several = f" ({reasons})" if packet.outputs > 1 and reasons else ""
        return f"dropped: {packet.verdict}{several}"
    if packet.copies % packet.datagrams:
        share = f"{packet.copies} of {packet.outputs * packet.datagrams} copies forwarded"
    else:
        noun = "output" if packet.outputs == 1 else "outputs"
        share = f"forwarded to {packet.copies // packet.datagrams} of {packet.outputs} {noun}"
    return f"{share} ({reasons})" if reasons else share


def packet_line(packet: TappedPacket) -> str:
    """One line of a packet, but for its time."""
    headers = read_headers(packet.data)
    words = [packet.interface]
    if headers:
        source, destination = (
            _end(headers.source, headers.source_port),
            _end(headers.destination, headers.destination_port),
        )
        words.append(f"{source} > {destination}")
        if headers.protocol != UDP:
            words.append(PROTOCOLS.get(headers.protocol, f"protocol {headers.protocol}"))
        words.append(f"ttl {headers.ttl}")
    if packet.vlan:
        words.append(f"vlan {packet.vlan}")
    words.append(f"length {packet.length}")
    if packet.datagrams > 1:
        words.append(f"datagrams {packet.datagrams}")
    return f"{' '.join(words)}: {verdict_text(packet)}"


def packet_facts(packet: TappedPacket) -> Packet:
    """The same for programs, with the packet's bytes in hexadecimal."""
    headers = read_headers(packet.data)
    read: PacketHeaders = {}
    if headers:
        read = {
            "source": str(headers.source),
            "source_port": headers.source_port,
            "destination": str(headers.destination),
            "destination_port": headers.destination_port,
            "protocol": headers.protocol,
            "ttl": headers.ttl,
            "dscp": headers.dscp,
        }
    return {
        "time_ns": packet.time_ns,
        "worker": packet.worker,
        "interface": packet.interface,
        **read,
        "vlan": packet.vlan,
        "length": packet.length,
        "datagrams": packet.datagrams,
        "verdict": packet.verdict,
        "outputs": packet.outputs,
        "copies": packet.copies,
        "dropped": [{"output": drop.output, "reason": drop.reason} for drop in packet.dropped],
        "data": packet.data.hex(),
    }


def payload_lines(data: bytes) -> Iterator[str]:
    """The payload as far as it is there, 16 bytes a line, in hexadecimal and in those characters that are printable."""
    headers = read_headers(data)
    payload = data[headers.payload_at :] if headers and headers.payload_at is not None else data
    for at in range(0, len(payload), HEX_ROW):
        row = payload[at : at + HEX_ROW]
        shown = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
        yield f"    {at:04x}  {row.hex(' '):<{3 * HEX_ROW - 1}}  {shown}"

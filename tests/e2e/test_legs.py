"""Every leg that a rule can have: a packet in, the exact bytes out, and the packet that must not come out.

sender 203.0.113.10, 2001:db8:a::10 --- in0 relay out0 --- receiver   198.51.100.2, 2001:db8:0::2
                                                  out1 --- receiver1  10.1.0.2, 2001:db8:1::2

What is sent and what is expected is written with scapy, so another implementation of the headers than ours. Two fields
are the kernel's where mcrelay leaves them to it: the IPv4 identification, and the source port (Any below); they are
taken from what came, and then all bytes have to be equal, checksums included.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from ipaddress import ip_address
from socket import (
    AF_INET,
    AF_INET6,
    IP_ADD_MEMBERSHIP,
    IPPROTO_IP,
    IPPROTO_IPV6,
    IPV6_JOIN_GROUP,
    SOCK_DGRAM,
    inet_aton,
    inet_pton,
)
from typing import Any, Final

import pytest
from scapy.layers.inet import IP, UDP, fragment
from scapy.layers.inet6 import (
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
    PadN,
    fragment6,
)
from scapy.layers.l2 import Dot1Q, Ether
from scapy.packet import Packet, Raw

from lab.capture import Capture, Frame, inject
from lab.daemon import Daemon
from lab.frames import multicast_mac
from lab.namespaces import Lab, unsupported, wait_until
from lab.topology import RelayLine, relay_line
from mcrelay.rules import Rule
from mcrelay.ruletext import parse_input
from tests.engines.packets import reassembled

SENDER, SENDER6 = "203.0.113.10", "2001:db8:a::10"
OTHER, OTHER6 = "203.0.113.11", "2001:db8:a::11"
RELAY = {"in0": "192.0.2.1", "out0": "198.51.100.1", "out1": "10.1.0.1"}
RELAY6 = {"in0": "2001:db8:b::1", "out0": "2001:db8:0::1", "out1": "2001:db8:1::1"}
ANY: Final = 0  # source port: the kernel's choice
MARK: Final = b"mcrelay legs "
DEADLINE_S = 10.0


def v4(
    destination: str, port: int = 5000, *, source: str = SENDER, ttl: int = 8, sport: int = 4000, **more: Any
) -> Packet:
    size = more.pop("size", 100)
    tos = more.pop("tos", 0)
    data = (MARK + bytes(range(256)) * (size // 256 + 1))[:size]
    return IP(src=source, dst=destination, ttl=ttl, tos=tos, **more) / UDP(sport=sport, dport=port) / Raw(data)


def v6(
    destination: str, port: int = 5000, *, source: str = SENDER6, ttl: int = 8, sport: int = 4000, **more: Any
) -> Packet:
    size = more.pop("size", 100)
    tos = more.pop("tos", 0)
    headers = more.pop("headers", [])
    data = (MARK + bytes(range(256)) * (size // 256 + 1))[:size]
    packet = IPv6(src=source, dst=destination, hlim=ttl, tc=tos, **more)
    for header in headers:
        packet = packet / header
    return packet / UDP(sport=sport, dport=port) / Raw(data)


def esp(packet: Packet, spi: int = 0x1234) -> Packet:
    """ESP with anything in it (RFC 4303: SPI, sequence number, and what is encrypted)."""
    payload = spi.to_bytes(4, "big") + (7).to_bytes(4, "big") + MARK + bytes(64)
    if packet.version == 4:
        return IP(src=packet.src, dst=packet.dst, ttl=packet.ttl, proto=50) / Raw(payload)
    return IPv6(src=packet.src, dst=packet.dst, hlim=packet.hlim, nh=50) / Raw(payload)


def tagged(packet: Packet, vlan: int) -> Packet:
    return Dot1Q(vlan=vlan) / packet


@dataclass(frozen=True)
class Leg:
    """`rules`: input and outputs each. `sent` by the sender, in order. `out`: what leaves by out0 and out1, exactly."""

    rules: Sequence[tuple[str, str]]
    sent: Sequence[Packet]
    out0: Sequence[Packet] = ()
    out1: Sequence[Packet] = ()
    dropped: dict[str, int] | None = None  # reasons of the workers, and how many


G, H = "239.1.1.1", "239.2.2.2"
G6, H6 = "ff05::101", "ff08::202"
R0, R1 = RELAY["out0"], RELAY["out1"]
R06, R16 = RELAY6["out0"], RELAY6["out1"]


def plain(destination: str, port: int = 6000, **more: Any) -> Packet:
    """A copy as the kernel sends it from out0."""
    return v4(destination, port, **{"source": R0, "sport": ANY, "ttl": 7, **more})


def plain6(destination: str, port: int = 6000, **more: Any) -> Packet:
    return v6(destination, port, **{"source": R06, "sport": ANY, "ttl": 7, **more})


LEGS: dict[str, Leg] = {
    # --- IPv4, outputs
    "another group and port": Leg(
        [(f"{G}:5000%in0", f"{H}:6000%out0")], [v4(G), v4(G, 5001), v4("239.1.1.2")], [plain(H)]
    ),
    "a unicast output": Leg([(f"{G}:5000%in0", "198.51.100.2:6000%out0")], [v4(G)], [plain("198.51.100.2")]),
    "two outputs": Leg(
        [(f"{G}:5000%in0", f"{H}:6000%out0 {H}:7000%out1")],
        [v4(G)],
        [plain(H)],
        [plain(H, 7000, source=R1)],
    ),
    "the directed broadcast": Leg([(f"{G}:5000%in0", "198.51.100.255:6000%out0")], [v4(G)], [plain("198.51.100.255")]),
    "the limited broadcast": Leg([(f"{G}:5000%in0", "255.255.255.255:6000%out0")], [v4(G)], [plain("255.255.255.255")]),
    "the packet's own destination": Leg([(f"{G}:5000%in0", "=:=%out0")], [v4(G)], [plain(G, 5000)]),
    "a TTL of 1 passes": Leg([(f"{G}:5000%in0", f"{H}:6000%out0")], [v4(G, ttl=1)], [plain(H, ttl=1)]),
    "a TTL that is set": Leg([(f"{G}:5000%in0", f"{H}:6000%out0,ttl=99")], [v4(G)], [plain(H, ttl=99)]),
    "a TTL that is kept": Leg([(f"{G}:5000%in0", f"{H}:6000%out0,ttl=keep")], [v4(G)], [plain(H, ttl=8)]),
    "DSCP is kept, ECN is not": Leg([(f"{G}:5000%in0", f"{H}:6000%out0")], [v4(G, tos=0xBA)], [plain(H, tos=0xB8)]),
    "DSCP that is set": Leg([(f"{G}:5000%in0", f"{H}:6000%out0,dscp=af41")], [v4(G, tos=4)], [plain(H, tos=34 << 2)]),
    "DSCP that is cleared": Leg([(f"{G}:5000%in0", f"{H}:6000%out0,dscp=0")], [v4(G, tos=0xB8)], [plain(H)]),
    "a source that is set": Leg(
        [(f"{G}:5000%in0", f"{H}:6000%out0,source=192.0.2.77")], [v4(G)], [plain(H, source="192.0.2.77")]
    ),
    "a source that is kept": Leg(
        [(f"{G}:5000%in0", f"{H}:6000%out0,source=keep")], [v4(G)], [plain(H, source=SENDER, sport=4000)]
    ),
    "a source that is kept, its port not": Leg(
        [(f"{G}:5000%in0", f"{H}:6000%out0,source=keep,sport=9")], [v4(G)], [plain(H, source=SENDER, sport=9)]
    ),
    "a source port that is set": Leg([(f"{G}:5000%in0", f"{H}:6000%out0,sport=5353")], [v4(G)], [plain(H, sport=5353)]),
    "a source port that is kept": Leg(
        [(f"{G}:5000%in0", f"{H}:6000%out0,sport=keep,dscp=ef")], [v4(G)], [plain(H, sport=4000, tos=46 << 2)]
    ),
    "a source that is kept, to unicast": Leg(
        [(f"{G}:5000%in0", "198.51.100.2:6000%out0,source=keep")],
        [v4(G)],
        [plain("198.51.100.2", source=SENDER, sport=4000)],
    ),
    "a source that is kept, to the broadcast": Leg(
        [(f"{G}:5000%in0", "255.255.255.255:6000%out0,source=keep")],
        [v4(G)],
        [plain("255.255.255.255", source=SENDER, sport=4000)],
    ),
    "many of one flow, their source kept": Leg(
        [(f"{G}:5000%in0", f"{H}:6000%out0,source=keep")],
        [v4(G, size=200 + n // 4) for n in range(12)],
        [plain(H, source=SENDER, sport=4000, size=200 + n // 4) for n in range(12)],
    ),
    "an output that is paused": Leg(
        [(f"{G}:5000%in0", f"{H}:6000%out0,paused {H}:6000%out1")],
        [v4(G)],
        [],
        [plain(H, source=R1)],
    ),
    "nothing but a paused output": Leg([(f"{G}:5000%in0", f"{H}:6000%out0,paused")], [v4(G)], dropped={"paused": 1}),
    "a rate": Leg(
        [(f"{G}:5000%in0", f"{H}:6000%out0,rate=1pps")],
        [v4(G)] * 30,
        [plain(H)] * 16,
        dropped={"egress_limited": 14},
    ),
    # --- IPv4, inputs
    "one source of a group": Leg(
        [(f"{SENDER}@232.1.1.1:5000%in0", f"{H}:6000%out0")],
        [v4("232.1.1.1"), v4("232.1.1.1", source=OTHER)],
        [plain(H)],
    ),
    "(S,G) beside (*,G)": Leg(
        [(f"{SENDER}@{G}:5000%in0", f"{H}:6000%out0"), (f"{G}:5000%in0", f"{H}:6000%out1")],
        [v4(G), v4(G, source=OTHER)],
        [plain(H)],
        [plain(H, source=R1)],
    ),
    "a prefix of groups": Leg(
        [("239.1.0.0/16:5000%in0", "=:6000%out0")],
        [v4("239.1.7.7"), v4("239.2.7.7"), v4("239.1.7.7", 5001)],
        [plain("239.1.7.7")],
    ),
    "any port": Leg(
        [(f"{G}:*%in0", f"{H}:=%out0")],
        [v4(G, 5001), v4(G, 6), v4("239.1.1.2", 6)],
        [plain(H, 5001), plain(H, 6)],
    ),
    "a prefix onto a prefix": Leg(
        [("239.1.0.0/16:*%in0", "239.77.0.0/16:=%out0")],
        [v4("239.1.7.8"), v4("239.1.255.1", 9)],
        [plain("239.77.7.8", 5000), plain("239.77.255.1", 9)],
    ),
    "the most specific rule": Leg(
        [
            ("239.0.0.0/8:*%in0", "198.51.100.2:1%out0"),
            ("239.1.0.0/16:*%in0", "198.51.100.2:2%out0"),
            ("239.1.0.0/16:5000%in0", "198.51.100.2:3%out0"),
            (f"{SENDER}@239.1.0.0/16:*%in0", "198.51.100.2:4%out0"),
            (f"{G}:*%in0", "198.51.100.2:5%out0"),
            (f"{G}:5000%in0", "198.51.100.2:6%out0"),
        ],
        [
            v4("239.9.9.9"),
            v4("239.1.1.2", 9, source=OTHER),
            v4("239.1.1.2", source=OTHER),
            v4("239.1.1.2"),
            v4(G, 9),
            v4(G),
        ],
        [plain("198.51.100.2", port) for port in range(1, 7)],
    ),
    "unicast to this host": Leg(
        [("192.0.2.1:5000%in0", f"{H}:6000%out0")], [v4("192.0.2.1"), v4("192.0.2.1", 5001)], [plain(H)]
    ),
    "a broadcast to this host": Leg(
        [("255.255.255.255:5000%in0", f"{H}:6000%out0"), ("192.0.2.255:5000%in0", f"{H}:7000%out0")],
        [v4("255.255.255.255"), v4("192.0.2.255")],
        [plain(H), plain(H, 7000)],
    ),
    "a VLAN": Leg(
        [(f"{G}:5000%in0,vlan=7", f"{H}:6000%out0"), (f"{G}:5000%in0", f"{H}:7000%out0")],
        [tagged(v4(G), 7), tagged(v4(G), 8), v4(G)],
        [plain(H), plain(H, 7000)],
    ),
    "interfaces by pattern": Leg([(f"{G}:5000%in+", f"{H}:6000%out0")], [v4(G)], [plain(H)]),
    "a name before a pattern": Leg(
        [(f"{G}:5000%i+", f"{H}:6%out0"), (f"{G}:5000%in0", f"{H}:7%out0"), (f"{G}:5000%in+", f"{H}:8%out0")],
        [v4(G)],
        [plain(H, 7)],
    ),
    "ESP to a group": Leg(
        [(f"{G}:esp%in0", f"{H}:esp%out0")],
        [esp(v4(G)), v4(G)],
        [esp(plain(H))],
    ),
    "ESP to a host": Leg(
        [(f"{G}:esp%in0", "198.51.100.2:esp%out0,source=keep")],
        [esp(v4(G))],
        [esp(plain("198.51.100.2", source=SENDER))],
    ),
    # --- IPv6
    "IPv6: another group and port": Leg(
        [(f"[{G6}]:5000%in0", f"[{H6}]:6000%out0")], [v6(G6), v6(G6, 5001), v6("ff05::102")], [plain6(H6)]
    ),
    "IPv6: a unicast output": Leg(
        [(f"[{G6}]:5000%in0", "[2001:db8:0::2]:6000%out0")], [v6(G6)], [plain6("2001:db8:0::2")]
    ),
    "IPv6: a hop limit of 1 passes, and DSCP": Leg(
        [(f"[{G6}]:5000%in0", f"[{H6}]:6000%out0 [{H6}]:7000%out0,ttl=9,dscp=ef")],
        [v6(G6, ttl=1, tos=0x2B)],
        [plain6(H6, ttl=1, tos=0x28), plain6(H6, 7000, ttl=9, tos=46 << 2)],
    ),
    "IPv6: a source that is set": Leg(
        [(f"[{G6}]:5000%in0", f"[{H6}]:6000%out0,source=2001:db8:77::7")],
        [v6(G6)],
        [plain6(H6, source="2001:db8:77::7")],
    ),
    "IPv6: a source that is kept": Leg(
        [(f"[{G6}]:5000%in0", f"[{H6}]:6000%out0,source=keep [2001:db8:0::2]:=%out0,source=keep")],
        [v6(G6)],
        [
            plain6(H6, source=SENDER6, sport=4000),
            plain6("2001:db8:0::2", 5000, source=SENDER6, sport=4000),
        ],
    ),
    "IPv6: a source port that is set": Leg(
        [(f"[{G6}]:5000%in0", f"[{H6}]:6000%out0,sport=5353")], [v6(G6)], [plain6(H6, sport=5353)]
    ),
    "IPv6: one source, a prefix and any port": Leg(
        [
            (f"[{SENDER6}]@[ff35::9]:5000%in0", f"[{H6}]:1%out0"),
            ("[ff05::]/16:*%in0", "[ff18::]/16:=%out0"),
        ],
        [v6("ff35::9"), v6("ff35::9", source=OTHER6), v6("ff05::7:7", 9)],
        [plain6(H6, 1), plain6("ff18::7:7", 9)],
    ),
    "IPv6: unicast to this host": Leg(
        [(f"[{RELAY6['in0']}]:5000%in0", f"[{H6}]:6000%out0")], [v6(RELAY6["in0"])], [plain6(H6)]
    ),
    "IPv6: extension headers": Leg(
        [(f"[{G6}]:5000%in0", f"[{H6}]:6000%out0")],
        [
            v6(G6, headers=[IPv6ExtHdrHopByHop(options=[PadN(optdata=b"1234")]), IPv6ExtHdrDestOpt()]),
            v6(G6, headers=[IPv6ExtHdrRouting(segleft=0)]),
            v6(G6, headers=[IPv6ExtHdrRouting(segleft=1, addresses=["2001:db8::9"])]),
            v6(G6, headers=[IPv6ExtHdrFragment(offset=0, m=0)]),
        ],
        [plain6(H6)] * 3,
        dropped={"bad_extension": 1},
    ),
    "IPv6: a VLAN and ESP": Leg(
        [(f"[{G6}]:5000%in0,vlan=7", f"[{H6}]:6000%out0"), (f"[{G6}]:esp%in0", f"[{H6}]:esp%out0")],
        [tagged(v6(G6), 7), v6(G6), esp(v6(G6))],
        [plain6(H6), esp(plain6(H6))],
    ),
    "from IPv4 to IPv6 and back": Leg(
        [(f"{G}:5000%in0", f"[{H6}]:6000%out0"), (f"[{G6}]:5000%in0", f"{H}:6000%out0")],
        [v4(G, ttl=5, tos=0xB8), v6(G6)],
        [plain6(H6, ttl=4, tos=0xB8), plain(H)],
    ),
}


# --- the course of a case --------------------------------------------------------------------------------------------


class Course:
    """One daemon for all cases, which come one after the other."""

    def __init__(self, line: RelayLine, daemon: Daemon) -> None:
        self.line = line
        self.daemon = daemon
        self.client = daemon.client()
        self.workers = len([p for p in self.client.workers() if p.role == "data"])
        self.ends = self._add_ends()

    def _add_ends(self) -> list[Packet]:
        """A packet for each worker, that leaves by both outputs; when it is there, what went before is through."""
        ends: dict[int, Packet] = {}
        for port in range(40000, 40100):
            text = f"239.255.0.1:{port}%in0"
            (owner,) = Rule(parse_input(text), ()).owners(self.workers)
            if owner not in ends:
                self.client.add(text, ["=:=%out0", "=:=%out1"], f"end-{owner}")
                ends[owner] = v4("239.255.0.1", port)
        return list(ends.values())

    def send(self, packets: Sequence[Packet]) -> None:
        inject(self.line.sender, "eth0", *(bytes(self._framed(packet)) for packet in packets))

    def _framed(self, packet: Packet) -> Packet:
        inner = packet.payload if isinstance(packet, Dot1Q) else packet
        if inner.version == 6 and inner.dst.startswith("ff"):
            mac = "33:33:" + ":".join(f"{byte:02x}" for byte in bytes(inner)[36:40])
        elif inner.version == 4 and inner.dst.startswith(("22", "23")):
            mac = multicast_mac(inner.dst)
        elif inner.version == 4 and inner.dst.endswith("255"):
            mac = "ff:ff:ff:ff:ff:ff"
        else:
            mac = self.line.relay.mac("in0")
        return Ether(src=self.line.sender.mac("eth0"), dst=mac) / packet

    def remove_all(self) -> None:
        """All rules but those for the ends."""
        rules = self.client.rules()
        self.client.change(remove=[rule.id for rule in rules if not (rule.name or "").startswith("end-")])

    def dropped(self) -> dict[str, int]:
        counted: dict[str, int] = {}
        for worker in self.client.stats().workers:
            for reason, packets in worker.dropped.items():
                counted[reason] = counted.get(reason, 0) + packets
        return counted


@pytest.fixture(scope="module")
def course() -> Iterator[Course]:
    if reason := unsupported():
        pytest.skip(reason)
    with Lab() as lab:
        line = relay_line(lab, outputs=2, offloads=False, ipv6=True)
        for egress in line.egresses:  # so that no datagram waits for an address
            relay, receiver = line.relay, egress.receiver
            mac = receiver.mac("eth0")
            for address in (egress.receiver_address, egress.receiver_address6):
                relay.ip("neighbour", "replace", address, "lladdr", mac, "dev", egress.interface)
        with Daemon(line.relay, "--debug") as daemon:
            made = Course(line, daemon)
            yield made
            made.client.close()


@pytest.mark.parametrize("name", LEGS)
def test_what_goes_in_comes_out_as_the_rule_says(course: Course, name: str) -> None:
    leg = LEGS[name]
    before = course.dropped()
    change = course.client.change(add=[(given, outputs.split(), None) for given, outputs in leg.rules])
    assert change.added == len(leg.rules)
    try:
        _comes_out(course, leg)
    finally:
        course.remove_all()
    grown = {reason: n - before.get(reason, 0) for reason, n in course.dropped().items()}
    for reason, packets in (leg.dropped or {}).items():
        assert grown.pop(reason, 0) == packets
    # Of packets that no rule wanted, where the filter let them through.
    assert {reason for reason, n in grown.items() if n} <= {"no_rule", "vlan_tagged"}
    _stops(course, leg)


def _comes_out(course: Course, leg: Leg) -> None:
    """Send, and compare what comes."""
    with ExitStack() as stack:
        captures = [stack.enter_context(Capture(e.receiver, e.receiver_interface)) for e in course.line.egresses]
        course.send([*leg.sent, *course.ends])
        for capture, expected in zip(captures, (leg.out0, leg.out1), strict=True):
            _wait_for_ends(capture, course)
            came = sorted((frame.data[14:] for frame in capture.frames if _is_copy(frame)), key=_port)
            pairs = [
                (packet, came[n] if n < len(came) else b"") for n, packet in enumerate(sorted(expected, key=_dport))
            ]
            assert [_explain(data) for data in came] == [_explain(_exact(packet, data)) for packet, data in pairs]
            assert came == [_exact(packet, data) for packet, data in pairs]


def _stops(course: Course, leg: Leg) -> None:
    """The rules are gone: nothing comes any more."""
    with ExitStack() as stack:
        captures = [stack.enter_context(Capture(e.receiver, e.receiver_interface)) for e in course.line.egresses]
        course.send([*leg.sent[:3], *course.ends])
        for capture in captures:
            _wait_for_ends(capture, course)
            assert not capture.matching(_is_copy)


def _wait_for_ends(capture: Capture, course: Course) -> None:
    def all_there() -> bool:
        return len(capture.matching(lambda frame: _is_end(frame.data))) >= len(course.ends)

    wait_until(all_there, DEADLINE_S, "what was sent last did not arrive")


def _is_end(data: bytes) -> bool:
    return data[30:34] == bytes([239, 255, 0, 1])


def _is_copy(frame: Frame) -> bool:
    return not frame.outgoing and MARK in frame.data and not _is_end(frame.data)


def _port(data: bytes) -> bytes:
    """Destination port: workers have an order of their own each, and flows with different ports may be theirs."""
    at = 20 if data[0] >> 4 == 4 else 40
    return data[at + 2 : at + 4]


def _dport(packet: Packet) -> bytes:
    return _port(bytes(packet))


def _exact(expected: Packet, came: bytes) -> bytes:
    """All bytes of what is expected, with the kernel's choices taken from what came."""
    packet = expected.copy()
    if packet.version == 4 and len(came) >= 28:
        packet.id = int.from_bytes(came[4:6], "big")
        packet.flags = "DF" if came[6] & 0x40 else 0
        udp_at = 20
    else:
        packet.fl = int.from_bytes(came[1:4], "big") & 0xFFFFF
        udp_at = 40
    if UDP in packet and packet[UDP].sport == ANY:
        packet[UDP].sport = int.from_bytes(came[udp_at : udp_at + 2], "big")
    return bytes(packet)


def _explain(data: bytes) -> str:
    return (IPv6 if data[:1] and data[0] >> 4 == 6 else IP)(data).summary() if data else "nothing"


# --- datagrams in fragments ------------------------------------------------------------------------------------------


def in_fragments(packet: Packet, identification: int) -> list[Packet]:
    if packet.version == 4:
        packet.id = identification
        return list(fragment(packet, 1400))  # type: ignore[no-untyped-call]
    cut = IPv6(bytes(packet))
    header = IPv6ExtHdrFragment(id=identification)
    whole = IPv6(src=cut.src, dst=cut.dst, hlim=cut.hlim) / header / cut.payload
    return list(fragment6(whole, 1400))  # type: ignore[no-untyped-call]


def _joined(capture: Capture) -> list[tuple[str, str, int, bytes]]:
    """Source, destination, TTL and body of what came in fragments."""
    parts: dict[tuple[bytes, bytes], list[bytes]] = {}
    for frame in capture.matching(lambda frame: not frame.outgoing):
        data = frame.data[14:]
        if data[0] >> 4 == 6 and data[6] == 44:
            parts.setdefault((data[8:40], data[44:48]), []).append(data)
        elif data[0] >> 4 == 4 and int.from_bytes(data[6:8]) & 0x3FFF:
            parts.setdefault((data[12:20], data[4:6]), []).append(data)
    heads = [(IPv6 if packets[0][0] >> 4 == 6 else IP)(packets[0]) for packets in parts.values()]
    return [
        (head.src, head.dst, head.hlim if head.version == 6 else head.ttl, reassembled(packets))
        for head, packets in zip(heads, parts.values(), strict=True)
    ]


@pytest.mark.parametrize("order", ["forwards", "backwards", "mixed"])
def test_datagrams_in_fragments_are_relayed_whole(course: Course, order: str) -> None:
    """Of 8 and 60 KB, IPv6 and IPv4: by a socket of UDP, and with the source kept, where mcrelay cuts them."""
    rules = [
        (f"[{G6}]:5000%in0", [f"[{H6}]:6000%out0", f"[{H6}]:6000%out1,source=keep"], None),
        (f"{G}:5000%in0", [f"{H}:6000%out0", f"{H}:6000%out1,source=keep"], None),
    ]
    packets = [in_fragments(v6(G6, size=size), size) for size in (8000, 60000)]
    packets.append(in_fragments(v4(G, size=60000), 60))
    sent = [piece for pieces in packets for piece in pieces]
    if order == "backwards":
        sent.reverse()
    elif order == "mixed":
        random.Random(1).shuffle(sent)
    before = course.dropped()
    with ExitStack() as stack:
        captures = [stack.enter_context(Capture(e.receiver, e.receiver_interface)) for e in course.line.egresses]
        course.client.change(add=rules)
        course.send([*sent, *course.ends])
        for capture in captures:
            _wait_for_ends(capture, course)
        course.remove_all()
        for capture, kept in zip(captures, (False, True), strict=True):
            from6, from4 = (SENDER6, SENDER) if kept else (R06, R0)
            came = sorted(_joined(capture), key=lambda one: (one[1], len(one[3])))
            ports = [4000 if kept else int.from_bytes(body[:2]) for *_head, body in came]
            assert [one[:3] for one in came] == [(from4, H, 7), *[(str(ip_address(from6)), H6, 7)] * 2]
            expected = [plain(H, source=from4, sport=ports[0], size=60000)]
            expected += [
                plain6(H6, source=from6, sport=p, size=n) for p, n in zip(ports[1:], (8000, 60000), strict=True)
            ]
            for (*_head, body), packet in zip(came, expected, strict=True):
                assert body == bytes(packet)[20 if packet.version == 4 else 40 :]
    assert course.dropped().get("fragment", 0) == before.get("fragment", 0)


def test_fragments_that_overlap_do_not_come_out(course: Course) -> None:
    course.client.add(f"[{G6}]:5000%in0", [f"[{H6}]:6000%out0"], "whole")
    pieces = in_fragments(v6(G6, size=5000), 1)
    overlapping = pieces[1].copy()
    overlapping[IPv6ExtHdrFragment].offset -= 1
    before = course.dropped().get("fragment", 0)
    with Capture(course.line.receiver, "eth0") as capture:
        course.send([pieces[0], overlapping, *pieces[1:], *in_fragments(v6(G6, size=5000), 2), *course.ends])
        _wait_for_ends(capture, course)
        assert len(_joined(capture)) == 1  # the second one
    assert course.dropped()["fragment"] - before == len(pieces) + 1
    course.client.remove("whole")


def test_no_icmp_answers_a_unicast_that_a_rule_takes(course: Course) -> None:
    """And it does where none does: the check can fail."""

    def unreachable(data: bytes) -> bool:
        return data[12:14] == b"\x08\x00" and data[23] == 1 and data[34] == 3

    line = course.line
    line.relay.ip("route", "add", f"{SENDER}/32", "dev", "in0")
    line.relay.ip("neighbour", "replace", SENDER, "lladdr", line.sender.mac("eth0"), "dev", "in0")
    with Capture(line.sender, "eth0") as capture:
        course.send([v4("192.0.2.1", 5999)])
        capture.wait_for(lambda f: unreachable(f.data), DEADLINE_S, "no ICMP where there should be one")
    course.client.add("192.0.2.1:5000%in0", [f"{H}:6000%out0"], "unicast")
    with Capture(line.sender, "eth0") as capture, Capture(line.receiver, "eth0") as receiving:
        course.send([v4("192.0.2.1"), *course.ends])
        _wait_for_ends(receiving, course)
        assert not capture.matching(lambda f: unreachable(f.data))
        assert receiving.matching(_is_copy)
    course.client.remove("unicast")
    line.relay.ip("route", "delete", f"{SENDER}/32", "dev", "in0")


def test_pausing_keeps_the_counters_and_resuming_sends_again(course: Course) -> None:
    course.client.add(f"{G}:5000%in0", [f"{H}:6000%out0", f"{H}:6000%out1"], "feed")

    def counted() -> tuple[int, list[tuple[int, dict[str, int]]]]:
        (rule,) = (rule for rule in course.client.stats().rules if rule.name == "feed")
        return rule.packets, [(output.packets, output.dropped) for output in rule.outputs]

    for number, step in enumerate((None, course.client.pause, course.client.resume)):
        if step:
            assert step("feed", f"{H}:6000%out0").rule.outputs[0].endswith(",paused") == (step == course.client.pause)
        course.send([v4(G)] * 5)
        wait_until(lambda: counted()[0] == 5 * (number + 1), DEADLINE_S, "not counted")  # noqa: B023 - awaited here
    # Outputs are counted behind the rule.
    wait_until(lambda: counted() == (15, [(10, {"paused": 5}), (15, {})]), DEADLINE_S, "outputs are not counted")
    course.client.remove("feed")


def test_programs_on_this_host_hear_what_is_to_be_heard(course: Course) -> None:
    line = course.line
    course.client.add(f"{G}:5000%in0", [f"{H}:6000%out0,loop", f"{H}:7000%out0"], "looped")
    course.client.add(f"[{G6}]:5000%in0", [f"[{H6}]:6000%out0,loop"], "looped6")
    with ExitStack() as stack:
        heard = []
        for family, group, port in ((AF_INET, H, 6000), (AF_INET, H, 7000), (AF_INET6, H6, 6000)):
            sock = stack.enter_context(line.relay.socket(family, SOCK_DGRAM))
            sock.bind((group, port))
            index = struct.pack("=I", line.relay.ifindex("out0"))
            if family == AF_INET:
                sock.setsockopt(IPPROTO_IP, IP_ADD_MEMBERSHIP, inet_aton(group) + bytes(4) + index)
            else:
                sock.setsockopt(IPPROTO_IPV6, IPV6_JOIN_GROUP, inet_pton(AF_INET6, group) + index)
            sock.settimeout(DEADLINE_S)
            heard.append(sock)
        course.send([v4(G), v6(G6)])
        assert heard[0].recv(1000).startswith(MARK)
        assert heard[2].recv(1000).startswith(MARK)
        heard[1].setblocking(False)
        with pytest.raises(BlockingIOError):
            heard[1].recv(1000)  # the outputs of a packet go out together
    course.client.remove("looped")
    course.client.remove("looped6")


def test_jumbo_frames_are_relayed_in_one_piece() -> None:
    if reason := unsupported():
        pytest.skip(reason)
    with Lab() as lab:
        line = relay_line(lab, offloads=False, mtu=9000)
        with Daemon(line.relay, "--debug") as daemon, daemon.client() as client:
            client.add(f"{G}:5000%in0", [f"{H}:6000%out0", f"{H}:7000%out0,source=keep"])
            with Capture(line.receiver, "eth0") as capture:
                frame = Ether(src=line.sender.mac("eth0"), dst=multicast_mac(G)) / v4(G, size=8900)
                inject(line.sender, "eth0", bytes(frame))
                wait_until(lambda: len(capture.matching(_is_copy)) >= 2, DEADLINE_S, "not relayed")
                came = sorted((frame.data[14:] for frame in capture.matching(_is_copy)), key=_port)
                expected = [plain(H, size=8900), plain(H, 7000, source=SENDER, sport=4000, size=8900)]
                assert came == [_exact(packet, data) for packet, data in zip(expected, came, strict=True)]


SURVIVING: Final = (
    "another group and port",
    "one source of a group",
    "unicast to this host",
    "ESP to a host",
    "IPv6: a source that is kept",
    "IPv6: one source, a prefix and any port",
)


def test_all_kinds_of_legs_outlive_an_upgrade(course: Course) -> None:
    """The new daemon has every socket, filter and membership of the old one. The last test of this line."""
    rules = [rule for name in SURVIVING for rule in LEGS[name].rules]
    course.client.change(add=[(given, outputs.split(), None) for given, outputs in rules])
    course.client.add(f"{OTHER}@{G}:7777%in+", [f"{H}:7778%out0,sport=keep,paused"], "pattern")
    course.daemon.upgrade()
    course.client = course.daemon.client()
    assert {rule.state for rule in course.client.rules()} == {"active"}
    for name in SURVIVING:
        _comes_out(course, LEGS[name])
    course.client.resume("pattern")
    _comes_out(course, Leg([], [v4(G, 7777), v4(G, 7777, source=OTHER)], [plain(H, 7778, sport=4000)]))
    course.remove_all()
    for name in SURVIVING:
        _stops(course, LEGS[name])

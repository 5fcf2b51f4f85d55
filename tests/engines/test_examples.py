"""What rules and outputs can say, by example: a packet in, the exact bytes out. Every engine gives the same.

    sender eth0 ---> in0  relay  out0 ---> receiver (198.51.100.2, 2001:db8::2)
                                 out1 ---> receiver1

`comparable` of packets.py says what is not compared: what the kernel may choose.
"""

from __future__ import annotations

import errno
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any

import pytest

from lab.capture import Capture, Frame, Injector
from lab.namespaces import wait_until
from lab.topology import RelayLine
from mcrelay.counters import LoopFacts
from mcrelay.engines.exits import PACKET_VNET_HDR
from mcrelay.engines.parsing import SOL_PACKET
from mcrelay.entries import ESP, UDP, Entry, Leg, LegFlag, RateUnit, mapped
from mcrelay.ways import Link, Way
from tests.engines.bench import ENGINES, OUT0, OUT1, Bench, Kind, entry, leg
from tests.engines.packets import (
    FRAGMENT,
    Datagram,
    carried,
    comparable,
    ethernet,
    fragment_header,
    ip_packet,
    option_header,
    reassembled,
    udp,
)

HOST4, HOST6 = "203.0.113.10", "2001:db8:9::9"  # the sender, to whom the relay has no route
GROUP4, GROUP6 = "239.1.1.1", "ff3e::101"
TO4, TO6 = "239.2.2.2", "ff3e::202"
OUT4, OUT6 = "198.51.100.1", "2001:db8::1"  # the relay's, on out0
NEAR4, NEAR6 = "198.51.100.2", "2001:db8::2"  # the receiver's
STRANGER4, STRANGER6 = "192.0.2.77", "2001:db8:77::7"  # nobody's here
HELLO = b"hello, receivers"
CIPHER = bytes(range(100, 141))  # what ESP carries

KEEP_DSCP, KEEP_TTL = LegFlag.KEEP_DSCP, LegFlag.KEEP_TTL
KEEP_SOURCE, KEEP_PORT = LegFlag.KEEP_SOURCE, LegFlag.KEEP_SOURCE_PORT
KEEP_BOTH = KEEP_DSCP | KEEP_SOURCE | KEEP_PORT
ANY_PORT = 0  # one that the kernel chooses


def given4(*, port: int = 5000, group: str = GROUP4, host: str = HOST4, payload: bytes = HELLO, **more: Any) -> bytes:
    """What comes in, where nothing else matters."""
    return Datagram(host, group, 4000, port, payload, **more).packet


def given6(*, port: int = 5000, group: str = GROUP6, host: str = HOST6, **more: Any) -> bytes:
    return Datagram(host, group, 4000, port, HELLO, **more).packet


def sent4(source_port: int = ANY_PORT, *, source: str = OUT4, to: str = TO4, port: int = 6000, **more: Any) -> bytes:
    """What leaves, likewise. The TTL is one less than that of what came."""
    return Datagram(source, to, source_port, port, HELLO, **{"ttl": 7, **more}).packet


def sent6(source_port: int = ANY_PORT, *, source: str = OUT6, to: str = TO6, port: int = 6000, **more: Any) -> bytes:
    return Datagram(source, to, source_port, port, HELLO, **{"ttl": 7, **more}).packet


def rule4(*legs: Leg, port: int = 5000, group: str = GROUP4, **more: Any) -> Entry:
    return entry(group, port, legs, **more)


def rule6(*legs: Leg, port: int = 5000, group: str = GROUP6, **more: Any) -> Entry:
    return entry(group, port, legs, **more)


def to4(address: str = TO4, port: int = 6000, **more: Any) -> Leg:
    return leg(address, port, OUT0, **{"way": Way.UDP4, **more})


def to6(address: str = TO6, port: int = 6000, **more: Any) -> Leg:
    return leg(address, port, OUT0, **{"way": Way.UDP6, **more})


def packed(address: str) -> bytes:
    return mapped(ip_address(address))


@dataclass(frozen=True)
class Example:
    """`given` comes in, packets or, of a tag, whole frames; what leaves by out0 is `expected`."""

    rules: list[Entry]
    given: list[bytes]
    expected: list[bytes] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)
    tag: int | None = None

    @property
    def ways(self) -> set[Way]:
        return {leg.way for rule in self.rules for leg in rule.legs}


def _specificity() -> Example:
    """Rules that all match, of which the most specific one takes the packet: each has a group of its own to send to."""
    whole, part = packed("239.0.0.0"), packed("239.1.0.0")
    source = packed(HOST4)

    def rule(number: int, group: bytes, port: int, **more: Any) -> Entry:
        return Entry(group, port, 0, number, (to4(f"239.9.0.{number}", counter=number),), id=number, **more)

    rules = [
        rule(1, packed(GROUP4), 5000, source=source),
        rule(2, packed(GROUP4), 0, source=source),
        rule(3, packed(GROUP4), 5000),
        rule(4, packed(GROUP4), 0),
        rule(5, part, 5000, prefix=96 + 16, source=source),
        rule(6, part, 0, prefix=96 + 16),
        rule(7, whole, 5000, prefix=96 + 8, source=source),
        rule(8, whole, 5000, prefix=96 + 8),
        rule(9, packed("224.0.0.0"), 0, prefix=96 + 4),
    ]
    cases = [  # the sender, the group, the port, and which rule
        (HOST4, GROUP4, 5000, 1),
        (HOST4, GROUP4, 5001, 2),
        (STRANGER4, GROUP4, 5000, 3),
        (STRANGER4, GROUP4, 5001, 4),
        (HOST4, "239.1.1.2", 5000, 5),
        (HOST4, "239.1.1.2", 5001, 6),
        (STRANGER4, "239.1.1.2", 5000, 6),  # a longer prefix counts more than a port
        (HOST4, "239.2.1.1", 5000, 7),
        (STRANGER4, "239.2.1.1", 5000, 8),
        (STRANGER4, "239.2.1.1", 5001, 9),
        (HOST4, "232.1.1.1", 5000, 9),
    ]
    return Example(
        rules,
        [given4(host=host, group=group, port=port) for host, group, port, _number in cases],
        [sent4(to=f"239.9.0.{number}") for _host, _group, _port, number in cases],
    )


EXAMPLES = {
    # --- IP versions ---
    "IPv6": Example([rule6(to6())], [given6()], [sent6()]),
    "from IPv4 to IPv6": Example([rule4(to6())], [given4()], [sent6()]),
    "from IPv6 to IPv4": Example([rule6(to4())], [given6()], [sent4()]),
    "to a host": Example([rule6(to6(NEAR6), to4(NEAR4, counter=1))], [given6()], [sent6(to=NEAR6), sent4(to=NEAR4)]),
    "to a group of the link": Example([rule6(to6("ff02::202"))], [given6()], [sent6(to="ff02::202", source="fe80::1")]),
    "to a neighbour": Example([rule6(to6("fe80::2"))], [given6()], [sent6(to="fe80::2", source="fe80::1")]),
    "behind extension headers": Example(
        [rule6(to6())],
        [
            ip_packet(
                *(HOST6, GROUP6, udp(HOST6, GROUP6, 4000, 5000, HELLO)),
                protocol=0,
                extensions=option_header(60, 2)
                + option_header(43)
                + option_header(44, kind=4)  # a routing header with nowhere left to go
                + fragment_header(51, 0, 77, more=False)  # the only one
                + bytes((17, 4))  # of 24 bytes, as AH counts
                + bytes(22),
            )
        ],
        [sent6()],
    ),
    # --- which rule ---
    "the most specific rule": _specificity(),
    "a VLAN": Example([rule4(to4(), vlan=7)], [given4()], [sent4()], tag=7),
    "a VLAN with a priority": Example([rule6(to6(), vlan=7)], [given6()], [sent6()], tag=7 | 5 << 13),
    "a priority alone": Example([rule4(to4())], [given4()], [sent4()], tag=5 << 13),
    "a VLAN that no rule has": Example([rule4(to4())], [given4()], dropped={"vlan_tagged": 1}, tag=7),
    "no tag where a rule has a VLAN": Example([rule4(to4(), vlan=7)], [given4()], dropped={"no_rule": 1}),
    "a source that no rule has": Example([rule6(to6(), source=packed(STRANGER6))], [given6()], dropped={"no_rule": 1}),
    "UDP is not ESP": Example(
        [rule4(to4(port=0, way=Way.FRAME), port=0, protocol=ESP)], [given4()], dropped={"no_rule": 1}
    ),
    # --- where to ---
    "the port that it came to": Example(
        [rule4(to4(port=0), port=0)],
        [given4(port=5000), given4(port=1)],
        [sent4(port=5000), sent4(port=1)],
    ),
    "a prefix onto another": Example(
        [
            Entry(packed("239.1.0.0"), 5000, 0, 0, (to4("239.2.0.0", prefix=96 + 16),), prefix=96 + 16),
            Entry(packed("ff3e::"), 5000, 0, 1, (to6("ff38::", prefix=16, counter=1),), prefix=16),
        ],
        [given4(group="239.1.77.78"), given6(group="ff3e::9:101")],
        [sent4(to="239.2.77.78"), sent6(to="ff38::9:101")],
    ),
    "where it went": Example(
        [Entry(packed("239.1.0.0"), 0, 0, 0, (to4(GROUP4, port=0, prefix=0),), prefix=96 + 16)],
        [given4(group="239.1.77.78", port=777)],
        [sent4(to="239.1.77.78", port=777)],
    ),
    "everybody on the link": Example(
        [
            rule4(
                to4("255.255.255.255"),
                to4("255.255.255.255", 6001, way=Way.FRAME, source=packed(STRANGER4), source_port=9, counter=1),
            )
        ],
        [given4()],
        [sent4(to="255.255.255.255"), sent4(9, source=STRANGER4, to="255.255.255.255", port=6001)],
    ),
    # --- TTL and DSCP ---
    "one TTL less, but never none": Example(
        [rule4(to4()), rule6(to6(counter=1), counter=1)],
        [given4(ttl=2), given4(ttl=1), given6(ttl=2), given6(ttl=1)],
        [sent4(ttl=1), sent4(ttl=1), sent6(ttl=1), sent6(ttl=1)],
    ),
    "a TTL": Example([rule6(to6(ttl=33))], [given6()], [sent6(ttl=33)]),
    "the TTL that it came with": Example(
        [rule4(to4(flags=KEEP_TTL), to4(TO4, 6001, way=Way.FRAME, flags=KEEP_TTL | KEEP_SOURCE, counter=1))],
        [given4(ttl=1)],
        [sent4(ttl=1), sent4(4000, ttl=1, source=HOST4, port=6001)],
    ),
    "the DSCP that it came with, without ECN": Example(
        [rule4(to4()), rule6(to6(counter=1), counter=1)],
        [given4(dscp=46, ecn=2), given6(dscp=46, ecn=1)],
        [sent4(dscp=46), sent6(dscp=46)],
    ),
    "a DSCP": Example(
        [
            rule4(
                to4(flags=LegFlag(0), dscp=8),
                to6(flags=LegFlag(0), dscp=9, counter=1),
                to4(TO4, 6001, flags=KEEP_SOURCE, dscp=10, way=Way.FRAME, counter=2),
                to4(NEAR4, 6002, flags=KEEP_SOURCE, dscp=11, way=Way.RAW4, counter=3),
                to4(TO4, 6003, flags=LegFlag(0), dscp=0, counter=4),
            )
        ],
        [given4(dscp=46)],
        [
            sent4(dscp=8),
            sent6(dscp=9),
            sent4(4000, dscp=10, source=HOST4, port=6001),
            sent4(4000, dscp=11, source=HOST4, port=6002, to=NEAR4),
            sent4(dscp=0, port=6003),
        ],
    ),
    # --- from whom ---
    "a source address of nobody here": Example(
        [
            rule4(
                to4(source=packed(STRANGER4)),
                to6(source=packed(STRANGER6), counter=1),
                to6(NEAR6, 6001, source=packed(STRANGER6), counter=2),
            )
        ],
        [given4()],
        [sent4(source=STRANGER4), sent6(source=STRANGER6), sent6(source=STRANGER6, to=NEAR6, port=6001)],
    ),
    "the source that it came from": Example(
        [
            rule4(to4(way=Way.FRAME, flags=KEEP_BOTH), to4(NEAR4, way=Way.RAW4, flags=KEEP_BOTH, counter=1)),
            rule6(to6(way=Way.FRAME, flags=KEEP_BOTH, counter=2), to6(NEAR6, way=Way.RAW6, flags=KEEP_BOTH, counter=3)),
        ],
        [given4(), given6()],
        [
            sent4(4000, source=HOST4),
            sent4(4000, source=HOST4, to=NEAR4),
            sent6(4000, source=HOST6),
            sent6(4000, source=HOST6, to=NEAR6),
        ],
    ),
    "its address, but another port": Example(
        [rule4(to4(way=Way.FRAME, flags=KEEP_SOURCE, source_port=99))], [given4()], [sent4(99, source=HOST4)]
    ),
    "its address, if it can be a host's": Example(
        [
            rule4(to4(way=Way.FRAME, flags=KEEP_SOURCE)),
            rule6(to6(way=Way.FRAME, flags=KEEP_SOURCE, counter=1), counter=1),
        ],
        [given4(host="239.5.5.5"), given6(host="ff02::5"), given4(host="0.0.0.0"), given4(host="240.0.0.1")],
        [sent4(4000, source="0.0.0.0")],
        dropped={"egress_unreachable": 3},
    ),
    "none, to a host": Example(
        [rule4(to4(NEAR4, way=Way.RAW4, flags=KEEP_SOURCE))],
        [given4(host="0.0.0.0")],
        dropped={"egress_unreachable": 1},
    ),
    "its port, but another address": Example(
        [rule4(to4(way=Way.FRAME, flags=KEEP_PORT | KEEP_DSCP, source=packed(STRANGER4)))],
        [given4()],
        [sent4(4000, source=STRANGER4)],
    ),
    "its port, from the interface's address": Example(
        [
            rule6(
                to6(way=Way.FRAME, flags=KEEP_PORT),
                to6("ff02::202", way=Way.FRAME, source_port=99, counter=1),
                to6(NEAR6, way=Way.RAW6, source_port=99, counter=2),
                to4(way=Way.FRAME, flags=KEEP_PORT, counter=3),
                to4(NEAR4, way=Way.RAW4, source_port=99, counter=4),
            )
        ],
        [given6()],
        [
            sent6(4000),
            sent6(99, source="fe80::1", to="ff02::202"),
            sent6(99, to=NEAR6),
            sent4(4000),
            sent4(99, to=NEAR4),
        ],
    ),
    # --- ESP ---
    "ESP": Example(
        [
            rule4(
                to4(port=0, way=Way.FRAME, flags=KEEP_BOTH),
                to4(NEAR4, 0, way=Way.RAW4, counter=1),
                port=0,
                protocol=ESP,
            ),
            rule6(
                to6(port=0, way=Way.FRAME, flags=KEEP_BOTH, counter=2),
                to6(NEAR6, 0, way=Way.RAW6, counter=3),
                to4(port=0, way=Way.FRAME, counter=4),
                port=0,
                protocol=ESP,
                counter=1,
            ),
        ],
        [ip_packet(HOST4, GROUP4, CIPHER, protocol=50), ip_packet(HOST6, GROUP6, CIPHER, protocol=50)],
        [
            ip_packet(HOST4, TO4, CIPHER, protocol=50, ttl=7),
            ip_packet(OUT4, NEAR4, CIPHER, protocol=50, ttl=7),
            ip_packet(HOST6, TO6, CIPHER, protocol=50, ttl=7),
            ip_packet(OUT6, NEAR6, CIPHER, protocol=50, ttl=7),
            ip_packet(OUT4, TO4, CIPHER, protocol=50, ttl=7),
        ],
    ),
    "ESP without a byte": Example(
        [rule4(to4(port=0, way=Way.FRAME, flags=KEEP_BOTH), port=0, protocol=ESP)],
        [ip_packet(HOST4, GROUP4, b"", protocol=50)],
        [ip_packet(HOST4, TO4, b"", protocol=50, ttl=7)],
    ),
    # --- what does not leave ---
    "a paused output": Example(
        [rule4(to4(flags=LegFlag.PAUSED | KEEP_DSCP), to4(TO4, 6001, counter=1))], [given4()], [sent4(port=6001)]
    ),
    "a paused rule": Example([rule4(to4(flags=LegFlag.PAUSED))], [given4()], dropped={"paused": 1}),
    "an output to where it came from": Example(
        [rule4(to4(flags=LegFlag.SPLIT_HORIZON | KEEP_DSCP), to4(TO4, 6001, counter=1))], [given4()], [sent4(port=6001)]
    ),
    "only to where it came from": Example(
        [rule4(to4(flags=LegFlag.SPLIT_HORIZON))], [given4()], dropped={"split_horizon": 1}
    ),
    "the first of several reasons": Example(
        [
            rule4(
                to4(flags=LegFlag.SPLIT_HORIZON),
                to4(flags=LegFlag.PAUSED, counter=1),
                leg(TO4, 6000, 9, counter=2),  # no such interface
            )
        ],
        [given4()],
        dropped={"egress_unreachable": 1},
    ),
}


@pytest.fixture(params=ENGINES)
def kind(request: pytest.FixtureRequest) -> Kind:
    return ENGINES[request.param]


def is_relayed(frame: Frame) -> bool:
    return not frame.outgoing and carried(frame.data) is not None


@dataclass
class Wire:
    """The ends of one engine's packets."""

    bench: Bench
    injector: Injector
    captures: list[Capture]

    def inject(self, *given: bytes, tag: int | None = None) -> None:
        """Packets, which are dealt with on return."""
        before = self.bench.page.totals()["received"]
        self.injector.send(*(ethernet(packet, vlan=tag) for packet in given))
        self.bench.wait_received(before + len(given))

    def take(self, count: int, output: int = 0) -> list[bytes]:
        """So many frames that arrived, and no more."""
        capture = self.captures[output]
        wait_until(lambda: len(capture.frames) >= count, 5, f"{count} frames did not arrive")
        frames = [frame.data for frame in capture.frames]
        assert len(frames) == count
        return frames


@pytest.fixture
def wires(line: RelayLine, kind: Kind, descriptors: None) -> Iterator[Any]:
    """Makes a wire of an engine with these ways out."""
    made: list[Wire] = []

    def make(ways: set[Way], *, attached: bool = True) -> Wire:
        bench = Bench(line, kind, ways=sorted(ways))
        captures = [Capture(receiver, "eth0", only=is_relayed) for receiver in line.receivers]
        wire = Wire(bench, Injector(line.sender, "eth0"), [capture.__enter__() for capture in captures])
        made.append(wire)
        if attached:
            bench.start()
        else:
            bench.start_bare()
            assert bench.answer(bench.attach_ingress()) == 0
        return wire

    yield make
    for wire in made:
        wire.injector.close()
        for capture in wire.captures:
            capture.__exit__(None, None, None)
        wire.bench.close()


def as_sent(line: RelayLine, packet: bytes) -> bytes:
    """The frame in which a packet leaves by out0."""
    source = line.relay.mac("out0")
    unicast = packet[16] & 0xF0 != 0xE0 and packet[16] != 0xFF if packet[0] >> 4 == 4 else packet[24] != 0xFF
    return ethernet(packet, source_mac=source, destination_mac=line.receiver.mac("eth0") if unicast else None)


def is_the_same(frame: bytes, expected: bytes) -> bool:
    packet = expected[14:]
    source_port = packet[20:22] if packet[0] >> 4 == 4 else packet[40:42]
    any_port = carried(expected) == UDP and source_port == b"\0\0"
    return frame[:14] == expected[:14] and comparable(frame[14:], any_source_port=any_port) == comparable(packet)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example(wires: Any, line: RelayLine, name: str) -> None:
    example = EXAMPLES[name]
    wire: Wire = wires(example.ways)
    wire.bench.rules(*example.rules)
    wire.inject(*example.given, tag=example.tag)
    arrived = wire.take(len(example.expected))
    for packet in example.expected:
        expected = as_sent(line, packet)
        matching = next((frame for frame in arrived if is_the_same(frame, expected)), None)
        assert matching is not None, f"{expected.hex(' ')} is not among {[frame.hex(' ') for frame in arrived]}"
        arrived.remove(matching)
    assert wire.bench.page.dropped() == example.dropped
    assert wire.bench.page.totals()["copies"] == len(example.expected)


# --- what takes more than a packet -----------------------------------------------------------------------------------


WIDE = bytes(n % 251 for n in range(1400))


def wide4(host: str = HOST4, group: str = GROUP4, source_port: int = 4000, port: int = 5000, **more: Any) -> bytes:
    return Datagram(host, group, source_port, port, WIDE, **more).packet


@pytest.mark.parametrize(
    ("way", "to"),
    [(Way.FRAME, TO4), (Way.RAW4, NEAR4), (Way.FRAME, TO6), (Way.RAW6, NEAR6)],
    ids=lambda value: str(value).replace(":", "."),
)
@pytest.mark.parametrize("protocol", [UDP, ESP], ids=["UDP", "ESP"])
def test_what_is_longer_than_the_mtu_is_cut_into_fragments(wires: Any, way: Way, to: str, protocol: int) -> None:
    wire: Wire = wires({way}, attached=False)
    bench, mtu = wire.bench, 600
    assert bench.answer(bench.attach_egress(OUT0, way, mtu)) == 0
    is_ipv6 = ":" in to
    host, group = (HOST6, GROUP6) if is_ipv6 else (HOST4, GROUP4)
    port = 0 if protocol == ESP else 5000
    bench.rules(entry(group, port, [leg(to, port, OUT0, way=way, flags=KEEP_BOTH)], protocol=protocol))
    for number in range(2):
        body = udp(host, group, 4000, port, WIDE) if protocol == UDP else WIDE
        wire.inject(ip_packet(host, group, body, protocol=protocol))
        frames = [frame[14:] for frame in wire.take(3 * (number + 1))[3 * number :]]
        assert {frame[6] if is_ipv6 else frame[9] for frame in frames} == {FRAGMENT if is_ipv6 else protocol}
        assert all(len(frame) <= mtu for frame in frames)
        expected = udp(host, to, 4000, port, WIDE) if protocol == UDP else WIDE
        assert reassembled(frames) == expected
        identifications = {frame[44:48] if is_ipv6 else frame[4:6] for frame in frames}
        assert len(identifications) == 1
    assert bench.page.output(0) == (2, 2 * len(WIDE), {})


def test_fragments_have_an_identification_for_each_datagram(wires: Any) -> None:
    wire: Wire = wires({Way.FRAME}, attached=False)
    assert wire.bench.answer(wire.bench.attach_egress(OUT0, Way.FRAME, 600)) == 0
    wire.bench.rules(rule4(to4(way=Way.FRAME, flags=KEEP_BOTH)))
    wire.inject(wide4(), wide4(), wide4())
    frames = wire.take(9)
    assert len({frame[18:20] for frame in frames}) == 3


def test_frames_leave_without_the_kernels_help(wires: Any, line: RelayLine) -> None:
    """Where it cannot tell datagrams in frames apart (before Linux 6.2), they leave one by one."""
    wire: Wire = wires({Way.FRAME}, attached=False)
    wire.bench.egress[OUT0, Way.FRAME].setsockopt(SOL_PACKET, PACKET_VNET_HDR, 0)
    assert wire.bench.answer(wire.bench.attach_egress(OUT0, Way.FRAME)) == 0
    wire.bench.rules(rule4(to4(way=Way.FRAME, flags=KEEP_BOTH)), rule6(to6(way=Way.FRAME, counter=1), counter=1))
    wire.inject(*[given4()] * 3, given6())
    frames = wire.take(4)
    expected = as_sent(line, sent4(4000, source=HOST4))
    assert all(is_the_same(frame, expected) for frame in frames[:3])
    assert is_the_same(frames[3], as_sent(line, sent6(4000)))


def test_an_interface_without_an_address_sends_only_what_has_a_source(wires: Any, line: RelayLine) -> None:
    wire: Wire = wires({Way.FRAME, Way.RAW6}, attached=False)
    bench = wire.bench
    assert bench.engine is not None
    mac = bytes.fromhex(line.relay.mac("out0").replace(":", ""))
    for way in (Way.FRAME, Way.RAW6):
        ticket = bench.engine.attach_egress(OUT0, way, bench.egress[OUT0, way].fileno(), 1500, Link(mac=mac))
        assert bench.answer(ticket) == 0
    bench.rules(
        rule6(
            to6(way=Way.FRAME, flags=KEEP_PORT),
            to6(NEAR6, way=Way.RAW6, source_port=9, counter=1),
            to4(way=Way.FRAME, source_port=9, counter=2),
            to6(port=6001, way=Way.FRAME, source=packed(STRANGER6), source_port=9, counter=3),
        )
    )
    wire.inject(given6())
    assert is_the_same(wire.take(1)[0], as_sent(line, sent6(9, source=STRANGER6, port=6001)))
    assert [bench.page.output(number)[2] for number in range(3)] == [{"egress_unreachable": 1}] * 3


def test_an_output_sends_no_more_than_its_rate(wires: Any) -> None:
    """A burst of 16 packets, then one a second; another output is not held up."""
    wire: Wire = wires({Way.UDP4})
    page = wire.bench.page
    wire.bench.rules(
        rule4(to4(rate=1, rate_unit=RateUnit.PACKETS), leg(TO4, 6000, OUT1, counter=1)),
        rule4(to4(rate=1, rate_unit=RateUnit.PACKETS, counter=2), port=5001, counter=1),
    )
    began = time.monotonic()
    wire.inject(*[given4()] * 40)
    at_most = 16 + int(time.monotonic() - began) + 1
    sent, size, drops = page.output(0)
    assert 16 <= sent <= at_most
    assert (size, drops) == (sent * len(HELLO), {"egress_limited": 40 - sent})
    assert page.output(1) == (40, 40 * len(HELLO), {})
    assert page.dropped() == {}
    wire.inject(*[given4(port=5001)] * 17)  # another bucket, which is full
    assert page.output(2)[0] >= 16
    # It goes on when a second has passed.
    before = page.output(0)[0]
    deadline = time.monotonic() + 10
    while page.output(0)[0] == before:
        assert time.monotonic() < deadline, "nothing is sent any more"
        wire.inject(given4())


def test_who_gets_an_output_s_counter_does_not_pay_its_debts(wires: Any) -> None:
    """A burst at one packet a second is owed for 16 seconds: by that rule at that rate, and by no other."""
    wire: Wire = wires({Way.UDP4})
    page = wire.bench.page
    slow = to4(rate=1, rate_unit=RateUnit.PACKETS)
    wire.bench.rules(rule4(slow, id=1))
    wire.inject(*[given4()] * 20)
    owed = page.output(0)[0]
    for output, id in ((to4(rate=2, rate_unit=RateUnit.PACKETS), 1), (slow, 1), (slow, 2)):
        wire.bench.rules(rule4(output, id=id))
        before = page.output(0)[0]
        wire.inject(*[given4()] * 16)
        assert page.output(0)[0] - before == 16
    # The table again, with the same rule in it, forgives nothing. (A second more that passes is a packet more.)
    wire.bench.rules(rule4(slow, id=2))
    before = page.output(0)[0]
    wire.inject(*[given4()] * 16)
    assert page.output(0)[0] - before < 16
    assert owed >= 16


def test_a_rate_in_bits_counts_ip_packets(wires: Any) -> None:
    """One bit a second and a burst of 192,000: so many packets of 1500 bytes, whatever their IP version."""
    wire: Wire = wires({Way.UDP4, Way.UDP6})
    page = wire.bench.page
    limit: dict[str, Any] = {"rate": 1, "rate_unit": RateUnit.BITS}
    wire.bench.rules(rule4(to4(**limit), to6(counter=1, **limit)))
    size = 1500 - 20 - 8 - 20  # as an IPv6 packet it has 1500 bytes, and 1480 as one of IPv4
    packet = Datagram(HOST4, GROUP4, 4000, 5000, bytes(size)).packet
    wire.inject(*[packet] * 40)
    assert page.output(0) == (16, 16 * size, {"egress_limited": 24})
    assert page.output(1) == (16, 16 * size, {"egress_limited": 24})
    assert page.dropped() == {"egress_limited": 24}
    # What is left of the burst is enough for a few short packets.
    left4, left6 = 192_000 - 16 * 1480 * 8, 0
    short = Datagram(HOST4, GROUP4, 4000, 5000, bytes(12)).packet  # 40 bytes
    wire.inject(*[short] * 12)
    assert page.output(0)[0] - 16 == min(12, left4 // (40 * 8))
    assert page.output(1)[0] - 16 == left6


def test_only_a_loop_output_is_heard_on_this_host(wires: Any, line: RelayLine) -> None:
    wire: Wire = wires({Way.UDP4, Way.LOOP4, Way.UDP6, Way.LOOP6})
    wire.bench.rules(
        rule4(
            to4(port=6000, counter=0),
            to4(port=6000, way=Way.LOOP4, source=packed("198.51.100.9"), counter=1),
            to6(port=6000, counter=2),
            to6(port=6000, way=Way.LOOP6, source=packed(STRANGER6), counter=3),
        )
    )
    local = [_member(line, TO4), _member(line, TO6)]
    wire.inject(given4())
    assert len(wire.take(4)) == 4
    for sock, source in zip(local, ("198.51.100.9", STRANGER6), strict=True):
        payload, address = sock.recvfrom(100)
        assert (payload, address[0]) == (HELLO, source)
        sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            sock.recv(100)
        sock.close()


def _member(line: RelayLine, group: str) -> socket.socket:
    """A socket in the relay's namespace that has joined the group on out0."""
    index = line.relay.ifindex("out0")
    if ":" in group:
        sock = line.relay.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        sock.bind((group, 6000))
        request = socket.inet_pton(socket.AF_INET6, group) + index.to_bytes(4, sys.byteorder)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, request)
    else:
        sock = line.relay.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind((group, 6000))
        request = socket.inet_aton(group) + bytes(4) + index.to_bytes(4, sys.byteorder)
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, request)
    sock.settimeout(5)
    return sock


def test_own_addresses_of_ipv6_are_own_too(wires: Any) -> None:
    wire: Wire = wires({Way.UDP6})
    engine = wire.bench.engine
    assert engine is not None
    wire.bench.rules(rule6(to6()))
    assert wire.bench.answer(engine.set_own_addresses([packed(OUT4), packed(OUT6)])) == 0
    wire.inject(given6(host=OUT6), given6())
    assert len(wire.take(1)) == 1
    assert wire.bench.page.dropped() == {"own": 1}
    assert wire.bench.page.loop(0) == LoopFacts(own=1, looped=0, suspensions=0, suspended_until_ns=0)


def test_rules_that_share_a_counter_share_its_loop_watch_if_they_are_one(wires: Any) -> None:
    """A rule may have an entry on each of several interfaces; here two of one rule's are on one."""
    wire: Wire = wires({Way.UDP4})
    wire.bench.rules(rule4(to4(), id=7), rule4(to4(), id=7, port=5001))
    attempts = 0
    while not wire.bench.page.loop(0).suspensions:  # on a loaded machine it may take longer than a loop's round may
        attempts += 1
        assert attempts < 100, "the loop was not found"
        payload = b"attempt %d" % attempts
        returns = [given4(host="203.0.113.99", port=5000 + number % 2, payload=payload) for number in range(40)]
        wire.inject(given4(payload=payload), *returns)
    assert wire.bench.page.loop(0).suspensions == 1
    assert wire.bench.page.dropped().keys() == {"loop"}


def test_a_way_that_is_detached_is_gone_alone(wires: Any) -> None:
    wire: Wire = wires({Way.UDP4, Way.FRAME})
    engine = wire.bench.engine
    assert engine is not None
    wire.bench.rules(rule4(to4(), to4(port=6001, way=Way.FRAME, flags=KEEP_BOTH, counter=1)))
    assert wire.bench.answer(engine.detach_egress(OUT0, Way.UDP4)) == 0
    assert wire.bench.answer(engine.detach_egress(OUT0, Way.UDP4)) == errno.ENOENT
    wire.inject(given4())
    assert len(wire.take(1)) == 1
    assert [wire.bench.page.output(number)[0] for number in (0, 1)] == [0, 1]
    assert wire.bench.page.output(0)[2] == {"egress_unreachable": 1}

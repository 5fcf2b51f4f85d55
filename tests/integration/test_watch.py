"""What a watch sees of frames on a cable, through the kernel's filters: destinations, prefixes, tags, queries.

+---------------+        +----------------+
| sender   eth0 +--------+ in0   watching |
+---------------+        +----------------+
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from ipaddress import IPv6Address

import pytest

from lab.capture import Injector
from lab.frames import ethernet_ipv4, ethernet_ipv4_udp, igmp_query
from lab.namespaces import Lab, Namespace, unsupported
from mcrelay.facts import FlowKey, Sightings
from mcrelay.net.watch import watch
from mcrelay.ruletext import parse_input

SOURCE = "192.0.2.9"
SECONDS = 0.3


@dataclass(frozen=True)
class Cable:
    sender: Namespace
    watching: Namespace

    def see(self, input: str, *frames: bytes, join_on: tuple[str, ...] = ()) -> Sightings:
        """What is seen for an input while these frames are sent again and again."""
        given = parse_input(input)
        with ThreadPoolExecutor(1) as executor, Injector(self.sender, "eth0") as injector:
            seen = executor.submit(self.watching.call, watch, given, SECONDS, join_on, given.source)
            while not seen.done():
                injector.send(*frames)
            return seen.result()


@pytest.fixture(scope="module")
def cable() -> Iterator[Cable]:
    if reason := unsupported():
        pytest.skip(reason)
    with Lab() as lab:
        sender, watching = lab.namespace("sender"), lab.namespace("watching", ipv6=True)
        lab.veth(sender, "eth0", watching, "in0", address_b="192.0.2.1/24")
        yield Cable(sender, watching)


def ipv6_udp(destination: str, port: int) -> bytes:
    payload = struct.pack("!HHHH", 4000, port, 8, 0)
    packed = IPv6Address(destination).packed
    header = struct.pack("!IHBB", 6 << 28, len(payload), 17, 5) + IPv6Address("2001:db8::9").packed + packed
    return b"\x33\x33" + packed[12:] + bytes(6) + b"\x86\xdd" + header + payload


def described(keys: set[FlowKey]) -> set[str]:
    return {f"{key.destination} {key.protocol} {key.port} {key.vlan}" for key in keys}


def test_packets_of_an_input_are_seen_with_what_else_is_multicast(cable: Cable) -> None:
    seen = cable.see(
        "239.1.1.1:5000%in0",
        ethernet_ipv4_udp(SOURCE, "239.1.1.1", 4000, 5000, bytes(1000)),
        ethernet_ipv4_udp(SOURCE, "239.1.1.1", 4000, 5001),
        ethernet_ipv4_udp(SOURCE, "239.9.9.9", 4000, 5000),
        ethernet_ipv4_udp(SOURCE, "239.1.1.1", 4000, 5000, vlan=7),
        ethernet_ipv4(SOURCE, "239.1.1.1", 50, bytes(32)),
        ethernet_ipv4_udp(SOURCE, "192.0.2.1", 4000, 5000, destination_mac="02:00:00:00:00:99"),
        igmp_query("192.0.2.254"),
        ipv6_udp("ff05::1", 5000),
    )
    assert seen.problem is None
    assert described(set(seen.flows)) == {
        "239.1.1.1 udp 5000 None",
        "239.1.1.1 udp 5001 None",
        "239.9.9.9 udp 5000 None",
        "239.1.1.1 udp 5000 7",
        "239.1.1.1 esp None None",
        "ff05::1 udp 5000 None",
    }
    whole = next(
        flow for key, flow in seen.flows.items() if (key.port, key.vlan) == (5000, None) and flow.length_max > 999
    )
    assert whole.packets == whole.checked > 0
    assert whole.bad_checksums == 0
    assert {(str(querier.address), querier.protocol) for querier in seen.queriers} == {("192.0.2.254", "IGMPv3")}


@pytest.mark.parametrize(
    ("input", "inside", "outside"),
    [
        ("10.1.2.3:5000%in0", "10.1.2.3", "10.1.2.4"),
        ("239.1.0.0/16:5000%in0", "239.1.255.255", "10.2.0.0"),
        ("239.1.128.0/17:5000%in0", "239.1.128.9", "10.1.127.9"),
    ],
)
def test_unicast_is_seen_if_it_is_asked_about(cable: Cable, input: str, inside: str, outside: str) -> None:
    frames = [
        ethernet_ipv4_udp(SOURCE, destination, 4000, 5000, destination_mac="02:00:00:00:00:99")
        for destination in (inside, outside)
    ]
    seen = cable.see(input, *frames)
    assert {str(key.destination) for key in seen.flows} == {inside}
    assert {arrival for flow in seen.flows.values() for arrival in flow.arrivals} == {"other host"}


def test_prefixes_of_ipv6_are_masked_within_a_word(cable: Cable) -> None:
    """All multicast is seen, but only what was asked about is looked at whole, and counted."""
    seen = cable.see("[ff05::8000:0]/97:5000%in0", ipv6_udp("ff05::8000:1", 5000))
    assert seen.looked_at > 0
    seen = cable.see("[ff05::8000:0]/97:5000%in0", ipv6_udp("ff05::7fff:1", 5000))
    assert seen.looked_at == 0
    assert described(set(seen.flows)) == {"ff05::7fff:1 udp 5000 None"}


def test_a_group_is_joined_meanwhile(cable: Cable) -> None:
    for input in ("239.1.1.1:5000%in0", "10.0.0.9@239.1.1.1:5000%in0", "[ff05::1]:5000%in0"):
        seen = cable.see(input, ethernet_ipv4_udp(SOURCE, "239.1.1.1", 4000, 5000), join_on=("in0", "nowhere"))
        assert seen.joined == ("in0",)
    left = cable.watching.ip("maddress", "show", "dev", "in0").stdout
    assert "239.1.1.1" not in left
    assert "ff05::1\n" not in left


def test_more_than_can_be_looked_at_is_counted(cable: Cable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mcrelay.net.watch.FRAMES_MAX", 50)
    seen = cable.see("239.1.1.1:5000%in0", ethernet_ipv4_udp(SOURCE, "239.1.1.1", 4000, 5000))
    assert seen.looked_at == 50
    assert seen.missed > 0

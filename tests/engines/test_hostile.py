"""Packets as a stranger may send them: each is dropped under its reason, by every engine, and none comes out."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import pytest

from lab.capture import Injector
from lab.frames import ethernet_ipv4, ethernet_ipv4_udp, udp_segment
from tests.engines.bench import ENGINES, OUT0, Bench, Kind, Receiver, entry, leg
from tests.engines.packets import ethernet, fragment_header, ip_packet, option_header, udp

SOURCE, GROUP, PORT = "203.0.113.10", "239.1.1.1", 5000
PAYLOAD = b"not to be forwarded"


@pytest.fixture(params=ENGINES)
def kind(request: pytest.FixtureRequest) -> Kind:
    return ENGINES[request.param]


def frame(**wrong: Any) -> bytes:
    payload = wrong.pop("payload", PAYLOAD)
    return ethernet_ipv4_udp(SOURCE, GROUP, 4000, PORT, payload, **wrong)


def right_udp_checksum() -> int:
    segment = udp_segment(SOURCE, GROUP, 4000, PORT, PAYLOAD)
    checksum: int = struct.unpack_from("!H", segment, 6)[0]
    return checksum


HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "IP version 6 in an IPv4 frame": (lambda: frame(ip_version=6), "bad_ip_header"),
    "IP version 0": (lambda: frame(ip_version=0), "not_ip"),
    "IP header shorter than a header": (lambda: frame(ip_header_words=4), "bad_ip_header"),
    "IP header longer than the packet": (lambda: frame(ip_header_words=15), "bad_ip_header"),
    "half an IP header": (lambda: frame()[:24], "truncated"),
    "a frame that ends in the IP options": (lambda: frame(options=b"\x01" * 40)[:54], "truncated"),
    "a frame that ends in the UDP header": (lambda: frame()[:38], "truncated"),
    "a frame that ends in the payload": (lambda: frame()[:-1], "truncated"),
    "IP length zero": (lambda: frame(ip_length=0), "bad_ip_header"),
    "the longest IP length": (lambda: frame(ip_length=65535), "truncated"),
    "IP version 15": (lambda: frame(ip_version=15), "not_ip"),
    "the longest UDP length": (lambda: frame(udp_length=65535), "bad_udp_length"),
    "IP length below the header's": (lambda: frame(ip_length=19), "bad_ip_header"),
    "IP length beyond the frame": (lambda: frame(ip_length=1400), "truncated"),
    "IP length that cuts the UDP header": (lambda: frame(ip_length=27), "truncated"),
    "wrong IP checksum": (lambda: frame(ip_checksum=0x1234), "bad_ip_checksum"),
    "UDP length below a header": (lambda: frame(udp_length=7), "bad_udp_length"),
    "UDP length zero": (lambda: frame(udp_length=0), "bad_udp_length"),
    "UDP length beyond the packet": (lambda: frame(udp_length=8 + len(PAYLOAD) + 1), "bad_udp_length"),
    "wrong UDP checksum": (lambda: frame(udp_checksum=right_udp_checksum() ^ 0x0101), "bad_udp_checksum"),
    "somebody else's MAC address": (lambda: frame(destination_mac="02:00:00:00:99:99"), "other_host"),
    "tagged for VLAN 7": (lambda: frame(vlan=7), "vlan_tagged"),
    "a group that no rule has": (
        lambda: ethernet_ipv4_udp(SOURCE, "239.1.1.2", 4000, PORT, PAYLOAD),
        "no_rule",
    ),
    "a port that no rule has": (lambda: ethernet_ipv4_udp(SOURCE, GROUP, 4000, PORT + 1, PAYLOAD), "no_rule"),
    "UDP length shorter than the packet, another port behind it": (
        lambda: ethernet_ipv4_udp(SOURCE, GROUP, 4000, PORT + 1, PAYLOAD, udp_length=8, udp_checksum=0),
        "no_rule",
    ),
}


HOST6, GROUP6 = "2001:db8:9::9", "ff3e::101"
CHAINED = b"".join(option_header(60) for _ in range(7)) + option_header(17)  # eight of them
AUTHENTICATION = bytes((17, 4)) + bytes(22)


def frame6(extensions: bytes = b"", *, first: int = 17, body: bytes | None = None, **more: Any) -> bytes:
    """An IPv6 packet whose UDP datagram, or whatever `body` is, stands behind extension headers; `first` is the first
    one's number."""
    if body is None:
        body = udp(HOST6, GROUP6, 4000, PORT, PAYLOAD)
    host = more.pop("host", HOST6)
    return ethernet(ip_packet(host, more.pop("group", GROUP6), body, protocol=first, extensions=extensions, **more))


HOSTILE |= {
    "half an IPv6 header": (lambda: frame6()[: 14 + 39], "truncated"),
    "an IPv6 frame that ends in the payload": (lambda: frame6()[:-1], "truncated"),
    "IPv6 length beyond the frame": (lambda: frame6(length=1400), "truncated"),
    "IPv6 length that cuts the UDP header": (lambda: frame6(length=7), "truncated"),
    "IPv6 length zero, a jumbogram": (lambda: frame6(length=0), "bad_ip_header"),
    "an IPv4 source in an IPv6 header": (lambda: frame6(host="::ffff:203.0.113.10"), "bad_ip_header"),
    "an IPv4 group in an IPv6 header": (lambda: frame6(group="::ffff:239.1.1.1"), "bad_ip_header"),
    "IPv6 UDP length beyond the packet": (
        lambda: frame6(udp_header(8 + len(PAYLOAD) + 1), body=PAYLOAD),
        "bad_udp_length",
    ),
    "IPv6 without UDP checksum": (
        lambda: frame6(body=udp(HOST6, GROUP6, 4000, PORT, PAYLOAD, checksum=0)),
        "bad_udp_checksum",
    ),
    "IPv6 with a wrong UDP checksum": (
        lambda: frame6(body=udp(HOST6, GROUP6, 4000, PORT, PAYLOAD, checksum=0x1234)),
        "bad_udp_checksum",
    ),
    "IPv6 without a next header": (lambda: frame6(first=59), "not_udp"),
    "TCP in IPv6": (lambda: frame6(first=6), "not_udp"),
    "a routing header with segments left": (lambda: frame6(bytes((17, 0, 4, 1)) + bytes(4), first=43), "bad_extension"),
    "an extension header that ends behind the packet": (
        lambda: frame6(bytes((17, 255)) + bytes(6), first=60),
        "bad_extension",
    ),
    "an extension header of which half is there": (
        lambda: frame6(bytes((17, 0, 0, 0)), first=60, body=b""),
        "bad_extension",
    ),
    "AH that ends behind the packet": (lambda: frame6(bytes((17, 255)) + bytes(6), first=51), "bad_extension"),
    "nine extension headers": (lambda: frame6(option_header(60) + CHAINED, first=60), "bad_extension"),
    "the first fragment of an IPv6 packet": (
        lambda: frame6(fragment_header(17, 0, 7, more=True), first=44),
        "fragment",
    ),
    "the last one": (lambda: frame6(fragment_header(17, 800, 7, more=False), first=44), "fragment"),
    "a fragment in an IPv6 packet that would be whole": (
        lambda: frame6(fragment_header(44, 0, 7, more=False) + fragment_header(17, 8, 7, more=False), first=44),
        "fragment",
    ),
    "an IPv6 group that no rule has": (
        lambda: frame6(group="ff3e::102", body=udp(HOST6, "ff3e::102", 4000, PORT, b"")),
        "no_rule",
    ),
    "IPv6 tagged for VLAN 7": (
        lambda: ethernet(ip_packet(HOST6, GROUP6, udp(HOST6, GROUP6, 4000, PORT, PAYLOAD)), vlan=7),
        "vlan_tagged",
    ),
    "a hostile packet that is tagged, too": (lambda: frame(vlan=7, ip_header_words=4), "bad_ip_header"),
    "ESP for a rule of UDP": (lambda: ethernet_ipv4(SOURCE, GROUP, 50, bytes(40)), "no_rule"),
}


def udp_header(length: int) -> bytes:
    return struct.pack("!HHHH", 4000, PORT, length, 1)


@pytest.mark.parametrize("packet", HOSTILE)
def test_a_hostile_packet_is_dropped_under_its_reason(bench: Bench, packet: str) -> None:
    build, reason = HOSTILE[packet]
    receiver = Receiver(bench.line.receiver, "239.2.2.2", 6000)
    bench.start()
    bench.rules(
        entry(GROUP, PORT, [leg("239.2.2.2", 6000, OUT0)]),
        entry(GROUP6, PORT, [leg("239.2.2.2", 6000, OUT0, counter=1)], counter=1),
    )
    injector = Injector(bench.line.sender, "eth0")
    injector.send(build(), frame(payload=b"a good one behind it"))
    assert receiver.take(1) == [b"a good one behind it"]
    bench.wait_received(2)
    assert bench.page.dropped() == {reason: 1}
    assert receiver.is_empty()
    injector.close()
    receiver.sock.close()


GOOD: dict[str, tuple[Callable[[], bytes], bytes]] = {
    "no UDP checksum": (lambda: frame(udp_checksum=0), PAYLOAD),
    "IP options": (lambda: frame(options=b"\x94\x04\x00\x00"), PAYLOAD),  # router alert
    # Nothing of them is copied, so nobody need believe them.
    "IP options that claim to be longer than the header": (lambda: frame(options=b"\x83\xff\x04\x00"), PAYLOAD),
    "IP options of length zero": (lambda: frame(options=b"\x83\x00\x00\x00"), PAYLOAD),
    "forty bytes of IP options": (lambda: frame(options=b"\x01" * 40), PAYLOAD),
    "link-layer padding": (lambda: frame(payload=b"x") + b"\0" * 17, b"x"),
    "UDP length shorter than the packet": (lambda: frame(udp_length=8 + 3, udp_checksum=0), PAYLOAD[:3]),
    "no payload": (lambda: frame(payload=b""), b""),
    "an odd number of bytes": (lambda: frame(payload=b"odd"), b"odd"),
    "eight extension headers": (lambda: frame6(CHAINED, first=60), PAYLOAD),
    "AH in front of UDP": (lambda: frame6(AUTHENTICATION, first=51), PAYLOAD),
    "an IPv6 packet that is its only fragment": (
        lambda: frame6(fragment_header(17, 0, 7, more=False), first=44),
        PAYLOAD,
    ),
    "IPv6 UDP length shorter than the packet": (
        lambda: frame6(body=udp(HOST6, GROUP6, 4000, PORT, b"x") + b"rest"),
        b"x",
    ),
    "VLAN 0, a priority tag only": (lambda: frame(vlan=0), PAYLOAD),
}


@pytest.mark.parametrize("packet", GOOD)
def test_an_unusual_packet_is_forwarded(bench: Bench, packet: str) -> None:
    build, payload = GOOD[packet]
    receiver = Receiver(bench.line.receiver, "239.2.2.2", 6000)
    bench.start()
    bench.rules(
        entry(GROUP, PORT, [leg("239.2.2.2", 6000, OUT0)]),
        entry(GROUP6, PORT, [leg("239.2.2.2", 6000, OUT0, counter=1)], counter=1),
    )
    injector = Injector(bench.line.sender, "eth0")
    injector.send(build())
    assert receiver.take(1) == [payload]
    bench.wait_received(1)
    assert bench.page.dropped() == {}
    injector.close()
    receiver.sock.close()


def test_fragments_arrive_as_one_datagram(bench: Bench) -> None:
    """The kernel reassembles before the fanout decides (PACKET_FANOUT_FLAG_DEFRAG)."""
    payload = bytes(n % 251 for n in range(1200))
    segment = udp_segment(SOURCE, GROUP, 4000, PORT, payload)
    receiver = Receiver(bench.line.receiver, "239.2.2.2", 6000)
    bench.start()
    bench.rules(entry(GROUP, PORT, [leg("239.2.2.2", 6000, OUT0)]))
    injector = Injector(bench.line.sender, "eth0")
    first, second = segment[:800], segment[800:]
    injector.send(
        ethernet_ipv4(SOURCE, GROUP, 17, second, identification=77, fragment_offset=100),
        ethernet_ipv4(SOURCE, GROUP, 17, first, identification=77, more_fragments=True),
    )
    assert receiver.take(1) == [payload]
    injector.close()
    receiver.sock.close()


@pytest.mark.parametrize("size", [4000, 65507])
def test_a_datagram_larger_than_a_slot_is_relayed_whole_or_counted(bench: Bench, size: int) -> None:
    """A sender's fragments, reassembled, exceed the MTU. Of a ring's socket the whole is to be had all the same."""
    payload = bytes(n * n % 251 for n in range(size))
    segment = udp_segment(SOURCE, GROUP, 4000, PORT, payload)
    receiver = Receiver(bench.line.receiver, "239.2.2.2", 6000)
    bench.start()
    bench.rules(entry(GROUP, PORT, [leg("239.2.2.2", 6000, OUT0)]))
    injector = Injector(bench.line.sender, "eth0")
    injector.send(
        *(
            ethernet_ipv4(
                *(SOURCE, GROUP, 17, segment[at : at + 1400]),
                identification=78,
                fragment_offset=at // 8,
                more_fragments=at + 1400 < len(segment),
            )
            for at in range(0, len(segment), 1400)
        )
    )
    bench.wait_received(1)
    if bench.kind.whole:
        assert receiver.take(1) == [payload]
        assert bench.page.dropped() == {}
    else:
        assert bench.page.dropped() == {"oversize": 1}
    injector.send(frame())
    assert receiver.take(1) == [PAYLOAD]
    assert receiver.is_empty()
    injector.close()
    receiver.sock.close()

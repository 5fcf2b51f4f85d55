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
    "an empty fragment of an IPv6 packet": (
        lambda: frame6(fragment_header(17, 800, 7, more=False), first=44, body=b""),
        "fragment",
    ),
    "a fragment of an odd length that is not the last": (
        lambda: frame6(fragment_header(17, 800, 7, more=True), first=44, body=bytes(15)),
        "fragment",
    ),
    "a fragment that would reach beyond the longest packet": (
        lambda: frame6(fragment_header(17, 65528, 7, more=True), first=44, body=bytes(8)),
        "fragment",
    ),
    "a first fragment without all headers": (
        lambda: frame6(fragment_header(60, 0, 7, more=True), first=44, body=bytes((17, 1)) + bytes(6)),
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


def fragments6(body: bytes, identification: int, *, room: int = 1440, ttl: int = 8, before: bytes = b"") -> list[bytes]:
    """Frames of the fragments of an IPv6 packet. `before`: a header of destination options in front of each."""
    return [
        ethernet(
            ip_packet(
                *(HOST6, GROUP6, body[at : at + room]),
                protocol=60 if before else 44,
                ttl=ttl if at == 0 else 99,
                extensions=before + fragment_header(17, at, identification, more=at + room < len(body)),
            )
        )
        for at in range(0, len(body), room)
    ]


def start_ipv6(bench: Bench) -> Receiver:
    bench.start()
    bench.rules(
        entry(GROUP, PORT, [leg("239.2.2.2", 6000, OUT0)]),
        entry(GROUP6, PORT, [leg("239.2.2.2", 6000, OUT0, counter=1)], counter=1),
    )
    return Receiver(bench.line.receiver, "239.2.2.2", 6000)


@pytest.mark.parametrize("order", ["forwards", "backwards", "doubled"])
def test_fragments_of_ipv6_arrive_as_one_datagram(bench: Bench, order: str) -> None:
    payloads = [bytes(n * n % 251 for n in range(size)) for size in (1500, 8000, 65507)]
    receiver = start_ipv6(bench)
    injector = Injector(bench.line.sender, "eth0")
    doubled = 0
    for number, payload in enumerate(payloads):
        frames = fragments6(udp(HOST6, GROUP6, 4000, PORT, payload), number, before=bytes((44, 0)) + bytes(6))
        if order == "doubled":
            frames = [copy for one in frames[:-1] for copy in (one, one)] + frames[-1:]
            doubled += len(frames) // 2
        injector.send(*(reversed(frames) if order == "backwards" else frames))
        assert receiver.take_with_ttl(1) == [(payload, 7)]  # the first one's, less one
    bench.wait_received(len(payloads) + doubled)
    totals = bench.page.totals()
    assert (totals["received"], totals["forwarded"]) == (len(payloads) + doubled, len(payloads))
    assert totals["received_bytes"] == sum(map(len, payloads))
    assert bench.page.dropped() == ({"fragment": doubled} if doubled else {})
    injector.close()
    receiver.sock.close()


def test_many_datagrams_in_fragments_at_once(bench: Bench) -> None:
    """More in one batch than may be complete at a time."""
    payloads = [number.to_bytes(2) + bytes(200) for number in range(150)]
    receiver = Receiver(bench.line.receiver, "239.2.2.2", 6000)
    injector = Injector(bench.line.sender, "eth0")
    for number, payload in enumerate(payloads):
        injector.send(*fragments6(udp(HOST6, GROUP6, 4000, PORT, payload), number, room=128))
    bench.start_bare()
    assert bench.answer(bench.attach_egress(OUT0)) == 0
    bench.rules(entry(GROUP6, PORT, [leg("239.2.2.2", 6000, OUT0)]))
    assert bench.answer(bench.attach_ingress()) == 0
    assert receiver.take(len(payloads)) == payloads
    bench.wait_received(len(payloads))
    assert bench.page.dropped() == {}
    injector.close()
    receiver.sock.close()


def test_what_fragments_become_is_checked_like_any_packet(bench: Bench) -> None:
    payload = bytes(3000)
    wrong = {
        "bad_udp_checksum": udp(HOST6, GROUP6, 4000, PORT, payload, checksum=0x1234),
        "no_rule": udp(HOST6, GROUP6, 4000, 7, payload),
        "bad_udp_length": udp(HOST6, GROUP6, 4000, PORT, payload)[:2990],
    }
    receiver = start_ipv6(bench)
    injector = Injector(bench.line.sender, "eth0")
    for number, body in enumerate(wrong.values()):
        injector.send(*fragments6(body, number))
    injector.send(frame())
    assert receiver.take(1) == [PAYLOAD]
    bench.wait_received(1 + len(wrong))
    assert bench.page.dropped() == dict.fromkeys(wrong, 1)
    assert receiver.is_empty()
    injector.close()
    receiver.sock.close()


def test_fragments_that_overlap_are_no_datagram(bench: Bench) -> None:
    body = udp(HOST6, GROUP6, 4000, PORT, bytes(n % 251 for n in range(4000)))
    first, second, third = fragments6(body, 1)
    overlapping = ethernet(
        ip_packet(*(HOST6, GROUP6, body[1432:1448]), protocol=44, extensions=fragment_header(17, 1432, 1, more=True))
    )
    receiver = start_ipv6(bench)
    injector = Injector(bench.line.sender, "eth0")
    injector.send(first, overlapping, second, third, frame())
    assert receiver.take(1) == [PAYLOAD]
    bench.wait_received(5)
    assert bench.page.dropped() == {"fragment": 4}
    assert receiver.is_empty()
    injector.close()
    receiver.sock.close()


def test_fragments_that_wait_block_nothing_and_are_lost_in_time(bench: Bench) -> None:
    """More than there are slots of any ingress, or places for packets that wait."""
    floods = 4096
    flood = fragments6(udp(HOST6, GROUP6, 4000, PORT, bytes(2000)), 0)[0]
    at = flood.index(fragment_header(17, 0, 0, more=True)) + 4
    receiver = start_ipv6(bench)
    injector = Injector(bench.line.sender, "eth0")
    for number in range(0, floods, 128):
        injector.send(*(flood[:at] + (number + n).to_bytes(4) + flood[at + 4 :] for n in range(128)))
        injector.send(frame())
        assert receiver.take(1) == [PAYLOAD]
    bench.wait_received(floods + floods // 128)  # it takes the time that they may wait for
    assert bench.page.dropped() == {"fragment": floods}
    injector.close()
    receiver.sock.close()


def test_fragments_that_wait_at_the_end_are_counted(bench: Bench) -> None:
    receiver = start_ipv6(bench)
    injector = Injector(bench.line.sender, "eth0")
    injector.send(*fragments6(udp(HOST6, GROUP6, 4000, PORT, bytes(4000)), 0)[:-1], frame())
    assert receiver.take(1) == [PAYLOAD]
    assert bench.page.totals()["received"] == 1
    bench.stop()
    assert bench.page.dropped() == {"fragment": 2}
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

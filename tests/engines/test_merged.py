"""Frames that hold several datagrams: a device merged them on reception, or the sender left the cutting to its device.

A sender with UDP_SEGMENT over a veth pair that promises to segment (the default) makes such frames, as large as 64 KiB:

    sender eth0 ==frames of many datagrams==> in0 relay out0 ----> receiver

Whatever comes in, what goes out are the datagrams that were meant.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

import pytest

from lab.capture import Capture
from lab.namespaces import Lab, unsupported, wait_until
from lab.topology import RelayLine, relay_line
from mcrelay.engines.reference import ReferenceEngine
from mcrelay.entries import LegFlag
from mcrelay.ways import Way
from tests.engines.bench import OUT0, OUT1, Bench, Kind, Receiver, Sender, entry, leg

UDP_SEGMENT = 103  # linux/udp.h
GROUP, PORT = "239.1.1.1", 5000


@pytest.fixture(scope="module")
def merging_line() -> Iterator[RelayLine]:
    if reason := unsupported():
        pytest.skip(reason)
    with Lab() as lab:
        built = relay_line(lab, outputs=2)
        # What leaves the relay is cut apart by the kernel, checksums included, so that a capture sees the datagrams.
        for egress in built.egresses:
            built.relay.ethtool("-K", egress.interface, "tx", "off", "tx-udp-segmentation", "off")
        yield built


@pytest.fixture
def merging(merging_line: RelayLine, kind: Kind) -> Iterator[Bench]:
    opened = Bench(merging_line, kind)
    yield opened
    opened.close()


def send_merged(sender: Sender, payload: bytes, segment: int) -> list[bytes]:
    """One frame; returns the datagrams in it."""
    sender.sock.sendmsg([payload], [(socket.IPPROTO_UDP, UDP_SEGMENT, struct.pack("=H", segment))], 0, (GROUP, PORT))
    return [payload[at : at + segment] for at in range(0, len(payload), segment)]


def content(size: int, seed: int = 0) -> bytes:
    return bytes((n * n + n // 251 + seed) % 256 for n in range(size))


def start(bench: Bench) -> tuple[Receiver, Receiver, Sender]:
    """Two outputs, on an interface each."""
    bench.start()
    bench.rules(
        entry(GROUP, PORT, [leg("239.2.2.2", 6000, OUT0, counter=0), leg("239.2.2.2", 6000, OUT1, ttl=9, counter=1)])
    )
    first, second = (Receiver(receiver, "239.2.2.2", 6000) for receiver in bench.line.receivers)
    return first, second, Sender(bench.line.sender)


def close(*ends: Receiver | Sender) -> None:
    for end in ends:
        end.sock.close()


def test_frames_arrive_merged_at_all(merging_line: RelayLine) -> None:
    """What the other tests rely on."""
    sender = Sender(merging_line.sender)
    with Capture(merging_line.relay, "in0") as capture:
        send_merged(sender, content(1000), 100)
        capture.wait_for(lambda frame: frame.udp and len(frame.udp.payload) == 1000)
    close(sender)


@pytest.mark.parametrize(("size", "segment"), [(1000, 100), (1001, 100), (1050, 100), (101, 100), (64, 1)])
def test_a_merged_frame_within_the_mtu_comes_out_as_its_datagrams(merging: Bench, size: int, segment: int) -> None:
    first, second, sender = start(merging)
    expected: list[bytes] = []
    for number in range(20):
        expected += send_merged(sender, content(size, number), segment)
        sender.send([content(70, number)])  # between the merged ones: order is kept
        expected.append(content(70, number))
    for receiver in (first, second):
        assert receiver.take(len(expected)) == expected
        assert receiver.is_empty()
    merging.wait_received(len(expected))
    total = sum(map(len, expected))
    assert merging.page.totals()["received_bytes"] == total
    assert merging.page.rule(0) == (len(expected), total, len(expected), 0)
    assert merging.page.output(0) == merging.page.output(1) == (len(expected), total, {})
    assert merging.page.dropped() == {}
    close(first, second, sender)


@pytest.mark.parametrize(
    ("size", "segment"), [(44 * 1472, 1472), (60_000, 1000), (64 * 900 - 1, 900), (100 * 500, 500)]
)
def test_a_merged_frame_beyond_the_mtu_comes_out_as_its_datagrams_or_is_counted(
    merging: Bench, size: int, segment: int
) -> None:
    first, second, sender = start(merging)
    for number in range(50):  # more than are held at once
        expected = send_merged(sender, content(size, number), segment)
        sender.send([b"behind it"])
        if not merging.kind.whole:
            expected = []
        expected.append(b"behind it")
        assert first.take(len(expected)) == expected
        assert second.take(len(expected)) == expected
    assert first.is_empty()
    assert second.is_empty()
    merging.wait_received(50)
    assert merging.page.dropped() == ({} if merging.kind.whole else {"merged": 50})
    close(first, second, sender)


def test_a_merged_frame_for_nobody_counts_as_its_datagrams(merging: Bench) -> None:
    first, second, sender = start(merging)
    merging.rules()
    send_merged(sender, content(1000), 100)
    merging.wait_received(10)
    assert merging.page.dropped() == {"no_rule": 10}
    close(first, second, sender)


def test_a_merged_frame_leaves_with_headers_of_our_own(merging_line: RelayLine, kind: Kind) -> None:
    """By packet and raw sockets; of those only the former take several datagrams at once."""
    merging = Bench(merging_line, kind, ways=[Way.FRAME, Way.RAW4])
    keep = LegFlag.KEEP_SOURCE | LegFlag.KEEP_DSCP
    host = merging_line.egresses[0].receiver_address
    merging.start()
    merging.rules(
        entry(
            GROUP,
            PORT,
            [
                leg("239.2.2.2", 6000, OUT0, way=Way.FRAME, flags=keep, source_port=99, counter=0),
                leg(host, 6000, OUT0, way=Way.RAW4, flags=keep, source_port=99, counter=1),
            ],
        )
    )
    sender = Sender(merging_line.sender)
    expected = []
    with Capture(merging_line.receiver, "eth0", only=lambda f: not f.outgoing and f.udp is not None) as capture:
        for number in range(20):
            expected += send_merged(sender, content(1050, number), 100)
            sender.send([content(70, number)])
            expected.append(content(70, number))
        merging.wait_received(len(expected))
        wait_until(lambda: len(capture.frames) >= 2 * len(expected), 5, "copies are missing")
        arrived = capture.udp()
    assert {datagram.checksum_valid for datagram in arrived} == {True}
    assert {(d.source, d.source_port, d.ttl) for d in arrived} == {(merging_line.sender_address, 99, 7)}
    for to in ("239.2.2.2", host):
        assert [datagram.payload for datagram in arrived if datagram.destination == to] == expected
    assert merging.page.dropped() == {}
    assert merging.page.totals()["segments_refused"] == 0
    close(sender)
    merging.close()


def test_a_merged_frame_leaves_datagram_by_datagram_where_segments_cannot(merging: Bench) -> None:
    """Datagrams above the egress's MTU have to be fragmented; order holds, also against what comes behind."""
    merging_line = merging.line
    merging_line.relay.ip("link", "set", "out0", "mtu", "600")
    try:
        merging.start_bare()
        assert merging.engine is not None
        assert merging.answer(merging.attach_egress(OUT0, mtu=600)) == 0
        merging.rules(entry(GROUP, PORT, [leg("239.2.2.2", 6000, OUT0)]))
        receiver = Receiver(merging_line.receiver, "239.2.2.2", 6000)
        sender = Sender(merging_line.sender)
        expected = []
        for number in range(10):  # all there before the engine reads
            expected += send_merged(sender, content(1400, number), 700)
            sender.send([content(50, number)])
            expected.append(content(50, number))
        assert merging.answer(merging.attach_ingress()) == 0
        assert receiver.take(len(expected)) == expected
        assert receiver.is_empty()
        merging.wait_received(len(expected))
        assert merging.page.totals()["segments_refused"] == 0
        assert merging.page.output(0)[0] == len(expected)
        close(receiver, sender)
    finally:
        merging_line.relay.ip("link", "set", "out0", "mtu", "1500")


def test_segments_of_a_merged_frame_that_are_refused_are_sent_again(merging: Bench) -> None:
    """The path's MTU is smaller than the engine was told."""
    merging_line = merging.line
    merging_line.relay.ip("link", "set", "out0", "mtu", "600")
    try:
        first, second, sender = start(merging)
        expected = send_merged(sender, content(1400), 700)
        assert first.take(2) == expected
        assert second.take(2) == expected
        expected = send_merged(sender, content(1000), 100)
        assert first.take(10) == expected
        assert second.take(10) == expected
        merging.wait_received(12)
        segments = merging.kind.make is not ReferenceEngine  # which sends none
        assert merging.page.totals()["segments_refused"] == (1 if segments else 0)
        assert merging.page.output(0)[0] == merging.page.output(1)[0] == 12
        close(first, second, sender)
    finally:
        merging_line.relay.ip("link", "set", "out0", "mtu", "1500")

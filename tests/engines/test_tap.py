"""Taps of every engine: who watches a rule sees its packets, each with what became of it, and disturbs nothing."""

from __future__ import annotations

import errno
import select
import socket
import time
from collections.abc import Iterator
from ipaddress import IPv4Address

import pytest

from lab.capture import Injector
from lab.frames import ethernet_ipv4_udp
from mcrelay.counters import REASON
from mcrelay.entries import LegFlag, mapped
from mcrelay.limits import TAPS_MAX
from mcrelay.tap import Record, read_headers, read_record
from mcrelay.ways import Way
from tests.engines.bench import IN0, OUT0, OUT1, Bench, Receiver, Sender, entry, leg
from tests.engines.packets import FRAGMENT, UDP, ethernet, fragment_header, ip_packet, udp

SNAP = 60
OWN = "192.0.2.1"
HOST6, GROUP6 = "2001:db8:a::10", "ff05::101"
RECORD_ROOM = 70_000


class Watcher:
    """Both ends of a tap."""

    def __init__(self) -> None:
        self.reader, self.writer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.reader.settimeout(5)

    @property
    def fd(self) -> int:
        return self.writer.fileno()

    def next(self) -> tuple[Record, bytes]:
        return read_record(self.reader.recv(RECORD_ROOM))

    def is_empty(self) -> bool:
        return not select.select([self.reader], [], [], 0)[0]

    def close(self) -> None:
        self.reader.close()
        self.writer.close()


@pytest.fixture
def watcher(bench: Bench) -> Iterator[Watcher]:
    opened = Watcher()
    yield opened
    bench.stop()  # it has borrowed the descriptor
    opened.close()


@pytest.fixture
def sender(bench: Bench) -> Iterator[Sender]:
    opened = Sender(bench.line.sender)
    yield opened
    opened.sock.close()


@pytest.fixture
def receiver(bench: Bench) -> Iterator[Receiver]:
    opened = Receiver(bench.line.receiver, "239.2.2.2", 6000)
    yield opened
    opened.sock.close()


def open_tap(bench: Bench, watcher: Watcher, rule: int = 7, count: int = 1000, snap: int = SNAP) -> int:
    assert bench.engine is not None
    return bench.answer(bench.engine.open_tap(rule, watcher.fd, count, snap))


def test_each_packet_of_a_rule_is_shown_with_what_became_of_it(bench: Bench, watcher: Watcher, sender: Sender) -> None:
    engine = bench.start()
    assert bench.answer(engine.detach_egress(OUT1, Way.UDP4)) == 0
    to_out0, to_out1 = leg("239.2.2.2", 6000, OUT0, counter=3), leg("239.2.2.3", 6000, OUT1, counter=4)
    bench.rules(
        entry("239.1.1.1", 5000, [to_out0], counter=7),
        entry("239.1.1.2", 5000, [leg("239.2.2.4", 6000, OUT0, counter=5)], counter=8),
    )
    assert open_tap(bench, watcher) == 0
    before_ns = time.time_ns()
    sender.send([b"another rule's"], "239.1.1.2")
    sender.send([b"nobody's"], "239.1.1.3")
    sender.send([b"forwarded"])
    record, data = watcher.next()
    assert (record.interface, record.outputs, record.copies, record.datagrams) == (IN0, 1, 1, 1)
    assert (record.reason, record.dropped, record.lost, record.vlan) == (0, [], 0, 0)
    assert before_ns - 10**9 <= record.time_ns <= time.time_ns() + 10**9
    headers = read_headers(data)
    assert headers
    assert (str(headers.source), headers.destination_port, headers.ttl) == ("203.0.113.10", 5000, 8)
    assert data[headers.payload_at :] == b"forwarded"
    assert record.length == len(data) == 28 + len(b"forwarded")
    # To one of two outputs, and to none.
    bench.rules(entry("239.1.1.1", 5000, [to_out1, to_out0], counter=7))
    sender.send([bytes(100)])
    record, data = watcher.next()
    assert (record.outputs, record.copies, record.reason) == (2, 1, 0)
    assert record.dropped == [(4, REASON["egress_unreachable"])]
    assert (record.length, len(data)) == (128, SNAP)
    bench.rules(entry("239.1.1.1", 5000, [to_out1], counter=7))
    sender.send([b"dropped"])
    record, _data = watcher.next()
    assert (record.outputs, record.copies, record.reason) == (1, 0, REASON["egress_unreachable"])
    assert record.dropped == [(4, REASON["egress_unreachable"])]
    # Closed, it shows nothing more, and traffic goes on.
    assert bench.answer(engine.close_tap(watcher.fd)) == 0
    sender.send([b"unseen"])
    bench.wait_received(6)
    assert watcher.is_empty()


def test_what_is_not_to_be_forwarded_is_shown_as_well(bench: Bench, watcher: Watcher) -> None:
    engine = bench.start()
    bench.rules(entry("239.1.1.1", 5000, [leg("239.2.2.2", 6000, OUT0)], counter=7))
    assert bench.answer(engine.set_own_addresses([mapped(IPv4Address(OWN))])) == 0
    assert open_tap(bench, watcher) == 0
    with Injector(bench.line.sender, "eth0") as injector:
        injector.send(ethernet_ipv4_udp(OWN, "239.1.1.1", 4000, 5000, b"came back"))
    record, data = watcher.next()
    assert (record.reason, record.copies, record.outputs) == (REASON["own"], 0, 1)
    assert data.endswith(b"came back")


def test_tags_and_paused_outputs_are_shown(bench: Bench, watcher: Watcher) -> None:
    bench.start()
    paused = leg("239.2.2.3", 6000, OUT0, counter=4, flags=LegFlag.PAUSED)
    bench.rules(entry("239.1.1.1", 5000, [leg("239.2.2.2", 6000, OUT0, counter=3), paused], counter=7, vlan=9))
    assert open_tap(bench, watcher) == 0
    with Injector(bench.line.sender, "eth0") as injector:
        injector.send(ethernet_ipv4_udp("203.0.113.10", "239.1.1.1", 4000, 5000, b"no tag"))
        injector.send(ethernet_ipv4_udp("203.0.113.10", "239.1.1.1", 4000, 5000, b"tagged", vlan=9))
    record, data = watcher.next()
    assert data.endswith(b"tagged")
    assert (record.vlan, record.outputs, record.copies, record.reason) == (9, 2, 1, 0)
    assert record.dropped == [(4, REASON["paused"])]


def test_a_packet_that_was_put_together_is_shown_whole(bench: Bench, watcher: Watcher) -> None:
    bench.start()
    bench.rules(entry(GROUP6, 5000, [leg("239.2.2.2", 6000, OUT0)], counter=7))
    assert open_tap(bench, watcher, snap=2000) == 0
    body = udp(HOST6, GROUP6, 4000, 5000, bytes(range(200)))
    pieces = [(fragment_header(UDP, at, 1, more=at == 0) + body[at : at + 104]) for at in (0, 104)]
    with Injector(bench.line.sender, "eth0") as injector:
        for piece in pieces:
            injector.send(ethernet(ip_packet(HOST6, GROUP6, piece, protocol=FRAGMENT)))
    record, data = watcher.next()
    assert (record.reason, record.length) == (0, 40 + len(body))
    assert data[40:] == body
    headers = read_headers(data)
    assert headers
    assert (str(headers.source), str(headers.destination), headers.destination_port) == (HOST6, GROUP6, 5000)


def test_it_ends_with_the_number_that_was_asked_for(bench: Bench, watcher: Watcher, sender: Sender) -> None:
    bench.start()
    bench.rules(entry("239.1.1.1", 5000, [leg("239.2.2.2", 6000, OUT0)], counter=7))
    assert open_tap(bench, watcher, count=3) == 0
    sender.send([b"%d" % number for number in range(10)])
    bench.wait_received(10)
    assert [watcher.next()[1][28:] for _ in range(3)] == [b"0", b"1", b"2"]
    assert watcher.is_empty()


def test_who_does_not_read_delays_nothing_and_is_told_what_was_lost(
    bench: Bench, watcher: Watcher, sender: Sender, receiver: Receiver
) -> None:
    watcher.writer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    engine = bench.start()
    bench.rules(entry("239.1.1.1", 5000, [leg("239.2.2.2", 6000, OUT0)], counter=7))
    assert open_tap(bench, watcher) == 0
    for _ in range(5):
        sender.send([bytes(100)] * 100)
        receiver.take(100)
    assert bench.answer(engine.probe()) == 0  # nothing is in hand
    shown = [watcher.next()[0]]
    while not watcher.is_empty():
        shown.append(watcher.next()[0])
    assert len(shown) < 500
    sender.send([b"last"])
    record, _data = watcher.next()
    assert record.lost == 500 - len(shown)
    assert bench.page.rule(7)[2] == 501


def test_a_watcher_that_goes_away_disturbs_nothing(bench: Bench, watcher: Watcher, sender: Sender) -> None:
    engine = bench.start()
    bench.rules(entry("239.1.1.1", 5000, [leg("239.2.2.2", 6000, OUT0)], counter=7))
    assert open_tap(bench, watcher) == 0
    watcher.reader.close()
    sender.send([b"unseen"] * 10)
    bench.wait_received(10)
    assert bench.page.rule(7)[2] == 10
    assert bench.answer(engine.close_tap(watcher.fd)) == 0


def test_taps_are_few(bench: Bench) -> None:
    engine = bench.start_bare()
    watchers = [Watcher() for _ in range(TAPS_MAX + 1)]
    *some, last = watchers
    assert [open_tap(bench, one) for one in some] == [0] * TAPS_MAX
    assert open_tap(bench, last) == errno.EBUSY
    assert open_tap(bench, some[0]) == errno.EINVAL
    assert bench.answer(engine.close_tap(some[0].fd)) == 0
    assert bench.answer(engine.close_tap(some[0].fd)) == errno.ENOENT
    assert open_tap(bench, last) == 0
    bench.stop()
    for one in watchers:
        one.close()


def test_several_watch_one_rule(bench: Bench, watcher: Watcher, sender: Sender) -> None:
    bench.start()
    other = Watcher()
    bench.rules(entry("239.1.1.1", 5000, [leg("239.2.2.2", 6000, OUT0)], counter=7))
    assert open_tap(bench, watcher, snap=0) == 0
    assert open_tap(bench, other) == 0
    sender.send([b"for both"])
    assert watcher.next()[1] == b""
    assert other.next()[1].endswith(b"for both")
    bench.stop()
    other.close()

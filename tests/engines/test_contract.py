"""The contract of engines/base.py, held by every engine over real sockets."""

from __future__ import annotations

import errno
import socket
import struct
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from lab.namespaces import Lab, unsupported, wait_until
from lab.topology import RelayLine, relay_line
from mcrelay.engines.reference import COMMANDS_MAX
from mcrelay.engines.uring import UringEngine
from mcrelay.limits import RING_BLOCK_SIZE, ring_geometry
from mcrelay.ways import Way
from tests.engines.bench import ENGINES, IN0, OUT0, OUT1, Bench, Kind, Receiver, Sender, entry, leg, speak_ipv6

BURST = 500  # datagrams before the sender looks whether they were received: far below a socket's buffer


@pytest.fixture
def jumbo_line() -> Iterator[RelayLine]:
    if reason := unsupported():
        pytest.skip(reason)
    with Lab() as lab:
        yield relay_line(lab, mtu=9000)


# --- commands --------------------------------------------------------------------------------------------------------


def test_commands_are_answered_by_an_engine_that_has_no_traffic(bench: Bench) -> None:
    engine = bench.start_bare()
    wait_until(lambda: _is_asleep(bench), 5, "the engine does not block when it has nothing to do")
    assert bench.answer(engine.detach_ingress(IN0)) == errno.ENOENT
    assert bench.answer(bench.attach_ingress()) == 0
    wait_until(lambda: _is_asleep(bench), 5, "the engine does not block on an idle interface")
    assert bench.answer(bench.attach_ingress()) == errno.EEXIST
    assert bench.answer(engine.detach_egress(OUT0, Way.UDP4)) == errno.ENOENT
    assert bench.answer(bench.attach_egress(OUT0)) == 0
    assert bench.answer(bench.attach_egress(OUT0)) == 0
    assert bench.answer(engine.set_rules([])) == 0
    assert bench.answer(engine.detach_egress(OUT0, Way.UDP4)) == 0
    assert bench.answer(engine.detach_ingress(IN0)) == 0
    assert bench.answer(bench.attach_ingress()) == 0


def _is_asleep(bench: Bench) -> bool:
    """The engine's thread is in state S, unless it never sleeps, and has used no processor time since a moment ago."""
    thread = bench.thread_id

    def read() -> tuple[str, str, str]:
        with open(f"/proc/self/task/{thread}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        return fields[0], fields[11], fields[12]

    if not bench.kind.sleeps:
        return True
    before = read()
    time.sleep(0.15)  # the interval over which the claim is made
    return before[0] == "S" and read() == before


def test_too_many_commands_are_refused_at_once(bench: Bench) -> None:
    engine = bench.start_bare()
    tickets = [engine.set_rules([]) for _ in range(COMMANDS_MAX)]
    with pytest.raises(BlockingIOError):
        engine.set_rules([])
    assert [bench.answer(ticket) for ticket in tickets] == [0] * COMMANDS_MAX
    assert bench.answer(engine.set_rules([])) == 0


def test_a_batch_is_a_turn_in_which_packets_were_taken_up(bench: Bench) -> None:
    """Commands, timers and, where the engine never sleeps, nothing at all make turns, too."""
    bench.start()
    sender = Sender(bench.line.sender)
    rule = entry("239.1.1.1", 5000, [leg("239.2.2.2", 6000, OUT0)])
    bench.rules(rule)
    assert bench.page.totals()["batches"] == 0
    for sent in range(1, 4):
        sender.send([b"one"])
        bench.wait_received(sent)
        for _ in range(3):
            bench.rules(rule)
        assert bench.page.totals()["batches"] == sent


# --- forwarding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 46, 1000, 1472])
def test_a_burst_arrives_byte_identical(bench: Bench, size: int) -> None:
    relay_burst(bench, size, 10_000)


def test_a_burst_of_jumbo_datagrams_arrives_byte_identical(jumbo_line: RelayLine, kind: Kind) -> None:
    bench = Bench(jumbo_line, kind, mtu=9000)
    relay_burst(bench, 8972, 10_000)
    bench.close()


def relay_burst(bench: Bench, size: int, count: int) -> None:
    receiver = Receiver(bench.line.receiver, "239.2.2.2", 6000)
    sender = Sender(bench.line.sender)
    bench.start()
    bench.rules(entry("239.1.1.1", 5000, [leg("239.2.2.2", 6000, OUT0)]))
    payloads = [_distinct(number, size) for number in range(count)]
    arrived: list[bytes] = []
    for start in range(0, count, BURST):
        sender.send(payloads[start : start + BURST])
        arrived += receiver.take(min(BURST, count - start))
    # In order, none missing, none twice, none with a neighbour's bytes.
    assert arrived == payloads
    assert receiver.is_empty()
    bench.wait_received(count)
    totals = bench.page.totals()
    assert (totals["received"], totals["forwarded"], totals["copies"]) == (count, count, count)
    assert totals["received_bytes"] == totals["copies_bytes"] == count * size
    assert bench.page.rule(0) == (count, count * size, count, 0)
    assert bench.page.output(0) == (count, count * size, {})
    assert bench.page.dropped() == {}
    receiver.sock.close()
    sender.sock.close()


def _distinct(number: int, size: int) -> bytes:
    """Every byte depends on the number, as far as there is room to."""
    pattern = struct.pack("!I", number * 2654435761 % 2**32)
    return (pattern * (size // 4 + 1))[:size]


def test_one_input_goes_to_several_outputs_with_their_own_ttl(bench: Bench) -> None:
    group = Receiver(bench.line.receiver, "239.2.2.2", 6000)
    unicast = Receiver(bench.line.receiver, bench.line.egresses[0].receiver_address, 6001)
    other = Receiver(bench.line.receivers[1], "239.1.1.1", 5000)
    sender = Sender(bench.line.sender, ttl=8)
    last = Sender(bench.line.sender, ttl=1)
    bench.start()
    bench.rules(
        entry(
            "239.1.1.1",
            5000,
            [
                leg("239.2.2.2", 6000, OUT0, ttl=33, counter=0),
                leg(bench.line.egresses[0].receiver_address, 6001, OUT0, ttl=0, counter=1),
                leg("239.1.1.1", 5000, OUT1, ttl=0, counter=2),
            ],
            counter=7,
        )
    )
    sender.send([b"first"])
    last.send([b"last"])
    assert group.take_with_ttl(2) == [(b"first", 33), (b"last", 33)]
    # One less than it came with, and never below 1.
    assert unicast.take_with_ttl(2) == [(b"first", 7), (b"last", 1)]
    assert other.take_with_ttl(2) == [(b"first", 7), (b"last", 1)]
    bench.wait_received(2)
    assert bench.page.rule(7) == (2, 9, 2, 0)
    assert [bench.page.output(counter)[:2] for counter in range(3)] == [(2, 9)] * 3
    assert bench.page.totals()["copies"] == 6
    for sock in (group, unicast, other, sender, last):
        sock.sock.close()


def test_fifty_outputs_more_than_a_turn_can_send(bench: Bench) -> None:
    outputs, count = 50, 200
    receivers = [Receiver(bench.line.receiver, "239.2.2.2", 6000 + n) for n in range(outputs)]
    sender = Sender(bench.line.sender)
    bench.start()
    bench.rules(entry("239.1.1.1", 5000, [leg("239.2.2.2", 6000 + n, OUT0, counter=n) for n in range(outputs)]))
    payloads = [_distinct(number, 100) for number in range(count)]
    sender.send(payloads)
    for receiver in receivers:
        assert receiver.take(count) == payloads
        assert receiver.is_empty()
        receiver.sock.close()
    bench.wait_received(count)
    assert bench.page.totals()["copies"] == count * outputs
    sender.sock.close()


def test_traffic_flows_by_the_rules_of_the_moment(bench: Bench) -> None:
    first = Receiver(bench.line.receiver, "239.2.2.2", 6000)
    second = Receiver(bench.line.receiver, "239.2.2.3", 6000)
    sender = Sender(bench.line.sender)
    bench.start()
    sender.send([b"before"])
    bench.wait_received(1)
    bench.rules(entry("239.1.1.1", 5000, [leg("239.2.2.2", 6000, OUT0)]))
    sender.send([b"to the first"])
    assert first.take(1) == [b"to the first"]
    bench.rules(entry("239.1.1.1", 5000, [leg("239.2.2.3", 6000, OUT0, counter=1)], counter=1))
    sender.send([b"to the second"])
    assert second.take(1) == [b"to the second"]
    bench.rules()
    sender.send([b"after"])
    bench.wait_received(4)
    assert bench.page.dropped() == {"no_rule": 2}
    assert first.is_empty()
    assert second.is_empty()
    for sock in (first, second, sender):
        sock.sock.close()


def test_rules_change_during_traffic_and_each_packet_goes_by_one_of_them(bench: Bench) -> None:
    receivers = [Receiver(bench.line.receiver, f"239.2.2.{n}", 6000) for n in (1, 2)]
    sender = Sender(bench.line.sender)
    bench.start()
    rounds, burst = 200, 50
    bench.rules(entry("239.1.1.1", 5000, [leg("239.2.2.1", 6000, OUT0, counter=1)]))
    arrived: list[bytes] = []
    for number in range(rounds):
        payloads = [_distinct(number * burst + n, 64) for n in range(burst)]
        sender.send(payloads[: burst // 2])
        turn = 1 + (number + 1) % 2
        assert bench.engine is not None
        ticket = bench.engine.set_rules([entry("239.1.1.1", 5000, [leg(f"239.2.2.{turn}", 6000, OUT0, counter=turn)])])
        sender.send(payloads[burst // 2 :])
        assert bench.answer(ticket) == 0
        bench.wait_received((number + 1) * burst)
        by_receiver = [bench.page.output(n)[0] for n in (1, 2)]
        assert sum(by_receiver) == (number + 1) * burst
    for receiver, counter in zip(receivers, (1, 2), strict=True):
        arrived += receiver.take(bench.page.output(counter)[0])
        assert receiver.is_empty()
    assert Counter(arrived) == Counter(_distinct(n, 64) for n in range(rounds * burst))
    sender.sock.close()
    for receiver in receivers:
        receiver.sock.close()


def test_a_successor_goes_on_where_the_engine_stopped(bench: Bench) -> None:
    receiver = Receiver(bench.line.receiver, "239.2.2.2", 6000)
    sender = Sender(bench.line.sender)
    rule = entry("239.1.1.1", 5000, [leg("239.2.2.2", 6000, OUT0)])
    for life in range(5):
        # Packets that come while nobody runs wait in the socket.
        sender.send([_distinct(life, 200)] * 100)
        bench.start_bare()
        assert bench.engine is not None
        bench.rules(rule)
        assert bench.answer(bench.attach_egress(OUT0)) == 0
        assert bench.answer(bench.attach_ingress()) == 0
        assert receiver.take(100) == [_distinct(life, 200)] * 100
        bench.stop()
    assert bench.page.totals()["forwarded"] == 500
    receiver.sock.close()
    sender.sock.close()


# --- what is not forwarded -------------------------------------------------------------------------------------------


def test_an_egress_that_is_gone_or_without_route_is_counted(bench: Bench) -> None:
    receiver = Receiver(bench.line.receiver, "239.2.2.2", 6000)
    sender = Sender(bench.line.sender)
    engine = bench.start()
    bench.rules(
        entry("239.1.1.1", 5000, [leg("239.2.2.2", 6000, OUT0, counter=0), leg("239.2.2.2", 6000, 9, counter=1)])
    )
    sender.send([b"half of it"])
    assert receiver.take(1) == [b"half of it"]
    bench.wait_received(1)
    # One copy left: the packet counts as forwarded, the output that failed has its own count.
    assert bench.page.dropped() == {}
    assert bench.page.output(1) == (0, 0, {"egress_unreachable": 1})
    bench.line.relay.ip("link", "set", "out0", "down")
    try:
        sender.send([b"nowhere"])
        bench.wait_received(2)
        assert bench.page.dropped() == {"egress_unreachable": 1}
    finally:
        bench.line.relay.ip("link", "set", "out0", "up")
        wait_until(lambda: bench.line.relay.running("out0"), 5, "out0 does not come up again")
        speak_ipv6(bench.line)  # which does not survive that
    sender.send([b"back"])
    assert receiver.take(1) == [b"back"]
    assert bench.answer(engine.detach_egress(OUT0, Way.UDP4)) == 0
    sender.send([b"detached"])
    bench.wait_received(4)
    assert bench.page.dropped() == {"egress_unreachable": 2}
    assert bench.page.rule(0)[2:] == (2, 2)
    receiver.sock.close()
    sender.sock.close()


def test_a_send_that_is_not_permitted_is_counted(bench: Bench) -> None:
    sender = Sender(bench.line.sender)
    bench.egress[OUT0, Way.UDP4].setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 0)
    bench.start()
    bench.rules(entry("239.1.1.1", 5000, [leg("198.51.100.255", 6000, OUT0)]))  # the subnet's broadcast address
    sender.send([b"to everybody"])
    bench.wait_received(1)
    assert bench.page.dropped() == {"egress_refused": 1}
    assert bench.page.output(0) == (0, 0, {"egress_refused": 1})
    sender.sock.close()


def test_a_full_egress_is_counted_and_does_not_delay_another(bench: Bench) -> None:
    count = 400
    slow, fast = bench.line.egresses
    receiver = Receiver(fast.receiver, "239.2.2.2", 6000)
    sender = Sender(bench.line.sender)
    bench.egress[OUT0, Way.UDP4].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    _tc(bench.line, "add", slow.interface, "tbf", "rate", "64kbit", "burst", "2kb", "limit", "1mb")
    try:
        bench.start()
        bench.rules(
            entry("239.1.1.1", 5000, [leg("239.2.2.2", 6000, OUT0, counter=0), leg("239.2.2.2", 6000, OUT1, counter=1)])
        )
        payloads = [_distinct(number, 1000) for number in range(count)]
        sender.send(payloads)
        assert receiver.take(count) == payloads
        bench.wait_received(count)
        sent, _bytes, dropped = bench.page.output(0)
        assert dropped["egress_full"] > count // 2
        assert sent + dropped["egress_full"] == count
        assert bench.page.output(1) == (count, count * 1000, {})
        assert bench.page.totals()["forwarded"] == count
        bench.stop()
    finally:
        _tc(bench.line, "del", slow.interface)
    receiver.sock.close()
    sender.sock.close()


def _tc(line: RelayLine, verb: str, interface: str, *kind: str) -> None:
    line.relay.run("tc", "qdisc", verb, "dev", interface, "root", *kind)


def test_overruns_of_the_ingress_socket_are_counted(line: RelayLine, kind: Kind, descriptors: None) -> None:
    bench = Bench(line, kind, ring_memory=RING_BLOCK_SIZE)
    count = 5000
    receiver = Receiver(bench.line.receiver, "239.2.2.2", 6000)
    sender = Sender(bench.line.sender)
    bench.ingress.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
    sender.send([_distinct(number, 1000) for number in range(count)])  # nobody reads yet
    bench.start()
    bench.rules(entry("239.1.1.1", 5000, [leg("239.2.2.2", 6000, OUT0)]))
    bench.wait_received(count)
    dropped = bench.page.dropped()
    assert dropped["ingress_overrun"] > count // 2
    assert bench.page.totals()["received"] == count
    receiver.sock.close()
    sender.sock.close()
    bench.close()


def test_a_pool_that_is_exhausted_is_counted_and_survived(line: RelayLine, descriptors: None) -> None:
    bench = Bench(line, Kind(lambda page: UringEngine(page, slots=4)))
    count = 2000
    receiver = Receiver(bench.line.receiver, "239.2.2.2", 6000)
    sender = Sender(bench.line.sender)
    payloads = [_distinct(number, 500) for number in range(count)]
    sender.send(payloads)  # all there before the engine starts: every turn fills the pool
    bench.start_bare()
    assert bench.engine is not None
    bench.rules(entry("239.1.1.1", 5000, [leg("239.2.2.2", 6000, OUT0)]))
    assert bench.answer(bench.attach_egress(OUT0)) == 0
    assert bench.answer(bench.attach_ingress()) == 0
    assert receiver.take(count) == payloads
    bench.wait_received(count)
    assert bench.page.totals()["pool_exhausted"] > 0
    assert bench.page.dropped() == {}
    receiver.sock.close()
    sender.sock.close()
    bench.close()


def test_the_ingress_interface_goes_down_and_comes_back(bench: Bench) -> None:
    receiver = Receiver(bench.line.receiver, "239.2.2.2", 6000)
    sender = Sender(bench.line.sender)
    bench.start()
    bench.rules(entry("239.1.1.1", 5000, [leg("239.2.2.2", 6000, OUT0)]))
    for number in range(3):
        payload = f"life {number}".encode()
        sender.send([payload])
        assert receiver.take(1) == [payload]
        bench.line.relay.ip("link", "set", "in0", "down")
        bench.line.relay.ip("link", "set", "in0", "up")
        wait_until(lambda: bench.line.relay.running("in0") and bench.line.sender.running("eth0"), 5, "in0 stays down")
    sender.send([b"still there"])
    assert receiver.take(1) == [b"still there"]
    receiver.sock.close()
    sender.sock.close()


def test_stop_leaves_what_it_has_not_taken_in_the_socket(bench: Bench) -> None:
    """Whatever an engine took from a socket is forwarded or counted, also when it is stopped under load."""
    count = 6000
    receiver = Receiver(bench.line.receiver, "239.2.2.2", 6000)
    sender = Sender(bench.line.sender)
    rule = entry("239.1.1.1", 5000, [leg("239.2.2.2", 6000, OUT0)])
    payloads = [_distinct(number, 300) for number in range(count)]
    for attempt in range(1, 21):  # an engine is through in some milliseconds, for which we may have no processor
        sender.send(payloads)
        lives = 0
        while (before := bench.page.totals()["received"]) < attempt * count:
            lives += 1
            bench.start_bare()
            assert bench.engine is not None
            bench.engine.set_rules([rule])
            bench.attach_egress(OUT0)
            bench.attach_ingress()
            deadline = time.monotonic() + 20
            while bench.page.totals()["received"] == before:
                assert time.monotonic() < deadline
            bench.stop()
        assert receiver.take(count) == payloads
        assert receiver.is_empty()
        if lives > 1:
            break
    else:
        pytest.fail("the engine was too fast to be stopped in between")
    receiver.sock.close()
    sender.sock.close()


# --- the ring ---------------------------------------------------------------------------------------------------------


def test_a_small_ring_wraps_around_many_times(line: RelayLine, descriptors: None) -> None:
    """Sizes change from packet to packet, flows interleave, and every slot is used again and again."""
    bench = Bench(line, ENGINES["ring"], ring_memory=RING_BLOCK_SIZE)  # 163 frames
    receivers = [Receiver(bench.line.receiver, f"239.2.2.{n}", 6000) for n in (1, 2, 3)]
    sender = Sender(bench.line.sender)
    bench.start()
    bench.rules(
        *(entry(f"239.1.1.{n}", 5000, [leg(f"239.2.2.{n}", 6000, OUT0, counter=n)], counter=n) for n in (1, 2, 3))
    )
    arrived: dict[int, list[bytes]] = {1: [], 2: [], 3: []}
    sent: dict[int, list[bytes]] = {1: [], 2: [], 3: []}
    for start in range(0, 6000, 100):
        for number in range(start, start + 100):
            flow = 1 + number * number % 3
            payload = _distinct(number, number * 37 % 1473)
            sent[flow].append(payload)
            sender.send([payload], f"239.1.1.{flow}")
        bench.wait_received(start + 100)
    for flow, receiver in zip((1, 2, 3), receivers, strict=True):
        arrived[flow] = receiver.take(len(sent[flow]))
        assert receiver.is_empty()
        receiver.sock.close()
    assert arrived == sent
    assert bench.page.dropped() == {}
    sender.sock.close()
    bench.close()


def test_a_ring_filled_before_the_worker_starts_is_read_from_its_oldest_frame(
    line: RelayLine, descriptors: None
) -> None:
    """Also where the unread frames lie around the ring's end, and where all of them are unread."""
    bench = Bench(line, ENGINES["ring"], ring_memory=RING_BLOCK_SIZE)
    frames = RING_BLOCK_SIZE // ring_geometry(1500).frame_size
    receiver = Receiver(bench.line.receiver, "239.2.2.2", 6000)
    sender = Sender(bench.line.sender)
    rule = entry("239.1.1.1", 5000, [leg("239.2.2.2", 6000, OUT0)])
    number = 0
    for filled in (100, 100, 100, frames, frames, 1, 50):
        payloads = [_distinct(number + n, 500) for n in range(filled)]
        number += filled
        sender.send(payloads)
        bench.start_bare()
        bench.rules(rule)
        assert bench.answer(bench.attach_egress(OUT0)) == 0
        assert bench.answer(bench.attach_ingress()) == 0
        assert receiver.take(filled) == payloads
        bench.stop()
    assert bench.page.dropped() == {}
    receiver.sock.close()
    sender.sock.close()
    bench.close()


# --- runs of datagrams ------------------------------------------------------------------------------------------------


def test_what_waits_leaves_in_few_sends(line: RelayLine, kind: Kind, descriptors: None) -> None:
    """Equal lengths leave together, 64 at most; a shorter one ends a run; a longer one begins another."""
    bench = Bench(line, kind)
    receiver = Receiver(bench.line.receiver, "239.2.2.2", 6000)
    sender = Sender(bench.line.sender)
    sizes = [1000] * 64 + [1000] * 10 + [400] + [500] * 3 + [0] * 2 + [600] * 2 + [1472] * 44 + [1472] * 2
    payloads = [_distinct(number, size) for number, size in enumerate(sizes)]
    sender.send(payloads)  # all there before the engine starts
    bench.start_bare()
    bench.rules(entry("239.1.1.1", 5000, [leg("239.2.2.2", 6000, OUT0)]))
    assert bench.answer(bench.attach_egress(OUT0)) == 0
    assert bench.answer(bench.attach_ingress()) == 0
    assert receiver.take(len(sizes)) == payloads
    bench.wait_received(len(sizes))
    sends = bench.page.totals()["sends"]
    if kind.ring:
        # 64, 10 + 400, 3, two empty ones each alone, 2, 44 (what fits a datagram), 2.
        assert sends == 8
    else:
        assert sends <= len(sizes)
    assert bench.page.totals()["segments_refused"] == 0
    receiver.sock.close()
    sender.sock.close()
    bench.close()


def test_payloads_above_the_egress_mtu_are_fragmented_by_the_kernel(jumbo_line: RelayLine, kind: Kind) -> None:
    bench = Bench(jumbo_line, kind, mtu=9000)
    line = jumbo_line
    line.relay.ip("link", "set", "out0", "mtu", "1500")
    receiver = Receiver(line.receiver, "239.2.2.2", 6000)
    sender = Sender(line.sender)
    payloads = [_distinct(number, 4000) for number in range(200)]
    bench.start_bare()
    assert bench.engine is not None
    assert bench.answer(bench.attach_egress(OUT0, mtu=1500)) == 0
    bench.rules(entry("239.1.1.1", 5000, [leg("239.2.2.2", 6000, OUT0)]))
    assert bench.answer(bench.attach_ingress()) == 0
    sender.send(payloads)
    assert receiver.take(len(payloads)) == payloads
    assert bench.page.totals()["segments_refused"] == 0
    receiver.sock.close()
    sender.sock.close()
    bench.close()


def test_an_interface_that_refuses_segments_gets_plain_sends(line: RelayLine, descriptors: None) -> None:
    """The path's MTU is smaller than the engine was told, so the kernel refuses segments (EINVAL): nothing is lost."""
    bench = Bench(line, ENGINES["ring"])
    receiver = Receiver(bench.line.receiver, "239.2.2.2", 6000)
    sender = Sender(bench.line.sender)
    payloads = [_distinct(number, 1400) for number in range(300)]
    line.relay.ip("link", "set", "out0", "mtu", "1000")
    try:
        sender.send(payloads[:200])
        bench.start_bare()
        bench.rules(entry("239.1.1.1", 5000, [leg("239.2.2.2", 6000, OUT0)]))
        assert bench.answer(bench.attach_egress(OUT0)) == 0
        assert bench.answer(bench.attach_ingress()) == 0
        assert receiver.take(200) == payloads[:200]
        refused = bench.page.totals()["segments_refused"]
        assert refused > 0
        sender.send(payloads[200:])
        assert receiver.take(100) == payloads[200:]
        bench.wait_received(300)
        assert bench.page.totals()["segments_refused"] == refused  # it is remembered
        assert bench.page.dropped() == {}
        assert bench.page.totals()["sends"] == 300
    finally:
        line.relay.ip("link", "set", "out0", "mtu", "1500")
        speak_ipv6(line)  # which takes an MTU of 1280
    receiver.sock.close()
    sender.sock.close()
    bench.close()

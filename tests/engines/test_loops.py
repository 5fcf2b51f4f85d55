"""What came from this host does not leave it again and again: own traffic, and loops by way of another relay.

Packets are injected as raw frames in the sender's namespace, since a socket there sends from one address only.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator
from ipaddress import IPv4Address

import pytest

from lab.capture import Injector
from lab.frames import ethernet_ipv4_udp
from mcrelay.counters import LoopFacts
from mcrelay.entries import mapped
from mcrelay.limits import ADDRESSES_MAX
from tests.engines.bench import OUT0, Bench, Receiver, entry, leg

GROUP, PORT = "239.1.1.1", 5000
OWN = "192.0.2.1"
STRANGER = "203.0.113.10"


@pytest.fixture
def injector(bench: Bench) -> Iterator[Injector]:
    with Injector(bench.line.sender, "eth0") as opened:
        yield opened


@pytest.fixture
def receiver(bench: Bench) -> Iterator[Receiver]:
    opened = Receiver(bench.line.receiver, "239.2.2.2", 6000)
    yield opened
    opened.sock.close()


def frame(source: str, payload: bytes, group: str = GROUP) -> bytes:
    return ethernet_ipv4_udp(source, group, 4000, PORT, payload)


def packed(*addresses: str) -> list[bytes]:
    return [mapped(IPv4Address(address)) for address in addresses]


# --- own traffic -----------------------------------------------------------------------------------------------------


def test_own_traffic_that_comes_back_is_dropped_and_counted(
    bench: Bench, injector: Injector, receiver: Receiver
) -> None:
    engine = bench.start()
    bench.rules(entry(GROUP, PORT, [leg("239.2.2.2", 6000, OUT0, counter=3)], counter=7))
    injector.send(frame(OWN, b"addresses are not known yet"))
    assert receiver.take(1) == [b"addresses are not known yet"]
    assert bench.answer(engine.set_own_addresses(packed("127.0.0.1", OWN, "198.51.100.1"))) == 0
    injector.send(frame(OWN, b"came back"), frame(STRANGER, b"a stranger's"), frame(OWN, b"for nobody", "239.9.9.9"))
    assert receiver.take(1) == [b"a stranger's"]
    bench.wait_received(4)
    assert bench.page.dropped() == {"own": 1, "no_rule": 1}
    assert bench.page.loop(7) == LoopFacts(own=1, looped=0, suspensions=0, suspended_until_ns=0)
    size = len(b"addresses are not known yet") + len(b"a stranger's")
    assert bench.page.rule(7) == (2, size, 2, 0)
    assert bench.page.output(3) == (2, size, {})
    # The address is another's now.
    assert bench.answer(engine.set_own_addresses([])) == 0
    injector.send(frame(OWN, b"no longer own"))
    assert receiver.take(1) == [b"no longer own"]
    assert receiver.is_empty()


def test_own_traffic_passes_on_a_loopback_device(bench: Bench, injector: Injector, receiver: Receiver) -> None:
    """Where local programs send from own addresses."""
    engine = bench.start(loopback=True)
    bench.rules(entry(GROUP, PORT, [leg("239.2.2.2", 6000, OUT0)]))
    assert bench.answer(engine.set_own_addresses(packed(OWN))) == 0
    injector.send(frame(OWN, b"of a local program"))
    assert receiver.take(1) == [b"of a local program"]
    bench.wait_received(1)
    assert bench.page.dropped() == {}


def test_own_addresses_have_a_bound(bench: Bench) -> None:
    engine = bench.start_bare()
    addresses = [number.to_bytes(16) for number in range(ADDRESSES_MAX + 1)]
    with pytest.raises(OSError, match=r"\[Errno 22\]") as refusal:
        engine.set_own_addresses(addresses)
    assert refusal.value.errno == errno.EINVAL
    assert bench.answer(engine.set_own_addresses(addresses[1:])) == 0


# --- loops through another relay --------------------------------------------------------------------------------------

RELAY = "203.0.113.99"


class Loop:
    """A rule, and another relay that sends its output back to its input."""

    def __init__(self, bench: Bench, injector: Injector, receiver: Receiver) -> None:
        self.bench = bench
        self._injector = injector
        self._receiver = receiver
        self.sent = 0

    def send(self, *payloads: bytes, source: str = STRANGER) -> None:
        self._injector.send(*(frame(source, payload) for payload in payloads))
        self.sent += len(payloads)

    def until_suspended(self, times: int = 1) -> LoopFacts:
        """A sender and the other relay go on until the rule is suspended."""
        deadline = time.monotonic() + 20
        number = 0
        while (facts := self.bench.page.loop(0)).suspensions < times:
            assert time.monotonic() < deadline, "the loop was not found"
            payload = b"payload number %d goes round" % (number := number + 1)
            self.send(payload)
            # Not what has arrived, which on a loaded machine takes longer than a loop's round may.
            self.send(*[payload] * 40, source=RELAY)
            self.bench.wait_received(self.sent)
        return facts

    def settle(self) -> None:
        """What was under way has come to its end, and nothing is sent back any more."""
        self.bench.wait_received(self.sent)
        while self._receiver.poll():
            pass

    def is_suspended(self) -> bool:
        """Whether something new is not forwarded, or it is too late to tell."""
        until_ns = self.bench.page.loop(0).suspended_until_ns
        self.send(b"not forwarded")
        self.bench.wait_received(self.sent)
        return self._receiver.is_empty() or time.monotonic_ns() >= until_ns

    def until_forwarded(self) -> bytes:
        """Send something new now and then, until it arrives."""
        deadline = time.monotonic() + 20
        while True:
            assert time.monotonic() < deadline, "the rule does not forward any more"
            self.send(b"new %d" % self.sent)
            self.bench.wait_received(self.sent)
            if payload := self._receiver.poll():
                return payload


@pytest.fixture
def loop(bench: Bench, injector: Injector, receiver: Receiver) -> Loop:
    bench.start()
    bench.rules(entry(GROUP, PORT, [leg("239.2.2.2", 6000, OUT0)]))
    return Loop(bench, injector, receiver)


def test_a_loop_is_suspended_for_a_second_and_then_for_two(loop: Loop) -> None:
    bench = loop.bench
    began_ns = time.monotonic_ns()
    first = loop.until_suspended()
    assert began_ns + 10**9 <= first.suspended_until_ns <= time.monotonic_ns() + 10**9
    loop.settle()
    assert loop.is_suspended()
    last = loop.until_forwarded()
    assert time.monotonic_ns() >= first.suspended_until_ns
    assert bench.page.loop(0).suspensions == 1
    second = loop.until_suspended(2)
    assert second.suspended_until_ns >= first.suspended_until_ns + 2 * 10**9
    bench.wait_received(loop.sent)
    facts = bench.page.loop(0)
    packets, _size, forwarded, dropped = bench.page.rule(0)
    assert last.startswith(b"new ")
    assert bench.page.dropped() == {"loop": facts.looped}
    assert (packets, dropped) == (forwarded, 0)
    assert forwarded + facts.looped == bench.page.totals()["received"] == loop.sent
    assert forwarded == bench.page.output(0)[0]


def test_what_does_not_fall_silent_is_no_loop(loop: Loop, receiver: Receiver) -> None:
    """Another source of the same payload that goes on although nothing is forwarded."""
    page = loop.bench.page
    deadline = time.monotonic() + 20
    payload, number = b"", 0
    while not (first := page.loop(0)).suspensions:  # on a loaded machine it may take longer than a loop's round may
        assert time.monotonic() < deadline, "the loop was not found"
        payload = b"constant %d" % (number := number + 1)
        loop.send(payload)
        loop.send(*[payload] * 32, source=RELAY)
        loop.bench.wait_received(loop.sent)
    assert (first.suspensions, first.looped) == (1, 1)
    while page.loop(0).suspended_until_ns == first.suspended_until_ns:
        assert time.monotonic() < deadline, "it stays suspended"
        loop.send(payload, source=RELAY)
        loop.bench.wait_received(loop.sent)
    assert page.loop(0).suspended_until_ns < first.suspended_until_ns
    while receiver.poll():
        pass
    # From then on it is not held against the rule.
    for _ in range(10):
        loop.send(*[payload] * 10, source=RELAY)
        assert receiver.take(10) == [payload] * 10
    assert page.loop(0).suspensions == 1


def test_a_suspension_is_the_rules_and_not_the_counters(loop: Loop, receiver: Receiver, injector: Injector) -> None:
    bench = loop.bench
    loop.until_suspended()
    loop.settle()
    # Another rule with the same counter starts anew.
    bench.page.clear([0], [0])
    bench.rules(entry("239.1.1.2", PORT, [leg("239.2.2.2", 6000, OUT0)]))
    injector.send(frame(STRANGER, b"of another rule", "239.1.1.2"))
    assert receiver.take(1) == [b"of another rule"]
    assert bench.page.loop(0) == LoopFacts(0, 0, 0, 0)
    # And so does the first one after that.
    bench.rules(entry(GROUP, PORT, [leg("239.2.2.2", 6000, OUT0)]))
    loop.send(b"of the first one again")
    assert receiver.take(1) == [b"of the first one again"]


def test_a_suspension_outlives_a_change_of_outputs_but_not_the_engine(loop: Loop, receiver: Receiver) -> None:
    bench = loop.bench
    loop.until_suspended()
    loop.settle()
    bench.rules(entry(GROUP, PORT, [leg("239.2.2.2", 6000, OUT0), leg("239.2.2.2", 6001, OUT0, counter=1)]))
    assert loop.is_suspended()
    loop.settle()
    bench.stop()
    bench.start()
    bench.rules(entry(GROUP, PORT, [leg("239.2.2.2", 6000, OUT0)]))
    loop.send(b"by a successor")
    assert receiver.take(1) == [b"by a successor"]


@pytest.mark.parametrize(
    "sources",
    [[STRANGER], [STRANGER, RELAY], [f"203.0.113.{host}" for host in range(100, 200)]],
    ids=["one sender", "two equal feeds", "a hundred hosts"],
)
def test_the_same_payload_again_is_no_loop(loop: Loop, receiver: Receiver, sources: list[str]) -> None:
    count = 6000
    for start in range(0, count, 200):
        for number in range(start, start + 200):
            loop.send(b"M-SEARCH * HTTP/1.1", source=sources[number % len(sources)])
        assert receiver.take(200) == [b"M-SEARCH * HTTP/1.1"] * 200
    loop.bench.wait_received(count)
    assert loop.bench.page.loop(0) == LoopFacts(0, 0, 0, 0)
    assert loop.bench.page.rule(0)[2:] == (count, 0)

"""What came from this host does not leave it a second time.

Packets are injected as raw frames in the sender's namespace, since a socket there sends from one address only.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from ipaddress import IPv4Address

import pytest

from lab.capture import Injector
from lab.frames import ethernet_ipv4_udp
from mcrelay.counters import LoopFacts
from mcrelay.limits import ADDRESSES_MAX
from mcrelay.rules import mapped
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

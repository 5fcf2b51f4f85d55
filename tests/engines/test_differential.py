"""The C core against its oracle: the same random packets under the same random rules give the same output and counters.

Packets are injected as raw frames, right ones and broken ones; what comes out is captured on the wire.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from lab.capture import Capture, Injector
from lab.frames import ethernet_ipv4_udp
from lab.namespaces import wait_until
from lab.topology import RelayLine
from mcrelay.rules import Entry, Leg
from tests.engines.bench import ENGINES, OUT0, OUT1, Bench, entry, leg

GROUPS = [f"239.1.1.{n}" for n in range(1, 5)]
PORTS = [5000, 5001, 5002]
FRAMES = 400
SENTINEL = ("239.9.9.9", 9999)


def random_rules(random: random.Random) -> list[Entry]:
    """Some of the groups and ports, each with some outputs, some of which cannot be sent to."""
    rules: list[Entry] = []
    output = 0
    for group in GROUPS:
        for port in PORTS:
            if random.random() < 0.25:
                continue
            legs: list[Leg] = []
            for _ in range(random.choice([1, 1, 2, 3])):
                egress = random.choice([OUT0, OUT0, OUT0, OUT1, 9])  # 9 is not attached
                destination = random.choice(["239.2.2.1", "239.2.2.2", "198.51.100.255"])
                legs.append(leg(destination, 6000 + output, egress, ttl=random.choice([0, 1, 64]), counter=output))
                output += 1
            rules.append(entry(group, port, legs, counter=len(rules)))
    rules.append(entry(*SENTINEL, [leg("239.2.2.9", 9999, OUT0, counter=output)], counter=len(rules)))
    return rules


def random_frame(random: random.Random) -> bytes:
    wrong: dict[str, Any] = {}
    if random.random() < 0.15:
        wrong[random.choice(["udp_length", "ip_length"])] = random.randint(0, 120)
    if random.random() < 0.1:
        wrong["ip_header_words"] = random.randint(0, 15)
    if random.random() < 0.1:
        wrong["udp_checksum"] = random.choice([0, random.randint(1, 0xFFFF)])
    if random.random() < 0.1:
        wrong["options"] = random.choice([b"\x01" * 4, b"\x94\x04\0\0", b"\x01" * 40])
    frame = bytearray(
        ethernet_ipv4_udp(
            "203.0.113.10",
            random.choice([*GROUPS, *GROUPS, "239.1.1.9"]),
            4000,
            random.choice([*PORTS, *PORTS, 7]),
            random.randbytes(random.choice([0, 1, 17, 64, 100, 1000, 1400])),
            ttl=random.choice([0, 1, 2, 64, 255]),
            **wrong,
        )
    )
    if random.random() < 0.2:
        # Any byte but those of the fragment fields: the kernel would keep fragments for later.
        at = random.choice([n for n in range(14, min(len(frame), 60)) if n not in (20, 21)])
        frame[at] ^= 1 << random.randrange(8)
    if random.random() < 0.1:
        del frame[random.randrange(34, len(frame)) :]
    return bytes(frame)


def observe(line: RelayLine, name: str, rules: list[Entry], frames: list[bytes]) -> tuple[Any, ...]:
    """What an engine makes of the frames: datagrams of each output in order, and all counters that mean the same in
    every engine."""
    bench = Bench(line, ENGINES[name])
    bench.start()
    bench.rules(*rules)
    sentinel = ethernet_ipv4_udp("203.0.113.10", SENTINEL[0], 4000, SENTINEL[1], b"sentinel")
    with Capture(line.receiver, "eth0") as first, Capture(line.receivers[1], "eth0") as second:
        injector = Injector(line.sender, "eth0")
        for frame in frames:
            injector.send(frame)
        injector.send(sentinel)
        first.wait_for(lambda f: f.udp and f.udp.destination == "239.2.2.9", 10)
        injector.close()
        bench.wait_received(1)
        wait_until(lambda: len(second.udp(outgoing=False)) == sum(_sent(bench, rules, OUT1)), 5, "out1 lacks datagrams")
        outputs = [_by_output(capture) for capture in (first, second)]
    bench.stop()
    totals = {
        key: value
        for key, value in bench.page.totals().items()
        if key in ("received", "received_bytes", "forwarded", "copies", "copies_bytes")
    }
    counted = (
        totals,
        bench.page.dropped(),
        [bench.page.rule(rule.counter) for rule in rules],
        [bench.page.output(leg.counter) for rule in rules for leg in rule.legs],
    )
    bench.close()
    return (*outputs, *counted)


def _by_output(capture: Capture) -> dict[int, list[tuple[str, int, bytes]]]:
    """What arrived for each output, in order; each output has a port of its own. Between outputs there is no order."""
    arrived: dict[int, list[tuple[str, int, bytes]]] = {}
    for datagram in capture.udp(outgoing=False):
        arrived.setdefault(datagram.destination_port, []).append((datagram.destination, datagram.ttl, datagram.payload))
    return arrived


def _sent(bench: Bench, rules: list[Entry], egress: int) -> list[int]:
    return [bench.page.output(leg.counter)[0] for rule in rules for leg in rule.legs if leg.egress == egress]


@pytest.mark.parametrize("seed", range(6))
def test_engines_agree(line: RelayLine, descriptors: None, seed: int) -> None:
    source = random.Random(seed)
    rules = random_rules(source)
    frames = [random_frame(source) for _ in range(FRAMES)]
    native, recv, reference = (observe(line, name, rules, frames) for name in ENGINES)
    assert native == reference
    assert recv == reference
    # The test is worth its name only if much was forwarded and much was not.
    totals, dropped = native[2], native[3]
    assert totals["forwarded"] > FRAMES // 10
    assert len(dropped) >= 4, dropped


def test_parsers_agree_on_every_mutation_of_one_packet(line: RelayLine, descriptors: None) -> None:
    """Each byte of the headers set to a few values: the reasons, counted, are the same."""
    good = ethernet_ipv4_udp("203.0.113.10", GROUPS[0], 4000, PORTS[0], b"payload of some length")
    frames = []
    for at in range(14, 42):
        if at in (20, 21):
            continue
        for value in (0, 1, 0x45, 0x46, 0x7F, 0x80, 0xFF):
            frame = bytearray(good)
            frame[at] = value
            frames.append(bytes(frame))
    rules = [
        entry(GROUPS[0], PORTS[0], [leg("239.2.2.1", 6000, OUT0)]),
        entry(*SENTINEL, [leg("239.2.2.9", 9999, OUT0, counter=1)], counter=1),
    ]
    native, recv, reference = (observe(line, name, rules, frames) for name in ENGINES)
    assert native == reference
    assert recv == reference
    assert Counter(native[3])["bad_ip_checksum"] > 10

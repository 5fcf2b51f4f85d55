"""The C core against its oracle: the same random packets under the same random rules give the same output and counters.

Packets are injected as raw frames, right ones and broken ones; what comes out is captured on the wire and compared byte
by byte, but for what the kernel may choose (`comparable` of packets.py).
"""

from __future__ import annotations

import random
from collections import Counter
from ipaddress import ip_address
from typing import Any

import pytest

from lab.capture import Capture, Frame, Injector
from lab.frames import ethernet_ipv4_udp
from lab.namespaces import wait_until
from lab.topology import RelayLine
from mcrelay.entries import ESP, EXACT, UDP, Entry, Leg, LegFlag, RateUnit, mapped
from mcrelay.ways import ANY, Way
from tests.engines.bench import ENGINES, IN0, OUT0, OUT1, Bench, entry, leg
from tests.engines.packets import (
    FRAGMENT,
    carried,
    comparable,
    ethernet,
    fragment_header,
    ip_packet,
    is_last,
    option_header,
    udp,
)

GROUPS4 = [f"239.1.1.{n}" for n in range(1, 5)]
GROUPS6 = [f"ff3e::10{n}" for n in range(1, 5)]
PREFIXES4 = [("239.1.1.0", 96 + 30), ("239.1.0.0", 96 + 16), ("224.0.0.0", 96 + 4)]
PREFIXES6 = [("ff3e::100", 120), ("ff3e::", 16), ("ff00::", 9)]
HOSTS4 = ["203.0.113.10", "203.0.113.11", "198.51.100.77"]
HOSTS6 = ["2001:db8:9::9", "2001:db8:9::a", "fe80::9"]
PORTS = [5000, 5001, 5002]
VLANS = [0, 0, 0, 7]
RULES = 60
FRAMES = 500
REPEATS = [1, 1, 1, 1, 3, 10]  # what may leave as one run
SENTINEL = ("239.9.9.9", 9999)
MTU = 1000  # that engines are told of the ways for which they write headers
CHOSEN_PORT_MIN = 32768  # net.ipv4.ip_local_port_range


def random_rules(random: random.Random) -> list[Entry]:
    """Of all shapes, several of which match many a packet, with outputs of all kinds; some cannot be sent to."""
    rules: dict[Any, Entry] = {}
    output = 1
    while len(rules) < RULES:
        is_ipv6 = random.random() < 0.5
        prefix = EXACT
        group = random.choice(GROUPS6 if is_ipv6 else GROUPS4)
        if random.random() < 0.35:
            group, prefix = random.choice(PREFIXES6 if is_ipv6 else PREFIXES4)
        protocol = ESP if random.random() < 0.2 else UDP
        legs = []
        for _ in range(random.choice([1, 1, 2, 3])):
            legs.append(random_leg(random, group, prefix, protocol, output))
            output += 1
        rule = Entry(
            mapped(ip_address(group)),
            0 if protocol == ESP else random.choice([0, *PORTS]),
            IN0,
            len(rules) + 1,
            tuple(legs),
            source=mapped(ip_address(random.choice(HOSTS6 if is_ipv6 else HOSTS4))) if random.random() < 0.4 else ANY,
            prefix=prefix,
            vlan=random.choice(VLANS),
            protocol=protocol,
            id=len(rules) + 1,
        )
        rules.setdefault(rule.key, rule)
    return [*rules.values(), entry(*SENTINEL, [leg("239.2.2.9", 9999, OUT0)])]


def random_leg(random: random.Random, group: str, prefix: int, protocol: int, counter: int) -> Leg:
    egress = random.choice([OUT0, OUT0, OUT0, OUT1, OUT1, 9])  # 9 is not attached
    address, leg_prefix, is_ipv6 = random_address(random, group, prefix, 1 if egress == OUT1 else 0)
    source, source_port, flags = ANY, 0, LegFlag(0)
    if random.random() < 0.5:
        source = mapped(ip_address("2001:db8:77::7" if is_ipv6 else "192.0.2.77"))
    writes_headers = protocol == ESP or random.random() < 0.5
    if writes_headers:
        if random.random() < 0.4 and is_ipv6 == (":" in group):
            flags |= LegFlag.KEEP_SOURCE
            source = ANY
        if protocol == UDP:
            flags |= random.choice([LegFlag(0), LegFlag.KEEP_SOURCE_PORT])
            source_port = random.choice([0, 0, 77])
        is_frame = ip_address(address).is_multicast or address == "255.255.255.255" or random.random() < 0.1
        way = Way.FRAME if is_frame else Way.RAW6 if is_ipv6 else Way.RAW4
    else:
        way = random.choice([Way.UDP6, Way.UDP6, Way.LOOP6] if is_ipv6 else [Way.UDP4, Way.UDP4, Way.LOOP4])
    flags |= random.choice([LegFlag(0), LegFlag.KEEP_TTL]) | random.choice([LegFlag(0), LegFlag.KEEP_DSCP])
    if random.random() < 0.05:
        flags |= random.choice([LegFlag.PAUSED, LegFlag.SPLIT_HORIZON])
    is_limited = random.random() < 0.15
    return Leg(
        mapped(ip_address(address)),
        0 if protocol == ESP else random.choice([0, 6000 + counter]),
        egress,
        random.choice([0, 1, 64]),
        counter,
        way=way,
        prefix=leg_prefix,
        flags=flags,
        dscp=random.choice([0, 0, 46]),
        source=source,
        source_port=source_port,
        rate=1 if is_limited else 0,  # that is, the burst and no more
        rate_unit=RateUnit.BITS if is_limited else RateUnit.NONE,
    )


def random_address(random: random.Random, group: str, prefix: int, number: int) -> tuple[str, int, bool]:
    """An address to send to by the output of this number, with the length of its prefix, and whether it is of IPv6."""
    is_ipv6 = ":" in group
    if prefix != EXACT and random.random() < 0.6:
        if random.random() < 0.3:
            return group, 0, is_ipv6  # where it went
        packed = bytearray(ip_address(group).packed)
        packed[-2] ^= 0xF0 if prefix == 96 + 30 else 0  # within the prefix
        return str(ip_address(bytes(packed))), prefix, is_ipv6
    if random.random() < 0.5:
        host = f"2001:db8:{number}::2"
        return random.choice(["ff3e::201", "ff38::202", "ff02::203", host]), EXACT, True
    subnet = "10.1.0" if number else "198.51.100"
    addresses = ["239.2.2.1", "239.2.2.2", f"{subnet}.2", f"{subnet}.255", "255.255.255.255"]
    return random.choice(addresses), EXACT, False


def random_frame(random: random.Random) -> bytes:
    packet = bytearray(random_ipv6(random) if random.random() < 0.5 else random_ipv4(random))
    is_ipv4 = packet[0] >> 4 == 4
    frame_front = ethernet(bytes(packet), vlan=random.choice([None, None, None, None, 0, 7, 7 | 3 << 13, 8]))
    frame_front = frame_front[: len(frame_front) - len(packet)]
    if random.random() < 0.2:
        # Any byte but those of IPv4's fragment fields: the kernel would keep fragments for later.
        at = random.choice([n for n in range(min(len(packet), 60)) if not (is_ipv4 and n in (6, 7))])
        packet[at] ^= 1 << random.randrange(8)
    if random.random() < 0.1:
        del packet[random.randint(20, len(packet)) :]
    del packet[1500:]
    return frame_front + bytes(packet)


def random_body(random: random.Random, source: str, destination: str) -> tuple[int, bytes]:
    payload = random.randbytes(random.choice([0, 1, 17, 64, 64, 64, 100, 1000, 1400]))
    if random.random() < 0.15:
        return ESP, payload
    checksum = random.choice([0, random.randint(1, 0xFFFF)]) if random.random() < 0.1 else None
    body = udp(source, destination, random.choice([4000, 4001]), random.choice([*PORTS, *PORTS, 7]), payload, checksum)
    if random.random() < 0.05:
        body = body[:4] + random.choice([0, 7, 8, 9, 100]).to_bytes(2) + body[6:]
    return UDP, body


def random_ipv4(random: random.Random) -> bytes:
    source, destination = random.choice(HOSTS4), random.choice([*GROUPS4, *GROUPS4, "239.1.7.7", "239.7.7.7"])
    protocol, body = random_body(random, source, destination)
    lie = random.randint(0, 120) if random.random() < 0.05 else None
    options = random.choice([b"\x01" * 4, b"\x94\x04\0\0", b"\x01" * 40]) if random.random() < 0.1 else b""
    return ip_packet(
        *(source, destination, body),
        protocol=protocol,
        ttl=random.choice([0, 1, 2, 64, 255]),
        dscp=random.choice([0, 0, 46, 63]),
        ecn=random.choice([0, 0, 1, 3]),
        identification=random.randrange(65536),
        options=options,
        length=lie,
    )


def random_ipv6(random: random.Random) -> bytes:
    source, destination = random.choice(HOSTS6), random.choice([*GROUPS6, *GROUPS6, "ff3e::7:7", "ff08::7"])
    protocol, body = random_body(random, source, destination)
    extensions = b""
    if random.random() < 0.3:
        for _ in range(random.choice([1, 1, 2, 3, 8, 9])):
            kind = random.choice([0, 43, 44, 51, 60])
            if kind == 44:
                offset, more = random.choice([(0, False), (0, False), (0, False), (0, True), (8, False)])
                header = fragment_header(protocol, offset, random.getrandbits(32), more=more)
            elif kind == 51:
                header = bytes((protocol, 1)) + bytes(10)
            else:
                header = option_header(protocol, random.choice([0, 0, 1, 3]))
            if random.random() < 0.05:
                header = header[:1] + random.randbytes(1) + header[2:]
            protocol, extensions = kind, header + extensions
    return ip_packet(
        *(source, destination, body),
        protocol=protocol,
        ttl=random.choice([0, 1, 2, 64, 255]),
        dscp=random.choice([0, 0, 46, 63]),
        ecn=random.choice([0, 0, 1, 3]),
        extensions=extensions,
        flow_label=random.randrange(1 << 20),
        length=random.randint(0, 120) if random.random() < 0.05 else None,
    )


def is_relayed(frame: Frame) -> bool:
    return not frame.outgoing and carried(frame.data) is not None


def random_frames(random: random.Random) -> list[bytes]:
    frames: list[bytes] = []
    while len(frames) < FRAMES:
        frames += [random_frame(random)] * random.choice(REPEATS)
    return frames


def observe(line: RelayLine, name: str, rules: list[Entry], frames: list[bytes], *, waiting: bool) -> dict[str, Any]:
    """What an engine makes of the frames, which come one by one, or are all `waiting` when it begins: frames of each
    output interface, and all counters that mean the same in every engine."""
    bench = Bench(line, ENGINES[name], ways=Way)
    bench.start_bare()
    for slot, way in bench.egress:
        writes_headers = way in (Way.FRAME, Way.RAW4, Way.RAW6)
        assert bench.answer(bench.attach_egress(slot, way, MTU if writes_headers else None)) == 0
    bench.rules(*rules)
    if not waiting:
        assert bench.answer(bench.attach_ingress()) == 0
    sentinel = ethernet_ipv4_udp("203.0.113.10", SENTINEL[0], 4000, SENTINEL[1], b"sentinel")
    captures = [Capture(receiver, "eth0", only=is_relayed) for receiver in line.receivers]
    with captures[0] as first, captures[1] as second, Injector(line.sender, "eth0") as injector:
        for frame in frames:
            injector.send(frame)
        injector.send(sentinel)
        if waiting:
            assert bench.answer(bench.attach_ingress()) == 0
        first.wait_for(lambda f: f.udp and f.udp.destination == "239.2.2.9", 10)
        bench.wait_received(1)
        for capture, egress in ((first, OUT0), (second, OUT1)):
            sent = sum(bench.page.output(leg.counter)[0] for rule in rules for leg in rule.legs if leg.egress == egress)
            wait_until(
                lambda capture=capture, sent=sent: sum(is_last(f.data[14:]) for f in capture.frames) >= sent,  # type: ignore[misc]
                5,
                "a copy did not arrive",
            )
        arrived = [[_normal(frame.data) for frame in capture.frames] for capture in (first, second)]
    bench.stop()
    observed = {
        "frames": [Counter(frames) for frames in arrived],
        "order": [_by_output(frames) for frames in arrived],
        "totals": {
            key: value
            for key, value in bench.page.totals().items()
            if key in ("received", "received_bytes", "forwarded", "copies", "copies_bytes")
        },
        "dropped": bench.page.dropped(),
        "rules": [bench.page.rule(rule.counter) for rule in rules],
        "outputs": [bench.page.output(leg.counter) for rule in rules for leg in rule.legs],
    }
    bench.close()
    return observed


def _normal(frame: bytes) -> bytes:
    """What is compared of a frame."""
    at = 14 + (20 if frame[14] >> 4 == 4 else 40)
    chosen = carried(frame) == UDP and int.from_bytes(frame[at : at + 2]) >= CHOSEN_PORT_MIN
    return frame[:14] + comparable(frame[14:], any_source_port=chosen)


def _by_output(frames: list[bytes]) -> dict[int, list[bytes]]:
    """What arrived for each output that has a port of its own, in order; between outputs there is none."""
    arrived: dict[int, list[bytes]] = {}
    for frame in frames:
        at = 14 + (22 if frame[14] >> 4 == 4 else 42)
        port = int.from_bytes(frame[at : at + 2])
        if carried(frame) == UDP and is_last(frame[14:]) and port > 6000:
            arrived.setdefault(port, []).append(frame)
    return arrived


def compare(line: RelayLine, rules: list[Entry], frames: list[bytes], *, waiting: bool = False) -> dict[str, Any]:
    """Returns what all engines made of it."""
    observed = {name: observe(line, name, rules, frames, waiting=waiting) for name in ENGINES}
    reference = observed["reference"]
    for name, made in observed.items():
        for what, value in reference.items():
            assert made[what] == value, f"{what} of {name} and of the reference"
    return reference


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("waiting", [False, True], ids=["one by one", "at once"])
def test_engines_agree(line: RelayLine, descriptors: None, seed: int, waiting: bool) -> None:
    source = random.Random(seed)
    rules = random_rules(source)
    observed = compare(line, rules, random_frames(source), waiting=waiting)
    # The test is worth its name only if much was forwarded and much was not, in many ways.
    assert observed["totals"]["forwarded"] > FRAMES // 6
    assert len(observed["dropped"]) >= 8, observed["dropped"]
    assert len({leg.way for rule in rules for leg in rule.legs}) >= len(Way) - 1
    arrived = {carried(frame) for frames in observed["frames"] for frame in frames}
    assert arrived >= {UDP, ESP, FRAGMENT}


def test_parsers_agree_on_every_mutation_of_one_packet(line: RelayLine, descriptors: None) -> None:
    """Each byte of the headers set to a few values: the reasons, counted, are the same."""
    source, group = HOSTS6[0], GROUPS6[0]
    body = udp(source, group, 4000, PORTS[0], b"payload of some length")
    extensions = option_header(43) + option_header(44, kind=4) + fragment_header(51, 0, 1, more=False)
    extensions += bytes((17, 1)) + bytes(10)
    good = [
        ethernet_ipv4_udp("203.0.113.10", GROUPS4[0], 4000, PORTS[0], b"payload of some length"),
        ethernet(ip_packet(source, group, body, protocol=60, extensions=extensions)),
    ]
    frames = []
    for whole, end in ((good[0], 42), (good[1], 14 + 40 + len(extensions) + 8)):
        for at in range(14, end):
            if end == 42 and at in (20, 21):
                continue
            for value in (0, 1, 0x45, 0x66, 0x7F, 0x80, 0xFF):
                frame = bytearray(whole)
                frame[at] = value
                frames.append(bytes(frame))
    rules = [
        entry(GROUPS4[0], PORTS[0], [leg("239.2.2.1", 6000, OUT0)]),
        entry(group, PORTS[0], [leg("ff3e::201", 6000, OUT0, way=Way.UDP6, counter=1)], counter=1),
        entry(*SENTINEL, [leg("239.2.2.9", 9999, OUT0, counter=2)], counter=2),
    ]
    dropped = compare(line, rules, frames)["dropped"]
    assert dropped["bad_ip_checksum"] > 10
    assert dropped["bad_extension"] > 10

"""Packets as a stranger may send them, through the daemon: none is forwarded, each is counted under one reason, and the
good ones between them pass. Fragments that do not fit together are the kernel's to refuse, which counts them itself.

sender 203.0.113.10 --- in0 relay out0 --- receiver
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Final

import pytest

from lab.capture import Capture, Injector
from lab.daemon import Daemon, settled
from lab.frames import ethernet_ipv4, ethernet_ipv4_udp, udp_segment
from lab.namespaces import wait_until
from lab.topology import RelayLine
from tests.engines.test_hostile import GOOD, GROUP, GROUP6, HOSTILE, PORT, SOURCE

OUTPUT: Final = ("239.2.2.2", 6000)
SEGMENT: Final = udp_segment(SOURCE, GROUP, 4000, PORT, bytes(n % 251 for n in range(1200)))

# The filter finds no ports in these, or others.
UNREADABLE: Final = (
    "IP header shorter than a header",
    "IP header longer than the packet",
    "half an IP header",
    "a frame that ends in the IP options",
    "half an IPv6 header",
    "an IPv4 group in an IPv6 header",
)

Piece = tuple[int, bytes, bool]  # offset in bytes, content, more fragments follow


def pieces(*cuts: tuple[int, int]) -> list[Piece]:
    """These ranges of the segment; more follow unless a range ends with it."""
    return [(start, SEGMENT[start:end], end < len(SEGMENT)) for start, end in cuts]


END: Final = len(SEGMENT)
# Fragments that never become one datagram: the kernel refuses some (ReasmFails), and waits for the rest of others.
NOT_WHOLE: Final[dict[str, list[Piece]]] = {
    "the second begins inside the first": pieces((0, 808), (800, END)),
    "the first comes last and reaches into the second": pieces((800, END), (0, 808)),
    "overlapping after the end is known": pieces((800, END), (400, 1000), (0, 400)),
    "beyond 65535 bytes": [*pieces((0, 800)), (65528, b"x" * 800, False)],
    "two ends": [*pieces((0, 800)), (1200, b"x" * 100, False), (800, b"x" * 600, False)],
    "the first alone": pieces((0, 800)),
    "the last alone": pieces((800, END)),
    "a hole": pieces((0, 400), (800, END)),
    "a middle that does not end at eight bytes": [(0, SEGMENT[:800], True), (800, SEGMENT[800:1003], True)],
    "a fragment of nothing": [*pieces((0, 800)), (800, b"", True)],
}

# And such that do: of a fragment that lies within one that is there already, the kernel takes no byte.
WHOLE: Final[dict[str, list[Piece]]] = {
    "in the wrong order": pieces((800, END), (0, 800)),
    "one of them twice": pieces((0, 800), (0, 800), (800, END)),
    "another content inside the first": [*pieces((0, 800)), (400, b"x" * 80, True), *pieces((800, END))],
    "another header over the first": [
        *pieces((0, 800)),
        (0, udp_segment(SOURCE, GROUP, 4000, PORT + 1, b"x" * 8), True),
        *pieces((800, END)),
    ],
}


def fragments(number: int, parts: list[Piece]) -> list[bytes]:
    return [
        ethernet_ipv4(
            *(SOURCE, GROUP, 17, content),
            identification=1000 + number,
            more_fragments=more,
            fragment_offset=offset // 8,
        )
        for offset, content, more in parts
    ]


def add_rules(daemon: Daemon) -> None:
    daemon.run("add", f"{GROUP}:{PORT}%in0", "{}:{}%out0".format(*OUTPUT))
    daemon.run("add", f"[{GROUP6}]:{PORT}%in0", "{}:{}%out0".format(*OUTPUT))


def good(number: int) -> bytes:
    return ethernet_ipv4_udp(SOURCE, GROUP, 4000, PORT, f"good {number}".encode())


@pytest.fixture
def relayed(line: RelayLine) -> Iterator[Capture]:
    with Capture(line.receiver, "eth0", only=lambda frame: not frame.outgoing and frame.udp is not None) as capture:
        yield capture


def payloads(capture: Capture) -> list[bytes]:
    found = [datagram for datagram in capture.udp() if datagram.destination == OUTPUT[0]]
    assert all(datagram.checksum_valid is not False for datagram in found)
    return [datagram.payload for datagram in found]


def test_every_hostile_packet_is_counted_and_none_passes(daemon: Daemon, line: RelayLine, relayed: Capture) -> None:
    add_rules(daemon)
    with Injector(line.sender, "eth0") as injector:
        for number, (build, _reason) in enumerate(HOSTILE.values()):
            injector.send(build(), good(number))
    wanted = [f"good {number}".encode() for number in range(len(HOSTILE))]
    wait_until(lambda: len(payloads(relayed)) >= len(wanted), 5, "not all good ones pass")
    with daemon.client() as client:
        totals = settled(client)
    assert payloads(relayed) == wanted
    assert totals["forwarded"] == len(wanted)
    # Before the workers, a filter drops what no rule wants, and that of which it cannot tell: its headers lie about
    # where the ports are. What it lets pass is counted, each under its reason and no other.
    expected = Counter(reason for _build, reason in HOSTILE.values())
    assert Counter(totals["dropped"]) <= expected, totals
    blind = Counter(reason for kind, (_build, reason) in HOSTILE.items() if kind in UNREADABLE)
    unwanted = Counter(dict.fromkeys(("no_rule", "vlan_tagged", "not_udp"), len(HOSTILE)))
    assert Counter(totals["dropped"]) >= expected - blind - unwanted, totals


def test_unusual_packets_pass(daemon: Daemon, line: RelayLine, relayed: Capture) -> None:
    add_rules(daemon)
    with Injector(line.sender, "eth0") as injector:
        injector.send(*(build() for build, _payload in GOOD.values()))
    wanted = [payload for _build, payload in GOOD.values()]
    wait_until(lambda: len(payloads(relayed)) >= len(wanted), 5, "not all pass")
    with daemon.client() as client:
        assert settled(client)["dropped"] == {}
    assert Counter(payloads(relayed)) == Counter(wanted)  # of two workers, it may be


def test_fragments_that_do_not_fit_together_are_nobodys(daemon: Daemon, line: RelayLine, relayed: Capture) -> None:
    daemon.run("add", f"{GROUP}:{PORT}%in0", "{}:{}%out0".format(*OUTPUT))
    wanted = []
    with Injector(line.sender, "eth0") as injector:
        for number, parts in enumerate(NOT_WHOLE.values()):
            injector.send(*fragments(number, parts), good(number))
            wanted.append(f"good {number}".encode())
        for number, parts in enumerate(WHOLE.values(), len(NOT_WHOLE)):
            injector.send(*fragments(number, parts))
            wanted.append(SEGMENT[8:])
    wait_until(lambda: len(payloads(relayed)) >= len(wanted), 5, "what is whole does not pass")
    with daemon.client() as client:
        totals = settled(client)
    assert payloads(relayed) == wanted
    assert totals["forwarded"] == len(wanted)
    assert set(totals["dropped"]) <= {"fragment"}
    names, values = (
        row.split()[1:] for row in line.relay.run("cat", "/proc/net/snmp").stdout.splitlines() if row.startswith("Ip:")
    )
    refused = dict(zip(names, map(int, values), strict=True))["ReasmFails"]
    assert refused >= 5, "the kernel counts those that overlap"

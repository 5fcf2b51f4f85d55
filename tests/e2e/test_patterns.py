"""Rules for interfaces by pattern follow them as they come and go.

segment1: eth0 -- seg1 :relay: seg2 -- eth0 :segment2      (and seg3, later)
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import pytest

from lab.capture import Capture
from lab.daemon import Daemon, settled
from lab.namespaces import Lab, Namespace, unsupported, wait_until

GROUP: Final = "239.1.1.1"
PORT: Final = 5000
DEADLINE_S: Final = 10.0


@dataclass
class Segments:
    """A relay, and segments of the network that come and go."""

    lab: Lab
    relay: Namespace

    def add(self, number: int) -> Namespace:
        segment = self.lab.namespace(f"segment{number}")
        self.lab.veth(
            *(segment, "eth0", self.relay, f"seg{number}"),
            address_a=f"10.9.{number}.2/24",
            address_b=f"10.9.{number}.1/24",
            offloads=False,
        )
        segment.ip("route", "add", "224.0.0.0/4", "dev", "eth0")
        return segment

    def remove(self, number: int) -> None:
        self.relay.ip("link", "delete", f"seg{number}")


@pytest.fixture
def segments() -> Iterator[Segments]:
    if reason := unsupported():
        pytest.skip(reason)
    with Lab() as lab:
        yield Segments(lab, lab.namespace("relay"))


def send(segment: Namespace, text: bytes) -> None:
    with segment.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 8)
        sock.sendto(text, (GROUP, PORT))


def state(daemon: Daemon) -> tuple[str, list[str]]:
    (rule,) = daemon.json("list")["rules"]
    return rule["state"], rule["problems"]


def becomes(daemon: Daemon, wanted: str, *words: str) -> None:
    def is_so() -> bool:
        now, problems = state(daemon)
        return now == wanted and all(word in "; ".join(problems) for word in words)

    wait_until(is_so, DEADLINE_S, f"the rule does not become {wanted} ({words})")


def test_a_pattern_follows_interfaces_and_none_gets_back_what_it_sent(segments: Segments) -> None:
    with Daemon(segments.relay, "--debug") as daemon:
        daemon.run("add", f"{GROUP}:{PORT}%seg+", "=:=%seg1", "=:=%seg2", "--name", "all")
        becomes(daemon, "pending", "no interface that 'seg+' matches", "there is no interface 'seg1'")
        first, second = segments.add(1), segments.add(2)
        becomes(daemon, "active")
        for sender, receiver, text in ((first, second, b"from 1"), (second, first, b"from 2")):
            with Capture(receiver, "eth0") as capture, Capture(sender, "eth0") as echo:
                send(sender, text)
                capture.wait_for(lambda f, text=text: text in f.data and not f.outgoing, DEADLINE_S, "not relayed")  # type: ignore[misc] # a default argument
                assert not echo.matching(lambda f, text=text: text in f.data and not f.outgoing)  # type: ignore[misc]
        with daemon.client() as client:
            settled(client)
            (rule,) = client.stats().rules
            assert [(output.packets, output.dropped) for output in rule.outputs] == [(1, {"split_horizon": 1})] * 2
        # One that comes later is part of it at once, and a member of the group.
        third = segments.add(3)
        wait_until(lambda: GROUP in segments.relay.ip("maddress", "show", "dev", "seg3").stdout, DEADLINE_S, "no join")
        with Capture(first, "eth0") as capture, Capture(second, "eth0") as other:
            send(third, b"from 3")
            for waiting in (capture, other):
                waiting.wait_for(lambda f: b"from 3" in f.data, DEADLINE_S, "not relayed")
        # One that goes is no problem of a pattern's, and its place is another's.
        segments.remove(3)
        wait_until(
            lambda: "seg3" not in [i["name"] for i in daemon.json("list")["interfaces"]], DEADLINE_S, "seg3 is kept"
        )
        assert state(daemon) == ("active", [])
        # Nor is one that another rule names and that is not there.
        daemon.run("add", f"239.9.9.9:{PORT}%seg77", "10.9.1.2:7000%seg1", "--name", "another")
        assert [rule["state"] for rule in daemon.json("list")["rules"]] == ["active", "pending"]
        daemon.run("remove", "another")
        with Capture(second, "eth0") as capture:
            send(first, b"still there")
            capture.wait_for(lambda f: b"still there" in f.data, DEADLINE_S, "not relayed")
        daemon.run("remove", "all")
        with Capture(second, "eth0") as capture:
            send(first, b"no more")
            wait_until(
                lambda: GROUP not in segments.relay.ip("maddress", "show", "dev", "seg1").stdout, DEADLINE_S, "no leave"
            )
            assert not capture.matching(lambda f: b"no more" in f.data)


def test_more_interfaces_than_a_daemon_serves_leave_the_others_alone(segments: Segments) -> None:
    """Names that come and go for hours: each place is used again."""
    with Daemon(segments.relay, "--debug", "--workers", "1", "--ring-mib", "1") as daemon:
        receiver = segments.add(1)
        daemon.run("add", f"{GROUP}:{PORT}%veth+", "=:=%seg1", "--name", "all")
        for number in range(4):
            sender = segments.lab.namespace(f"guest{number}")
            segments.lab.veth(
                *(sender, "eth0", segments.relay, f"veth{number}"),
                address_a=f"10.8.{number}.2/24",
                address_b=f"10.8.{number}.1/24",
            )
            sender.ip("route", "add", "224.0.0.0/4", "dev", "eth0")
            wait_until(
                lambda number=number: GROUP in segments.relay.ip("maddress", "show", "dev", f"veth{number}").stdout,  # type: ignore[misc] # a default argument
                DEADLINE_S,
                "no join",
            )
            with Capture(receiver, "eth0") as capture:
                send(sender, b"guest")
                capture.wait_for(lambda f: b"guest" in f.data, DEADLINE_S, "not relayed")
            segments.relay.ip("link", "delete", f"veth{number}")
            wait_until(
                lambda: [i["name"] for i in daemon.json("list")["interfaces"]] == ["seg1"], DEADLINE_S, "it is kept"
            )

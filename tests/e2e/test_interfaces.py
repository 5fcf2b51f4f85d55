"""Interfaces come and go under rules that name them.

    sender: eth0 -- in0 :relay: out0 -- eth0 :receiver
                               out1 -- eth0 :receiver1

Each test has a line of its own, since it takes it apart.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Callable, Iterator
from typing import Final

import pytest

from lab.daemon import Daemon, settled
from lab.namespaces import Lab, unsupported, wait_until
from lab.topology import INGRESS_ADDRESS, SENDER_ADDRESS, RelayLine, relay_line
from lab.traffic import ReceivePlan, SendPlan, run_sender, start_receiver, start_sender

from .conftest import StartDaemon

GROUP_IN: Final = "239.1.1.1"
GROUP_OUT: Final = "239.2.2.2"
INPUT: Final = f"{GROUP_IN}:5000%in0"
OUTPUT: Final = f"{GROUP_OUT}:6000"
# How often each kind of change happens to each interface; a hundred by `make soak`.
CYCLES: Final = int(os.environ.get("MCRELAY_INTERFACE_CYCLES", "1"))
RESUMED_S: Final = 15.0  # within which forwarding has to resume; it does so in tenths of a second


@pytest.fixture
def lab() -> Iterator[Lab]:
    if reason := unsupported():
        pytest.skip(reason)
    with Lab() as lab:
        yield lab


@pytest.fixture
def line(lab: Lab) -> RelayLine:
    return relay_line(lab, outputs=2)


def arrives(line: RelayLine, receiver: int = 0) -> bool:
    """Whether a datagram sent to the input now comes out at a receiver, if it is sent at all."""
    with (
        line.sender.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
        line.receivers[receiver].socket(socket.AF_INET, socket.SOCK_DGRAM) as sock,
    ):
        sock.bind((GROUP_OUT, 6000))
        sock.settimeout(0.05)
        sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 8)
        with contextlib.suppress(OSError):  # there is no interface
            index = line.receivers[receiver].ifindex("eth0")
            membership = struct.pack("=4s4si", socket.inet_aton(GROUP_OUT), b"", index)
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership)
        try:
            sender.sendto(b"probe", (GROUP_IN, 5000))
            return sock.recv(16) == b"probe"
        except OSError:
            return False


def forwards(line: RelayLine, receiver: int = 0) -> None:
    wait_until(lambda: arrives(line, receiver), RESUMED_S, "nothing is forwarded")


def states(daemon: Daemon) -> dict[str, tuple[str, list[str]]]:
    return {r["name"]: (r["state"], r["problems"]) for r in daemon.json("list")["rules"]}


def becomes(daemon: Daemon, name: str, state: str, *words: str) -> None:
    def is_so() -> bool:
        now, problems = states(daemon)[name]
        return now == state and all(any(word in problem for problem in problems) for word in words)

    wait_until(is_so, 15, f"{name} does not become {state} ({words})")


def create_in0(lab: Lab, line: RelayLine) -> None:
    ends = (line.sender, "eth0", line.relay, "in0")
    lab.veth(*ends, address_a=f"{SENDER_ADDRESS}/24", address_b=f"{INGRESS_ADDRESS}/24")
    line.sender.ip("route", "add", "224.0.0.0/4", "dev", "eth0")


def create_out(lab: Lab, line: RelayLine, number: int = 0) -> None:
    egress = line.egresses[number]
    ends = (line.relay, egress.interface, egress.receiver, "eth0")
    lab.veth(*ends, address_a=f"{egress.address}/24", address_b=f"{egress.receiver_address}/24")
    egress.receiver.ip("route", "add", "224.0.0.0/4", "dev", "eth0")


def test_a_rule_waits_for_its_interfaces(daemon: Daemon, lab: Lab, line: RelayLine) -> None:
    line.relay.ip("link", "del", "in0")
    line.relay.ip("link", "del", "out0")
    added = daemon.run("add", INPUT, f"{OUTPUT}%out0", "--name", "feed")
    assert added.stdout.startswith("feed: pending: there is no interface 'in0'; there is no interface 'out0'")
    assert "[pending: there is no interface 'in0'" in daemon.run("list").stdout
    create_in0(lab, line)
    alone = ("pending", ["there is no interface 'out0'"])
    wait_until(lambda: states(daemon)["feed"] == alone, 15, "in0 is not taken up")
    assert not arrives(line)
    with daemon.client() as client:
        assert settled(client)["dropped"] == {"egress_unreachable": 1}
    create_out(lab, line)
    becomes(daemon, "feed", "active")
    forwards(line)
    assert "[" not in daemon.run("list").stdout
    # And what waits can go.
    daemon.run("add", "239.1.1.9:5000%nowhere", f"{OUTPUT}%nowhere", "--name", "waiting")
    daemon.run("remove", "waiting")
    assert "nowhere" not in daemon.run("list", "--json").stdout


def test_an_output_that_waits_does_not_keep_the_others_waiting(daemon: Daemon, lab: Lab, line: RelayLine) -> None:
    daemon.run("add", INPUT, f"{OUTPUT}%out0", f"{OUTPUT}%out1", "--name", "feed")
    forwards(line, 0)
    forwards(line, 1)
    line.relay.ip("link", "del", "out1")
    becomes(daemon, "feed", "partial", "no interface 'out1'")
    daemon.wait_for_log("there is no interface 'out1'")
    forwards(line, 0)
    outputs = daemon.json("stats")["rules"][0]["outputs"]
    assert outputs[0]["dropped"] == {}
    assert outputs[1]["dropped"]["egress_unreachable"] >= 1
    create_out(lab, line, 1)
    becomes(daemon, "feed", "active")
    daemon.wait_for_log("interface out1 is there and in use")
    forwards(line, 1)


def test_an_output_without_an_address_is_counted_and_shown(daemon: Daemon, line: RelayLine) -> None:
    daemon.run("add", INPUT, f"{OUTPUT}%out0", "--name", "feed")
    forwards(line)
    line.relay.ip("address", "flush", "dev", "out0")
    becomes(daemon, "feed", "pending", "out0' has no IPv4 address", "ip address add")
    assert not arrives(line)
    assert daemon.json("stats")["rules"][0]["outputs"][0]["dropped"] == {"egress_unreachable": 1}
    line.relay.ip("address", "add", "198.51.100.77/24", "dev", "out0")
    becomes(daemon, "feed", "active")
    forwards(line)


def down_and_up(name: str, lab: Lab, line: RelayLine) -> None:
    line.relay.ip("link", "set", name, "down")
    assert not arrives(line)
    line.relay.ip("link", "set", name, "up")


def delete_and_create(name: str, lab: Lab, line: RelayLine) -> None:
    line.relay.ip("link", "del", name)
    (create_in0 if name == "in0" else create_out)(lab, line)


def rename_and_back(name: str, lab: Lab, line: RelayLine) -> None:
    line.relay.ip("link", "set", name, "down")
    line.relay.ip("link", "set", name, "name", "other0")
    line.relay.ip("link", "set", "other0", "up")
    wait_until(lambda: not arrives(line), 5, "forwarded by a rule that names no interface")
    line.relay.ip("link", "set", "other0", "down")
    line.relay.ip("link", "set", "other0", "name", name)
    line.relay.ip("link", "set", name, "up")


def change_mtu(name: str, lab: Lab, line: RelayLine) -> None:
    for mtu in ("9000", "1280", "1500"):
        line.relay.ip("link", "set", name, "mtu", mtu)
        forwards(line)


@pytest.mark.parametrize("options", [(), ("--ingress", "recv"), ("--engine", "reference")], ids=" ".join)
def test_forwarding_resumes_whatever_happens_to_an_interface(
    start: StartDaemon, lab: Lab, line: RelayLine, options: tuple[str, ...]
) -> None:
    """Another rule notices nothing, and nothing is left behind."""
    daemon = start(*options)
    daemon.run("add", INPUT, f"{OUTPUT}%out0", "--name", "feed")
    daemon.run("add", "239.1.1.7:5000%out1", "239.2.2.7:6000%out1", "--name", "bystander")
    forwards(line)
    pids = daemon.pids()
    bystander = start_receiver(
        line.receivers[1], ReceivePlan("239.2.2.7:6000", interface="eth0", idle_timeout_s=10, deadline_s=600)
    )
    sender = start_sender(line.receivers[1], SendPlan("239.1.1.7:5000", interface="eth0", rate=500))
    changes: list[Callable[[str, Lab, RelayLine], None]] = [down_and_up, delete_and_create, rename_and_back, change_mtu]

    def descriptors() -> dict[str, int]:
        return {name: len(os.listdir(f"/proc/{pid}/fd")) for name, pid in pids.items() if name != "spare"}

    held = steady(descriptors)
    for _cycle in range(CYCLES):
        for change in changes:
            for name in ("in0", "out0"):
                change(name, lab, line)
                forwards(line)
    wait_until(lambda: descriptors() == held, 10, f"descriptors were {held}")
    sent = sender.stop().sent
    report = bystander.result()
    assert (report.received, report.lost, report.duplicated) == (sent, 0, 0)
    assert daemon.pids().items() >= {name: pid for name, pid in pids.items() if name != "spare"}.items()
    with daemon.client() as client:
        settled(client)


def steady(look: Callable[[], dict[str, int]]) -> dict[str, int]:
    """What it shows when it has shown the same a hundred times in a row: sockets are still prepared for a moment."""
    seen: list[dict[str, int]] = []

    def is_steady() -> bool:
        seen.append(look())
        return len(seen) >= 100 and all(one == seen[-1] for one in seen[-100:])

    wait_until(is_steady, 30)
    return seen[-1]


def test_every_flow_finds_its_worker_after_the_interface_was_down(daemon: Daemon, line: RelayLine) -> None:
    """The kernel puts the sockets into their fanout group anew."""
    with daemon.client() as client:
        client.change(add=[(f"239.1.1.{n}:5000%in0", [f"{OUTPUT}%out0"], None) for n in range(1, 33)])
    line.relay.ip("link", "set", "in0", "down")
    line.relay.ip("link", "set", "in0", "up")
    # Until then, its own end of the cable drops what the sender sends.
    wait_until(lambda: line.relay.running("in0") and line.sender.running("eth0"), 15)
    receiver = start_receiver(line.receiver, ReceivePlan(OUTPUT, interface="eth0", count=320, flows=32, deadline_s=30))
    run_sender(line.sender, SendPlan(f"{GROUP_IN}:5000", interface="eth0", count=320, flows=32, flow_step="group"))
    receiver.result()
    with daemon.client() as client:
        totals = settled(client)
    assert (totals["forwarded"], totals["dropped"]) == (320, {})


def test_notifications_that_were_lost_are_made_up_for(daemon: Daemon, lab: Lab, line: RelayLine) -> None:
    """More happens than the notifications' socket holds, while the supervisor does not read."""
    daemon.run("add", INPUT, f"{OUTPUT}%out0", "--name", "feed")
    forwards(line)
    os.kill(daemon.process.pid, 19)  # SIGSTOP
    try:
        line.relay.ip("link", "add", "noisy", "type", "veth", "peer", "other")
        batch = "".join(f"link set noisy mtu {1000 + n % 500}\n" for n in range(3000))
        line.relay.run("ip", "-batch", "-", input=batch)
        delete_and_create("in0", lab, line)
        delete_and_create("out0", lab, line)
    finally:
        os.kill(daemon.process.pid, 18)  # SIGCONT
    daemon.wait_for_log("lost notifications")
    forwards(line)
    becomes(daemon, "feed", "active")

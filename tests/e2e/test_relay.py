"""The main job: a rule is added from outside, traffic flows by it, the rule goes, traffic stops.

sender 203.0.113.10 --- in0 relay out0 --- receiver
                                  out1 --- receiver1
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import time
from ipaddress import IPv4Address
from typing import Any

import pytest

from lab.capture import Capture
from lab.daemon import Daemon, settled
from lab.frames import UdpDatagram
from lab.namespaces import wait_until
from lab.plan import ReceivePlan, SendPlan
from lab.program import PROGRAM
from lab.topology import RelayLine
from lab.traffic import run_sender, start_receiver, start_sender
from mcrelay.errors import Error
from mcrelay.steering import steer
from tests.e2e.conftest import StartDaemon

INPUT = "239.1.1.1:5000"
OUTPUT = "239.2.2.2:6000"


def test_from_start_to_traffic_and_back_in_eight_steps(daemon: Daemon, line: RelayLine) -> None:
    # The supervisor runs, and has spawned a control plane, a data plane for each core, and one in reserve.
    cores = sorted(os.sched_getaffinity(0))

    def all_ready() -> list[dict[str, Any]]:
        processes: list[dict[str, Any]] = daemon.json("workers")["processes"]
        return processes if all(p["state"] == "ready" for p in processes) else []

    workers = wait_until(all_ready, 5, "somebody is not ready")
    assert [(w["role"], w["index"]) for w in workers] == [
        ("supervisor", 0),
        ("control", 0),
        *(("data", i) for i in range(len(cores))),
        ("spare", 0),
    ]
    assert [w["cores"] for w in workers if w["role"] == "data"] == [str(core) for core in cores]
    # Without a rule nothing comes through.
    receiver = start_receiver(line.receiver, ReceivePlan(OUTPUT, interface="eth0", deadline_s=30))
    run_sender(line.sender, SendPlan(INPUT, interface="eth0", rate=5000, count=500))
    assert receiver.stop().received == 0
    # An external client adds a rule; it is acknowledged by the one worker that owns it, and the group is joined.
    receiver = start_receiver(line.receiver, ReceivePlan(OUTPUT, interface="eth0", count=5000, expect=5000))
    with Capture(line.sender, "eth0") as capture:
        added = daemon.json("add", f"{INPUT}%in0", f"{OUTPUT}%out0,ttl=9", "--name", "feed")
        capture.wait_for(lambda f: f.igmp and f.igmp.joins("239.1.1.1"), 10, "no IGMP report left the host")
    assert added["workers"] == 1
    # The rule is active, shown by traffic, in the worker that the steering function names and in no other.
    run_sender(line.sender, SendPlan(INPUT, interface="eth0", rate=10_000, count=5000))
    report = receiver.result()
    assert (report.received, report.lost, report.duplicated, report.reordered, report.corrupted) == (5000, 0, 0, 0, 0)
    owner = steer(int(IPv4Address("239.1.1.1")), 5000) % len(cores)
    with daemon.client() as client:
        settled(client)
        assert [w.forwarded for w in client.stats().workers] == [5000 if i == owner else 0 for i in range(len(cores))]
        (rule,) = client.stats().rules
    assert (rule.name, rule.packets, rule.forwarded, rule.dropped) == ("feed", 5000, 5000, 0)
    assert (rule.outputs[0].packets, rule.outputs[0].bytes) == (5000, 5000 * 1000)
    # After its removal traffic stops, and the group is left.
    receiver = start_receiver(line.receiver, ReceivePlan(OUTPUT, interface="eth0", deadline_s=30))
    with Capture(line.sender, "eth0") as capture:
        assert daemon.run("remove", "feed").stdout == "feed: removed\n"
        capture.wait_for(lambda f: f.igmp and f.igmp.leaves("239.1.1.1"), 10, "no leave was sent")
    run_sender(line.sender, SendPlan(INPUT, interface="eth0", rate=5000, count=500))
    assert receiver.stop().received == 0
    assert daemon.json("list")["rules"] == []


@pytest.mark.parametrize(
    "options",
    [
        ("--latency-budget-us", "1000"),
        ("--workers", "1", "--busy-poll"),
        ("--ingress", "recv"),
    ],
    ids=" ".join,
)
def test_fifty_thousand_datagrams_a_second_and_nothing_lost(
    start: StartDaemon, line: RelayLine, options: tuple[str, ...]
) -> None:
    rate = 50_000
    daemon = start(*options)
    daemon.run("add", f"{INPUT}%in0", f"{OUTPUT}%out0")
    receiver = start_receiver(line.receiver, ReceivePlan(OUTPUT, interface="eth0", count=rate * 2, expect=rate * 2))
    sender = start_sender(line.sender, SendPlan(INPUT, interface="eth0", rate=rate, count=rate * 2))
    # Meanwhile other rules come and go, on both sides of the steering.
    for number in range(8):
        daemon.run("add", f"239.1.2.{number}:5000%in0", f"239.2.3.{number}:6000%out1", "--name", f"other{number}")
    for number in range(8):
        daemon.run("remove", f"other{number}")
    sent = sender.result()
    report = receiver.result()
    assert sent.sent == rate * 2
    assert (report.received, report.lost, report.duplicated, report.reordered, report.corrupted) == (
        rate * 2,
        0,
        0,
        0,
        0,
    )
    with daemon.client() as client:
        totals = settled(client)
    assert (totals["received"], totals["forwarded"], totals["dropped"]) == (rate * 2, rate * 2, {})
    receiver = start_receiver(line.receiver, ReceivePlan(OUTPUT, interface="eth0", deadline_s=30))
    daemon.run("remove", daemon.json("list")["rules"][0]["id"])
    run_sender(line.sender, SendPlan(INPUT, interface="eth0", rate=rate, count=rate // 10))
    assert receiver.stop().received == 0


@pytest.mark.parametrize(
    ("outputs", "options"),
    [
        (40, ("--ring-mib", "1")),
        (40, ("--ring-mib", "1", "--busy-poll")),
        (40, ("--ingress", "recv")),
        (2, ("--engine", "reference")),
    ],
    ids=str,
)
def test_the_sums_hold_under_overload(
    start: StartDaemon, line: RelayLine, outputs: int, options: tuple[str, ...]
) -> None:
    """More than it can carry: it forwards what it can, what is lost is counted as the ring's overrun or the output's
    drop, and nothing of it is left when the load falls."""
    daemon = start("--workers", "1", *options)
    others = [f"239.2.3.{number}:6000%out{number % 2}" for number in range(1, outputs)]
    daemon.run("add", f"{INPUT}%in0", f"{OUTPUT}%out0", *others)
    sent = run_sender(line.sender, SendPlan(INPUT, interface="eth0", rate=0, count=120_000, size=200))
    with daemon.client() as client:
        wait_until(lambda: client.stats().workers[0].received == sent.sent, 30, "not all was accounted for")
        totals = settled(client, deadline_s=30)
        (rule,) = client.stats().rules
    assert totals["received"] == sent.sent
    assert totals["dropped"]["ingress_overrun"] > 0, "the load was none"
    assert totals["forwarded"] > 0
    assert rule.packets == sent.sent - totals["dropped"]["ingress_overrun"]
    for output in rule.outputs:
        assert output.packets + sum(output.dropped.values()) == rule.packets
        assert set(output.dropped) <= {"egress_full"}
    receiver = start_receiver(line.receiver, ReceivePlan(OUTPUT, interface="eth0", count=1000, expect=1000))
    run_sender(line.sender, SendPlan(INPUT, interface="eth0", rate=1000, count=1000))
    assert receiver.result().lost == 0


def test_many_flows_over_all_workers_keep_their_order(daemon: Daemon, line: RelayLine) -> None:
    flows, count = 32, 32_000
    for number in range(flows):
        daemon.run("add", f"239.1.1.1:{5000 + number}%in0", f"239.2.2.2:{6000 + number}%out0")
    receiver = start_receiver(
        line.receiver, ReceivePlan("239.2.2.2:6000", interface="eth0", flows=flows, count=count, expect=count)
    )
    run_sender(
        line.sender, SendPlan("239.1.1.1:5000", interface="eth0", flows=flows, rate=20_000, count=count, size=500)
    )
    report = receiver.result()
    assert (report.received, report.lost, report.duplicated, report.reordered) == (count, 0, 0, 0)
    with daemon.client() as client:
        settled(client)
        forwarded = [w.forwarded for w in client.stats().workers]
    assert sum(forwarded) == count
    if len(forwarded) > 1:
        assert all(forwarded), f"one worker did it all: {forwarded}"


def test_outputs_of_all_kinds_in_one_rule(daemon: Daemon, line: RelayLine) -> None:
    """Another group and port, the same ones on another interface, and unicast, each with its TTL."""
    first, second = line.egresses
    targets = [
        (first, OUTPUT, ",ttl=33", 33),
        (second, INPUT, "", 7),
        (second, f"{second.receiver_address}:6001", ",ttl=1", 1),
    ]
    outputs = [f"{target}%{egress.interface}{ttl}" for egress, target, ttl, _seen in targets]
    daemon.run("add", f"{INPUT}%in0", *outputs)
    with Capture(first.receiver, "eth0") as one, Capture(second.receiver, "eth0") as two:
        run_sender(line.sender, SendPlan(INPUT, interface="eth0", rate=1000, count=10, ttl=8))
        for egress, target, _ttl, seen in targets:
            arrived = wait_until(functools.partial(_ten_to, one if egress is first else two, target), 5, target)
            assert {datagram.ttl for datagram in arrived} == {seen}
            assert {datagram.source for datagram in arrived} == {egress.address}


def test_what_no_rule_wants_does_not_reach_a_worker(daemon: Daemon, line: RelayLine) -> None:
    """The kernel drops it before it is copied, as rules come and go."""
    for number in range(2):
        daemon.run("add", f"239.1.1.{number}:5000%in0", f"{OUTPUT}%out0", "--name", f"rule{number}")

    def received_of(flows: int) -> int:
        with daemon.client() as client:
            before: int = settled(client)["received"]
            run_sender(
                line.sender,
                SendPlan("239.1.1.0:5000", flow_step="group", flows=flows, interface="eth0", rate=20_000, count=4000),
            )
            after: int = settled(client)["received"]
        return after - before

    assert received_of(4) == 2000
    daemon.run("remove", "rule0")
    assert received_of(4) == 1000
    daemon.run("add", "239.1.1.0:5000%in0", f"{OUTPUT}%out0", "--name", "rule0")
    assert received_of(4) == 2000
    with daemon.client() as client:
        assert settled(client)["dropped"] == {}


def test_an_interface_that_takes_no_segments_is_shown_and_nothing_is_lost(daemon: Daemon, line: RelayLine) -> None:
    """The path beyond it takes less than the interface, so the kernel refuses segments of what does not fit."""
    count = 20_000
    daemon.run("add", f"{INPUT}%in0", f"{OUTPUT}%out0", f"{OUTPUT}%out1")
    receiver = start_receiver(line.receiver, ReceivePlan(OUTPUT, interface="eth0", count=count, expect=count))
    narrow = (f"{OUTPUT.partition(':')[0]}/32", "dev", "out0", "mtu", "1000")
    line.relay.ip("route", "add", *narrow)
    try:
        run_sender(line.sender, SendPlan(INPUT, interface="eth0", rate=20_000, count=count, size=1400))
        assert receiver.result().lost == 0
        shown = {interface["name"]: interface for interface in daemon.json("list")["interfaces"]}
        assert set(shown) == {"in0", "out0", "out1"}
        assert shown["in0"]["frames"] == count
        assert shown["out0"]["segments_refused"] >= 1
        assert [shown[name]["segmentation"] for name in ("in0", "out0", "out1")] == [True, False, True]
        assert "out0 takes no segments" in daemon.run("list").stderr
        daemon.wait_for_log("out0: does not take segments")
    finally:
        line.relay.ip("route", "del", *narrow)


def _ten_to(capture: Capture, target: str) -> list[UdpDatagram]:
    found = [d for d in capture.udp(outgoing=False) if f"{d.destination}:{d.destination_port}" == target]
    return found if len(found) == 10 else []


def test_the_stats_watch_shows_rates(daemon: Daemon, line: RelayLine) -> None:
    daemon.run("add", f"{INPUT}%in0", f"{OUTPUT}%out0", "--name", "watched")
    watch = subprocess.Popen(
        [PROGRAM, "stats", "--watch", "--json", "--socket", daemon.socket], stdout=subprocess.PIPE, text=True
    )
    assert watch.stdout
    try:
        first = json.loads(watch.stdout.readline())
        run_sender(line.sender, SendPlan(INPUT, interface="eth0", rate=5000, count=500))
        deadline = time.monotonic() + 10
        last = first
        while last["rules"][0]["packets"] < 500:
            assert time.monotonic() < deadline
            last = json.loads(watch.stdout.readline())
        assert first["rules"][0]["packets"] == 0
        assert last["rules"][0]["name"] == "watched"
    finally:
        watch.terminate()
        watch.wait()
        watch.stdout.close()


def test_what_is_refused_changes_nothing(daemon: Daemon) -> None:
    daemon.run("add", f"{INPUT}%in0", f"{OUTPUT}%out0", "--name", "here")
    before = daemon.json("list"), daemon.json("stats")["generation"]
    with daemon.client() as client:
        for call in (
            lambda: client.add(f"{INPUT}%in0", ["239.9.9.9:1%out0"]),
            lambda: client.add("239.1.1.9:1%in0", ["239.9.9.9:1%out0"], "here"),
            lambda: client.add("239.1.1.9:1%in0", ["239.9.9.9:1%out0", "239.9.9.9:1%out0"]),
            lambda: client.add("239.1.1.9:1%in0", ["239.9.9.9:1%out0", "239.1.1.9:1%in0"]),
            lambda: client.remove("there"),
        ):
            with pytest.raises(Error):
                call()
    assert (daemon.json("list"), daemon.json("stats")["generation"]) == before

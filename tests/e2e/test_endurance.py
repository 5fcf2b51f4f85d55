"""Deaths under load, again and again, and the quiet of a daemon that has nothing to do. These have the machine for
themselves.

sender: eth0 -- in0 :relay: out0 -- eth0 :receiver
"""

from __future__ import annotations

import functools
import os
import re
import signal
import time

import pytest

from lab.daemon import Daemon, settled
from lab.namespaces import wait_until
from lab.plan import ReceivePlan, SendPlan
from lab.topology import RelayLine
from lab.traffic import run_sender, start_receiver, start_sender
from mcrelay.errors import Error
from tests.e2e.conftest import StartDaemon
from tests.e2e.lives import IMPATIENT, INPUT, owner_of_input, packet_sockets, wait_for_successor

OUTPUT = "239.2.2.2:6000"
BATCH = 512  # PACKETS_PER_BATCH of the engine


@pytest.mark.parametrize("how", ["killed", "replaced on purpose"])
def test_a_worker_goes_ten_times_under_load_and_nothing_is_lost(start: StartDaemon, line: RelayLine, how: str) -> None:
    """A spare takes its place before the ring is full. What a dead one had sent and not given back is sent twice, at
    most a batch; one that is replaced on purpose leaves nothing."""
    daemon = start(program=IMPATIENT)  # it dies more often than is forgiven
    daemon.run("add", f"{INPUT}%in0", f"{OUTPUT}%out0", "--name", "feed")
    rate, times, owner = 20_000, 10, owner_of_input()
    receiver = start_receiver(
        line.receiver, ReceivePlan(OUTPUT, interface="eth0", idle_timeout_s=3, deadline_s=120, core=0)
    )
    sender = start_sender(line.sender, SendPlan(INPUT, interface="eth0", rate=rate, duration_s=100, core=0))
    wait_until(lambda: daemon.json("stats")["rules"][0]["packets"] > 0, 5)
    for _ in range(times):
        former = daemon.pids()[f"data/{owner}"]
        if how == "killed":
            os.kill(former, signal.SIGKILL)
        else:
            assert daemon.json("restart-worker", str(owner))["index"] == owner
        wait_for_successor(daemon, owner, former)
    sent = sender.stop().sent
    report = receiver.result()
    assert (report.received, report.reordered, report.corrupted) == (sent, 0, 0)
    with daemon.client() as client:
        totals = settled(client)
        (rule,) = client.stats().rules
    interrupted = totals["dropped"].get("interrupted", 0)
    assert report.duplicated <= interrupted <= times * BATCH
    assert interrupted == 0 or how == "killed"
    assert set(totals["dropped"]) <= {"interrupted"}
    assert rule.packets == rule.forwarded + rule.dropped <= totals["received"]
    assert rule.outputs[0].packets + sum(rule.outputs[0].dropped.values()) == rule.packets
    assert sent <= rule.outputs[0].packets <= sent + report.duplicated


def test_ninety_restarts_leave_no_descriptor_behind(start: StartDaemon, line: RelayLine) -> None:
    daemon = start(program=IMPATIENT)
    daemon.run("add", f"{INPUT}%in0", f"{OUTPUT}%out0", "--name", "feed")

    def descriptors() -> list[str]:
        """Of the supervisor: what each refers to, without the numbers that change with every life."""
        directory = f"/proc/{daemon.process.pid}/fd"
        links = [os.readlink(f"{directory}/{fd}") for fd in os.listdir(directory)]
        return sorted(link.split("[")[0] for link in links)

    wait_until(lambda: "spare" in daemon.pids(), 5, "no spare")
    workers = [name for name in daemon.pids() if name not in ("supervisor", "spare")]
    # One packet socket for each data plane, and as many in stock for the next interface.
    wait_until(lambda: packet_sockets(line) == 2 * (len(workers) - 1), 5, "the stock is not replenished")
    before = descriptors()
    restarts = 0
    while restarts < 90:
        pids = daemon.pids()
        for name in workers:
            os.kill(pids[name], signal.SIGKILL)
            restarts += 1
        wait_until(functools.partial(_all_new, daemon, pids), 20, "the workers do not come back")
    wait_until(lambda: "spare" in daemon.pids(), 10, "no spare")
    wait_until(lambda: descriptors() == before, 5, f"descriptors before {before}, now {descriptors()}")
    receiver = start_receiver(line.receiver, ReceivePlan(OUTPUT, interface="eth0", count=1000, expect=1000))
    run_sender(line.sender, SendPlan(INPUT, interface="eth0", rate=5000, count=1000))
    assert receiver.result().lost == 0


def _all_new(daemon: Daemon, before: dict[str, int]) -> bool:
    try:
        with daemon.client() as client:
            processes = client.workers()
    except Error:
        return False  # the control plane is among those that are replaced
    now = {f"data/{p.index}" if p.role == "data" else p.role: p.pid for p in processes if p.state == "ready"}
    return all(name in now and now[name] != pid for name, pid in before.items() if name.startswith(("data", "control")))


def test_the_daemon_is_idle_when_there_is_nothing_to_do(daemon: Daemon) -> None:
    daemon.run("add", f"{INPUT}%in0", f"{OUTPUT}%out0")
    pids = daemon.pids()

    def ticks() -> int:
        total = 0
        for pid in pids.values():
            with open(f"/proc/{pid}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])
        return total

    time.sleep(0.5)  # the answer to the last request is on its way
    before = ticks()
    time.sleep(5)  # the interval over which the claim is made
    # To ask each worker every other second whether it works costs some milliseconds of that, on a quiet machine.
    assert ticks() - before <= 10, "hundredths of a second of processor time in 5 s"


def test_a_worker_that_keeps_dying_is_restarted_less_and_less_often(start: StartDaemon) -> None:
    daemon = start("--workers", "1")
    for life in range(8):
        wait_until(lambda: daemon.json("workers")["processes"][2]["state"] == "ready", 10)
        os.kill(daemon.pids()["data/0"], signal.SIGKILL)
        wait_until(lambda n=life + 1: daemon.log.count("restarting data/0") == n, 5)  # type: ignore[misc] # as above
    # The first few at once, as many as lives of less than two seconds are forgiven.
    delays = [float(delay) for delay in re.findall(r"restarting data/0 in ([0-9.]+) s", daemon.log)]
    assert 1 <= len(delays) <= 8 - 5
    assert delays == sorted(delays)
    # It waits for its next life.
    done = daemon.run("health", check=False)
    assert (done.returncode, done.stdout.splitlines()[0]) == (69, "failing")
    assert "data/0 is not ready: waiting" in done.stdout
    wait_until(lambda: daemon.run("health", check=False).stdout == "ok\n", 15)
    daemon.run("add", f"{INPUT}%in0", f"{OUTPUT}%nowhere", "--name", "feed")
    done = daemon.run("health")
    assert done.stdout == "degraded\n  1 rule is pending: feed\n"
    assert daemon.run("health", "--strict", check=False).returncode == 69

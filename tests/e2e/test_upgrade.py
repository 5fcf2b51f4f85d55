"""A daemon's place is taken by a new one under load.

sender: eth0 -- in0 :relay: out0 -- eth0 :receiver
                           out1 -- eth0 :receiver1
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import pytest

from lab.daemon import settled
from lab.namespaces import wait_until
from lab.topology import RelayLine
from lab.traffic import ReceivePlan, SendPlan, run_sender, start_receiver, start_sender

from .conftest import StartDaemon

INPUT: Final = "239.1.1.1:5000"
OUTPUT: Final = "239.2.2.2:6000"


def alive(pid: int) -> bool:
    return os.path.exists(f"/proc/{pid}")


@pytest.mark.parametrize("options", [(), ("--ingress", "recv"), ("--engine", "reference")], ids=" ".join)
def test_an_upgrade_under_load_loses_nothing(start: StartDaemon, line: RelayLine, options: tuple[str, ...]) -> None:
    daemon = start(*options)
    daemon.run("add", f"{INPUT}%in0", f"{OUTPUT}%out0", "--name", "feed")
    daemon.run("add", f"{INPUT}%nowhere", f"{OUTPUT}%out0", "--name", "waits")
    before = daemon.json("list")
    former = daemon.pids()
    receiver = start_receiver(line.receiver, ReceivePlan(OUTPUT, interface="eth0", idle_timeout_s=3, core=0))
    rate = 20_000 if not options else 2_000
    sender = start_sender(line.sender, SendPlan(INPUT, interface="eth0", rate=rate, duration_s=60, core=0))
    wait_until(lambda: daemon.json("stats")["rules"][0]["packets"] > 0, 5)
    for _ in range(1 if options else 2):
        daemon.upgrade()
    sent = sender.stop().sent
    report = receiver.result()
    assert (report.received, report.lost, report.duplicated, report.reordered) == (sent, 0, 0, 0)
    assert daemon.json("list")["rules"] == before["rules"]
    assert not any(alive(pid) for pid in former.values())
    assert Path(f"/proc/{daemon.pid}/comm").read_text() == "mcrelay\n"
    with daemon.client() as client:
        totals = settled(client)  # counters went on
    assert (totals["forwarded"], totals["dropped"]) == (sent, {})
    # And the new daemon can do everything.
    daemon.run("remove", "waits")
    daemon.run("add", "239.1.1.9:5000%in0", f"{OUTPUT}%out1")
    daemon.run("remove", "feed")
    run_sender(line.sender, SendPlan(INPUT, interface="eth0", count=10))
    with daemon.client() as client:
        assert settled(client)["forwarded"] == sent

"""Rules survive the daemon, whatever ends it.

sender: eth0 -- in0 :relay: out0 -- eth0 :receiver
                           out1 -- eth0 :receiver1
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any, Final

import pytest

from lab.daemon import Daemon, settled
from lab.namespaces import wait_until
from lab.topology import RelayLine
from lab.traffic import ReceivePlan, SendPlan, start_receiver, start_sender
from mcrelay.state import FORMAT

from .conftest import StartDaemon

INPUT: Final = "239.1.1.1:5000"
OUTPUT: Final = "239.2.2.2:6000"


def names(daemon: Daemon) -> list[str]:
    return [rule["name"] for rule in daemon.json("list")["rules"]]


def test_rules_are_back_after_the_supervisor_was_killed_under_load(
    start: StartDaemon, line: RelayLine, tmp_path: Path
) -> None:
    daemon = Daemon(line.relay, directory=tmp_path).__enter__()
    daemon.run("add", f"{INPUT}%in0", f"{OUTPUT}%out0", "--name", "feed")
    daemon.run("add", "239.1.1.2:5000%in0", f"{OUTPUT}%out1", "--name", "gone")
    daemon.run("add", "239.1.1.3:5000%nowhere", f"{OUTPUT}%out1", "--name", "waits")
    daemon.run("remove", "gone")
    pids = daemon.pids()
    receiver = start_receiver(
        line.receiver, ReceivePlan(OUTPUT, interface="eth0", idle_timeout_s=10, deadline_s=60, progress=True)
    )
    sender = start_sender(line.sender, SendPlan(INPUT, interface="eth0", rate=1000, duration_s=60))
    wait_until(lambda: receiver.progress.get("received"), 5)
    os.kill(daemon.pid, signal.SIGKILL)
    daemon.stop(check=False)
    wait_until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids.values()), 5, "a worker lives on")
    successor = start(directory=tmp_path)
    successor.wait_for_log("restored 2 of 2 rules")
    assert names(successor) == ["feed", "waits"]
    before = receiver.progress["received"]
    wait_until(lambda: receiver.progress["received"] > before, 5, "nothing is forwarded")
    sent = sender.stop().sent
    wait_until(lambda: receiver.progress["received"] > before, 5)
    with successor.client() as client:
        totals = settled(client)
    assert totals["dropped"] == {}
    assert 0 < totals["forwarded"] < sent
    successor.run("remove", "feed")
    receiver.stop()


def test_rules_are_back_after_a_stop_unless_told_not_to(start: StartDaemon, line: RelayLine, tmp_path: Path) -> None:
    with Daemon(line.relay, directory=tmp_path) as daemon:
        daemon.run("add", f"{INPUT}%in0", f"{OUTPUT}%out0", "--name", "feed")
        generation = daemon.json("stats")["generation"]
    with Daemon(line.relay, directory=tmp_path) as daemon:
        assert names(daemon) == ["feed"]
        assert daemon.json("stats")["generation"] > generation  # no number is used twice
        daemon.run("add", "239.1.1.9:5000%in0", f"{OUTPUT}%out0", "--name", "another")  # counted by itself
        daemon.run("remove", "another")
    with Daemon(line.relay, "--no-restore", directory=tmp_path) as daemon:
        assert names(daemon) == []
        daemon.run("add", f"{INPUT}%in0", f"{OUTPUT}%out0", "--name", "other")
    with Daemon(line.relay, directory=tmp_path) as daemon:
        assert names(daemon) == ["other"]
    assert sorted(os.listdir(tmp_path)) == ["control.sock.state", "control.sock.state.old"]
    assert (tmp_path / "control.sock.state").stat().st_mode & 0o777 == 0o600


def record(number: int, **fields: Any) -> dict[str, Any]:
    return {
        "input": f"239.1.1.{number}:5000%in0",
        "outputs": [f"{OUTPUT}%out0"],
        "name": f"rule-{number}",
        "counter": number,
        "output_counters": [number],
        **fields,
    }


@pytest.mark.parametrize(
    ("rules", "words", "restored"),
    [
        ([record(1), {"no": "rule"}], "starting without it", []),
        ([record(1), record(2, input="nonsense"), record(3)], "cannot restore rule rule-2", ["rule-1", "rule-3"]),
        ([record(1), record(2, counter=1)], "cannot restore rule rule-2", ["rule-1"]),
    ],
    ids=["not to be read", "one rule is none", "a counter twice"],
)
def test_what_cannot_be_restored_is_told_and_does_no_harm(
    line: RelayLine, tmp_path: Path, rules: list[dict[str, Any]], words: str, restored: list[str]
) -> None:
    path = tmp_path / "control.sock.state"
    path.write_text(json.dumps({"format": FORMAT, "generation": 5, "rules": rules}))
    path.chmod(0o600)
    with Daemon(line.relay, "--workers", "1", directory=tmp_path) as daemon:
        assert words in daemon.log
        assert "Traceback" not in daemon.log
        assert names(daemon) == restored
        daemon.run("add", "239.1.1.9:5000%in0", f"{OUTPUT}%out0", "--name", "new")
        assert names(daemon) == [*restored, "new"]

"""Events, as clients and hooks get them from a daemon that has something to tell.

sender: eth0 -- in0 :relay: out0 -- eth0 :receiver
                           out1 -- eth0 :receiver1
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any, Final

import pytest

from lab.daemon import Daemon
from lab.namespaces import wait_until
from lab.program import PROGRAM
from lab.topology import RelayLine
from lab.traffic import SendPlan, start_sender
from mcrelay.client import Client
from mcrelay.errors import Unavailable
from tests.e2e.conftest import StartDaemon

INPUT: Final = "239.1.1.1:5000"
OUTPUT: Final = "239.2.2.2:6000%out0"
FAST: Final = "[daemon]\nworkers = 1\n[events]\nsilent_s = 1\nstopped_s = 2\n"


class Follower:
    """`mcrelay events --json`, and what it has printed."""

    def __init__(self, daemon: Daemon, *options: str) -> None:
        self._process = subprocess.Popen(
            [PROGRAM, "events", "--json", "--socket", daemon.socket, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.seen: list[dict[str, Any]] = []
        self._numbers = itertools.count()
        self._read = threading.Thread(target=self._follow, daemon=True)
        self._read.start()

    def _follow(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            self.seen.append(json.loads(line))

    def wait_for(self, kind: str, subject: str, deadline_s: float = 20) -> dict[str, Any]:
        return (
            wait_until(
                lambda: next((e for e in self.seen if (e["kind"], e["subject"]) == (kind, subject)), None),
                deadline_s,
                f"no {kind} {subject} among {self.seen}",
            )
            or {}
        )

    def begin(self, daemon: Daemon) -> None:
        """Wait until it is told of what happens from now on."""
        names: set[str] = set()  # which no event of former times has

        def is_told() -> bool:
            names.add(name := f"begin-{next(self._numbers)}")
            daemon.run("add", "239.9.9.9:9%in0", "239.9.9.8:9%out0", "--name", name)
            daemon.run("remove", name)
            return any(event["subject"] in names for event in self.seen)

        wait_until(is_told, 20)

    def stop(self) -> tuple[int, str]:
        self._process.send_signal(signal.SIGINT)
        code = self._process.wait(20)
        self._read.join(20)  # it has all that was printed
        assert self._process.stderr
        return code, self._process.stderr.read()


@pytest.fixture
def daemon(start: StartDaemon, tmp_path: Path) -> Daemon:
    file = tmp_path / "mcrelay.toml"
    file.write_text(FAST)
    return start("--config", str(file))


def test_what_happens_is_told(daemon: Daemon, line: RelayLine) -> None:
    follower = Follower(daemon)
    follower.begin(daemon)
    daemon.run("add", f"{INPUT}%in0", OUTPUT, "--name", "feed")
    follower.wait_for("rule_added", "feed")
    sender = start_sender(line.sender, SendPlan(INPUT, interface="eth0", rate=500, duration_s=60))
    assert follower.wait_for("flow_started", "feed")["values"]["packets"] > 0
    sender.stop()
    follower.wait_for("flow_silent", "feed")
    follower.wait_for("flow_stopped", "feed")
    daemon.run("pause", "feed")
    follower.wait_for("rule_changed", "feed")
    line.relay.run("ip", "link", "set", "out0", "down")
    assert "down" in follower.wait_for("interface_down", "out0")["text"]
    line.relay.run("ip", "link", "set", "out0", "up")
    follower.wait_for("interface_up", "out0")
    pid = daemon.pids()["data/0"]
    os.kill(pid, signal.SIGKILL)
    follower.wait_for("worker_down", "0")
    assert follower.wait_for("worker_up", "0")["values"]["pid"] == daemon.pids()["data/0"] != pid
    daemon.run("remove", "feed")
    follower.wait_for("rule_removed", "feed")
    times = [event["time_ns"] for event in follower.seen]
    assert times == sorted(times)
    assert follower.stop() == (0, "")


def test_loss_is_told_when_it_begins_and_when_it_is_over(daemon: Daemon, line: RelayLine) -> None:
    daemon.run("add", f"{INPUT}%in0", f"{OUTPUT},rate=10pps", "--name", "feed")
    follower = Follower(
        daemon, "--only", "loss", "--only", "loss_over", "--only", "rule_added", "--only", "rule_removed"
    )
    follower.begin(daemon)
    sender = start_sender(line.sender, SendPlan(INPUT, interface="eth0", rate=200, duration_s=60))
    loss = follower.wait_for("loss", "feed")
    assert loss["values"]["percent"] >= 1
    sender.stop()
    sender = start_sender(line.sender, SendPlan(INPUT, interface="eth0", rate=5, duration_s=60))
    follower.wait_for("loss_over", "feed")
    sender.stop()
    assert {event["kind"] for event in follower.seen} <= {"loss", "loss_over", "rule_added", "rule_removed"}


def test_a_follower_goes_on_with_the_next_daemon(daemon: Daemon) -> None:
    follower = Follower(daemon)
    follower.begin(daemon)
    daemon.upgrade()
    follower.seen.clear()
    follower.begin(daemon)
    os.kill(daemon.pids()["control"], signal.SIGKILL)
    follower.seen.clear()
    wait_until(lambda: daemon.run("ping", check=False).returncode == 0, 20)
    follower.begin(daemon)
    code, errors = follower.stop()
    assert (code, errors.count("connected again")) == (0, 2)


def test_a_program_is_run_for_each(daemon: Daemon, tmp_path: Path) -> None:
    hook = tmp_path / "hook"
    hook.write_text(
        f'#!/bin/sh\necho "$1 $2 $MCRELAY_EVENT $MCRELAY_SUBJECT" >> {tmp_path}/runs; cat >> {tmp_path}/stdin\nexit 3\n'
    )
    hook.chmod(0o755)
    follower = Follower(daemon, "--only", "rule_added", "--run", str(hook))
    follower.begin(daemon)
    wait_until(lambda: (tmp_path / "stdin").exists() and (tmp_path / "stdin").read_text(), 20)
    daemon.run("add", "239.9.9.9:9%in0", "239.9.9.8:9%out0", "--name", "last")
    follower.wait_for("rule_added", "last")
    wait_until(lambda: " last " in (tmp_path / "runs").read_text(), 20)
    code, errors = follower.stop()
    runs = (tmp_path / "runs").read_text().splitlines()
    subjects = [event["subject"] for event in follower.seen]
    assert runs == [f"rule_added {subject} rule_added {subject}" for subject in subjects]
    first, _end = json.JSONDecoder().raw_decode((tmp_path / "stdin").read_text())
    assert (first["kind"], first["subject"]) == ("rule_added", subjects[0])
    assert code == 0
    assert f"failed for rule_added {subjects[0]}: exit code 3" in errors
    done = daemon.run("events", "--run", "/nowhere/hook", check=False)
    assert (done.returncode, "there is no such program" in done.stderr) == (64, True)
    (tmp_path / "no-program").touch()
    done = daemon.run("events", "--run", str(tmp_path / "no-program"), check=False)
    assert (done.returncode, "you may not execute it; chmod +x " in done.stderr) == (64, True)


def test_a_subscriber_that_does_not_read_is_dropped(daemon: Daemon) -> None:
    """And nobody waits for it."""
    with Client(daemon.socket) as idle, daemon.client() as client:
        stream = idle.events()
        rules = [
            (f"239.7.{n // 250}.{n % 250}:7%in0", [f"239.8.{n // 250}.{n % 250}:7%out0"], None) for n in range(4000)
        ]
        ids: tuple[str, ...] = ()
        for _ in range(30):
            client.change([] if ids else rules, ids)
            ids = () if ids else tuple(rule.id for rule in client.rules())
            if "has not read its answers" in daemon.log or "does not read: closed" in daemon.log:
                break
        wait_until(lambda: "has not read its answers" in daemon.log or "does not read: closed" in daemon.log, 30)
        client.ping()
        with pytest.raises(Unavailable):
            list(stream)

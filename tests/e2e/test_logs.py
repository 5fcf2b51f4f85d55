"""The log of a whole daemon: its lines are what --log-format says, and levels change in all processes, for good.

sender: eth0 -- in0 :relay: out0 -- eth0 :receiver
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from collections.abc import Callable
from datetime import datetime
from typing import Any, Final

import pytest

from lab.daemon import Daemon
from lab.namespaces import wait_until
from lab.program import PROGRAM, run_program
from lab.topology import RelayLine
from mcrelay.frames import HEADER
from mcrelay.logs import BURST

from .conftest import StartDaemon

RULE: Final = ("239.1.1.1:5000%in0", "239.2.2.2:6000%out0")


def lines(daemon: Daemon) -> list[dict[str, Any]]:
    """Each has to be an object with what every line has."""
    found = []
    for line in daemon.log.splitlines():
        record = json.loads(line)
        assert record.keys() >= {"time", "level", "component", "process", "pid", "message"}, line
        assert datetime.fromisoformat(record["time"]).utcoffset() is not None
        found.append(record)
    return found


def test_levels_change_in_every_process_and_stay_changed(start: StartDaemon) -> None:
    daemon = start("--log-format", "json", "--log-level", "info", "--log-level", "own=error", "--workers", "1")

    def said(process: str, component: str, pid: int) -> Callable[[], bool]:
        return lambda: any(
            (line["process"], line["component"], line["pid"], line["level"]) == (process, component, pid, "debug")
            for line in lines(daemon)
        )

    assert daemon.json("log")["components"] == {"own": "error"}
    daemon.run("add", *RULE, "--name", "before")
    assert not any(line["level"] == "debug" for line in lines(daemon))

    shown = daemon.json("log", "dataplane=debug", "clients=debug", "own=default", "active=debug")
    wanted = {"active": "debug", "clients": "debug", "dataplane": "debug"}
    assert (shown["level"], shown["components"]) == ("info", wanted)
    daemon.run("remove", "before")  # effective at once: no waiting for anything but the lines themselves
    pids = daemon.pids()
    for process, component in (("control", "clients"), ("data/0", "dataplane"), ("supervisor", "active")):
        wait_until(said(process, component, pids[process]), 5, f"{process} does not log {component}")
    assert not any(line["level"] == "debug" and line["component"] not in wanted for line in lines(daemon))

    # The next life of each worker: the spare's, and one that is started.
    for process, component in (("data/0", "dataplane"), ("control", "clients")):
        os.kill(daemon.pids()[process], signal.SIGKILL)
        daemon.wait_for_log(f"{process} is back")
        daemon.run("ping")
        wait_until(said(process, component, daemon.pids()[process]), 5, f"the new {process} does not")
        assert daemon.json("log")["components"] == wanted

    daemon.upgrade()
    assert daemon.json("log")["components"] == wanted
    daemon.run("add", *RULE, "--name", "after")
    pids = daemon.pids()
    for process, component in (("control", "clients"), ("data/0", "dataplane"), ("supervisor", "active")):
        wait_until(said(process, component, pids[process]), 5, f"after an upgrade, {process} does not")

    with daemon.client() as client:
        assert daemon.json("log", "all=error")["level"] == "error"
        reply = client.set_log_levels("warning", dict.fromkeys(wanted, "default"))
        assert (reply.level, reply.components, client.log_levels().level) == ("warning", {}, "warning")
    for words, message in (
        (["lnks=debug"], "there is no component 'lnks'; did you mean links?"),
        (["links=loud"], "links=loud: there is no such log level; there are debug, info, warning, error, default"),
        (["links"], "'links' is a component, not a level"),
    ):
        refused = daemon.run("log", *words, check=False)
        assert (refused.returncode, refused.stderr.startswith(f"mcrelay: {message}")) == (64, True), refused.stderr
    assert (daemon.json("log")["level"], daemon.json("log")["components"]) == ("warning", {})

    # Of a worker that dies there is a word at that level; of one that was asked to go there is none.
    killed = daemon.pids()["data/0"]
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: daemon.pids()["data/0"] not in (None, killed), 20)
    replaced = daemon.pids()["data/0"]
    daemon.run("restart-worker", "0")
    ends = [line for line in lines(daemon) if line["level"] == "warning" and line["component"] == "children"]
    assert ends[-1]["message"].startswith(f"data/0 (pid {killed}) was ended by signal 9 (Killed) after ")
    assert f"data/0 (pid {replaced})" not in daemon.log

    # Where everybody may write into the log, nobody writes much.
    body = rb'{"type":"ping","id":1,"a\n\u001b[2J\u202e":1}'
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(daemon.socket)
        for _ in range(BURST + 2):
            sock.sendall(HEADER.pack(len(body)) + body)
        wait_until(lambda: daemon.times_logged("malformed frame on client") == BURST + 2, 10, "some are not told")
    more = [line for line in lines(daemon) if "suppressed" in line]
    assert [(line["suppressed"], line["component"], line["process"]) for line in more] == [(2, "channel", "control")]
    assert "unknown field `a\\n\\x1b[2J\\u202e`" in more[0]["message"]


def test_the_journal_is_recognised(line: RelayLine) -> None:
    """A pipe, of which the environment says that it is the journal's."""
    read, write = os.pipe()
    status = os.fstat(write)
    environment = {**os.environ, "JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
    with (
        os.fdopen(read) as journal,
        subprocess.Popen(
            [PROGRAM, "run", "--socket", "/proc/nowhere/control.sock", "--workers", "1"], stderr=write, env=environment
        ) as process,
    ):
        os.close(write)
        said = journal.read()
        assert process.wait(20) == 73
    assert said.startswith("<2>supervisor: cannot run: cannot use /proc/nowhere for the socket: ")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--log-level", "lnks=debug"], "there is no component 'lnks'; did you mean links?"),
        (["--log-level", "loud"], "there is no log level 'loud'; there are debug, info, warning, error"),
        (["--log-format", "xml"], "Invalid value for '--log-format': 'xml' is not one of"),
    ],
)
def test_what_run_cannot_log_by_is_refused(options: list[str], message: str) -> None:
    done = run_program(["run", *options], timeout=20)
    assert (done.returncode, done.stderr.startswith(f"mcrelay: {message}")) == (64, True), done.stderr

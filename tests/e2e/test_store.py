"""A service manager keeps the sockets while a daemon is stopped and started again.

sender: eth0 -- in0 :relay: out0 -- eth0 :receiver
                           out1 -- eth0 :receiver1
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from lab.daemon import Daemon, settled
from lab.manager import Manager
from lab.namespaces import wait_until
from lab.topology import RelayLine
from lab.traffic import ReceivePlan, SendPlan, start_receiver, start_sender

INPUT: Final = "239.1.1.1:5000"
OUTPUT: Final = "239.2.2.2:6000"


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    with contextlib.closing(Manager(tmp_path)) as manager:
        monkeypatch.setenv("NOTIFY_SOCKET", manager.path)
        monkeypatch.setenv("FDSTORE", "512")
        yield manager


def run(line: RelayLine, manager: Manager, directory: Path, *options: str) -> Daemon:
    return Daemon(
        line.relay, *options, program=manager.program(), directory=directory, pass_fds=tuple(manager.kept.values())
    )


def stop(daemon: Daemon, manager: Manager) -> None:
    """It leaves its socket, where clients wait for the next one; the manager has read all that it said."""
    daemon.stop(check=False)
    assert daemon.process.returncode == 0, daemon.log
    (count,) = re.findall(r"(\d+) sockets are kept", daemon.log)
    wait_until(lambda: len(manager.kept) == int(count), 5, "not all has come")


def test_a_restart_loses_nothing(line: RelayLine, manager: Manager, tmp_path: Path) -> None:
    """The rings hold what comes meanwhile."""
    options = ("--ring-mib", "128", "--metrics", "127.0.0.1:9478")
    first = run(line, manager, tmp_path, *options).__enter__()
    first.run("add", f"{INPUT}%in0", f"{OUTPUT}%out0", "--name", "feed")
    first.run("add", f"{INPUT}%nowhere", f"{OUTPUT}%out0", "--name", "waits")
    receiver = start_receiver(line.receiver, ReceivePlan(OUTPUT, interface="eth0", idle_timeout_s=10))
    sender = start_sender(line.sender, SendPlan(INPUT, interface="eth0", rate=2000, duration_s=60))
    wait_until(lambda: first.json("stats")["rules"][0]["packets"] > 0, 5)
    stop(first, manager)
    assert len(manager.kept) >= 5, first.log
    scraper = line.relay.call(socket.create_connection, ("127.0.0.1", 9478), 10)  # waits, too
    second = run(line, manager, tmp_path, *options).__enter__()
    assert [rule["name"] for rule in second.json("list")["rules"]] == ["feed", "waits"]
    scraper.sendall(b"GET /health HTTP/1.1\r\nHost: relay\r\n\r\n")
    assert scraper.recv(4096).startswith(b"HTTP/1.1 200 OK")
    scraper.close()
    sent = sender.stop().sent
    wait_until(lambda: second.json("stats")["rules"][0]["forwarded"] == sent, 10, "not all is forwarded")
    report = receiver.stop()
    assert (report.received, report.lost, report.duplicated, report.reordered) == (sent, 0, 0, 0)
    with second.client() as client:
        assert settled(client)["dropped"] == {}
    second.run("remove", "feed")
    assert manager.kept == {}  # the daemon has them
    second.stop(check=False)
    assert second.process.returncode == 0, second.log


@pytest.mark.parametrize("what", ["one descriptor is missing", "another number of workers", "no file"])
def test_what_does_not_fit_is_told_and_not_used(line: RelayLine, manager: Manager, tmp_path: Path, what: str) -> None:
    metrics = ("--metrics", "127.0.0.1:9478")  # whose port is free for the next one
    first = run(line, manager, tmp_path, *metrics).__enter__()
    first.run("add", f"{INPUT}%in0", f"{OUTPUT}%out0", "--name", "feed")
    stop(first, manager)
    options: tuple[str, ...] = ()
    if what == "one descriptor is missing":
        os.close(manager.kept.pop(sorted(manager.kept)[-1]))
    elif what == "another number of workers":
        if len(os.sched_getaffinity(0)) < 2:
            pytest.skip("there is one core")
        options = ("--workers", "1")
    else:
        (tmp_path / "control.sock.sockets").unlink()
    second = run(line, manager, tmp_path, *metrics, *options).__enter__()
    assert "cannot go on with the sockets that were kept" in second.log
    assert [rule["name"] for rule in second.json("list")["rules"]] == ["feed"]  # from the state file
    second.stop(check=False)
    assert second.process.returncode == 0

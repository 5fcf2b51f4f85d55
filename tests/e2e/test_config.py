"""The configuration file of a running daemon: begun with, read again, compared, applied, saved.

sender: eth0 -- in0 :relay: out0 -- eth0 :receiver
                           out1 -- eth0 :receiver1
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Final
from urllib.request import urlopen

import pytest

from lab.daemon import Daemon
from lab.manager import Manager
from lab.namespaces import wait_until
from lab.program import PROGRAM, run_program
from lab.topology import INGRESS_ADDRESS, RelayLine
from lab.traffic import ReceivePlan, SendPlan, start_receiver, start_sender
from tests.e2e.conftest import StartDaemon

INPUT: Final = "239.1.1.1:5000"
OUTPUT: Final = "239.2.2.2:6000"
TEXT: Final = f"""\
# of a test
[daemon]
workers = 1

[interface.in0]
ring_mib = 2

[worker.0]
latency_budget_us = 0

[[rule]]
name = "feed"  # the one that is kept
input = "{INPUT}%in0"
output = "{OUTPUT}%out0"

[[rule]]
name = "spare"
input = "239.1.1.2:5000%in0"
output = "239.2.2.3:6000%out0"
"""
OTHER: Final = TEXT[TEXT.rindex("[[rule]]") :]
NEW: Final = OTHER.replace("239.1.1.2", "239.1.1.3").replace("spare", "new")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mcrelay.toml"
    path.write_text(TEXT)
    return path


def names(daemon: Daemon) -> list[str]:
    return [rule["name"] for rule in daemon.json("list")["rules"]]


def reload(daemon: Daemon, says: str) -> None:
    before = daemon.log.count(says)
    os.kill(daemon.pid, signal.SIGHUP)
    wait_until(lambda: daemon.log.count(says) > before, 10, daemon.log)


def test_a_daemon_has_the_rules_of_its_file_and_no_others(start: StartDaemon, file: Path) -> None:
    daemon = start("--config", str(file))
    assert names(daemon) == ["feed", "spare"]
    with daemon.client() as client:
        status = client.status()
    assert (status.config, status.rules) == (str(file), 2)
    assert status.settings.worker["0"].latency_budget_us == 0
    assert daemon.run("diff").stdout == ""


def test_reading_the_file_again_touches_only_what_differs(start: StartDaemon, line: RelayLine, file: Path) -> None:
    daemon = start("--config", str(file))
    receiver = start_receiver(line.receiver, ReceivePlan(OUTPUT, interface="eth0", idle_timeout_s=3))
    sender = start_sender(line.sender, SendPlan(INPUT, interface="eth0", rate=2000, duration_s=60))
    wait_until(lambda: daemon.json("stats")["rules"][0]["packets"] > 0, 5)
    file.write_text(TEXT.replace(OTHER, NEW))
    reload(daemon, "1 added, 1 removed")
    assert names(daemon) == ["feed", "new"]
    sent = sender.stop().sent
    assert receiver.result().received == sent  # nothing was lost on the way
    assert daemon.json("stats")["rules"][0]["packets"] == sent


def test_a_broken_file_changes_nothing_and_the_log_says_where_it_is_broken(
    start: StartDaemon, line: RelayLine, file: Path
) -> None:
    daemon = start("--config", str(file), "--metrics", "127.0.0.1:9478")

    def is_in_force() -> str:
        with line.relay.call(lambda: urlopen("http://127.0.0.1:9478/metrics", timeout=10)) as response:
            return str(re.search(r"^mcrelay_config_last_reload_successful (.*)$", response.read().decode(), re.M)[1])  # type: ignore[index] # it is there

    assert is_in_force() == "1.0"
    generation = daemon.json("list")["generation"]
    file.write_text(TEXT.replace("latency_budget_us", "latency_budget_ms").replace(OTHER, NEW))
    reload(daemon, f"{file}:9: unknown key 'latency_budget_ms' in [worker.0]; did you mean 'latency_budget_us'?")
    file.unlink()
    reload(daemon, f"cannot read {file}: No such file")
    file.write_text(TEXT.replace("%out0", "%out0,source=keep,source=keep"))
    reload(daemon, f"{file}:14: ")
    assert (names(daemon), daemon.json("list")["generation"]) == (["feed", "spare"], generation)
    wait_until(lambda: is_in_force() == "0.0", 10)
    daemon.run("log", "clients=error")
    file.write_text(TEXT.replace("workers = 1", 'workers = 2\n[log.levels]\nlinks = "debug"'))
    reload(daemon, "changed in the file, and in force after a restart: daemon.workers")
    assert daemon.json("log")["components"] == {"clients": "error", "links": "debug"}
    daemon.run("log", "links=warning")
    os.kill(daemon.pids()["control"], signal.SIGKILL)
    wait_until(lambda: "control is back" in daemon.log, 10)
    reload(daemon, "nothing to change")  # behind what a new control plane is told of the file
    assert daemon.json("log")["components"] == {"clients": "error", "links": "warning"}
    assert daemon.json("diff", check=False)["reload"] == []
    wait_until(lambda: is_in_force() == "1.0", 10)
    file.write_text(TEXT)
    assert daemon.json("diff", check=False)["reload"] == ["log.levels"]
    file.write_text(TEXT.replace("workers = 1", 'cores = "4095"\nuser = "nobody-of-that-name"'))
    reload(daemon, "a restart will be refused: daemon.cores 4095: core 4095 is not there for us")
    daemon.wait_for_log("a restart will be refused: daemon.user nobody-of-that-name: there is no such user")
    noted = daemon.run("diff", check=False).stderr
    assert "mcrelay: note: " in noted
    assert f"{file}:" in noted
    os.kill(daemon.pid, signal.SIGHUP)
    wait_until(lambda: daemon.json("log")["components"] == {"clients": "error"}, 10)


def test_a_signal_during_the_start_has_the_file_read_once_more_behind_it(line: RelayLine, file: Path) -> None:
    daemon = Daemon(line.relay, "--config", str(file))
    children = Path(f"/proc/{daemon.process.pid}/task/{daemon.process.pid}/children")
    wait_until(lambda: children.read_text() != "", 10, "no worker was started")
    os.kill(daemon.process.pid, signal.SIGHUP)
    with daemon:
        wait_until(lambda: daemon.log.count("the rules are those of") == 2, 10, daemon.log)
        assert daemon.log.index("ready:") < daemon.log.rindex("the rules are those of")
        assert names(daemon) == ["feed", "spare"]


def test_a_rule_that_this_host_cannot_have_is_left_out_at_start_and_refused_at_a_reload(
    start: StartDaemon, file: Path
) -> None:
    wrong = f'[[rule]]\nname = "wrong"\ninput = "{INGRESS_ADDRESS}:7000%lo"\noutput = "{INGRESS_ADDRESS}:7000%in0"\n'
    file.write_text(TEXT.replace(OTHER, wrong + OTHER))
    daemon = start("--config", str(file))
    daemon.wait_for_log("rule wrong of the configuration cannot be: rule wrong closes a cycle: ")
    assert names(daemon) == ["feed", "spare"]
    assert "+ wrong" in daemon.run("diff", check=False).stdout
    file.write_text(TEXT.replace(OTHER, wrong + NEW))
    reload(daemon, "the configuration stays as it is: rule wrong closes a cycle: ")
    assert names(daemon) == ["feed", "spare"]
    file.write_text(TEXT)
    reload(daemon, "nothing to change")


def test_what_the_file_says_of_levels_counts_when_it_is_read(line: RelayLine, file: Path) -> None:
    """And not before, whoever has been replaced in between; an upgrade reads it."""
    with Daemon(line.relay, "--config", str(file)) as daemon:

        def level() -> str:
            return str(daemon.json("log")["level"])

        def end_control() -> None:
            before = daemon.log.count("control is back")
            os.kill(daemon.pids()["control"], signal.SIGKILL)
            wait_until(lambda: daemon.log.count("control is back") > before, 20)

        file.write_text('[log]\nlevel = "debug"\nformat = "json"\n[events]\nsilent_s = 3\n' + TEXT)
        end_control()
        waiting = daemon.json("diff", check=False)
        assert (waiting["reload"], waiting["restart"]) == (["log.level", "events.silent_s"], ["log.format"])
        assert level() == "info"
        reload(daemon, "nothing to change")
        wait_until(lambda: level() == "debug", 10)
        end_control()
        waiting = daemon.json("diff", check=False)
        assert (waiting["reload"], waiting["restart"]) == ([], ["log.format"])
        file.write_text(TEXT)
        reload(daemon, "nothing to change")
        wait_until(lambda: level() == "info", 10)
        daemon.run("log", "error")
        daemon.upgrade()
        assert level() == "error"  # what somebody has changed stays where the file's part of it does
        file.write_text('[log]\nlevel = "warning"\n' + TEXT)
        daemon.upgrade()
        assert level() == "warning"


def test_a_restart_goes_back_to_the_file_and_an_upgrade_does_not(start: StartDaemon, file: Path) -> None:
    daemon = start("--config", str(file))
    daemon.run("remove", "spare")
    daemon.upgrade()
    assert names(daemon) == ["feed"]
    os.kill(daemon.pids()["control"], signal.SIGKILL)
    wait_until(lambda: "control is back" in daemon.log, 10)
    assert names(daemon) == ["feed"]
    reload(daemon, "1 added")
    assert names(daemon) == ["feed", "spare"]


def test_what_runs_and_what_a_file_says_are_compared_applied_and_saved(start: StartDaemon, file: Path) -> None:
    daemon = start("--config", str(file))
    daemon.run("pause", "feed")
    daemon.run("remove", "spare")
    done = daemon.run("diff", check=False)
    assert done.returncode == 1
    assert "+ spare  239.1.1.2:5000%in0 -> 239.2.2.3:6000%out0" in done.stdout.splitlines()
    assert f"-   -> {OUTPUT}%out0,paused" in done.stdout.splitlines()
    assert "\x1b" not in done.stdout

    other = file.with_name("other.toml")
    other.write_text("[events]\nsilent_s = 2\n" + TEXT.replace(OTHER, NEW).replace("workers = 1", "workers = 2"))
    done = daemon.run("diff", str(other), check=False)
    assert done.stderr == "only after a reload: events.silent_s\nonly after a restart: daemon.workers\n"
    other.write_text(TEXT.replace(OTHER, NEW))
    would = daemon.run("apply", str(other), "--dry-run").stdout
    assert "+ new" in would
    assert names(daemon) == ["feed"]
    applied = daemon.json("apply", str(other))
    assert [rule["name"] for rule in applied["added"]] == ["new"]
    assert [change["after"]["outputs"] for change in applied["changed"]] == [[f"{OUTPUT}%out0"]]
    assert daemon.run("apply", str(other)).stdout == "nothing to change\n"
    assert sorted(names(daemon)) == ["feed", "new"]

    assert daemon.run("save").stdout == f"{file}: 1 added, 1 removed\n"
    assert "# the one that is kept" in file.read_text()
    assert daemon.run("diff").stdout == ""

    # Only settings wait, and that is a difference, too.
    other.write_text("[events]\nsilent_s = 2\n" + file.read_text())
    assert (daemon.run("diff", str(other), check=False).returncode, daemon.run("diff", check=False).returncode) == (
        1,
        0,
    )

    # A drop-in of its own, with all rules in it, would break the next reload.
    drop_in = file.with_name("conf.d") / "mine.toml"
    for exists in (False, True):
        refused = daemon.run("save", str(drop_in), check=False)
        assert (refused.returncode, f"{drop_in} belongs to {file}" in refused.stderr) == (64, True), refused.stderr
        assert drop_in.exists() == exists
        drop_in.parent.mkdir(exist_ok=True)
        drop_in.touch()


def test_wrong_files_are_refused_with_everything_that_is_wrong(start: StartDaemon, file: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.toml"
    wrong.write_text("[deamon]\n" + TEXT.replace(OUTPUT, "239.2.2.2"))
    done = subprocess.run([PROGRAM, "check", str(wrong)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (78, "")
    assert [text.split(": ")[1] for text in done.stderr.splitlines()] == [f"{wrong}:1", f"{wrong}:15"]
    done = subprocess.run([PROGRAM, "run", "--config", str(wrong)], capture_output=True, text=True, check=False)
    assert done.returncode == 78
    assert done.stderr.count("\n") == 1
    assert "and 1 more" in done.stderr
    assert run_program(["check", str(file)], timeout=20).returncode == 0
    daemon = start()
    done = daemon.run("apply", str(wrong), check=False)
    assert done.returncode == 78
    assert names(daemon) == []
    for command in ("diff", "apply", "save"):
        done = daemon.run(command, check=False)
        assert (done.returncode, "without a configuration file" in done.stderr) == (64, True)
    os.kill(daemon.pid, signal.SIGHUP)
    daemon.wait_for_log("SIGHUP: there is no file to read again")


def test_a_service_manager_is_told_how_things_stand(
    line: RelayLine, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.closing(Manager(tmp_path)) as manager:
        monkeypatch.setenv("NOTIFY_SOCKET", manager.path)
        monkeypatch.setenv("WATCHDOG_USEC", "400000")
        with Daemon(line.relay, "--config", str(file)) as daemon:
            wait_until(lambda: ["READY=1", "STATUS=rules: 2; workers ready: 1 of 1"] in manager.said, 5)
            wait_until(lambda: manager.said.count(["WATCHDOG=1"]) > 2, 5)
            daemon.run("remove", "spare")
            wait_until(lambda: ["STATUS=rules: 1; workers ready: 1 of 1"] in manager.said, 5)
            ready = manager.said.index(["READY=1", "STATUS=rules: 2; workers ready: 1 of 1"])
            file.write_text(TEXT.replace(OTHER, ""))
            reload(daemon, "nothing to change")
            wait_until(lambda: sum("READY=1" in said for said in manager.said[ready:]) == 2, 5)
            (reloading,) = (said for said in manager.said if "RELOADING=1" in said)
            assert reloading[1].startswith("MONOTONIC_USEC=")
            os.kill(daemon.pid, signal.SIGSTOP)  # a supervisor that hangs gives no signs of life
            try:
                count = manager.said.count(["WATCHDOG=1"])
                with pytest.raises(TimeoutError):
                    wait_until(lambda: manager.said.count(["WATCHDOG=1"]) > count + 1, 1.2, "no sign of life")
            finally:
                os.kill(daemon.pid, signal.SIGCONT)
            wait_until(lambda: manager.said.count(["WATCHDOG=1"]) > count + 1, 5)
        wait_until(lambda: "STOPPING=1" in manager.said[-1], 5)

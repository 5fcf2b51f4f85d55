"""A daemon's place is taken by a new one, whoever asks and whatever else is under way.

sender: eth0 -- in0 :relay: out0 -- eth0 :receiver
                           out1 -- eth0 :receiver1
"""

from __future__ import annotations

import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import pytest

from lab.daemon import Daemon, answers
from lab.namespaces import wait_until
from lab.topology import RelayLine
from lab.traffic import SendPlan, run_sender
from mcrelay import process

from .conftest import StartDaemon

INPUT: Final = "239.1.1.1:5000"
OUTPUT: Final = "239.2.2.2:6000"


def test_of_two_upgrades_at_once_one_is_made(daemon: Daemon) -> None:
    daemon.run("add", f"{INPUT}%in0", f"{OUTPUT}%out0", "--name", "feed")
    with ThreadPoolExecutor(2) as threads:
        both = [threads.submit(daemon.run, "upgrade", check=False) for _ in range(2)]
        codes = sorted(done.result().returncode for done in both)
    assert codes[0] == 0
    assert codes[1] in (69, 75), "refused, or its daemon has gone meanwhile"
    assert daemon.process.wait(10) == 0
    daemon.pid = daemon.pids()["supervisor"]
    assert [rule["name"] for rule in daemon.json("list")["rules"]] == ["feed"]


def test_what_no_rule_uses_goes_after_an_upgrade_too(daemon: Daemon, line: RelayLine) -> None:
    def packet_sockets() -> int:
        return len(line.relay.run("cat", "/proc/net/packet").stdout.splitlines()) - 1

    daemon.run("add", f"{INPUT}%in0", f"{OUTPUT}%out0", "--name", "feed")
    workers = len(os.sched_getaffinity(0))
    wait_until(lambda: packet_sockets() == 2 * workers, 5, "no stock")
    daemon.run("remove", "feed")
    daemon.upgrade()
    wait_until(lambda: packet_sockets() == workers, 15, "they stay")


@pytest.mark.parametrize("order", [(signal.SIGUSR2, signal.SIGHUP), (signal.SIGHUP, signal.SIGUSR2)])
def test_a_reload_during_an_upgrade_is_made(
    start: StartDaemon, tmp_path: Path, order: tuple[signal.Signals, ...]
) -> None:
    """By the old daemon or by the new one."""
    file = tmp_path / "mcrelay.toml"
    file.write_text("")
    daemon = start("--config", str(file))
    file.write_text(f'[[rule]]\ninput = "{INPUT}%in0"\noutput = "{OUTPUT}%out0"\n')
    for number in order:
        os.kill(daemon.pid, number)
    assert daemon.process.wait(20) == 0
    wait_until(lambda: answers(daemon.socket), 5, "nobody answers")
    daemon.pid = daemon.pids()["supervisor"]
    wait_until(lambda: [rule["input"] for rule in daemon.json("list")["rules"]] == [f"{INPUT}%in0"], 20)


def test_a_signal_does_it_too(daemon: Daemon, line: RelayLine) -> None:
    daemon.run("add", f"{INPUT}%in0", f"{OUTPUT}%out0", "--name", "feed")
    os.kill(daemon.pid, signal.SIGUSR2)
    assert daemon.process.wait(20) == 0
    wait_until(lambda: answers(daemon.socket), 5, "nobody answers")
    daemon.pid = daemon.pids()["supervisor"]
    assert [rule["name"] for rule in daemon.json("list")["rules"]] == ["feed"]


def test_whoever_asked_for_an_upgrade_is_told_what_is_wrong_with_the_file(start: StartDaemon, tmp_path: Path) -> None:
    file = tmp_path / "mcrelay.toml"
    file.write_text("")
    daemon = start("--config", str(file))
    file.write_text("[deamon]\n")
    os.kill(daemon.pid, signal.SIGHUP)
    daemon.wait_for_log("the configuration stays as it is: ")
    refused = daemon.run("upgrade", check=False)
    assert (refused.returncode, f"the new daemon: {file}:1: unknown key 'deamon'" in refused.stderr) == (78, True)
    assert daemon.pids()["supervisor"] == daemon.pid


STRICTER: Final = f"""
import os
if {process.SUCCESSOR!r} in os.environ:
    import mcrelay.ruletext as texts
    parse = texts.parse_rule
    def stricter(input, outputs, name=None):
        if name == "odd":
            raise texts.RuleError("odd rules are not possible any more", "use even ones")
        return parse(input, outputs, name)
    texts.parse_rule = stricter
"""


def test_a_rule_that_a_later_version_refuses_keeps_no_other_from_it(
    start: StartDaemon, line: RelayLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(STRICTER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    daemon = start(program=(sys.executable, "-c", "from mcrelay.cli import main; main()"))
    daemon.run("add", f"{INPUT}%in0", f"{OUTPUT}%out0", "--name", "odd")
    daemon.run("add", "239.1.1.2:5000%in0", f"{OUTPUT}%out0", "--name", "even")
    for address, name in ((INPUT, 0), ("239.1.1.2:5000", 1)):
        run_sender(line.sender, SendPlan(address, interface="eth0", count=10))
        wait_until(lambda name=name: daemon.json("stats")["rules"][name]["packets"] == 10)  # type: ignore[misc] # a default
    daemon.upgrade()
    assert [rule["name"] for rule in daemon.json("list")["rules"]] == ["even"]
    groups = line.relay.ip("-4", "maddress", "show", "dev", "in0").stdout.split()
    assert (INPUT.partition(":")[0] in groups, "239.1.1.2" in groups) == (False, True)
    run_sender(line.sender, SendPlan("239.1.1.2:5000", interface="eth0", count=10))
    wait_until(lambda: daemon.json("stats")["rules"][0]["packets"] == 20)
    # What it was counted at is another's now, from zero on.
    daemon.run("add", "239.1.1.3:5000%in0", f"{OUTPUT}%out0", "--name", "new")
    assert [rule["packets"] for rule in daemon.json("stats")["rules"]] == [20, 0]

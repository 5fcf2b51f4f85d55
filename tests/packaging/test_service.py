"""The installed package under a real systemd: the units as they are shipped, with all that they forbid.

sender: eth0 -- in0 :relay: out0 -- eth0 :receiver
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from lab.namespaces import wait_until
from lab.roots import Root
from lab.topology import RelayLine
from lab.traffic import ReceivePlan, SendPlan, start_receiver, start_sender

UNITS: Final = Path(__file__).resolve().parents[2] / "packaging/systemd"
INPUT: Final = "239.1.1.1:5000"
OUTPUT: Final = "239.2.2.2:6000"
RULES: Final = "/etc/mcrelay/conf.d/rules.toml"
# The bound is what docs/service.md says; systemd's own scale is 0 (nothing is possible) to 10.
EXPOSURE_MAX: Final = {"mcrelay.service": 2.9, "mcrelay@.service": 2.9, "mcrelay-hook.service": 1.4}


@pytest.fixture(scope="module")
def machine(line: RelayLine, package: Path) -> Iterator[Root]:
    """It runs systemd, and the package was installed on it."""
    with Root(line.relay, boot=True) as root:
        root.install(package)
        yield root


def show(machine: Root, field: str, unit: str = "mcrelay.service") -> str:
    return machine.run("systemctl", "show", "--value", "--property", field, unit).stdout.strip()


def journal(machine: Root, unit: str = "mcrelay.service") -> str:
    return machine.run("journalctl", "--no-pager", "--unit", unit).stdout


def names(machine: Root, *options: str) -> list[str]:
    return re.findall(
        r'"name": "(.*)"', machine.run("mcrelay", "list", "--json", *options).stdout.split("interfaces")[0]
    )


def apply(machine: Root, name: str) -> None:
    """Have one rule of this name, by way of the files."""
    machine.write(RULES, f'[[rule]]\nname = "{name}"\ninput = "{INPUT}%in0"\noutput = "{OUTPUT}%out0"\n')
    machine.run("systemctl", "reload", "mcrelay")
    wait_for(machine, name)


def wait_for(machine: Root, name: str) -> None:
    wait_until(lambda: names(machine) == [name], 30, f"the rules are not {name} alone")


@pytest.mark.parametrize("unit", EXPOSURE_MAX)
def test_systemd_understands_the_unit_and_finds_it_confined(machine: Root, unit: str) -> None:
    # By its instance, an unknown group or key would be told on standard error, and ignored.
    verified = machine.run("systemd-analyze", "verify", unit.replace("@", "@blue"), check=False)
    assert (verified.returncode, verified.stdout, verified.stderr) == (0, "", "")
    security = machine.run("systemd-analyze", "security", "--offline=true", unit).stdout
    (exposure,) = re.findall(r"Overall exposure level for \S+: ([0-9.]+)", security)
    assert float(exposure) <= EXPOSURE_MAX[unit]


def test_the_instance_differs_only_in_its_place() -> None:
    one, other = ((UNITS / name).read_text().splitlines() for name in ("mcrelay.service", "mcrelay@.service"))
    differing = {line.partition("=")[0] for line in set(one) ^ set(other)}
    assert differing == {"Description", "ExecStart", "ExecReload", "NetworkNamespacePath", "RuntimeDirectory"}


def test_installation_starts_it(machine: Root) -> None:
    assert machine.run("systemctl", "is-enabled", "mcrelay").stdout == "enabled\n"
    assert show(machine, "ActiveState") == "active"
    assert show(machine, "NRestarts") == "0"
    assert machine.run("stat", "--format=%U:%G %a", "/run/mcrelay/control.sock").stdout == "root:mcrelay 660\n"
    assert machine.run("mcrelay", "ping").stdout.startswith("the daemon at /run/mcrelay/control.sock answers")
    users = machine.run("ps", "-o", "user=", "-C", "mcrelay-control").stdout.split()
    assert set(users) <= {"mcrelay"}
    assert not re.search("WARNING|ERROR", journal(machine)), journal(machine)
    # No hook is there, so nothing runs it, and nothing has failed.
    assert show(machine, "ConditionResult", "mcrelay-hook") == "no"
    assert machine.run("systemctl", "is-failed", "mcrelay-hook", check=False).returncode != 0


def test_reload_applies_the_files(machine: Root) -> None:
    apply(machine, "feed")
    machine.write(RULES, 'broken = "so"\n')
    assert machine.run("systemctl", "reload", "mcrelay", check=False).returncode != 0
    wait_until(lambda: "unknown key 'broken'" in journal(machine), 5, "no word about the broken file")
    assert names(machine) == ["feed"]
    assert show(machine, "ActiveState") == "active"


def test_restart_and_update_lose_nothing(machine: Root, line: RelayLine, package: Path) -> None:
    """By the descriptors that systemd keeps, and by a successor that takes over while the package is replaced."""
    apply(machine, "feed")
    receiver = start_receiver(line.receiver, ReceivePlan(OUTPUT, interface="eth0", idle_timeout_s=20))
    sender = start_sender(line.sender, SendPlan(INPUT, interface="eth0", rate=500, duration_s=60))
    wait_until(lambda: '"packets": 0' not in machine.run("mcrelay", "stats", "--json").stdout, 10)
    before = show(machine, "MainPID")
    machine.run("systemctl", "restart", "mcrelay")
    restarted = show(machine, "MainPID")
    assert restarted != before
    machine.install(package)
    updated = show(machine, "MainPID")
    assert updated != restarted
    wait_until(lambda: "has taken over" in journal(machine), 20, "no word about the successor")
    assert show(machine, "ActiveState") == "active"
    sent = sender.stop().sent
    wait_until(
        lambda: f'"forwarded": {sent}' in machine.run("mcrelay", "stats", "--json").stdout, 10, "some are missing"
    )
    report = receiver.stop()
    assert (report.received, report.lost, report.duplicated) == (sent, 0, 0)
    assert names(machine) == ["feed"]


def test_it_comes_back_when_it_was_killed(machine: Root) -> None:
    apply(machine, "feed")
    before = show(machine, "MainPID")
    machine.run("kill", "-KILL", before)
    wait_until(lambda: show(machine, "MainPID") not in (before, "0"), 40, "not started again")
    wait_until(lambda: show(machine, "ActiveState") == "active", 20, "not ready again")
    wait_for(machine, "feed")


def test_a_broken_file_is_no_reason_to_try_again(machine: Root) -> None:
    machine.write(RULES, "[[rule]]\n")
    try:
        assert machine.run("systemctl", "restart", "mcrelay", check=False).returncode != 0
        assert show(machine, "ActiveState") == "failed"
        assert show(machine, "ExecMainStatus") == "78"
    finally:
        machine.write(RULES, "")
        machine.run("systemctl", "restart", "mcrelay")


def test_an_instance_is_in_its_network_namespace(machine: Root) -> None:
    machine.run("ip", "netns", "add", "blue")
    machine.run("ip", "-n", "blue", "link", "add", "only-in-blue", "type", "veth", "peer", "its-end")
    for interface in ("only-in-blue", "its-end"):
        machine.run("ip", "-n", "blue", "link", "set", interface, "up")
    machine.run("ip", "-n", "blue", "address", "add", "198.51.100.1/24", "dev", "only-in-blue")
    text = f'[[rule]]\nname = "there"\ninput = "{INPUT}%only-in-blue"\noutput = "{OUTPUT}%only-in-blue"\n'
    machine.write("/etc/mcrelay/blue/mcrelay.toml", text)
    machine.run("systemctl", "start", "mcrelay@blue")
    listing = machine.run("mcrelay", "list", "--socket", "/run/mcrelay-blue/control.sock").stdout
    assert "there" in listing
    assert "pending" not in listing
    assert "there" not in names(machine)
    machine.run("systemctl", "stop", "mcrelay@blue")


def test_purge_stops_it_and_leaves_no_unit(machine: Root) -> None:
    """The last of them."""
    machine.run("dpkg", "--purge", "mcrelay")
    assert machine.run("pgrep", "--full", "mcrelay", check=False).stdout == ""
    assert machine.run("systemctl", "list-unit-files", "--no-legend", "mcrelay*", check=False).stdout == ""
    assert machine.run("sh", "-c", "ls -d /run/mcrelay* /etc/mcrelay", check=False).stdout == ""

"""The installed package under a real systemd: the units as they are shipped, with all that they forbid.

sender: eth0 -- in0 :relay: out0 -- eth0 :receiver
"""

from __future__ import annotations

import io
import re
import socket
import threading
from collections.abc import Callable, Iterator
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
DOCS: Final = UNITS.parents[1] / "docs"
# By unit, as docs/service.md says; systemd's own scale is 0 (nothing is possible) to 10.
EXPOSURES: Final = {
    unit: exposure
    for units, exposure in re.findall(r"^\| (`.*\.service`) \| ([0-9.]+) \|$", (DOCS / "service.md").read_text(), re.M)
    for unit in re.findall("`(.*?)`", units)
}
FOUND_BY: Final = "252"  # the systemd that the page names; others weigh more or less


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


@pytest.mark.parametrize("unit", sorted(path.name for path in UNITS.glob("*.service")))
def test_systemd_understands_the_unit_and_finds_it_confined(machine: Root, unit: str) -> None:
    # By its instance, an unknown group or key would be told on standard error, and ignored.
    verified = machine.run("systemd-analyze", "verify", unit.replace("@", "@blue"), check=False)
    assert (verified.returncode, verified.stdout, verified.stderr) == (0, "", "")
    security = machine.run("systemd-analyze", "security", "--offline=true", unit).stdout
    (exposure,) = re.findall(r"Overall exposure level for \S+: ([0-9.]+)", security)
    if machine.run("systemctl", "--version").stdout.split()[1] == FOUND_BY:
        assert exposure == EXPOSURES[unit]
    else:
        assert float(exposure) <= float(EXPOSURES[unit]) + 0.5


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
    # Its main process is no child of systemd's now, and stops in peace all the same.
    machine.run("systemctl", "restart", "mcrelay")
    assert show(machine, "MainPID") != updated
    sent = sender.stop().sent
    wait_until(
        lambda: f'"forwarded": {sent}' in machine.run("mcrelay", "stats", "--json").stdout, 10, "some are missing"
    )
    report = receiver.stop()
    assert (report.received, report.lost, report.duplicated) == (sent, 0, 0)
    assert names(machine) == ["feed"]
    machine.run("mcrelay", "upgrade")
    machine.run("systemctl", "stop", "mcrelay")
    assert (show(machine, "ActiveState"), show(machine, "Result")) == ("inactive", "success")
    machine.run("systemctl", "start", "mcrelay")


def test_an_update_does_not_stop_what_would_not_start_again(machine: Root, package: Path) -> None:
    apply(machine, "feed")
    before = show(machine, "MainPID")
    try:
        for text in ('broken = "so"\n', '[daemon]\nuser = "nobody-of-that-name"\n'):
            machine.write(RULES, text)
            machine.install(package)
            found = show(machine, "ActiveState"), show(machine, "MainPID"), names(machine)
            assert found == ("active", before, ["feed"]), text
    finally:
        machine.write(RULES, "")


def test_what_was_removed_starts_when_it_is_installed_again(machine: Root, package: Path) -> None:
    machine.run("dpkg", "--remove", "mcrelay")
    assert show(machine, "ActiveState") == "inactive"
    machine.install(package)
    assert show(machine, "ActiveState") == "active"
    machine.run("systemctl", "stop", "mcrelay")
    machine.install(package)  # an update starts nothing that somebody has stopped
    assert show(machine, "ActiveState") == "inactive"
    machine.run("systemctl", "start", "mcrelay")


def test_it_comes_back_when_its_process_is_told_to_stop(machine: Root) -> None:
    before = show(machine, "MainPID")
    machine.run("kill", "-TERM", before)
    wait_until(lambda: show(machine, "MainPID") not in (before, "0"), 40, "not started again")
    wait_until(lambda: show(machine, "ActiveState") == "active", 20, "not ready again")


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


def make_blue(machine: Root) -> None:
    machine.run("ip", "netns", "add", "blue")
    machine.run("ip", "-n", "blue", "link", "add", "only-in-blue", "type", "veth", "peer", "its-end")
    for interface in ("only-in-blue", "its-end"):
        machine.run("ip", "-n", "blue", "link", "set", interface, "up")
    machine.run("ip", "-n", "blue", "address", "add", "198.51.100.1/24", "dev", "only-in-blue")
    machine.run("ip", "-n", "blue", "address", "add", "198.51.100.2/24", "dev", "its-end")


def test_an_instance_is_in_its_network_namespace(machine: Root) -> None:
    make_blue(machine)
    text = f'[[rule]]\nname = "there"\ninput = "{INPUT}%only-in-blue"\noutput = "{OUTPUT}%only-in-blue"\n'
    machine.write("/etc/mcrelay/blue/mcrelay.toml", text)
    machine.run("systemctl", "start", "mcrelay@blue")
    listing = machine.run("mcrelay", "list", "--socket", "/run/mcrelay-blue/control.sock").stdout
    assert "there" in listing
    assert "pending" not in listing
    assert "there" not in names(machine)
    # Of the same name, and another: what was kept of the old one is of no use.
    machine.run("ip", "netns", "delete", "blue")
    make_blue(machine)
    machine.run("systemctl", "restart", "mcrelay@blue")
    assert "they are of another network namespace" in journal(machine, "mcrelay@blue")
    machine.run("ip", "netns", "exec", "blue", "mcrelay", "send", f"{INPUT}%its-end", "--count", "5")
    stats = ("mcrelay", "stats", "--json", "--socket", "/run/mcrelay-blue/control.sock")
    # Of an address of its own, so they are not relayed, but heard.
    wait_until(lambda: '"own": 5' in machine.run(*stats).stdout, 10, "it does not hear its own network")
    machine.run("systemctl", "stop", "mcrelay@blue")


# --- the hook ---------------------------------------------------------------------------------------------------------

LOOKS_AROUND: Final = """#!/bin/sh
echo "hook: uid=$(id -u) groups=$(id -G) $(grep NoNewPrivs /proc/self/status)"
for place in /etc /usr /var/lib /run/mcrelay /home /root /tmp /var/tmp; do
    touch "$place/of-the-hook" 2>/dev/null && echo "hook: writes $place"
done
pgrep -f "mcrelay run" >/dev/null && echo "hook: sees others"
mcrelay add 239.9.9.9:9%hooked 239.9.9.8:9%out0 --name its-own >/dev/null && echo "hook: adds a rule"
echo "hook: done"
"""
SMTP: Final = {b"HELO": 250, b"EHLO": 250, b"MAIL": 250, b"RCPT": 250, b"DATA": 354, b".": 250, b"QUIT": 221}


def example(interpreter: str) -> str:
    """The hook of docs/events.md that begins so."""
    (text,) = re.findall(rf"^    #!{interpreter}\n(?:    .*\n|\n(?=    ))+", (DOCS / "events.md").read_text(), re.M)
    return re.sub("^    ", "", str(text), flags=re.M)


class Listener:
    """On the machine's loopback; what it was told comes to `heard`."""

    def __init__(self, line: RelayLine, converse: Callable[[io.BufferedRWPair], str]) -> None:
        self.heard: list[str] = []
        self._converse = converse
        self._sock = line.relay.call(lambda: socket.create_server(("127.0.0.1", 0)))
        self.port: int = self._sock.getsockname()[1]
        self._thread = threading.Thread(target=self._listen)

    def _listen(self) -> None:
        while True:
            try:
                connection, _address = self._sock.accept()
            except OSError:
                return
            with connection, connection.makefile("rwb") as stream:
                self.heard.append(self._converse(stream))

    def __enter__(self) -> Listener:
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
        self._thread.join(10)


def take_post(stream: io.BufferedRWPair) -> str:
    head = b"".join(iter(stream.readline, b"\r\n")).decode()
    (size,) = re.findall(r"(?i)^content-length: (\d+)", head, re.M)
    body = stream.read(int(size)).decode()
    stream.write(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
    stream.flush()
    return f"{head}\n{body}"


def take_mail(stream: io.BufferedRWPair) -> str:
    mail, is_data = b"", False
    stream.write(b"220 here\r\n")
    stream.flush()
    for line in iter(stream.readline, b""):
        verb = line.strip()[:4].upper()
        mail += line
        if not is_data or verb == b".":
            stream.write(b"%d so be it\r\n" % SMTP[verb])
            stream.flush()
            is_data = verb == b"DATA"
    return mail.decode()


def run_hook(machine: Root, text: str, over: Callable[[], object]) -> None:
    """Have it run on an interface that goes up and down, until it is over."""
    machine.write("/etc/mcrelay/hook", text)
    machine.run("chmod", "755", "/etc/mcrelay/hook")
    machine.run("ip", "link", "add", "hooked", "type", "veth", "peer", "its-peer")
    machine.run("ip", "link", "set", "its-peer", "up")
    rule = f'name = "of-the-hook"\ninput = "{INPUT}%hooked"\noutput = "{OUTPUT}%out0"\n'
    machine.write(RULES, f"[[rule]]\n{rule}")
    machine.run("systemctl", "reload", "mcrelay")
    machine.run("systemctl", "start", "mcrelay-hook")

    def happens() -> object:
        machine.run("ip", "link", "set", "hooked", "up")
        wait_until(lambda: "pending" not in machine.run("mcrelay", "list").stdout, 10, "nobody noticed")
        machine.run("ip", "link", "set", "hooked", "down")
        wait_until(lambda: "pending" in machine.run("mcrelay", "list").stdout, 10, "nobody noticed")
        return over()

    try:
        wait_for(machine, "of-the-hook")
        wait_until(happens, 30, f"the hook did not: {journal(machine, 'mcrelay-hook')}")
    finally:
        machine.run("systemctl", "stop", "mcrelay-hook")
        machine.run("rm", "/etc/mcrelay/hook")
        machine.run("ip", "link", "delete", "hooked")


def test_the_hooks_of_the_page_work_in_their_sandbox(machine: Root, line: RelayLine) -> None:
    with Listener(line, take_post) as server:
        text = example("/bin/sh").replace("https://alerts.example.org/", f"http://localhost:{server.port}/")
        run_hook(machine, text, lambda: any('"kind":"interface_down"' in heard for heard in server.heard))
    assert all(heard.startswith("POST /mcrelay HTTP/1.1\r\n") for heard in server.heard)
    with Listener(line, take_mail) as server:
        text = example("/usr/bin/python3").replace('"mail.example.org", 25', f'"localhost", {server.port}')
        run_hook(machine, text, lambda: server.heard)
    assert "rcpt TO:<noc@example.org>\r\n" in server.heard[0]
    assert "\r\nSubject: hooked: interface_down\r\n" in server.heard[0]
    assert "\r\n\r\ninterface 'hooked' is down" in server.heard[0]


def test_the_hook_is_a_user_of_its_own_that_can_do_little(machine: Root) -> None:
    run_hook(machine, LOOKS_AROUND, lambda: "hook: done" in journal(machine, "mcrelay-hook"))
    told = [line.partition("hook: ")[2] for line in journal(machine, "mcrelay-hook").splitlines() if "hook: " in line]
    (user, group) = re.findall(r"uid=(\d+) groups=([\d ]+) NoNewPrivs:\s+1", told[0])[0]
    assert group == machine.run("id", "--group", "mcrelay").stdout.strip()
    assert user not in ("0", machine.run("id", "--user", "mcrelay").stdout.strip())
    assert told[1 : told.index("done")] == ["writes /tmp", "writes /var/tmp", "adds a rule"]


def test_purge_stops_it_and_leaves_no_unit(machine: Root) -> None:
    """The last of them."""
    machine.run("dpkg", "--purge", "mcrelay")
    assert machine.run("pgrep", "--full", "mcrelay", check=False).stdout == ""
    assert machine.run("systemctl", "list-unit-files", "--no-legend", "mcrelay*", check=False).stdout == ""
    assert machine.run("sh", "-c", "ls -d /run/mcrelay* /etc/mcrelay", check=False).stdout == ""

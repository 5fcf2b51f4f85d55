"""`mcrelay explain` finds what is wrong between a real sender and real receivers, `mcrelay doctor` a daemon's state.

+-----------------------+  +---------------------------------+  +------------------------+
| sender                |  | relay                           |  |               receiver |
|   eth0 203.0.113.10   +--+ in0             out0 198.51.100.1 +--+ eth0 198.51.100.2     |
+-----------------------+  |                  out1 10.1.0.1  +--+ receiver1 10.1.0.2     |
                           +---------------------------------+  +------------------------+
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lab.daemon import Daemon
from lab.namespaces import wait_until
from lab.program import PROGRAM
from lab.topology import INGRESS_ADDRESS, RelayLine

GROUP = "239.1.1.1:5000"
INPUT = f"{GROUP}%in0"
SECONDS = ("--seconds", "1")
WITHOUT_NET_RAW = ("setpriv", "--bounding-set=-net_raw", "--inh-caps=-net_raw")


@contextmanager
def sending(line: RelayLine, *options: str) -> Iterator[None]:
    """200 datagrams/s to the group meanwhile."""
    sender = line.sender.popen(
        *(PROGRAM, "send", f"{GROUP}%eth0", "--rate", "200", "--source", line.sender_address, *options),
        stdout=subprocess.DEVNULL,
    )
    try:
        yield
    finally:
        sender.terminate()
        sender.wait(5)


def diagnose(line: RelayLine, socket: str, *arguments: str, prefix: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """The findings, in the relay's namespace; the exit code agrees with them."""
    done = line.relay.run(*prefix, PROGRAM, *arguments, *SECONDS, "--json", "--socket", socket, check=False)
    assert done.stderr == ""
    document = json.loads(done.stdout)
    assert document["holds"] == (done.returncode == 0)
    findings: list[dict[str, Any]] = document["findings"]
    assert document["holds"] == (wrong(findings) == {})
    return findings


def wrong(findings: list[dict[str, Any]]) -> dict[str, str]:
    """The steps where something is, and the commands that mend it."""
    return {finding["step"]: finding["remedy"] for finding in findings if finding["verdict"] == "bad"}


def fact(findings: list[dict[str, Any]], step: str) -> str:
    return " ".join(finding["fact"] for finding in findings if finding["step"] == step)


def test_a_rule_is_explained_from_the_wire_to_its_outputs(line: RelayLine, daemon: Daemon) -> None:
    daemon.run("add", INPUT, "239.2.2.2:6000%out0", "10.1.0.2:6000%out1", "--name", "feed")
    socket = daemon.socket
    with sending(line):
        wait_until(lambda: daemon.json("stats")["rules"][0]["forwarded"] > 10)
        findings = diagnose(line, socket, "explain", INPUT)
        assert wrong(findings) == {}
        assert f"on in0 from {line.sender_address}" in fact(findings, "arriving")
        assert "they come with TTL 8" in fact(findings, "ttl")
        assert "TTL 7" in fact(findings, "output 1 ttl")
        assert "10.1.0.2 at " in fact(findings, "output 2 neighbour")
        assert "copies handed to the kernel" in fact(findings, "output 2 counters")

        findings = diagnose(line, socket, "explain", INPUT, prefix=WITHOUT_NET_RAW)
        assert wrong(findings) == {}
        assert "to look at frames takes CAP_NET_RAW" in fact(findings, "arriving")

        near = diagnose(line, socket, "explain", "239.1.1.1:5001%in0")
        assert set(wrong(near)) == {"rule", "arriving"}
        assert "Another port: it is for 5000" in fact(near, "other rule")
        assert wrong(near)["arriving"] == f"mcrelay explain {INPUT} --socket {socket}"

        other = diagnose(line, socket, "explain", INPUT, "--from", "10.9.9.9")
        assert set(wrong(other)) == {"arriving"}
        assert f"from {line.sender_address}" in fact(other, "arriving")

    silent = diagnose(line, socket, "explain", INPUT)
    assert set(wrong(silent)) == {"arriving"}

    line.relay.ip("link", "set", "in0", "down")
    try:
        wait_until(lambda: daemon.json("list")["rules"][0]["state"] == "pending")
        down = diagnose(line, socket, "explain", INPUT)
        assert wrong(down)["interface"] == "ip link set dev in0 up"
        assert set(wrong(diagnose(line, socket, "doctor"))) == {"rules"}
    finally:
        line.relay.ip("link", "set", "in0", "up")


def test_an_output_to_nobody_and_one_whose_ttl_does_not_suffice_are_found(line: RelayLine, daemon: Daemon) -> None:
    line.relay.ip("route", "add", "192.0.2.128/25", "via", "10.1.0.2", "dev", "out1")
    try:
        daemon.run("add", INPUT, "198.51.100.77:6000%out0", "192.0.2.130:6000%out1")
        with sending(line, "--ttl", "1"):
            wait_until(lambda: daemon.json("stats")["rules"][0]["packets"] > 10)
            found = wrong(diagnose(line, daemon.socket, "explain", INPUT))
        assert found.pop("output 1 neighbour") == "ping -c 3 -I out0 198.51.100.77"
        assert "192.0.2.130:6000%out1,ttl=8" in found.pop("output 2 ttl")
        assert set(found) <= {"output 1 counters"}  # the kernel may have refused some already
        assert set(wrong(diagnose(line, daemon.socket, "doctor"))) == {"outputs"}
    finally:
        line.relay.ip("route", "del", "192.0.2.128/25")


def test_a_second_daemon_is_told(line: RelayLine, daemon: Daemon) -> None:
    assert "other relay" not in {finding["step"] for finding in diagnose(line, daemon.socket, "doctor")}
    with Daemon(line.relay) as other:
        assert f"process {other.pid} is another mcrelay" in fact(diagnose(line, daemon.socket, "doctor"), "other relay")
    # Whatever a process calls itself.
    renamed = "open('/proc/self/comm', 'wb').write(b'\\xff\\xfe'); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", renamed], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as odd:
        assert odd.stdout is not None
        assert odd.stdout.readline()
        assert "other relay" not in {finding["step"] for finding in diagnose(line, daemon.socket, "doctor")}
        odd.communicate(b"\n")


def test_a_host_without_a_route_is_remarked_on_when_its_rule_is_added(line: RelayLine, daemon: Daemon) -> None:
    def said(*rule: str) -> str:
        done = line.relay.run(PROGRAM, "add", *rule, "--name", "feed", "--socket", daemon.socket)
        daemon.run("remove", "feed")
        assert done.stdout.startswith("feed: active")
        return done.stderr

    nowhere = said("239.1.1.7:5000%in0", "203.0.113.77:6000%out0,source=keep", "239.2.2.7:6000%out0")
    assert nowhere.startswith("mcrelay: note: output 1 route: no route to 203.0.113.77 by way of out0")
    assert nowhere.count("\n") == 1
    own = said("239.1.1.7:5000%in0", f"{INGRESS_ADDRESS}:6000%out0")
    assert own.startswith(f"mcrelay: note: output 1 route: {INGRESS_ADDRESS} is this host's own, of in0")
    assert said("239.1.1.7:5000%in0", f"{line.egresses[0].receiver_address}:6000%out0,source=keep") == ""
    assert said("239.1.1.7:5000%in0", "239.2.2.7:6000%out0", "=:6000%out0", "255.255.255.255:6000%out0") == ""


def test_without_a_daemon_a_group_is_joined_to_be_seen(line: RelayLine) -> None:
    with sending(line):
        findings = diagnose(line, "/nowhere/control.sock", "explain", INPUT)
    assert wrong(findings) == {"daemon": "sudo mcrelay run --socket /nowhere/control.sock"}
    assert "joined while looking" in fact(findings, "joined")
    assert f"from {line.sender_address}" in fact(findings, "arriving")

"""Rootless mode: the daemon of somebody who has no privilege at all, and what it says it cannot do.

sender 203.0.113.10 --- in0 relay out0 --- receiver
                                  out1 --- receiver1

The relay checks sources strictly (rp_filter=1): without a route to the sender an ordinary socket gets nothing from it.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import socket
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from lab.daemon import Daemon, settled
from lab.namespaces import Lab, Namespace, unsupported, wait_until
from lab.plan import ReceivePlan, SendPlan
from lab.topology import RelayLine, relay_line
from lab.traffic import run_sender, start_receiver, start_sender
from lab.unprivileged import unprivileged
from mcrelay.api import RuleText
from mcrelay.tap import read_headers

INPUT = "239.1.1.1:5000"
OUTPUT = "239.2.2.2:6000"
IP_RECVTTL = 12  # linux/in.h
NOBODY = pwd.getpwnam("nobody")
# Datagrams: a socket without privilege holds them all (net.core.rmem_max) while its worker waits for a processor.
SOME = 80

Start = Callable[..., Daemon]


@pytest.fixture(scope="module")
def line() -> Iterator[RelayLine]:
    if reason := unsupported():
        pytest.skip(reason)
    with Lab() as lab:
        line = relay_line(lab, outputs=2, offloads=False, ipv6=True)
        line.relay.ip("route", "add", "203.0.113.0/24", "dev", "in0")
        yield line


@pytest.fixture
def runtime() -> Iterator[Path]:
    """What a session gives its user, nobody. Not below pytest's own directory, which only root may enter."""
    with tempfile.TemporaryDirectory(prefix="mcrelay-lab-") as directory:
        Path(directory).chmod(0o711)
        runtime = Path(directory) / "runtime"
        runtime.mkdir(mode=0o700)
        os.chown(runtime, NOBODY.pw_uid, NOBODY.pw_gid)
        yield runtime


@pytest.fixture
def begin(line: RelayLine, runtime: Path) -> Iterator[Start]:
    """Start a daemon as nobody, below a directory that is nobody's."""
    with contextlib.ExitStack() as stack:

        def start(*options: str) -> Daemon:
            directory = runtime / "mcrelay"
            directory.mkdir(mode=0o700)
            os.chown(directory, NOBODY.pw_uid, NOBODY.pw_gid)
            program = unprivileged()
            return stack.enter_context(
                Daemon(line.relay, "--rootless", "--debug", *options, program=program, directory=directory)
            )

        yield start


def udp_ports(line: RelayLine) -> set[int]:
    """Those that a socket of the relay's is bound to."""
    lines = line.relay.run("cat", "/proc/net/udp").stdout.strip().split("\n")[1:]
    return {int(entry.split()[1].split(":")[1], 16) for entry in lines}


def groups(line: RelayLine) -> set[str]:
    """What in0 is a member of."""
    return {entry for entry in line.relay.ip("maddress", "show", "dev", "in0").stdout.split() if entry[:4] == "239."}


@pytest.mark.parametrize("engine", ["uring", "reference"])
def test_nobody_relays(begin: Start, line: RelayLine, engine: str) -> None:
    daemon = begin("--engine", engine)
    for process in daemon.json("workers")["processes"]:
        facts = Path(f"/proc/{process['pid']}/status").read_text()
        assert f"Uid:\t{NOBODY.pw_uid}\t{NOBODY.pw_uid}\t{NOBODY.pw_uid}" in facts
        assert "CapPrm:\t0000000000000000" in facts
        assert "CapBnd:\t0000000000000000" in facts
        assert "NoNewPrivs:\t1" in facts
        assert process["role"] in ("supervisor", "spare") or "Seccomp:\t2" in facts
    # By a rule it flows to all outputs, and the TTL is one less.
    daemon.run("add", f"{INPUT}%in0", f"{OUTPUT}%out0", "10.1.0.2:6001%out1", "--name", "feed")
    assert groups(line) == {"239.1.1.1"}
    receivers = [
        start_receiver(line.receiver, ReceivePlan(OUTPUT, interface="eth0", count=SOME)),
        start_receiver(line.receivers[1], ReceivePlan("10.1.0.2:6001", interface="eth0", count=SOME)),
    ]
    run_sender(line.sender, SendPlan(INPUT, interface="eth0", rate=4000, count=SOME))
    for receiver in receivers:
        assert receiver.result().clean
    assert settled(daemon.client())["forwarded"] == SOME
    # Neither another group of that port nor another port is relayed.
    receiver = start_receiver(line.receiver, ReceivePlan(OUTPUT, interface="eth0", deadline_s=30))
    run_sender(line.sender, SendPlan("239.1.1.1:5001", interface="eth0", rate=4000, count=SOME))
    run_sender(line.sender, SendPlan("239.1.1.2:5000", interface="eth0", rate=4000, count=SOME))
    # Without the rule it stops, and nothing is left open.
    daemon.run("remove", "feed")
    run_sender(line.sender, SendPlan(INPUT, interface="eth0", rate=4000, count=SOME))
    assert receiver.stop().received == 0
    assert 5000 not in udp_ports(line)
    assert groups(line) == set()
    assert settled(daemon.client())["forwarded"] == SOME


@dataclass(frozen=True)
class Case:
    """A rule, what is sent to it from `source`, and where the copy has to arrive, and how."""

    rule: tuple[str, str]
    sent: str
    arrives: str  # at the receiver behind out0
    ttl: int = 7  # sent with 8
    tos: int = 0xB8  # sent with 0xba: DSCP 46 and a bit of ECN, which is never copied
    source: str | None = None  # of the copy


CASES = {
    "IPv4": Case(("239.1.1.1:5000%in0", "239.2.2.1:6000%out0"), "239.1.1.1:5000", "239.2.2.1:6000"),
    "IPv6": Case(("[ff05::1:1]:5000%in0", "[ff08::2:1]:6000%out0"), "[ff05::1:1]:5000", "[ff08::2:1]:6000"),
    "IPv6 and IPv4 on one port, another TTL": Case(
        ("[ff05::1:2]:5000%in0", "[ff08::2:2]:6000%out0,ttl=3"), "[ff05::1:2]:5000", "[ff08::2:2]:6000", ttl=3
    ),
    "of link-local scope": Case(
        ("[ff02::1:3]:5000%in0", "[ff02::2:3]:6000%out0,ttl=keep"), "[ff02::1:3]:5000", "[ff02::2:3]:6000", ttl=8
    ),
    "everything kept": Case(("239.1.1.2:5001%in0", "=:=%out0,ttl=keep"), "239.1.1.2:5001", "239.1.1.2:5001", ttl=8),
    "DSCP": Case(("239.1.1.3:5000%in0", "239.2.2.3:6000%out0,dscp=0"), "239.1.1.3:5000", "239.2.2.3:6000", tos=0),
    "one source": Case(("203.0.113.10@232.1.1.1:5000%in0", "=:6000%out0"), "232.1.1.1:5000", "232.1.1.1:6000"),
    "a pattern": Case(("239.1.1.4:5000%in+", "239.2.2.4:6000%out0"), "239.1.1.4:5000", "239.2.2.4:6000"),
    "unicast": Case(("192.0.2.1:5003%in0", "239.2.2.5:6000%out0"), "192.0.2.1:5003", "239.2.2.5:6000"),
    "unicast IPv6": Case(
        ("[2001:db8:b::1]:5003%in0", "[2001:db8::2]:6000%out0"), "[2001:db8:b::1]:5003", "[2001:db8::2]:6000"
    ),
    "a source of ours": Case(
        ("239.1.1.6:5000%in0", "239.2.2.6:6000%out0,source=10.1.0.1"),
        *("239.1.1.6:5000", "239.2.2.6:6000"),
        source="10.1.0.1",
    ),
}


def endpoint(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)


def send(line: RelayLine, target: str, payload: bytes) -> None:
    host, port = endpoint(target)
    if ":" in host:
        with line.sender.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, line.sender.ifindex("eth0"))
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 8)
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, 8)
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, 0xBA)
            sock.sendto(payload, (host, port))
    else:
        with line.sender.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 8)
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, 8)
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, 0xBA)
            sock.sendto(payload, (host, port))


def listener(namespace: Namespace, interface: str, target: str) -> socket.socket:
    """A socket that hears what is sent there, and is told TTL and TOS."""
    host, port = endpoint(target)
    index = namespace.ifindex(interface)
    sock = namespace.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
    sock.settimeout(10)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if ":" in host:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVHOPLIMIT, 1)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVTCLASS, 1)
        sock.bind((host, port, 0, index if host.startswith("ff02") else 0))
        if host.startswith("ff"):
            request = socket.inet_pton(socket.AF_INET6, host) + struct.pack("=I", index)
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, request)
    else:
        sock.setsockopt(socket.IPPROTO_IP, IP_RECVTTL, 1)
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_RECVTOS, 1)
        sock.bind((host, port))
        request = struct.pack("=4s4si", socket.inet_aton(host), b"", index)
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, request)
    return sock


@pytest.mark.parametrize("engine", ["uring", "reference"])
def test_what_a_copy_looks_like(begin: Start, line: RelayLine, engine: str) -> None:
    daemon = begin("--engine", engine)
    line.sender.ip("route", "replace", "192.0.2.0/24", "dev", "eth0")
    line.sender.ip("-6", "route", "replace", "2001:db8:b::/64", "dev", "eth0")
    line.relay.ip("-6", "route", "replace", "2001:db8:a::/64", "dev", "in0")
    with contextlib.ExitStack() as stack:
        heard = {name: stack.enter_context(listener(line.receiver, "eth0", c.arrives)) for name, c in CASES.items()}
        with daemon.client() as client:
            client.change(add=[(case.rule[0], [case.rule[1]], None) for case in CASES.values()])
            for name, case in CASES.items():
                send(line, case.sent, name.encode())
                payload, control, _flags, address = heard[name].recvmsg(2000, 200)
                told = {(level, kind): data[0] for level, kind, data in control}
                assert payload.decode() == name
                assert told.get((41, socket.IPV6_HOPLIMIT), told.get((0, socket.IP_TTL))) == case.ttl, name
                assert told.get((41, socket.IPV6_TCLASS), told.get((0, socket.IP_TOS))) == case.tos, name
                assert case.source in (None, address[0]), name
            assert settled(client)["forwarded"] == len(CASES)
            # Nothing came twice, or somewhere else; and it stops.
            client.change(remove=[rule.id for rule in client.rules()])
            for case in CASES.values():
                send(line, case.sent, b"late")
            assert settled(client)["forwarded"] == len(CASES)
        for name, sock in heard.items():
            sock.setblocking(False)
            with pytest.raises(BlockingIOError):
                assert not sock.recv(2000), name


def test_receivers_on_this_host_hear_a_looped_copy(begin: Start, line: RelayLine) -> None:
    daemon = begin()
    daemon.run("add", f"{INPUT}%in0", f"{OUTPUT}%out0,loop")
    with listener(line.relay, "out0", OUTPUT) as here, listener(line.receiver, "eth0", OUTPUT) as there:
        send(line, INPUT, b"both")
        assert [here.recv(100), there.recv(100)] == [b"both", b"both"]


def test_nothing_is_lost_when_processes_are_replaced(begin: Start, line: RelayLine) -> None:
    daemon = begin()
    daemon.run("add", f"{INPUT}%in0", f"{OUTPUT}%out0")
    receiver = start_receiver(line.receiver, ReceivePlan(OUTPUT, interface="eth0", count=900, expect=900))
    sender = start_sender(line.sender, SendPlan(INPUT, interface="eth0", rate=300, count=900, size=200))
    daemon.run("restart-worker", "0")
    daemon.upgrade()
    assert sender.result().sent == 900
    assert receiver.result().clean
    assert daemon.json("list")["rules"][0]["state"] == "active"


def test_unroutable_sources_stay_out_and_the_log_says_why(begin: Start, line: RelayLine) -> None:
    daemon = begin()
    line.relay.ip("route", "del", "203.0.113.0/24", "dev", "in0")
    try:
        daemon.run("add", f"{INPUT}%in0", f"{OUTPUT}%out0")
        receiver = start_receiver(line.receiver, ReceivePlan(OUTPUT, interface="eth0", count=SOME))
        run_sender(line.sender, SendPlan(INPUT, interface="eth0", rate=4000, count=SOME))
        assert settled(daemon.client())["received"] == 0
    finally:
        line.relay.ip("route", "add", "203.0.113.0/24", "dev", "in0")
    daemon.wait_for_log("in0: the kernel drops packets whose source it has no route to by this interface")
    run_sender(line.sender, SendPlan(INPUT, interface="eth0", rate=4000, count=SOME))
    assert receiver.result().clean


def test_many_groups_and_ports(begin: Start, line: RelayLine) -> None:
    """Memberships are 20 to a socket, and ports one to a socket; both come and go with the rules."""
    daemon = begin()
    rules = [RuleText(f"239.3.{n // 250}.{n % 250}:5000%in0", (f"{OUTPUT}%out0",)) for n in range(1000)]
    rules += [RuleText(f"239.4.0.1:{port}%in0", (f"{OUTPUT}%out0",)) for port in range(7000, 7100)]
    with daemon.client() as client:
        client.change(add=[(rule.input, rule.outputs, None) for rule in rules])
        for target in ("239.3.0.0:5000", "239.3.3.249:5000", "239.4.0.1:7000", "239.4.0.1:7099"):
            receiver = start_receiver(line.receiver, ReceivePlan(OUTPUT, interface="eth0", count=SOME))
            run_sender(line.sender, SendPlan(target, interface="eth0", rate=4000, count=SOME))
            assert receiver.result().clean, target
        assert {5000, *range(7000, 7100)} <= udp_ports(line)
        client.change(remove=[rule.id for rule in client.rules()][1:])
        assert udp_ports(line).isdisjoint(range(7000, 7100))
        assert groups(line) == {"239.3.0.0"}


def test_a_program_of_this_host_may_have_the_same_port_if_it_shares_it(begin: Start, line: RelayLine) -> None:
    daemon = begin()
    with line.relay.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind(("", 5000))
        refused = daemon.run("add", f"{INPUT}%in0", f"{OUTPUT}%out0", check=False)
        assert refused.returncode == 71
        assert "cannot receive port 5000 on in0" in refused.stderr
        assert "ss -ulpn" in refused.stderr
    assert daemon.json("list")["rules"] == []
    assert groups(line) == set()
    with line.relay.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("", 5000))
        other.settimeout(10)
        daemon.run("add", f"{INPUT}%in0", f"{OUTPUT}%out0")
        receiver = start_receiver(line.receiver, ReceivePlan(OUTPUT, interface="eth0", count=10))
        run_sender(line.sender, SendPlan(INPUT, interface="eth0", rate=1000, count=10))
        assert receiver.result().clean
        assert len([other.recv(2000) for _ in range(10)]) == 10


def test_what_takes_root_is_refused(begin: Start, line: RelayLine) -> None:
    daemon = begin()
    for rule, words in (
        (("239.1.1.1:999%in0", f"{OUTPUT}%out0"), ("ports below 1024", "ip_unprivileged_port_start=999")),
        (("239.1.1.0/24:5000%in0", f"{OUTPUT}%out0"), ("no prefix of addresses", "name each one")),
        ((f"{INPUT}%in0", f"{OUTPUT}%out0,source=keep"), ("another host's source", "leave out source=keep")),
        ((f"{INPUT}%in0", f"{OUTPUT}%out0,source=192.0.2.77"), ("192.0.2.77 is no address of this host",)),
    ):
        refused = daemon.run("add", *rule, check=False)
        assert refused.returncode == 65
        for word in (*words, "--rootless", "as root"):
            assert word in refused.stderr
    assert daemon.json("list")["rules"] == []
    assert groups(line) == set()


def test_an_interface_may_come_later(begin: Start, line: RelayLine) -> None:
    daemon = begin()
    assert "there is no interface 'late'" in daemon.run("add", "239.1.1.1:5000%late", f"{OUTPUT}%out0").stdout
    with contextlib.ExitStack() as undo:
        line.sender.lab.veth(line.sender, "late0", line.relay, "late", address_b="192.0.2.129/25", offloads=False)
        undo.callback(line.relay.ip, "link", "del", "late")
        line.sender.ip("address", "add", "192.0.2.130/25", "dev", "late0")
        wait_until(lambda: daemon.json("list")["rules"][0]["state"] == "active", 10, "it is not taken up")
        receiver = start_receiver(line.receiver, ReceivePlan(OUTPUT, interface="eth0", count=SOME))
        run_sender(line.sender, SendPlan(INPUT, interface="late0", rate=4000, count=SOME))
        assert receiver.result().clean
    wait_until(lambda: daemon.json("list")["rules"][0]["state"] == "pending", 10, "it is not given up")
    assert 5000 not in udp_ports(line)


def test_a_port_that_is_taken_is_had_when_it_is_free(begin: Start, line: RelayLine) -> None:
    daemon = begin()
    with contextlib.ExitStack() as undo:
        with line.relay.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
            other.bind(("", 5000))
            daemon.run("add", "239.1.1.1:5000%late", f"{OUTPUT}%out0")
            daemon.run("add", "239.1.1.1:5001%late", f"{OUTPUT}%out0")
            line.sender.lab.veth(line.sender, "late0", line.relay, "late", address_b="192.0.2.129/25", offloads=False)
            undo.callback(line.relay.ip, "link", "del", "late")
            wait_until(lambda: "cannot receive port 5000 on late" in daemon.run("list").stdout, 10, "it is not told")
            assert 5001 in udp_ports(line)  # the others are had
        # Tried again every ten seconds (links.LOOK_AGAIN_S).
        wait_until(lambda: daemon.json("list")["rules"][0]["state"] == "active", 40, "it is not taken up")


def test_clients_of_the_same_user_find_it(begin: Start, line: RelayLine, runtime: Path) -> None:
    daemon = begin()

    def ping(user: str, group: str) -> subprocess.CompletedProcess[str]:
        command = ("env", f"XDG_RUNTIME_DIR={runtime}", *unprivileged(user=user, group=group), "ping")
        return line.relay.run(*command, check=False)

    if Path("/run/mcrelay/control.sock").exists():
        pytest.skip("the system's daemon would be found first")
    assert f"the daemon at {daemon.socket} answers" in ping("nobody", "nogroup").stdout
    assert os.stat(daemon.socket).st_mode & 0o777 == 0o600
    assert ping("daemon", "daemon").returncode == 69  # somebody else's directory is not looked into


@pytest.mark.parametrize("engine", ["uring", "reference"])
def test_packets_are_shown_as_they_must_have_been(begin: Start, line: RelayLine, engine: str) -> None:
    """An ordinary socket has no headers, so they are written anew."""
    daemon = begin("--engine", engine)
    daemon.run("add", f"{INPUT}%in0", f"{OUTPUT}%out0", "--name", "feed")
    with daemon.client() as client:
        items = client.tap("feed", count=3)
        run_sender(line.sender, SendPlan(INPUT, interface="eth0", rate=1000, count=3, size=100))
        packets = [packet for item in items for packet in item.packets]
    for packet in packets:
        headers = read_headers(packet.data)
        assert headers
        assert (str(headers.source), str(headers.destination)) == ("203.0.113.10", "239.1.1.1")
        assert (headers.destination_port, headers.ttl, packet.length, len(packet.data)) == (5000, 8, 128, 128)
        assert (packet.interface, packet.verdict, packet.copies) == ("in0", "forwarded", 1)
    assert len(packets) == 3

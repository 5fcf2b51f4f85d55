"""What a relay sends must not come round: by a cable, or by another relay.

line    sender: eth0 -- in0 :relay: out0 -- eth0 :receiver

ring    +-- l0 :one: r0 -- l0 :two: r0 --+
        +--------------------------------+
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Final

import pytest

from lab.capture import Injector
from lab.daemon import Daemon, settled
from lab.frames import ethernet_ipv4_udp
from lab.namespaces import Lab, Namespace, unsupported, wait_until
from lab.topology import INGRESS_ADDRESS, RelayLine

GROUP: Final = "239.1.1.1"
PORT: Final = 5000
STRANGER: Final = "203.0.113.77"


def send(namespace: Namespace, interface: str, payload: bytes, source: str | None = None) -> None:
    with namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        if source:
            sock.bind((source, 0))
        outgoing = struct.pack("=4s4si", b"", b"", namespace.ifindex(interface))
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, outgoing)
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 8)
        sock.sendto(payload, (GROUP, PORT))


@contextlib.contextmanager
def listening(namespace: Namespace, interface: str) -> Iterator[socket.socket]:
    with namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((GROUP, PORT))
        membership = struct.pack("=4s4si", socket.inet_aton(GROUP), b"", namespace.ifindex(interface))
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership)
        sock.settimeout(5)
        yield sock


def test_one_relay_serves_both_directions_of_a_group(daemon: Daemon, line: RelayLine) -> None:
    daemon.run("add", f"{GROUP}:{PORT}%in0", f"{GROUP}:{PORT}%out0", "--name", "there")
    daemon.run("add", f"{GROUP}:{PORT}%out0", f"{GROUP}:{PORT}%in0", "--name", "back")
    # The receivers route by source: the relay's address on the sender's cable is from another subnet.
    line.sender.sysctl("net.ipv4.conf.all.rp_filter", 0)
    line.sender.sysctl("net.ipv4.conf.eth0.rp_filter", 0)
    with listening(line.sender, "eth0") as sender, listening(line.receiver, "eth0") as receiver:
        send(line.sender, "eth0", b"there")
        assert receiver.recv(100) == b"there"
        send(line.receiver, "eth0", b"back")
        assert [sender.recv(100), sender.recv(100)] == [b"there", b"back"]  # its own, as the segment has it
    with daemon.client() as client:
        totals = settled(client)
    assert (totals["received"], totals["forwarded"], totals["dropped"]) == (2, 2, {})


def test_what_comes_from_an_address_of_this_host_is_dropped(daemon: Daemon, line: RelayLine) -> None:
    """As if a cable brought back what another interface sent. Addresses may come and go."""
    daemon.run("add", f"{GROUP}:{PORT}%in0", "239.9.9.9:9000%out0", "--name", "feed")
    line.sender.ip("address", "add", f"{STRANGER}/32", "dev", "eth0")

    def counted() -> tuple[int, int]:
        with daemon.client() as client:
            (rule,) = client.stats().rules
            return rule.packets, rule.own

    def sent_until(packets: int, own: int) -> None:
        send(line.sender, "eth0", b"back again", STRANGER)
        wait_until(lambda: sum(counted()) == packets + own, 5, "nothing is counted")

    sent_until(1, 0)
    line.relay.ip("address", "add", f"{STRANGER}/32", "dev", "out0")
    with daemon.client() as client:

        def is_own() -> bool:
            send(line.sender, "eth0", b"back again", STRANGER)
            return client.stats().rules[0].own > 0

        wait_until(is_own, 5, "an address that this host has by now")
        packets, own = counted()
        sent_until(packets, own + 1)
        wait_until(lambda: counted() == (packets, own + 1), 5)
        assert settled(client)["dropped"] == {"own": own + 1}
    assert f"own {own + 1}" in daemon.run("stats").stdout
    line.relay.ip("address", "del", f"{STRANGER}/32", "dev", "out0")

    def is_forwarded() -> bool:
        send(line.sender, "eth0", b"not ours", STRANGER)
        return counted()[0] > packets

    wait_until(is_forwarded, 5, "an address that this host has no more")


def test_what_comes_in_again_within_the_host_is_refused(daemon: Daemon, line: RelayLine) -> None:
    """By way of the loopback device, or of a bridge; what does not is taken."""

    def said(*rule: str) -> str:
        result = daemon.run("add", *rule, "--name", "l", check=False)
        assert result.returncode in (0, 65)
        return result.stderr if result.returncode else ""

    assert "heard at lo (rule l)" in said(f"{INGRESS_ADDRESS}:7000%lo", f"{INGRESS_ADDRESS}:7000%in0")
    assert "heard at lo (rule l)" in said(f"{INGRESS_ADDRESS}:7000%lo", "=:=%in0,source=keep")
    assert said(f"{INGRESS_ADDRESS}:7000%lo", "=:=%out0,source=keep") == ""  # there it is a stranger's
    daemon.run("remove", "l")
    line.relay.ip("link", "add", "vA", "type", "veth", "peer", "name", "vB")
    try:
        line.relay.ip("link", "add", "br0", "type", "bridge")
    except RuntimeError as error:
        pytest.skip(f"no bridges here: {error}")
    rule = f"{GROUP}:{PORT}%vB", "=:=%br0,source=keep"
    assert said(*rule) == ""
    daemon.run("remove", "l")
    line.relay.ip("link", "set", "vA", "master", "br0")

    def is_refused() -> bool:
        refusal = said(*rule)
        if not refusal:
            daemon.run("remove", "l")
        return "heard at vB (rule l)" in refusal

    wait_until(is_refused, 5, "the bridge's port is not known")


def test_an_output_that_comes_to_feed_its_rule_is_paused_before_it_does(daemon: Daemon, line: RelayLine) -> None:
    outputs = [f"{GROUP}:6001%out0", "=:=%vC,source=keep"]
    daemon.run("add", f"{GROUP}:{PORT}%vD", *outputs, "--name", "l")
    daemon.run("add", f"{GROUP}:{PORT}%in0", f"{GROUP}:6000%out0", "--name", "other")

    def shown() -> tuple[str, list[str]]:
        rule = daemon.json("list")["rules"][0]
        return rule["state"], rule["outputs"]

    assert shown() == ("pending", outputs)
    with daemon.client() as client:
        happened = client.events(["rule_changed"])
        line.relay.ip("link", "add", "vC", "type", "veth", "peer", "name", "vD")
        (event,) = next(happened).events
    assert event.text.startswith(
        "=:=%vC,source=keep is paused, since the rule feeds itself now: rule l closes a cycle: "
    )
    daemon.wait_for_log("=:=%vC,source=keep of rule l is paused, since it feeds itself now: rule l closes a cycle: ")
    for name in ("vC", "vD"):
        line.relay.ip("link", "set", name, "up")
    wait_until(lambda: shown() == ("active", [outputs[0], f"{outputs[1]},paused"]), 10, "it is not paused")
    with Injector(line.relay, "vC") as injector:
        injector.send(ethernet_ipv4_udp(STRANGER, GROUP, 4000, PORT, b"not to go round"))
    wait_until(lambda: daemon.json("stats")["rules"][0]["packets"] == 1, 10, "it does not arrive")
    with daemon.client() as client:
        settled(client)
        figures = [(output.packets, output.dropped) for output in client.stats().rules[0].outputs]
    assert figures == [(1, {}), (0, {"paused": 1})]
    done = daemon.run("resume", "l", check=False)
    assert (done.returncode, "heard at vD (rule l)" in done.stderr) == (65, True)
    # What holds rules together does so in the next life of each worker.
    os.kill(daemon.pids()["data/0"], signal.SIGKILL)
    daemon.wait_for_log("data/0 is back")
    line.relay.ip("link", "del", "vC")
    wait_until(lambda: daemon.run("resume", "l", check=False).returncode == 0, 10, "it stays refused")
    assert shown() == ("partial", outputs) or shown() == ("pending", outputs)
    assert daemon.json("list")["rules"][1]["state"] == "active"


@pytest.fixture
def ring() -> Iterator[tuple[Namespace, Namespace]]:
    if reason := unsupported():
        pytest.skip(reason)
    with Lab() as lab:
        one, two = lab.namespace("one"), lab.namespace("two")
        lab.veth(one, "r0", two, "l0", address_a="10.0.1.1/24", address_b="10.0.1.2/24")
        lab.veth(two, "r0", one, "l0", address_a="10.0.2.2/24", address_b="10.0.2.1/24")
        two.ip("address", "add", f"{STRANGER}/32", "dev", "r0")
        yield one, two


@pytest.mark.parametrize("options", [(), ("--engine", "reference")], ids=" ".join)
def test_a_loop_through_another_relay_is_ended(ring: tuple[Namespace, Namespace], options: tuple[str, ...]) -> None:
    two = ring[1]
    with ExitStack() as stack:
        daemons = [stack.enter_context(Daemon(namespace, "--workers", "1", *options)) for namespace in ring]
        for daemon in daemons:
            daemon.run("add", f"{GROUP}:{PORT}%l0", f"{GROUP}:{PORT}%r0", "--name", "feed")
        # To the first relay it comes from a stranger, and ever after from the other relay.
        send(two, "r0", b"round and round it goes", STRANGER)
        first = daemons[0]
        first.wait_for_log("suspended for 1 s, since another relay sends its output back")
        (rule,) = first.json("list")["rules"]
        if rule["state"] == "suspended":  # unless a second has passed since
            assert "another relay sends its output back" in rule["problems"][0]
        # The one datagram is out of the world, and was counted each time round.
        with daemons[1].client() as client:
            settled(client, deadline_s=10)
        with first.client() as client:
            dropped = settled(client)["dropped"]
            (stats,) = client.stats().rules
        assert dropped == {"loop": 1}
        assert (stats.looped, stats.suspensions) == (1, 1)
        assert stats.packets >= 32
        # It goes on by itself, and longer the next time.
        wait_until(lambda: first.json("list")["rules"][0]["state"] == "active", 10, "it stays suspended")
        send(two, "r0", b"and once more", STRANGER)
        first.wait_for_log("suspended for 2 s")
        # Without the other relay there is no loop.
        daemons[1].stop()
        wait_until(lambda: first.json("list")["rules"][0]["state"] == "active", 10, "it stays suspended")
        with listening(two, "l0") as receiver:
            send(two, "r0", b"once", STRANGER)
            assert receiver.recv(100) == b"once"

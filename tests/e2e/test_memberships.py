"""Memberships by the thousand, what the kernel does not allow, and what is never asked of it.

sender 203.0.113.10 --- in0 relay out0 --- receiver
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final

import pytest

from lab.daemon import Daemon
from lab.namespaces import Lab, unsupported, wait_until
from lab.topology import RelayLine, relay_line

DEADLINE_S: Final = 15.0
IFF_PROMISC: Final = 0x100
IFF_ALLMULTI: Final = 0x200


@pytest.fixture
def line() -> Iterator[RelayLine]:
    if reason := unsupported():
        pytest.skip(reason)
    with Lab() as lab:
        yield relay_line(lab, ipv6=True)


def joined(line: RelayLine) -> set[str]:
    """Groups of in0, as the kernel says."""
    text = line.relay.ip("maddress", "show", "dev", "in0").stdout
    return {words[1] for words in map(str.split, text.splitlines()) if words[:1] in (["inet"], ["inet6"])}


def sources(line: RelayLine) -> list[tuple[str, str]]:
    """Groups and sources of in0, of which there are members (/proc/net/mcfilter)."""

    def read() -> list[tuple[str, str]]:
        found = []
        for text in Path("/proc/thread-self/net/mcfilter").read_text().splitlines()[1:]:
            _index, device, group, source, included, _excluded = text.split()
            if device == "in0" and int(included):
                found.append((str(IPv4Address(int(group, 16))), str(IPv4Address(int(source, 16)))))
        return found

    return line.relay.call(read)


def flags(line: RelayLine) -> int:
    return int(line.relay.run("cat", "/sys/class/net/in0/flags").stdout, 16)


def test_thousands_of_groups_and_sources(line: RelayLine) -> None:
    """Beyond what one socket holds of either (20 groups, 10 sources of a group), and no more than what rules want."""
    groups = [str(IPv4Address("239.10.0.0") + number) for number in range(2000)]
    groups6 = [f"ff05::{number:x}" for number in range(0x100, 0x100 + 300)]
    some = [str(IPv4Address("203.0.113.1") + number) for number in range(100)]
    with Daemon(line.relay, "--debug") as daemon, daemon.client() as client:
        before = joined(line)
        add = [(f"{group}:5000%in0", ["198.51.100.2:6000%out0"], None) for group in groups]
        add += [(f"[{group}]:5000%in0", ["198.51.100.2:6000%out0"], None) for group in groups6]
        add += [("239.11.0.0/24:*%in0", ["198.51.100.2:6000%out0"], None)]
        add += [("239.12.0.0/16:*%in0", ["198.51.100.2:6000%out0"], None)]  # too many: it takes what comes
        # Last, since the kernel lists sources of an interface only if the newest group has some (igmp_mcf_get_first).
        add += [(f"{source}@232.1.1.1:5000%in0", ["198.51.100.2:6000%out0"], None) for source in some]
        client.change(add=add)
        prefix = {str(IPv4Address("239.11.0.0") + number) for number in range(256)}
        assert joined(line) - before == {*groups, *groups6, "232.1.1.1", *prefix}
        assert sorted(sources(line)) == sorted(("232.1.1.1", source) for source in some)
        assert {rule.state for rule in client.rules()} == {"active"}
        assert not flags(line) & (IFF_PROMISC | IFF_ALLMULTI)
        client.change(remove=[rule.id for rule in client.rules()])
        assert joined(line) == before
        assert sources(line) == []


def test_a_group_that_cannot_be_joined_is_shown_on_its_rule_with_what_mends_it(line: RelayLine) -> None:
    line.relay.sysctl("net.ipv4.igmp_max_memberships", 0)
    with Daemon(line.relay, "--debug") as daemon, daemon.client() as client:
        facts = client.add("239.1.1.1:5000%in0", ["198.51.100.2:6000%out0"], "feed").rule
        assert facts.state == "partial"
        assert "net.ipv4.igmp_max_memberships" in facts.problems[0]
        assert client.add("[ff05::1:3]:5000%in0", ["198.51.100.2:6000%out0"], "other").rule.state == "active"
        # What arrives all the same is relayed.
        with (
            line.receiver.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiving,
            line.sender.socket(socket.AF_INET, socket.SOCK_DGRAM) as sending,
        ):
            receiving.bind(("198.51.100.2", 6000))
            receiving.settimeout(DEADLINE_S)
            sending.sendto(b"not asked for", ("239.1.1.1", 5000))
            assert receiving.recv(100) == b"not asked for"
        # It is tried again, here when an interface changes, and by itself every ten seconds.
        line.relay.sysctl("net.ipv4.igmp_max_memberships", 20)
        line.relay.ip("address", "add", "192.0.2.99/32", "dev", "in0")
        wait_until(lambda: client.rules()[0].state == "active", DEADLINE_S, "it is not joined")
        assert "239.1.1.1" in joined(line)

"""net/memberships.py against the kernel: what the host is a member of, and that a report of it leaves the host."""

from __future__ import annotations

import os
import resource
import socket
import time
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any, TypeVar

import pytest

from lab.capture import Capture
from lab.namespaces import Lab, Namespace, unsupported
from mcrelay.errors import SystemRefusal
from mcrelay.net.interfaces import Interface
from mcrelay.net.memberships import Memberships
from mcrelay.rules import Address

T = TypeVar("T")


@pytest.fixture(scope="module")
def host() -> Iterator[Namespace]:
    if reason := unsupported():
        pytest.skip(reason)
    with Lab() as lab:
        made = lab.namespace("member", ipv6=True)
        lab.veth(made, "in0", lab.namespace("sender"), "eth0", address_a="192.0.2.1/24")
        yield made


class Host:
    """Memberships of a namespace, and what its kernel says of them."""

    def __init__(self, namespace: Namespace) -> None:
        self.namespace = namespace
        self.where = Interface("in0", namespace.ifindex("in0"), 1500, is_up=True, has_ipv4=True)
        self.memberships = Memberships()

    def join(self, group: Address, source: Address | None = None) -> None:
        self.namespace.call(self.memberships.join, self.where, group, source)

    def leave(self, group: Address, source: Address | None = None) -> None:
        self.memberships.leave(self.where.index, group, source)

    def groups(self) -> set[Address]:
        """Those that are not the kernel's own."""
        names = {line.split()[1] for line in self._maddress() if line.strip().startswith("inet")}
        found = {IPv4Address(name) if "." in name else IPv6Address(name) for name in names}
        return {group for group in found if group in OURS4 or group in OURS6}

    def _maddress(self) -> list[str]:
        return self.namespace.ip("maddress", "show", "dev", "in0").stdout.split("\n")

    def sources(self, group: Address) -> set[Address]:
        """Those of which the kernel takes the group. It shows none if the group that was joined last has none."""
        version = group.version
        read: Callable[[], str] = Path(f"/proc/thread-self/net/mcfilter{'6' if version == 6 else ''}").read_text
        found: set[Address] = set()
        for words in (line.split() for line in self.namespace.call(read).split("\n")[1:] if line):
            if version == 4 and IPv4Address(int(words[2], 16)) == group:
                found.add(IPv4Address(int(words[3], 16)))
            elif version == 6 and IPv6Address(bytes.fromhex(words[2])) == group:
                found.add(IPv6Address(bytes.fromhex(words[3])))
        return found

    def sockets(self) -> list[socket.socket]:
        return [sock for sock, _members in self.memberships.holders()]


class Range:
    def __init__(self, first: Address, count: int) -> None:
        self._first, self._count = first, count

    def __contains__(self, address: object) -> bool:
        return type(address) is type(self._first) and 0 <= int(address) - int(self._first) < self._count

    def __getitem__(self, number: int) -> Any:
        return self._first + number


OURS4, OURS6 = Range(IPv4Address("239.77.0.0"), 65536), Range(IPv6Address("ff35::8000:0"), 65536)
SOURCES4, SOURCES6 = Range(IPv4Address("10.0.0.1"), 65536), Range(IPv6Address("2001:db8::1"), 65536)
FAMILIES = pytest.mark.parametrize(("ours", "sources"), [(OURS4, SOURCES4), (OURS6, SOURCES6)], ids=["ipv4", "ipv6"])


@pytest.fixture
def member(host: Namespace) -> Iterator[Host]:
    opened = Host(host)
    yield opened
    opened.memberships.close()
    assert opened.groups() == set()


def test_more_groups_than_a_socket_holds_are_joined_and_left(member: Host) -> None:
    """igmp_max_memberships (20) is per socket. A report for each group leaves the host, and a leave as well."""
    groups = [OURS4[n] for n in range(1, 46)]
    with Capture(member.namespace, "in0") as capture:
        for group in groups:
            member.join(group)
            member.join(group)
        assert member.groups() == set(groups)
        assert len(member.sockets()) == 3
        for group in groups:
            capture.wait_for(lambda f, g=str(group): f.igmp and f.igmp.joins(g), 10, f"no report for {group}")  # type: ignore[misc]
        for group in groups:
            member.leave(group)
            member.leave(group)
        assert member.groups() == set()
        assert member.sockets() == []
        capture.wait_for(lambda f: f.igmp and f.igmp.leaves(str(groups[-1])), 10, "no leave was sent")


@FAMILIES
def test_sources_of_a_group_come_and_go(member: Host, ours: Range, sources: Range) -> None:
    """igmp_max_msf (10) and mld_max_msf (64) are per socket and group."""
    wanted = {sources[n] for n in range(150)}
    member.join(ours[3])
    for source in wanted:
        member.join(ours[1], source)
    member.join(ours[2], sources[0])
    assert member.sources(ours[1]) == wanted
    assert member.sources(ours[2]) == {sources[0]}
    assert member.groups() == {ours[1], ours[2], ours[3]}
    assert len(member.sockets()) == (15 if ours is OURS4 else 3) + 1
    gone = {sources[n] for n in range(0, 150, 2)}
    for source in gone:
        member.leave(ours[1], source)
    assert member.sources(ours[1]) == wanted - gone
    sockets = len(member.sockets())
    for source in gone:
        member.join(ours[1], source)
    assert member.sources(ours[1]) == wanted
    assert len(member.sockets()) == sockets, "the room of those that went was not used"
    for source in wanted:
        member.leave(ours[1], source)
    assert member.groups() == {ours[2], ours[3]}
    member.leave(ours[2], sources[0])
    member.leave(ours[3])
    assert member.sockets() == []


@FAMILIES
def test_any_source_and_some_of_a_group(member: Host, ours: Range, sources: Range) -> None:
    """One does not end the other, in whatever order they come and go."""
    member.join(ours[1], sources[0])
    member.join(ours[1])
    member.join(ours[1], sources[1])
    member.leave(ours[1])
    assert member.sources(ours[1]) == {sources[0], sources[1]}
    member.join(ours[1])
    member.leave(ours[1], sources[0])
    member.leave(ours[1], sources[1])
    assert member.groups() == {ours[1]}
    assert member.sources(ours[1]) == set()
    member.leave(ours[1])
    assert member.groups() == set()


def test_a_report_names_the_source(member: Host) -> None:
    with Capture(member.namespace, "in0") as capture:
        member.join(OURS4[1], SOURCES4[5])

        def is_told(source: str) -> bool:
            reports = [frame.igmp for frame in capture.frames if frame.igmp]
            return any(source in record.sources for report in reports for record in report.records)

        capture.wait_for(lambda _frame: is_told(str(SOURCES4[5])), 10, "no report")


def test_a_successor_goes_on_with_them(member: Host) -> None:
    for n in range(25):
        member.join(OURS4[n])
        member.join(OURS4[n], SOURCES4[n])
        member.join(OURS6[n])
    successor = Host(member.namespace)
    for sock, members in member.memberships.holders():
        successor.memberships.adopt(socket.socket(fileno=os.dup(sock.fileno())), members)
    member.memberships.close()
    assert successor.groups() == {*(OURS4[n] for n in range(25)), *(OURS6[n] for n in range(25))}
    for n in range(25):
        successor.join(OURS4[n])
        successor.leave(OURS4[n])
        successor.leave(OURS6[n])
    assert successor.groups() == {OURS4[n] for n in range(25)}
    for n in range(25):
        successor.leave(OURS4[n], SOURCES4[n])
    assert successor.sockets() == []


def test_an_interface_that_went_takes_its_memberships_along(member: Host) -> None:
    member.namespace.ip("link", "add", "brief", "type", "veth", "peer", "other")
    member.namespace.ip("link", "set", "brief", "up")
    brief = Interface("brief", member.namespace.ifindex("brief"), 1500, is_up=True, has_ipv4=True)
    wanted: list[tuple[Address, Address | None]] = [
        (ours[group], sources[n] if group else None)
        for ours, sources in ((OURS4, SOURCES4), (OURS6, SOURCES6))
        for group in (0, 1, 2)
        for n in range(2 if group else 1)
    ]
    for group, source in wanted:
        member.namespace.call(member.memberships.join, brief, group, source)
    member.namespace.ip("link", "del", "brief")
    for group, source in wanted:
        member.memberships.leave(brief.index, group, source)
    assert member.sockets() == []
    with pytest.raises(SystemRefusal, match=r"cannot join 239.77.0.1 on brief: .*; see 'ip link show brief'"):
        member.namespace.call(member.memberships.join, brief, OURS4[1])


@pytest.mark.parametrize("source", [None, SOURCES4[1]])
def test_a_limit_that_allows_nothing_is_named(member: Host, source: Address | None) -> None:
    member.namespace.sysctl("net.ipv4.igmp_max_memberships", 0)
    try:
        with pytest.raises(
            SystemRefusal, match=r"no more; raise it: sysctl net.ipv4.igmp_max_memberships=20 \(now 0\)"
        ):
            member.join(OURS4[1], source)
        assert member.sockets() == []
        assert member.groups() == set()
    finally:
        member.namespace.sysctl("net.ipv4.igmp_max_memberships", 20)
    member.join(OURS4[1], source)


def test_too_few_open_files_are_named_with_what_needs_them(member: Host) -> None:
    def join_many() -> None:
        for n in range(1000):
            member.memberships.join(member.where, OURS4[1], SOURCES4[n])

    def join_many_with_few_files() -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        least = os.dup(0)
        os.close(least)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (least + 1, hard))
            join_many()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    with pytest.raises(SystemRefusal, match=r"ulimit -n.*, or net.ipv4.igmp_max_msf \(sysctl\)"):
        member.namespace.call(join_many_with_few_files)
    member.namespace.call(join_many)
    assert member.sources(OURS4[1]) == {SOURCES4[n] for n in range(1000)}


@pytest.mark.parametrize("ours", [OURS4, OURS6], ids=["ipv4", "ipv6"])
def test_thousands_of_groups_take_seconds(member: Host, ours: Range) -> None:
    def join_and_leave() -> tuple[int, float]:
        began = time.thread_time()
        for n in range(3000):
            member.memberships.join(member.where, ours[n])
        sockets = len(member.sockets())
        for n in range(3000):
            member.memberships.leave(member.where.index, ours[n])
        return sockets, time.thread_time() - began

    sockets, seconds = member.namespace.call(join_and_leave)
    assert sockets <= 150
    assert member.sockets() == []
    assert seconds < 5  # of processor time: others may have the machine meanwhile


@FAMILIES
def test_memory_of_sockets_is_a_limit_like_others(member: Host, ours: Range, sources: Range) -> None:
    setting = Path("/proc/sys/net/core/optmem_max")
    if not member.namespace.call(setting.exists):
        pytest.skip("this kernel has optmem_max for all namespaces at once")
    before = member.namespace.call(setting.read_text)
    try:
        member.namespace.sysctl("net.core.optmem_max", 1000)
        for n in range(40):
            member.join(ours[n])
            member.join(ours[100], sources[n])
            member.join(ours[200 + n], sources[n])
        assert member.groups() == {ours[100], *(ours[at + n] for n in range(40) for at in (0, 200))}
        assert len(member.sockets()) > 6
        member.namespace.sysctl("net.core.optmem_max", 200)
        with pytest.raises(SystemRefusal, match=r"no more; raise net.core.optmem_max \(now 200\)"):
            member.join(ours[1000], sources[0])
        for n in range(40):
            member.leave(ours[n])
            member.leave(ours[100], sources[n])
            member.leave(ours[200 + n], sources[n])
    finally:
        member.namespace.sysctl("net.core.optmem_max", before.strip())

"""net/interfaces.py against the kernel: what it knows follows what happens."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from ipaddress import ip_address

import pytest

from lab.namespaces import Lab, Namespace, unsupported, wait_until
from mcrelay.entries import mapped
from mcrelay.net import interfaces
from mcrelay.net.interfaces import Interface, Interfaces
from mcrelay.ways import ANY


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    if reason := unsupported():
        pytest.skip(reason)
    with Lab() as lab:
        yield lab.namespace("interfaces", ipv6=True)


class Watched:
    """An Interfaces on an event loop in a namespace, for as long as the block lasts."""

    def __init__(self, namespace: Namespace) -> None:
        self._namespace = namespace
        self._started: Future[tuple[Interfaces, asyncio.AbstractEventLoop]] = Future()

    def __enter__(self) -> Watched:
        self._thread = threading.Thread(target=self._namespace.call, args=(asyncio.run, self._run()))
        self._thread.start()
        self.table, self.loop = self._started.result(10)
        return self

    async def _run(self) -> None:
        table = Interfaces()
        await table.open()
        self._stop = asyncio.Event()
        self._started.set_result((table, asyncio.get_running_loop()))
        await self._stop.wait()
        await table.close()

    def __exit__(self, *_exception: object) -> None:
        self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def present(self) -> dict[str, Interface]:
        async def ask() -> dict[str, Interface]:
            return self.table.present()

        return asyncio.run_coroutine_threadsafe(ask(), self.loop).result(5)

    def addresses(self) -> set[str]:
        async def ask() -> set[str]:
            return set().union(*self.table.addresses().values())

        return asyncio.run_coroutine_threadsafe(ask(), self.loop).result(5)

    def refresh(self) -> dict[str, Interface]:
        return asyncio.run_coroutine_threadsafe(self.table.refresh(), self.loop).result(5)

    def wait_for(self, condition: Callable[[dict[str, Interface]], object]) -> None:
        wait_until(lambda: condition(self.present()), 5, "the table does not follow")


def test_the_table_follows_what_happens_to_an_interface(namespace: Namespace) -> None:
    ip = namespace.ip
    with Watched(namespace) as watched:
        assert set(watched.present()) == {"lo"}
        ip("link", "add", "one", "index", "77", "type", "veth", "peer", "other")
        watched.wait_for(lambda present: {"one", "other"} <= set(present))
        expected = Interface(
            *("one", 77, 1500),
            is_up=False,
            has_ipv4=False,
            network=14,
            kind="veth",
            peer=namespace.ifindex("other"),
            mac=bytes.fromhex(namespace.mac("one").replace(":", "")),
        )
        assert watched.present()["one"] == expected
        ip("address", "add", "192.0.2.1/24", "dev", "one")
        ip("address", "add", "192.0.2.2/24", "dev", "one", "label", "one:2")
        watched.wait_for(lambda present: present["one"].has_ipv4)
        ip("address", "del", "192.0.2.2/24", "dev", "one")
        ip("link", "set", "one", "up", "mtu", "9000")
        watched.wait_for(lambda present: present["one"].is_up and present["one"].mtu == 9000)
        assert watched.present()["one"].has_ipv4  # it still has one
        ip("address", "flush", "dev", "one")
        watched.wait_for(lambda present: not present["one"].has_ipv4)
        ip("link", "set", "one", "down")
        ip("link", "set", "one", "name", "two")
        watched.wait_for(lambda present: "two" in present and "one" not in present and not present["two"].is_up)
        ip("link", "del", "two")
        watched.wait_for(lambda present: set(present) == {"lo"})
        ip("link", "add", "two", "index", "78", "type", "veth", "peer", "other")
        watched.wait_for(lambda present: "two" in present and present["two"].index == 78)


def test_the_table_knows_how_interfaces_are_connected(namespace: Namespace) -> None:
    """As far as this kernel has such devices."""
    ip = namespace.ip
    ip("link", "add", "v0", "type", "veth", "peer", "v1")
    with Watched(namespace) as watched:

        def made(name: str, *how: str) -> bool:
            done = namespace.run("ip", "link", "add", *how, check=False)
            if "Unknown device type" in done.stderr:
                return False
            assert not done.returncode, done.stderr
            watched.wait_for(lambda present: name in present)
            return True

        index = namespace.ifindex("v0")
        if made("br0", "br0", "type", "bridge"):
            assert watched.present()["br0"].kind == "bridge"
            ip("link", "set", "v0", "master", "br0")
            watched.wait_for(lambda present: present["v0"].master == present["br0"].index)
            ip("link", "set", "v0", "nomaster")
            watched.wait_for(lambda present: not present["v0"].master)
        if made("m0", "link", "v0", "name", "m0", "type", "macvlan"):
            facts = watched.present()["m0"]
            assert (facts.kind, facts.lower, facts.peer, facts.vlan) == ("macvlan", index, 0, 0)
        if made("v0.7", "link", "v0", "name", "v0.7", "type", "vlan", "id", "7"):
            facts = watched.present()["v0.7"]
            assert (facts.kind, facts.lower, facts.peer, facts.vlan) == ("vlan", index, 0, 7)


def source(address: str) -> bytes:
    return mapped(ip_address(address)) if address else ANY


def test_what_may_be_sent_from_follows_the_addresses(namespace: Namespace) -> None:
    ip = namespace.ip

    def sources() -> tuple[bytes, bytes, bytes]:
        link = watched.present()["one"].link()
        return link.source4, link.source6_link, link.source6

    def wait_for(*expected: str) -> None:
        wait_until(lambda: sources() == tuple(map(source, expected)), 5, f"not {expected}")
        assert watched.refresh()["one"].link() == watched.present()["one"].link()

    with Watched(namespace) as watched:
        ip("link", "add", "one", "type", "veth", "peer", "other")
        ip("link", "set", "one", "addrgenmode", "none")
        ip("link", "set", "other", "up")
        ip("link", "set", "one", "up")
        watched.wait_for(lambda present: "one" in present and present["one"].is_up)
        wait_for("", "", "")
        assert not watched.present()["one"].has_ipv6
        ip("address", "add", "fe80::1/64", "dev", "one")
        wait_for("", "fe80::1", "")
        assert watched.present()["one"].has_ipv6
        ip("address", "add", "192.0.2.9/24", "dev", "one")
        ip("address", "add", "192.0.2.1/24", "dev", "one")
        ip("address", "add", "fd00::2/64", "dev", "one")
        wait_for("192.0.2.9", "fe80::1", "fd00::2")
        # One that is being left comes last.
        ip("address", "add", "fd00::1/64", "dev", "one", "preferred_lft", "0")
        ip("address", "add", "fd00::3", "peer", "fd00::4/64", "dev", "one")
        ip("address", "del", "fd00::2/64", "dev", "one")
        wait_for("192.0.2.9", "fe80::1", "fd00::3")
        ip("address", "del", "fd00::3", "peer", "fd00::4/64", "dev", "one")
        wait_for("192.0.2.9", "fe80::1", "fd00::1")
        all_addresses = {"127.0.0.1", "::1", "192.0.2.9", "192.0.2.1", "fe80::1", "fd00::1"}
        assert {name for name in watched.addresses() if name in all_addresses} == all_addresses
        ip("link", "set", "one", "mtu", "1279")
        wait_for("192.0.2.9", "", "")
        assert not watched.present()["one"].has_ipv6


def test_an_address_that_another_host_has_is_not_sent_from(namespace: Namespace) -> None:
    """Nor one of which that is not known yet."""
    ip = namespace.ip
    with Lab() as lab, Watched(namespace) as watched:
        neighbour = lab.namespace("neighbour", ipv6=True)
        ip("link", "add", "one", "type", "veth", "peer", "other", "netns", neighbour.name)
        ip("link", "set", "one", "addrgenmode", "none")
        neighbour.ip("address", "add", "2001:db8::1/64", "dev", "other", "nodad")
        neighbour.ip("link", "set", "other", "up")
        namespace.sysctl("net.ipv6.conf.one.accept_dad", 1)
        ip("link", "set", "one", "up")
        ip("address", "add", "2001:db8::1/64", "dev", "one")
        assert not watched.refresh()["one"].has_ipv6
        wait_until(lambda: "dadfailed" in ip("address", "show", "dev", "one").stdout, 10, "nobody has seen the double")
        ip("address", "add", "2001:db8::2/64", "dev", "one", "nodad")
        watched.wait_for(lambda present: present["one"].has_ipv6)
        assert watched.present()["one"].source6 == source("2001:db8::2")


def test_headers_are_as_long_as_the_device_s(namespace: Namespace) -> None:
    namespace.ip("tuntap", "add", "bare", "mode", "tun")
    with Watched(namespace) as watched:
        present = watched.present()
        assert (present["bare"].header, present["bare"].mac) == (0, bytes(6))
        assert (present["lo"].header, present["lo"].mac) == (14, bytes(6))
        assert present["lo"].source6 == source("::1")


def test_a_refresh_agrees_with_the_notifications(namespace: Namespace) -> None:
    with Watched(namespace) as watched:
        for number in range(20):
            namespace.ip("link", "add", f"one{number}", "type", "veth", "peer", f"other{number}")
            namespace.ip("address", "add", f"192.0.2.{number}/32", "dev", f"one{number}")
            assert f"one{number}" in watched.refresh()
        watched.wait_for(lambda present: sum(link.has_ipv4 for link in present.values()) == 21)  # and lo
        assert watched.refresh() == watched.present()


def test_lost_notifications_are_noticed_and_made_up_for(
    namespace: Namespace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(interfaces, "RETRY_S", 0.01)
    failures = [OSError(105, "No buffer space available")]
    apply = Interfaces._notified

    def notified(self: Interfaces, message: object) -> None:
        if failures:
            raise failures.pop()  # as the socket's read would
        apply(self, message)

    monkeypatch.setattr(Interfaces, "_notified", notified)
    with Watched(namespace) as watched:
        namespace.ip("link", "add", "one", "type", "veth", "peer", "other")
        watched.wait_for(lambda present: {"one", "other"} <= set(present))
        assert "lost notifications" in caplog.text
        namespace.ip("link", "del", "one")
        watched.wait_for(lambda present: set(present) == {"lo"})

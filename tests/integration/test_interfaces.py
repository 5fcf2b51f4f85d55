"""net/interfaces.py against the kernel: what it knows follows what happens."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import pytest

from lab.namespaces import Lab, Namespace, unsupported, wait_until
from mcrelay.net import interfaces
from mcrelay.net.interfaces import Interface, Interfaces


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    if reason := unsupported():
        pytest.skip(reason)
    with Lab() as lab:
        yield lab.namespace("interfaces")


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
        expected = Interface("one", 77, 1500, is_up=False, has_ipv4=False, network=14, peer=namespace.ifindex("other"))
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

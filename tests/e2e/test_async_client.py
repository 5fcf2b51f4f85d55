"""AsyncClient and the daemon itself: many tasks on one connection, while calls are cancelled and processes die.

sender 203.0.113.10 --- in0 relay out0 --- receiver
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from lab.daemon import Daemon
from lab.plan import SendPlan
from lab.topology import RelayLine
from lab.traffic import start_sender
from mcrelay import async_client
from mcrelay.api import PROTOCOL, Added, Rules, Stats
from mcrelay.client import AsyncClient
from mcrelay.errors import Error, RuleError, Unavailable
from tests.e2e.conftest import StartDaemon
from tests.e2e.test_bad_input import connect, frame, reply

INPUT: Final = "239.1.1.1:5000"
OUTPUT: Final = "239.2.2.2:6000%out0"
DEADLINE_S: Final = 30.0


@pytest.fixture(scope="module")
def shared(line: RelayLine) -> Iterator[Daemon]:
    with Daemon(line.relay, "--debug") as daemon:
        yield daemon
    assert "Traceback" not in daemon.log, daemon.log


def run(daemon: Daemon, test: Callable[[AsyncClient], Coroutine[Any, Any, None]]) -> None:
    async def connected() -> None:
        async with asyncio.timeout(DEADLINE_S), AsyncClient(daemon.socket) as relay:
            await test(relay)
            await relay.change(remove=[rule.id for rule in await relay.rules()])
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(connected())


async def until(condition: Callable[[], Coroutine[Any, Any, bool]]) -> None:
    while not await condition():
        await asyncio.sleep(0.02)


def rule(n: int) -> tuple[str, list[str], str]:
    return f"239.1.2.{n}:5000%in0", [OUTPUT], f"feed-{n}"


def test_fifty_requests_at_once_are_answered_each_and_cancelling_some_harms_none(shared: Daemon) -> None:
    async def test(relay: AsyncClient) -> None:
        adding = [asyncio.ensure_future(relay.add(*rule(n))) for n in range(50)]
        asking = [asyncio.ensure_future(call()) for _ in range(25) for call in (relay.listing, relay.stats)]
        added = await asyncio.gather(*adding)
        assert [one.rule.name for one in added] == [f"feed-{n}" for n in range(50)]
        kinds = [type(one) for one in await asyncio.gather(*asking)]
        assert kinds == [Rules, Stats] * 25
        assert {one.name for one in await relay.rules()} == {f"feed-{n}" for n in range(50)}
        # Every other one cancelled: under way, or not even asked.
        again = [asyncio.ensure_future(relay.add(*rule(n))) for n in range(100, 150)]
        await asyncio.sleep(0.01)
        for task in again[::2]:
            task.cancel()
        results = await asyncio.gather(*again, return_exceptions=True)
        for one, n in zip(results[1::2], range(101, 150, 2), strict=True):
            assert isinstance(one, Added), one
            assert one.rule.name == f"feed-{n}"

    run(shared, test)


def test_a_change_for_rules_that_are_others_by_now_is_refused(shared: Daemon) -> None:
    async def test(relay: AsyncClient) -> None:
        before = await relay.listing()
        await relay.add(*rule(1))
        with pytest.raises(Error) as refusal:
            await relay.change([rule(2)], ["feed-1"], expect=before.generation)
        assert refusal.value.code == "conflict"
        changed = await relay.change([rule(2)], ["feed-1"], expect=(await relay.listing()).generation)
        assert (changed.added, changed.removed) == (1, 1)

    run(shared, test)


def test_a_tap_runs_beside_other_calls_and_ends_with_its_rule(shared: Daemon, line: RelayLine) -> None:
    async def test(relay: AsyncClient) -> None:
        await relay.add(f"{INPUT}%in0", [OUTPUT], "feed")
        sender = start_sender(line.sender, SendPlan(INPUT, interface="eth0", rate=100, duration_s=60))
        try:
            first = [tapped async for tapped in relay.tap("feed", count=3)]
            assert sum(len(tapped.packets) for tapped in first) == 3
            packets = 0

            async def watch() -> None:
                nonlocal packets
                async for tapped in relay.tap("feed", patience_s=5):
                    packets += len(tapped.packets)

            watching = asyncio.ensure_future(watch())

            async def has_seen() -> bool:
                await relay.ping()
                return packets > 5

            await until(has_seen)
            await relay.remove("feed")
            with pytest.raises(RuleError, match="has been removed"):
                await watching
            with pytest.raises(RuleError, match="no rule is called"):
                [tapped async for tapped in relay.tap("feed")]
        finally:
            await asyncio.to_thread(sender.stop)

    run(shared, test)


def test_reading_goes_on_while_the_control_plane_dies_and_the_daemon_is_replaced(start: StartDaemon) -> None:
    daemon = start("--workers", "1")

    async def test(relay: AsyncClient) -> None:
        await relay.add(*rule(1))
        calls, over = 0, asyncio.Event()

        async def read() -> None:
            nonlocal calls
            while not over.is_set():
                (one,) = await relay.rules()
                assert one.name == "feed-1"
                calls += 1

        async def has_gone_on(before: int) -> bool:
            for task in reading:
                if task.done():
                    task.result()
            return calls > before + 20

        reading = [asyncio.ensure_future(read()) for _ in range(4)]
        processes = await relay.workers()
        (control,) = [process.pid for process in processes if process.role == "control"]
        assert control is not None
        os.kill(control, signal.SIGKILL)
        await until(lambda before=calls: has_gone_on(before))  # type: ignore[misc] # a default
        upgraded = await relay.upgrade()
        daemon.pid = upgraded.pid
        await until(lambda before=calls: has_gone_on(before))  # type: ignore[misc] # a default
        over.set()
        await asyncio.gather(*reading)
        # A change that was under way as the control plane died: done or not, but not twice, and told to be unknown.
        (control,) = [process.pid for process in await relay.workers() if process.role == "control"]
        assert control is not None
        os.kill(control, signal.SIGSTOP)
        adding = asyncio.ensure_future(relay.add(*rule(2)))
        await asyncio.sleep(0.05)
        os.kill(control, signal.SIGKILL)
        with pytest.raises(Unavailable, match=r"closed the connection|lost the daemon"):
            await adding
        await relay.add(*rule(3))
        assert {one.name for one in await relay.rules()} - {"feed-2"} == {"feed-1", "feed-3"}

    run(daemon, test)
    assert daemon.process.wait(DEADLINE_S) == 0


def test_a_client_outlives_its_daemon(line: RelayLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is away for longer than a call waits for it."""
    monkeypatch.setattr(async_client, "AGAIN_FOR_S", 0.2)
    first = Daemon(line.relay, "--workers", "1", directory=tmp_path)

    async def test() -> None:
        async with asyncio.timeout(2 * DEADLINE_S), AsyncClient(first.socket) as relay:
            await relay.ping()
            watching = relay.tap(await added(relay))
            waiting = asyncio.ensure_future(anext(watching))
            await asyncio.to_thread(first.stop)
            with pytest.raises(Unavailable):
                await waiting
            with pytest.raises(Unavailable):
                await relay.ping()  # by which it knows that its connection has ended
            with pytest.raises(Unavailable, match="no mcrelay daemon"):
                await relay.add(*rule(2))
            with Daemon(line.relay, "--workers", "1", directory=tmp_path):
                assert [one.name for one in await relay.rules()] == ["feed-1"]
                await relay.add(*rule(2))

    async def added(relay: AsyncClient) -> str:
        return (await relay.add(*rule(1))).rule.id

    with first:
        asyncio.run(test())


def test_the_daemon_refuses_another_protocol_politely(shared: Daemon) -> None:
    def hello(protocol: int) -> bytes:
        return frame(json.dumps({"type": "hello", "id": 1, "protocol": protocol, "client": "by hand"}).encode())

    with connect(shared) as sock:
        sock.sendall(hello(PROTOCOL) + frame(b'{"type":"ping","id":2}') + hello(PROTOCOL))
        answers = [reply(sock) for _ in range(3)]
        assert {str(answer["type"]) for answer in answers} == {"welcome", "pong", "failure"}
    for protocol in (PROTOCOL - 1, PROTOCOL + 1):
        with connect(shared) as sock:
            sock.sendall(hello(protocol))
            answer = reply(sock)
            assert (answer["code"], answer["id"]) == ("protocol", 1)
            assert "older" in str(answer["message"])
            assert sock.recv(1) == b"", "it was not closed"
    shared.run("ping")

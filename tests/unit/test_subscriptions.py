"""Subscribers: how many there may be, and that each is told all it wants, in order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine

import pytest

from mcrelay import subscriptions
from mcrelay.api import Event, Happened, Subscribe
from mcrelay.errors import Busy, Unavailable
from mcrelay.flowtable import FlowTable
from mcrelay.messages import Message, RuleRecord
from mcrelay.ruletext import parse_rule
from mcrelay.settings import EventsSection
from mcrelay.subscriptions import EVENTS_PER_MESSAGE, SUBSCRIBERS_MAX, SUBSCRIBERS_RESERVED, Subscriptions


class Watcher:
    """A client that reads all."""

    held = 0

    def __init__(self, *, is_privileged: bool = False) -> None:
        self.is_privileged = is_privileged
        self.gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.messages: list[Message] = []

    def reply(self, message: Message) -> None:
        self.messages.append(message)

    @property
    def events(self) -> list[Event]:
        return [event for message in self.messages if isinstance(message, Happened) for event in message.events]


def run(test: Callable[[Subscriptions, FlowTable], Coroutine[None, None, None]]) -> None:
    async def running() -> None:
        table = FlowTable()
        async with asyncio.timeout(20):
            await test(Subscriptions(lambda: table, (), EventsSection()), table)

    asyncio.run(running())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def records(count: int) -> list[tuple[str, RuleRecord]]:
    rules = [
        parse_rule(f"239.1.{n // 250}.{n % 250}:5000%eth0", ["239.9.9.9:5000%eth1"], f"r{n}") for n in range(count)
    ]
    table = FlowTable()
    return [(rule.id, table.reserve(rule)) for rule in rules]


def test_each_is_told_all_that_it_wants_in_order() -> None:
    count = 2 * EVENTS_PER_MESSAGE + 1

    async def test(subscribed: Subscriptions, _table: FlowTable) -> None:
        all_of_it, removals = Watcher(), Watcher()
        tasks = [
            asyncio.ensure_future(subscribed.serve(Subscribe(id=1), all_of_it)),
            asyncio.ensure_future(subscribed.serve(Subscribe(id=2, kinds=("rule_removed",)), removals)),
        ]
        await until(lambda: len(all_of_it.messages) == len(removals.messages) == 1)
        subscribed.rules_changed([], records(count))
        subscribed.rules_changed(records(3), [])
        await until(lambda: len(all_of_it.events) == count + 3 and len(removals.events) == 3)
        assert [event.subject for event in all_of_it.events] == [f"r{n}" for n in (*range(count), 0, 1, 2)]
        assert {event.kind for event in removals.events} == {"rule_removed"}
        subscribed.end()
        for task in tasks:
            with pytest.raises(Unavailable):
                await task

    run(test)


def test_there_is_room_for_so_many_and_again_when_one_goes() -> None:
    async def test(subscribed: Subscriptions, _table: FlowTable) -> None:
        watchers = [Watcher() for _ in range(SUBSCRIBERS_MAX - SUBSCRIBERS_RESERVED)]
        tasks = [asyncio.ensure_future(subscribed.serve(Subscribe(id=1), watcher)) for watcher in watchers]
        await until(lambda: all(watcher.messages for watcher in watchers))
        with pytest.raises(Busy, match="clients are told of events already"):
            await subscribed.serve(Subscribe(id=1), Watcher())
        watchers[0].gone.set_result(None)
        with pytest.raises(Unavailable):
            await tasks[0]
        for _ in range(SUBSCRIBERS_RESERVED):
            watchers.append(Watcher(is_privileged=True))
            tasks.append(asyncio.ensure_future(subscribed.serve(Subscribe(id=1), watchers[-1])))
        await until(lambda: all(watcher.messages for watcher in watchers))
        another = Watcher(is_privileged=True)
        tasks[0] = asyncio.ensure_future(subscribed.serve(Subscribe(id=1), another))
        await until(lambda: bool(another.messages))
        subscribed.end()
        await asyncio.gather(*tasks, return_exceptions=True)

    run(test)


def test_what_comes_faster_than_it_can_be_told_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subscriptions, "UNTOLD_MAX", 3)

    async def test(subscribed: Subscriptions, _table: FlowTable) -> None:
        first = asyncio.ensure_future(subscribed.serve(Subscribe(id=1), watcher := Watcher()))
        await until(lambda: bool(watcher.messages))
        many = records(EVENTS_PER_MESSAGE)
        for _ in range(5):
            subscribed.rules_changed([], many)
        with pytest.raises(Busy, match="faster than they can be told"):
            await first
        second = asyncio.ensure_future(subscribed.serve(Subscribe(id=1), another := Watcher()))
        await until(lambda: bool(another.messages))
        subscribed.rules_changed([], records(1))
        await until(lambda: len(another.events) == 1)
        subscribed.end()
        with pytest.raises(Unavailable):
            await second

    run(test)


def test_a_look_that_fails_is_logged(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subscriptions, "LOOK_S", 0.01)

    async def test(subscribed: Subscriptions, table: FlowTable) -> None:
        ((rule_id, record),) = records(1)
        table.records[rule_id] = record
        monkeypatch.setattr(subscribed, "_at", lambda *_: 1 / 0)
        task = asyncio.ensure_future(subscribed.serve(Subscribe(id=1), Watcher()))
        await until(lambda: "events are not told any more" in caplog.text)
        subscribed.end()
        await asyncio.gather(task, return_exceptions=True)

    run(test)

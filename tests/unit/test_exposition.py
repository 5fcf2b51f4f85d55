"""Exposition: what a scrape costs whoever knows the facts."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from mcrelay import exposition as module
from mcrelay.api import GetStats, GetWorkers, ListRules, Rules, Stats, Workers
from mcrelay.errors import Busy
from mcrelay.exposition import Exposition
from mcrelay.messages import Message, ProcessFacts
from mcrelay.metrics import OPENMETRICS
from tests.unit.test_metrics import facts, output, rule, worker

PAGE = 3  # rules to a reply


class Facts:
    """A control plane of some rules, and how often it was asked."""

    def __init__(self, rules: int = 0) -> None:
        self.rules = [rule(n, output(f"239.2.2.2:{n}%eth1", n), packets=n) for n in range(1, rules + 1)]
        self.asked: Counter[str] = Counter()
        self.supervisor_answers = True
        self.state = "ready"
        self.meanwhile: Callable[[], None] = lambda: None
        self.exposition = Exposition(self.serve, lambda: 7, 4)

    async def serve(self, message: Message) -> Message:
        self.asked[type(message).__name__] += 1
        await asyncio.sleep(0)
        match message:
            case GetWorkers():
                if not self.supervisor_answers:
                    await asyncio.Event().wait()
                data = ProcessFacts("data", 0, self.state, 1, 0, "0", "0", 0)  # type: ignore[arg-type] # a literal
                return Workers(id=0, processes=(data,))
            case ListRules() | GetStats():
                return self._page(message)
        raise AssertionError(message)

    def _page(self, message: ListRules | GetStats) -> Rules | Stats:
        ids = [each.id for each in self.rules]
        if message.after is not None and message.after not in ids:
            raise Busy("the rules changed while they were listed", "ask again from the start")
        begin = ids.index(message.after) + 1 if message.after is not None else 0
        page, more = self.rules[begin : begin + PAGE], begin + PAGE < len(ids)
        self.meanwhile()
        if isinstance(message, ListRules):
            listed = tuple(facts(each, "pending" if each.packets == 2 else "active") for each in page)
            return Rules(id=0, generation=1, rules=listed, interfaces=(), more=more)
        return Stats(id=0, generation=1, workers=(worker(0),), rules=tuple(page), more=more, frames_malformed=0)


def run(test: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(10):
            await test

    asyncio.run(bounded())


def test_rules_come_from_several_pages_and_those_beyond_are_summed_up() -> None:
    async def test() -> None:
        answer = await Facts(8).exposition.metrics("")
        text = answer.body.decode()
        assert answer.status == 200
        assert f'mcrelay_rule_received_packets_total{{rule="{4:012x}"}} 4.0' in text
        assert f'rule="{5:012x}"' not in text
        assert f'mcrelay_rule_received_packets_total{{rule="(others)"}} {5 + 6 + 7 + 8}.0' in text
        assert "mcrelay_rules_unlisted 4.0" in text
        assert 'mcrelay_rules{state="pending"} 1.0' in text
        assert "mcrelay_clients 7.0" in text

    run(test())


def test_facts_are_gathered_once_for_many_and_again_when_they_are_old(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        known = Facts(2)
        asked = [known.exposition.metrics("") for _ in range(20)]
        asked += [known.exposition.metrics("application/openmetrics-text") for _ in range(20)]
        asked += [known.exposition.health("") for _ in range(20)]
        answers = await asyncio.gather(*asked)
        assert known.asked == {"GetWorkers": 1, "ListRules": 1, "GetStats": 1}
        assert answers[0].body is answers[19].body
        assert answers[20].content_type == OPENMETRICS
        await known.exposition.metrics("")
        assert known.asked["GetStats"] == 1
        monkeypatch.setattr(module, "FRESH_S", 0.0)
        monkeypatch.setattr(module, "FRESH_TIMES", 0)
        await known.exposition.metrics("")
        assert known.asked["GetStats"] == 2

    run(test())


def test_one_that_goes_away_takes_nothing_from_the_others() -> None:
    async def test() -> None:
        known = Facts(20)
        first = asyncio.ensure_future(known.exposition.metrics(""))
        second = asyncio.ensure_future(known.exposition.metrics(""))
        await asyncio.sleep(0)
        first.cancel()
        assert (await second).status == 200
        assert known.asked["GetWorkers"] == 1

    run(test())


def test_health_is_told_with_its_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FRESH_S", 0.0)
    monkeypatch.setattr(module, "FRESH_TIMES", 0)
    monkeypatch.setattr(module, "SUPERVISOR_S", 0.05)

    async def test() -> None:
        known = Facts(1)
        answer = await known.exposition.health("")
        assert (answer.status, json.loads(answer.body)["status"], answer.content_type) == (
            200,
            "ok",
            "application/json",
        )
        known = Facts(2)
        answer = await known.exposition.health("")
        assert answer.status == 200
        assert json.loads(answer.body)["reasons"] == [f"1 rule is pending: {2:012x}"]
        known.state = "waiting"
        answer = await known.exposition.health("")
        assert (answer.status, json.loads(answer.body)["status"]) == (503, "failing")
        known.supervisor_answers = False
        answer = await known.exposition.health("")
        assert answer.status == 503
        assert json.loads(answer.body)["reasons"][0] == "the supervisor does not answer"
        assert b"mcrelay_supervisor_up 0.0" in (await known.exposition.metrics("")).body

    run(test())


def test_rules_that_change_meanwhile_are_listed_anew_and_a_failure_does_not_last() -> None:
    async def test() -> None:
        known = Facts(8)

        def once() -> None:
            known.meanwhile = lambda: None
            del known.rules[2]  # the page's last

        known.meanwhile = once
        assert (await known.exposition.metrics("")).status == 200
        known = Facts(100)
        known.meanwhile = lambda: known.rules.__delitem__(slice(0, 4))
        with pytest.raises(Busy):
            await known.exposition.metrics("")
        known.meanwhile = lambda: None
        assert (await known.exposition.metrics("")).status == 200

    run(test())

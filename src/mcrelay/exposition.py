"""Exposition: what scrapers get at /metrics and /health, when, and what that costs the control plane.

Owns the gathering of a snapshot, by the same requests that clients make, and how long it is good for: however many
scrapers come, facts are gathered once a second at most, less often where that takes long, and rendered once for each
format. Everything takes turns with the rest of the event loop. The data planes do nothing for it.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol, TypeVar

import msgspec

from mcrelay import __version__
from mcrelay.api import GetStats, GetWorkers, InterfaceFacts, ListRules, RuleFacts, Rules, RuleStats, Stats, Workers
from mcrelay.errors import Busy, Error
from mcrelay.health import Health, judge
from mcrelay.messages import Message
from mcrelay.metrics import Listing, Remainder, Snapshot, chosen_format, rendered
from mcrelay.scrapers import Answer, Scrapers
from mcrelay.turns import in_turns

FRESH_S: Final = 1.0  # for which facts are good, from when they are gathered
FRESH_TIMES: Final = 3  # or for so many times as long as that took: three quarters of the time are for others
SUPERVISOR_S: Final = 2.0  # for its answer
TRIES: Final = 5  # against those who change rules while they are listed
JSON: Final = "application/json"

Serve = Callable[[Message], Coroutine[None, None, Message]]
Keep = Callable[[asyncio.Task[None]], None]
T = TypeVar("T")


class Expose(Protocol):
    def __call__(self, serve: Serve, clients: Callable[[], int], keep: Keep) -> Scrapers: ...


def expose(serve: Serve, clients: Callable[[], int], keep: Keep, *, rules_max: int) -> Scrapers:
    """What serves scrapers: `serve` answers requests of the API, `clients` says how many are connected, `keep` holds a
    task until it is done."""
    exposition = Exposition(serve, clients, rules_max)
    return Scrapers({"/metrics": exposition.metrics, "/health": exposition.health}, keep)


@dataclass
class Issue:
    """A snapshot, and what was made of it."""

    snapshot: Snapshot
    health: Health
    begun: float  # in the loop's time
    gathered: float
    texts: dict[str, asyncio.Task[bytes]] = field(default_factory=dict)  # by content type


class Exposition:
    def __init__(self, serve: Serve, clients: Callable[[], int], rules_max: int) -> None:
        self._serve = serve
        self._clients = clients
        self._rules_max = rules_max
        self._remainder = Remainder()
        self._issue: asyncio.Task[Issue] | None = None
        self._scrape_s: float | None = None
        self._loop = asyncio.get_running_loop()

    async def metrics(self, accept: str) -> Answer:
        """In the format that the request asks for. Error if the rules do not stand still."""
        content_type = chosen_format(accept)
        issue = await self._current()
        text = issue.texts.get(content_type)
        if text is None:
            text = issue.texts[content_type] = self._loop.create_task(self._render(issue, content_type))
        return Answer(200, content_type, await asyncio.shield(text))

    async def health(self, accept: str) -> Answer:
        """Status and reasons, in JSON. 503 if the daemon does not do its work."""
        health = (await self._current()).health
        body = {"status": health.status, "version": __version__, "reasons": health.reasons}
        return Answer(503 if health.status == "failing" else 200, JSON, msgspec.json.encode(body) + b"\n")

    async def _current(self) -> Issue:
        """The last one, or the next if that is not good any more. Whoever waits for it may go away: others do, too."""
        if self._issue is None or (self._issue.done() and self._is_stale(self._issue)):
            self._issue = self._loop.create_task(self._gather())
        return await asyncio.shield(self._issue)

    def _is_stale(self, issue: asyncio.Task[Issue]) -> bool:
        if issue.exception() is not None:
            return True
        done = issue.result()
        fresh_s = max(FRESH_S, FRESH_TIMES * (done.gathered - done.begun), FRESH_TIMES * (self._scrape_s or 0.0))
        return done.gathered + fresh_s <= self._loop.time()

    async def _render(self, issue: Issue, content_type: str) -> bytes:
        pieces = []
        for piece in rendered(issue.snapshot, content_type):
            pieces.append(piece)
            await asyncio.sleep(0)
        self._scrape_s = self._loop.time() - issue.begun
        return b"".join(pieces)

    # Facts.

    async def _gather(self) -> Issue:
        begun = self._loop.time()
        workers = await self._workers()
        processes = workers.processes if workers else None
        rules, interfaces = await _steadily(self._rules)
        stats = await _steadily(self._stats)
        listing = Listing(self._rules_max)
        unlisted = 0
        async for rule in in_turns(stats.rules):
            if rule.id in rules and not listing.take(rules[rule.id], rule):
                self._remainder.count(rule)
                unlisted += 1
        snapshot = Snapshot(
            version=__version__,
            generation=stats.generation,
            processes=processes,
            started_s=workers.started_s if workers else None,
            file=workers.file if workers else None,
            workers=stats.workers,
            interfaces=interfaces,
            states=Counter(facts.state for facts in rules.values()),
            listed=listing.rules,
            others=self._remainder.total(),
            unlisted=unlisted,
            clients=self._clients(),
            frames_malformed=stats.frames_malformed,
            scrape_s=self._scrape_s,
        )
        return Issue(snapshot, judge(processes, rules.values()), begun, self._loop.time())

    async def _workers(self) -> Workers | None:
        """None if the supervisor does not answer."""
        try:
            async with asyncio.timeout(SUPERVISOR_S):
                workers = await self._serve(GetWorkers(id=0))
        except (TimeoutError, Error):
            return None
        assert isinstance(workers, Workers)
        return workers

    async def _rules(self) -> tuple[dict[str, RuleFacts], Sequence[InterfaceFacts]]:
        """By id, in the order of their addition, and the interfaces that they use."""
        found: dict[str, RuleFacts] = {}
        while True:
            page = await self._serve(ListRules(id=0, after=next(reversed(found), None)))
            assert isinstance(page, Rules)
            found |= {facts.id: facts for facts in page.rules}
            if not page.more:
                return found, page.interfaces
            await asyncio.sleep(0)

    async def _stats(self) -> Stats:
        """Of all rules, each once."""
        found: dict[str, RuleStats] = {}
        while True:
            page = await self._serve(GetStats(id=0, after=next(reversed(found), None)))
            assert isinstance(page, Stats)
            found |= {rule.id: rule for rule in page.rules}
            if not page.more:
                return msgspec.structs.replace(page, rules=tuple(found.values()))
            await asyncio.sleep(0)


async def _steadily(gather: Callable[[], Coroutine[None, None, T]]) -> T:
    """What is gathered page by page, from the start again if a page's last rule went away."""
    for _ in range(TRIES):
        try:
            return await gather()
        except Busy:
            await asyncio.sleep(0)
    raise Busy("the rules change all the time", "ask again")

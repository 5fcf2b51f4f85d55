"""Subscriptions: clients that are told what happens.

Owns who wants to know what, and the look at the counters once a second while anybody does: with nobody there, it costs
nothing. What a change of a rule, an interface or a worker is, its messages say; flows.py knows what the counters tell.
Nobody is waited for: a subscriber that does not read is closed like any client (clients.py). Others have their turns
while many are told much.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Final

from mcrelay.api import Event, EventKind, Happened, Subscribe, Subscribed
from mcrelay.counters import Page
from mcrelay.errors import Busy, Unavailable
from mcrelay.flows import Flows, Look
from mcrelay.flowtable import FlowTable
from mcrelay.messages import InterfaceRecord, Message, RuleRecord, WorkerChanged
from mcrelay.settings import EventsSection
from mcrelay.taps import Watcher
from mcrelay.turns import in_turns

log = logging.getLogger(__name__)

LOOK_S: Final = 1.0
TEXT_MAX: Final = 400  # characters: a rule may have a thousand outputs
EVENTS_PER_MESSAGE: Final = 500  # of less than 1 KiB: they fit a frame
UNTOLD_MAX: Final = 200  # messages: 100,000 events
SUBSCRIBERS_MAX: Final = 64  # each is told of 10,000 new rules in some 10 ms
SUBSCRIBERS_RESERVED: Final = 16  # of which for the privileged: nobody else can lock them out


class Subscriptions:
    """All of them. `table` gives the rules as they are now; `pages` are the workers' counters."""

    def __init__(self, table: Callable[[], FlowTable], pages: Sequence[Page], settings: EventsSection) -> None:
        self._table = table
        self._pages = pages
        self._flows = Flows(settings)
        self._wanted: dict[Watcher, tuple[int, frozenset[EventKind]]] = {}  # the request's id; no kinds: all
        self._looking: asyncio.Task[None] | None = None
        self._untold: deque[Sequence[Event]] = deque()
        self._telling: asyncio.Task[None] | None = None
        self._over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def configure(self, settings: EventsSection) -> None:
        self._flows.settings = settings

    async def serve(self, message: Subscribe, watcher: Watcher) -> Message:
        """Until the client is gone or the daemon ends. One subscription for each client: a later one replaces it. Busy
        if there are too many."""
        room = SUBSCRIBERS_MAX if watcher.is_privileged else SUBSCRIBERS_MAX - SUBSCRIBERS_RESERVED
        if len(self._wanted) >= room and watcher not in self._wanted:
            raise Busy(f"{len(self._wanted)} clients are told of events already", "end one, or try again")
        self._wanted[watcher] = message.id, frozenset(message.kinds)
        watcher.reply(Subscribed(id=message.id))
        if self._looking is None or self._looking.done():
            self._looking = self._begin(self._look())
        over = self._over
        try:
            await asyncio.wait({over, watcher.gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._wanted.pop(watcher, None)
            if not self._wanted and self._looking:
                self._looking.cancel()
                self._looking = None
        if over.done():
            over.result()  # unless it was an error that ended it
        raise Unavailable("the daemon stops, or another takes its place", "subscribe again")

    def end(self) -> None:
        if not self._over.done():
            self._over.set_result(None)

    # What happens.

    def rules_changed(
        self, removed: Sequence[tuple[str, RuleRecord]], added: Sequence[tuple[str, RuleRecord]], reason: str = ""
    ) -> None:
        """Ids and records, and why rules were changed if nobody has asked for it."""
        if not self._wanted:
            return
        gone, come = dict(removed), dict(added)
        self._flows.forget(gone.keys() - come.keys())
        events = [_event("rule_removed", _label(i, r), _text(r)) for i, r in gone.items() if i not in come]
        events += [
            _event("rule_changed", _label(i, r), reason[:TEXT_MAX] or _text(r))
            if i in gone
            else _event("rule_added", _label(i, r), _text(r))
            for i, r in come.items()
        ]
        self._tell(events)

    def interfaces_changed(self, before: Mapping[str, InterfaceRecord], after: Mapping[str, InterfaceRecord]) -> None:
        if not self._wanted:
            return
        events = []
        for name, record in after.items():
            had = before[name].problems if name in before else {}
            if record.problems and not had:
                events.append(_event("interface_down", name, next(iter(record.problems.values()))))
            elif had and not record.problems:
                events.append(_event("interface_up", name, "it is there and in use"))
        self._tell(events)

    def worker_changed(self, message: WorkerChanged) -> None:
        figures = {"restarts": float(message.restarts), **({} if message.pid is None else {"pid": float(message.pid)})}
        kind: EventKind = "worker_up" if message.is_ready else "worker_down"
        text = "forwards" if message.is_ready else "its process has ended; another takes its place"
        self._tell([_event(kind, str(message.index), text, figures)])

    async def _look(self) -> None:
        """At all rules, again and again."""
        self._flows = Flows(self._flows.settings)  # nobody has forgotten those that went while nobody looked
        async for rule_id in in_turns(list(self._table().records)):
            if record := self._table().records.get(rule_id):
                self._flows.begin(self._at(rule_id, record), time.monotonic())
        while True:
            await asyncio.sleep(LOOK_S)
            now_s = time.monotonic()
            events = []
            async for rule_id, record in in_turns(list(self._table().records.items())):
                if self._table().records.get(rule_id) is not record:
                    continue  # it went or changed meanwhile, and its counters may be another's
                for change in self._flows.see(self._at(rule_id, record), now_s):
                    events.append(_event(change.kind, _label(rule_id, record), change.text, change.values))
            self._tell(events)

    def _at(self, rule_id: str, record: RuleRecord) -> Look:
        packets = dropped = until_ns = 0
        for page in self._pages:
            came, _bytes, _forwarded, lost = page.rule(record.counter)
            packets += came
            dropped += lost
            until_ns = max(until_ns, page.loop(record.counter).suspended_until_ns)
        return Look(rule_id, packets, dropped, until_ns > time.monotonic_ns())

    def _begin(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        task.add_done_callback(_done)
        return task

    def _tell(self, events: Sequence[Event]) -> None:
        if len(self._untold) > UNTOLD_MAX:
            log.warning("events come faster than they can be told: those who subscribed have to do so again")
            self._untold.clear()
            self._over.set_exception(Busy("events come faster than they can be told", "subscribe again"))
            self._over = asyncio.get_running_loop().create_future()
            return
        self._untold.extend(events[at : at + EVENTS_PER_MESSAGE] for at in range(0, len(events), EVENTS_PER_MESSAGE))
        if self._untold and (self._telling is None or self._telling.done()):
            self._telling = self._begin(self._tell_all())

    async def _tell_all(self) -> None:
        while self._untold:
            events = self._untold.popleft()
            for watcher in list(self._wanted):
                if watcher not in self._wanted:
                    continue  # it went before its turn came
                request_id, kinds = self._wanted[watcher]
                if wanted := tuple(event for event in events if not kinds or event.kind in kinds):
                    watcher.reply(Happened(id=request_id, events=wanted))
                    await asyncio.sleep(0)


def _done(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()):
        log.error("events are not told any more: %r", error, exc_info=error)


def _event(kind: EventKind, subject: str, text: str, values: dict[str, float] | None = None) -> Event:
    return Event(time_ns=time.time_ns(), kind=kind, subject=subject, text=text, values=values or {})


def _label(rule_id: str, record: RuleRecord) -> str:
    return record.name or rule_id


def _text(record: RuleRecord) -> str:
    shown = " ".join(record.outputs)
    return f"{record.input} -> {shown}"[:TEXT_MAX]

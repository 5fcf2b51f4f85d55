"""The control plane worker: the client API over the flow table.

Owns the flow table (what the supervisor has recorded as active, and where each rule is counted) and which counters are
free; clients.py has the connections. A change is validated here, asked of the supervisor, and answered to the client
when the supervisor's record of it has arrived on FD 3: that stream is the only thing that changes the table. Opens no
socket, connects to nothing, and holds no privilege; forwarding goes on without it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec

from mcrelay import __version__, levels, logs, worker
from mcrelay.adoption import Adoption
from mcrelay.api import (
    PROTOCOL,
    Add,
    Added,
    Change,
    Changed,
    GetLogLevels,
    GetStats,
    GetStatus,
    GetVersion,
    GetWorkers,
    ListRules,
    LogLevels,
    Pause,
    Paused,
    Ping,
    Pong,
    Remove,
    Removed,
    Restarted,
    RestartWorker,
    RuleFacts,
    Rules,
    SetLogLevels,
    StartTap,
    Stats,
    Status,
    Subscribe,
    TapEnded,
    TapStarted,
    Upgrade,
    Upgraded,
    Version,
    Workers,
)
from mcrelay.channel import Channel, close_descriptors
from mcrelay.clients import Clients, Connection
from mcrelay.codec import Codec, in_frames
from mcrelay.config import Reading
from mcrelay.config_files import read_opened
from mcrelay.errors import Busy, Error, RuleError, Unavailable
from mcrelay.flowtable import FlowTable
from mcrelay.frames import Malformed
from mcrelay.messages import (
    LONG_TEXT_MAX,
    Acknowledge,
    Applied,
    ApplyRules,
    ChangeLevels,
    Client,
    Configure,
    GetProcesses,
    HandedOver,
    HandOver,
    Levels,
    LevelsChanged,
    Message,
    Probe,
    Processes,
    Ready,
    RecordRules,
    Refused,
    Replaced,
    ReplaceWorker,
    RequestTap,
    RuleRecord,
    Scraper,
    SetLevels,
    Shutdown,
    Start,
    TapOpened,
    WorkerChanged,
)
from mcrelay.process import name_process
from mcrelay.rules import Rule, RuleSet, check_generation
from mcrelay.ruletext import parse_rule
from mcrelay.subscriptions import Subscriptions
from mcrelay.tally import Tally, map_pages
from mcrelay.taps import Tap
from mcrelay.turns import in_turns
from mcrelay.worker import Life

if TYPE_CHECKING:
    from mcrelay.exposition import Expose

log = logging.getLogger("mcrelay.control")  # we may be __main__

SUPERVISOR_S: Final = 10.0  # for the answer to one request
UPGRADE_S: Final = 30.0
TRIES: Final = 20  # against others who change rules
RECORDED_S: Final = 2.0  # for a change of somebody else's to be known here
COUNT_MAX: Final = 2**53  # packets of a tap: as good as without end
FINISH_S: Final = 0.5  # for requests that are under way at the end

Reply = TypeVar("Reply", bound=Message)
Made = TypeVar("Made")


class Unanswered(Busy):
    """Whether it happened is not known."""


class ControlPlane:
    """`expose`, where metrics are wanted, makes what serves them."""

    def __init__(self, start: Start, descriptors: list[int], life: Life, *, expose: Expose | None = None) -> None:
        request_fd, *page_fds = descriptors
        self._life = life
        self._start = start
        self._frames_malformed = 0
        self._table = FlowTable()
        self._pages = map_pages(page_fds)
        self._tally = Tally(self._pages)
        self._clients = Clients(self.serve, self.watch, self.keep)
        self._subscriptions = Subscriptions(lambda: self._table, self._pages, start.settings.events)
        self._adoption = Adoption(start.config, start.settings, self, self._subscriptions.configure)
        self._scrapers = expose(self.serve, lambda: len(self._clients), self.keep) if expose else None
        self._taps: set[Tap] = set()
        self._slot_names: dict[int, str] = {}  # of interfaces
        self._tasks: set[asyncio.Task[None]] = set()
        self._asked: dict[int, asyncio.Future[tuple[Message, list[int]]]] = {}
        self._last_id = 0
        self._in_snapshot = False
        self._recorded = asyncio.Condition()
        self._requests = Channel(
            "request_sock",
            socket.socket(fileno=request_fd),
            Codec("request_sock", "supervisor", "control"),
            self._from_requests,
            lambda reason: life.end(),
            on_malformed=self._count_malformed,
        )
        self._requests.send(Ready())

    @property
    def table(self) -> FlowTable:
        return self._table

    def _count_malformed(self, error: Malformed) -> None:
        self._frames_malformed += 1

    def keep(self, task: asyncio.Task[None]) -> None:
        """Hold a task until it is done; the loop alone would not."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # The supervisor.

    def from_supervisor(self, message: Message, descriptors: list[int]) -> None:
        match message:
            case Client():
                self._clients.accept(message, descriptors[0])
            case Scraper() if self._scrapers:
                self._scrapers.accept(message, descriptors[0])
            case RecordRules():
                self._record(message)
            case WorkerChanged():
                self._subscriptions.worker_changed(message)
            case Shutdown():
                self.keep(asyncio.get_running_loop().create_task(self._finish()))
            case _:
                close_descriptors(descriptors)

    async def _finish(self) -> None:
        """Answer what is about to be answered, and exit."""
        self._end_taps(Unavailable("the daemon stops, or another takes its place", "start the tap again"))
        self._subscriptions.end()
        under_way = self._tasks - {asyncio.current_task()}
        if under_way:
            await asyncio.wait(under_way, timeout=FINISH_S)
        self._clients.close()
        self._life.end()

    def _record(self, message: RecordRules) -> None:
        if message.snapshot:
            self._table = FlowTable()
            self._in_snapshot = True
        # One that is another by now, in its own place: what pausing an output does.
        is_one = len(message.added) == len(message.removed) == 1
        removed = [(rule_id, self._table.records[rule_id]) for rule_id in message.removed]
        if is_one and self._table.replace(message.added[0]):
            added = [(message.removed[0], message.added[0])]
        else:
            for rule_id in message.removed:
                self._table.take(rule_id)
            added = [(self._table.put(record), record) for record in message.added]
        if not self._in_snapshot:
            self._subscriptions.rules_changed(removed, added, message.reason)
        if message.complete:
            if self._in_snapshot:
                # What a former life of ours has given out is known now.
                self._table = FlowTable(self._table.rules, self._table.records)
                self._in_snapshot = False
            before = self._table.interfaces
            self._table.interfaces = {record.name: record for record in message.interfaces}
            self._subscriptions.interfaces_changed(before, self._table.interfaces)
            self._slot_names.clear()
            self._slot_names.update((record.slot, record.name) for record in message.interfaces)
            self._end_taps_of_none()
            self._table.generation = message.generation
            self.keep(asyncio.get_running_loop().create_task(self._notify_recorded()))

    async def _notify_recorded(self) -> None:
        async with self._recorded:
            self._recorded.notify_all()

    def _from_requests(self, message: Message, descriptors: list[int]) -> None:
        match message:
            case Applied() | Refused() | LevelsChanged() | Replaced() | HandedOver() | Processes() | TapOpened():
                future = self._asked.pop(message.id, None)
                if future and not future.done():
                    future.set_result((message, descriptors))
                else:
                    close_descriptors(descriptors)
            case SetLevels():
                logs.set_levels(message.levels)
                self._requests.send(Acknowledge(ticket=message.ticket))
            case Probe():
                self._requests.send(Acknowledge(ticket=message.ticket))
            case Configure():
                self.keep(asyncio.get_running_loop().create_task(self._configure(message, descriptors)))
            case ListRules() | GetStats():
                self.keep(asyncio.get_running_loop().create_task(self._serve_supervisor(message)))

    async def _serve_supervisor(self, message: Message) -> None:
        try:
            self._requests.send(await self.serve(message))
        except (Error, ConnectionError) as error:
            log.warning("cannot answer the supervisor's %s: %s", type(message).__name__, error)

    async def _configure(self, message: Configure, descriptors: list[int]) -> None:
        """Have what the files say, all of it or nothing, and tell the supervisor."""
        refusal: Error
        try:
            try:
                reading = Reading(read_opened(list(zip(message.files, descriptors, strict=True))), alone=False)
            finally:
                close_descriptors(descriptors)
            async for _step in in_turns(reading.steps()):
                pass
            await self._wait_recorded(message.generation)
            found = reading.result()
            await self._adoption.adopt(found, piecemeal=message.occasion == "start")
        except Error as error:
            refusal = error
        except Exception as error:  # our mistake, for which the supervisor shall not wait
            log.exception("cannot take up the configuration")
            refusal = Error(f"unexpected: {error!r}", "the daemon's log says more")
        else:
            in_force, wanted = self._adoption.settings, found.settings
            self._requests.send(Acknowledge(ticket=message.ticket, settings=in_force, wanted=wanted))
            return
        why, hint = refusal.message[:LONG_TEXT_MAX], refusal.hint[:LONG_TEXT_MAX]
        self._requests.send(Acknowledge(ticket=message.ticket, error=why, hint=hint, code=refusal.code))

    async def on_these_rules(self, attempt: Callable[[int], Awaitable[Made]]) -> Made:
        """Make a change that is meant for the rules of the generation that it gets, and once more if they are others by
        then. Busy if that has no end."""
        for _ in range(TRIES):
            generation = self._table.generation
            try:
                return await attempt(generation)
            except Error as error:
                if error.code != "conflict":
                    raise
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RECORDED_S):
                    await self._wait_recorded(generation + 1)
        raise Busy("many changes are under way", "try again")

    async def _ask(
        self, make: Callable[[int], Iterable[Message]], expect: type[Reply], patience_s: float = SUPERVISOR_S
    ) -> Reply:
        """Ask the supervisor, in one message or several. The Error of a refusal; Unanswered if it does not answer."""
        reply, _none = await self._ask_for(make, expect, patience_s)
        return reply

    async def _ask_for(
        self, make: Callable[[int], Iterable[Message]], expect: type[Reply], patience_s: float = SUPERVISOR_S
    ) -> tuple[Reply, list[int]]:
        """The same, with the descriptors that came with the answer."""
        self._last_id += 1
        request_id = self._last_id
        future: asyncio.Future[tuple[Message, list[int]]] = asyncio.get_running_loop().create_future()
        self._asked[request_id] = future
        try:
            for message in make(request_id):
                self._requests.send(message)
            async with asyncio.timeout(patience_s):
                reply, descriptors = await future
        except TimeoutError:
            raise Unanswered("the supervisor does not answer", "its log says more") from None
        finally:
            self._asked.pop(request_id, None)
        if isinstance(reply, Refused):
            raise Error(reply.message, reply.hint, code=reply.code)
        if not isinstance(reply, expect):
            close_descriptors(descriptors)
            raise Error(f"the supervisor answered with {type(reply).__name__}", "its log says more")
        return reply, descriptors

    async def _wait_recorded(self, generation: int) -> None:
        async with self._recorded:
            await self._recorded.wait_for(lambda: self._table.generation >= generation)

    # Requests.

    async def serve(self, message: Message) -> Message:
        """The reply to a request, or an Error."""
        match message:
            case Ping():
                return Pong(id=message.id)
            case GetVersion():
                return Version(id=message.id, version=__version__, protocol=PROTOCOL)
            case GetStatus():
                return self._status(message)
            case Add():
                return await self._add(message)
            case Remove():
                return await self._remove(message)
            case Pause():
                return await self._pause(message)
            case Change():
                return await self._change(message)
            case ListRules():
                return self._list(message)
            case GetStats():
                return self._stats(message)
            case GetWorkers():
                processes = await self._ask(lambda i: [GetProcesses(id=i)], Processes)
                return Workers(
                    id=message.id, processes=processes.processes, started_s=processes.started_s, file=processes.file
                )
            case GetLogLevels():
                return _levels_reply(message.id, logs.levels())
            case SetLogLevels():
                return await self._set_log_levels(message)
            case Upgrade():
                handed = await self._ask(lambda i: [HandOver(id=i)], HandedOver, UPGRADE_S)
                return Upgraded(id=message.id, pid=handed.pid)
            case RestartWorker():
                replaced = await self._ask(lambda i: [ReplaceWorker(id=i, index=message.index)], Replaced)
                return Restarted(id=message.id, index=message.index, pid=replaced.pid)
            case _:
                raise Error(f"{type(message).__name__} is not served")

    def _status(self, message: GetStatus) -> Status:
        return Status(
            id=message.id,
            version=__version__,
            protocol=PROTOCOL,
            config=self._start.config,
            settings=self._adoption.settings,
            rootless=self._start.settings.daemon.rootless,
            generation=self._table.generation,
            rules=len(self._table.rules),
        )

    async def _set_log_levels(self, message: SetLogLevels) -> LogLevels:
        changed = await self.change_levels(levels.checked(message.level, message.components))
        return _levels_reply(message.id, changed.levels)

    async def change_levels(self, change: levels.Change) -> LevelsChanged:
        level, components = change
        return await self._ask(lambda i: [ChangeLevels(id=i, level=level, components=components)], LevelsChanged)

    async def _add(self, message: Add) -> Added:
        rule = parse_rule(message.input, message.outputs, message.name)
        applied = await self.apply([rule], [])
        return Added(id=message.id, rule=self._facts(rule), generation=applied.generation, workers=applied.workers)

    async def _remove(self, message: Remove) -> Removed:
        rule = self._table.rules.find(message.rule)
        applied = await self.apply([], [rule])
        return Removed(id=message.id, rule=self._facts(rule), generation=applied.generation, workers=applied.workers)

    async def _pause(self, message: Pause) -> Paused:
        """A rule in its own place, counted where it was."""

        async def attempt(generation: int) -> Paused:
            rule = self._table.rules.find(message.rule)
            changed = rule.with_paused(message.output, paused=message.paused)
            record = msgspec.structs.replace(self._table.records[rule.id], outputs=tuple(map(str, changed.outputs)))
            ask = functools.partial(ApplyRules, add=(record,), remove=(rule.id,), complete=True, expect=generation)
            applied = await self._ask(lambda i: [ask(id=i)], Applied)
            await self._wait_recorded(applied.generation)
            return Paused(
                id=message.id, rule=self._facts(changed), generation=applied.generation, workers=applied.workers
            )

        return await self.on_these_rules(attempt)

    async def _change(self, message: Change) -> Changed:
        check_generation(message.expect, self._table.generation)
        rules = [parse_rule(text.input, text.outputs, text.name) async for text in in_turns(message.add)]
        gone = list(dict.fromkeys(self._table.rules.find(name) for name in message.remove))
        if not rules and not gone:  # nothing that anybody has to know
            return Changed(id=message.id, generation=self._table.generation, added=0, removed=0, workers=0)
        applied = await self.apply(rules, gone, message.expect)
        return Changed(
            id=message.id,
            generation=applied.generation,
            added=len(rules),
            removed=len(gone),
            workers=applied.workers,
        )

    async def apply(self, add: Sequence[Rule], remove: Sequence[Rule], expect: int | None = None) -> Applied:
        """Have the supervisor make a change, and wait until it is recorded."""
        going = RuleSet.of(remove)
        records: list[RuleRecord] = []
        try:
            for rule in add:
                self._table.rules.check_addable(rule, unless=going)
                records.append(self._table.reserve(rule))
            ids = tuple(rule.id for rule in remove)

            def pieces(request_id: int) -> Iterator[Message]:
                for piece, last in in_frames(records):
                    yield ApplyRules(id=request_id, add=piece, remove=ids if last else (), complete=last, expect=expect)

            applied = await self._ask(pieces, Applied)
        except Unanswered:
            raise  # the counters may come into use yet, so they stay taken
        except (Error, ValueError, ConnectionError):
            for record in records:
                self._table.free(record)
            raise
        await self._wait_recorded(applied.generation)
        return applied

    async def watch(self, message: StartTap | Subscribe, connection: Connection) -> Message:
        """Show a client what it wants to see, until it has seen enough. The last message about it."""
        if isinstance(message, Subscribe):
            return await self._subscriptions.serve(message, connection)
        return await self._tap(message, connection)

    async def _tap(self, message: StartTap, connection: Connection) -> TapEnded:
        rule = self._table.rules.find(message.rule)
        record = self._table.records[rule.id]
        opened, descriptors = await self._ask_for(
            lambda i: [
                RequestTap(id=i, rule=rule.id, count=message.count or COUNT_MAX, snap_length=message.snap_length)
            ],
            TapOpened,
        )
        tap = Tap(
            message,
            record.counter,
            opened.workers,
            [socket.socket(fileno=descriptor) for descriptor in descriptors],
            self._slot_names,
            dict(zip(record.output_counters, record.outputs, strict=True)),
        )
        self._taps.add(tap)
        try:
            self._end_taps_of_none()
            connection.reply(TapStarted(id=message.id, rule=self._facts(rule), workers=len(opened.workers)))
            await tap.run(connection)
        finally:
            self._taps.discard(tap)
        return TapEnded(id=message.id)

    def _end_taps(self, why: Error, *, unless: Collection[int] = ()) -> None:
        """But those of rules that are counted at one of these."""
        for tap in self._taps:
            if tap.rule_counter not in unless:
                tap.end(why)

    def _end_taps_of_none(self) -> None:
        if self._taps:
            there = {record.counter for record in self._table.records.values()}
            self._end_taps(RuleError("the rule has been removed or replaced", "start the tap again"), unless=there)

    def _list(self, message: ListRules) -> Rules:
        rules, more = self._table.page(message.after)
        return Rules(
            id=message.id,
            generation=self._table.generation,
            rules=tuple(self._facts(rule) for rule, _record in rules),
            interfaces=tuple(self._tally.interface(record) for _name, record in sorted(self._table.interfaces.items())),
            more=more,
        )

    def _facts(self, rule: Rule) -> RuleFacts:
        facts = self._table.facts(rule)
        record = self._table.records.get(rule.id)
        left_ns = max(self._tally.loop(record).suspended_until_ns - time.monotonic_ns(), 0) if record else 0
        if not left_ns:
            return facts
        why = f"another relay sends its output back; for {left_ns / 1e9:.0f} s more (see 'mcrelay stats')"
        return msgspec.structs.replace(facts, state="suspended", problems=(*facts.problems, why))

    def _stats(self, message: GetStats) -> Stats:
        rules, more = self._table.page(message.after)
        return Stats(
            id=message.id,
            generation=self._table.generation,
            workers=self._tally.workers(),
            rules=tuple(self._tally.rule(rule, record) for rule, record in rules),
            more=more,
            frames_malformed=self._frames_malformed + self._clients.frames_malformed,
        )


def _levels_reply(request_id: int, found: Levels) -> LogLevels:
    return LogLevels(id=request_id, level=found.level, components=found.components, known=levels.COMPONENTS)


def main() -> None:
    """python -m mcrelay.control UID GID FORMAT [RULES], with FD 3. With RULES metrics are served, of so many rules one
    by one; what that takes is imported before the sandbox, and only then."""
    identity = worker.identity(sys.argv[1:4])
    make: Callable[[Start, list[int], Life], ControlPlane] = ControlPlane
    if len(sys.argv) > 4:
        from mcrelay.exposition import expose

        make = functools.partial(ControlPlane, expose=functools.partial(expose, rules_max=int(sys.argv[4])))
    name_process("mcrelay-control")
    worker.main("control", make, *identity)


if __name__ == "__main__":
    main()

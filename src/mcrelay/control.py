"""The control plane worker: the client API over the flow table.

Owns the client connections, the flow table (what the supervisor has recorded as active, and where each rule is counted)
and which counters are free. A change is validated here, asked of the supervisor, and answered to the client when the
supervisor's record of it has arrived on FD 3: that stream is the only thing that changes the table. Opens no socket,
connects to nothing, and holds no privilege; forwarding goes on without it.
"""

from __future__ import annotations

import asyncio
import logging
import mmap
import os
import socket
import sys
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from typing import Final, TypeVar

import msgspec

from mcrelay import __version__, counters, worker
from mcrelay.channel import Channel
from mcrelay.codec import Codec, in_frames
from mcrelay.errors import Busy, Error, RuleError
from mcrelay.flowtable import FlowTable
from mcrelay.frames import Malformed
from mcrelay.limits import CLIENTS_MAX, RULES_MAX
from mcrelay.messages import (
    PROTOCOL,
    Add,
    Added,
    Applied,
    ApplyRules,
    Change,
    Changed,
    Client,
    Failure,
    GetProcesses,
    GetStats,
    GetVersion,
    GetWorkers,
    HandedOver,
    HandOver,
    InterfaceFacts,
    InterfaceRecord,
    ListRules,
    Message,
    OutputStats,
    Ping,
    Pong,
    Processes,
    Ready,
    RecordRules,
    Refused,
    Remove,
    Removed,
    Replaced,
    ReplaceWorker,
    Restarted,
    RestartWorker,
    RuleFacts,
    RuleRecord,
    Rules,
    RuleStats,
    RuleText,
    Shutdown,
    Start,
    Stats,
    Upgrade,
    Upgraded,
    Version,
    Workers,
    WorkerStats,
)
from mcrelay.process import name_process
from mcrelay.rules import Rule, RuleSet, parse_rule
from mcrelay.turns import in_turns
from mcrelay.worker import Life

log = logging.getLogger(__name__)

REQUESTS_MAX: Final = 32  # of one client, under way at once
MALFORMED_MAX: Final = 16  # of one client, before it is sent away
CHANGE_MAX: Final = 8 * 1024 * 1024  # bytes of one change, all its pieces together: 60,000 outputs
TEXT_OVERHEAD: Final = 64  # bytes of memory of a text besides its characters
SUPERVISOR_S: Final = 10.0  # for the answer to one request
UPGRADE_S: Final = 30.0
FINISH_S: Final = 0.5  # for requests that are under way at the end
OUTPUTS_PER_REPLY: Final = 1500  # of rules listed, so that a reply fits a frame (about 300 bytes each)

Reply = TypeVar("Reply", bound=Message)


class Unanswered(Busy):
    """Whether it happened is not known."""


class Connection:
    """One client."""

    def __init__(self, control: ControlPlane, sock: socket.socket, peer: Client) -> None:
        self._control = control
        self._requests = 0
        self._incoming: tuple[list[RuleText], list[str]] = [], []  # of an unfinished Change
        self._incoming_id: int | None = None
        self._incoming_size = 0  # bytes
        self._refused: set[int] = set()  # changes whose last piece has not come
        self.channel = Channel(
            f"client {peer.pid} of user {peer.uid}",
            sock,
            Codec("client", "client", "control"),
            self._received,
            self._closed,
            on_malformed=self._malformed,
        )

    def reply(self, message: Message) -> None:
        try:
            self.channel.send(message)
        except Busy:
            log.warning("%s does not read: closed", self.channel.name)
            self.close()
        except ConnectionError:
            pass  # it went away before it had its answer

    def close(self) -> None:
        self.channel.close()
        self._control.forget(self)

    def _closed(self, reason: str) -> None:
        self._control.forget(self)

    def _malformed(self, error: Malformed) -> None:
        self._control.frames_malformed += 1
        if self._incoming_id is not None:
            # It may have been a piece of that: what is left is not what was meant.
            self._refused.add(self._incoming_id)
            self._forget_incoming()
        hint = f"a request is one of: {', '.join(_tags())}; see docs/protocol.md"
        self.reply(Failure(id=None, code="protocol", message=f"malformed request: {error.why}"[:4096], hint=hint))
        if self.channel.malformed >= MALFORMED_MAX:
            log.warning("%s sent %d malformed frames: closed", self.channel.name, MALFORMED_MAX)
            self.close()

    def _received(self, message: Message, descriptors: list[int]) -> None:
        if isinstance(message, Change) and not self._collect(message):
            return
        if self._requests >= REQUESTS_MAX:
            self.reply(_failure(message, Busy(f"{REQUESTS_MAX} requests are under way", "wait for their answers")))
        elif isinstance(message, Change):
            self._start(message, self._control.change(message.id, *self._incoming))
        else:
            self._start(message, self._control.serve(message))
        if isinstance(message, Change):
            self._forget_incoming()

    def _forget_incoming(self) -> None:
        self._incoming, self._incoming_id, self._incoming_size = ([], []), None, 0

    def _collect(self, piece: Change) -> bool:
        """Put a piece of a change to those before it; whether it is complete. One change of a client at a time. Of one
        that is refused, the pieces that still come are not the beginning of another."""
        if piece.id in self._refused:
            if piece.complete:
                self._refused.discard(piece.id)
            return False
        if self._incoming_id not in (None, piece.id):
            hint = "finish it first, or open another connection"
            self._refuse(piece, Busy(f"change {self._incoming_id} is not complete", hint))
            return False
        self._incoming_id = piece.id
        self._incoming_size += _size(piece)
        add, remove = self._incoming
        too_many = max(len(add) + len(piece.add), len(remove) + len(piece.remove)) > RULES_MAX
        if too_many or self._incoming_size > CHANGE_MAX:
            self._forget_incoming()
            limits = f"at most {RULES_MAX} rules of {CHANGE_MAX // 2**20} MiB are possible"
            self._refuse(piece, RuleError("the change is too long", limits))
            return False
        add.extend(piece.add)
        remove.extend(piece.remove)
        return piece.complete

    def _refuse(self, piece: Change, error: Error) -> None:
        self.reply(_failure(piece, error))
        if not piece.complete:
            self._refused.add(piece.id)
        if len(self._refused) > REQUESTS_MAX:
            log.warning("%s has begun %d changes that were refused: closed", self.channel.name, len(self._refused))
            self.close()

    def _start(self, message: Message, work: Coroutine[None, None, Message]) -> None:
        self._requests += 1
        self._control.keep(asyncio.get_running_loop().create_task(self._serve(message, work)))

    async def _serve(self, message: Message, work: Coroutine[None, None, Message]) -> None:
        try:
            self.reply(await work)
        except Error as error:
            self.reply(_failure(message, error))
        except Exception:
            log.exception("cannot serve %s", type(message).__name__)
            self.reply(_failure(message, Error("an error inside the daemon", "its log says more")))
        finally:
            self._requests -= 1


def _size(piece: Change) -> int:
    texts = (len(text.input) + sum(map(len, text.outputs)) + len(text.name or "") for text in piece.add)
    count = sum(2 + len(text.outputs) for text in piece.add) + len(piece.remove)
    return sum(texts) + sum(map(len, piece.remove)) + count * TEXT_OVERHEAD


def _tags() -> list[str]:
    return [str(t.__struct_config__.tag) for t in Codec("client", "client", "control").permitted]


def _failure(request: Message, error: Error) -> Failure:
    request_id = getattr(request, "id", None)
    return Failure(id=request_id, code=error.code, message=error.message[:4096], hint=error.hint[:4096])


class ControlPlane:
    def __init__(self, start: Start, descriptors: list[int], life: Life) -> None:
        request_fd, *page_fds = descriptors
        self._life = life
        self.frames_malformed = 0
        self._table = FlowTable()
        self._pages = [_map_page(fd) for fd in page_fds]
        self._clients: set[Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._asked: dict[int, asyncio.Future[Message]] = {}
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

    def _count_malformed(self, error: Malformed) -> None:
        self.frames_malformed += 1

    def keep(self, task: asyncio.Task[None]) -> None:
        """Hold a task until it is done; the loop alone would not."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # The supervisor.

    def from_supervisor(self, message: Message, descriptors: list[int]) -> None:
        match message:
            case Client():
                self._accept(message, descriptors[0])
            case RecordRules():
                self._record(message)
            case Shutdown():
                self.keep(asyncio.get_running_loop().create_task(self._finish()))

    async def _finish(self) -> None:
        """Answer what is about to be answered, and exit."""
        under_way = self._tasks - {asyncio.current_task()}
        if under_way:
            await asyncio.wait(under_way, timeout=FINISH_S)
        for client in list(self._clients):
            client.close()
        self._life.end()

    def _accept(self, peer: Client, descriptor: int) -> None:
        sock = socket.socket(fileno=descriptor)
        connection = Connection(self, sock, peer)
        self._clients.add(connection)
        if len(self._clients) > CLIENTS_MAX:
            busy = Busy(f"{CLIENTS_MAX} clients are connected", "close some, or try again later")
            connection.reply(Failure(id=None, code=busy.code, message=busy.message, hint=busy.hint))
            connection.close()

    def forget(self, connection: Connection) -> None:
        self._clients.discard(connection)

    def _record(self, message: RecordRules) -> None:
        if message.snapshot:
            self._table = FlowTable()
            self._in_snapshot = True
        for rule_id in message.removed:
            self._table.take(rule_id)
        for record in message.added:
            self._table.put(record)
        if message.complete:
            if self._in_snapshot:
                # What a former life of ours has given out is known now.
                self._table = FlowTable(self._table.rules, self._table.records)
                self._in_snapshot = False
            self._table.interfaces = {record.name: record for record in message.interfaces}
            self._table.generation = message.generation
            self.keep(asyncio.get_running_loop().create_task(self._notify_recorded()))

    async def _notify_recorded(self) -> None:
        async with self._recorded:
            self._recorded.notify_all()

    def _from_requests(self, message: Message, descriptors: list[int]) -> None:
        match message:
            case Applied() | Refused() | Replaced() | HandedOver() | Processes():
                future = self._asked.pop(message.id, None)
                if future and not future.done():
                    future.set_result(message)
            case ListRules() | GetStats():
                self.keep(asyncio.get_running_loop().create_task(self._serve_supervisor(message)))

    async def _serve_supervisor(self, message: Message) -> None:
        try:
            self._requests.send(await self.serve(message))
        except (Error, ConnectionError) as error:
            log.warning("cannot answer the supervisor's %s: %s", type(message).__name__, error)

    async def _ask(
        self, make: Callable[[int], Iterable[Message]], expect: type[Reply], patience_s: float = SUPERVISOR_S
    ) -> Reply:
        """Ask the supervisor, in one message or several. The Error of a refusal; Unanswered if it does not answer."""
        self._last_id += 1
        request_id = self._last_id
        future: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._asked[request_id] = future
        try:
            for message in make(request_id):
                self._requests.send(message)
            reply = await asyncio.wait_for(future, patience_s)
        except TimeoutError:
            raise Unanswered("the supervisor does not answer", "its log says more") from None
        finally:
            self._asked.pop(request_id, None)
        if isinstance(reply, Refused):
            raise Error(reply.message, reply.hint, code=reply.code)
        if not isinstance(reply, expect):
            raise Error(f"the supervisor answered with {type(reply).__name__}", "its log says more")
        return reply

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
            case Add():
                return await self._add(message)
            case Remove():
                return await self._remove(message)
            case ListRules():
                return self._list(message)
            case GetStats():
                return self._stats(message)
            case GetWorkers():
                processes = await self._ask(lambda i: [GetProcesses(id=i)], Processes)
                return Workers(id=message.id, processes=processes.processes)
            case Upgrade():
                handed = await self._ask(lambda i: [HandOver(id=i)], HandedOver, UPGRADE_S)
                return Upgraded(id=message.id, pid=handed.pid)
            case RestartWorker():
                replaced = await self._ask(lambda i: [ReplaceWorker(id=i, index=message.index)], Replaced)
                return Restarted(id=message.id, index=message.index, pid=replaced.pid)
            case _:
                raise Error(f"{type(message).__name__} is not served")

    async def _add(self, message: Add) -> Added:
        rule = parse_rule(message.input, message.outputs, message.name)
        applied = await self._apply([rule], [])
        return Added(id=message.id, rule=self._facts(rule), generation=applied.generation, workers=applied.workers)

    async def _remove(self, message: Remove) -> Removed:
        rule = self._table.rules.find(message.rule)
        applied = await self._apply([], [rule])
        return Removed(id=message.id, rule=self._facts(rule), generation=applied.generation, workers=applied.workers)

    async def change(self, message_id: int, add: list[RuleText], remove: list[str]) -> Changed:
        """The reply to a complete Change, or an Error."""
        rules = [parse_rule(text.input, text.outputs, text.name) async for text in in_turns(add)]
        gone = list(dict.fromkeys(self._table.rules.find(name) for name in remove))
        applied = await self._apply(rules, gone)
        return Changed(
            id=message_id,
            generation=applied.generation,
            added=len(rules),
            removed=len(gone),
            workers=applied.workers,
        )

    async def _apply(self, add: Sequence[Rule], remove: Sequence[Rule]) -> Applied:
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
                    yield ApplyRules(id=request_id, add=piece, remove=ids if last else (), complete=last)

            applied = await self._ask(pieces, Applied)
        except Unanswered:
            raise  # the counters may come into use yet, so they stay taken
        except (Error, ValueError, ConnectionError):
            for record in records:
                self._table.free(record)
            raise
        await self._wait_recorded(applied.generation)
        return applied

    def _list(self, message: ListRules) -> Rules:
        rules, more = _page_of(self._table.after(message.after))
        return Rules(
            id=message.id,
            generation=self._table.generation,
            rules=tuple(self._facts(rule) for rule, _record in rules),
            interfaces=tuple(self._interface_facts(record) for _name, record in sorted(self._table.interfaces.items())),
            more=more,
        )

    def _facts(self, rule: Rule) -> RuleFacts:
        facts = self._table.facts(rule)
        record = self._table.records.get(rule.id)
        left_ns = max(self._loop(record).suspended_until_ns - time.monotonic_ns(), 0) if record else 0
        if not left_ns:
            return facts
        why = f"another relay sends its output back; for {left_ns / 1e9:.0f} s more (see 'mcrelay stats')"
        return msgspec.structs.replace(facts, state="suspended", problems=(*facts.problems, why))

    def _loop(self, record: RuleRecord) -> counters.LoopFacts:
        """Over all workers."""
        of_workers = [page.loop(record.counter) for page in self._pages]
        return counters.LoopFacts(
            own=sum(facts.own for facts in of_workers),
            looped=sum(facts.looped for facts in of_workers),
            suspensions=sum(facts.suspensions for facts in of_workers),
            suspended_until_ns=max(facts.suspended_until_ns for facts in of_workers),
        )

    def _interface_facts(self, record: InterfaceRecord) -> InterfaceFacts:
        of_workers = [page.interface(record.slot) for page in self._pages]
        counted = {key: sum(counts[key] for counts in of_workers) for key in counters.INTERFACE_COUNTERS}
        return InterfaceFacts(
            name=record.name,
            problems=tuple(dict.fromkeys(record.problems.values())),
            segmentation=not counted["segments_refused"],
            **counted,
        )

    def _stats(self, message: GetStats) -> Stats:
        rules, more = _page_of(self._table.after(message.after))
        return Stats(
            id=message.id,
            generation=self._table.generation,
            workers=tuple(
                WorkerStats(index=index, dropped=page.dropped(), **page.totals())
                for index, page in enumerate(self._pages)
            ),
            rules=tuple(self._rule_stats(rule, record) for rule, record in rules),
            more=more,
            frames_malformed=self.frames_malformed,
        )

    def _rule_stats(self, rule: Rule, record: RuleRecord) -> RuleStats:
        sums = [sum(values) for values in zip(*(page.rule(record.counter) for page in self._pages), strict=True)]
        packets, size, forwarded, dropped = sums
        loop = self._loop(record)
        return RuleStats(
            id=rule.id,
            name=rule.name,
            input=record.input,
            packets=packets,
            bytes=size,
            forwarded=forwarded,
            dropped=dropped,
            own=loop.own,
            looped=loop.looped,
            suspensions=loop.suspensions,
            outputs=tuple(
                self._output_stats(text, counter)
                for text, counter in zip(record.outputs, record.output_counters, strict=True)
            ),
        )

    def _output_stats(self, text: str, counter: int) -> OutputStats:
        packets = size = 0
        dropped: dict[str, int] = {}
        for page in self._pages:
            page_packets, page_bytes, page_dropped = page.output(counter)
            packets += page_packets
            size += page_bytes
            for reason, n in page_dropped.items():
                dropped[reason] = dropped.get(reason, 0) + n
        return OutputStats(output=text, packets=packets, bytes=size, dropped=dropped)


def _map_page(fd: int) -> counters.Page:
    page = mmap.mmap(fd, counters.PAGE_SIZE, prot=mmap.PROT_READ)
    os.close(fd)
    return counters.Page(memoryview(page))


def _page_of(rules: Iterator[tuple[Rule, RuleRecord]]) -> tuple[list[tuple[Rule, RuleRecord]], bool]:
    """As many rules as fit a reply, and whether there are more."""
    page: list[tuple[Rule, RuleRecord]] = []
    weight = 0
    for rule, record in rules:
        weight += 1 + len(rule.outputs)
        if page and weight > OUTPUTS_PER_REPLY:
            return page, True
        page.append((rule, record))
    return page, False


def main() -> None:
    """python -m mcrelay.control UID GID, with FD 3."""
    uid, gid = worker.identity(sys.argv[1:])
    name_process("mcrelay-control")
    worker.main("control", ControlPlane, uid, gid)


if __name__ == "__main__":
    main()

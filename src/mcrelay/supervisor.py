"""The supervisor: the privileged parent that spawns and keeps.

Owns the children, the counter pages and the listening sockets; active.py has the rules that workers forward by and the
durable sockets. What the control plane asks for is served here; what became of the rules is told to it.

Never parses a byte that came from a client or from the network, and never waits for a worker without a deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import signal
from collections.abc import Coroutine, Iterator, Sequence
from typing import Final

from mcrelay import __version__, counters, notify, process, store
from mcrelay.active import ActiveRules
from mcrelay.api import GetStats, Stats
from mcrelay.channel import close_descriptors
from mcrelay.children import MODULES, Child
from mcrelay.codec import in_frames
from mcrelay.doors import Doors
from mcrelay.errors import Busy, Error, SystemRefusal, UsageError
from mcrelay.handover import Heritage, Predecessor, Successor
from mcrelay.limits import RULES_MAX
from mcrelay.messages import (
    LONG_TEXT_MAX,
    Applied,
    ApplyRules,
    ChangeLevels,
    GetProcesses,
    HandedOver,
    HandOver,
    Inherit,
    Message,
    Probe,
    Processes,
    ProcessFacts,
    RecordRules,
    Refused,
    Replaced,
    ReplaceWorker,
    RequestTap,
    RuleRecord,
    Start,
    WorkerChanged,
)
from mcrelay.options import Options
from mcrelay.pages import Page
from mcrelay.reloads import Reloads
from mcrelay.report import Report
from mcrelay.settings import Settings
from mcrelay.spare import Spare
from mcrelay.state import StateFile
from mcrelay.verbosity import Verbosity

log = logging.getLogger(__name__)

READY_S: Final = 15.0  # for all workers to start, on a loaded machine
SHUTDOWN_S: Final = 1.5
PROBE_S: Final = 2.0  # how often a worker has to show that it works
CONTROL_PATIENCE_S: Final = 4.0
REPLACED_S: Final = 5.0
START_AGAIN_S: Final = 1.0  # after a worker could not even be started


class Supervisor:
    """`predecessor`: the daemon whose place this one takes, and what it gave."""

    def __init__(
        self, options: Options, predecessor: Predecessor | None = None, heritage: Heritage | None = None
    ) -> None:
        inherited = heritage.descriptors if heritage else [None] * (1 + len(options.cores))
        self._options = options
        self._loop = asyncio.get_running_loop()
        self._identity = process.identity(options.user, own=options.rootless)
        self._workers = len(options.cores)
        self._doors = Doors(options, heritage, self._deliver)
        self._pages = [Page(fd) for fd in inherited[1:]]
        self._predecessor = predecessor
        self._inherits = heritage is not None
        self._upgrades = False
        self._died = asyncio.Event()  # set when a worker does
        self._handed_over = False
        self._settled = asyncio.Event()  # the rules that there were are there again: clients may come
        self._incoming: tuple[list[RuleRecord], list[str]] = [], []  # of an unfinished ApplyRules
        self._incoming_key: tuple[int, int] | None = None
        self._stopping = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        credentials = (str(self._identity.uid), str(self._identity.gid), options.logs.format)
        child = functools.partial(
            Child, on_ready=self._child_ready, on_message=self._child_message, on_exit=self._child_exited
        )
        scrapes = (str(options.metrics_rules),) if options.metrics else ()
        self._control = child("control", 0, (*credentials, *scrapes))
        # A worker that never sleeps takes its core anyway: preferred, it would leave nothing to anybody else there.
        polls = [options.of_worker(index)[1] for index in range(self._workers)]
        self._data = [child("data", index, credentials, prefer=not polls[index]) for index in range(self._workers)]
        self._spare = Spare(MODULES["data"], credentials, prefer=not any(polls))
        self._active = ActiveRules(
            self._data,
            [page.counters for page in self._pages],
            ingress=options.ingress,
            ring_memory=options.ring_memory,
            ring_memories=options.ring_memories(),
            rootless=options.rootless,
            on_change=self._changed,
        )
        self._state = StateFile(options.socket)
        former = heritage.first if heritage and predecessor else None  # whose place this one takes
        self._report = Report(self._status, former.started_s if former else None)
        self._reloads = Reloads(
            options, self._control, self._report, lambda: self._active.generation, former.file if former else None
        )
        self._verbosity = Verbosity(options.logs, self._children)
        if heritage:
            self._active.adopt(heritage)
            self._state.note(self._active.generation, self._active.records())

    # Life.

    async def run(self) -> None:
        """Until SIGTERM or SIGINT. Error if the daemon cannot work here."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._stopping.set)
        self._loop.add_signal_handler(signal.SIGHUP, self._hang_up)
        self._loop.add_signal_handler(signal.SIGUSR1, self._control.tell, "request_sock", GetStats(id=0))
        self._loop.add_signal_handler(signal.SIGUSR2, lambda: self._spawn_task(self._serve_hand_over(None)))
        try:
            await self._active.open()
            for child in self._children:
                self._start(child)
            await self._wait_for_all()
            if not self._stopping.is_set():
                if self._predecessor:
                    await self._predecessor.wait_until_left(self._stopping)
                if self._inherits:
                    async with self._active.changing:
                        await self._active.take_over()
                elif self._options.restore and await self._state.restore(self._active):
                    # The whole, since the control plane must know which counters are taken.
                    self._record(self._active.records(), (), snapshot=True)
                elif not self._options.restore:
                    self._state.set_aside()
                if not self._predecessor or await self._predecessor.took_over():
                    await self._active.forget_left_out()
                if not self._predecessor:
                    await self._reloads.begin()
                self._settled.set()
                self._doors.open()
                await self._active.replenish()
                self._spare.prepare()
                for child in self._children:
                    self._spawn_task(self._watch(child))
                engines = sorted({child.engine or "?" for child in self._data})
                log.info(
                    "ready: %d data plane worker(s) on core(s) %s, engine %s, workers run as %s, socket %s",
                    self._workers,
                    ",".join(map(str, self._options.cores)),
                    "/".join(engines),
                    self._identity.name,
                    self._options.socket,
                )
                self._report.ready()
            await self._stopping.wait()
        finally:
            await self._shut_down()

    def _hang_up(self) -> None:
        if self._reloads.note():
            self._spawn_task(self._reload())

    async def _reload(self) -> None:
        await self._settled.wait()  # until then, the file is to be read anyway
        await self._reloads.reload()

    def _status(self) -> str:
        ready = sum(child.state == "ready" for child in self._data)
        return f"rules: {len(self._active)}; workers ready: {ready} of {self._workers}"

    @property
    def _children(self) -> list[Child]:
        return [self._control, *self._data]

    async def _wait_for_all(self) -> None:
        """Until every worker has said that it works."""
        stop = asyncio.ensure_future(self._stopping.wait())
        ready = asyncio.ensure_future(self._all_ready())
        done, _ = await asyncio.wait({stop, ready}, timeout=READY_S, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if ready in done:
            ready.result()
            return
        ready.cancel()
        if not done:
            late = ", ".join(child.name for child in self._children if child.state != "ready")
            raise SystemRefusal(f"{late} did not start within {READY_S:.0f} s", "see the messages above")

    async def _all_ready(self) -> None:
        await self._active.wait_for_workers(lambda: all(c.state == "ready" or c.failure for c in self._children))
        for child in self._children:
            if child.failure:
                raise Error(child.failure.message, child.failure.hint, code=child.failure.code)

    def _start(self, child: Child) -> None:
        latency_budget_us, busy_poll = self._options.of_worker(child.index)
        start = Start(
            role=child.role,
            index=child.index,
            workers=self._workers,
            core=self._options.cores[child.index] if child.role == "data" else None,
            engine=self._options.engine,
            latency_budget_us=latency_budget_us,
            busy_poll=busy_poll,
            version=__version__,
            logs=self._verbosity.settings_for(child),
            config=self._options.config if child.role == "control" else None,
            settings=self._reloads.settings if child.role == "control" else Settings(),
        )
        try:
            if child.role == "data":
                if self._settled.is_set():
                    self._active.settle(child)
                child.start(start, [self._pages[child.index].writable()], self._spare.take())
            else:
                child.start(start, [page.readable() for page in self._pages])
        except Exception as error:  # whatever it is, there has to be a next try
            log.error("cannot start %s: %r", child.name, error, exc_info=not isinstance(error, SystemRefusal | OSError))
            self._restart_later(child, START_AGAIN_S)

    def _restart_later(self, child: Child, delay_s: float) -> None:
        if self._stopping.is_set():
            return
        if delay_s:
            log.warning("restarting %s in %.1f s", child.name, delay_s)
            self._loop.call_later(delay_s, self._restart, child)
        else:
            log.info("restarting %s", child.name)
            self._restart(child)

    def _restart(self, child: Child) -> None:
        if not self._stopping.is_set() and child.pid is None:
            self._start(child)

    async def _shut_down(self) -> None:
        self._stopping.set()
        self._doors.shut()
        under_way = list(self._tasks)
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)
        if not self._is_anothers():
            self._report.stopping()
        ends = await asyncio.gather(*(child.shut_down(SHUTDOWN_S) for child in self._children), return_exceptions=True)
        for end in ends:
            if end is not None:
                log.error("unexpected: %r", end)
        self._spare.close()
        await self._active.rest()
        if not self._is_anothers():
            await self._state.save(self._active.generation)  # should it have failed before
        if self._is_anothers() or self._keep_for_next():
            self._doors.leave()
        else:
            self._doors.close()
        await self._active.close()
        log.info("stopped")

    def _is_anothers(self) -> bool:
        """The place is a successor's, or still a predecessor's."""
        return self._handed_over or (self._predecessor is not None and not self._settled.is_set())

    def _keep_for_next(self) -> bool:
        return self._settled.is_set() and notify.store_size() > 0 and store.keep(self._options.socket, self._will())

    # Children.

    def _spawn_task(self, work: Coroutine[None, None, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("unexpected: %r", error, exc_info=error)

    def _child_ready(self, child: Child) -> None:
        self._spawn_task(self._bring_in(child))

    async def _bring_in(self, child: Child) -> None:
        """Give a new life all that it must know, then call it ready."""
        life = child.restarts
        async with self._active.changing:
            if child.restarts != life:
                return  # it is over already; the next one will say that it is ready
            if child.role == "control":
                self._record(self._active.records(), (), snapshot=True)
                if self._settled.is_set():
                    self._doors.open()
            else:
                try:
                    await self._active.bring_in(child)
                except Busy as error:
                    log.warning("a worker cannot be given its rules: %s", error)
                    child.kill_life(life)
                    return
            if not await self._verbosity.introduce(child):
                return
            child.state = "ready"
        await self._active.announce()
        self._report.changed()
        if child.restarts:
            log.info("%s is back (pid %s)", child.name, child.pid)
        self._tell_of(child)
        if child.role == "data" and not self._stopping.is_set() and all(c.state == "ready" for c in self._data):
            self._spare.prepare()  # not before: it would take time from the newcomer

    async def _watch(self, child: Child) -> None:
        """End a worker that hangs: command() does when it does not answer."""
        while True:
            await asyncio.sleep(PROBE_S)
            if child.state == "ready":
                ticket = child.ticket()
                with contextlib.suppress(Error):
                    # The control plane may be busy with thousands of rules at once.
                    patience_s = 0.0 if child.role == "data" else CONTROL_PATIENCE_S
                    await child.command(ticket, (Probe(ticket=ticket), ()), patience_s=patience_s)

    async def _replace(self, asker: Child, request: ReplaceWorker) -> None:
        """Put another process in a data plane's place, which finishes what it has in hand first."""
        life = asker.restarts
        reply: Message
        try:
            if request.index >= self._workers:
                raise UsageError(f"there is no worker {request.index}", f"there are 0 to {self._workers - 1}")
            child = self._data[request.index]
            async with self._active.changing:
                child.state = "waiting"  # changes wait for its return from now on
            await child.shut_down(SHUTDOWN_S)
            try:
                async with asyncio.timeout(REPLACED_S):
                    await self._active.wait_for_workers(lambda: child.state == "ready")
            except TimeoutError:
                raise Busy(f"{child.name} does not come back", "the daemon's log says more") from None
            reply = Replaced(id=request.id, pid=child.pid or 0)
        except Error as error:
            reply = _refused(request.id, error)
        if asker.restarts == life:
            asker.tell("request_sock", reply)

    # Handover.

    async def _serve_hand_over(self, request: HandOver | None) -> None:
        """Have a new daemon take our place, for a client or a signal, and stop; or go on and say why."""
        life = self._control.restarts
        reply: Message | None = None
        try:
            pid = await self._hand_over()
        except (Error, OSError) as error:
            refusal = error if isinstance(error, Error) else SystemRefusal(f"cannot start a daemon: {error}")
            log.error("no upgrade: %s", refusal)
            if request:
                reply = _refused(request.id, refusal)
        else:
            log.info("process %d has taken over", pid)
            self._stopping.set()
            if request:
                reply = HandedOver(id=request.id, pid=pid)
        if reply and self._control.restarts == life:
            self._control.tell("request_sock", reply)

    async def _hand_over(self) -> int:
        """The successor's pid, once it forwards. Error, and nothing has changed, if it does not."""
        if self._upgrades or self._stopping.is_set() or not self._settled.is_set():
            raise Busy("the daemon is starting, stopping or being upgraded", "try again")
        if not notify.may_change_process():
            raise SystemRefusal(
                "the service manager would end the new daemon with the old one",
                "give the unit NotifyAccess=main, or use 'systemctl restart'",
            )
        self._upgrades = True
        try:
            async with self._active.changing:  # nothing changes until it is over, either way
                return await self._hand_over_to(Successor())
        finally:
            self._upgrades = False

    async def _hand_over_to(self, successor: Successor) -> int:
        """The old workers leave the packet sockets, and live on until the new ones forward."""
        try:
            self._died.clear()
            await self._unless_somebody_dies(successor.prepare(self._will()))
            self._doors.shut()
            await self._active.hold()
            pid = await successor.proceed()
            self._report.handed_over(pid)
        except BaseException:
            successor.end()
            await self._active.take_over()
            if self._control.state == "ready":
                self._doors.open()
            raise
        successor.leave()
        self._handed_over = True
        self._active.leave()
        self._reloads.leave_to(pid)
        return pid

    async def _unless_somebody_dies(self, work: Coroutine[None, None, None]) -> None:
        """A worker's successor would have to wait for as long as rules may not change."""
        working = self._loop.create_task(work)
        died = self._loop.create_task(self._died.wait())
        try:
            await asyncio.wait({working, died}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise Busy("a worker died meanwhile", "try again")
            working.result()
        finally:
            working.cancel()
            died.cancel()

    def _will(self) -> Iterator[tuple[Message, list[int]]]:
        first = Inherit(
            version=__version__,
            workers=self._workers,
            generation=self._active.generation,
            counters_version=counters.VERSION,
            counters_size=counters.PAGE_SIZE,
            rootless=self._options.rootless,
            levels=self._verbosity.levels,
            log=self._reloads.settings.log,
            network=process.network_namespace(),
            started_s=self._report.started_s,
            file=self._reloads.state,
        )
        yield first, [self._doors.fileno(), *(page.fd for page in self._pages)]
        yield from self._doors.will()
        yield from self._active.will()

    def _child_exited(self, child: Child, delay_s: float) -> None:
        self._died.set()
        self._report.changed()
        if child.role == "control":
            self._doors.shut()
        self._tell_of(child)
        if child.failure:
            self._spawn_task(self._active.announce())
        self._restart_later(child, delay_s)

    def _child_message(self, child: Child, message: Message) -> None:
        if self._stopping.is_set():
            return  # who asks is about to be told
        match message:
            case ApplyRules():
                self._collect(child, message)
            case ChangeLevels():
                self._spawn_task(self._verbosity.serve(child, message))
            case ReplaceWorker():
                self._spawn_task(self._replace(child, message))
            case RequestTap():
                self._spawn_task(self._serve_tap(child, message))
            case HandOver():
                self._spawn_task(self._serve_hand_over(message))
            case GetProcesses():
                spare = self._spare.facts()
                facts = (self._own_facts(), *(c.facts() for c in self._children), *([spare] if spare else []))
                started_s, file = self._report.started_s, self._reloads.state
                child.tell("request_sock", Processes(message.id, facts, started_s, file))
            case Stats():
                log.info(
                    "%d rules; %d packets received, %d forwarded, %d dropped",
                    len(self._active),
                    sum(worker.received for worker in message.workers),
                    sum(worker.forwarded for worker in message.workers),
                    sum(sum(worker.dropped.values()) for worker in message.workers),
                )
            case _:
                log.warning("%s sent %s, which nobody asked for", child.name, type(message).__name__)

    def _tell_of(self, child: Child) -> None:
        """Have the control plane's clients know that a data plane has gone or come back."""
        if child.role == "data" and child.restarts and self._control.state == "ready":
            self._control.tell(
                "supervisor_sock",
                WorkerChanged(
                    index=child.index, is_ready=child.state == "ready", pid=child.pid, restarts=child.restarts
                ),
            )

    def _own_facts(self) -> ProcessFacts:
        status = process.status_of(os.getpid())
        return ProcessFacts(
            role="supervisor",
            index=0,
            state="ready",
            pid=os.getpid(),
            uid=status.uid,
            capabilities=status.capabilities,
            cores=status.cores,
            restarts=0,
        )

    def _deliver(self, message: Message, descriptor: int) -> None:
        self._control.tell("supervisor_sock", message, [descriptor], give=True)

    # Rules.

    def _collect(self, child: Child, piece: ApplyRules) -> None:
        """A piece of a request; serve it when it is complete. What a former life began is void."""
        key = child.restarts, piece.id
        if self._incoming_key != key:
            self._incoming_key, self._incoming = key, ([], [])
        if max(len(self._incoming[0]) + len(piece.add), len(self._incoming[1]) + len(piece.remove)) > RULES_MAX:
            log.error("%s asks for more rules at once than there can be: restarting it", child.name)
            child.kill()
            return
        self._incoming[0].extend(piece.add)
        self._incoming[1].extend(piece.remove)
        if piece.complete:
            self._incoming_key = None
            self._spawn_task(self._serve_apply(child, piece, *self._incoming))

    async def _serve_apply(self, child: Child, request: ApplyRules, add: list[RuleRecord], remove: list[str]) -> None:
        life = child.restarts
        reply: Message
        try:
            workers = await self._active.apply(add, remove, request.expect)
            await self._state.save(self._active.generation)
            self._spawn_task(self._active.replenish())
            reply = Applied(id=request.id, generation=self._active.generation, workers=workers)
        except Error as error:
            reply = _refused(request.id, error)
        except Exception as error:
            log.exception("cannot apply a change")
            reply = Refused(
                id=request.id, code="internal", message=f"unexpected: {error!r}"[:LONG_TEXT_MAX], hint="see the log"
            )
        if child.restarts == life:  # a new life has not asked, and may use the same ids
            child.tell("request_sock", reply)

    async def _serve_tap(self, child: Child, request: RequestTap) -> None:
        life = child.restarts
        reply: Message
        descriptors: list[int] = []
        try:
            reply, descriptors = await self._active.open_tap(request)
        except (Error, OSError) as error:
            refusal = error if isinstance(error, Error) else SystemRefusal(f"cannot open a tap: {error.strerror}")
            reply = _refused(request.id, refusal)
        if child.restarts == life:
            child.tell("request_sock", reply, descriptors, give=True)
        else:
            close_descriptors(descriptors)

    def _changed(self, added: list[RuleRecord], removed: Sequence[str], why: str) -> None:
        self._state.note(self._active.generation, self._active.records())
        if added or removed:
            self._spawn_task(self._state.save(self._active.generation))  # also of a change that nobody has asked for
        self._report.changed()
        self._record(added, removed, why)

    def _record(self, added: list[RuleRecord], gone: Sequence[str], why: str = "", *, snapshot: bool = False) -> None:
        """Tell the control plane what is active now. One that is not ready will be told all of it when it is."""
        if not snapshot and self._control.state != "ready":
            return
        for piece, last in in_frames(added):
            self._control.tell(
                "supervisor_sock",
                RecordRules(
                    generation=self._active.generation,
                    added=piece,
                    removed=tuple(gone),
                    complete=last,
                    interfaces=self._active.interfaces(),
                    snapshot=snapshot,
                    reason=why,
                ),
            )
            snapshot, gone = False, ()


def _refused(request_id: int, error: Error) -> Refused:
    return Refused(id=request_id, code=error.code, message=error.message, hint=error.hint)

"""The supervisor: the privileged parent that spawns, distributes and keeps.

Owns the children, the durable sockets (through net/attachments.py), the counter pages, the client socket, and the set
of rules that are active. Every change of rules passes through apply(), one at a time: open what they need, tell the
workers concerned, wait for their word, record; or undo all of it and say why.

Never parses a byte that came from a client or from the network, and never waits for a worker without a deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import logging
import mmap
import os
import signal
from collections.abc import AsyncIterator, Coroutine, Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Final, Literal

from mcrelay import __version__, counters, process
from mcrelay.children import Child
from mcrelay.errors import Busy, Error, RuleError, SystemRefusal
from mcrelay.limits import RingGeometry, ring_geometry
from mcrelay.listener import Listener
from mcrelay.messages import (
    AddRule,
    Applied,
    ApplyRules,
    AttachInterface,
    Client,
    DetachInterface,
    Direction,
    GetProcesses,
    GetStats,
    Message,
    Processes,
    ProcessFacts,
    RecordRules,
    Refused,
    RemoveRule,
    Ring,
    RuleRecord,
    Start,
    Stats,
    SyncRules,
    in_frames,
)
from mcrelay.net import interfaces
from mcrelay.net.attachments import Attachment, Attachments, Need, group, needs
from mcrelay.net.interfaces import Interface, Interfaces
from mcrelay.rules import Rule, RuleSet, parse_rule

log = logging.getLogger(__name__)

ETHERNET_MTU: Final = 1500
READY_S: Final = 15.0  # for all workers to start, on a loaded machine
SHUTDOWN_S: Final = 1.5
START_AGAIN_S: Final = 1.0  # after a worker could not even be started
TURN_S: Final = 3.0  # how long a change waits for those before it; well below the control plane's SUPERVISOR_S
OWNER_READY_S: Final = 2.0  # how long a change waits for a worker that is being restarted


@dataclass(frozen=True, slots=True)
class Options:
    socket: str
    cores: tuple[int, ...]  # one data plane worker on each
    user: str | None
    engine: Literal["auto", "uring", "reference"]
    ingress: Literal["ring", "recv"]
    ring_memory: int  # bytes per worker and interface
    latency_budget_us: int
    busy_poll: bool
    debug: bool


@dataclass(frozen=True, slots=True)
class Active:
    """A rule that workers forward by."""

    rule: Rule
    record: RuleRecord


class Page:
    """A worker's counter page: the memory, which outlives the worker, and our view of it."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("mcrelay-counters", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, counters.PAGE_SIZE)
        # A memfd is a file of mode 0777 that whoever holds a descriptor could open again for writing, through /proc.
        os.fchmod(self.fd, 0o400)
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        self._map = mmap.mmap(self.fd, counters.PAGE_SIZE)
        self.counters = counters.Page(memoryview(self._map))

    def writable(self) -> int:
        """A descriptor to give away."""
        return os.dup(self.fd)

    def readable(self) -> int:
        """A descriptor to give away that cannot be mapped for writing."""
        return os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)


class Supervisor:
    def __init__(self, options: Options) -> None:
        self._options = options
        self._loop = asyncio.get_running_loop()
        self._identity = process.identity(options.user)
        self._workers = len(options.cores)
        self._listener = Listener(options.socket)
        self._pages = [Page() for _ in range(self._workers)]
        self._attachments = Attachments(self._workers)
        self._interfaces = Interfaces()
        self._rules = RuleSet()
        self._active: dict[str, Active] = {}
        self._rule_counters: set[int] = set()  # that active rules use
        self._output_counters: set[int] = set()
        self._of_worker: list[dict[str, Active]] = [{} for _ in range(self._workers)]
        self._generation = 0
        self._changing = asyncio.Lock()
        self._stopping = asyncio.Event()
        self._became_ready = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()
        credentials = (str(self._identity.uid), str(self._identity.gid))
        child = functools.partial(
            Child, on_ready=self._child_ready, on_message=self._child_message, on_exit=self._child_exited
        )
        self._control = child("control", 0, credentials)
        self._data = [child("data", i, (*credentials, str(core))) for i, core in enumerate(options.cores)]

    # Life.

    async def run(self) -> None:
        """Until SIGTERM or SIGINT. Error if the daemon cannot work here."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._stopping.set)
        self._loop.add_signal_handler(signal.SIGUSR1, self._control.tell, "request_sock", GetStats(id=0))
        try:
            for child in self._children:
                self._start(child)
            await self._interfaces.open()
            await self._wait_for_all()
            if not self._stopping.is_set():
                await self._replenish()
                engines = sorted({child.engine or "?" for child in self._data})
                log.info(
                    "ready: %d data plane worker(s) on core(s) %s, engine %s, workers run as %s, socket %s",
                    self._workers,
                    ",".join(map(str, self._options.cores)),
                    "/".join(engines),
                    self._identity.name,
                    self._options.socket,
                )
            await self._stopping.wait()
        finally:
            await self._shut_down()

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
        async with self._became_ready:
            await self._became_ready.wait_for(lambda: all(c.state == "ready" or c.failure for c in self._children))
        for child in self._children:
            if child.failure:
                raise Error(child.failure.message, child.failure.hint, code=child.failure.code)

    def _start(self, child: Child) -> None:
        start = Start(
            role=child.role,
            index=child.index,
            workers=self._workers,
            engine=self._options.engine,
            latency_budget_us=self._options.latency_budget_us,
            busy_poll=self._options.busy_poll,
            version=__version__,
            debug=self._options.debug,
        )
        try:
            if child.role == "data":
                descriptors = [self._pages[child.index].writable()]
            else:
                descriptors = [page.readable() for page in self._pages]
            child.start(start, descriptors)
        except (SystemRefusal, OSError) as error:
            log.error("%s: %s", child.name, error)
            self._restart_later(child, START_AGAIN_S)

    def _restart_later(self, child: Child, delay_s: float) -> None:
        if self._stopping.is_set():
            return
        log.info("restarting %s in %.1f s", child.name, delay_s)
        self._loop.call_later(delay_s, self._restart, child)

    def _restart(self, child: Child) -> None:
        if not self._stopping.is_set():
            self._start(child)

    async def _shut_down(self) -> None:
        self._stopping.set()
        self._listener.shut()
        for task in self._tasks:
            task.cancel()
        ends = await asyncio.gather(*(child.shut_down(SHUTDOWN_S) for child in self._children), return_exceptions=True)
        for end in ends:
            if end is not None:
                log.error("unexpected: %r", end)
        self._listener.close()
        await self._attachments.close_all()
        await self._interfaces.close()
        log.info("stopped")

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
        async with self._changing:
            if child.restarts != life:
                return  # it is over already; the next one will say that it is ready
            if child.role == "control":
                records = [active.record for active in self._active.values()]
                self._record(records, (), snapshot=True)
                self._listener.open(self._pass_client)
            else:
                try:
                    # Ingress last: packets that wait in its sockets need the rules, and the rules their outputs.
                    await self._attach_all(child, "egress")
                    await self._give_all_rules(child, self._of_worker[child.index].values())
                    await self._attach_all(child, "ingress")
                except Busy as error:
                    log.warning("%s", error)
                    child.kill()
                    return
            child.state = "ready"
        await self._announce()
        if child.restarts:
            log.info("%s is back (pid %s)", child.name, child.pid)

    def _child_exited(self, child: Child, delay_s: float) -> None:
        if child.role == "control":
            self._listener.shut()
        if child.failure:
            self._spawn_task(self._announce())
        self._restart_later(child, delay_s)

    async def _announce(self) -> None:
        async with self._became_ready:
            self._became_ready.notify_all()

    def _child_message(self, child: Child, message: Message) -> None:
        match message:
            case ApplyRules():
                self._spawn_task(self._serve_apply(child, message))
            case GetProcesses():
                facts = (self._own_facts(), *(c.facts() for c in self._children))
                child.tell("request_sock", Processes(id=message.id, processes=facts))
            case Stats():
                log.info(
                    "%d rules; %d packets received, %d forwarded, %d dropped",
                    len(self._rules),
                    sum(worker.received for worker in message.workers),
                    sum(worker.forwarded for worker in message.workers),
                    sum(sum(worker.dropped.values()) for worker in message.workers),
                )
            case _:
                log.warning("%s sent %s, which nobody asked for", child.name, type(message).__name__)

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

    def _pass_client(self, descriptor: int, pid: int, uid: int, gid: int) -> None:
        self._control.tell("supervisor_sock", Client(pid=pid, uid=uid, gid=gid), [descriptor], give=True)

    # Rules.

    async def _serve_apply(self, child: Child, request: ApplyRules) -> None:
        life = child.restarts
        reply: Message
        try:
            workers = await self.apply(request.add, request.remove)
            reply = Applied(id=request.id, generation=self._generation, workers=workers)
        except Error as error:
            reply = Refused(id=request.id, code=error.code, message=error.message, hint=error.hint)
        except Exception as error:
            log.exception("cannot apply a change")
            reply = Refused(id=request.id, code="internal", message=f"unexpected: {error!r}"[:4096], hint="see the log")
        if child.restarts == life:  # a new life has not asked, and may use the same ids
            child.tell("request_sock", reply)

    async def apply(self, add: Sequence[RuleRecord], remove: Sequence[str]) -> int:
        """Change the active rules: all of it or, with an Error, nothing. Returns how many workers acknowledged."""
        added = [Active(parse_rule(r.input, r.outputs, r.name), r) for r in add]
        await self._wait_for_owners([a.rule for a in added] + [self._find_active(i).rule for i in remove])
        async with self._change():
            removed = [self._find_active(rule_id) for rule_id in remove]
            self._check(added, removed)
            async with AsyncExitStack() as undo:
                await self._provide([active.rule for active in added], undo)
                workers = await self._distribute(added, removed, undo)
                self._admit([active.rule for active in added], undo)
                undo.pop_all()
            self._refuse([active.rule for active in removed], {active.rule.id for active in added})
            self._commit(added, removed)
            await self._retire([active.rule for active in removed])
            for active in removed:
                for page in self._pages:
                    page.counters.clear([active.record.counter], active.record.output_counters)
            self._record([active.record for active in added], remove)
        self._spawn_task(self._replenish())
        return workers

    @contextlib.asynccontextmanager
    async def _change(self) -> AsyncIterator[None]:
        """The turn to change rules. Busy if it does not come soon: nobody would be there for the answer any more."""
        try:
            await asyncio.wait_for(self._changing.acquire(), TURN_S)
        except TimeoutError:
            raise Busy("many changes are under way", "try again") from None
        try:
            yield
        finally:
            self._changing.release()

    def _find_active(self, rule_id: str) -> Active:
        active = self._active.get(rule_id)
        if active is None:
            raise RuleError(f"no active rule has the id {rule_id}", "'mcrelay list' shows the rules")
        return active

    def _check(self, added: list[Active], removed: list[Active]) -> None:
        """RuleError if the change cannot follow what is active now."""
        after = RuleSet()
        going = {active.rule.id for active in removed}
        freed = {a.record.counter for a in removed}
        freed_by_outputs = {counter for a in removed for counter in a.record.output_counters}
        for active in added:
            record = active.record
            if len(record.output_counters) != len(active.rule.outputs):
                raise RuleError(f"rule {active.rule.label} does not say where its outputs are counted")
            used_by_outputs = self._output_counters.intersection(record.output_counters)
            if (
                record.counter in self._rule_counters and record.counter not in freed
            ) or used_by_outputs - freed_by_outputs:
                raise RuleError(f"rule {active.rule.label} would be counted with another")
            if active.rule.id in going or active.rule.name in {a.rule.name for a in removed}:
                after.check_addable(active.rule)
            else:
                self._rules.check_addable(active.rule)
            after.add(active.rule)

    async def _wait_for_owners(self, rules: Iterable[Rule]) -> None:
        """Workers that must know a change have to be alive for it: give one that is being restarted some time."""
        owners = {self._data[owner] for rule in rules for owner in rule.owners(self._workers)}
        try:
            async with self._became_ready, asyncio.timeout(OWNER_READY_S):
                await self._became_ready.wait_for(lambda: all(child.state == "ready" for child in owners))
        except TimeoutError:
            names = ", ".join(sorted(child.name for child in owners if child.state != "ready"))
            raise Busy(f"{names} is being restarted", "try again") from None

    async def _provide(self, rules: list[Rule], undo: AsyncExitStack) -> None:
        """Open sockets and join groups that these rules need and nobody has needed so far."""
        wanted = {need for rule in rules for need in needs(rule)}
        if not wanted:
            return
        present = await self._find_interfaces(rules)
        for name, direction in sorted(wanted):
            self._attachments.check_unchanged(present[name])
            if self._attachments.has((name, direction)):
                continue
            ring = self._ring_for(present[name].mtu)
            known = name in self._attachments
            attachment = await asyncio.to_thread(self._attachments.open, present[name], direction, ring)
            if not known:
                for page in self._pages:
                    page.counters.clear_interface(attachment.slot)
            undo.push_async_callback(self._detach, (name, direction))
            workers = self._ready_workers()
            await asyncio.gather(*(self._attach(child, attachment, direction) for child in workers))
        for rule in rules:
            self._attachments.join(group(rule))
            undo.callback(self._attachments.leave, group(rule))

    async def _find_interfaces(self, rules: list[Rule]) -> dict[str, Interface]:
        """Those that are there, and rules can use; RuleError if one that they name is not."""
        present = self._interfaces.present()
        try:
            self._check_interfaces(rules, present)
        except RuleError:
            present = await self._interfaces.refresh()
            self._check_interfaces(rules, present)
        return present

    @staticmethod
    def _check_interfaces(rules: list[Rule], present: dict[str, Interface]) -> None:
        for rule in rules:
            interfaces.find(present, rule.input.interface, f"input '{rule.input}'")
            for output in rule.outputs:
                interfaces.find_for_output(present, output.interface, f"output '{output}'")

    def _admit(self, rules: list[Rule], undo: AsyncExitStack) -> None:
        """The workers know these rules: let the packets come."""
        for rule in rules:
            if rule.id not in self._active:
                undo.callback(self._attachments.refuse, rule)
            try:
                self._attachments.admit(rule)
            except OSError as error:
                raise SystemRefusal(f"rule {rule.label}: {error.strerror}", "see the kernel's log (dmesg)") from None

    def _refuse(self, rules: list[Rule], unless: set[str]) -> None:
        for rule in rules:
            if rule.id not in unless:
                self._attachments.refuse(rule)

    def _ring_for(self, mtu: int) -> RingGeometry | None:
        if self._options.ingress == "recv" or any(child.engine == "reference" for child in self._data):
            return None
        return ring_geometry(mtu, self._options.ring_memory)

    async def _replenish(self) -> None:
        """Sockets for the next interface, most of which have this MTU."""
        ring = self._ring_for(ETHERNET_MTU)
        if ring is not None:
            await self._attachments.replenish(ring)

    async def _attach_all(self, child: Child, direction: Direction) -> None:
        for attachment in self._attachments:
            if direction in attachment.sockets:
                await self._attach(child, attachment, direction)

    async def _attach(self, child: Child, attachment: Attachment, direction: Direction) -> None:
        ticket = child.ticket()
        ring = attachment.ring if direction == "ingress" else None
        message = AttachInterface(
            ticket=ticket,
            slot=attachment.slot,
            name=attachment.interface.name,
            mtu=attachment.interface.mtu,
            direction=direction,
            ring=Ring(ring.block_size, ring.blocks, ring.frame_size) if ring else None,
        )
        await child.command(ticket, (message, [attachment.sockets[direction][child.index].fileno()]))

    async def _detach(self, need: Need) -> None:
        """Take an interface's direction out of use everywhere, then close it."""
        name, direction = need
        slot = self._attachments[name].slot
        for child in self._ready_workers():
            ticket = child.ticket()
            try:
                await child.command(ticket, (DetachInterface(ticket=ticket, slot=slot, direction=direction), ()))
            except Busy as error:
                log.warning("%s", error)
                child.kill()  # its next life will not know the interface
        await self._attachments.close(name, direction)

    def _ready_workers(self) -> list[Child]:
        """The data planes to tell; the others will be told everything when they come up."""
        return [child for child in self._data if child.state == "ready"]

    async def _distribute(self, added: list[Active], removed: list[Active], undo: AsyncExitStack) -> int:
        """Tell each worker concerned, and wait for its word. Returns how many there were."""
        concerned = 0
        for index, child in enumerate(self._data):
            mine = [a for a in added if index in a.rule.owners(self._workers)]
            gone = [a for a in removed if index in a.rule.owners(self._workers)]
            if not mine and not gone:
                continue
            undo.push_async_callback(self._take_back, child)
            await self._give_change(child, mine, gone)
            concerned += 1
        return concerned

    async def _give_change(self, child: Child, added: list[Active], removed: list[Active]) -> None:
        """One rule more or less travels alone; anything else is the worker's whole new set, so that the worker changes
        between two packets."""
        ticket = child.ticket()
        if len(added) == 1 and not removed:
            await child.command(
                ticket, (AddRule(ticket=ticket, rule=added[0].record, slots=self._attachments.slots()), ())
            )
        elif len(removed) == 1 and not added:
            await child.command(ticket, (RemoveRule(ticket=ticket, rule=removed[0].rule.id), ()))
        else:
            gone = {active.rule.id for active in removed}
            kept = [a for rule_id, a in self._of_worker[child.index].items() if rule_id not in gone]
            await self._give_all_rules(child, [*kept, *added])

    async def _give_all_rules(self, child: Child, rules: Iterable[Active]) -> None:
        ticket = child.ticket()
        records = [active.record for active in rules]
        await child.command(
            ticket,
            *(
                (SyncRules(ticket=ticket, rules=piece, slots=self._attachments.slots(), complete=last), ())
                for piece, last in in_frames(records)
            ),
        )

    async def _take_back(self, child: Child) -> None:
        """A change failed: the worker goes back to what it had."""
        try:
            await self._give_all_rules(child, self._of_worker[child.index].values())
        except Busy as error:
            log.warning("%s", error)
            child.kill()  # its next life starts with the rules that hold

    def _commit(self, added: list[Active], removed: list[Active]) -> None:
        for active in removed:
            self._rules.remove(active.rule.id)
            del self._active[active.rule.id]
            self._rule_counters.discard(active.record.counter)
            self._output_counters.difference_update(active.record.output_counters)
            for owner in active.rule.owners(self._workers):
                del self._of_worker[owner][active.rule.id]
            self._attachments.release(active.rule)
        for active in added:
            self._rules.add(active.rule)
            self._active[active.rule.id] = active
            self._rule_counters.add(active.record.counter)
            self._output_counters.update(active.record.output_counters)
            for owner in active.rule.owners(self._workers):
                self._of_worker[owner][active.rule.id] = active
            self._attachments.keep(active.rule)
        self._generation += 1

    async def _retire(self, rules: list[Rule]) -> None:
        """Leave and close what only these rules needed."""
        for rule in rules:
            self._attachments.leave(group(rule))
        for rule in rules:
            for need in self._attachments.unused(rule):
                await self._detach(need)

    def _record(self, added: list[RuleRecord], removed: Sequence[str], *, snapshot: bool = False) -> None:
        """Tell the control plane what is active now. One that is not ready will be told all of it when it is."""
        if not snapshot and self._control.state != "ready":
            return
        for piece, last in in_frames(added):
            self._control.tell(
                "supervisor_sock",
                RecordRules(
                    generation=self._generation,
                    added=piece,
                    removed=tuple(removed) if last else (),
                    complete=last,
                    slots=self._attachments.slots(),
                    snapshot=snapshot,
                ),
            )
            snapshot = False

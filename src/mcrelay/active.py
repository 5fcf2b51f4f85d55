"""Active rules: what the workers forward by, and every change of it.

Owns the set of active rules and who has which of them; links.py has the interfaces that they name. A change is made one
at a time: open what it needs, tell the workers concerned, wait for their word, let the packets come, record; or undo
all of it and say why. Steps that take long for thousands of rules take turns with the rest of the event loop.

Knows workers only as somebody who acknowledges commands, and never waits for one without a deadline. Never parses a
byte that came from a client or from the network: rules come as texts that the control plane has written.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Final, Literal

from msgspec.structs import replace

from mcrelay.children import Child
from mcrelay.codec import in_frames
from mcrelay.counters import Page
from mcrelay.cycles import Cycle, Heard, look_for_cycle
from mcrelay.errors import Busy, RuleError
from mcrelay.handover import Heritage
from mcrelay.links import Links
from mcrelay.messages import (
    LONG_TEXT_MAX,
    AddRule,
    InheritRules,
    InterfaceRecord,
    Message,
    OpenTap,
    RemoveRule,
    RequestTap,
    RuleRecord,
    SyncRules,
    TapOpened,
)
from mcrelay.net.attachments import Retired
from mcrelay.net.tap_sockets import open_tap
from mcrelay.rules import Output, Rule, RuleSet, Target, check_generation, is_group
from mcrelay.ruletext import parse_rule
from mcrelay.turns import in_turns

log = logging.getLogger(__name__)

TURN_S: Final = 3.0  # how long a change waits for those before it; well below the control plane's SUPERVISOR_S
RECORD_S: Final = 0.001  # that a worker may take longer for each rule of a whole set
OWNER_READY_S: Final = 2.0  # how long a change waits for a worker that is being restarted


@dataclass(frozen=True, slots=True)
class Active:
    """A rule that workers forward by."""

    rule: Rule
    record: RuleRecord


class ActiveRules:
    """`data`: the data plane workers. `on_change` gets what was added, the ids of what was removed, and why if nobody
    has asked for it, within the turn of that change; nothing of these if it is about interfaces. Counters of what goes
    are cleared in all `pages`."""

    def __init__(
        self,
        data: Sequence[Child],
        pages: Sequence[Page],
        *,
        ingress: Literal["ring", "recv"],
        ring_memory: int,
        ring_memories: Mapping[str, int],
        rootless: bool,
        on_change: Callable[[list[RuleRecord], Sequence[str], str], None],
    ) -> None:
        self._data = data
        self._workers = len(data)
        self._pages = pages
        self._on_change = on_change
        self._rules = RuleSet()
        self._active: dict[str, Active] = {}
        self._rule_counters: set[int] = set()  # that active rules use
        self._output_counters: set[int] = set()
        self._of_worker: list[dict[str, Active]] = [{} for _ in range(self._workers)]
        self._left_out: list[RuleRecord] = []  # of a predecessor's
        self._extract: object = None  # of the devices, as rules were last looked at for cycles
        self._is_over = False  # a successor has it all
        self._became_ready = asyncio.Condition()
        self.generation = 0
        self.changing = asyncio.Lock()  # held by whoever changes them, or needs them not to change
        self._links = Links(
            data,
            pages,
            self.changing,
            ingress=ingress,
            ring_memory=ring_memory,
            ring_memories=ring_memories,
            rootless=rootless,
            on_change=lambda: on_change([], (), ""),
            before_use=self._end_cycles,
        )

    def __len__(self) -> int:
        return len(self._rules)

    async def open(self) -> None:
        await self._links.open()

    async def rest(self) -> None:
        """Nothing changes any more by itself."""
        await self._links.rest()

    async def close(self) -> None:
        """At rest, and no worker may be left."""
        await self._links.close()

    def records(self) -> list[RuleRecord]:
        return [active.record for active in self._active.values()]

    def interfaces(self) -> tuple[InterfaceRecord, ...]:
        """All interfaces that active rules name, for whoever is to know."""
        return self._links.tell()

    # Handover.

    def will(self) -> Iterator[tuple[Message, list[int]]]:
        """What a successor needs to forward as we do; in a turn of the caller's."""
        yield from self._links.will()
        for piece, last in in_frames(self.records()):
            yield InheritRules(rules=piece, complete=last), []

    def adopt(self, heritage: Heritage) -> None:
        """Have a predecessor's rules and all that they need, but leave the packet sockets to it until take_over(). A
        rule that this version refuses is left out."""
        adopted = []
        for record in heritage.rules:
            try:
                adopted.append(Active(parse_rule(record.input, record.outputs, record.name), record))
            except RuleError as error:
                log.error("rule %s cannot be any more: %s", record.name or record.input, error)
                self._left_out.append(record)
        for active in adopted:
            self._note(active)
        self.generation = heritage.first.generation
        self._links.adopt(heritage, [active.rule for active in adopted])

    async def hold(self) -> None:
        """Finish what is in hand, and leave the packet sockets to a successor; in a turn of the caller's."""
        await self._links.hold()

    async def take_over(self) -> None:
        """Nobody else reads the packet sockets any more: forward. In a turn of the caller's."""
        for child in self._data:
            if self._pages[child.index].in_hand():  # of a predecessor's worker that was killed
                self.settle(child)
        await self._links.take_over()

    async def forget_left_out(self) -> None:
        """The predecessor is gone for good: with it goes what it had for the rules that this version refuses."""
        async with self.changing:
            self._clear_counters(self._left_out)
            self._left_out.clear()
            await self._links.leave_left_out()

    def leave(self) -> None:
        """A successor forwards: change nothing any more."""
        self._is_over = True
        self._links.leave()

    # Workers.

    def settle(self, child: Child) -> None:
        """Count what a dead worker had in hand. Before its next life."""
        records = [active.record for active in self._of_worker[child.index].values()]
        in_hand = self._pages[child.index].settle((record.counter, record.output_counters) for record in records)
        if in_hand:
            log.info("%s died with %d packets in hand", child.name, in_hand)

    async def bring_in(self, child: Child) -> None:
        """Give a worker's new life all that it must know. Busy if it fails. In a turn of the caller's."""
        # Ingress last: packets that wait in its sockets need the rules, and the rules their outputs.
        await self._links.introduce(child)
        await self._links.attach_ways_out(child)
        await self._give_all_rules(child, self._of_worker[child.index].values())
        await self._links.attach_ingress(child)

    async def announce(self) -> None:
        """A worker's state has changed."""
        async with self._became_ready:
            self._became_ready.notify_all()

    async def wait_for_workers(self, until: Callable[[], bool]) -> None:
        """Until a condition on their states holds."""
        async with self._became_ready:
            await self._became_ready.wait_for(until)

    # Changes.

    async def apply(self, add: Sequence[RuleRecord], remove: Sequence[str], expect: int | None = None) -> int:
        """Change the active rules: all of it or, with an Error, nothing. Returns how many workers acknowledged.
        Conflict if they are not of the generation `expect`."""
        added = [Active(parse_rule(r.input, r.outputs, r.name), r) async for r in in_turns(add)]
        await self._wait_for_owners([a.rule for a in added] + [self._find_active(i).rule for i in remove])
        async with self._change():
            check_generation(expect, self.generation)
            removed = [self._find_active(rule_id) for rule_id in remove]
            await self._check(added, removed)
            async with AsyncExitStack() as undo:
                # Of workers that had it for a moment; last of all.
                undo.callback(self._clear_counters, [a.record for a in added])
                await self._links.provide([a.rule for a in added], [a.rule for a in removed], undo)
                workers = await self._distribute(added, removed, undo)
                self._links.admit([a.rule for a in added], undo, lambda: self._inactive(added))
                undo.pop_all()
            retired = await self._commit(added, removed)
            self._links.refuse(self._inactive(removed))
            await self._links.retire(retired)
            async for active in in_turns(removed):
                self._clear_counters([active.record])
            self._on_change([active.record for active in added], remove, "")
        return workers

    @contextlib.asynccontextmanager
    async def _change(self) -> AsyncIterator[None]:
        """The turn to change rules. Busy if it does not come soon: nobody would be there for the answer any more."""
        try:
            async with asyncio.timeout(TURN_S):
                await self.changing.acquire()
        except TimeoutError:
            raise Busy("many changes are under way", "try again") from None
        try:
            if self._is_over:
                raise Busy("another daemon has taken over", "try again")
            yield
        finally:
            self.changing.release()

    def _find_active(self, rule_id: str) -> Active:
        active = self._active.get(rule_id)
        if active is None:
            raise RuleError(f"no active rule has the id {rule_id}", "'mcrelay list' shows the rules")
        return active

    def _inactive(self, some: Iterable[Active]) -> list[Rule]:
        """Those whose input no active rule has."""
        return [active.rule for active in some if active.rule.id not in self._active]

    def _clear_counters(self, unused: Iterable[RuleRecord]) -> None:
        for record in unused:
            rules = {record.counter} - self._rule_counters
            outputs = set(record.output_counters) - self._output_counters
            for page in self._pages:
                page.clear(rules, outputs)

    async def _check(self, added: list[Active], removed: list[Active]) -> None:
        """RuleError if the change cannot follow what is active now."""
        after, going = RuleSet(), RuleSet.of(active.rule for active in removed)
        counters = self._rule_counters - {a.record.counter for a in removed}
        output_counters = self._output_counters - {n for a in removed for n in a.record.output_counters}
        async for active in in_turns(added):
            record = active.record
            if len(set(record.output_counters)) != len(active.rule.outputs):
                raise RuleError(f"rule {active.rule.label} does not say where its outputs are counted")
            if record.counter in counters or not output_counters.isdisjoint(record.output_counters):
                raise RuleError(f"rule {active.rule.label} would be counted with another")
            counters.add(record.counter)
            output_counters.update(record.output_counters)
            self._rules.check_addable(active.rule, unless=going)
            after.add(active.rule)
        await self._check_cycles(after, going)

    async def _check_cycles(self, added: RuleSet, going: RuleSet) -> None:
        def find(target: Target) -> Iterator[Rule]:
            yield from added.fed_by(target)
            yield from (rule for rule in self._rules.fed_by(target) if rule.id not in going)

        async for _step in in_turns(look_for_cycle(added, find, self._links.hearing().of)):
            pass

    async def _end_cycles(self) -> None:
        """Pause outputs by which rules feed themselves since devices are connected otherwise. In a turn of the
        caller's."""
        sent = ((rule.address_of(output), output.interface) for rule in self._rules for output in rule.outputs)
        hosts = ((str(address), name) for address, name in sent if not is_group(address))
        hearing = self._links.hearing()
        extract = hearing.extract(self._links.slots(), hosts)
        if extract == self._extract:
            return
        while cycle := await self._find_cycle(hearing.of):
            reason = f"{cycle.output} is paused, since the rule feeds itself now: {cycle.message}"[:LONG_TEXT_MAX]
            await self._pause(self._active[cycle.rule.id], cycle.output, reason)
            log.error(
                "%s of rule %s is paused, since it feeds itself now: %s", cycle.output, cycle.rule.label, cycle.message
            )
        self._extract = extract

    async def _find_cycle(self, heard: Heard) -> Cycle | None:
        try:
            async for _step in in_turns(look_for_cycle(self._rules, self._rules.fed_by, heard)):
                pass
        except Cycle as cycle:
            return cycle
        return None

    async def _pause(self, active: Active, output: Output, reason: str) -> None:
        """In the rule's place, whatever workers say: one that does not follow is ended, and its next life does. Nothing
        else changes, since the rule needs and takes what it did."""
        rule = active.rule.with_paused(str(active.rule.outputs.index(output) + 1), paused=True)
        paused = Active(rule, replace(active.record, outputs=tuple(map(str, rule.outputs))))
        for index in rule.owners(self._workers):
            child, life = self._data[index], self._data[index].restarts
            if child.state == "ready":
                try:
                    await self._give_change(child, [paused], [active])
                except Busy as error:
                    log.warning("a worker cannot be told to pause an output: %s", error)
                    child.kill_life(life)
        self._note(paused)
        self.generation += 1
        self._on_change([paused.record], [rule.id], reason)

    async def _wait_for_owners(self, rules: Iterable[Rule]) -> None:
        """Workers that must know a change have to be alive for it: give one that is being restarted some time."""
        owners = {self._data[owner] for rule in rules for owner in rule.owners(self._workers)}
        try:
            async with asyncio.timeout(OWNER_READY_S):
                await self.wait_for_workers(lambda: all(child.state == "ready" for child in owners))
        except TimeoutError:
            names = ", ".join(sorted(child.name for child in owners if child.state != "ready"))
            raise Busy(f"{names} is being restarted", "try again") from None

    async def _distribute(self, added: list[Active], removed: list[Active], undo: AsyncExitStack) -> int:
        """Tell each worker concerned, and wait for its word. Returns how many there were."""
        given = []
        for index, child in enumerate(self._data):
            mine = [a for a in added if index in a.rule.owners(self._workers)]
            gone = [a for a in removed if index in a.rule.owners(self._workers)]
            if mine or gone:
                undo.push_async_callback(self._take_back, child)
                given.append(self._give_change(child, mine, gone))
        # All of them have to be through before any of it is taken back.
        for result in await asyncio.gather(*given, return_exceptions=True):
            if isinstance(result, BaseException):
                raise result
        return len(given)

    async def _give_change(self, child: Child, added: list[Active], removed: list[Active]) -> None:
        """One rule more or less travels alone; anything else is the worker's whole new set, so that the worker changes
        between two packets."""
        ticket = child.ticket()
        if len(added) == 1 and all(
            active.rule.id == added[0].rule.id for active in removed
        ):  # new, or in its own place
            message = AddRule(ticket=ticket, rule=added[0].record, slots=self._links.slots())
            await child.command(ticket, (message, ()), patience_s=self._links.patience_s)
        elif len(removed) == 1 and not added:
            removal = RemoveRule(ticket=ticket, rule=removed[0].rule.id)
            await child.command(ticket, (removal, ()), patience_s=self._links.patience_s)
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
                (SyncRules(ticket=ticket, rules=piece, slots=self._links.slots(), complete=last), ())
                for piece, last in in_frames(records)
            ),
            patience_s=len(records) * RECORD_S + self._links.patience_s,
        )

    async def _take_back(self, child: Child) -> None:
        """A change failed: the worker goes back to what it had. One that is not ready will be given that anyway."""
        life = child.restarts
        if child.state != "ready":
            return
        try:
            await self._give_all_rules(child, self._of_worker[child.index].values())
        except Busy as error:
            log.warning("a worker cannot be given its former rules: %s", error)
            child.kill_life(life)  # its next life starts with the rules that hold

    async def _commit(self, added: list[Active], removed: list[Active]) -> list[Retired]:
        retired = []
        # One in its own place keeps its position; of several, names may change hands.
        replaced = {added[0].rule.id} if len(added) == len(removed) == 1 else set()
        async for active in in_turns(removed):
            self._rule_counters.discard(active.record.counter)
            self._output_counters.difference_update(active.record.output_counters)
            retired.append(self._links.release(active.rule))
            if active.rule.id not in replaced:
                self._rules.remove(active.rule.id)
                del self._active[active.rule.id]
                for owner in active.rule.owners(self._workers):
                    del self._of_worker[owner][active.rule.id]
        async for active in in_turns(added):
            self._note(active)
            self._links.keep(active.rule)
        self.generation += 1
        log.debug("generation %d: %d rules added, %d removed", self.generation, len(added), len(removed))
        return retired

    def _note(self, active: Active) -> None:
        if active.rule.id in self._rules:
            self._rules.replace(active.rule)
        else:
            self._rules.add(active.rule)
        self._active[active.rule.id] = active
        self._rule_counters.add(active.record.counter)
        self._output_counters.update(active.record.output_counters)
        for owner in active.rule.owners(self._workers):
            self._of_worker[owner][active.rule.id] = active

    async def open_tap(self, request: RequestTap) -> tuple[TapOpened, list[int]]:
        """Have the workers that own a rule show its packets: the answer, and the sockets that they show them by, which
        are the caller's. No end of them stays here, so a tap ends with its reader or with the worker."""
        await self._wait_for_owners([self._find_active(request.rule).rule])
        async with self._change():
            active = self._find_active(request.rule)
            owners = tuple(sorted(active.rule.owners(self._workers)))
            with contextlib.ExitStack() as stack:
                readers = []
                for child in (self._data[owner] for owner in owners):
                    reader, writer = open_tap()
                    readers.append(stack.enter_context(reader))
                    ticket = child.ticket()
                    command = OpenTap(
                        ticket=ticket,
                        rule=active.record.counter,
                        count=request.count,
                        snap_length=request.snap_length,
                    )
                    await child.command(ticket, (command, [writer.detach()]), give=True)
                descriptors = [reader.detach() for reader in readers]
        return TapOpened(id=request.id, workers=owners), descriptors

    async def replenish(self) -> None:
        """Sockets for the next interface."""
        await self._links.replenish()

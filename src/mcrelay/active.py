"""Active rules: what the workers forward by, and every change of it.

Owns the set of active rules, who has which of them, and the attachments that they need. A change is made one at a time:
open what it needs, tell the workers concerned, wait for their word, let the packets come, record; or undo all of it and
say why. Steps that take long for thousands of rules take turns with the rest of the event loop.

Knows workers only as somebody who acknowledges commands, and never waits for one without a deadline. Never parses a
byte that came from a client or from the network: rules come as texts that the control plane has written.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Final, Literal

from mcrelay.children import Child
from mcrelay.counters import Page
from mcrelay.errors import Busy, RuleError, SystemRefusal
from mcrelay.limits import RingGeometry, ring_geometry
from mcrelay.messages import (
    AddRule,
    AttachInterface,
    DetachInterface,
    Direction,
    RemoveRule,
    Ring,
    RuleRecord,
    SyncRules,
    in_frames,
)
from mcrelay.net import interfaces
from mcrelay.net.attachments import Attachment, Attachments, Need, group, needs
from mcrelay.net.interfaces import Interface, Interfaces
from mcrelay.rules import Rule, RuleSet, parse_rule
from mcrelay.turns import in_turns

log = logging.getLogger(__name__)

ETHERNET_MTU: Final = 1500
TURN_S: Final = 3.0  # how long a change waits for those before it; well below the control plane's SUPERVISOR_S
RECORD_S: Final = 0.001  # that a worker may take longer for each rule of a whole set
LINGER_S: Final = 5.0  # how long an interface that no rule uses any more is kept
OWNER_READY_S: Final = 2.0  # how long a change waits for a worker that is being restarted


@dataclass(frozen=True, slots=True)
class Active:
    """A rule that workers forward by."""

    rule: Rule
    record: RuleRecord


class ActiveRules:
    """`data`: the data plane workers. `on_change` gets what was added, and the ids of what was removed, within the turn
    of that change. Counters of what goes are cleared in all `pages`."""

    def __init__(
        self,
        data: Sequence[Child],
        pages: Sequence[Page],
        *,
        ingress: Literal["ring", "recv"],
        ring_memory: int,
        on_change: Callable[[list[RuleRecord], Sequence[str]], None],
    ) -> None:
        self._data = data
        self._workers = len(data)
        self._pages = pages
        self._ingress = ingress
        self._ring_memory = ring_memory
        self._on_change = on_change
        self._attachments = Attachments(self._workers)
        self._interfaces = Interfaces()
        self._rules = RuleSet()
        self._active: dict[str, Active] = {}
        self._rule_counters: set[int] = set()  # that active rules use
        self._output_counters: set[int] = set()
        self._of_worker: list[dict[str, Active]] = [{} for _ in range(self._workers)]
        self._lingering: dict[Need, asyncio.TimerHandle] = {}  # attached, and needed by no rule
        self._expiring: set[asyncio.Task[None]] = set()
        self._became_ready = asyncio.Condition()
        self.generation = 0
        self.changing = asyncio.Lock()  # held by whoever changes them, or needs them not to change

    def __len__(self) -> int:
        return len(self._rules)

    async def open(self) -> None:
        await self._interfaces.open()

    async def close(self) -> None:
        """No worker may be left."""
        for timer in self._lingering.values():
            timer.cancel()
        self._lingering.clear()
        if self._expiring:
            await asyncio.wait(self._expiring)
        await self._attachments.close_all()
        await self._interfaces.close()

    def records(self) -> list[RuleRecord]:
        return [active.record for active in self._active.values()]

    def slots(self) -> dict[str, int]:
        """Of all interfaces in use, by name."""
        return self._attachments.slots()

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
        await self._attach_all(child, "egress")
        await self._give_all_rules(child, self._of_worker[child.index].values())
        await self._attach_all(child, "ingress")

    async def announce(self) -> None:
        """A worker's state has changed."""
        async with self._became_ready:
            self._became_ready.notify_all()

    async def wait_for_workers(self, until: Callable[[], bool]) -> None:
        """Until a condition on their states holds."""
        async with self._became_ready:
            await self._became_ready.wait_for(until)

    # Changes.

    async def apply(self, add: Sequence[RuleRecord], remove: Sequence[str]) -> int:
        """Change the active rules: all of it or, with an Error, nothing. Returns how many workers acknowledged."""
        added = [Active(parse_rule(r.input, r.outputs, r.name), r) async for r in in_turns(add)]
        await self._wait_for_owners([a.rule for a in added] + [self._find_active(i).rule for i in remove])
        async with self._change():
            removed = [self._find_active(rule_id) for rule_id in remove]
            await self._check(added, removed)
            async with AsyncExitStack() as undo:
                undo.callback(self._clear_counters, added)  # of workers that had it for a moment; last of all
                await self._provide([active.rule for active in added], undo)
                workers = await self._distribute(added, removed, undo)
                self._admit([active.rule for active in added], undo)
                undo.pop_all()
            await self._commit(added, removed)
            try:
                self._attachments.refuse(active.rule for active in removed if active.rule.id not in self._active)
            except OSError as error:  # packets that nobody wants reach the workers, which is all
                log.warning("cannot filter out what went: %s", error.strerror)
            await self._retire([active.rule for active in removed])
            async for active in in_turns(removed):
                self._clear_counters([active])
            self._on_change([active.record for active in added], remove)
        return workers

    @contextlib.asynccontextmanager
    async def _change(self) -> AsyncIterator[None]:
        """The turn to change rules. Busy if it does not come soon: nobody would be there for the answer any more."""
        try:
            await asyncio.wait_for(self.changing.acquire(), TURN_S)
        except TimeoutError:
            raise Busy("many changes are under way", "try again") from None
        try:
            yield
        finally:
            self.changing.release()

    def _find_active(self, rule_id: str) -> Active:
        active = self._active.get(rule_id)
        if active is None:
            raise RuleError(f"no active rule has the id {rule_id}", "'mcrelay list' shows the rules")
        return active

    def _clear_counters(self, unused: Iterable[Active]) -> None:
        for active in unused:
            rules = {active.record.counter} - self._rule_counters
            outputs = set(active.record.output_counters) - self._output_counters
            for page in self._pages:
                page.clear(rules, outputs)

    async def _check(self, added: list[Active], removed: list[Active]) -> None:
        """RuleError if the change cannot follow what is active now."""
        after, going = RuleSet(), RuleSet.of(active.rule for active in removed)
        freed = {a.record.counter for a in removed}
        freed_by_outputs = {counter for a in removed for counter in a.record.output_counters}
        async for active in in_turns(added):
            record = active.record
            if len(record.output_counters) != len(active.rule.outputs):
                raise RuleError(f"rule {active.rule.label} does not say where its outputs are counted")
            used_by_outputs = self._output_counters.intersection(record.output_counters)
            if (
                record.counter in self._rule_counters and record.counter not in freed
            ) or used_by_outputs - freed_by_outputs:
                raise RuleError(f"rule {active.rule.label} would be counted with another")
            self._rules.check_addable(active.rule, unless=going)
            after.add(active.rule)

    async def _wait_for_owners(self, rules: Iterable[Rule]) -> None:
        """Workers that must know a change have to be alive for it: give one that is being restarted some time."""
        owners = {self._data[owner] for rule in rules for owner in rule.owners(self._workers)}
        try:
            async with asyncio.timeout(OWNER_READY_S):
                await self.wait_for_workers(lambda: all(child.state == "ready" for child in owners))
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
            await self._take_up(name, direction, present[name], undo)
            self._attachments.check_unchanged(present[name])
            if self._attachments.has((name, direction)):
                continue
            ring = self._ring_for(present[name].mtu)
            known = name in self._attachments
            attachment = await asyncio.to_thread(self._attachments.open, present[name], direction, ring)
            if not known:
                for page in self._pages:
                    page.clear_interface(attachment.slot)
            undo.push_async_callback(self._detach, (name, direction))
            workers = self._ready_workers()
            await asyncio.gather(*(self._attach(child, attachment, direction) for child in workers))
        groups = list(dict.fromkeys(group(rule) for rule in rules))
        undo.push_async_callback(self._attachments.leave, groups)
        await self._attachments.join(groups)

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
        undo.callback(self._attachments.refuse, [rule for rule in rules if rule.id not in self._active])
        try:
            self._attachments.admit(rules)
        except OSError as error:
            raise SystemRefusal(f"cannot filter for these rules: {error.strerror}", "see 'dmesg'") from None

    def _ring_for(self, mtu: int) -> RingGeometry | None:
        if self._ingress == "recv" or any(child.engine == "reference" for child in self._data):
            return None
        return ring_geometry(mtu, self._ring_memory)

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

    def _linger(self, need: Need) -> None:
        """Nobody needs it any more, but may soon: keep it for a while, since to open it again takes some milliseconds.
        No packet comes in by it meanwhile, since none is admitted."""
        if need not in self._lingering:
            self._lingering[need] = asyncio.get_running_loop().call_later(LINGER_S, self._expire, need)

    def _expire(self, need: Need) -> None:
        task = asyncio.get_running_loop().create_task(self._detach_unused(need))
        self._expiring.add(task)
        task.add_done_callback(self._expiring.discard)

    async def _detach_unused(self, need: Need) -> None:
        async with self.changing:
            if self._lingering.pop(need, None):
                await self._detach(need)

    async def _take_up(self, name: str, direction: Direction, interface: Interface, undo: AsyncExitStack) -> None:
        """If it lingers, it does so no more: it is needed again, or its interface is another one by now."""
        if name not in self._attachments:
            if self._attachments.is_full:  # what lingers must not be in somebody's way
                await self._detach_lingering(list(self._lingering))
            return
        opened_on = self._attachments[name].interface
        if (opened_on.index, opened_on.mtu) != (interface.index, interface.mtu):
            await self._detach_lingering([need for need in self._lingering if need[0] == name])
        elif timer := self._lingering.pop((name, direction), None):
            timer.cancel()
            undo.callback(self._linger, (name, direction))

    async def _detach_lingering(self, needs: list[Need]) -> None:
        for need in needs:
            self._lingering.pop(need).cancel()
            await self._detach(need)

    async def _detach(self, need: Need) -> None:
        """Take an interface's direction out of use everywhere, then close it."""
        name, direction = need
        slot = self._attachments[name].slot
        for child in self._ready_workers():
            ticket, life = child.ticket(), child.restarts
            try:
                await child.command(ticket, (DetachInterface(ticket=ticket, slot=slot, direction=direction), ()))
            except Busy as error:
                log.warning("%s", error)
                child.kill_life(life)  # its next life will not know the interface
        await self._attachments.close(name, direction)

    def _ready_workers(self) -> list[Child]:
        """The data planes to tell; the others will be told everything when they come up."""
        return [child for child in self._data if child.state == "ready"]

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
            patience_s=len(records) * RECORD_S,
        )

    async def _take_back(self, child: Child) -> None:
        """A change failed: the worker goes back to what it had. One that is not ready will be given that anyway."""
        life = child.restarts
        if child.state != "ready":
            return
        try:
            await self._give_all_rules(child, self._of_worker[child.index].values())
        except Busy as error:
            log.warning("%s", error)
            child.kill_life(life)  # its next life starts with the rules that hold

    async def _commit(self, added: list[Active], removed: list[Active]) -> None:
        async for active in in_turns(removed):
            self._rules.remove(active.rule.id)
            del self._active[active.rule.id]
            self._rule_counters.discard(active.record.counter)
            self._output_counters.difference_update(active.record.output_counters)
            for owner in active.rule.owners(self._workers):
                del self._of_worker[owner][active.rule.id]
            self._attachments.release(active.rule)
        async for active in in_turns(added):
            self._rules.add(active.rule)
            self._active[active.rule.id] = active
            self._rule_counters.add(active.record.counter)
            self._output_counters.update(active.record.output_counters)
            for owner in active.rule.owners(self._workers):
                self._of_worker[owner][active.rule.id] = active
            self._attachments.keep(active.rule)
        self.generation += 1

    async def _retire(self, rules: list[Rule]) -> None:
        """Leave and close what only these rules needed."""
        await self._attachments.leave(group(rule) for rule in rules)
        async for rule in in_turns(rules):
            for name, direction in self._attachments.unused(rule):
                if direction == "egress" or self._attachments.filters(name):
                    self._linger((name, direction))
                else:  # all that arrives there would go on to the workers
                    await self._detach((name, direction))

    async def replenish(self) -> None:
        """Sockets for the next interface, most of which have this MTU."""
        ring = self._ring_for(ETHERNET_MTU)
        if ring is not None:
            await self._attachments.replenish(ring)

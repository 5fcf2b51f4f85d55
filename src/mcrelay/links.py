"""Links: the interfaces that rules name, opened and given to the workers as far as they are there.

Owns the attachments and keeps them right while interfaces come and go: a rule may name one that does not exist; when it
appears, is deleted and made again, renamed, or changes its MTU or address, what is open there is closed or opened anew,
groups are joined again, and the rules in the workers stay as they are. Where a rule names a pattern, the interfaces
that it stands for are followed (patterns.py). Why a direction that rules use does not work
is kept as its problem, for people to read, and so is each group that cannot be joined.

Everything here happens in a turn of `changing`, so that a change of rules never sees half of it. Knows workers only as
somebody who acknowledges commands, and never waits for one without a deadline.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from itertools import islice
from typing import Final, Literal

from mcrelay.children import Child
from mcrelay.counters import Page
from mcrelay.errors import Busy, Error, SystemRefusal
from mcrelay.handover import Heritage
from mcrelay.limits import RingGeometry, ring_geometry
from mcrelay.loans import WRITTEN, Loans
from mcrelay.messages import UNJOINED_MAX, InterfaceRecord, Message
from mcrelay.net.attachments import Attachment, Attachments, Need, Retired, egress_needs, lacks_address, problem
from mcrelay.net.hearing import Hearing
from mcrelay.net.interfaces import Interface, Interfaces
from mcrelay.own import OwnAddresses
from mcrelay.patterns import PatternLinks
from mcrelay.rules import Rule
from mcrelay.turns import in_turns
from mcrelay.ways import DIRECTIONS, Direction

log = logging.getLogger(__name__)

ETHERNET_MTU: Final = 1500
LINGER_S: Final = 5.0  # how long an interface that no rule uses any more is kept
PROBLEM_MAX: Final = 256  # characters, messages.Text
AGAIN_S: Final = 1.0  # after an interface that is there could not be opened
LOOK_AGAIN_S: Final = 10.0  # after a group could not be joined or a port taken: somebody may have made room


class Links:
    """`data`: the data plane workers. Counters of a slot that gets another interface are cleared in all `pages`.
    `on_change` is called when a problem came or went, in a turn of its own; `before_use` when devices may be
    connected otherwise than before, and before rules use what is new."""

    def __init__(
        self,
        data: Sequence[Child],
        pages: Sequence[Page],
        changing: asyncio.Lock,
        *,
        ingress: Literal["ring", "recv"],
        ring_memory: int,
        ring_memories: Mapping[str, int],
        rootless: bool,
        on_change: Callable[[], None],
        before_use: Callable[[], Awaitable[None]],
    ) -> None:
        self._data = data
        self._pages = pages
        self._look_timer: asyncio.TimerHandle | None = None
        self._changing = changing
        self._ingress = ingress
        self._ring_memory = ring_memory  # bytes
        self._ring_memories = ring_memories  # of single interfaces
        self._on_change = on_change
        self._before_use = before_use
        self._attachments = Attachments(len(data), rootless=rootless)
        self._loans = Loans(data, self._attachments)
        self._patterns = PatternLinks(self._attachments, self._loans.ready_workers)
        self._moved = asyncio.Event()  # something may have happened to an interface
        self._interfaces = Interfaces(self._moved.set)
        self._own = OwnAddresses(self._interfaces, self._loans.ready_workers)
        self._following: asyncio.Task[None] | None = None
        self._lingering: dict[Need, asyncio.TimerHandle] = {}  # open, and needed by no rule
        self._expiring: set[asyncio.Task[None]] = set()
        self._is_held = False
        self._told: tuple[InterfaceRecord, ...] = ()
        self._is_over = False

    async def open(self) -> None:
        """Before the workers are told anything: what they must know is known on return."""
        await self._interfaces.open()
        self._own.read()
        self._attachments.refresh(self._interfaces.present())
        self._following = asyncio.create_task(self._follow())

    async def rest(self) -> None:
        """Follow the interfaces no more."""
        if self._following:
            self._following.cancel()
            await asyncio.wait([self._following])
        for timer in self._lingering.values():
            timer.cancel()
        if self._look_timer:
            self._look_timer.cancel()
        self._lingering.clear()
        if self._expiring:
            await asyncio.wait(self._expiring)

    async def close(self) -> None:
        """At rest, and no worker may be left."""
        await self._attachments.close_all()
        await self._interfaces.close()

    # What others may know.

    def slots(self) -> dict[str, int]:
        """Of all interfaces that rules name."""
        return self._attachments.slots()

    @property
    def patience_s(self) -> float:
        """How much longer a worker may take for rules since patterns stand for interfaces."""
        return self._patterns.patience_s

    def records(self) -> tuple[InterfaceRecord, ...]:
        """All interfaces that rules name, and what is wrong with them."""
        left, present = UNJOINED_MAX, self._interfaces.present()
        records = []
        for attachment in self._attachments:
            unjoined = dict(islice(attachment.unjoined.items(), left))
            left -= len(unjoined)
            records.append(
                InterfaceRecord(
                    name=attachment.name,
                    slot=attachment.slot,
                    present=attachment.name in present,
                    versions=present[attachment.name].versions if attachment.name in present else (),
                    used=tuple(d for d in DIRECTIONS if self._is_needed(attachment, d)),
                    problems={d: text for d, text in attachment.problems.items() if self._is_needed(attachment, d)},
                    unjoined={membership.text: why[:PROBLEM_MAX] for membership, why in unjoined.items()},
                )
            )
        return tuple(records)

    def tell(self) -> tuple[InterfaceRecord, ...]:
        """The records, for those who are to know them."""
        self._told = self.records()
        return self._told

    def hearing(self) -> Hearing:
        """Where this host hears what it sends, as its interfaces are now."""
        return Hearing(self._interfaces.present().values(), self._interfaces.addresses())

    def _is_open(self, need: Need) -> bool:
        name, direction = need
        return name in self._attachments and direction in self._attachments[name].sockets

    def _is_needed(self, attachment: Attachment, direction: Direction) -> bool:
        return self._attachments.is_needed((attachment.name, direction))

    # Handover.

    def will(self) -> Iterator[tuple[Message, list[int]]]:
        """What a successor needs to go on with these interfaces; in a turn of the caller's."""
        return self._attachments.will()

    def adopt(self, heritage: Heritage, rules: Iterable[Rule]) -> None:
        """Go on with a predecessor's interfaces and rules, but leave the packet sockets to it until take_over()."""
        self._is_held = True
        self._attachments.adopt(heritage)
        known = {attachment.name for attachment in self._attachments}
        for rule in rules:
            self._patterns.count(rule)
        self._patterns.choose(known, self._claim)
        for rule in rules:
            names = self._attachments.ingress_names(rule, known)
            for name in sorted(names | {name for name, _direction in egress_needs(rule)}):
                self._attachments.claim(name)
            self._attachments.keep(rule, names)
        self._patterns.adopt(self._patterns.names())
        self._attachments.admit(rules)

    async def hold(self) -> None:
        """Have the workers finish what they have in hand, and leave the packet sockets to somebody else."""
        self._is_held = True
        for attachment in self._attachments:
            if "ingress" in attachment.sockets:
                await self._loans.take_back(attachment, "ingress")

    async def take_over(self) -> None:
        """Nobody else reads the packet sockets any more. Nothing if nobody was to."""
        if not self._is_held:
            return
        self._is_held = False
        for attachment in self._attachments:
            if "ingress" not in attachment.sockets:
                continue
            if attachment.ring == self._ring_for(attachment.opened["ingress"].mtu):
                await self._loans.give_everywhere(attachment, "ingress")
                await self._attachments.rejoin(attachment)
            else:  # this daemon was told otherwise: what is needed is opened again
                await self._detach((attachment.name, "ingress"))
        for attachment in self._attachments:
            for direction in attachment.sockets:
                if not self._is_needed(attachment, direction):
                    self._linger((attachment.name, direction))
        self._moved.set()  # what happened meanwhile

    async def leave_left_out(self) -> None:
        """Want no more what a predecessor wanted for rules that are no more. In a turn of the caller's."""
        await self._attachments.leave_left_out()

    def leave(self) -> None:
        """A successor has all of it: change nothing any more."""
        self._is_over = True

    # Changes of rules.

    async def provide(self, rules: list[Rule], removed: list[Rule], undo: AsyncExitStack) -> None:
        """Open what these rules, in the place of those, need, as far as it is there, and join their groups. RuleError
        if they name or match too many interfaces, SystemRefusal if the kernel will not open what is there."""
        present = self._interfaces.present()
        self._loans.ports.check(rules, self._own.texts, present)
        if any(name not in present for name, _direction in self._wanted(rules, present)):
            present = await self._interfaces.refresh()  # one that was made this very moment
        wanted = self._wanted(rules, present)
        matched = self._patterns.names().union(
            *(self._attachments.ingress_names(rule, present) for rule in rules if rule.input.is_pattern)
        )
        self._patterns.check(matched, rules, removed)
        if any(name not in self._attachments for name, _direction in wanted) and self._attachments.is_full:
            names = {name for name, _direction in wanted}
            for need in [need for need in self._lingering if need[0] not in names]:
                await self._detach(need)  # what lingers must not be in somebody's way
        for need in wanted:
            if self._is_open(need) and self._has_moved(self._attachments[need[0]], need[1], present.get(need[0])):
                await self._detach(need)
        for name, _direction in wanted:
            if name not in self._attachments:
                self._claim(name)
                undo.callback(self._attachments.forget_unused, name)
        undo.push_async_callback(self._tell_patterns)
        await self._patterns.tell(matched)
        for need in wanted:
            await self._take_up(need, present.get(need[0]), undo)
        await self._loans.ports.open(rules, present, undo)
        memberships = [
            membership
            for rule in rules
            for membership in self._attachments.memberships(rule, self._attachments.ingress_names(rule, present))
        ]
        undo.push_async_callback(self._attachments.leave, memberships)
        await self._attachments.join(memberships)
        self._see_to_unjoined()

    def _wanted(self, rules: Iterable[Rule], present: Iterable[str]) -> list[Need]:
        """What these rules need, as the interfaces are."""
        wanted: set[Need] = set()
        for rule in rules:
            wanted.update((name, "ingress") for name in self._attachments.ingress_names(rule, present))
            wanted.update(egress_needs(rule))
        return sorted(wanted)

    def _see_to_unjoined(self) -> None:
        """Try again later what could not be joined."""
        if any(attachment.unjoined for attachment in self._attachments):
            self._look_again()

    def _look_again(self) -> None:
        """Settle in a while, even if no interface changes."""
        if self._look_timer is None:
            self._look_timer = asyncio.get_running_loop().call_later(LOOK_AGAIN_S, self._look)

    def _look(self) -> None:
        self._look_timer = None
        self._moved.set()

    async def _take_up(self, need: Need, interface: Interface | None, undo: AsyncExitStack) -> None:
        """Have it open if its interface is there. What lingers does so no more: it is needed again."""
        name, direction = need
        attachment = self._attachments[name]
        if timer := self._lingering.pop(need, None):
            timer.cancel()
            undo.callback(self._linger, need)
        if not self._is_open(need) and not self._attachments.is_needed(need):
            undo.push_async_callback(self._detach, need)
        try:
            await self._bring_up(attachment, direction, interface)
        except SystemRefusal:
            now = (await self._interfaces.refresh()).get(name)
            if now == interface:
                raise
            await self._bring_up(attachment, direction, now)  # it was going that very moment

    def _claim(self, name: str) -> None:
        """Make an entry for the interface, which has none. RuleError if there are too many."""
        slot = self._attachments.claim(name).slot
        for page in self._pages:
            page.clear_interface(slot)

    def admit(self, rules: list[Rule], undo: AsyncExitStack, undone: Callable[[], Iterable[Rule]]) -> None:
        """The workers know these rules: let their packets come. `undone` has those that are to come no more if it is
        undone."""
        undo.callback(lambda: self._attachments.refuse(undone()))
        try:
            self._attachments.admit(rules)
        except OSError as error:
            raise SystemRefusal(f"cannot filter for these rules: {error.strerror}", "see 'dmesg'") from None

    def refuse(self, rules: Iterable[Rule]) -> None:
        """Let their packets come no more."""
        try:
            self._attachments.refuse(rules)
        except OSError as error:  # packets that nobody wants reach the workers, which is all
            log.warning("cannot filter out what went: %s", error.strerror)

    def keep(self, rule: Rule) -> None:
        """The rule is active."""
        present = self._interfaces.present()
        there = [attachment.name for attachment in self._attachments if attachment.name in present]
        self._attachments.keep(rule, self._attachments.ingress_names(rule, there))
        self._patterns.count(rule)

    def release(self, rule: Rule) -> Retired:
        """It is no longer; retire() does what follows from that."""
        needs = self._attachments.needs(rule)
        self._patterns.count(rule, -1)
        return Retired(needs, self._attachments.memberships(rule, self._attachments.release(rule)))

    async def retire(self, retired: list[Retired]) -> None:
        """Leave and close what only these rules needed."""
        async for one in in_turns(retired):
            await self._attachments.leave(one.memberships)
            for need in self._attachments.unused(one.needs):
                if not self._is_open(need):
                    self._attachments.forget_unused(need[0])
                elif need[1] != "ingress" or self._attachments[need[0]].admission:
                    self._linger(need)
                else:  # all that arrives there would go on to the workers
                    await self._detach(need)
        if self._attachments.left_out:
            self._moved.set()  # there may be room now
        await self._loans.ports.close_unused()
        self._absorb()

    def _absorb(self) -> None:
        if not self._attachments.absorb():
            self._look_again()

    async def replenish(self) -> None:
        """Sockets for the next interface, most of which have this MTU."""
        ring = self._ring_for(ETHERNET_MTU)
        if ring is not None:
            await self._attachments.replenish(ring)

    # Interfaces that come and go.

    async def _follow(self) -> None:
        while True:
            await self._moved.wait()
            self._moved.clear()
            async with self._changing:
                if self._is_held or self._is_over:
                    continue
                try:
                    await self._before_use()
                    await self._settle()
                except Exception:  # whatever it is, the next notification finds us here
                    log.exception("cannot follow the interfaces")
                    self._again()
            try:
                await self.replenish()  # what was opened may have come from the stock
            except Exception:
                log.exception("cannot prepare sockets for the next interface")

    def _again(self) -> None:
        asyncio.get_running_loop().call_later(AGAIN_S, self._moved.set)

    async def _settle(self) -> None:
        """Make what is open agree with the interfaces that there are."""
        present = self._interfaces.present()
        await self._own.tell()
        await self._follow_patterns(present)
        self._absorb()
        for attachment in self._attachments:
            for direction in DIRECTIONS:
                try:
                    await self._settle_one(attachment, direction, present.get(attachment.name))
                except (Error, OSError) as error:
                    attachment.problems[direction] = str(error)[:PROBLEM_MAX]
                    self._again()
        if self.records() != self._told:
            self._log_changes(self._told)
            self._on_change()

    async def _follow_patterns(self, present: Mapping[str, Interface]) -> None:
        """Have each pattern stand for the interfaces that match it now, as many as there is room for."""
        chosen = self._patterns.choose(present, self._claim)
        changed = [
            rule for rule, was in self._attachments.patterns() if self._attachments.ingress_names(rule, chosen) != was
        ]
        if not await self._tell_patterns(chosen):
            return
        gone = [self.release(rule) for rule in changed]
        for rule in changed:
            self._attachments.keep(rule, self._attachments.ingress_names(rule, chosen))
            self._patterns.count(rule)
        for attachment in self._attachments:
            self._attachments.forget_unused(attachment.name)  # chosen, but workers could not be told before it went
        if not changed:
            return
        try:
            self._attachments.admit(changed)
        finally:
            await self.retire(gone)
        for attachment in self._attachments:
            if "ingress" in attachment.sockets:
                await self._attachments.rejoin(attachment)

    async def _tell_patterns(self, names: Iterable[str] | None = None) -> bool:
        """Whether all workers know what patterns stand for; if not, that is tried again soon."""
        try:
            await self._patterns.tell(self._patterns.names() if names is None else names)
        except Busy as error:
            log.warning("workers do not know what patterns stand for: %s", error)
            self._again()
            return False
        return True

    async def _settle_one(self, attachment: Attachment, direction: Direction, interface: Interface | None) -> None:
        if direction in attachment.sockets and self._has_moved(attachment, direction, interface):
            await self._detach((attachment.name, direction))
        if self._is_needed(attachment, direction):
            await self._bring_up(attachment, direction, interface)
        if direction == "ingress":
            await self._loans.ports.settle(attachment)
        if direction == "ingress" and attachment.unjoined:
            await self._attachments.rejoin(attachment)
            self._see_to_unjoined()

    def _log_changes(self, before: tuple[InterfaceRecord, ...]) -> None:
        """Log what came and went."""
        known = {(r.name, d): text for r in before for d, text in r.problems.items()}
        now = {(r.name, d): text for r in self.records() for d, text in r.problems.items()}
        for text in dict.fromkeys(text for need, text in now.items() if known.get(need) != text):
            log.warning("rules have to do without an interface: %s", text)
        for name in dict.fromkeys(name for name, _direction in known.keys() - now.keys()):
            if name in self._attachments and not any(needed == name for needed, _direction in now):
                log.info("interface %s is there and in use", name)
        unjoined = {record.name: len(record.unjoined) for record in before}
        for attachment in self._attachments:
            if len(attachment.unjoined) > unjoined.get(attachment.name, 0):
                membership, why = next(reversed(attachment.unjoined.items()))
                log.warning(
                    "%s: %d groups cannot be joined, such as %s: %s",
                    attachment.name,
                    len(attachment.unjoined),
                    membership.text,
                    why,
                )

    def _has_moved(self, attachment: Attachment, direction: Direction, interface: Interface | None) -> bool:
        """What is open there has to be closed: it is of no use, or of not enough."""
        if interface is None or self._attachments.is_stale(attachment, direction, interface):
            return True
        if direction != "ingress":
            return lacks_address(direction, interface) != 0
        if self._attachments.ports:
            return False  # any datagram fits
        ring, opened = self._ring_for(interface.mtu, attachment.name), attachment.opened[direction]
        # A packet that is longer than its slot is relayed, but takes a longer way.
        return ring.frame_size > attachment.ring.frame_size if ring and attachment.ring else interface.mtu > opened.mtu

    async def _bring_up(self, attachment: Attachment, direction: Direction, interface: Interface | None) -> None:
        """Open one direction if its interface is there and it is not open; note what is wrong if it is not to be."""
        wrong = problem(attachment.name, direction, interface)
        if interface and not wrong and direction not in attachment.sockets:
            await self._open(attachment, direction, interface)
        elif interface and direction != "ingress" and direction in attachment.sockets:
            await self._set_facts(attachment, direction, interface)
        if wrong:
            attachment.problems[direction] = wrong
        else:
            attachment.problems.pop(direction, None)

    async def _set_facts(self, attachment: Attachment, direction: Direction, interface: Interface) -> None:
        """Have the workers know the interface's MTU and, where they write headers, its addresses."""
        before = attachment.opened[direction]
        if before.mtu == interface.mtu and (direction not in WRITTEN or before.link() == interface.link()):
            return
        attachment.opened[direction] = interface
        try:
            await self._loans.give_everywhere(attachment, direction)
        except BaseException:
            attachment.opened[direction] = before
            raise

    async def _open(self, attachment: Attachment, direction: Direction, interface: Interface) -> None:
        """Open sockets, give them to the workers, and let come in what rules want."""
        ring = self._ring_for(interface.mtu, attachment.name)
        try:
            await asyncio.to_thread(self._attachments.open, attachment, interface, direction, ring)
            await self._loans.give_everywhere(attachment, direction)
            if direction == "ingress":
                await self._attachments.rejoin(attachment)
                self._attachments.readmit(attachment)
        except OSError as error:
            await self._detach((attachment.name, direction))
            raise SystemRefusal(f"cannot filter on {attachment.name}: {error.strerror}", "see 'dmesg'") from None
        except BaseException:
            await self._detach((attachment.name, direction))
            raise

    def _ring_for(self, mtu: int, name: str | None = None) -> RingGeometry | None:
        no_rings = self._ingress == "recv" or self._attachments.ports
        if no_rings or any(child.engine == "reference" for child in self._data):
            return None
        return ring_geometry(mtu, self._ring_memories.get(name or "", self._ring_memory))

    # Workers.

    async def introduce(self, child: Child) -> None:
        """Tell a worker whose packets are our own, and what patterns stand for. Before it gets rules."""
        await self._own.introduce(child)
        await self._patterns.introduce(child)

    async def attach_ways_out(self, child: Child) -> None:
        """Give a worker's new life all that is open for sending."""
        await self._loans.give_all(child, ingress=False)

    async def attach_ingress(self, child: Child) -> None:
        """Give it all that is open for receiving."""
        if not self._is_held:
            await self._loans.give_all(child, ingress=True)

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
        async with self._changing:
            if need in self._lingering:
                await self._detach(need)
                if self._attachments.left_out:
                    self._moved.set()  # there may be room now

    async def _detach(self, need: Need) -> None:
        """Take an interface's direction out of use everywhere, then close it, if it is open."""
        name, direction = need
        if timer := self._lingering.pop(need, None):
            timer.cancel()
        if not self._is_open(need):
            return
        attachment = self._attachments[name]
        await self._loans.take_back(attachment, direction)
        await self._attachments.close(attachment, direction)
        self._attachments.forget_unused(name)

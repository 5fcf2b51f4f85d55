"""Attachments: the interfaces that rules name, and the durable sockets on those that are there.

Owns, for the supervisor, every packet socket and egress socket from opening to closing, every group membership, which
slot an interface has, and how many rules need what. A name has its slot for as long as a rule has the name, whether
there is such an interface or not: rules in the workers' tables stay as they are when interfaces come and go. A pattern
has no slot; the names that it stands for have, while such interfaces are there. What a worker gets of it is a borrowed
descriptor: when the worker dies, nothing here changes.

Kernel facts: closing a packet socket waits for the kernel's other cores (synchronize_net), so sockets are closed on
another thread. A packet socket whose interface is deleted is bound to nothing from then on, even if another interface
gets the same name and index; one whose interface goes down takes up again when it comes up, and so do memberships.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import TypeVar

from mcrelay.errors import RuleError, SystemRefusal
from mcrelay.handover import Heritage
from mcrelay.limits import INTERFACES_MAX, RingGeometry
from mcrelay.messages import InheritAbsorber, InheritInterface, InheritMemberships, InheritPort, Member, Message, Ring
from mcrelay.net import egress, sockets
from mcrelay.net.absorbers import Absorbers, Place, place_of
from mcrelay.net.admission import Admission, Destination, destination_of
from mcrelay.net.interfaces import Interface
from mcrelay.net.memberships import Memberships
from mcrelay.net.plain import Ports, number_of
from mcrelay.rules import Membership, Rule
from mcrelay.steering import NETWORK
from mcrelay.turns import in_turns
from mcrelay.ways import DIRECTIONS, WAYS, Direction

log = logging.getLogger(__name__)

Need = tuple[str, Direction]  # interface name


@dataclass
class Attachment:
    """An interface that rules name: for each direction that is open, one socket per worker."""

    name: str
    slot: int
    opened: dict[Direction, Interface] = field(default_factory=dict)  # what it is open on, as that was
    sockets: dict[Direction, list[socket.socket]] = field(default_factory=dict)
    ring: RingGeometry | None = None  # of the ingress sockets, if they have one
    admission: Admission | None = None  # of the ingress sockets, if they have one
    problems: dict[Direction, str] = field(default_factory=dict)  # why a direction in use does not work
    unjoined: dict[Membership, str] = field(
        default_factory=dict
    )  # groups that the kernel does not let us join, and why


@dataclass(frozen=True, slots=True)
class Retired:
    """What a rule that is no longer active needed."""

    needs: set[Need]
    memberships: list[Membership]


def egress_needs(rule: Rule) -> set[Need]:
    return {(output.interface, rule.way(output).direction) for output in rule.outputs}


def problem(name: str, direction: Direction, interface: Interface | None) -> str | None:
    """Why rules cannot use the interface in this direction now; None if they can."""
    if interface is None:
        return f"there is no interface {name!r}"
    if not interface.is_up:
        return f"interface {name!r} is down (ip link set {name} up)"
    if direction == "frame" and interface.network == NETWORK:
        return f"interface {name!r} is of a kind whose frames we cannot write: leave out source=keep and sport"
    if direction != "ingress" and (version := lacks_address(direction, interface)):
        return f"interface {name!r} has no IPv{version} address to send from (ip address add ADDRESS/LENGTH dev {name})"
    return None


def lacks_address(direction: Direction, interface: Interface) -> int:
    """The IP version of which the interface must have an address for this way out, and has none; else 0."""
    if direction.endswith("4") and not interface.has_ipv4:
        return 4
    return 6 if direction.endswith("6") and not interface.has_ipv6 else 0


class Attachments:
    """In `rootless` mode packets come in by ordinary sockets: ingress is open without any, and `ports` has them."""

    def __init__(self, workers: int, *, rootless: bool = False) -> None:
        self._workers = workers
        self.ports = Ports() if rootless else None
        self._by_name: dict[str, Attachment] = {}
        self._memberships = Memberships()
        self._absorbers = Absorbers()
        self._absorbed: dict[str, list[Place]] = {}  # by rule id
        self._uses: Counter[Need] = Counter()
        self._joined: Counter[Membership] = Counter()  # what active rules want
        self._wanted: Counter[tuple[str, Destination]] = Counter()  # what active rules take, by interface
        self.left_out: set[str] = set()  # of all patterns that match them, for want of room
        self._patterns: dict[str, tuple[Rule, set[str]]] = {}  # by rule id: active, and the names it stands for
        self._may_filter = True
        self._replenishing = False
        self._stock: tuple[RingGeometry, list[socket.socket]] | None = None

    def __iter__(self) -> Iterator[Attachment]:
        return iter(list(self._by_name.values()))

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def __getitem__(self, name: str) -> Attachment:
        return self._by_name[name]

    @property
    def is_full(self) -> bool:
        """No other interface can be used."""
        return len(self._by_name) == INTERFACES_MAX

    def is_needed(self, need: Need) -> bool:
        return self._uses[need] > 0

    def ingress_names(self, rule: Rule, present: Iterable[str]) -> set[str]:
        """The interfaces that the rule's packets come in by: the one it names, or those of these that its pattern
        matches."""
        if not rule.input.is_pattern:
            return {rule.input.interface}
        return {name for name in present if rule.input.is_on(name) and name not in self.left_out}

    def needs(self, rule: Rule) -> set[Need]:
        """What an active rule needs now."""
        _rule, names = self._patterns.get(rule.id, (rule, {rule.input.interface}))
        return {*((name, "ingress") for name in names), *egress_needs(rule)}

    def slots(self) -> dict[str, int]:
        """The slot of each interface that rules name."""
        return {attachment.name: attachment.slot for attachment in self}

    def claim(self, name: str) -> Attachment:
        """The interface's entry, made if it has none. RuleError if rules name too many interfaces already."""
        if name not in self._by_name:
            self._by_name[name] = Attachment(name, self._free_slot())
        return self._by_name[name]

    def forget_unused(self, name: str) -> None:
        """Give the slot back if no rule names the interface and nothing is open on it."""
        attachment = self._by_name.get(name)
        if attachment and not attachment.sockets and not any(self._uses[name, direction] for direction in DIRECTIONS):
            del self._by_name[name]

    def open(
        self, attachment: Attachment, interface: Interface, direction: Direction, ring: RingGeometry | None
    ) -> None:
        """Open the sockets of one direction, one per worker; for ingress with this ring, and nothing comes in by it
        before readmit(). SystemRefusal if the kernel will not."""
        if direction == "ingress" and self.ports:
            self.ports.open_interface(interface)
            opened: list[socket.socket] = []
        elif direction == "ingress":
            stock, self._stock = self._stock, None
            prepared = stock[1] if stock and stock[0] == ring else None
            if stock and prepared is None:
                _close_all(stock[1])
            admission = self._make_admission(interface)
            try:
                opened = sockets.open_ingress(interface, self._workers, ring, prepared, admission)
            except BaseException:
                if admission:
                    admission.close()
                raise
            attachment.ring = ring
            attachment.admission = admission
        else:
            opened = egress.open_egress(interface, WAYS[direction], self._workers)
        attachment.sockets[direction] = opened
        attachment.opened[direction] = interface

    def _make_admission(self, interface: Interface) -> Admission | None:
        if not self._may_filter:
            return None
        try:
            return Admission(interface.network)
        except OSError as error:
            self._may_filter = False
            log.warning(
                "packets for nobody are dropped by the workers, not by the kernel: %s; give mcrelay run CAP_BPF, too",
                error.strerror,
            )
            return None

    async def replenish(self, ring: RingGeometry) -> None:
        """Prepare sockets for the next interface, so that its first rule need not wait for them. Best effort."""
        if self._stock is not None or self._replenishing:
            return
        self._replenishing = True
        try:
            with contextlib.suppress(OSError):
                self._stock = ring, await asyncio.to_thread(sockets.prepare_ingress, self._workers, ring)
        finally:
            self._replenishing = False

    def _free_slot(self) -> int:
        used = {attachment.slot for attachment in self}
        for slot in range(INTERFACES_MAX):
            if slot not in used:
                return slot
        raise RuleError(
            f"{INTERFACES_MAX} interfaces are in use already",
            "a daemon serves no more; run another one for the rest",
        )

    def is_stale(self, attachment: Attachment, direction: Direction, interface: Interface | None) -> bool:
        """What is open there is not open on this interface: it went, it has another name by now, or it is another one
        by that name."""
        opened = attachment.opened[direction]
        if interface is None or interface.index != opened.index:
            return True
        is_packet_socket = direction == "frame" or (direction == "ingress" and not self.ports)
        return is_packet_socket and not sockets.is_bound(attachment.sockets[direction][0], interface)

    async def close(self, attachment: Attachment, direction: Direction) -> None:
        """Close the sockets of one direction, and give up the memberships there. No worker may be using them."""
        closing = attachment.sockets.pop(direction)
        opened = attachment.opened.pop(direction)
        if direction == "ingress":
            if self.ports:
                self.ports.close_interface(attachment.name)
            try:
                async for membership in in_turns(self._memberships_on(attachment)):
                    self._memberships.leave(opened.index, membership.group, membership.source)
            except OSError as error:  # the rest is closed all the same
                log.warning("cannot leave the groups of %s: %s", attachment.name, error.strerror)
            attachment.unjoined.clear()
            if attachment.admission:
                attachment.admission.close()
                attachment.admission = None
        await asyncio.to_thread(_close_all, closing)

    # Handover.

    def will(self) -> Iterator[tuple[Message, list[int]]]:
        """What a successor needs to go on with these sockets; descriptors stay ours."""
        for attachment in self:
            for direction, opened in attachment.opened.items():
                ring = attachment.ring if direction == "ingress" else None
                filter_fds = (
                    attachment.admission.descriptors() if direction == "ingress" and attachment.admission else []
                )
                message = InheritInterface(
                    name=attachment.name,
                    slot=attachment.slot,
                    direction=direction,
                    index=opened.index,
                    mtu=opened.mtu,
                    ring=Ring(ring.block_size, ring.blocks, ring.frame_size) if ring else None,
                    loopback=opened.is_loopback,
                    filters=bool(filter_fds),
                    workers=self._workers,
                    plain=direction == "ingress" and self.ports is not None,
                )
                yield message, [*(sock.fileno() for sock in attachment.sockets[direction]), *filter_fds]
            for port, sock in self.ports.sockets(attachment.name).items() if self.ports else ():
                yield InheritPort(name=attachment.name, port=port), [sock.fileno()]
        for sock, members in self._memberships.holders():
            memberships = tuple(
                Member(index, str(group), str(source) if source else None) for index, group, source in members
            )
            yield InheritMemberships(memberships=memberships), [sock.fileno()]
        for place, sock in self._absorbers.sockets():
            message_of_it = InheritAbsorber(address=str(place.address), port=place.port, interface=place.interface)
            yield message_of_it, [sock.fileno()]

    def refresh(self, present: Mapping[str, Interface]) -> None:
        """What was adopted says little of interfaces: know their addresses before workers are told."""
        for attachment in self:
            interface = present.get(attachment.name)
            for direction, opened in attachment.opened.items():
                if interface and interface.index == opened.index and direction != "ingress":
                    attachment.opened[direction] = interface

    def adopt(self, heritage: Heritage) -> None:
        """Go on with all that a predecessor had. Before its rules are kept."""
        for interface, descriptors in heritage.interfaces:
            self.adopt_interface(interface, descriptors)
        for port, descriptor in heritage.ports:
            assert self.ports  # Heritage.check_fit
            self.ports.adopt(port.name, [(port.port, socket.socket(fileno=descriptor))])
        for memberships, descriptor in heritage.memberships:
            self.adopt_memberships(memberships, descriptor)
        for absorber, descriptor in heritage.absorbers:
            place = Place(ip_address(absorber.address), absorber.port, absorber.interface)
            self._absorbers.adopt(place, socket.socket(fileno=descriptor))

    def adopt_interface(self, message: InheritInterface, descriptors: list[int]) -> None:
        """Go on with one direction of an interface. Before its rules are kept."""
        if message.name not in self._by_name:
            self._by_name[message.name] = Attachment(message.name, message.slot)
        attachment = self._by_name[message.name]
        interface = Interface(
            message.name,
            message.index,
            message.mtu,
            is_up=True,
            has_ipv4=True,
            has_ipv6=True,
            is_loopback=message.loopback,
        )
        attachment.opened[message.direction] = interface
        attachment.sockets[message.direction] = [socket.socket(fileno=fd) for fd in descriptors[: self._workers]]
        if message.plain and self.ports:
            self.ports.adopt(message.name, ())
        if message.ring:
            attachment.ring = RingGeometry(message.ring.block_size, message.ring.blocks, message.ring.frame_size)
        if message.filters:
            attachment.admission = Admission.adopt(*descriptors[self._workers :])

    def adopt_memberships(self, message: InheritMemberships, descriptor: int) -> None:
        members = [
            (member.index, ip_address(member.group), ip_address(member.source) if member.source else None)
            for member in message.memberships
        ]
        self._memberships.adopt(socket.socket(fileno=descriptor), members)

    # Memberships, of interfaces whose ingress is open: the others' are joined when it is.

    async def join(self, wanted: Iterable[Membership]) -> None:
        """Be a member of these; what the kernel does not allow is noted in `unjoined`."""
        async for membership in in_turns(wanted):
            if not self._joined[membership]:
                self._join(membership)

    def _join(self, membership: Membership) -> None:
        attachment = self._by_name.get(membership.interface)
        if attachment is None or not (opened := attachment.opened.get("ingress")):
            return
        try:
            self._memberships.join(opened, membership.group, membership.source)
        except SystemRefusal as error:
            attachment.unjoined[membership] = str(error)
        else:
            attachment.unjoined.pop(membership, None)

    async def rejoin(self, attachment: Attachment) -> None:
        """Be a member again of all groups that active rules want there. Idempotent."""
        async for membership in in_turns(self._memberships_on(attachment)):
            self._join(membership)

    async def leave_left_out(self) -> None:
        """Cease to be a member of what a predecessor had joined for rules that are no more. It has gone for good by
        then: its sockets are these, and it would not join again."""
        indices = {name: opened.index for name, a in self._by_name.items() if (opened := a.opened.get("ingress"))}
        wanted = {(indices.get(m.interface), m.group, m.source) for m in self._joined}
        held = [member for _sock, members in self._memberships.holders() for member in members]
        try:
            async for member in in_turns(held):
                if member not in wanted:
                    self._memberships.leave(*member)
        except OSError as error:
            log.warning("cannot leave groups that no rule wants any more: %s", error.strerror)

    async def leave(self, unwanted: Iterable[Membership]) -> None:
        """Cease to be a member of these, unless a rule needs it."""
        async for membership in in_turns(unwanted):
            attachment = self._by_name.get(membership.interface)
            if self._joined[membership] or attachment is None:
                continue
            attachment.unjoined.pop(membership, None)
            if opened := attachment.opened.get("ingress"):
                self._memberships.leave(opened.index, membership.group, membership.source)

    def memberships(self, rule: Rule, names: Iterable[str]) -> list[Membership]:
        """What has to be joined for the rule on these interfaces."""
        return [membership for name in names for membership in rule.input.memberships(name)]

    def _memberships_on(self, attachment: Attachment) -> list[Membership]:
        return [membership for membership in self._joined if membership.interface == attachment.name]

    # Admission.

    def admit(self, rules: Iterable[Rule]) -> None:
        """Let these rules' packets through to the workers, who know them. Idempotent. OSError if that cannot be."""
        for attachment, destinations in self._destinations(rules):
            if attachment.admission:
                attachment.admission.admit(destinations)

    def readmit(self, attachment: Attachment) -> None:
        """The same for all active rules of an interface, after its ingress was opened."""
        if attachment.admission:
            attachment.admission.admit(wanted for name, wanted in self._wanted if name == attachment.name)

    def refuse(self, rules: Iterable[Rule]) -> None:
        """Let them through no more, unless an active rule wants the same. Idempotent."""
        for attachment, destinations in self._destinations(rules):
            if attachment.admission:
                attachment.admission.refuse(d for d in destinations if not self._wanted[attachment.name, d])

    def _destinations(self, rules: Iterable[Rule]) -> Iterator[tuple[Attachment, list[Destination]]]:
        """Of these rules, by interface."""
        by_name: dict[str, list[Destination]] = {}
        for rule in rules:
            for name in self.ingress_names(rule, self._by_name):
                by_name.setdefault(name, []).append(destination_of(rule.input))
        for name, destinations in by_name.items():
            if attachment := self._by_name.get(name):
                yield attachment, destinations

    # Uses.

    def keep(self, rule: Rule, names: Iterable[str]) -> None:
        """The rule is active, and its packets come in by these interfaces: count what it needs."""
        names = set(names)
        if rule.input.is_pattern:
            self._patterns[rule.id] = rule, names
        self._uses.update(self.needs(rule))
        self._joined.update(self.memberships(rule, names))
        self._wanted.update((name, destination_of(rule.input)) for name in names)
        if self.ports:
            self.ports.keep(names, number_of(rule))
        elif places := [place for name in names if (place := place_of(rule.input, name))]:
            self._absorbed[rule.id] = places
            for place in places:
                self._absorbers.take(place)

    def release(self, rule: Rule) -> set[str]:
        """The rule is no longer active. leave() and unused() then tell what goes with it. Returns the interfaces that
        its packets came in by."""
        needs = self.needs(rule)
        names = {name for name, direction in needs if direction == "ingress"}
        self._patterns.pop(rule.id, None)
        for need in needs:
            _decrement(self._uses, need)
        for membership in self.memberships(rule, names):
            _decrement(self._joined, membership)
        for name in names:
            _decrement(self._wanted, (name, destination_of(rule.input)))
        if self.ports:
            self.ports.release(names, number_of(rule))
        for place in self._absorbed.pop(rule.id, ()):
            self._absorbers.give_up(place)
        return names

    def absorb(self) -> bool:
        """Have this host take what comes to unicast inputs, and no more. False if it cannot for some: a program that
        has one may go later."""
        self._absorbers.sweep()
        self._absorbers.retry()
        return not self._absorbers.is_missing

    def patterns(self) -> list[tuple[Rule, set[str]]]:
        """The active rules with a pattern, and the names that each stands for at present."""
        return [(rule, set(names)) for rule, names in self._patterns.values()]

    def unused(self, needs: Iterable[Need]) -> list[Need]:
        """Which of these nobody needs any more."""
        return sorted(need for need in needs if not self._uses[need] and need[0] in self)

    async def close_all(self) -> None:
        self._memberships.close()
        self._absorbers.close()
        if self.ports:
            self.ports.close_all()
        for attachment in self:
            if attachment.admission:
                attachment.admission.close()
                attachment.admission = None
        stock = self._stock[1] if self._stock else []
        open_sockets = [sock for a in self for opened in a.sockets.values() for sock in opened]
        await asyncio.to_thread(_close_all, stock + open_sockets)
        self._by_name.clear()


Key = TypeVar("Key")


def _decrement(counts: Counter[Key], key: Key) -> None:
    counts[key] -= 1
    if not counts[key]:
        del counts[key]


def _close_all(closing: list[socket.socket]) -> None:
    for sock in closing:
        sock.close()

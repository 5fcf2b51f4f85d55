"""Attachments: the interfaces that rules name, and the durable sockets on those that are there.

Owns, for the supervisor, every packet socket and egress socket from opening to closing, every group membership, which
slot an interface has, and how many rules need what. A name has its slot for as long as a rule has the name, whether
there is such an interface or not: rules in the workers' tables stay as they are when interfaces come and go. What a
worker gets of it is a borrowed descriptor: when the worker dies, nothing here changes.

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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from typing import Final, TypeVar

from mcrelay.errors import RuleError
from mcrelay.limits import INTERFACES_MAX, RingGeometry
from mcrelay.messages import Direction, InheritInterface, InheritMemberships, Membership, Message, Ring
from mcrelay.net import sockets
from mcrelay.net.admission import Admission, Destination
from mcrelay.net.interfaces import Interface
from mcrelay.rules import Rule
from mcrelay.turns import in_turns

log = logging.getLogger(__name__)

Need = tuple[str, Direction]  # interface name
Group = tuple[str, IPv4Address]  # interface name

DIRECTIONS: Final[tuple[Direction, ...]] = ("egress", "ingress")


@dataclass
class Attachment:
    """An interface that rules name: for each direction that is open, one socket per worker."""

    name: str
    slot: int
    opened: dict[Direction, Interface] = field(default_factory=dict)  # what it is open on, as that was
    sockets: dict[Direction, list[socket.socket]] = field(default_factory=dict)
    ring: RingGeometry | None = None  # of the ingress sockets, if they have one
    admission: Admission | None = None  # of the ingress sockets, if they have one
    admitted: set[Destination] = field(default_factory=set)  # of rules, whether it is open or not
    problems: dict[Direction, str] = field(default_factory=dict)  # why a direction in use does not work


def needs(rule: Rule) -> set[Need]:
    return {(rule.input.interface, "ingress"), *((output.interface, "egress") for output in rule.outputs)}


def group(rule: Rule) -> Group:
    assert isinstance(rule.input.group, IPv4Address)
    return (rule.input.interface, rule.input.group)


class Attachments:
    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._by_name: dict[str, Attachment] = {}
        self._memberships = sockets.Memberships()
        self._uses: Counter[Need] = Counter()
        self._joined: Counter[Group] = Counter()
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
        if direction == "ingress":
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
            opened = sockets.open_egress(interface, self._workers)
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
        return direction == "ingress" and not sockets.is_bound(attachment.sockets[direction][0], interface)

    async def close(self, attachment: Attachment, direction: Direction) -> None:
        """Close the sockets of one direction, and give up the memberships there. No worker may be using them."""
        closing = attachment.sockets.pop(direction)
        opened = attachment.opened.pop(direction)
        if direction == "ingress":
            async for address in in_turns(self._groups(attachment)):
                self._memberships.leave(opened.index, address)
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
                )
                yield message, [*(sock.fileno() for sock in attachment.sockets[direction]), *filter_fds]
        for sock, members in self._memberships.holders():
            memberships = tuple(Membership(index, str(address)) for index, address in members)
            yield InheritMemberships(memberships=memberships), [sock.fileno()]

    def adopt_interface(self, message: InheritInterface, descriptors: list[int]) -> None:
        """Go on with one direction of an interface. Before its rules are kept."""
        if message.name not in self._by_name:
            self._by_name[message.name] = Attachment(message.name, message.slot)
        attachment = self._by_name[message.name]
        interface = Interface(
            message.name, message.index, message.mtu, is_up=True, has_ipv4=True, is_loopback=message.loopback
        )
        attachment.opened[message.direction] = interface
        attachment.sockets[message.direction] = [socket.socket(fileno=fd) for fd in descriptors[: self._workers]]
        if message.ring:
            attachment.ring = RingGeometry(message.ring.block_size, message.ring.blocks, message.ring.frame_size)
        if message.filters:
            map_fd, program_fd = descriptors[self._workers :]
            attachment.admission = Admission.adopt(map_fd, program_fd)

    def adopt_memberships(self, message: InheritMemberships, descriptor: int) -> None:
        members = [(member.index, IPv4Address(member.group)) for member in message.memberships]
        self._memberships.adopt(socket.socket(fileno=descriptor), members)

    # Memberships, of interfaces whose ingress is open: the others' are joined when it is.

    async def join(self, wanted: Iterable[Group]) -> None:
        """Be a member of these. SystemRefusal if the kernel does not; then leave() undoes what was done."""
        async for name, address in in_turns(wanted):
            if not self._joined[name, address] and (opened := self._by_name[name].opened.get("ingress")):
                self._memberships.join(opened, address)

    async def rejoin(self, attachment: Attachment) -> None:
        """Be a member again of all groups that active rules want there. Idempotent. SystemRefusal if the kernel does
        not."""
        async for address in in_turns(self._groups(attachment)):
            self._memberships.join(attachment.opened["ingress"], address)

    async def leave(self, unwanted: Iterable[Group]) -> None:
        """Cease to be a member of these, unless a rule needs it."""
        async for name, address in in_turns(unwanted):
            if not self._joined[name, address] and (opened := self._by_name[name].opened.get("ingress")):
                self._memberships.leave(opened.index, address)

    def _groups(self, attachment: Attachment) -> list[IPv4Address]:
        return [address for name, address in self._joined if name == attachment.name]

    # Admission.

    def admit(self, rules: Iterable[Rule]) -> None:
        """Let these rules' packets through to the workers, who know them. Idempotent. OSError if that cannot be."""
        for attachment, destinations in self._destinations(rules):
            attachment.admitted.update(destinations)
            if attachment.admission:
                attachment.admission.admit(destinations)

    def readmit(self, attachment: Attachment) -> None:
        """The same for all rules of an interface, after its ingress was opened."""
        if attachment.admission:
            attachment.admission.admit(attachment.admitted)

    def refuse(self, rules: Iterable[Rule]) -> None:
        """Let them through no more. Idempotent."""
        for attachment, destinations in self._destinations(rules):
            attachment.admitted.difference_update(destinations)
            if attachment.admission:
                attachment.admission.refuse(destinations)

    def _destinations(self, rules: Iterable[Rule]) -> Iterator[tuple[Attachment, list[Destination]]]:
        """Of these rules, by interface."""
        by_name: dict[str, list[Destination]] = {}
        for rule in rules:
            if rule.input.port is not None:
                by_name.setdefault(rule.input.interface, []).append((group(rule)[1], rule.input.port))
        for name, destinations in by_name.items():
            if attachment := self._by_name.get(name):
                yield attachment, destinations

    # Uses.

    def keep(self, rule: Rule) -> None:
        """The rule is active: count what it needs."""
        self._uses.update(needs(rule))
        self._joined[group(rule)] += 1

    def release(self, rule: Rule) -> None:
        """The rule is no longer active. leave() and unused() then tell what goes with it."""
        for need in needs(rule):
            _decrement(self._uses, need)
        _decrement(self._joined, group(rule))

    def unused(self, rule: Rule) -> list[Need]:
        """What of the rule's needs nobody needs any more."""
        return sorted(need for need in needs(rule) if not self._uses[need] and need[0] in self)

    async def close_all(self) -> None:
        self._memberships.close()
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

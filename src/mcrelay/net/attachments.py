"""Attachments: the interfaces in use, and the durable sockets on them.

Owns, for the supervisor, every packet socket and egress socket from opening to closing, which slot an interface has,
and how many rules need what. What a worker gets of it is a borrowed descriptor: when the worker dies, nothing here
changes.

Closing a packet socket waits for the kernel's other cores (synchronize_net), so sockets are closed on another thread.
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
from typing import TypeVar

from mcrelay.errors import RuleError, SystemRefusal
from mcrelay.limits import INTERFACES_MAX, RingGeometry
from mcrelay.messages import Direction
from mcrelay.net import sockets
from mcrelay.net.admission import Admission, Destination
from mcrelay.net.interfaces import Interface
from mcrelay.rules import Rule
from mcrelay.turns import in_turns

log = logging.getLogger(__name__)

Need = tuple[str, Direction]  # interface name
Group = tuple[str, IPv4Address]  # interface name


@dataclass
class Attachment:
    """An interface in use: for each direction in use, one socket per worker."""

    slot: int
    interface: Interface
    ring: RingGeometry | None = None  # of the ingress sockets, if they have one
    admission: Admission | None = None  # of the ingress sockets, if they have one
    sockets: dict[Direction, list[socket.socket]] = field(default_factory=dict)


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
        return iter(self._by_name.values())

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def __getitem__(self, name: str) -> Attachment:
        return self._by_name[name]

    @property
    def is_full(self) -> bool:
        """No other interface can be used."""
        return len(self._by_name) == INTERFACES_MAX

    def filters(self, name: str) -> bool:
        """The kernel drops what no rule wants of what arrives on this interface."""
        return self._by_name[name].admission is not None

    def slots(self) -> dict[str, int]:
        """The slot of each interface in use, by name."""
        return {attachment.interface.name: attachment.slot for attachment in self}

    def has(self, need: Need) -> bool:
        name, direction = need
        return name in self._by_name and direction in self._by_name[name].sockets

    def open(self, interface: Interface, direction: Direction, ring: RingGeometry | None) -> Attachment:
        """Open the sockets of one direction, one per worker; for ingress with this ring. RuleError if the host has too
        many interfaces in use, SystemRefusal if the kernel will not."""
        attachment = self._by_name.get(interface.name) or Attachment(self._free_slot(), interface)
        if direction == "ingress":
            stock, self._stock = self._stock, None
            prepared = stock[1] if stock and stock[0] == ring else None
            if stock and prepared is None:
                _close_all(stock[1])
            admission = self._make_admission(interface)
            try:
                attachment.sockets[direction] = sockets.open_ingress(
                    interface, self._workers, ring, prepared, admission
                )
            except BaseException:
                if admission:
                    admission.close()
                raise
            attachment.ring = ring
            attachment.admission = admission
        else:
            attachment.sockets[direction] = sockets.open_egress(interface, self._workers)
        self._by_name[interface.name] = attachment
        return attachment

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

    def check_unchanged(self, interface: Interface) -> None:
        """SystemRefusal if the interface is not the one that our sockets are bound to any more."""
        attachment = self._by_name.get(interface.name)
        if attachment and attachment.interface.index != interface.index:
            raise SystemRefusal(
                f"interface {interface.name!r} was deleted and created again while rules use it",
                "remove the rules that name it, and add them again",
            )

    async def close(self, name: str, direction: Direction) -> None:
        """Close the sockets of one direction. No worker may be using them."""
        attachment = self._by_name[name]
        closing = attachment.sockets.pop(direction)
        if direction == "ingress" and attachment.admission:
            attachment.admission.close()
            attachment.admission = None
        if not attachment.sockets:
            del self._by_name[name]
        await asyncio.to_thread(_close_all, closing)

    async def join(self, wanted: Iterable[Group]) -> None:
        """Be a member of these. SystemRefusal if the kernel does not; then leave() undoes what was done."""
        async for name, address in in_turns(wanted):
            if not self._joined[name, address]:
                self._memberships.join(self._by_name[name].interface, address)

    async def leave(self, unwanted: Iterable[Group]) -> None:
        """Cease to be a member of these, unless a rule needs it."""
        async for name, address in in_turns(unwanted):
            if not self._joined[name, address]:
                self._memberships.leave(self._by_name[name].interface.index, address)

    def admit(self, rules: Iterable[Rule]) -> None:
        """Let these rules' packets through to the workers, who know them. Idempotent. OSError if that cannot be."""
        for admission, destinations in self._destinations(rules):
            admission.admit(destinations)

    def refuse(self, rules: Iterable[Rule]) -> None:
        """Let them through no more. Idempotent."""
        for admission, destinations in self._destinations(rules):
            admission.refuse(destinations)

    def _destinations(self, rules: Iterable[Rule]) -> Iterator[tuple[Admission, list[Destination]]]:
        """Of these rules, by interface that filters."""
        by_name: dict[str, list[Destination]] = {}
        for rule in rules:
            if rule.input.port is not None:
                by_name.setdefault(rule.input.interface, []).append((group(rule)[1], rule.input.port))
        for name, destinations in by_name.items():
            if admission := self._by_name[name].admission:
                yield admission, destinations

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
        return sorted(need for need in needs(rule) if not self._uses[need] and self.has(need))

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

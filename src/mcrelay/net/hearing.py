"""Hearing: at which interfaces of this host what it sends comes in again.

Owns what is known of how devices are connected within a host; cycles.py decides what follows from it. What other hosts,
namespaces or cables send back is not known here. Nor are VLAN filters, modes and states of devices looked at: each is
taken to pass on what it can, so that what may come in again is never overlooked because of a setting that is changed
later.

Kernel facts. What leaves by a veth comes in at its peer. What leaves by a bridge, bond or the like leaves by its ports;
by a VLAN device, with its tag, or by a macvlan, by the device below; macvlans of one device hear each other, but that
device hears none of them. What comes in by a port comes in at the master as well (a packet socket on either sees it),
and leaves by a bridge's other ports; what comes in by a device with VLAN devices or macvlans on it comes in at those,
too. What is sent to an address of this host by the interface that has it, or by a loopback device, comes in at the
loopback device. By any other it is sent like to a stranger: a socket that is bound to a device looks up routes of that
device only, and finds no local one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Final, NamedTuple

from mcrelay.net.interfaces import Interface
from mcrelay.rules import Target, is_group

TAGS_MAX: Final = 2  # of a frame, outermost first (IEEE 802.1ad); more would come of VLAN devices in a circle only


class _Frame(NamedTuple):
    """What a packet has become on its way."""

    at: int  # index of the interface that it leaves or comes in by
    leaves: bool
    tags: tuple[int, ...] = ()


class Hearing:
    """Of these interfaces. `own`: the addresses that each has, by index."""

    def __init__(self, interfaces: Iterable[Interface], own: Mapping[int, Collection[str]]) -> None:
        self._own = own
        self._by_index = {interface.index: interface for interface in interfaces}
        self._by_name = {interface.name: interface for interface in self._by_index.values()}
        self._loopbacks = [i.name for i in self._by_index.values() if i.is_loopback]
        self._ports: dict[int, list[int]] = defaultdict(list)  # by master
        self._uppers: dict[int, list[int]] = defaultdict(list)  # by lower device
        # Of two ends that come one after the other, the first does not know the second.
        self._peers: dict[int, int] = {}
        for interface in self._by_index.values():
            if interface.peer:
                self._peers[interface.index] = interface.peer
                self._peers.setdefault(interface.peer, interface.index)
            if interface.master:
                self._ports[interface.master].append(interface.index)
            if interface.lower:
                self._uppers[interface.lower].append(interface.index)
        self._ends: dict[str, list[tuple[str, int | None]]] = {}  # as far as anybody has asked

    def of(self, target: Target) -> list[Target]:
        """What is sent there, as this host hears it."""
        if not is_group(target.address) and self._is_local(str(target.address), target.interface):
            return [target._replace(interface=name) for name in self._loopbacks]
        return [target._replace(interface=name, vlan=vlan) for name, vlan in self._ends_of(target.interface)]

    def extract(self, names: Iterable[str], hosts: Iterable[tuple[str, str]]) -> object:
        """All that of() depends on for what is sent by these interfaces, and to these hosts' addresses, each by an
        interface: it is another if of() is."""
        ends = {name: tuple(self._ends_of(name)) for name in names}
        return ends, {(address, name) for address, name in hosts if self._is_local(address, name)}

    def _ends_of(self, name: str) -> list[tuple[str, int | None]]:
        if name not in self._ends:
            self._ends[name] = self._find_ends(name)
        return self._ends[name]

    def _is_local(self, address: str, name: str) -> bool:
        interface = self._by_name.get(name)
        if interface is None:
            return False
        if interface.is_loopback:
            return any(address in own for own in self._own.values())
        return address in self._own.get(interface.index, ())

    def _find_ends(self, name: str) -> list[tuple[str, int | None]]:
        """The interfaces by which it comes in again, and the tag that it has there."""
        if name not in self._by_name:
            return []
        left = [_Frame(self._by_name[name].index, leaves=True)]
        seen = set(left)
        for frame in left:  # grows while it is gone through
            interface = self._by_index[frame.at]
            for following in self._leave(interface, frame) if frame.leaves else self._come_in(interface, frame):
                if following.at in self._by_index and len(following.tags) <= TAGS_MAX and following not in seen:
                    seen.add(following)
                    left.append(following)
        ends = ((self._by_index[f.at].name, f.tags[0] if f.tags else None) for f in left if not f.leaves)
        return list(dict.fromkeys(ends))

    def _leave(self, interface: Interface, frame: _Frame) -> Iterator[_Frame]:
        index, _leaves, tags = frame
        if interface.is_loopback:
            yield _Frame(index, False, tags)
        if peer := self._peers.get(index):
            yield _Frame(peer, False, tags)
        if interface.lower:
            yield _Frame(interface.lower, True, (interface.vlan, *tags) if interface.kind == "vlan" else tags)
            if interface.kind != "vlan":
                yield from (_Frame(sibling, False, tags) for sibling in self._beside(interface))
        for port in self._ports[index]:
            yield _Frame(port, True, tags)

    def _beside(self, interface: Interface) -> Iterator[int]:
        """Other macvlans and the like on the same device."""
        for index in self._uppers[interface.lower]:
            if index != interface.index and self._by_index[index].kind == interface.kind:
                yield index

    def _come_in(self, interface: Interface, frame: _Frame) -> Iterator[_Frame]:
        index, _leaves, tags = frame
        if interface.master:
            yield _Frame(interface.master, False, tags)
            if interface.master in self._by_index and self._by_index[interface.master].kind == "bridge":
                yield from (_Frame(port, True, tags) for port in self._ports[interface.master] if port != index)
        for upper in self._uppers[index]:
            above = self._by_index[upper]
            if above.kind != "vlan":
                yield _Frame(upper, False, tags)
            elif tags and above.vlan == tags[0]:
                yield _Frame(upper, False, tags[1:])

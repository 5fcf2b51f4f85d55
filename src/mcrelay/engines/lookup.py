"""Lookup of engine `reference`: which of the entries takes a packet.

Of several that match, one does: that with the longest prefix of the destination; of those, one with a source before one
without; of those, one with a port before one for any port. So the entries are sorted by their shape, what of a packet
they ask for, and each shape is asked in turn, the most specific one first, as native/table.c does. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from mcrelay.engines.parsing import Packet
from mcrelay.entries import EXACT, Entry, Key
from mcrelay.ways import ANY


class Shape(NamedTuple):
    """What entries ask for; the greater one is the more specific."""

    prefix: int
    has_source: bool
    has_port: bool

    @classmethod
    def of(cls, entry: Entry) -> Shape:
        return cls(entry.prefix, entry.source != ANY, entry.port != 0)

    def key(self, packet: Packet, ingress: int, vlan: int) -> Key:
        """What an entry of this shape is called that takes the packet."""
        behind = EXACT - self.prefix
        group = (int.from_bytes(packet.destination) >> behind << behind).to_bytes(16)
        source = packet.source if self.has_source else ANY
        return group, self.prefix, source, packet.port if self.has_port else 0, ingress, vlan, packet.protocol


class Table:
    """The entries of one moment."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self._by_key = {entry.key: entry for entry in entries}
        self._shapes = sorted({Shape.of(entry) for entry in self._by_key.values()}, reverse=True)

    def find(self, packet: Packet, ingress: int, vlan: int) -> Entry | None:
        for shape in self._shapes:
            entry = self._by_key.get(shape.key(packet, ingress, vlan))
            if entry is not None:
                return entry
        return None

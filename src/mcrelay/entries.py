"""Entries: rules as an engine needs them, numbers only.

Owns the binary description that native/table.h reads, and how a rule becomes one: which interfaces a pattern stands
for, which leg does not leave by the interface that the packet came in by, and which of several rules has an input if
more than one could. Pure.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

from mcrelay.rules import Address, Output, Rule, bits
from mcrelay.ways import ANY, Way

RULE_RECORD: Final = struct.Struct("=16s16sQHHHHBB2xI")  # struct table_rule_record of native/table.h
OUTPUT_RECORD: Final = struct.Struct("=16s16sQIHHHBBBBBB8x")  # struct table_output_record

UDP: Final = 17
ESP: Final = 50
PROTOCOLS: Final = {"udp": UDP, "esp": ESP}
EXACT: Final = 128  # the prefix of an address that is given whole
MAPPED: Final = 96  # bits before an IPv4 address that is mapped


class LegFlag(enum.IntFlag):
    KEEP_TTL = 1  # as it came, instead of one less
    KEEP_DSCP = 2  # as it came, instead of `dscp`
    KEEP_SOURCE = 4  # address
    KEEP_SOURCE_PORT = 8
    PAUSED = 16  # it sends nothing (DROP_PAUSED)
    SPLIT_HORIZON = 32  # it would leave where the packet came in (DROP_SPLIT_HORIZON)


class RateUnit(enum.IntEnum):
    NONE = 0
    PACKETS = 1
    BITS = 2  # of IP packets


@dataclass(frozen=True, slots=True)
class Leg:
    """One output. `address` has 16 bytes, as all addresses here, of which the first `prefix` bits count: the others are
    the packet's destination's. `port` 0 is the packet's. `ttl` 0 is the default of Output.ttl, unless KEEP_TTL.
    `source` ANY is what the kernel chooses (of the interface's, where we write the header), unless KEEP_SOURCE;
    `source_port` 0 likewise."""

    address: bytes
    port: int
    egress: int  # interface slot
    ttl: int
    counter: int  # index of the output's counters
    way: Way = Way.UDP4
    prefix: int = EXACT
    flags: LegFlag = LegFlag.KEEP_DSCP
    dscp: int = 0
    source: bytes = ANY
    source_port: int = 0
    rate: int = 0  # a second
    rate_unit: RateUnit = RateUnit.NONE

    @property
    def packed(self) -> bytes:
        return OUTPUT_RECORD.pack(
            self.address,
            self.source,
            self.rate,
            self.counter,
            self.port,
            self.source_port,
            self.egress,
            self.way,
            self.prefix,
            self.ttl,
            self.dscp,
            self.flags,
            self.rate_unit,
        )


Key = tuple[bytes, int, bytes, int, int, int, int]  # group, prefix, source, port, ingress, vlan, protocol


@dataclass(frozen=True)
class Entry:
    """One rule on one ingress interface. `source` ANY is any; `port` 0 is any, `vlan` 0 untagged."""

    group: bytes  # of which the bits behind `prefix` are 0
    port: int
    ingress: int  # interface slot
    counter: int  # index of the rule's counters
    legs: tuple[Leg, ...]
    source: bytes = ANY
    prefix: int = EXACT
    vlan: int = 0
    protocol: int = UDP
    id: int = 0  # of the rule: tells it from others that had its counter

    @property
    def key(self) -> Key:
        """What no two entries of a table have in common."""
        return self.group, self.prefix, self.source, self.port, self.ingress, self.vlan, self.protocol

    @cached_property
    def packed(self) -> bytes:
        """The description of native/table.h."""
        record = RULE_RECORD.pack(
            self.group,
            self.source,
            self.id,
            self.port,
            self.ingress,
            len(self.legs),
            self.vlan,
            self.prefix,
            self.protocol,
            self.counter,
        )
        return b"".join([record, *(leg.packed for leg in self.legs)])


def mapped(address: Address) -> bytes:
    """128 bits in network byte order."""
    return address.packed if address.version == 6 else b"\0" * 10 + b"\xff\xff" + address.packed


def compile_rule(
    rule: Rule,
    slots: Mapping[str, int],
    counter: int,
    output_counters: Iterable[int],
    *,
    workers: int = 1,
    open: Mapping[str, int] | None = None,
) -> tuple[Entry, ...]:
    """The entries of a rule, given the slot of each interface it names, and of those `open` for receiving: one, or as
    many as its pattern matches of the latter. KeyError if an interface is not there. A rate is divided among `workers`
    if all of them have the rule."""
    given = rule.input
    ingress = {given.interface: slots[given.interface]} if not given.is_pattern else dict(open or {})
    names = sorted(name for name in ingress if not given.is_pattern or given.is_on(name))
    legs = [
        _leg(rule, output, slots[output.interface], output_counter, workers)
        for output, output_counter in zip(rule.outputs, output_counters, strict=True)
    ]
    return tuple(
        Entry(
            group=mapped(given.address),
            port=given.port or 0,
            ingress=ingress[name],
            counter=counter,
            legs=tuple(_split(leg, ingress[name]) for leg in legs) if given.is_pattern else tuple(legs),
            source=mapped(given.source) if given.source else ANY,
            prefix=_prefix(given.address, given.prefix),
            vlan=given.vlan or 0,
            protocol=PROTOCOLS[given.protocol],
            id=int(rule.id, 16),
        )
        for name in names
    )


def distinct(rules: Iterable[tuple[Rule, tuple[Entry, ...]]]) -> list[Entry]:
    """All entries of these rules; where several rules have one key, that of the rule that comes first."""
    all_rules = list(rules)
    if not any(rule.input.is_pattern for rule, _entries in all_rules):
        return [entry for _rule, entries in all_rules for entry in entries]
    by_key: dict[Key, Entry] = {}
    for _rule, entries in sorted(all_rules, key=lambda r: (r[0].input.is_pattern, -len(r[0].input.interface))):
        for entry in entries:
            by_key.setdefault(entry.key, entry)
    return list(by_key.values())


def _prefix(address: Address, prefix: int | None) -> int:
    return EXACT if prefix is None else EXACT - bits(address) + prefix


def _split(leg: Leg, ingress: int) -> Leg:
    """A leg of a rule for several interfaces: what came in by one does not leave there again (split horizon)."""
    if leg.egress != ingress:
        return leg
    return replace(leg, flags=leg.flags | LegFlag.SPLIT_HORIZON)


def _leg(rule: Rule, output: Output, egress: int, counter: int, workers: int) -> Leg:
    address = rule.address_of(output)
    way = rule.way(output)
    if output.address is not None:
        prefix = _prefix(address, output.prefix)
    else:  # the packet's own, which is known if it can be but one
        prefix = EXACT if rule.input.prefix is None else 0
    port = (rule.input.port if output.port is None else output.port) or 0
    ttl = output.ttl if isinstance(output.ttl, int) else 0
    if _is_plain(output):  # most of thousands
        return Leg(mapped(address), port, egress, ttl, counter, way, prefix)
    rate = output.rate
    return Leg(
        address=mapped(address),
        port=port,
        egress=egress,
        ttl=ttl,
        counter=counter,
        way=way,
        prefix=prefix,
        flags=_flags(output),
        dscp=output.dscp or 0,
        source=ANY if output.source is None or output.source == "keep" else mapped(output.source),
        source_port=output.source_port if isinstance(output.source_port, int) else 0,
        rate=-(-rate.number // len(rule.owners(workers))) if rate else 0,
        rate_unit=RateUnit.NONE if not rate else RateUnit.BITS if rate.unit == "bit" else RateUnit.PACKETS,
    )


def _is_plain(output: Output) -> bool:
    """It says nothing but where to, and perhaps a TTL that is a number."""
    return (
        output.ttl != "keep"
        and output.dscp is None
        and output.source is None
        and output.source_port is None
        and output.rate is None
        and not output.paused
    )


def _flags(output: Output) -> LegFlag:
    flags = LegFlag(0)
    for flag, is_set in (
        (LegFlag.KEEP_TTL, output.ttl == "keep"),
        (LegFlag.KEEP_DSCP, output.dscp is None),
        (LegFlag.KEEP_SOURCE, output.source == "keep"),
        (LegFlag.KEEP_SOURCE_PORT, _keeps_source_port(output)),
        (LegFlag.PAUSED, output.paused),
    ):
        if is_set:
            flags |= flag
    return flags


def _keeps_source_port(output: Output) -> bool:
    return output.source_port == "keep" or (output.source == "keep" and output.source_port is None)

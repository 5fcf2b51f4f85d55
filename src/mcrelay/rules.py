"""Rules: what comes in where, and what goes out where.

Owns what inputs, outputs and rules are, how they are written (the same in files, on the command line and in JSON), ids,
which of several rules takes a packet, and the rule set with its uniqueness. Knows nothing of sockets, interfaces that
exist, processes or time. ruletext.py reads what is written here.

    INPUT    [SOURCE@]ADDRESS[/PREFIX]:PORT%INTERFACE[,vlan=N]     239.1.1.1:5000%eth0
    OUTPUT   ADDRESS[/PREFIX]:PORT%INTERFACE[,key=value...]        239.2.2.2:6000%eth1,ttl=8

IPv6 addresses stand in brackets. Internally every address is 128 bits wide, IPv4 mapped into IPv6 (RFC 4291 section
2.5.5.2), so there is one model for both.

Of several rules that match a packet, one takes it: that for the longest prefix of the destination (an exact address
is the longest); of those, one with a source before one without, as routers prefer (S,G) to (*,G); of those, one with a
port before one for any port. A rule for an interface by its name comes before one for a pattern, and a longer pattern
before a shorter one.
"""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from ipaddress import IPv4Address, IPv6Address
from typing import Final, Literal, NamedTuple

from mcrelay.errors import Conflict, RuleError
from mcrelay.steering import steer, steer_address
from mcrelay.ways import Way

Address = IPv4Address | IPv6Address
Protocol = Literal["udp", "esp"]

RULE_ID: Final = re.compile(r"[0-9a-f]{12}")
BROADCAST: Final = IPv4Address("255.255.255.255")
GROUPS_JOINED_MAX: Final = 1024  # of a prefix; of a shorter one none is joined: it takes what comes

SHOWN_MAX: Final = 160  # characters of an offending text


def shown(text: str) -> str:
    """An offending text as an error quotes it, not longer than a line."""
    return repr(text if len(text) <= SHOWN_MAX else text[: SHOWN_MAX - 3] + "...")


def bits(address: Address) -> int:
    """How long the address is."""
    return 32 if address.version == 4 else 128


def is_group(address: Address) -> bool:
    """Whether it is a multicast address; what ipaddress says, too, ten times slower."""
    return int(address) >> 28 == 0xE if address.version == 4 else int(address) >> 120 == 0xFF


def masked(address: Address, prefix: int) -> int:
    """The address as a number, without what is behind the prefix."""
    behind = bits(address) - prefix
    return int(address) >> behind << behind


class Membership(NamedTuple):
    """A group that a rule's packets come to, of which this host has to be a member; of one source if that is given."""

    interface: str
    group: Address
    source: Address | None = None

    @property
    def text(self) -> str:
        """Without the interface."""
        return f"{self.source}@{self.group}" if self.source else str(self.group)


@dataclass(frozen=True, slots=True)
class Input:
    """Which packets a rule takes. `port` None is any port (and ESP, which has none), `prefix` the length of a prefix of
    the destination, None an exact address, `source` None any source, `vlan` None untagged."""

    address: Address
    port: int | None
    interface: str  # a name, or a pattern: eth+ is each interface whose name begins with eth
    source: Address | None = None
    prefix: int | None = None
    vlan: int | None = None
    protocol: Protocol = "udp"

    @property
    def is_pattern(self) -> bool:
        return self.interface.endswith("+")

    def is_on(self, interface: str) -> bool:
        if self.is_pattern:
            return interface.startswith(self.interface[:-1])
        return self.interface == interface

    @property
    def is_too_wide(self) -> bool:
        """A prefix of more groups than are joined."""
        return self.prefix is not None and 1 << bits(self.address) - self.prefix > GROUPS_JOINED_MAX

    def memberships(self, interface: str) -> Iterator[Membership]:
        """What has to be joined on an interface: nothing for unicast, nor for a prefix of too many groups."""
        if not is_group(self.address):
            return
        if self.prefix is None:
            yield Membership(interface, self.address, self.source)
        elif not self.is_too_wide:
            for number in range(1 << bits(self.address) - self.prefix):
                yield Membership(interface, self.address + number, self.source)

    def __str__(self) -> str:
        source = f"{_bracketed(self.source)}@" if self.source else ""
        prefix = f"/{self.prefix}" if self.prefix is not None else ""
        port = "esp" if self.protocol == "esp" else "*" if self.port is None else self.port
        vlan = f",vlan={self.vlan}" if self.vlan is not None else ""
        return f"{source}{_bracketed(self.address)}{prefix}:{port}%{self.interface}{vlan}"


@dataclass(frozen=True, slots=True)
class Rate:
    """At most so many bits (of IP packets, headers included) or packets a second."""

    number: int
    unit: Literal["bit", "pps"]

    def __str__(self) -> str:
        for factor, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
            if self.number % factor == 0:
                return f"{self.number // factor}{letter}{self.unit}"
        return f"{self.number}{self.unit}"


@dataclass(frozen=True, slots=True)
class Output:
    """Where one copy goes, and what it looks like. `address` None: where the packet went; with a `prefix`, its bits
    behind that are the packet's. `port` None: the packet's. `ttl` None: one less than the packet came with, never below
    1. `dscp` None: as it came. `source` and `source_port` None: what the kernel chooses."""

    address: Address | None
    port: int | None
    interface: str
    prefix: int | None = None
    ttl: int | Literal["keep"] | None = None
    dscp: int | None = None
    source: Address | Literal["keep"] | None = None
    source_port: int | Literal["keep"] | None = None
    rate: Rate | None = None
    loop: bool = False  # receivers on this host hear it, too
    paused: bool = False
    protocol: Protocol = "udp"

    def __str__(self) -> str:
        address = "=" if self.address is None else _bracketed(self.address)
        prefix = f"/{self.prefix}" if self.prefix is not None else ""
        port = "esp" if self.protocol == "esp" else "=" if self.port is None else self.port
        options = "".join(
            f",{key}={value}"
            for key, value in (
                ("ttl", self.ttl),
                ("dscp", self.dscp),
                ("source", self.source),
                ("sport", self.source_port),
                ("rate", self.rate),
            )
            if value is not None
        )
        flags = (",loop" if self.loop else "") + (",paused" if self.paused else "")
        return f"{address}{prefix}:{port}%{self.interface}{options}{flags}"


class Target(NamedTuple):
    """What one rule sends to and another takes. `port` None: any. `source` None: what the kernel chooses, or whatever
    the packets come with. `vlan`: the tag that it is heard with, None for none."""

    address: Address
    prefix: int
    port: int | None
    interface: str
    source: Address | None = None
    protocol: Protocol = "udp"
    vlan: int | None = None


@dataclass(frozen=True)
class Rule:
    input: Input
    outputs: tuple[Output, ...]
    name: str | None = None

    @cached_property
    def id(self) -> str:
        """12 hexadecimal digits that depend on the input alone, the same on every machine and in every run."""
        return hashlib.blake2b(str(self.input).encode(), digest_size=6).hexdigest()

    @property
    def label(self) -> str:
        """What a person calls the rule."""
        return self.name or self.id

    def owners(self, workers: int) -> tuple[int, ...]:
        """The workers that must know the rule: the one to which the kernel steers its packets, or all of them if its
        packets have no single destination. IPv6 is steered by the address alone, since fragments have no port."""
        if self.input.prefix is not None or (self.input.address.version == 4 and self.input.port is None):
            return tuple(range(workers))
        if self.input.address.version == 6 or self.input.port is None:
            return (steer_address(self.input.address.packed) % workers,)
        return (steer(int(self.input.address), self.input.port) % workers,)

    def address_of(self, output: Output) -> Address:
        """What the output sends to, or the first address of the prefix that it sends to."""
        return self.input.address if output.address is None else output.address

    def way(self, output: Output) -> Way:
        address = self.address_of(output)
        version = address.version
        if output.protocol == "esp" or output.source == "keep" or output.source_port is not None:
            if is_group(address) or address == BROADCAST:
                return Way.FRAME
            return Way.RAW4 if version == 4 else Way.RAW6
        if output.loop:
            return Way.LOOP4 if version == 4 else Way.LOOP6
        return Way.UDP4 if version == 4 else Way.UDP6

    def with_paused(self, which: str | None, *, paused: bool) -> Rule:
        """The same with one output (its text, its ADDRESS:PORT%INTERFACE, or its number, counted from 1) or all of them
        paused, or not. RuleError if it has no such output."""
        texts = [str(output) for output in self.outputs]
        chosen = {n for n, text in enumerate(texts) if which in (None, str(n + 1), text, text.split(",")[0])}
        if not chosen:
            raise RuleError(
                f"rule {self.label} has no output {shown(which or '')}",
                f"it has {', '.join(text.split(',')[0] for text in texts)}"[: SHOWN_MAX * 4],
            )
        outputs = tuple(
            replace(output, paused=paused) if n in chosen else output for n, output in enumerate(self.outputs)
        )
        return replace(self, outputs=outputs)

    def keeps_destination(self, output: Output) -> bool:
        """Its copies go to where the packets went, address and port."""
        given = self.input
        same_address = output.address is None or (output.address, output.prefix) == (given.address, given.prefix)
        return same_address and output.port in (None, given.port)

    def target(self, output: Output) -> Target:
        address = self.address_of(output)
        follows = output.address is None or output.prefix is not None
        prefix = self.input.prefix if follows and self.input.prefix is not None else bits(address)
        port = self.input.port if output.port is None else output.port
        source = output.source if isinstance(output.source, IPv4Address | IPv6Address) else None
        return Target(address, prefix, port, output.interface, source, output.protocol)

    def feeds_itself(self, output: Output) -> bool:
        """The rule would take what it sends, if that came in again. A rule for a pattern that only passes packets on is
        none of those: none leaves where it came in."""
        return takes(self.input, self.target(output)) and not (self.input.is_pattern and self.keeps_destination(output))


def _bracketed(address: Address) -> str:
    return f"[{address}]" if address.version == 6 else str(address)


def takes(given: Input, target: Target) -> bool:
    """Whether the input may take what is sent there."""
    if given.vlan != target.vlan or given.protocol != target.protocol:
        return False
    if given.address.version != target.address.version or not given.is_on(target.interface):
        return False
    if given.port is not None and target.port is not None and given.port != target.port:
        return False
    if given.source is not None and target.source is not None and given.source != target.source:
        return False
    prefix = min(bits(given.address) if given.prefix is None else given.prefix, target.prefix)
    return masked(given.address, prefix) == masked(target.address, prefix)


# --- the set --------------------------------------------------------------------------------------------------------


class _Destinations:
    """Those rules whose destinations have prefixes of one length, by the prefix as a number, and then by port."""

    def __init__(self, width: int, prefix: int) -> None:
        self._width = width  # of an address, in bits
        self._prefix = prefix
        self._numbers: list[int] = []  # all there are, in order
        self._rules: dict[int, dict[int | None, dict[str, Rule]]] = {}

    def add(self, rule: Rule) -> None:
        number = int(rule.input.address)
        if number not in self._rules:
            insort(self._numbers, number)
        self._rules.setdefault(number, {}).setdefault(rule.input.port, {})[rule.id] = rule

    def remove(self, rule: Rule) -> None:
        number, port = int(rule.input.address), rule.input.port
        ports = self._rules[number]
        del ports[port][rule.id]
        if not ports[port]:
            del ports[port]
        if not ports:
            del self._rules[number]
            del self._numbers[bisect_left(self._numbers, number)]

    def near(self, target: Target) -> Iterator[Rule]:
        """Those that have a destination and a port in common with the target, which is of this width."""
        for number in self._overlapping(target):
            ports = self._rules[number]
            for port in list(ports) if target.port is None else (target.port, None):
                yield from ports.get(port, {}).values()

    def _overlapping(self, target: Target) -> list[int]:
        if target.prefix >= self._prefix:
            number = masked(target.address, self._prefix)
            return [number] if number in self._rules else []
        first = masked(target.address, target.prefix)
        last = first + (1 << self._width - target.prefix) - 1
        return self._numbers[bisect_left(self._numbers, first) : bisect_right(self._numbers, last)]


@dataclass
class RuleSet:
    """Rules by id, with unique ids and names."""

    _by_id: dict[str, Rule] = field(default_factory=dict)
    _by_name: dict[str, Rule] = field(default_factory=dict)
    _by_length: dict[tuple[int, int], _Destinations] = field(default_factory=dict)  # of an address, of its prefix

    @classmethod
    def of(cls, rules: Iterable[Rule]) -> RuleSet:
        """RuleError if two of them have an input or a name in common."""
        made = cls()
        for rule in rules:
            made.add(rule)
        return made

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Rule]:
        return iter(self._by_id.values())

    def __contains__(self, rule_id: str) -> bool:
        return rule_id in self._by_id

    def check_addable(self, rule: Rule, unless: RuleSet | None = None) -> None:
        """RuleError if the set already has the rule's input or name, in a rule that is not in `unless`."""
        if (other := self._by_id.get(rule.id)) and not (unless and other.id in unless):
            raise RuleError(
                f"input '{rule.input}' already belongs to rule {other.label}",
                f"remove that rule first: mcrelay remove {other.label}",
            )
        if rule.name is not None and (other := self._by_name.get(rule.name)) and not (unless and other.id in unless):
            raise RuleError(
                f"name {rule.name!r} already belongs to the rule for '{other.input}'", "choose another name"
            )

    def add(self, rule: Rule) -> None:
        self.check_addable(rule)
        self._by_id[rule.id] = rule
        lengths = _lengths(rule.input)
        if lengths not in self._by_length:
            self._by_length[lengths] = _Destinations(*lengths)
        self._by_length[lengths].add(rule)
        if rule.name is not None:
            self._by_name[rule.name] = rule

    def replace(self, rule: Rule) -> None:
        """Put a rule in the place of the one with its input, which keeps its position. KeyError if there is none."""
        before = self._by_id[rule.id]
        self.check_addable(rule, unless=RuleSet.of([before]))
        if before.name is not None:
            del self._by_name[before.name]
        if rule.name is not None:
            self._by_name[rule.name] = rule
        self._by_id[rule.id] = rule
        self._by_length[_lengths(rule.input)].add(rule)

    def remove(self, rule_id: str) -> Rule:
        rule = self._by_id.pop(rule_id)
        self._by_length[_lengths(rule.input)].remove(rule)
        if rule.name is not None:
            del self._by_name[rule.name]
        return rule

    def fed_by(self, target: Target) -> Iterator[Rule]:
        """The rules that may take what is sent there."""
        for (width, _prefix), destinations in self._by_length.items():
            if width == bits(target.address):
                yield from (rule for rule in destinations.near(target) if takes(rule.input, target))

    def with_input(self, rule_id: str) -> Rule | None:
        return self._by_id.get(rule_id)

    def with_name(self, name: str | None) -> Rule | None:
        return None if name is None else self._by_name.get(name)

    def find(self, name_or_id: str) -> Rule:
        """RuleError if no rule is called that."""
        rule = self._by_name.get(name_or_id) or self._by_id.get(name_or_id)
        if rule is None:
            raise RuleError(f"no rule is called {shown(name_or_id)}", "'mcrelay list' shows the rules")
        return rule


def _lengths(given: Input) -> tuple[int, int]:
    """Of the address, and of what counts of it, in bits."""
    width = bits(given.address)
    return width, width if given.prefix is None else given.prefix


def check_generation(expect: int | None, generation: int) -> None:
    """Conflict if the set, of this generation, is no longer the one that a change was meant for."""
    if expect not in (None, generation):
        raise Conflict(
            f"the rules have changed: generation {expect} was expected, {generation} is active",
            "list them again ('mcrelay list'), and change what is there now",
        )

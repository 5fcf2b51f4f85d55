"""Rules: what comes in where, and what goes out where.

Owns the text form of inputs, outputs and rules (the same in files, on the command line and in JSON), their validation
as far as text alone can tell, ids, the rule set with its uniqueness, and the compiled entry that an engine looks up.
Knows nothing of sockets, interfaces that exist, processes or time: the same text means the same everywhere.

    INPUT    [SOURCE@]ADDRESS[/PREFIX]:PORT%INTERFACE     239.1.1.1:5000%eth0
    OUTPUT   ADDRESS:PORT%INTERFACE[,key=value...]        239.2.2.2:6000%eth1,ttl=8

IPv6 addresses stand in brackets. Internally every address is 128 bits wide, IPv4 mapped into IPv6 (RFC 4291 section
2.5.5.2), so that later address families need no second model.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final

from mcrelay.errors import Conflict, RuleError
from mcrelay.limits import RULE_OUTPUTS_MAX
from mcrelay.steering import steer

Address = IPv4Address | IPv6Address
Target = tuple[Address, int | None, str]  # address, port, interface: what one rule sends to and another takes

NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
RULE_ID: Final = re.compile(r"[0-9a-f]{12}")
# A kernel interface name (dev_valid_name: at most 15 bytes, no white space, no '/' or ':'), less the characters that
# the text form itself uses.
INTERFACE: Final = re.compile(r"[^\s/:%,@\x00-\x1f\ud800-\udfff]{1,15}")

# What ip_address() takes for IPv4, five times as fast: rule sets have thousands.
_OCTET: Final = "(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
DOTTED_QUAD: Final = re.compile(r"\.".join([_OCTET] * 4))

SHOWN_MAX: Final = 100  # characters of an offending text

INPUT_FORM: Final = "ADDRESS:PORT%INTERFACE, for example 239.1.1.1:5000%eth0"
OUTPUT_FORM: Final = "ADDRESS:PORT%INTERFACE[,ttl=N], for example 239.2.2.2:6000%eth1,ttl=8"


@dataclass(frozen=True, slots=True)
class Input:
    """Which packets a rule takes. `port` None is any port, `prefix` the length of a group prefix, None an exact group,
    `source` None any source."""

    group: Address
    port: int | None
    interface: str
    source: Address | None = None
    prefix: int | None = None

    @property
    def target(self) -> Target:
        return self.group, self.port, self.interface

    def __str__(self) -> str:
        source = f"{self.source}@" if self.source else ""
        prefix = f"/{self.prefix}" if self.prefix is not None else ""
        port = "*" if self.port is None else self.port
        return f"{source}{_bracketed(self.group)}{prefix}:{port}%{self.interface}"


@dataclass(frozen=True, slots=True)
class Output:
    """Where one copy goes. `ttl` None: one less than the packet came with, never below 1."""

    address: Address
    port: int
    interface: str
    ttl: int | None = None

    def __str__(self) -> str:
        ttl = f",ttl={self.ttl}" if self.ttl is not None else ""
        return f"{_bracketed(self.address)}:{self.port}%{self.interface}{ttl}"


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
        packets have no single destination."""
        if self.input.port is None or self.input.prefix is not None:
            return tuple(range(workers))
        return (steer(int(self.input.group), self.input.port) % workers,)


# --- text to rule ---------------------------------------------------------------------------------------------------


def parse_rule(input: str, outputs: Iterable[str], name: str | None = None) -> Rule:
    """A rule from its texts. RuleError names the offending text, what is wrong with it and what would be right."""
    if name is not None:
        check_name(name)
    parsed_input = parse_input(input)
    texts = tuple(outputs)
    if not texts:
        raise RuleError(f"rule {input!r} has no output", f"give at least one: {OUTPUT_FORM}")
    if len(texts) > RULE_OUTPUTS_MAX:
        raise RuleError(f"rule {input!r} has {len(texts)} outputs", f"at most {RULE_OUTPUTS_MAX} are possible")
    parsed_outputs: list[Output] = []
    taken = {parsed_input.target}
    for text in texts:
        output = parse_output(text)
        target = (output.address, output.port, output.interface)
        if target in taken:
            if not any(target == (other.address, other.port, other.interface) for other in parsed_outputs):
                raise RuleError(
                    f"output {text!r} is where the input comes from: the relay would feed itself",
                    "send to another group, port or interface",
                )
            raise RuleError(f"output {text!r} is given twice", "name each output once; receivers would get duplicates")
        taken.add(target)
        parsed_outputs.append(output)
    return Rule(parsed_input, tuple(parsed_outputs), name)


def check_name(name: str) -> None:
    if not name:
        raise RuleError("the rule's name is empty", "leave the name out or give one of 1 to 64 characters")
    if not NAME.fullmatch(name):
        raise RuleError(
            f"name {_shown(name)} is not possible",
            "use 1 to 64 letters, digits, '.', '_' and '-', starting with a letter or digit",
        )
    if RULE_ID.fullmatch(name):
        raise RuleError(f"name {name!r} looks like a rule's id", "choose a name that cannot be mistaken for one")


def parse_input(text: str) -> Input:
    what = f"input {_shown(text)}"
    endpoint, interface = _split_interface(text, what, INPUT_FORM)
    source_text, at, rest = endpoint.rpartition("@")
    address, prefix, port = _parse_endpoint(rest, what, INPUT_FORM)
    if at:
        _parse_address(source_text, what)
        raise RuleError(f"{what}: a source is not supported yet", f"leave out {source_text + '@'!r}")
    if prefix is not None:
        raise RuleError(f"{what}: a group prefix is not supported yet", "name one group per rule")
    if port == "*":
        raise RuleError(f"{what}: any port is not supported yet", "name one port per rule")
    if not address.is_multicast:
        raise RuleError(
            f"{what}: {address} is not a multicast group",
            "unicast inputs are not supported yet; use a group in 224.0.0.0/4",
        )
    return Input(address, _parse_port(port, what), interface)


def parse_output(text: str) -> Output:
    what = f"output {_shown(text)}"
    head, *options = text.split(",")
    endpoint, interface = _split_interface(head, what, OUTPUT_FORM)
    address, prefix, port = _parse_endpoint(endpoint, what, OUTPUT_FORM)
    if prefix is not None:
        raise RuleError(f"{what}: an output has no prefix", OUTPUT_FORM)
    if address.is_unspecified or address == IPv4Address("255.255.255.255"):
        raise RuleError(f"{what}: cannot send to {address}", "use a group or a host's unicast address")
    ttl: int | None = None
    for option in options:
        key, equals, value = option.partition("=")
        if key != "ttl" or not equals:
            raise RuleError(f"{what}: unknown option {_shown(option)}", "the only option is ttl=N, N from 1 to 255")
        if ttl is not None:
            raise RuleError(f"{what}: ttl is given twice", "give it once")
        ttl = _parse_number(value)
        if ttl is None or not 1 <= ttl <= 255:
            raise RuleError(f"{what}: ttl {_shown(value)} is not possible", "use a number from 1 to 255")
    return Output(address, _parse_port(port, what), interface, ttl)


def _shown(text: str) -> str:
    """An offending text as an error quotes it, not longer than a line."""
    return repr(text if len(text) <= SHOWN_MAX else text[: SHOWN_MAX - 3] + "...")


def _bracketed(address: Address) -> str:
    return f"[{address}]" if address.version == 6 else str(address)


def _split_interface(text: str, what: str, form: str) -> tuple[str, str]:
    endpoint, percent, interface = text.rpartition("%")
    if not percent:
        raise RuleError(f"{what} names no interface", f"write {form}")
    if not INTERFACE.fullmatch(interface) or len(interface.encode()) > 15 or interface in (".", ".."):
        raise RuleError(
            f"{what}: {_shown(interface)} is not an interface name",
            "'ip -brief link' lists the interfaces of this host",
        )
    return endpoint, interface


def _parse_endpoint(text: str, what: str, form: str) -> tuple[IPv4Address, int | None, str]:
    host, colon, port = text.rpartition(":")
    if text.count(":") != 1 and _is_ipv6(text):
        raise RuleError(f"{what}: IPv6 is not supported yet", "use IPv4 addresses")
    if not colon or text.endswith("]"):
        raise RuleError(f"{what} has no port", f"write {form}")
    address_text, slash, prefix_text = host.partition("/")
    address = _parse_address(address_text, what)
    prefix: int | None = None
    if slash:
        prefix = _parse_number(prefix_text)
        if prefix is None or prefix > 32:
            raise RuleError(f"{what}: prefix {slash + prefix_text!r} is not possible", "use /0 to /32")
    return address, prefix, port


def _is_ipv6(text: str) -> bool:
    try:
        return ip_address(_unbracketed(text)).version == 6
    except ValueError:
        return False


def _unbracketed(text: str) -> str:
    return text[1:-1] if text.startswith("[") and text.endswith("]") else text


def _parse_address(text: str, what: str) -> IPv4Address:
    if match := DOTTED_QUAD.fullmatch(text):
        a, b, c, d = map(int, match.groups())
        return IPv4Address(a << 24 | b << 16 | c << 8 | d)
    try:
        address = ip_address(_unbracketed(text))
    except ValueError:
        raise RuleError(
            f"{what}: {_shown(text)} is not an IP address", "write it in full, for example 239.1.1.1"
        ) from None
    if isinstance(address, IPv6Address):
        raise RuleError(f"{what}: IPv6 is not supported yet", "use IPv4 addresses")
    return address


def _parse_number(text: str) -> int | None:
    # int() also takes signs, spaces, underscores and other scripts' digits.
    return int(text) if re.fullmatch(r"[0-9]{1,6}", text) else None


def _parse_port(text: str, what: str) -> int:
    port = _parse_number(text)
    if port is None or not 1 <= port <= 65535:
        raise RuleError(f"{what}: port {_shown(text)} is not possible", "use a number from 1 to 65535")
    return port


# --- the set --------------------------------------------------------------------------------------------------------


@dataclass
class RuleSet:
    """Rules by id, with unique ids and names."""

    _by_id: dict[str, Rule] = field(default_factory=dict)
    _by_name: dict[str, Rule] = field(default_factory=dict)
    _by_target: dict[Target, Rule] = field(default_factory=dict)

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
        self._by_target[rule.input.target] = rule
        if rule.name is not None:
            self._by_name[rule.name] = rule

    def remove(self, rule_id: str) -> Rule:
        rule = self._by_id.pop(rule_id)
        del self._by_target[rule.input.target]
        if rule.name is not None:
            del self._by_name[rule.name]
        return rule

    def fed_by(self, target: Target) -> Rule | None:
        """The rule that takes what is sent there."""
        return self._by_target.get(target)

    def find(self, name_or_id: str) -> Rule:
        """RuleError if no rule is called that."""
        rule = self._by_name.get(name_or_id) or self._by_id.get(name_or_id)
        if rule is None:
            raise RuleError(f"no rule is called {_shown(name_or_id)}", "'mcrelay list' shows the rules")
        return rule


def check_generation(expect: int | None, generation: int) -> None:
    """Conflict if the set, of this generation, is no longer the one that a change was meant for."""
    if expect not in (None, generation):
        raise Conflict(
            f"the rules have changed: generation {expect} was expected, {generation} is active",
            "list them again ('mcrelay list'), and change what is there now",
        )


# --- rule to table entry ---------------------------------------------------------------------------------------------

RULE_RECORD: Final = struct.Struct("=16sHHHHII")  # struct table_rule_record of native/table.h
OUTPUT_RECORD: Final = struct.Struct("=16sHHB3xII")  # struct table_output_record


@dataclass(frozen=True, slots=True)
class Leg:
    """One output as an engine needs it: numbers only. `ttl` 0 is the default of Output.ttl."""

    address: bytes  # 16 bytes
    port: int
    egress: int  # interface slot
    ttl: int
    counter: int  # index of the output's counters


@dataclass(frozen=True)
class Entry:
    """One rule as an engine needs it."""

    group: bytes  # 16 bytes
    port: int
    ingress: int  # interface slot
    counter: int  # index of the rule's counters
    legs: tuple[Leg, ...]

    @cached_property
    def packed(self) -> bytes:
        """The description of native/table.h."""
        parts = [
            RULE_RECORD.pack(self.group, self.port, self.ingress, len(self.legs), 0, self.counter, 0),
            *(OUTPUT_RECORD.pack(leg.address, leg.port, leg.egress, leg.ttl, leg.counter, 0) for leg in self.legs),
        ]
        return b"".join(parts)


def mapped(address: Address) -> bytes:
    """128 bits in network byte order."""
    return address.packed if address.version == 6 else b"\0" * 10 + b"\xff\xff" + address.packed


def compile_rule(rule: Rule, slots: Mapping[str, int], counter: int, output_counters: Iterable[int]) -> Entry:
    """The entry of a rule, given the slot of each interface it names. KeyError if one is not there."""
    if rule.input.port is None:
        raise RuleError(f"input '{rule.input}': any port is not supported yet", "name one port per rule")
    legs = tuple(
        Leg(mapped(output.address), output.port, slots[output.interface], output.ttl or 0, output_counter)
        for output, output_counter in zip(rule.outputs, output_counters, strict=True)
    )
    return Entry(mapped(rule.input.group), rule.input.port, slots[rule.input.interface], counter, legs)

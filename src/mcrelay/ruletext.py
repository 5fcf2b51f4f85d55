"""Rule texts: what people write, read strictly.

Owns every refusal that the text alone can tell: each names the offending text, what is wrong with it and what would be
right. rules.py has the forms and writes them; what one of them writes, the other reads as the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final, Literal, NamedTuple, NoReturn, Self

from mcrelay.errors import RuleError
from mcrelay.limits import RULE_OUTPUTS_MAX
from mcrelay.rules import (
    BROADCAST,
    RULE_ID,
    Address,
    Input,
    Output,
    Protocol,
    Rate,
    Rule,
    Target,
    bits,
    is_group,
    masked,
    shown,
)

NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# A kernel interface name (dev_valid_name: at most 15 bytes, no white space, no '/' or ':'), less the characters that
# the text form itself uses.
INTERFACE: Final = re.compile(r"[^\s/:%,@\x00-\x1f\ud800-\udfff]{1,15}")

# What ip_address() takes for IPv4, five times as fast: rule sets have thousands.
_OCTET: Final = "(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
DOTTED_QUAD: Final = re.compile(r"\.".join([_OCTET] * 4))

INPUT_FORM: Final = "[SOURCE@]ADDRESS:PORT%INTERFACE, for example 239.1.1.1:5000%eth0 or [ff05::1]:5000%eth0"
OUTPUT_FORM: Final = (
    "ADDRESS:PORT%INTERFACE[,key=value...], for example 239.2.2.2:6000%eth1,ttl=8 or [ff05::1]:6000%eth1"
)
OPTIONS: Final = "ttl, dscp, source, sport, rate, loop and paused"

RATE: Final = re.compile(r"([0-9]{1,9})([kMG]?)(bit|pps)")
FACTORS: Final = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}
RATE_MAX: Final = 10**12
# RFC 2474, RFC 2597, RFC 3246, RFC 5865, RFC 8622.
DSCP_NAMES: Final = {
    **{f"cs{n}": 8 * n for n in range(8)},
    **{f"af{n}{m}": 8 * n + 2 * m for n in range(1, 5) for m in range(1, 4)},
    "ef": 46,
    "va": 44,
    "le": 1,
}

THIS_NETWORK: Final = 0  # the first byte of addresses that are nobody's (RFC 1122 section 3.2.1.3)
LOOPBACK: Final = 127
LOOPBACK_INTERFACE: Final = "lo"
GROUPS_MIN: Final = 224  # from here on, no address is one host's (RFC 1112 section 4)
RESERVED_MIN: Final = 240  # RFC 1112 section 4


def parse_rule(input: str, outputs: Iterable[str], name: str | None = None) -> Rule:
    """A rule from its texts, or RuleError."""
    if name is not None:
        check_name(name)
    given = parse_input(input)
    texts = tuple(outputs)
    if not texts:
        raise RuleError(f"rule {input!r} has no output", f"give at least one: {OUTPUT_FORM}")
    if len(texts) > RULE_OUTPUTS_MAX:
        raise RuleError(f"rule {input!r} has {len(texts)} outputs", f"at most {RULE_OUTPUTS_MAX} are possible")
    rule = Rule(given, tuple(map(parse_output, texts)), name)
    for output, text in zip(rule.outputs, texts, strict=True):
        _check_pair(given, output, f"output {shown(text)}")
        if rule.feeds_itself(output):
            raise RuleError(
                f"output {text!r} is where the input comes from: the relay would feed itself",
                "send to another group, port or interface",
            )
    if len(texts) > 1:
        _check_distinct(rule, texts)
    return rule


class _Range(NamedTuple):
    """The addresses of an output on its interface. Sorted, one comes before those that it contains."""

    interface: str
    version: int
    first: int
    minus_last: int

    @classmethod
    def of(cls, target: Target) -> Self:
        behind = bits(target.address) - target.prefix
        first = masked(target.address, target.prefix)
        return cls(target.interface, target.address.version, first, -(first + (1 << behind) - 1))

    def contains_later(self, other: Self) -> bool:
        """Whether it contains one that comes after it."""
        return self[:2] == other[:2] and self.minus_last <= other.minus_last


def _check_distinct(rule: Rule, texts: Sequence[str]) -> None:
    """RuleError if a packet could leave twice for one place. Of ranges in their order, only those on the stack contain
    the next one."""
    targets = [rule.target(output) for output in rule.outputs]
    stack: list[tuple[_Range, dict[int | None, int]]] = []  # with outputs by port
    for place, number in sorted((_Range.of(target), number) for number, target in enumerate(targets)):
        port = targets[number].port
        while stack and not stack[-1][0].contains_later(place):
            stack.pop()
        for _place, ports in stack:
            clash = next(iter(ports.values())) if port is None else ports.get(port, ports.get(None))
            if clash is not None:
                _refuse_both(targets, texts, *sorted((clash, number)))
        if not stack or stack[-1][0] != place:
            stack.append((place, {}))
        stack[-1][1][port] = number


def _refuse_both(targets: Sequence[Target], texts: Sequence[str], one: int, other: int) -> NoReturn:
    if targets[one][:4] == targets[other][:4]:
        raise RuleError(
            f"output {texts[other]!r} is given twice", "name each output once; receivers would get duplicates"
        )
    raise RuleError(
        f"output {texts[other]!r} is where {texts[one]!r} sends to, too",
        "leave one out; receivers would get duplicates",
    )


def check_name(name: str) -> None:
    if not name:
        raise RuleError("the rule's name is empty", "leave the name out or give one of 1 to 64 characters")
    if not NAME.fullmatch(name):
        raise RuleError(
            f"name {shown(name)} is not possible",
            "use 1 to 64 letters, digits, '.', '_' and '-', starting with a letter or digit",
        )
    if RULE_ID.fullmatch(name):
        raise RuleError(f"name {name!r} looks like a rule's id", "choose a name that cannot be mistaken for one")


# --- input ------------------------------------------------------------------------------------------------------------


def parse_input(text: str) -> Input:
    what = f"input {shown(text)}"
    head, *options = text.split(",")
    endpoint, interface = _split_interface(head, what, INPUT_FORM)
    source_text, at, rest = endpoint.rpartition("@")
    host, port_text = _split_port(rest, what, INPUT_FORM)
    address, prefix = _parse_prefix(host, what)
    port, protocol = _parse_port(port_text, what, any_text="*")
    vlan: int | None = None
    for key, value in _options(options, what, known=("vlan",), all_known="vlan=N"):
        vlan = _number_in(value, 1, 4094, f"{what}: {key}")
    source = _parse_host(source_text, what) if at else None
    if source is not None:
        _check_source(source, address, what)
        _check_host(source, what)
    _check_destination(address, prefix, port, protocol, what)
    given = Input(address, port, interface, source, prefix, vlan, protocol)
    if address.is_loopback and not given.is_on(LOOPBACK_INTERFACE):
        raise RuleError(
            f"{what}: {address} comes in by {LOOPBACK_INTERFACE} only",
            f"write %{LOOPBACK_INTERFACE}, or an address of the interface",
        )
    return given


def _check_destination(address: Address, prefix: int | None, port: int | None, protocol: str, what: str) -> None:
    """What a rule can take."""
    if not int(address) or (address.version == 4 and address.packed[0] == THIS_NETWORK):
        raise RuleError(f"{what}: nothing is sent to {address}", "name a group, or a unicast address of this host")
    if address.version == 4 and address.packed[0] >= RESERVED_MIN and address != BROADCAST:
        raise RuleError(
            f"{what}: {address} is in 240.0.0.0/4, which nobody routes",
            "name a group, or a unicast address of this host",
        )
    if address.version == 6 and is_group(address):
        _check_scope(address, prefix, what)
    if prefix is not None:
        shortest = 4 if address.version == 4 else 8
        if not is_group(address) or prefix < shortest:
            raise RuleError(
                f"{what}: a prefix is one of multicast groups", "use a part of 224.0.0.0/4 or ff00::/8, or one address"
            )
        if int(address) != masked(address, prefix):
            right = type(address)(masked(address, prefix))
            raise RuleError(f"{what}: {address}/{prefix} has bits behind the prefix", f"write {right}/{prefix}")
        if prefix == bits(address):
            raise RuleError(f"{what}: /{prefix} is one address", f"leave out '/{prefix}'")
    if protocol == "udp" and port is None and not is_group(address) and address != BROADCAST:
        raise RuleError(f"{what}: any port of a unicast address", "name the port: only that is kept from being refused")


def _check_source(source: Address, group: Address, what: str) -> None:
    if source.version != group.version:
        raise RuleError(f"{what}: {source} cannot send to {group}", "use addresses of one IP version")


def _check_host(source: Address, what: str) -> None:
    """Packets on a wire may come from it."""
    if source.version == 4:
        first = source.packed[0]
        is_somebodys = first not in (THIS_NETWORK, LOOPBACK) and first < GROUPS_MIN
    else:
        is_somebodys = int(source) != 0 and not source.is_loopback and not is_group(source)
    if not is_somebodys:
        raise RuleError(f"{what}: {source} is nobody's address", "name a host's unicast address")


# --- output -----------------------------------------------------------------------------------------------------------


def parse_output(text: str) -> Output:
    what = f"output {shown(text)}"
    head, *options = text.split(",")
    endpoint, interface = _split_interface(head, what, OUTPUT_FORM)
    if interface.endswith("+"):
        raise RuleError(f"{what}: an output has one interface", "give an output for each; patterns are for inputs")
    host, port_text = _split_port(endpoint, what, OUTPUT_FORM)
    address: Address | None = None
    prefix: int | None = None
    if host != "=":
        address, prefix = _parse_prefix(host, what)
        _check_sendable(address, prefix, what)
    port, protocol = _parse_port(port_text, what, any_text="=")
    ttl: int | Literal["keep"] | None = None
    dscp: int | None = None
    source: Address | Literal["keep"] | None = None
    source_port: int | Literal["keep"] | None = None
    rate: Rate | None = None
    loop = paused = False
    for key, value in _options(options, what, ("ttl", "dscp", "source", "sport", "rate", "loop", "paused"), OPTIONS):
        field = f"{what}: {key}"
        match key:
            case "ttl":
                ttl = "keep" if value == "keep" else _number_in(value, 1, 255, field, "or keep")
            case "dscp":
                dscp = _parse_dscp(value, field)
            case "source":
                source = "keep" if value == "keep" else _parse_host(value or "", what)
            case "sport":
                source_port = "keep" if value == "keep" else _number_in(value, 1, 65535, field, "or keep")
            case "rate":
                rate = _parse_rate(value, field)
            case "loop":
                loop = True
            case "paused":
                paused = True
    output = Output(address, port, interface, prefix, ttl, dscp, source, source_port, rate, loop, paused, protocol)
    _check_options(output, what)
    return output


def _check_sendable(address: Address, prefix: int | None, what: str) -> None:
    first = address.packed[0] if address.version == 4 else None
    if not int(address) or first == THIS_NETWORK:
        raise RuleError(f"{what}: cannot send to {address}", "use a group or a host's unicast address")
    if first == LOOPBACK or (address.version == 6 and address.is_loopback):
        raise RuleError(f"{what}: {address} never leaves this host", "use an address of the interface's network")
    if first is not None and first >= RESERVED_MIN and address != BROADCAST:
        raise RuleError(f"{what}: {address} is in 240.0.0.0/4, which nobody routes", "use a group or a host's address")
    if address.version == 6 and is_group(address):
        _check_scope(address, prefix, what)
    if prefix is not None and not is_group(address):
        raise RuleError(f"{what}: a prefix is one of multicast groups", "name one address, or a prefix of groups")
    if prefix is not None and int(address) != masked(address, prefix):
        right = type(address)(masked(address, prefix))
        raise RuleError(f"{what}: {address}/{prefix} has bits behind the prefix", f"write {right}/{prefix}")


def _check_options(output: Output, what: str) -> None:
    """Options that contradict each other."""
    writes_header = output.source == "keep" or output.source_port is not None or output.protocol == "esp"
    if output.loop and writes_header:
        raise RuleError(
            f"{what}: a copy with a source of its own is not heard on this host", "leave out loop, or source and sport"
        )
    if output.protocol == "esp" and output.source_port is not None:
        raise RuleError(f"{what}: ESP has no ports", "leave out sport")
    if output.loop and output.address is not None and not is_group(output.address):
        raise RuleError(f"{what}: loop is for multicast", "leave out loop")
    if isinstance(output.source, IPv4Address | IPv6Address) and output.address is not None:
        _check_source(output.source, output.address, what)


def _check_pair(given: Input, output: Output, what: str) -> None:
    """What an output can make of this input."""
    if output.protocol == "esp" and given.protocol != "esp":
        raise RuleError(f"{what}: the input is UDP, not ESP", "give a port, or '=' for that of the packet")
    if given.protocol == "esp" and output.port is not None:
        raise RuleError(f"{what}: ESP has no ports", "write esp for the port")
    if given.protocol == "esp" and output.protocol != "esp":
        raise RuleError(f"{what}: the input is ESP", "write esp for the port")
    version = given.address.version
    if output.address is not None and output.prefix is not None:
        if given.prefix is None:
            raise RuleError(f"{what}: the input has no prefix", "name one group, or give the input a prefix, too")
        if output.address.version != version or output.prefix != given.prefix:
            raise RuleError(
                f"{what}: a prefix is mapped onto one of the same length, the input has /{given.prefix}",
                f"write /{given.prefix}, or one group",
            )
    if output.source == "keep" and output.address is not None and output.address.version != version:
        raise RuleError(
            f"{what}: an IPv{version} source cannot be kept in an IPv{output.address.version} packet",
            "leave out source=keep, or name an address: source=ADDRESS",
        )
    if isinstance(output.source, IPv4Address | IPv6Address) and output.address is None:
        _check_source(output.source, given.address, what)
    source = given.source if output.source == "keep" else output.source
    destination = given.address if output.address is None else output.address
    if isinstance(source, IPv6Address) and source.is_link_local and not _is_of_link(destination):
        raise RuleError(
            f"{what}: the link-local source {source} cannot send to {destination}, beyond the link",
            "use a source of a wider scope, or a group in ff02::/16",
        )
    if output.loop and output.address is None and not is_group(given.address):
        raise RuleError(f"{what}: loop is for multicast", "leave out loop")


def _is_of_link(address: Address) -> bool:
    """Of IPv6: a group or a host that is not beyond the link."""
    return address.packed[1] & 15 <= 2 if is_group(address) else address.version == 6 and address.is_link_local


def _parse_dscp(value: str | None, field: str) -> int | None:
    if value == "keep":
        return None
    if value is not None and value.lower() in DSCP_NAMES:
        return DSCP_NAMES[value.lower()]
    return _number_in(value, 0, 63, field, "keep, or a name such as ef or af41")


def _parse_rate(value: str | None, field: str) -> Rate:
    match = RATE.fullmatch(value or "")
    if match:
        number = int(match[1]) * FACTORS[match[2]]
        if 1 <= number <= RATE_MAX:
            return Rate(number, "bit" if match[3] == "bit" else "pps")
    raise RuleError(f"{field} {shown(value or '')} is not possible", "write, for example, rate=10Mbit or rate=5000pps")


# --- pieces -----------------------------------------------------------------------------------------------------------


def _options(options: list[str], what: str, known: tuple[str, ...], all_known: str) -> Iterator[tuple[str, str | None]]:
    """Keys and values, each key once; loop and paused have no value."""
    seen: set[str] = set()
    for option in options:
        key, equals, value = option.partition("=")
        is_flag = key in ("loop", "paused")
        if key not in known or bool(equals) == is_flag:
            raise RuleError(f"{what}: unknown option {shown(option)}", f"options are {all_known}")
        if key in seen:
            raise RuleError(f"{what}: {key} is given twice", "give it once")
        seen.add(key)
        yield key, value if equals else None


def _split_interface(text: str, what: str, form: str) -> tuple[str, str]:
    endpoint, percent, interface = text.rpartition("%")
    if not percent:
        raise RuleError(f"{what} names no interface", f"write {form}")
    check_interface(interface, what)
    return endpoint, interface


def check_interface(name: str, what: str) -> None:
    """RuleError, about `what`, if no interface can have that name."""
    if not INTERFACE.fullmatch(name) or len(name.encode()) > 15 or name in (".", ".."):
        raise RuleError(
            f"{what}: {shown(name)} is not an interface name", "'ip -brief link' lists the interfaces of this host"
        )


def _split_port(text: str, what: str, form: str) -> tuple[str, str]:
    host, colon, port = text.rpartition(":")
    if "[" not in text and text.count(":") > 1:
        raise RuleError(f"{what}: an IPv6 address stands in brackets", f"write {form}")
    if not colon or text.endswith("]"):
        raise RuleError(f"{what} has no port", f"write {form}")
    return host, port


def _parse_prefix(host: str, what: str) -> tuple[Address, int | None]:
    address_text, slash, prefix_text = host.partition("/")
    address = _parse_address(address_text, what, bracketed=True)
    if not slash:
        return address, None
    prefix = _parse_number(prefix_text)
    if prefix is None or prefix > bits(address):
        raise RuleError(f"{what}: prefix {shown(slash + prefix_text)} is not possible", f"use /0 to /{bits(address)}")
    return address, prefix


def _parse_address(text: str, what: str, *, bracketed: bool = False) -> Address:
    if match := DOTTED_QUAD.fullmatch(text):
        a, b, c, d = map(int, match.groups())
        return IPv4Address(a << 24 | b << 16 | c << 8 | d)
    in_brackets = text.startswith("[") and text.endswith("]")
    try:
        address = ip_address(text[1:-1] if in_brackets else text)
    except ValueError:
        _refuse_address(text, what)
    if isinstance(address, IPv6Address):
        if bracketed and not in_brackets:
            raise RuleError(f"{what}: an IPv6 address stands in brackets", f"write [{address}]")
        if address.scope_id is not None:
            raise RuleError(f"{what}: {shown(text)} has a zone", "leave it out: the interface is behind the port")
        if address.ipv4_mapped is not None:
            raise RuleError(f"{what}: {address} is an IPv4 address", f"write {address.ipv4_mapped}")
    elif in_brackets:
        raise RuleError(f"{what}: brackets are for IPv6 addresses", f"write {address}")
    return address


def _parse_host(text: str, what: str) -> Address:
    address = _parse_address(text, what)
    _check_host(address, what)
    return address


def _refuse_address(text: str, what: str) -> NoReturn:
    raise RuleError(
        f"{what}: {shown(text)} is not an IP address", "write it in full, for example 239.1.1.1 or [ff05::1]"
    )


def _check_scope(group: Address, prefix: int | None, what: str) -> None:
    """RFC 4291 section 2.7: what scopes may be on a wire. Of a prefix, one that it leaves possible has to be."""
    scope = group.packed[1] & 15  # bits 12 to 15
    left_open = 0 if prefix is None else min(max(16 - prefix, 0), 4)
    if any(possible not in (0, 1, 15) for possible in range(scope, scope + (1 << left_open))):
        return
    if scope in (0, 15):
        raise RuleError(f"{what}: {group} has a reserved scope", "use, for example, ff02:: (link) or ff05:: (site)")
    if scope == 1:
        raise RuleError(f"{what}: {group} never leaves a host", "use, for example, ff02:: (link) or ff05:: (site)")


def _parse_number(text: str) -> int | None:
    # int() also takes signs, spaces, underscores and other scripts' digits.
    return int(text) if re.fullmatch(r"[0-9]{1,6}", text) else None


def _number_in(value: str | None, low: int, high: int, field: str, also: str = "") -> int:
    number = _parse_number(value or "")
    if number is None or not low <= number <= high:
        hint = f"use a number from {low} to {high}" + (f", {also}" if also else "")
        raise RuleError(f"{field} {shown(value or '')} is not possible", hint)
    return number


def _parse_port(text: str, what: str, any_text: str) -> tuple[int | None, Protocol]:
    if text == any_text:
        return None, "udp"
    if text == "esp":
        return None, "esp"
    port = _parse_number(text)
    if port is None or not 1 <= port <= 65535:
        raise RuleError(
            f"{what}: port {shown(text)} is not possible", f"use a number from 1 to 65535, {any_text!r} or 'esp'"
        )
    return port, "udp"

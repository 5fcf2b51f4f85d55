"""smcroute.conf: static routes for the kernel's multicast forwarding (smcroute.conf(5)).

A route has no port and keeps the source; rules that do the same are of any port. Groups are joined by the rules
themselves, so mgroup needs nothing where a route forwards the group. smcroute passes over words that it does not know;
here they are remarked on.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Final

from mcrelay.importers.imported import KEPT, BadImport, Imported, lines
from mcrelay.rules import Input, bits, shown

SOURCES_MAX: Final = 256  # that a prefix of sources is written out to
ANY: Final = ("0.0.0.0", "::", "*")
TTL: Final = re.compile("[1-9]|[1-9][0-9]|1[0-9][0-9]|2[0-4][0-9]|25[0-5]")
FORMS: Final = {
    "phyint": "phyint INTERFACE [enable | disable] [mrdisc] [ttl-threshold TTL]",
    "mgroup": "mgroup from IIF [source ADDRESS[/LEN]] group GROUP[/LEN]",
    "ssmgroup": "ssmgroup from IIF source ADDRESS[/LEN] group GROUP[/LEN]",
    "mroute": "mroute from IIF [source ADDRESS[/LEN]] group GROUP[/LEN] to OIF...",
    "include": "include PATH",
}
# What nobody means as an interface's name behind 'to', where smcroute takes each word for one.
NO_INTERFACES: Final = ("from", "source", "group", "to", "ttl", "ttl-threshold")


NO_NETWORK: Final = "is not an IP address, or a prefix of some"

Network = IPv4Network | IPv6Network


@dataclass
class _Line:
    """A line of mroute or mgroup."""

    number: int
    directive: str
    interface: str = ""
    group: str = ""
    source: str = ""  # any
    outputs: list[str] = field(default_factory=list)


def read(text: str) -> Imported:
    """BadImport at a line that is none of smcroute's."""
    imported = Imported()
    joins: list[_Line] = []
    for number, line in enumerate(lines(text), 1):
        words = line.partition("#")[0].split()
        for word in words:
            if '"' in word or "'" in word:
                what = f"{shown(word)} has a quote, which is a character like others in smcroute.conf"
                raise BadImport(what, "write interfaces' names as they are", number)
        match words:
            case []:
                pass
            case ["phyint", *rest]:
                _take_interface(imported, number, rest)
            case ["mgroup" | "ssmgroup" as directive, *rest]:
                joins.append(_parse(imported, number, directive, rest))
            case ["mroute", *rest]:
                _take_route(imported, _parse(imported, number, "mroute", rest))
            case ["include", *rest]:
                _take_include(imported, number, rest)
            case [word, *_]:
                raise BadImport(f"{shown(word)} is no directive", f"these are: {', '.join(FORMS)}", number)
    inputs = [rule.input for rule in imported.rules]
    for join in joins:
        _take_join(imported, join, inputs)
    imported.remarks.sort(key=lambda remark: remark.line or 0)
    return imported


def _pass_over(imported: Imported, number: int, word: str, directive: str) -> None:
    imported.remark(number, f"{shown(word)} is no word of {directive}, and is left out", f"write: {FORMS[directive]}")


def _parse(imported: Imported, number: int, directive: str, words: Sequence[str]) -> _Line:
    """What stands behind each keyword; 'to' has all that follows."""
    line = _Line(number, directive)
    form = f"write: {FORMS[directive]}"
    given: dict[str, str] = {}
    left = list(words)
    while left:
        keyword = left.pop(0)
        if keyword == "to" and directive == "mroute":
            line.outputs, left = left, []
        elif keyword not in ("from", "source", "group"):
            _pass_over(imported, number, keyword, directive)
        elif keyword in given:
            raise BadImport(f"'{keyword}' is there twice", form, number)
        elif not left or left[0] in NO_INTERFACES:
            raise BadImport(f"there is nothing behind '{keyword}'", form, number)
        else:
            given[keyword] = left.pop(0)
    for word in line.outputs:
        if word in NO_INTERFACES:
            what = f"{shown(word)} stands behind 'to', where every word is an interface"
            raise BadImport(what, f"{form}; a TTL is set by ttl=N on mcrelay's outputs", number)
    _need(line, "from", given)
    _need(line, "group", given)
    if directive == "mroute" and not line.outputs:
        raise BadImport("there is no 'to'", form, number)
    line.interface, line.group = given["from"], given["group"]
    source = given.get("source", "")
    line.source = "" if source in ANY else source
    return line


def _need(line: _Line, keyword: str, given: Container[str]) -> None:
    if keyword not in given:
        raise BadImport(f"there is no '{keyword}'", f"write: {FORMS[line.directive]}", line.number)


def _take_interface(imported: Imported, number: int, words: Sequence[str]) -> None:
    if not words:
        raise BadImport("'phyint' names no interface", f"write: {FORMS['phyint']}", number)
    interface, *left = words
    while left:
        option = left.pop(0)
        match option:
            case "enable":
                pass
            case "disable":
                what = f"{shown(interface)} is disabled here, and rules that name it are written all the same"
                imported.remark(number, what, "remove those rules if it is to stay out")
            case "mrdisc":
                what = f"mrdisc of {shown(interface)} has no equivalent"
                remedy = "let the switch's querier port see the relay, or rely on the groups joined"
                imported.remark(number, what, remedy)
            case "ttl-threshold":
                ttl = left.pop(0) if left else ""
                if not TTL.fullmatch(ttl):
                    raise BadImport(f"{shown(ttl)} is no TTL of ttl-threshold", "write 1 to 255", number)
                what = f"ttl-threshold {ttl} of {shown(interface)} has no equivalent"
                remedy = "set ttl=N on outputs; packets are not chosen by the TTL that they come with"
                imported.remark(number, what, remedy)
            case _:
                _pass_over(imported, number, option, "phyint")


def _take_include(imported: Imported, number: int, words: Sequence[str]) -> None:
    if not words:
        raise BadImport("'include' names no file", f"write: {FORMS['include']}", number)
    what = f"{shown(words[0])} is left out: included files are not read"
    imported.remark(number, what, "import each of them, into a file of conf.d")
    for word in words[1:]:
        _pass_over(imported, number, word, "include")


def _take_join(imported: Imported, join: _Line, inputs: Iterable[Input]) -> None:
    """A rule joins its group, of its source if it has one: only what is joined besides, or less than that, is said."""
    group, source = _network(join.group), _network(join.source)
    if group is None or (join.source and source is None):
        wrong = join.group if group is None else join.source
        imported.leave_out(join.number, "this line", f"{shown(wrong)} {NO_NETWORK}")
        return
    on_it = [given for given in inputs if given.is_on(join.interface)]
    told = f"group {shown(join.group)}{f' of {shown(join.source)}' if join.source else ''}"
    if not _take_all(on_it, group, source):
        what = f"{told} is joined on {shown(join.interface)}, and no rule forwards all of it"
        imported.leave_out(join.number, "this line", what, "rules join what they forward; for the rest add a rule")
    elif source is not None and any(given.source is None and _groups(given).overlaps(group) for given in on_it):
        what = f"{told} is joined on {shown(join.interface)}, and not of others; its rule takes any source"
        imported.remark(join.number, what, "write ADDRESS@ in front of the input if that is what you want")


def _take_all(inputs: Iterable[Input], group: Network, source: Network | None) -> bool:
    """Whether together they take the groups, of each of these sources; without any, whether they do of some."""
    taking = [given for given in inputs if _groups(given).overlaps(group)]
    if source is None:
        return _cover(taking, group)
    anybodys = [given for given in taking if given.source is None]
    if _cover(anybodys, group):
        return True
    return source.num_addresses <= SOURCES_MAX and all(
        _cover([*anybodys, *(given for given in taking if given.source == address)], group) for address in source
    )


def _cover(inputs: Iterable[Input], group: Network) -> bool:
    """Whether each of the groups is one of theirs. All are of one IP version."""
    left = int(group.network_address)  # the first that is not yet seen to be
    for theirs in sorted(map(_groups, inputs), key=lambda network: int(network.network_address)):
        if int(theirs.network_address) <= left:
            left = max(left, int(theirs.broadcast_address) + 1)
    return left > int(group.broadcast_address)


def _groups(given: Input) -> Network:
    prefix = bits(given.address) if given.prefix is None else given.prefix
    return ip_network((given.address, prefix))


def _network(text: str) -> Network | None:
    try:
        return None if "%" in text else ip_network(text, strict=False)
    except ValueError:
        return None


def _take_route(imported: Imported, route: _Line) -> None:
    number = route.number
    if not imported.is_interface(number, route.interface, "this route", or_pattern=True):
        return
    if (network := _network(route.group)) is None:
        imported.leave_out(number, "this route", f"{shown(route.group)} {NO_NETWORK}")
        return
    address = route.group.partition("/")[0]  # with bits behind the prefix, if it has some, to be refused
    written = f"[{address}]" if network.version == 6 else address
    if network.num_addresses > 1:
        written += f"/{network.prefixlen}"
    outputs = []
    for out in imported.once(number, route.outputs, "the output"):
        if out.endswith("+"):
            why = "a pattern is for inputs"
            imported.leave_out(number, f"the output {shown(out)}", why, "write an output for each interface")
        elif out == route.interface:
            why = "packets do not leave where they came in"
            imported.leave_out(number, f"the output {shown(out)}", why, "name other interfaces behind 'to'")
        elif imported.is_interface(number, out, f"the output {shown(out)}"):
            outputs.append(f"=:=%{out},{KEPT}")
    if not outputs:
        imported.leave_out(number, "this route", f"nothing of {shown(route.group)} is sent on")
        return
    for source in _sources(imported, number, route.source):
        imported.add(number, f"{source}{written}:*%{route.interface}", outputs)


def _sources(imported: Imported, number: int, given: str) -> Iterator[str]:
    """What stands in front of the group, for each source."""
    if not given:
        yield ""
        return
    if (network := _network(given)) is None:
        raise BadImport(f"{shown(given)} is no source", "write an address, or ADDRESS/LENGTH", number)
    if network.num_addresses > SOURCES_MAX:
        what = f"the sources {given} are too many to be written out, so the rule takes any source"
        imported.remark(number, what, "write rules for the sources that are wanted, or a firewall's")
        yield ""
        return
    for address in network if network.num_addresses > 1 else [network.network_address]:
        yield f"{f'[{address}]' if address.version == 6 else address}@"

"""smcroute.conf: static routes for the kernel's multicast forwarding (smcroute.conf(5)).

A route has no port and keeps the source; rules that do the same are of any port. Groups are joined by the rules
themselves, so mgroup needs nothing where a route forwards the group. smcroute passes over words that it does not know;
here they are remarked on.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_network
from typing import Final

from mcrelay.importers.imported import KEPT, BadImport, Imported, lines
from mcrelay.rules import shown

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
    routes: list[_Line] = []
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
                routes.append(_parse(imported, number, "mroute", rest))
                _take_route(imported, routes[-1])
            case ["include", *rest]:
                _take_include(imported, number, rest)
            case [word, *_]:
                raise BadImport(f"{shown(word)} is no directive", f"these are: {', '.join(FORMS)}", number)
    for join in joins:
        _take_join(imported, join, routes)
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


def _take_join(imported: Imported, join: _Line, routes: Sequence[_Line]) -> None:
    """A rule joins its group, of its source if it has one: only what is joined besides, or less than that, is said."""
    sources = {route.source for route in routes if (route.interface, route.group) == (join.interface, join.group)}
    group = f"group {shown(join.group)}"
    if "" in sources and join.source not in sources:
        what = f"{group} is joined on {shown(join.interface)} for {shown(join.source)} alone; its rule takes any source"
        imported.remark(join.number, what, f"write {join.source}@ in front of the input if that is what you want")
    elif not sources or (join.source and join.source not in sources):
        of_source = f" of {shown(join.source)}" if join.source else ""
        what = f"{group}{of_source} is joined on {shown(join.interface)}, and no mroute of the same forwards it"
        imported.leave_out(join.number, "this line", what, "rules join what they forward; for the rest add a rule")


def _take_route(imported: Imported, route: _Line) -> None:
    number = route.number
    address, slash, length = route.group.partition("/")
    written = f"[{address}]" if ":" in address else address
    outputs = []
    for out in imported.once(number, route.outputs, "the output"):
        if out.endswith("+"):
            why = "a pattern is for inputs"
            imported.leave_out(number, f"the output {shown(out)}", why, "write an output for each interface")
        elif out == route.interface:
            why = "packets do not leave where they came in"
            imported.leave_out(number, f"the output {shown(out)}", why, "name other interfaces behind 'to'")
        else:
            outputs.append(f"=:=%{out},{KEPT}")
    if not outputs:
        imported.leave_out(number, "this route", f"nothing of {shown(route.group)} is sent on")
        return
    for source in _sources(imported, number, route.source):
        imported.add(number, f"{source}{written}{slash}{length}:*%{route.interface}", outputs)


def _sources(imported: Imported, number: int, given: str) -> Iterator[str]:
    """What stands in front of the group, for each source."""
    if not given:
        yield ""
        return
    try:
        network = ip_network(given, strict=False)
    except ValueError:
        raise BadImport(f"{shown(given)} is no source", "write an address, or ADDRESS/LENGTH", number) from None
    if network.num_addresses > SOURCES_MAX:
        what = f"the sources {given} are too many to be written out, so the rule takes any source"
        imported.remark(number, what, "write rules for the sources that are wanted, or a firewall's")
        yield ""
        return
    for address in network if network.num_addresses > 1 else [network.network_address]:
        yield f"{f'[{address}]' if address.version == 6 else address}@"

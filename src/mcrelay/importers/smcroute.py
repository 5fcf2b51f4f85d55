"""smcroute.conf: static routes for the kernel's multicast forwarding (smcroute.conf(5)).

A route has no port and keeps the source; rules that do the same are of any port. Groups are joined by the rules
themselves, so mgroup needs nothing where a route forwards the group.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from ipaddress import ip_network
from typing import Final

from mcrelay.importers.imported import KEPT, BadImport, Imported
from mcrelay.rules import shown

SOURCES_MAX: Final = 256  # that a prefix of sources is written out to
KEYWORDS: Final = ("from", "source", "group", "to")
ANY: Final = ("0.0.0.0", "::", "*")


def read(text: str) -> Imported:
    """BadImport at a line that is none of smcroute's."""
    imported = Imported()
    joined: list[tuple[int, str, str]] = []  # line, interface, group
    routed: set[tuple[str, str]] = set()
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        match words:
            case []:
                pass
            case ["phyint", interface, *options]:
                _take_interface(imported, number, interface, options)
            case ["mgroup", *rest]:
                fields = _fields(number, rest, ("from", "group"))
                joined.append((number, fields["from"][0], fields["group"][0]))
            case ["ssmgroup", *rest]:
                fields = _fields(number, rest, ("from", "group", "source"))
                joined.append((number, fields["from"][0], fields["group"][0]))
            case ["mroute", *rest]:
                fields = _fields(number, rest, ("from", "group", "to"))
                routed.add((fields["from"][0], fields["group"][0]))
                _take_route(imported, number, fields)
            case ["include", path, *_]:
                what = f"the files {shown(path)} are not read"
                imported.remark(number, what, "import each of them, into a file of conf.d")
            case [word, *_]:
                raise BadImport(f"{shown(word)} is no directive", "phyint, mgroup, ssmgroup, mroute or include", number)
    for number, interface, group in joined:
        if (interface, group) not in routed:
            what = f"group {group} is joined on {interface}, and no mroute of the same group forwards it"
            imported.remark(number, what, "rules join what they forward; for the rest add a rule")
    return imported


def _fields(number: int, words: Sequence[str], needed: Sequence[str]) -> Mapping[str, list[str]]:
    """What stands behind each keyword."""
    fields: dict[str, list[str]] = {}
    keyword: str | None = None
    for word in words:
        if word in KEYWORDS and word not in fields:
            keyword = word
            fields[word] = []
        elif keyword is None:
            raise BadImport(f"{shown(word)} is at a wrong place", "it begins with 'from INTERFACE'", number)
        else:
            fields[keyword].append(word)
    for word in needed:
        if not fields.get(word):
            raise BadImport(f"there is no '{word}'", "write: from IIF [source ADDRESS] group GROUP to OIF...", number)
    return fields


def _take_interface(imported: Imported, number: int, interface: str, options: Sequence[str]) -> None:
    if "mrdisc" in options:
        what = f"mrdisc of {shown(interface)} has no equivalent"
        imported.remark(number, what, "let the switch's querier port see the relay, or rely on the groups joined")
    if "ttl-threshold" in options:
        what = f"ttl-threshold of {shown(interface)} has no equivalent"
        imported.remark(number, what, "set ttl=N on outputs; packets are not chosen by the TTL that they come with")


def _take_route(imported: Imported, number: int, fields: Mapping[str, list[str]]) -> None:
    interface, group = fields["from"][0], fields["group"][0]
    address, slash, length = group.partition("/")
    written = f"[{address}]" if ":" in address else address
    outputs = []
    for out in fields["to"]:
        if out.endswith("+"):
            what = f"{shown(out)} is a pattern of interfaces to send by"
            imported.remark(number, what, "patterns are for inputs: write an output for each interface")
        elif out != interface:
            outputs.append(f"=:=%{out},{KEPT}")
    if not outputs:
        imported.remark(number, f"nothing of {shown(group)} is sent on", "write its outputs by hand")
        return
    for source in _sources(imported, number, fields.get("source", [])):
        prefix = f"/{length}" if slash else ""
        imported.add(number, f"{source}{written}{prefix}:*%{interface}", outputs)


def _sources(imported: Imported, number: int, given: Sequence[str]) -> Iterator[str]:
    """What stands in front of the group, for each source."""
    if not given or given[0] in ANY:
        yield ""
        return
    try:
        network = ip_network(given[0], strict=False)
    except ValueError:
        raise BadImport(f"{shown(given[0])} is no source", "write an address, or ADDRESS/LENGTH", number) from None
    if network.num_addresses > SOURCES_MAX:
        what = f"the sources {given[0]} are too many to be written out"
        imported.remark(number, what, "the rule takes the group of any source")
        yield ""
        return
    for address in network if network.num_addresses > 1 else [network.network_address]:
        yield f"{f'[{address}]' if address.version == 6 else address}@"

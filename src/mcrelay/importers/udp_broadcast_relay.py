"""Options of udp-broadcast-relay, of its redux version and of udpbroadcastrelay: broadcasts, or groups, of a port
between all of some interfaces, as if the sender had sent them there.

A text may have several command lines, as one such program relays one port.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from mcrelay.importers.imported import KEPT, BadImport, Imported, between
from mcrelay.rules import shown

BROADCAST: Final = "255.255.255.255"
OWN_ADDRESS: Final = {"1.1.1.1": "sport={port}", "1.1.1.2": "sport=keep"}  # special values of -s
IDLE: Final = (
    "-d",
    "-f",
    "-h",
    "--help",
    "-t",
    "--ttl-id",
    "--ttl",
    "--debug",
    "--fork",
)  # of no effect on packets here


@dataclass
class _Options:
    port: str | None = None
    devices: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    source: str | None = None
    blocked: list[str] = field(default_factory=list)
    words: list[str] = field(default_factory=list)


def read(text: str) -> Imported:
    """BadImport at a line that is none of its command lines."""
    imported = Imported()
    count = 0
    for number, line in _lines(text):
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise BadImport(f"this is no command line: {error}", "close the quotes", number) from None
        if words:
            count += 1
            _take(imported, number, _parse(number, words))
    if not count:
        raise BadImport("there is no command line", "write, for example, --id 1 --port 1900 --dev eth0 --dev eth1")
    return imported


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Each with the number of its first; those that end in a backslash go on in the next."""
    begun: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        begun.append(line.removesuffix("\\"))
        if not line.endswith("\\"):
            yield number - len(begun) + 1, " ".join(begun)
            begun = []
    if begun:
        yield number - len(begun) + 1, " ".join(begun)


def _parse(number: int, words: Sequence[str]) -> _Options:
    options = _Options()
    left = list(words)
    while left and "relay" in left[0] and not left[0].startswith("-"):
        del left[0]  # the program
    while left:
        word = left.pop(0)
        name, equals, value = word.partition("=")
        name = f"-{name}" if re.fullmatch(r"-(id|port|dev|multicast|blockid|blockcidr|allowcidr)", name) else name
        if name in IDLE or word == "&":
            continue
        if not word.startswith("-"):
            options.words.append(word)
            continue
        if name not in ("--id", "--port", "--dev", "--multicast", "-s", "--blockid", "--blockcidr", "--allowcidr"):
            raise BadImport(f"{shown(word)} is no option of udp-broadcast-relay", "copy its whole command line", number)
        if not equals:
            if not left:
                raise BadImport(f"{word} has no value", f"write {word} VALUE", number)
            value = left.pop(0)
        match name:
            case "--port":
                options.port = value
            case "--dev":
                options.devices.append(value)
            case "--multicast":
                options.groups.append(value)
            case "-s":
                options.source = value
            case "--blockid" | "--blockcidr" | "--allowcidr":
                options.blocked.append(f"{name} {value}")
    if options.port is None and len(options.words) >= 2:  # the first version: ID PORT DEVICE...
        _id, options.port, *options.devices = options.words
    return options


def _take(imported: Imported, number: int, options: _Options) -> None:
    if options.port is None or len(set(options.devices)) < 2:
        raise BadImport("there is no port, or fewer than two devices", "copy its whole command line", number)
    for text in options.blocked:
        imported.remark(
            number, f"{text} has no equivalent", "write rules for the sources that are wanted, or a firewall's"
        )
    if options.source is None:
        how = KEPT
    elif options.source in OWN_ADDRESS:
        how = OWN_ADDRESS[options.source].format(port=options.port)
    else:
        how = f"source={options.source},sport=keep"
    for address in options.groups or [BROADCAST]:
        for given, outputs in between(options.devices, f"{address}:{options.port}", f",{how},ttl=keep"):
            imported.add(number, given, outputs)
    if options.groups:
        what = f"broadcasts to port {options.port} are not relayed, only the groups are"
        imported.remark(number, what, f"add rules with {BROADCAST}:{options.port} if they are wanted")
    else:
        what = "only broadcasts to 255.255.255.255 are relayed, not those to a network's own address"
        imported.remark(number, what, "add a rule for it, such as 192.0.2.255:PORT%INTERFACE, if they are wanted")

"""Options of udp-broadcast-relay, of its redux version and of udpbroadcastrelay: broadcasts, or groups, of a port
between all of some interfaces, as if the sender had sent them there.

A text may have several command lines, as one such program relays one port.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from mcrelay.importers.imported import KEPT, BadImport, Imported, after_program, between, command_lines
from mcrelay.rules import shown

PROGRAM: Final = re.compile(r"udp-?broadcast-?relay[\w.-]*")
BROADCAST: Final = "255.255.255.255"
OWN_ADDRESS: Final = {"1.1.1.1": "sport={port}", "1.1.1.2": "sport=keep"}  # special values of -s
IDLE: Final = ("-d", "-f", "-h", "--help", "-t", "--ttl-id", "&")  # of no effect on packets here
SOURCES: Final = "write rules for the sources that are wanted, or a firewall's"
REMEDIES: Final = {  # of options that have no equivalent
    "--blockid": "what other relays send is like others' packets: keep two relays from one pair of networks",
    "--blockcidr": SOURCES,
    "--allowcidr": SOURCES,
    "--msearch": "M-SEARCH is relayed as it comes, and answers by unicast are routed: docs/recipes/ssdp.md",
    "--pid": "the service manager knows mcrelay's process",
    "--pidfile": "the service manager knows mcrelay's process",
}
WITH_VALUE: Final = ("--id", "--port", "--dev", "--multicast", "-s", *REMEDIES)
FORWARDED: Final = re.compile("fwd(,.*)?")  # the value of --msearch that mcrelay does anyway
IDENTITY: Final = re.compile("[0-9]+")
PORT: Final = re.compile("[0-9]{1,5}")


@dataclass
class _Options:
    values: dict[str, str] = field(default_factory=dict)  # of options that are there once
    devices: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)


def read(text: str) -> Imported:
    """BadImport at a line that is none of its command lines."""
    return _read(command_lines(text))


def read_options(words: Sequence[str]) -> Imported:
    """BadImport if they are none of its command line."""
    return _read([(None, words)])


def _read(given: Iterable[tuple[int | None, Sequence[str]]]) -> Imported:
    imported = Imported()
    count = 0
    for number, words in given:
        count += 1
        words = after_program(imported, number, words, PROGRAM)
        _take(imported, number, _parse(imported, number, words))
    if not count:
        raise BadImport("there is no command line", "write, for example, --id 1 --port 1900 --dev eth0 --dev eth1")
    return imported


def _parse(imported: Imported, number: int | None, words: Sequence[str]) -> _Options:
    options = _Options()
    rest: list[str] = []
    left = list(words)
    while left:
        word = left.pop(0)
        name, equals, value = word.partition("=")
        name = f"-{name}" if f"-{name}" in WITH_VALUE else name  # its manual writes -id
        if name in IDLE:
            continue
        if not word.startswith("-"):
            rest.append(word)
            continue
        if name not in WITH_VALUE:
            raise BadImport(f"{shown(word)} is no option of udp-broadcast-relay", "copy its whole command line", number)
        if not equals:
            if not left:
                raise BadImport(f"{name} has no value", f"write {name} VALUE", number)
            value = left.pop(0)
        _set(imported, number, options, name, value)
    if "--port" not in options.values and len(rest) >= 2 and IDENTITY.fullmatch(rest[0]):
        _id, options.values["--port"], *options.devices = rest  # the first version: ID PORT DEVICE...
        rest = []
    for word in rest:
        imported.leave_out(number, shown(word), "it belongs to no option", "write --dev in front of a device")
    return options


def _set(imported: Imported, number: int | None, options: _Options, name: str, value: str) -> None:
    match name:
        case "--dev":
            options.devices.append(value)
        case "--multicast":
            options.groups.append(value)
        case "--msearch" if FORWARDED.fullmatch(value):
            pass
        case "--port" | "-s" | "--id":
            if name in options.values:
                imported.remark(number, f"{name} is there twice, and the last counts", "write a line for each relay")
            options.values[name] = value
        case _:
            imported.remark(number, f"{name} {shown(value)} has no equivalent", REMEDIES[name])


def _take(imported: Imported, number: int | None, options: _Options) -> None:
    port, source = options.values.get("--port"), options.values.get("-s")
    if port is None or len(set(options.devices)) < 2:
        raise BadImport("there is no port, or fewer than two devices", "copy its whole command line", number)
    if not PORT.fullmatch(port):
        imported.leave_out(number, "this relay", f"{shown(port)} is not a port", "write 1 to 65535")
        return
    if source is None:
        how = KEPT
    elif not imported.is_address(number, source, "this relay"):
        return
    elif source in OWN_ADDRESS:
        how = OWN_ADDRESS[source].format(port=port)
    else:
        how = f"source={source},sport=keep"
    devices = [
        device
        for device in imported.once(number, options.devices, "the device")
        if imported.is_interface(number, device, f"the device {shown(device)}")
    ]
    if not imported.are_enough(number, devices, "--dev"):
        return
    groups = [
        group
        for group in imported.once(number, options.groups, "the group")
        if imported.is_address(number, group, f"the group {shown(group)}")
    ]
    for address in groups if options.groups else [BROADCAST]:
        for given, outputs in between(devices, f"{address}:{port}", f",{how},ttl=keep"):
            imported.add(number, given, outputs, what=f"the rule {given}")
    if options.groups:
        what = f"broadcasts to port {port} are not relayed, only the groups are"
        imported.remark(number, what, f"add rules with {BROADCAST}:{port} if they are wanted")
    else:
        what = "only broadcasts to 255.255.255.255 are relayed, not those to a network's own address"
        imported.remark(number, what, "add a rule for it, such as 192.0.2.255:PORT%INTERFACE, if they are wanted")

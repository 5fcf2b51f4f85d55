"""multicast-relay.py's options: groups and broadcasts between all of some interfaces, sent on as they came.

Without options it relays mDNS, SSDP and the broadcasts by which Sonos devices are set up.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from typing import Final, NoReturn

from mcrelay.importers.imported import KEPT, BadImport, Imported, between
from mcrelay.rules import shown

USUAL: Final = {  # what it relays unless it is told not to
    "noMDNS": ("224.0.0.251:5353", "mdns"),
    "noSSDP": ("239.255.255.250:1900", "ssdp"),
    "noSonosDiscovery": ("255.255.255.255:6969", "sonos"),
}
SWITCHES: Final = ("oneInterface", "mdnsForceUnicast")
# What says nothing about packets, or what mcrelay does anyway.
IDLE: Final = ("homebrewNetifaces", "allowNonEther", "wait", "foreground", "verbose", "debug", "noRemoteRelay")
WITH_VALUE: Final = ("ifFilter", "ssdpUnicastAddr", "remotePort", "remoteRetry", "aes", "logfile", "ifNameStructLen")
REMEDIES: Final = {
    "oneInterface": "packets do not leave where they came in; give each network an interface, such as a VLAN's",
    "mdnsForceUnicast": "payloads are never changed",
    "ifFilter": "write rules for the sources: SOURCE@GROUP:PORT%INTERFACE",
    "ssdpUnicastAddr": "answers by unicast are routed, or need rules of their own: docs/recipes/ssdp.md",
    "listen": "run mcrelay on both sides, with unicast outputs over a VPN",
    "remote": "run mcrelay on both sides, with unicast outputs over a VPN",
    "aes": "use a VPN between the two sides",
}


class _Options(argparse.ArgumentParser):
    """Raises instead of ending the program."""

    def error(self, message: str) -> NoReturn:
        raise BadImport(f"these are no options of multicast-relay.py: {message[:200]}", "copy its whole command line")


def _parser() -> _Options:
    parser = _Options(prog="multicast-relay.py", add_help=False, allow_abbrev=False)
    parser.add_argument("--interfaces", nargs="+", required=True)
    for name in ("noTransmitInterfaces", "masquerade", "listen", "remote"):
        parser.add_argument(f"--{name}", nargs="+", default=[])
    parser.add_argument("--relay", nargs="*", default=[])
    parser.add_argument("--ttl")
    for name in WITH_VALUE:
        parser.add_argument(f"--{name}")
    for name in (*USUAL, *SWITCHES, *IDLE):
        parser.add_argument(f"--{name}", action="store_true")
    return parser


def read(text: str) -> Imported:
    """BadImport if these are no options of its."""
    try:
        words = shlex.split(text, comments=True)
    except ValueError as error:
        raise BadImport(f"this is no command line: {error}", "close the quotes") from None
    while words and not words[0].startswith("-"):
        del words[0]  # python3 /opt/multicast-relay.py
    options = _parser().parse_args(words)
    imported = Imported()
    interfaces = _names(imported, options.interfaces)
    for name, remedy in REMEDIES.items():
        if getattr(options, name):
            imported.remark(None, f"--{name} has no equivalent", remedy)
    for switch, (where, name) in USUAL.items():
        if not getattr(options, switch):
            _relay(imported, where, name, interfaces, options)
    for where in options.relay:
        _relay(imported, where, None, interfaces, options)
    return imported


def _names(imported: Imported, given: Sequence[str]) -> list[str]:
    """Interfaces by name; they may be given by address, which only the host can tell."""
    names = []
    for text in given:
        if text.replace(".", "").replace("/", "").isdigit():
            imported.remark(
                None, f"{shown(text)} stands for an interface", "'ip -brief address' has its name: write that"
            )
        else:
            names.append(text)
    return names


def _relay(
    imported: Imported, where: str, name: str | None, interfaces: Sequence[str], options: argparse.Namespace
) -> None:
    ttl = f"ttl={options.ttl or 'keep'}"
    silent = set(options.noTransmitInterfaces)
    for given, outputs in between(interfaces, where, ""):
        texts = []
        for output in outputs:
            out = output.rpartition("%")[2]
            if out not in silent:
                # Masqueraded, it has the relay's own address.
                kept = "sport=keep" if out in options.masquerade else KEPT
                texts.append(f"{output},{kept},{ttl}")
        if texts:
            imported.add(None, given, texts, None if name is None else f"{name}-{given.rpartition('%')[2]}")

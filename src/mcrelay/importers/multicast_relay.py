"""multicast-relay.py's options: groups and broadcasts between all of some interfaces, sent on as they came.

Without options it relays mDNS, SSDP and the broadcasts by which Sonos devices are set up. A text may have several
command lines.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from ipaddress import ip_interface
from typing import Any, Final, NoReturn

from mcrelay.importers.imported import BY_HAND, KEPT, BadImport, Imported, after_program, between, command_lines
from mcrelay.rules import shown

PROGRAM: Final = re.compile(r"(multicast|ssdp)-?relay[\w.-]*")
USUAL: Final = {  # what it relays unless it is told not to
    "noMDNS": ("224.0.0.251:5353", "mdns"),
    "noSSDP": ("239.255.255.250:1900", "ssdp"),
    "noSonosDiscovery": ("255.255.255.255:6969", "sonos"),
}
RELAY: Final = re.compile(r"[0-9.]+:[0-9]+")
TTL_MAX: Final = 255
# What says nothing about packets, or what mcrelay does anyway.
IDLE: Final = ("homebrewNetifaces", "allowNonEther", "wait", "foreground", "verbose", "debug", "noRemoteRelay")
IDLE_WITH_VALUE: Final = ("ifNameStructLen",)
SWITCHES: Final = ("oneInterface", "mdnsForceUnicast")
WITH_VALUES: Final = ("listen", "remote")
OVER_VPN: Final = "run mcrelay on both sides, with unicast outputs over a VPN"
REPEATED: Final = "devices repeat it themselves; nothing is cached"
REMEDIES: Final = {
    "oneInterface": "packets do not leave where they came in; give each network an interface, such as a VLAN's",
    "mdnsForceUnicast": "payloads are never changed",
    "ifFilter": "write rules for the sources: SOURCE@GROUP:PORT%INTERFACE",
    "ssdpUnicastAddr": "answers by unicast are routed, or need rules of their own: docs/recipes/ssdp.md",
    "ssdpRepeat": REPEATED,
    "mdnsRepeat": REPEATED,
    "listen": OVER_VPN,
    "remote": OVER_VPN,
    "remotePort": OVER_VPN,
    "remoteRetry": OVER_VPN,
    "aes": "use a VPN between the two sides",
    "k8sport": "have 'mcrelay health' run, or ask for /health: docs/metrics.md",
    "logfile": "logs go to the journal, or to standard error",
}


class _Options(argparse.ArgumentParser):
    """Raises instead of ending the program."""

    def error(self, message: str) -> NoReturn:
        raise BadImport(f"these are no options of multicast-relay.py: {message[:200]}", "copy its whole command line")


class _Once(argparse.Action):
    """The last one counts, and it is known that there were others."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        if self.dest in namespace.seen:
            namespace.again.append(self.dest)
        namespace.seen.add(self.dest)
        setattr(namespace, self.dest, values)


def _parser() -> _Options:
    # It takes abbreviations, too.
    parser = _Options(prog="multicast-relay.py", add_help=False)
    parser.add_argument("--interfaces", nargs="+", required=True, action=_Once)
    for name in ("noTransmitInterfaces", "masquerade", *WITH_VALUES):
        parser.add_argument(f"--{name}", nargs="+", default=[], action=_Once)
    parser.add_argument("--relay", nargs="*", default=[], action=_Once)
    parser.add_argument("--ttl", type=int, default=0, action=_Once)
    for name in (*REMEDIES.keys() - {*SWITCHES, *WITH_VALUES}, *IDLE_WITH_VALUE):
        parser.add_argument(f"--{name}", action=_Once)
    for name in (*USUAL, *SWITCHES, *IDLE):
        parser.add_argument(f"--{name}", action="store_true")
    return parser


def read(text: str) -> Imported:
    """BadImport at a line that has none of its options."""
    return _read(command_lines(text))


def read_options(words: Sequence[str]) -> Imported:
    """BadImport if they are none of its options."""
    return _read([(None, words)])


def _read(given: Iterable[tuple[int | None, Sequence[str]]]) -> Imported:
    imported = Imported()
    parser = _parser()
    count = 0
    for number, words in given:
        count += 1
        options = argparse.Namespace(seen=set(), again=[])
        try:
            parser.parse_args(after_program(imported, number, words, PROGRAM), options)
        except BadImport as error:
            raise BadImport(error.message, error.hint, number) from None
        _take(imported, number, options)
    if not count:
        raise BadImport("there is no command line", "write, for example, --interfaces eth0 eth1")
    return imported


def _take(imported: Imported, number: int | None, options: argparse.Namespace) -> None:
    if not 0 <= options.ttl <= TTL_MAX:
        raise BadImport(f"--ttl {str(options.ttl)[:20]} is not possible", f"write 1 to {TTL_MAX}", number)
    for name in options.again:
        imported.remark(number, f"--{name} is there twice, and the last counts", "give it once, with all its values")
    interfaces = _interfaces(imported, number, options)
    for name, remedy in REMEDIES.items():
        if getattr(options, name) not in (None, False, [], "0"):
            imported.remark(number, f"--{name} has no equivalent", remedy)
    if not imported.are_enough(number, interfaces, "--interfaces"):
        return
    for switch, (where, name) in USUAL.items():
        if not getattr(options, switch):
            _relay(imported, number, where, name, interfaces, options)
    for where in imported.once(number, options.relay, "--relay"):
        if RELAY.fullmatch(where):
            _relay(imported, number, where, None, interfaces, options)
        else:
            why = "it has not the form ADDRESS:PORT"
            imported.leave_out(number, f"--relay {shown(where)}", why, f"mend it, or {BY_HAND}")


def _interfaces(imported: Imported, number: int | None, options: argparse.Namespace) -> list[str]:
    """Their names; they may be given by address, which only the host can tell."""
    names = []
    for text in imported.once(number, options.interfaces, "the interface"):
        if _is_address(text):
            why = "an address stands for an interface that only the host knows"
            remedy = "'ip -brief address' shows its name: write that"
            imported.leave_out(number, f"the interface {shown(text)}", why, remedy)
        elif imported.is_interface(number, text, f"the interface {shown(text)}"):
            names.append(text)
    for option in ("noTransmitInterfaces", "masquerade"):
        for text in getattr(options, option):
            if text not in options.interfaces or (option == "masquerade" and text not in names):
                what = f"{shown(text)} of --{option} is none of the interfaces, and is left out"
                imported.remark(number, what, "write names, as behind --interfaces")
    return names


def _is_address(text: str) -> bool:
    try:
        ip_interface(text)
    except ValueError:
        return False
    return True


def _relay(
    imported: Imported,
    number: int | None,
    where: str,
    name: str | None,
    interfaces: Sequence[str],
    options: argparse.Namespace,
) -> None:
    ttl = f"ttl={options.ttl or 'keep'}"
    silent = set(options.noTransmitInterfaces)
    for given, outputs in between(interfaces, where, ""):
        interface = given.rpartition("%")[2]
        texts = []
        for output in outputs:
            out = output.rpartition("%")[2]
            if out not in silent:
                # Masqueraded, it has the relay's own address.
                kept = "sport=keep" if out in options.masquerade else KEPT
                texts.append(f"{output},{kept},{ttl}")
        if texts:
            what = f"the rule from {where} on {shown(interface)}"
            imported.add(number, given, texts, None if name is None else f"{name}-{interface}", what)
    if silent.issuperset(interfaces):
        imported.leave_out(number, f"the relay of {where}", "no interface is left to send by", BY_HAND)

"""Configurations of other relays, translated: the formats that are known, by name.

Each module knows one format and is pure: a text, or the words of a command line, comes in, an Imported (imported.py)
goes out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from mcrelay.importers import mcr, multicast_relay, smcroute, udp_broadcast_relay
from mcrelay.importers.imported import Imported


@dataclass(frozen=True)
class Format:
    read: Callable[[str], Imported]
    what: str
    needs: str  # for a rule to come of it
    read_options: Callable[[Sequence[str]], Imported] | None = None  # the format is a command line's


FORMATS: Final = {
    "mcr": Format(mcr.read, what="mcr's JSON5 file", needs="rules: [...] with input and outputs"),
    "smcroute": Format(smcroute.read, what="smcroute.conf", needs="lines such as 'mroute from eth0 group G to eth1'"),
    "multicast-relay": Format(
        multicast_relay.read,
        read_options=multicast_relay.read_options,
        what="options of multicast-relay.py",
        needs="two interfaces by name and something to relay, such as '--interfaces eth0 eth1 --relay 239.1.1.1:5000'",
    ),
    "udp-broadcast-relay": Format(
        udp_broadcast_relay.read,
        read_options=udp_broadcast_relay.read_options,
        what="options of udp-broadcast-relay or udpbroadcastrelay",
        needs="a port and two devices, such as '--port 1900 --dev eth0 --dev eth1'",
    ),
}

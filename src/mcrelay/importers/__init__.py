"""Configurations of other relays, translated: the formats that are known, by name.

Each module knows one format and is pure: a text comes in, an Imported (imported.py) goes out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from mcrelay.importers import mcr, multicast_relay, smcroute, udp_broadcast_relay
from mcrelay.importers.imported import Imported


@dataclass(frozen=True)
class Format:
    read: Callable[[str], Imported]
    is_options: bool  # a command line; else a file
    what: str
    needs: str  # for a rule to come of it


FORMATS: Final = {
    "mcr": Format(mcr.read, is_options=False, what="mcr's JSON5 file", needs="rules: [...] with input and outputs"),
    "smcroute": Format(
        smcroute.read, is_options=False, what="smcroute.conf", needs="lines such as 'mroute from eth0 group G to eth1'"
    ),
    "multicast-relay": Format(
        multicast_relay.read,
        is_options=True,
        what="options of multicast-relay.py",
        needs="two interfaces by name and something to relay, such as '--interfaces eth0 eth1 --relay 239.1.1.1:5000'",
    ),
    "udp-broadcast-relay": Format(
        udp_broadcast_relay.read,
        is_options=True,
        what="options of udp-broadcast-relay or udpbroadcastrelay",
        needs="a port and two devices, such as '--port 1900 --dev eth0 --dev eth1'",
    ),
}

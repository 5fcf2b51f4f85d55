"""Interfaces: what the kernel says about those of this host, asked over netlink.

Knows nothing of rules. pyroute2 speaks the protocol (rtnetlink(7)).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from pyroute2 import AsyncIPRoute

from mcrelay.errors import RuleError
from mcrelay.limits import MTU_MAX
from mcrelay.steering import NETWORK

AF_INET: Final = 2
IFF_UP: Final = 1
MTU_MIN: Final = 68  # RFC 791
# Length of the link-layer header by type of device (linux/if_arp.h): Ethernet, loopback, none at all.
LINK_HEADERS: Final = {1: 14, 772: 14, 65534: 0}
NAMES_SHOWN: Final = 20  # to somebody who mistyped one


@dataclass(frozen=True, slots=True)
class Interface:
    name: str
    index: int
    mtu: int  # bytes of a packet, as far as an IPv4 packet can be long
    is_up: bool
    has_ipv4: bool
    # Where a packet socket's filter finds the network header: behind the link-layer header, of the lengths known here.
    network: int = NETWORK


async def list_interfaces() -> dict[str, Interface]:
    """All interfaces of this network namespace, by name."""
    async with AsyncIPRoute() as netlink:
        with_ipv4 = {int(message["index"]) async for message in await netlink.addr("dump", family=AF_INET)}
        links = [message async for message in await netlink.link("dump")]
    found = {}
    for link in links:
        name = str(_attribute(link, "IFLA_IFNAME"))
        index = int(link["index"])
        found[name] = Interface(
            name,
            index,
            min(max(int(_attribute(link, "IFLA_MTU")), MTU_MIN), MTU_MAX),
            bool(int(link["flags"]) & IFF_UP),
            index in with_ipv4,
            LINK_HEADERS.get(int(link["ifi_type"]), NETWORK),
        )
    return found


def _attribute(message: Any, name: str) -> Any:
    return message.get_attr(name)


def find(interfaces: dict[str, Interface], name: str, what: str) -> Interface:
    """The interface, or RuleError with those that there are."""
    interface = interfaces.get(name)
    if interface is None:
        names = sorted(interfaces)
        more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
        raise RuleError(
            f"{what}: there is no interface {name!r}", f"this host has {', '.join(names[:NAMES_SHOWN])}{more}"
        )
    return interface


def find_for_output(interfaces: dict[str, Interface], name: str, what: str) -> Interface:
    """As find, and the interface must be able to send IPv4."""
    interface = find(interfaces, name, what)
    if not interface.has_ipv4:
        raise RuleError(
            f"{what}: interface {name!r} has no IPv4 address to send from",
            f"give it one: ip address add ADDRESS/LENGTH dev {name}",
        )
    return interface

"""Interfaces: what the kernel says about those of this host, over netlink.

Knows nothing of rules. pyroute2 speaks the protocol (rtnetlink(7)).
"""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

from pyroute2 import AsyncIPRoute
from pyroute2.netlink.rtnl import RTMGRP_IPV4_IFADDR, RTMGRP_LINK

from mcrelay.errors import SystemRefusal
from mcrelay.limits import MTU_MAX
from mcrelay.steering import NETWORK

log = logging.getLogger(__name__)

AF_INET: Final = 2
IFF_UP: Final = 1
MTU_MIN: Final = 68  # RFC 791
# Length of the link-layer header by type of device (linux/if_arp.h): Ethernet, loopback, none at all.
LINK_HEADERS: Final = {1: 14, 772: 14, 65534: 0}
LOOPBACK: Final = 772
RETRY_S: Final = 0.1
KNOWN_S: Final = 5.0
SWEEP_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Interface:
    name: str
    index: int
    mtu: int  # bytes of a packet, as far as an IPv4 packet can be long
    is_up: bool
    has_ipv4: bool
    # Where a packet socket's filter finds the network header: behind the link-layer header, of the lengths known here.
    network: int = NETWORK
    is_loopback: bool = False
    peer: int = 0  # index of a veth's other end, if that is in this network namespace, too


class Interfaces:
    """The interfaces of this network namespace, as the kernel's notifications keep them up to date.

    To ask for each rule would take milliseconds. What the table says may be some microseconds old; `on_change` is
    called whenever it may have become another."""

    def __init__(self, on_change: Callable[[], None] = lambda: None) -> None:
        self._on_change = on_change
        self._links: dict[int, Interface] = {}  # by index; has_ipv4 is filled in when asked
        self._addresses: dict[int, set[tuple[str, int]]] = {}  # IPv4 and length of the prefix, by index
        self._refreshing = asyncio.Lock()
        self._missed: list[Any] = []  # notifications that came during a refresh
        self._known = asyncio.Event()
        self._swept = time.monotonic()
        self._watching: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Begin to watch; what is there now is known on return. SystemRefusal if the kernel does not tell."""
        self._watching = asyncio.create_task(self._watch())
        try:
            await asyncio.wait_for(self._known.wait(), KNOWN_S)
        except TimeoutError:
            raise SystemRefusal(
                "the kernel does not tell about interfaces (netlink)", "see the messages above"
            ) from None

    async def close(self) -> None:
        if self._watching:
            self._watching.cancel()
            await asyncio.wait([self._watching])

    def present(self) -> dict[str, Interface]:
        """All interfaces, by name."""
        return {
            link.name: replace(link, has_ipv4=True) if self._addresses.get(index) else link
            for index, link in self._links.items()
        }

    def addresses(self) -> set[str]:
        """All IPv4 addresses of this host."""
        return {address for found in self._addresses.values() for address, _length in found}

    async def refresh(self) -> dict[str, Interface]:
        """Ask the kernel for everything anew."""
        async with self._refreshing, AsyncIPRoute() as netlink:
            self._missed = []
            addresses = [message async for message in await netlink.addr("dump", family=AF_INET)]
            links = [message async for message in await netlink.link("dump")]
            self._links.clear()
            self._addresses.clear()
            # What the lists say may be older than a notification that came while they were read.
            for message in [*addresses, *links, *self._missed]:
                self._apply(message)
        self._on_change()
        return self.present()

    async def _watch(self) -> None:
        while True:
            try:
                async with AsyncIPRoute() as netlink:
                    await netlink.bind(groups=RTMGRP_LINK | RTMGRP_IPV4_IFADDR)
                    await self.refresh()  # for what happened before, or was lost
                    self._known.set()
                    while True:
                        async for message in netlink.get():  # ends after each batch
                            self._notified(message)
                        self._sweep()
            except OSError as error:  # ENOBUFS: more came than the socket holds
                log.warning("lost notifications about interfaces (%s): asking anew", error.strerror)
            except Exception:  # of the library, or of what the kernel said: the watch goes on
                log.exception("cannot read a notification about interfaces: asking anew")
            await asyncio.sleep(RETRY_S)

    def _sweep(self) -> None:
        """The library's messages refer to themselves, and grow old before the collector looks at them: let go of them
        now and then, which takes some ten milliseconds."""
        now = time.monotonic()
        if now - self._swept > SWEEP_S:
            self._swept = now
            gc.collect()

    def _notified(self, message: Any) -> None:
        self._apply(message)
        if self._refreshing.locked():
            self._missed.append(message)
        else:
            self._on_change()

    def _apply(self, message: Any) -> None:
        index = int(message["index"])
        match message["event"]:
            # Some are about a part of a link: of a bridge's port (AF_BRIDGE), or of wireless matters.
            case "RTM_NEWLINK" if not message["family"] and _attribute(message, "IFLA_MTU") is not None:
                self._links[index] = _interface(message)
            case "RTM_DELLINK" if not message["family"]:
                self._links.pop(index, None)
                self._addresses.pop(index, None)
            case "RTM_NEWADDR":
                self._addresses.setdefault(index, set()).add(_address(message))
            case "RTM_DELADDR":
                self._addresses.get(index, set()).discard(_address(message))


def _address(message: Any) -> tuple[str, int]:
    return str(_attribute(message, "IFA_LOCAL")), int(message["prefixlen"])


def _interface(message: Any) -> Interface:
    return Interface(
        name=str(_attribute(message, "IFLA_IFNAME")),
        index=int(message["index"]),
        mtu=min(max(int(_attribute(message, "IFLA_MTU")), MTU_MIN), MTU_MAX),
        is_up=bool(int(message["flags"]) & IFF_UP),
        has_ipv4=False,
        network=LINK_HEADERS.get(int(message["ifi_type"]), NETWORK),
        is_loopback=int(message["ifi_type"]) == LOOPBACK,
        peer=_peer(message),
    )


def _peer(message: Any) -> int:
    information = _attribute(message, "IFLA_LINKINFO")
    is_veth = information is not None and information.get_attr("IFLA_INFO_KIND") == "veth"
    elsewhere = _attribute(message, "IFLA_LINK_NETNSID") is not None
    return int(_attribute(message, "IFLA_LINK") or 0) if is_veth and not elsewhere else 0


def _attribute(message: Any, name: str) -> Any:
    return message.get_attr(name)

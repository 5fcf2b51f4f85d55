"""Interfaces: what the kernel says about those of this host, over netlink.

Knows nothing of rules. pyroute2 speaks the protocol (rtnetlink(7)).

Kernel facts: an IPv6 address is tentative until nobody has answered to it (RFC 4862), and the kernel sends from it only
then; each change of such a state is told like a new address. The kernel lists IPv6 addresses newest first and tells of
them as they come, so which of several is the first is decided here. An interface with an MTU below 1280 has no IPv6.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from ipaddress import ip_address
from typing import Any, Final, Literal

from pyroute2 import AsyncIPRoute
from pyroute2.netlink.rtnl import RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR, RTMGRP_LINK

from mcrelay.entries import mapped
from mcrelay.errors import SystemRefusal
from mcrelay.limits import MTU_MAX
from mcrelay.rules import Address
from mcrelay.steering import NETWORK
from mcrelay.ways import ANY, Link

log = logging.getLogger(__name__)

AF_INET: Final = 2
AF_INET6: Final = 10
IFF_UP: Final = 1
MTU_MIN: Final = 68  # RFC 791
MTU_MIN_IPV6: Final = 1280  # RFC 8200
# Length of the link-layer header by type of device (linux/if_arp.h): Ethernet, loopback, none at all.
LINK_HEADERS: Final = {1: 14, 772: 14, 65534: 0}
ETHERNET: Final = 1
LOOPBACK: Final = 772
# Devices that send as they are by another one.
STACKED: Final = ("vlan", "macvlan", "macvtap", "ipvlan", "ipvtap")
# Of addresses (linux/if_addr.h). A secondary one of IPv6 is a temporary one.
IFA_F_SECONDARY: Final = 0x01
IFA_F_OPTIMISTIC: Final = 0x04
IFA_F_DADFAILED: Final = 0x08
IFA_F_DEPRECATED: Final = 0x20
IFA_F_TENTATIVE: Final = 0x40
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
    # How it is connected within this network namespace: kind of device, and indices of others, 0 for none.
    kind: str = ""  # as ip(8) names it: bridge, vlan ...
    peer: int = 0  # a veth's other end
    lower: int = 0  # what a VLAN device or the like sends by
    master: int = 0  # the bridge or the like that it is a port of
    vlan: int = 0  # a VLAN device's id
    has_ipv6: bool = False
    # Addresses to send from, as ways.Link has them.
    source4: bytes = ANY
    source6_link: bytes = ANY
    source6: bytes = ANY
    mac: bytes = bytes(6)
    header: int = 14  # bytes of the link-layer header: Ethernet's, or 0 where there is none

    @property
    def versions(self) -> tuple[Literal[4, 6], ...]:
        """Of IP, of which it has an address."""
        if self.has_ipv4:
            return (4, 6) if self.has_ipv6 else (4,)
        return (6,) if self.has_ipv6 else ()

    def link(self) -> Link:
        """What an engine has to know to write headers."""
        return Link(self.source4, self.source6_link, self.source6, self.mac, self.header)


@dataclass(frozen=True, slots=True)
class HostAddress:
    """An address of this host, as the kernel describes it."""

    address: Address
    flags: int

    @property
    def is_usable(self) -> bool:
        """The kernel sends from it."""
        if self.flags & IFA_F_DADFAILED:
            return False
        return not self.flags & IFA_F_TENTATIVE or bool(self.flags & IFA_F_OPTIMISTIC)

    @property
    def rank(self) -> tuple[bool, bool, int]:
        """Which one comes first: for IPv4 the first that was added."""
        order = int(self.address) if self.address.version == 6 else 0
        return bool(self.flags & IFA_F_DEPRECATED), bool(self.flags & IFA_F_SECONDARY), order


class Interfaces:
    """The interfaces of this network namespace, as the kernel's notifications keep them up to date.

    To ask for each rule would take milliseconds. What the table says may be some microseconds old; `on_change` is
    called whenever it may have become another."""

    def __init__(self, on_change: Callable[[], None] = lambda: None) -> None:
        self._on_change = on_change
        self._links: dict[int, Interface] = {}  # by index; what addresses say is filled in when asked
        self._addresses: dict[int, dict[tuple[str, int], HostAddress]] = {}  # by index; address and length of prefix
        self._present: dict[str, Interface] | None = None  # what that amounts to, if nothing has changed since
        self._refreshing = asyncio.Lock()
        self._missed: list[Any] = []  # notifications that came during a refresh
        self._known = asyncio.Event()
        self._swept = time.monotonic()
        self._watching: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Begin to watch; what is there now is known on return. SystemRefusal if the kernel does not tell."""
        self._watching = asyncio.create_task(self._watch())
        try:
            async with asyncio.timeout(KNOWN_S):
                await self._known.wait()
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
        if self._present is None:
            self._present = {
                link.name: _with_addresses(link, self._addresses[index].values())
                if self._addresses.get(index)
                else link
                for index, link in self._links.items()
            }
        return dict(self._present)

    def addresses(self) -> dict[int, set[str]]:
        """All addresses of this host, by the index of the interface that has them."""
        return {index: {address for address, _length in found} for index, found in self._addresses.items()}

    async def refresh(self) -> dict[str, Interface]:
        """Ask the kernel for everything anew."""
        async with self._refreshing, AsyncIPRoute() as netlink:
            self._missed = []
            addresses = [message async for message in await netlink.addr("dump")]
            links = [message async for message in await netlink.link("dump")]
            self._links.clear()
            self._addresses.clear()
            self._present = None
            # What the lists say may be older than a notification that came while they were read.
            for message in [*addresses, *links, *self._missed]:
                self._apply(message)
        self._on_change()
        return self.present()

    async def _watch(self) -> None:
        while True:
            try:
                async with AsyncIPRoute() as netlink:
                    await netlink.bind(groups=RTMGRP_LINK | RTMGRP_IPV4_IFADDR | RTMGRP_IPV6_IFADDR)
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
        self._present = None
        index = int(message["index"])
        match message["event"]:
            # Some are about a part of a link: of a bridge's port (AF_BRIDGE), or of wireless matters.
            case "RTM_NEWLINK" if not message["family"] and _attribute(message, "IFLA_MTU") is not None:
                self._links[index] = _interface(message)
            case "RTM_DELLINK" if not message["family"]:
                self._links.pop(index, None)
                self._addresses.pop(index, None)
            case "RTM_NEWADDR" if message["family"] in (AF_INET, AF_INET6):
                self._addresses.setdefault(index, {})[_address(message)] = _host_address(message)
            case "RTM_DELADDR" if message["family"] in (AF_INET, AF_INET6):
                self._addresses.get(index, {}).pop(_address(message), None)


def _address(message: Any) -> tuple[str, int]:
    # IPv6 has the local one only beside a peer's.
    return str(_attribute(message, "IFA_LOCAL") or _attribute(message, "IFA_ADDRESS")), int(message["prefixlen"])


def _host_address(message: Any) -> HostAddress:
    flags = _attribute(message, "IFA_FLAGS")
    return HostAddress(ip_address(_address(message)[0]), int(message["flags"] if flags is None else flags))


def _with_addresses(link: Interface, found: Iterable[HostAddress]) -> Interface:
    usable = [one.address for one in sorted(found, key=lambda one: one.rank) if one.is_usable]
    ipv4 = [address for address in usable if address.version == 4]
    ipv6 = [address for address in usable if address.version == 6] if link.mtu >= MTU_MIN_IPV6 else []
    return replace(
        link,
        has_ipv4=bool(ipv4),
        has_ipv6=bool(ipv6),
        source4=_first(ipv4),
        source6_link=_first(address for address in ipv6 if address.is_link_local),
        source6=_first(address for address in ipv6 if not address.is_link_local),
    )


def _first(addresses: Iterable[Address]) -> bytes:
    return next(map(mapped, addresses), ANY)


def _interface(message: Any) -> Interface:
    kind = int(message["ifi_type"])
    device = _attribute(message, "IFLA_LINKINFO")
    device_kind = str(device.get_attr("IFLA_INFO_KIND") or "") if device is not None else ""
    other = _other(message)
    return Interface(
        name=str(_attribute(message, "IFLA_IFNAME")),
        index=int(message["index"]),
        mtu=min(max(int(_attribute(message, "IFLA_MTU")), MTU_MIN), MTU_MAX),
        is_up=bool(int(message["flags"]) & IFF_UP),
        has_ipv4=False,
        network=LINK_HEADERS.get(kind, NETWORK),
        is_loopback=kind == LOOPBACK,
        kind=device_kind,
        peer=other if device_kind == "veth" else 0,
        lower=other if device_kind in STACKED else 0,
        master=int(_attribute(message, "IFLA_MASTER") or 0),
        vlan=_vlan(device) if device_kind == "vlan" else 0,
        mac=bytes.fromhex(str(_attribute(message, "IFLA_ADDRESS")).replace(":", "")) if kind == ETHERNET else bytes(6),
        header=LINK_HEADERS.get(kind, 0),
    )


def _other(message: Any) -> int:
    """Index of the device that it is connected to or stacked on, if that is in this network namespace, too."""
    elsewhere = _attribute(message, "IFLA_LINK_NETNSID") is not None
    return 0 if elsewhere else int(_attribute(message, "IFLA_LINK") or 0)


def _vlan(device: Any) -> int:
    data = device.get_attr("IFLA_INFO_DATA")
    return int(data.get_attr("IFLA_VLAN_ID") or 0) if data is not None else 0


def _attribute(message: Any, name: str) -> Any:
    return message.get_attr(name)

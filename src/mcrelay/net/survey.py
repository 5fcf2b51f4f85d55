"""The survey: what the kernel says of this host, for a diagnosis.

Asks netlink and reads /proc, which takes no privilege and changes nothing. Everything is of the network namespace that
the command runs in. What cannot be read is left out: judging knows the difference.

Kernel facts:
- /proc/net/igmp has groups as 32-bit words of the machine in hexadecimal, in network order; and of each interface the
  IGMP version in use, which is that of an older querier for some minutes after its last question.
- A route that is looked up for an output interface always exists in IPv4: without one, the kernel takes the destination
  for a neighbour. RTM_F_FIB_MATCH asks for the route alone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_interface
from pathlib import Path
from typing import Any, Final

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from mcrelay.facts import Bridge, Host, Joined, Link, NeighbourState, Route, cores
from mcrelay.rules import Address

IFF_UP: Final = 1
LOOPBACK: Final = 772  # ARPHRD_LOOPBACK
IFA_F_DADFAILED: Final = 0x08
IFA_F_TENTATIVE: Final = 0x40
RTM_F_FIB_MATCH: Final = 0x2000
UNICAST_ROUTES: Final = (1, 2, 3, 5)  # RTN_UNICAST, LOCAL, BROADCAST, MULTICAST: those that lead somewhere
NEIGHBOUR_STATES: Final[dict[int, NeighbourState]] = {
    0x00: "none",
    0x01: "incomplete",
    0x02: "reachable",
    0x04: "stale",
    0x08: "delay",
    0x10: "probe",
    0x20: "failed",
    0x40: "noarp",
    0x80: "permanent",
}

PROC: Final = Path("/proc")
SYSCTLS: Final = (
    "kernel.io_uring_disabled",
    "kernel.unprivileged_bpf_disabled",
    "net.core.netdev_max_backlog",
    "net.core.optmem_max",
    "net.core.rmem_max",
    "net.ipv4.conf.all.rp_filter",
    "net.ipv4.conf.all.force_igmp_version",
    "net.ipv4.igmp_max_memberships",
    "net.ipv4.igmp_max_msf",
    "net.ipv6.conf.all.disable_ipv6",
    "net.ipv6.mld_max_msf",
)
INTERFACE_SYSCTLS: Final = (
    "net.ipv4.conf.{}.rp_filter",
    "net.ipv4.conf.{}.mc_forwarding",
    "net.ipv4.conf.{}.force_igmp_version",
    "net.ipv6.conf.{}.disable_ipv6",
)


def survey(interfaces: Iterable[str] = ()) -> Host:
    """What there is; of the named interfaces, their settings, too."""
    try:
        with IPRoute() as netlink:
            links, problem = _links(netlink), None
    except (OSError, NetlinkError) as error:
        links, problem = {}, f"the kernel does not tell about interfaces (netlink): {error}"
    joined, versions = _joined_4()
    return Host(
        release=os.uname().release,
        links={name: replace(link, interrupts=interrupts(name)) for name, link in links.items()},
        joined=_with_sources((*joined, *_joined_6()), {link.index: name for name, link in links.items()}),
        igmp_versions=versions,
        sysctls=_sysctls(interfaces),
        backlog_dropped=_backlog_dropped(),
        reassembly_failures=_reassembly_failures(),
        problem=problem,
    )


def with_routes(host: Host, wanted: Iterable[tuple[Address, str]]) -> Host:
    """The host, and how its kernel would send to these destinations by way of these interfaces."""
    found: dict[tuple[Address, str], Route] = {}
    with suppress(OSError), IPRoute() as netlink:
        neighbours = _neighbours(netlink)
        for destination, interface in wanted:
            link = host.links.get(interface)
            if link is not None:
                found[destination, interface] = _route(netlink, destination, link, neighbours)
    return replace(host, routes=found)


# --- netlink ----------------------------------------------------------------------------------------------------------


def _links(netlink: Any) -> dict[str, Link]:
    messages = list(netlink.get_links())
    names = {int(message["index"]): str(message.get_attr("IFLA_IFNAME")) for message in messages}
    links = {names[int(message["index"])]: _link(message, names) for message in messages}
    for message in netlink.get_addr():
        name = names.get(int(message["index"]))
        text = message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS")
        if name is None or text is None:
            continue
        address = ip_interface(f"{text}/{message['prefixlen']}")
        flags = int(message.get_attr("IFA_FLAGS") or message["flags"])
        link = links[name]
        links[name] = replace(link, addresses=(*link.addresses, address))
        if flags & (IFA_F_TENTATIVE | IFA_F_DADFAILED):
            links[name] = replace(links[name], tentative=(*link.tentative, address.ip))
    return links


def _link(message: Any, names: Mapping[int, str]) -> Link:
    information = message.get_attr("IFLA_LINKINFO")
    kind = (information.get_attr("IFLA_INFO_KIND") if information else None) or ""
    data = information.get_attr("IFLA_INFO_DATA") if information else None
    statistics = message.get_attr("IFLA_STATS64") or message.get_attr("IFLA_STATS") or {}
    elsewhere = message.get_attr("IFLA_LINK_NETNSID") is not None
    bridge = vlan = None
    if kind == "bridge" and data is not None:
        bridge = Bridge(bool(data.get_attr("IFLA_BR_MCAST_SNOOPING")), bool(data.get_attr("IFLA_BR_MCAST_QUERIER")))
    if kind == "vlan" and data is not None:
        vlan = data.get_attr("IFLA_VLAN_ID")
    return Link(
        name=str(message.get_attr("IFLA_IFNAME")),
        index=int(message["index"]),
        mtu=int(message.get_attr("IFLA_MTU") or 0),
        is_up=bool(int(message["flags"]) & IFF_UP),
        has_carrier=bool(message.get_attr("IFLA_CARRIER")),
        is_loopback=int(message["ifi_type"]) == LOOPBACK,
        kind=kind,
        parent=None if elsewhere else names.get(int(message.get_attr("IFLA_LINK") or 0)),
        vlan=vlan,
        bridge=bridge,
        master=names.get(int(message.get_attr("IFLA_MASTER") or 0)),
        received=int(statistics.get("rx_packets", 0)),
        received_multicast=int(statistics.get("multicast", 0)),
        received_dropped=int(statistics.get("rx_dropped", 0)) + int(statistics.get("rx_missed_errors", 0)),
        sent_dropped=int(statistics.get("tx_dropped", 0)),
    )


Neighbours = dict[tuple[int, str], tuple[NeighbourState | None, str | None]]  # by index and address


def _neighbours(netlink: Any) -> Neighbours:
    return {
        (int(message["ifindex"]), str(message.get_attr("NDA_DST"))): (
            NEIGHBOUR_STATES.get(int(message["state"])),
            message.get_attr("NDA_LLADDR"),
        )
        for version in (2, 10)  # AF_INET, AF_INET6
        for message in netlink.get_neighbours(family=version)
    }


def _route(netlink: Any, destination: Address, link: Link, neighbours: Neighbours) -> Route:
    question: dict[str, Any] = {"dst": str(destination), "oif": link.index}
    try:
        message = next(iter(netlink.route("get", **question)))
    except NetlinkError as error:
        return Route(error=os.strerror(error.code))
    if int(message["type"]) not in UNICAST_ROUTES:
        return Route(error="the route to it forbids it")
    matched = True
    if destination.version == 4 and not destination.is_multicast:
        try:
            next(iter(netlink.route("get", **question, flags=RTM_F_FIB_MATCH)))
        except NetlinkError:
            matched = False
    gateway = message.get_attr("RTA_GATEWAY")
    via = message.get_attr("RTA_VIA")  # a gateway of the other version
    if gateway is None and via is not None:
        gateway = via.get("addr") if isinstance(via, Mapping) else None
    source = message.get_attr("RTA_PREFSRC")
    state, mac = neighbours.get((link.index, str(gateway or destination)), (None, None))
    return Route(
        matched=matched,
        gateway=ip_address(gateway) if gateway else None,
        source=ip_address(source) if source else None,
        neighbour=state,
        mac=mac,
    )


# --- /proc ------------------------------------------------------------------------------------------------------------


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _word_4(text: str) -> IPv4Address:
    return IPv4Address(int(text, 16).to_bytes(4, sys.byteorder))


def _joined_4() -> tuple[list[Joined], dict[str, str]]:
    joined: list[Joined] = []
    versions: dict[str, str] = {}
    interface = ""
    for line in _lines(PROC / "net/igmp")[1:]:
        words = line.replace(":", " ").split()
        if not line.startswith("\t"):
            interface = words[1]
            versions[interface] = words[-1]
        else:
            joined.append(Joined(interface, _word_4(words[0])))
    return joined, versions


def _joined_6() -> Iterator[Joined]:
    for line in _lines(PROC / "net/igmp6"):
        _index, interface, group, *_others = line.split()
        yield Joined(interface, IPv6Address(bytes.fromhex(group)))


def _with_sources(joined: Iterable[Joined], names: Mapping[int, str]) -> tuple[Joined, ...]:
    """Groups, and the sources that members of them ask for by name. The files cut names of interfaces short."""
    sources: dict[tuple[str | None, Address], list[Address]] = {}
    for line in _lines(PROC / "net/mcfilter")[1:]:
        index, _interface, group, source, included, _excluded = line.split()
        if int(included):
            key = names.get(int(index)), IPv4Address(int(group, 16))
            sources.setdefault(key, []).append(IPv4Address(int(source, 16)))
    for line in _lines(PROC / "net/mcfilter6")[1:]:
        index, _interface, group, source, included, _excluded = line.split()
        if int(included):
            key6 = names.get(int(index)), IPv6Address(bytes.fromhex(group))
            sources.setdefault(key6, []).append(IPv6Address(bytes.fromhex(source)))
    return tuple(replace(one, sources=tuple(sources.get((one.interface, one.group), ()))) for one in joined)


def _sysctls(interfaces: Iterable[str]) -> dict[str, str]:
    keys = [*SYSCTLS, *(key.format(name) for name in interfaces for key in INTERFACE_SYSCTLS)]
    found = {}
    for key in keys:
        with suppress(OSError):
            found[key] = _sysctl_path(key).read_text().strip()
    return found


def _sysctl_path(key: str) -> Path:
    """Interfaces of VLANs have dots in their names."""
    parts = key.split(".")
    if parts[:1] == ["net"] and parts[2] == "conf":
        parts = [*parts[:3], ".".join(parts[3:-1]), parts[-1]]
    return PROC.joinpath("sys", *parts)


def _backlog_dropped() -> int:
    """Second column of each core's line."""
    return sum(int(line.split()[1], 16) for line in _lines(PROC / "net/softnet_stat"))


def _reassembly_failures() -> int:
    header, *values = [line.split() for line in _lines(PROC / "net/snmp") if line.startswith("Ip:")] or [[]]
    failures = int(values[0][header.index("ReasmFails")]) if values and "ReasmFails" in header else 0
    for line in _lines(PROC / "net/snmp6"):
        name, value = line.split()
        if name == "Ip6ReasmFails":
            failures += int(value)
    return failures


def interrupts(interface: str) -> dict[int, tuple[int, ...]]:
    """The interrupts of a network card, and the cores that they go to."""
    found = {}
    with suppress(OSError, ValueError):
        for entry in Path(f"/sys/class/net/{interface}/device/msi_irqs").iterdir():
            number = int(entry.name)
            with suppress(OSError):
                found[number] = cores((PROC / f"irq/{number}/effective_affinity_list").read_text())
    return found


# --- processes --------------------------------------------------------------------------------------------------------


def in_our_network(pid: int) -> bool | None:
    """Whether a process is in our network namespace; None if the kernel does not tell us."""
    try:
        return os.stat(f"/proc/{pid}/ns/net").st_ino == os.stat("/proc/self/ns/net").st_ino
    except OSError:
        return None


def relays() -> Iterator[tuple[int, int]]:
    """Supervisors in our network namespace, each with its pid in its own: workers have other names, and commands other
    arguments. What any process may have made of these is bytes."""
    for path in PROC.glob("[0-9]*"):
        try:
            arguments = (path / "cmdline").read_bytes().split(b"\0")
            is_one = (path / "comm").read_bytes() == b"mcrelay\n" and b"run" in arguments
        except OSError:
            continue  # it went
        if is_one and in_our_network(int(path.name)):
            inner = [line.split()[-1] for line in _lines(path / "status") if line.startswith("NSpid:")]
            yield int(path.name), int(inner[0] if inner else path.name)


def lockable_memory(pid: int) -> int | None:
    """Bytes of memory that a process may lock; None if that is not known, or without a limit."""
    for line in _lines(PROC / f"{pid}/limits"):
        if line.startswith("Max locked memory"):
            soft = line.split()[3]
            return int(soft) if soft.isdigit() else None
    return None

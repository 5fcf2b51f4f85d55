"""Facts: what a diagnosis was told of the host, the daemon and the traffic, and what it finds.

Owns the types that are between those who look (net/survey.py, net/watch.py, client.py) and those who judge (explain.py,
doctor.py): so that the judging can be tested with facts that are written down. What could not be looked at is None, or
says why. Pure.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from ipaddress import IPv4Interface, IPv6Interface
from typing import Literal, NotRequired, TypedDict

from mcrelay.api import RuleFacts, Rules, RuleStats, Stats
from mcrelay.messages import ProcessFacts
from mcrelay.nearness import Candidate, Choice
from mcrelay.rules import GROUPS_JOINED_MAX, Address, Input, Output, bits, masked

Verdict = Literal["ok", "bad", "unknown", "note"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. `bad` keeps traffic from flowing, or loses some of it; `note` may matter to
    somebody; `unknown` could not be told. `remedy` is a line for a shell."""

    step: str
    verdict: Verdict
    fact: str
    remedy: str | None = None


class Diagnosis(TypedDict):
    """The document of `mcrelay explain`, and without an input of `mcrelay doctor`."""

    input: NotRequired[str]
    seconds: float  # how long was looked at counters and traffic
    holds: bool  # nothing is bad
    findings: list[Finding]


# --- the host ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Bridge:
    """A bridge's own part in who gets a group."""

    snooping: bool
    querier: bool  # it asks for members itself


@dataclass(frozen=True, slots=True)
class Link:
    name: str
    index: int
    mtu: int
    is_up: bool
    has_carrier: bool
    is_loopback: bool = False
    kind: str = ""  # veth, bridge, vlan and so on; none of real hardware
    parent: str | None = None  # what a VLAN lies on, or a veth's other end, if that is in this namespace
    vlan: int | None = None
    bridge: Bridge | None = None
    master: str | None = None  # the bridge, bond or such that it is a port of
    addresses: tuple[IPv4Interface | IPv6Interface, ...] = ()
    tentative: tuple[Address, ...] = ()  # of these, not to be used yet, or found to be somebody else's
    received: int = 0  # frames
    received_multicast: int = 0
    received_dropped: int = 0
    sent_dropped: int = 0
    interrupts: Mapping[int, tuple[int, ...]] = field(default_factory=dict)  # of hardware: number -> cores


@dataclass(frozen=True, slots=True)
class Joined:
    """A group that somebody on this host is a member of. `sources` are those that members ask for by name; whether any
    member wants all of them, too, the kernel does not say where there are some."""

    interface: str
    group: Address
    sources: tuple[Address, ...] = ()


NeighbourState = Literal["none", "incomplete", "reachable", "stale", "delay", "probe", "failed", "noarp", "permanent"]


@dataclass(frozen=True, slots=True)
class Route:
    """What the kernel says of a destination by way of one interface."""

    error: str | None = None  # why nothing can be sent there
    matched: bool = True  # by a route; if not, the kernel takes whoever it is for a neighbour of that link
    gateway: Address | None = None
    source: Address | None = None
    neighbour: NeighbourState | None = None  # of the gateway or the destination; None: not known (yet)
    mac: str | None = None


@dataclass(frozen=True)
class Host:
    release: str  # of the kernel
    links: Mapping[str, Link]
    joined: tuple[Joined, ...] = ()
    igmp_versions: Mapping[str, str] = field(default_factory=dict)  # by interface: V3, or the older one of a querier
    sysctls: Mapping[str, str] = field(default_factory=dict)  # those that could be read
    routes: Mapping[tuple[Address, str], Route] = field(default_factory=dict)  # by destination and interface
    backlog_dropped: int = 0  # frames that came faster than the kernel took them up, over all cores
    reassembly_failures: int = 0
    # Processes of daemons like ours in this network, as far as we may know, each with its pid in its own namespace.
    relays: Mapping[int, int] = field(default_factory=dict)
    problem: str | None = None  # why links are not known

    @property
    def kernel(self) -> tuple[int, int]:
        numbers = self.release.replace("-", ".").split(".")
        return int(numbers[0]), int(numbers[1])

    def sysctl(self, key: str) -> int | None:
        try:
            return int(self.sysctls[key])
        except (KeyError, ValueError):
            return None

    def link_with(self, address: Address) -> Link | None:
        return next((link for link in self.links.values() if address in [own.ip for own in link.addresses]), None)


# --- the daemon -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Daemon:
    """What it says of itself. Without one, or where we may not ask, `problem` and `remedy` say so."""

    path: str
    version: str = ""
    problem: str | None = None
    remedy: str | None = None
    is_at_fault: bool = True  # with a problem: there is none, or it does not answer; not that we may not ask
    listing: Rules | None = None
    earlier: Rules | None = None
    processes: tuple[ProcessFacts, ...] = ()
    before: Stats | None = None
    after: Stats | None = None
    seconds: float = 0.0  # between the two
    elsewhere: str | None = None  # the command that asks in its network namespace, if that is not ours
    locked_memory: int | None = None  # bytes that a data plane may lock

    @property
    def rules(self) -> tuple[RuleFacts, ...]:
        return self.listing.rules if self.listing else ()

    def rule_growth(self, rule_id: str) -> tuple[RuleStats, RuleStats] | None:
        """A rule's counters, before and after; None if it was not there all the time."""
        before, after = self._counted_before.get(rule_id), self._counted_after.get(rule_id)
        return (before, after) if before is not None and after is not None else None

    @cached_property
    def _counted_before(self) -> dict[str, RuleStats]:
        return {rule.id: rule for rule in self.before.rules} if self.before else {}

    @cached_property
    def _counted_after(self) -> dict[str, RuleStats]:
        return {rule.id: rule for rule in self.after.rules} if self.after else {}

    def drops_growth(self) -> dict[str, int]:
        """Packets dropped meanwhile by all workers, by reason."""
        grown: dict[str, int] = {}
        if self.before is None or self.after is None:
            return grown
        before = {worker.index: worker for worker in self.before.workers}
        for worker in self.after.workers:
            if worker.index in before:
                for reason, packets in grew(before[worker.index].dropped, worker.dropped).items():
                    grown[reason] = grown.get(reason, 0) + packets
        return grown

    @property
    def workers(self) -> tuple[ProcessFacts, ...]:
        return tuple(process for process in self.processes if process.role == "data")

    @property
    def capabilities(self) -> int | None:
        for process in self.processes:
            if process.role == "supervisor" and process.capabilities is not None:
                return int(process.capabilities, 16)
        return None

    @property
    def is_rootless(self) -> bool:
        """Packets come in by ordinary sockets: without any privilege a daemon has no others, and keeps none."""
        return self.capabilities == 0


def grew(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, int]:
    """By how much, those that did."""
    return {name: n - before.get(name, 0) for name, n in after.items() if n > before.get(name, 0)}


# --- traffic ----------------------------------------------------------------------------------------------------------

Arrival = Literal["host", "broadcast", "multicast", "other host"]  # whom the frame was for, as the kernel saw it


@dataclass(frozen=True, slots=True)
class FlowKey:
    interface: str
    vlan: int | None
    source: Address
    destination: Address
    protocol: Literal["udp", "esp"]
    port: int | None  # None: of ESP, and of fragments but the first


@dataclass(slots=True)
class Flow:
    """What was seen of packets that have all of this in common."""

    packets: int = 0
    ttl_min: int = 255
    ttl_max: int = 0
    length_max: int = 0  # of the IP packet, or of each fragment
    fragmented_max: int = 0  # behind the IP header of the longest datagram that came in fragments, as far as seen
    fragments: int = 0
    bad_checksums: int = 0  # of those that could be checked
    checked: int = 0
    arrivals: set[Arrival] = field(default_factory=set)
    wrong_macs: set[str] = field(default_factory=set)  # destinations that are not the group's


@dataclass(frozen=True, slots=True)
class Querier:
    interface: str
    address: Address
    protocol: str  # IGMPv1, IGMPv2, IGMPv3, MLDv1, MLDv2


@dataclass
class Sightings:
    """What came in while we looked. `problem` says why we could not."""

    seconds: float
    flows: dict[FlowKey, Flow] = field(default_factory=dict)
    queriers: set[Querier] = field(default_factory=set)
    looked_at: int = 0
    missed: int = 0  # frames that came faster than we looked
    joined: tuple[str, ...] = ()  # interfaces on which we had to join the group ourselves for that time
    problem: str | None = None
    remedy: str | None = None


# --- a case -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Everything that is known about one input. `host` and `earlier` are from after and before the time that was looked
    for traffic."""

    given: Input  # with the source that was asked about
    choice: Choice
    host: Host
    earlier: Host
    daemon: Daemon
    seen: Sightings

    @property
    def text(self) -> str:
        """The input, quoted for a shell where that is needed."""
        return shlex.quote(str(self.given))

    def ingress(self) -> list[str]:
        """The interfaces that the input is about, of those that are there."""
        return sorted(name for name in self.host.links if self.given.is_on(name))

    def wanted(self) -> dict[FlowKey, Flow]:
        """What was seen of the packets that were asked about."""
        return {key: flow for key, flow in self.seen.flows.items() if is_wanted(self.given, key)}


def is_wanted(given: Input, key: FlowKey) -> bool:
    return is_sent_to(given, key) and given.is_on(key.interface) and given.vlan == key.vlan and _is_from(given, key)


def is_sent_to(given: Input, key: FlowKey) -> bool:
    """Whether destination, protocol and port are those of the input. Fragments have no port."""
    return (
        is_at(given, key.destination)
        and key.protocol == given.protocol
        and (given.port is None or key.port is None or key.port == given.port)
    )


def is_at(given: Input, destination: Address) -> bool:
    if destination.version != given.address.version:
        return False
    prefix = bits(given.address) if given.prefix is None else given.prefix
    return masked(destination, prefix) == masked(given.address, prefix)


def _is_from(given: Input, key: FlowKey) -> bool:
    return given.source is None or given.source == key.source


def is_too_wide(given: Input) -> bool:
    """Whether it is for a prefix of more groups than are joined."""
    return (
        given.prefix is not None
        and given.address.is_multicast
        and 1 << bits(given.address) - given.prefix > GROUPS_JOINED_MAX
    )


def command(*words: object) -> str:
    """As a person types it; zsh takes a word that begins with '=' for a program."""
    return " ".join(f"'{text}'" if text.startswith("=") else shlex.quote(text) for text in map(str, words))


def anew(candidate: Candidate, outputs: Iterable[Output]) -> str:
    """The commands that give a rule other outputs."""
    name = ("--name", candidate.rule.name) if candidate.rule.name else ()
    removed = command("mcrelay", "remove", candidate.rule.label)
    return f"{removed} && {command('mcrelay', 'add', candidate.rule.input, *outputs, *name)}"


def cores(text: str) -> tuple[int, ...]:
    """0,2-3 -> 0, 2, 3"""
    numbers: list[int] = []
    for part in text.strip().split(","):
        first, _dash, last = part.partition("-")
        if first.isdigit():
            numbers += range(int(first), int(last or first) + 1)
    return tuple(numbers)

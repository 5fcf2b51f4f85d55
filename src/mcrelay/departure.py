"""Departure: what a diagnosis finds between the daemon and the next hop, for each output of the rule that takes it.

Interface, address, route, neighbour, MTU, TTL, and whether the output's counters move. Pure: judges facts, and asks
nobody.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from mcrelay.arrival import HEADERS, usable
from mcrelay.facts import Case, Finding, Link, anew, command, grew
from mcrelay.nearness import Candidate
from mcrelay.reasons import REASONS, remedy
from mcrelay.rules import BROADCAST, Address, Output, bits
from mcrelay.ways import Way

LINK_SCOPE: Final = 2
TTL_SUGGESTED: Final = 8
JUMBO: Final = 9216  # bytes: no network card has a larger MTU


@dataclass(frozen=True)
class _Leg:
    """One output, with what its findings have in common."""

    case: Case
    candidate: Candidate
    number: int  # from 1
    output: Output

    @property
    def prefix(self) -> str:
        return f"output {self.number} "

    @property
    def destination(self) -> Address:
        return self.candidate.rule.address_of(self.output)

    def anew(self, **changes: object) -> str:
        """The commands that change this output."""
        outputs = list(self.candidate.rule.outputs)
        outputs[self.number - 1] = replace(self.output, **changes)  # type: ignore[arg-type] # fields of an Output
        return anew(self.candidate, outputs)


def wanted_routes(candidate: Candidate) -> list[tuple[Address, str]]:
    """What has to be known of the kernel's routes."""
    rule = candidate.rule
    return [(rule.address_of(output), output.interface) for output in rule.outputs]


def outputs(case: Case, candidate: Candidate) -> Iterator[Finding]:
    for number, output in enumerate(candidate.rule.outputs, 1):
        leg = _Leg(case, candidate, number, output)
        yield from _output(leg)


def _output(leg: _Leg) -> Iterator[Finding]:
    output, host = leg.output, leg.case.host
    if output.paused:
        yield Finding(f"{leg.prefix}state", "note", f"{output} is paused: it sends nothing", leg.anew(paused=False))
        return
    yield Finding(f"{leg.prefix}state", "ok", str(output))
    if host.problem:
        yield Finding(f"{leg.prefix}interface", "unknown", host.problem)
    elif (link := host.links.get(output.interface)) is None:
        fact = f"there is no interface {output.interface!r}; this host has {', '.join(sorted(host.links)[:8])}"
        yield Finding(f"{leg.prefix}interface", "bad", fact, "ip -brief link")
    else:
        ready = list(usable(leg.prefix, link, host.links.get(link.parent or "")))
        yield from ready
        if all(finding.verdict == "ok" for finding in ready):
            yield from _address(leg, link)
            yield from _next_hop(leg, link)
            yield from _mtu(leg, link)
            yield from _ttl(leg)
    yield from _counters(leg)


def _address(leg: _Leg, link: Link) -> Iterator[Finding]:
    """What it is sent from."""
    step = f"{leg.prefix}address"
    version = leg.destination.version
    source = leg.output.source
    own = [address.ip for address in link.addresses if address.version == version]
    if source == "keep":
        fact = "copies keep the address of whoever sent them: receivers with rp_filter, and switches and clouds that "
        yield Finding(step, "ok", f"{fact}check sources, may drop them")
    elif isinstance(source, IPv4Address | IPv6Address):
        if leg.case.host.link_with(source) is None:
            fact = f"copies are sent from {source}, which is no address of this host: receivers with rp_filter, and "
            fact += "switches and clouds that check sources, may drop them"
            yield Finding(step, "note", fact, "sysctl net.ipv4.conf.all.rp_filter  # at the receiver")
        else:
            yield Finding(step, "ok", f"copies are sent from {source}")
    elif not own:
        disabled = leg.case.host.sysctl(f"net.ipv6.conf.{link.name}.disable_ipv6") if version == 6 else 0
        sysctl = f"sysctl -w net.ipv6.conf.{link.name.replace('.', '/')}.disable_ipv6=0"
        add = f"ip address add ADDRESS/LENGTH dev {link.name}"
        yield Finding(step, "bad", f"{link.name} has no IPv{version} address to send from", sysctl if disabled else add)
    elif all(address in link.tentative for address in own):
        fact = f"{own[0]} of {link.name} may not be used: its uniqueness is not known, or it is somebody else's, too"
        yield Finding(step, "bad", fact, f"ip -6 address show dev {link.name} tentative")
    elif _is_wider_than_link(leg.destination) and (chosen := _chosen(leg, own, link)).is_link_local:
        fact = f"copies leave with {chosen} as their source, since {link.name} has no other: routers and receivers "
        fact += f"beyond the link drop them, and {leg.destination} is of a wider scope"
        yield Finding(step, "bad", fact, f"ip address add ADDRESS/LENGTH dev {link.name}")
    else:
        yield Finding(step, "ok", f"{link.name} has {', '.join(map(str, own[:4]))}")


def _is_wider_than_link(destination: Address) -> bool:
    if destination.version == 4:
        return False
    scope = destination.packed[1] & 15  # of a group (RFC 4291 section 2.7)
    return scope > LINK_SCOPE if destination.is_multicast else not destination.is_link_local


def _chosen(leg: _Leg, own: Sequence[Address], link: Link) -> Address:
    """The source that it takes itself: to a host the kernel may take one of another interface, if the header is its."""
    route = leg.case.host.routes.get((leg.destination, link.name))
    if route and route.source and not leg.destination.is_multicast and leg.candidate.rule.way(leg.output) is Way.UDP6:
        return route.source
    usable_ones = [address for address in own if address not in link.tentative]
    return next((address for address in usable_ones if not address.is_link_local), usable_ones[0])


def _next_hop(leg: _Leg, link: Link) -> Iterator[Finding]:
    destination = leg.destination
    step = f"{leg.prefix}route"
    owners = [own.name for own in leg.case.host.links.values() if destination in [one.ip for one in own.addresses]]
    if owners and (link.is_loopback or link.name in owners):
        yield Finding(step, "ok", f"{destination} is this host's own: copies come in by its loopback device")
        return
    if owners:
        fact = (
            f"{destination} is this host's own, of {owners[0]}: by {link.name} copies look for another host that has it"
        )
        yield Finding(step, "bad", fact, f"ip -brief address  # or send by %{owners[0]}")
        return
    route = leg.case.host.routes.get((destination, link.name))
    if route is None:
        yield Finding(step, "unknown", f"the kernel was not asked for a route to {destination}")
        return
    by_hand = f"ip route add {destination}/{bits(destination)} via GATEWAY dev {link.name}"
    if route.error is not None:
        yield Finding(step, "bad", f"no route to {destination} by way of {link.name}: {route.error}", by_hand)
        return
    if destination.is_multicast or destination == BROADCAST:
        yield Finding(step, "ok", f"{destination} needs none: {link.name} is given")
        return
    hop = route.gateway or destination
    if route.gateway is not None:
        yield Finding(step, "ok", f"to {destination} via {route.gateway} on {link.name}")
    elif route.matched:
        yield Finding(step, "ok", f"{destination} is on the network of {link.name}")
    else:
        known = route.neighbour in ("reachable", "permanent", "stale", "delay", "probe", "noarp")
        fact = f"no route to {destination} by way of {link.name}: it is taken for a neighbour there"
        yield Finding(step, "note" if known else "bad", fact, by_hand)
    match route.neighbour:
        case "failed" | "incomplete":
            fact = f"{hop} does not answer on {link.name} ({route.neighbour}): nobody says who has it"
            yield Finding(f"{leg.prefix}neighbour", "bad", fact, f"ping -c 3 -I {link.name} {hop}")
        case None | "none":
            fact = f"{hop} is not known on {link.name} yet: the first copy asks for it"
            yield Finding(f"{leg.prefix}neighbour", "unknown", fact, f"ping -c 3 -I {link.name} {hop}")
        case state:
            mac = f" at {route.mac}" if route.mac else ""
            yield Finding(f"{leg.prefix}neighbour", "ok", f"{hop}{mac} on {link.name} ({state})")


def _mtu(leg: _Leg, link: Link) -> Iterator[Finding]:
    """Of what came while we looked; without that, of what can come."""
    step = f"{leg.prefix}mtu"
    case = leg.case
    more = HEADERS[leg.destination.version] - HEADERS[case.given.address.version]
    version = leg.destination.version
    lengths = []
    for key, flow in case.wanted().items():
        mtu = case.host.links[key.interface].mtu if key.interface in case.host.links else flow.length_max
        lengths.append(min(flow.length_max, mtu) + more)  # longer ones are several, which leave apart
        if flow.fragmented_max:  # these leave whole, if they can
            lengths.append(HEADERS[version] + flow.fragmented_max)
    remedy = f"ip link set dev {link.name} mtu "
    if lengths:
        longest = max(lengths)
        if longest > link.mtu:
            fact = f"copies of up to {longest:,} bytes leave {link.name} in fragments: its MTU is {link.mtu}"
            yield Finding(step, "note", fact, f"{remedy}{longest}" if longest <= JUMBO else None)
        else:
            yield Finding(step, "ok", f"copies have up to {longest:,} bytes, {link.name}'s MTU is {link.mtu}")
        return
    given = [case.host.links[name] for name in case.ingress() if not case.host.links[name].is_loopback]
    if not given:
        yield Finding(step, "unknown", f"{link.name}'s MTU is {link.mtu}: nothing came to compare it with")
        return
    widest = max(given, key=lambda ingress: ingress.mtu)
    longest = widest.mtu + more
    fact = (
        f"what fits into {widest.name} (MTU {widest.mtu}) makes copies of up to {longest:,} bytes, {link.name}'s MTU "
    )
    fact += f"is {link.mtu}"
    if longest > link.mtu:
        yield Finding(step, "note", f"{fact}: the longest leave in fragments", f"{remedy}{longest}")
    else:
        yield Finding(step, "ok", fact)


def _ttl(leg: _Leg) -> Iterator[Finding]:
    step = f"{leg.prefix}ttl"
    given = leg.output.ttl
    flows = leg.case.wanted().values()
    came = min((flow.ttl_min for flow in flows), default=None)
    if isinstance(given, int):
        leaves: int | None = given
        how = "as the rule says"
    elif came is None:
        leaves, how = None, "as it came" if given == "keep" else "one less than it came with"
    else:
        leaves = came if given == "keep" else max(1, came - 1)
        how = f"it came with {came}"
    if leaves is None:
        yield Finding(step, "unknown", f"TTL {how}: nothing came to tell it from")
        return
    fact = f"copies leave with TTL {leaves} ({how})"
    route = leg.case.host.routes.get((leg.destination, leg.output.interface))
    if leaves > 1:
        yield Finding(step, "ok", fact)
    elif route is not None and route.gateway is not None:
        fact += f": {route.gateway} drops them instead of forwarding them"
        yield Finding(step, "bad", fact, leg.anew(ttl=TTL_SUGGESTED))
    elif leg.destination.is_multicast:
        fact += f": they reach receivers on the link of {leg.output.interface}, and no router forwards them"
        yield Finding(step, "note", fact, leg.anew(ttl=TTL_SUGGESTED))
    else:
        yield Finding(step, "ok", f"{fact}, which is enough for a neighbour")


def _counters(leg: _Leg) -> Iterator[Finding]:
    step = f"{leg.prefix}counters"
    growth = leg.case.daemon.rule_growth(leg.candidate.facts.id)
    if growth is None or any(len(stats.outputs) < leg.number for stats in growth):
        return
    before, after = (stats.outputs[leg.number - 1] for stats in growth)
    seconds = leg.case.daemon.seconds
    sent = after.packets - before.packets
    dropped = grew(before.dropped, after.dropped)
    if sent:
        yield Finding(
            step, "ok", f"{sent:,} copies handed to the kernel within {seconds:.1f} s, {after.packets:,} in all"
        )
    elif growth[1].packets > growth[0].packets and not dropped:
        fact = f"no copy left within {seconds:.1f} s, though the rule took packets"
        yield Finding(step, "bad", fact, command("mcrelay", "stats", "--watch"))
    elif not dropped:
        yield Finding(step, "unknown", f"no copy left within {seconds:.1f} s: there was nothing to send")
    ingress = min(leg.case.ingress(), default="INTERFACE")
    for reason, packets in dropped.items():
        known = REASONS.get(reason)
        what = f"{packets:,} copies dropped within {seconds:.1f} s as {reason}"
        if known is None:
            yield Finding(step, "bad", what)
            continue
        mending = remedy(reason, ingress=ingress, egress=leg.output.interface, rule=leg.case.text)
        if reason == "egress_unreachable":
            mending = f"ip address show dev {leg.output.interface}"
            mending += f"  # and: ip route get {leg.destination} oif {leg.output.interface}"
        yield Finding(step, "note" if known.expected else "bad", f"{what}: {known.cause}", mending)

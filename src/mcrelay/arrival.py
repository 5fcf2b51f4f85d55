"""Arrival: what a diagnosis finds between the wire and the daemon.

Interface, carrier, membership, querier, and the packets that came while we looked, as they came. Pure: judges facts,
and asks nobody. explain.py has the walk that this is the first part of.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from mcrelay.facts import Case, Finding, Flow, FlowKey, Link, command, is_at, is_sent_to, is_too_wide
from mcrelay.nearness import Candidate, outputs_for
from mcrelay.rules import BROADCAST, GROUPS_JOINED_MAX, bits
from mcrelay.sightings import multicast_mac

HEADERS: Final = {4: 20, 6: 40}  # bytes of an IP header without options
INTERFACES_MAX: Final = 8  # of a pattern, that are looked at one by one
SHOWN_MAX: Final = 4
QUERY_INTERVAL_S: Final = 125  # RFC 3376 section 8.2, RFC 3810 section 9.2
MERGED_KNOWN: Final = (6, 2)  # the Linux from which a device's merging of datagrams can be told


def interfaces(case: Case) -> Iterator[Finding]:
    given, host = case.given, case.host
    if host.problem:
        yield Finding("interface", "unknown", host.problem)
        return
    names = case.ingress()
    if not names:
        what = (
            f"no interface's name begins with {given.interface[:-1]!r}"
            if given.is_pattern
            else (f"there is no interface {given.interface!r}")
        )
        there = ", ".join(sorted(host.links)[:INTERFACES_MAX])
        yield Finding("interface", "bad", f"{what}; this host has {there}", "ip -brief link")
    for name in names[:INTERFACES_MAX]:
        yield from _interface(case, host.links[name])


def _interface(case: Case, link: Link) -> Iterator[Finding]:
    ready = list(usable("", link, case.host.links.get(link.parent or "")))
    yield from ready
    if any(finding.verdict == "bad" for finding in ready):
        return
    if not link.is_loopback:
        yield from _joined(case, link)
        if case.given.address.is_multicast:
            yield from _querier(case, link)


def usable(prefix: str, link: Link, parent: Link | None) -> Iterator[Finding]:
    """Whether an interface can carry anything."""
    if not link.is_up:
        yield Finding(f"{prefix}interface", "bad", f"{link.name} is down", f"ip link set dev {link.name} up")
        return
    kind = f", {link.kind}" if link.kind else ""
    yield Finding(f"{prefix}interface", "ok", f"{link.name} is up (MTU {link.mtu}{kind})")
    if link.has_carrier:
        yield Finding(f"{prefix}carrier", "ok", f"{link.name} has a carrier")
    elif parent is not None:
        remedy = f"ip link set dev {parent.name} up"
        yield Finding(
            f"{prefix}carrier", "bad", f"{link.name} has no carrier: {parent.name} is at its other end", remedy
        )
    else:
        why = {"bridge": "none of its ports is up", "veth": "its other end is down"}.get(link.kind, "look at the cable")
        yield Finding(f"{prefix}carrier", "bad", f"{link.name} has no carrier: {why}", _carrier_remedy(link))


def _carrier_remedy(link: Link) -> str:
    if link.kind == "bridge":
        return f"ip link show master {link.name}"
    return f"ip -details link show dev {link.name}" if link.kind else f"ethtool {link.name}"


# --- membership -------------------------------------------------------------------------------------------------------


def _joined(case: Case, link: Link) -> Iterator[Finding]:
    given = case.given
    if not given.address.is_multicast:
        yield from _unicast(case, link)
        return
    taking = case.choice.taking
    if taking is not None and is_too_wide(taking.rule.input):
        yield _joined_by_none(case, link, taking)
        return
    if given.prefix is not None:
        yield _joined_prefix(case, link)
        return
    found = [one for one in case.host.joined if (one.interface, one.group) == (link.name, given.address)]
    version = _membership_protocol(case, link)
    if not found:
        fact = f"no member of {given.address} on {link.name} on this host, so switches need not send it here"
        if case.choice.taking:
            yield Finding("joined", "bad", fact, _pending_remedy(case))
        elif link.name in case.seen.joined:
            yield Finding("joined", "note", f"{fact}; joined while looking")
        else:
            yield Finding("joined", "note", fact, f"mcrelay add {case.text} ADDRESS:PORT%INTERFACE")
        return
    sources = found[0].sources
    if given.source is None or not sources:
        only = f" (of sources: {', '.join(map(str, sources[:SHOWN_MAX]))})" if sources else ""
        yield Finding("joined", "ok", f"{given.address} on {link.name}{only}{version}")
    elif given.source in sources:
        yield Finding("joined", "ok", f"{given.address} of source {given.source} on {link.name}{version}")
    else:
        named = ", ".join(map(str, sources[:SHOWN_MAX]))
        yield Finding(
            "joined",
            "unknown",
            f"{given.address} on {link.name}, of sources {named}; the kernel does not say whether of others, too",
            f"mcrelay add {case.text} ADDRESS:PORT%INTERFACE",
        )
    if given.source is not None and case.host.igmp_versions.get(link.name, "V3") != "V3" and given.address.version == 4:
        yield Finding(
            "joined",
            "note",
            f"{link.name} speaks IGMP{case.host.igmp_versions[link.name].lower()}, which cannot ask for one source",
            f"sysctl net.ipv4.conf.{link.name.replace('.', '/')}.force_igmp_version  # 0: as the querier has it",
        )


def _membership_protocol(case: Case, link: Link) -> str:
    version = case.host.igmp_versions.get(link.name)
    return f", IGMP{version.lower()}" if version and case.given.address.version == 4 else ""


def _pending_remedy(case: Case) -> str:
    taking = case.choice.taking
    return command("mcrelay", "list") + (f"  # problems of {taking.rule.label}" if taking else "")


def _joined_by_none(case: Case, link: Link, taking: Candidate) -> Finding:
    """The rule is for more groups than are joined: what of the one, or the few, that we were asked about?"""
    given, own = case.given, taking.rule.input
    widest = bits(own.address) - GROUPS_JOINED_MAX.bit_length() + 1
    what = str(given.address) if given.prefix is None else f"{given.address}/{given.prefix}"
    fact = (
        f"rule {taking.rule.label} joins nothing, since {own.address}/{own.prefix} is wider than /{widest}, and takes "
    )
    if any(one.interface == link.name and is_at(given, one.group) for one in case.host.joined):
        fact += "what comes; other members on this host, or other rules, joined some of it"
    else:
        fact += "what comes"
    if case.seen.problem:
        fact += f"; whether {what} comes was not looked at"
    elif any(key.interface == link.name for key in case.wanted()):
        fact += f"; {what} comes all the same"
    else:
        fact += f"; {what} does not come"
    outputs = outputs_for(given, taking.rule.outputs if given.prefix is None else ())
    rule = f"GROUP:PORT%{link.name}" if given.prefix is not None and is_too_wide(given) else str(given)
    mending = f"  # a rule for it joins it; or a prefix of /{widest} or longer, or a static membership on the switch"
    return Finding("joined", "note", fact, command("mcrelay", "add", rule, *outputs) + mending)


def _joined_prefix(case: Case, link: Link) -> Finding:
    given = case.given
    assert given.prefix is not None
    wanted = 1 << bits(given.address) - given.prefix
    joined = len([1 for one in case.host.joined if one.interface == link.name and is_at(given, one.group)])
    fact = f"{joined:,} of {wanted:,} groups of {given.address}/{given.prefix} on {link.name}"
    if wanted > GROUPS_JOINED_MAX:
        return Finding(
            "joined",
            "note",
            f"{fact}: more than {GROUPS_JOINED_MAX} groups are not joined, and a rule for them takes what comes",
            f"mcrelay add GROUP:PORT%{link.name} ADDRESS:PORT%INTERFACE  # a rule for a group joins it",
        )
    if joined < wanted and case.choice.taking:
        return Finding("joined", "bad", fact, _pending_remedy(case))
    return Finding("joined", "ok" if joined == wanted else "note", fact)


def _unicast(case: Case, link: Link) -> Iterator[Finding]:
    address = case.given.address
    if address == BROADCAST or any(
        own.version == 4 and address == own.network.broadcast_address for own in link.addresses
    ):
        yield Finding("address", "ok", f"{address} is a broadcast: nobody has to join it")
        return
    owner = case.host.link_with(address)
    if owner is None:
        yield Finding(
            "address",
            "note",
            f"{address} is no address of this host: it comes here only if somebody routes it here",
            f"ip address add {address}/{bits(address)} dev {link.name}",
        )
    elif owner.name != link.name:
        yield Finding("address", "note", f"{address} is an address of {owner.name}, not of {link.name}")
    else:
        yield Finding("address", "ok", f"{address} is an address of {link.name}")


def _querier(case: Case, link: Link) -> Iterator[Finding]:
    """What a group's coming depends on where switches snoop: that somebody asks for members again and again."""
    version = case.given.address.version
    queriers = [q for q in case.seen.queriers if q.interface == link.name and q.address.version == version]
    around = (link, *(case.host.links[name] for name in (link.master, link.parent) if name and name in case.host.links))
    bridge = next((one for one in around if one.bridge), None)
    if queriers:
        who = ", ".join(f"{querier.address} ({querier.protocol})" for querier in queriers[:SHOWN_MAX])
        yield Finding("querier", "ok", f"{who} asks for members on {link.name}")
    elif bridge is not None and bridge.bridge is not None:
        if not bridge.bridge.snooping:
            yield Finding("querier", "ok", f"bridge {bridge.name} does not snoop: it floods all groups")
        elif bridge.bridge.querier:
            yield Finding("querier", "ok", f"bridge {bridge.name} snoops, and asks for members itself")
        else:
            yield no_querier(bridge.name, None if case.seen.problem else case.seen.seconds)
    elif version == 4 and case.host.igmp_versions.get(link.name, "V3") != "V3" and not _is_igmp_forced(case, link):
        older = case.host.igmp_versions[link.name].lower()
        yield Finding("querier", "ok", f"an IGMP{older} querier asked on {link.name} within the last minutes")
    elif case.seen.problem:
        yield Finding("querier", "unknown", f"not looked for on {link.name}: {case.seen.problem}", case.seen.remedy)
    else:
        yield Finding(
            "querier",
            "unknown",
            f"none asked on {link.name} within {case.seen.seconds:g} s; they ask every {QUERY_INTERVAL_S} s as a rule",
            f"mcrelay explain {case.text} --seconds {QUERY_INTERVAL_S + 5}",
        )


def _is_igmp_forced(case: Case, link: Link) -> bool:
    """What version is in use says nothing of queriers then."""
    return any(case.host.sysctl(f"net.ipv4.conf.{name}.force_igmp_version") for name in ("all", link.name))


def no_querier(bridge: str, seconds: float | None) -> Finding:
    seen = (
        f"none was seen within {seconds:g} s" if seconds is not None else "whether somebody else does was not looked at"
    )
    return Finding(
        "querier",
        "note",
        f"bridge {bridge} snoops and is no querier; {seen}. Without one it floods, and other switches stop sending a "
        "group some minutes after it was joined",
        f"ip link set dev {bridge} type bridge mcast_querier 1",
    )


# --- packets ----------------------------------------------------------------------------------------------------------


def packets(case: Case) -> Iterator[Finding]:
    """What came while we looked."""
    seen = case.seen
    wanted = case.wanted()
    if seen.problem:
        fact = f"not looked at: {seen.problem}"
        if moved := _frames_moved(case):
            fact += f"; {moved}"
        yield Finding("arriving", "unknown", fact, seen.remedy)
    elif not wanted:
        yield _missing(case)
    else:
        yield _arriving(case, wanted)
        yield from _condition(case, wanted)


def _frames_moved(case: Case) -> str:
    """What can be told without looking at frames."""
    moved = []
    for name in case.ingress()[:INTERFACES_MAX]:
        if name in case.earlier.links:
            grown = case.host.links[name].received - case.earlier.links[name].received
            moved.append(f"{name} took {grown:,} frames of any kind meanwhile")
    return ", ".join(moved)


def _arriving(case: Case, wanted: dict[FlowKey, Flow]) -> Finding:
    total = sum(flow.packets for flow in wanted.values())
    sources = sorted({key.source for key in wanted}, key=str)
    shown = ", ".join(map(str, sources[:SHOWN_MAX])) + (" and others" if len(sources) > SHOWN_MAX else "")
    where = ", ".join(sorted({key.interface for key in wanted}))
    more = f"; {case.seen.missed:,} more came than were looked at" if case.seen.missed else ""
    rate = f"{case.seen.seconds:g} s ({total / case.seen.seconds:,.0f}/s)"
    return Finding("arriving", "ok", f"{total:,} packets in {rate} on {where} from {shown}{more}")


def _missing(case: Case) -> Finding:
    """Nothing came. What did comes nearest to it?"""
    given, seen = case.given, case.seen
    what = f"no packet of {given} within {seen.seconds:g} s"
    for there, remedy in _elsewhere(case):
        return Finding("arriving", "bad", f"{what}, but {there}", remedy)
    others = {str(key.destination) for key in seen.flows if given.is_on(key.interface) and key.destination.is_multicast}
    if others:
        what += f"; other groups came: {', '.join(sorted(others)[:SHOWN_MAX])}"
    if given.protocol == "esp":  # which nothing of ours sends
        return Finding("arriving", "bad", what)
    group = given.address if given.prefix is None else given.address + 1
    host = f"[{group}]" if group.version == 6 else str(group)
    test = command("mcrelay", "send", f"{host}:{given.port or 5000}%INTERFACE", "--count", 1000)
    return Finding("arriving", "bad", what, f"{test}  # at the sending host, while this looks again")


def _elsewhere(case: Case) -> Iterator[tuple[str, str]]:
    given, flows = case.given, case.seen.flows
    for key, flow in flows.items():
        if is_sent_to(given, key) and given.is_on(key.interface) and given.vlan == key.vlan:
            there = f"{flow.packets:,} from {key.source}"
            yield there, command("mcrelay", "explain", _described(case, key), "--from", key.source)
    for key, flow in flows.items():
        if is_sent_to(given, key) and given.is_on(key.interface):
            tag = f"with the tag of VLAN {key.vlan}" if key.vlan is not None else "untagged"
            there = f"{flow.packets:,} {tag}, from {key.source}"
            yield there, command("mcrelay", "explain", _described(case, key))
    for key, flow in flows.items():
        if is_at(given, key.destination) and given.is_on(key.interface):
            to = f"port {key.port}" if key.port is not None else key.protocol.upper()
            there = f"{flow.packets:,} to {to}, from {key.source}"
            yield there, command("mcrelay", "explain", _described(case, key))
    for key, flow in flows.items():
        if is_at(given, key.destination):
            there = f"{flow.packets:,} to port {key.port} on {key.interface}, from {key.source}"
            yield there, command("mcrelay", "explain", _described(case, key))


def _described(case: Case, key: FlowKey) -> str:
    """The input that would take what was seen."""
    address = f"[{key.destination}]" if key.destination.version == 6 else str(key.destination)
    port = "esp" if key.protocol == "esp" else key.port or case.given.port or "*"
    vlan = f",vlan={key.vlan}" if key.vlan else ""
    return f"{address}:{port}%{key.interface}{vlan}"


def _condition(case: Case, wanted: dict[FlowKey, Flow]) -> Iterator[Finding]:
    """What the packets look like that came."""
    flows = wanted.values()
    yield from _link_layer(case, wanted)
    checked, wrong = sum(flow.checked for flow in flows), sum(flow.bad_checksums for flow in flows)
    interface = min(key.interface for key in wanted)
    if wrong:
        fact = f"{wrong:,} of {checked:,} packets have a wrong checksum and are dropped"
        yield Finding("checksum", "bad", fact, f"ethtool -S {interface} | grep -iE 'err|csum'")
    elif checked:
        yield Finding("checksum", "ok", f"right in all of {checked:,} packets")
    else:
        yield Finding("checksum", "ok", "left to a device by a sender on this machine")
    if fragments := sum(flow.fragments for flow in flows):
        longest = max(flow.fragmented_max + HEADERS[key.destination.version] for key, flow in wanted.items())
        fact = f"{fragments:,} of the packets are fragments, of datagrams of up to {longest:,} bytes; they are put "
        fact += "together if all of them come"
        yield Finding("fragments", "note", fact, "nstat -az IpReasmFails Ip6ReasmFails")
    low, high = min(flow.ttl_min for flow in flows), max(flow.ttl_max for flow in flows)
    yield Finding("ttl", "ok", f"they come with TTL {low}" + (f" to {high}" if high != low else ""))
    yield from _length(case, wanted)
    for source in sorted({key.source for key in wanted if case.host.link_with(key.source)}, key=str):
        owner = case.host.link_with(source)
        if owner is not None and not all(case.host.links[key.interface].is_loopback for key in wanted):
            fact = f"{source} is an address of this host ({owner.name}): such packets are dropped as our own come back"
            yield Finding("source", "bad", fact, command("mcrelay", "list"))


def _link_layer(case: Case, wanted: dict[FlowKey, Flow]) -> Iterator[Finding]:
    astray = [key for key, flow in wanted.items() if flow.arrivals == {"other host"}]
    macs = {mac for flow in wanted.values() for mac in flow.wrong_macs}
    if macs:
        right = multicast_mac(min(key.destination for key in wanted)).hex(":")
        yield Finding(
            "link address",
            "note",
            f"frames go to {', '.join(sorted(macs)[:SHOWN_MAX])}, which is not the group's {right}: they come, but "
            "cards and switches that filter by it would keep them back",
            f"tcpdump -eni {min(key.interface for key in wanted)} -c 10 dst host {case.given.address}",
        )
    elif astray:
        yield Finding(
            "link address",
            "bad",
            "frames go to the link-layer address of another host, and are dropped",
            f"tcpdump -eni {astray[0].interface} -c 10 dst host {case.given.address}",
        )
    else:
        yield Finding("link address", "ok", "frames are for the group's or this host's link-layer address")


def _length(case: Case, wanted: dict[FlowKey, Flow]) -> Iterator[Finding]:
    longest = max(flow.length_max for flow in wanted.values())
    for name in sorted({key.interface for key in wanted}):
        mtu = case.host.links[name].mtu if name in case.host.links else longest
        if longest <= mtu:
            yield Finding("length", "ok", f"the longest has {longest:,} bytes, {name}'s MTU is {mtu}")
        elif case.host.kernel < MERGED_KNOWN:
            fact = f"frames of up to {longest:,} bytes on {name} (MTU {mtu}): before Linux 6.2 merged ones look whole"
            yield Finding("length", "bad", fact, f"ethtool -K {name} rx-udp-gro-forwarding off rx-gro-list off")
        else:
            yield Finding("length", "ok", f"frames of up to {longest:,} bytes: a device merged several datagrams")

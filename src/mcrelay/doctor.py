"""Doctor: the host and the daemon as a whole, check by check.

Owns what a healthy host of a relay looks like: kernel, privileges, workers, what is dropped and why, interfaces,
limits. explain.py follows one input instead. Pure: judges facts, and asks nobody.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from mcrelay.api import InterfaceFacts, RuleFacts
from mcrelay.arrival import no_querier
from mcrelay.explain import BPF_BIT, SYS_ADMIN_BIT, daemon
from mcrelay.facts import Daemon, Finding, Host, Link, command, cores, grew
from mcrelay.nearness import parsed
from mcrelay.reasons import REASONS, remedy
from mcrelay.rules import Address, Rule

KERNEL_MIN: Final = (6, 1)
MERGED_KNOWN: Final = (6, 2)
CAPABILITIES: Final = {12: "CAP_NET_ADMIN", 13: "CAP_NET_RAW"}
SYS_NICE_BIT: Final = 23
LOCKED_MEMORY_MIN: Final = 8 << 20  # bytes, what the kernel permits users as a rule
SHOWN_MAX: Final = 8
BACKLOG: Final = 10_000
ROUTES_MAX: Final = 500  # looked up, at a quarter of a millisecond each


@dataclass(frozen=True)
class Patient:
    """`host` and `earlier` are from after and before the time between the daemon's two statistics."""

    host: Host
    earlier: Host
    daemon: Daemon
    seconds: float

    @cached_property
    def rules(self) -> list[tuple[RuleFacts, Rule]]:
        return [(facts, rule) for facts in self.daemon.rules if (rule := parsed(facts))]

    def ingress(self) -> list[Link]:
        """The interfaces that rules take packets from, those that are there."""
        inputs = [rule.input for _facts, rule in self.rules]
        return [link for name, link in sorted(self.host.links.items()) if any(given.is_on(name) for given in inputs)]


def examine(patient: Patient) -> list[Finding]:
    findings = [*daemon(patient.daemon), *_kernel(patient)]
    if patient.daemon.problem is None:
        findings += [*_privileges(patient), *_processes(patient), *_rules(patient), *_drops(patient)]
        findings += [*_daemon_interfaces(patient)]
    if patient.daemon.elsewhere is None:
        findings += [
            *_other_relays(patient),
            *_host(patient),
            *_links(patient),
            *_next_hops(patient),
            *_limits(patient),
        ]
    return findings


# --- kernel and privileges --------------------------------------------------------------------------------------------


def _kernel(patient: Patient) -> Iterator[Finding]:
    host = patient.host
    if host.kernel < KERNEL_MIN:
        yield Finding("kernel", "bad", f"Linux {host.release}: mcrelay is made for 6.1 and newer", "uname -r")
    elif host.kernel < MERGED_KNOWN:
        names = [link.name for link in patient.ingress()] or ["INTERFACE"]
        fact = f"Linux {host.release}: before 6.2 frames that a device merged look like one long datagram"
        yield Finding("kernel", "note", fact, f"ethtool -K {names[0]} rx-udp-gro-forwarding off rx-gro-list off")
    else:
        yield Finding("kernel", "ok", f"Linux {host.release}: has UDP_SEGMENT, and tells merged frames")
    disabled = host.sysctl("kernel.io_uring_disabled")
    if disabled:
        who = "for all" if disabled == 2 else "without CAP_SYS_ADMIN"
        fact = f"io_uring is disabled {who} (kernel.io_uring_disabled = {disabled}): a Python engine forwards, slowly"
        yield Finding("io_uring", "bad", fact, "sysctl -w kernel.io_uring_disabled=0  # and: mcrelay upgrade")
    else:
        yield Finding("io_uring", "ok", "not disabled" if disabled == 0 else "this kernel has no switch for it")
    memory = patient.daemon.locked_memory
    if memory is not None and memory < LOCKED_MEMORY_MIN:
        fact = f"the daemon may lock {memory >> 10:,} KiB of memory, less than the usual {LOCKED_MEMORY_MIN >> 10:,}"
        yield Finding("locked memory", "note", fact, "ulimit -l 8192  # of a service of systemd: LimitMEMLOCK=8M")
    elif patient.daemon.problem is None:
        fact = "without a limit, or not told" if memory is None else f"the daemon may lock {memory >> 10:,} KiB"
        yield Finding("locked memory", "ok", fact)


def _privileges(patient: Patient) -> Iterator[Finding]:
    held = patient.daemon.capabilities
    if held is None:
        yield Finding("privileges", "unknown", "what the supervisor may do is not known", command("mcrelay", "workers"))
        return
    if patient.daemon.is_rootless:
        fact = "the daemon is rootless: its ordinary sockets get only what this host's kernel accepts"
        yield Finding("privileges", "note", fact, "sudo mcrelay run  # for the rest")
        return
    missing = [name for bit, name in CAPABILITIES.items() if not held >> bit & 1]
    if missing:
        yield Finding("privileges", "bad", f"the supervisor lacks {' and '.join(missing)}", "sudo mcrelay run")
    else:
        yield Finding("privileges", "ok", "the supervisor has CAP_NET_RAW and CAP_NET_ADMIN")
    if not (held >> BPF_BIT & 1 or held >> SYS_ADMIN_BIT & 1):
        fact = "the supervisor has no CAP_BPF: workers look at every packet of an interface, wanted or not"
        yield Finding("filter", "note", fact, "sudo mcrelay run")
    if not held >> SYS_NICE_BIT & 1:
        fact = "the supervisor has no CAP_SYS_NICE: workers share their cores with everybody else on equal terms"
        yield Finding("privileges", "note", fact, "sudo mcrelay run")


# --- processes --------------------------------------------------------------------------------------------------------


def _other_relays(patient: Patient) -> Iterator[Finding]:
    ours = {process.pid for process in patient.daemon.processes}
    for pid in sorted(pid for pid, own in patient.host.relays.items() if own not in ours):
        fact = f"process {pid} is another mcrelay in this network: what rules of both take is sent twice"
        yield Finding("other relay", "note", fact, f"ps -o pid,user,args -p {pid}  # --socket is where it listens")


def _processes(patient: Patient) -> Iterator[Finding]:
    log = "journalctl -u mcrelay -n 50  # the daemon's log says why"
    for process in patient.daemon.processes:
        name = f"data/{process.index}" if process.role == "data" else process.role
        if process.state != "ready":
            yield Finding("workers", "bad", f"{name} is {process.state}, after {process.restarts} restarts", log)
        elif process.restarts and process.role != "spare":
            yield Finding("workers", "note", f"{name} works, and was restarted {process.restarts} times", log)
    ready = [worker for worker in patient.daemon.workers if worker.state == "ready"]
    yield Finding(
        "workers", "ok" if ready else "bad", f"{len(ready)} of {len(patient.daemon.workers)} data planes work"
    )
    if slow := [worker for worker in ready if worker.engine == "reference"]:
        fact = f"{len(slow)} data planes run the Python engine, which is for a few thousand packets/s"
        yield Finding("engine", "note", fact, "mcrelay run --engine uring  # says why it cannot")
    yield from _cores(patient)


def _cores(patient: Patient) -> Iterator[Finding]:
    """Where a card interrupts a worker's core, the kernel's part of receiving comes before the worker's."""
    ours = {core: worker.index for worker in patient.daemon.workers for core in cores(worker.cores or "")}
    machine = {core for worker in patient.daemon.processes for core in cores(worker.cores or "")}
    for link in patient.ingress():
        for number, there in link.interrupts.items():
            shared = sorted(set(there) & set(ours))
            if len(there) == 1 and shared:
                free = min(machine - set(ours), default=None)
                mending = (
                    f"echo {free} > /proc/irq/{number}/smp_affinity_list"
                    if free is not None
                    else "mcrelay run --cores LIST  # leave the cores that the card interrupts out"
                )
                fact = f"interrupt {number} of {link.name} goes to core {shared[0]}, where data/{ours[shared[0]]} runs"
                yield Finding("interrupts", "note", fact, mending)


# --- rules and drops --------------------------------------------------------------------------------------------------


def _rules(patient: Patient) -> Iterator[Finding]:
    rules = patient.daemon.rules
    if not rules:
        yield Finding("rules", "note", "there are none", "mcrelay add INPUT OUTPUT")
        return
    wrong = [facts for facts in rules if facts.state != "active"]
    yield Finding("rules", "ok", f"{len(rules) - len(wrong):,} of {len(rules):,} are active")
    for facts in wrong[:SHOWN_MAX]:
        fact = f"{facts.name or facts.id} ({facts.input}) is {facts.state}: {'; '.join(facts.problems)}"
        yield Finding("rules", "bad", fact, command("mcrelay", "explain", facts.input))
    if len(wrong) > SHOWN_MAX:
        yield Finding("rules", "bad", f"{len(wrong) - SHOWN_MAX:,} more are not active", command("mcrelay", "list"))


def _drops(patient: Patient) -> Iterator[Finding]:
    """What workers and outputs drop now, and what they have dropped before."""
    facts = patient.daemon
    if facts.before is None or facts.after is None:
        yield Finding("drops", "unknown", "the daemon's counters are not known")
        return
    growing = facts.drops_growth()
    ingress = next((link.name for link in patient.ingress()), "INTERFACE")
    for reason, packets in growing.items():
        known = REASONS.get(reason)
        what = f"{packets:,} packets within {facts.seconds:.1f} s as {reason}"
        if known is None:
            yield Finding("drops", "bad", what)
            continue
        egress, rule = _culprit(patient, reason)
        mending = remedy(reason, ingress=ingress, egress=egress, rule=command(rule))
        yield Finding("drops", "note" if known.expected else "bad", f"{what}: {known.cause}", mending)
    yield from _dropped_copies(patient, growing)
    past: dict[str, int] = {}
    for worker in facts.before.workers:
        for reason, packets in worker.dropped.items():
            if reason not in growing:
                past[reason] = past.get(reason, 0) + packets
    if past:
        listed = ", ".join(f"{reason} {packets:,}" for reason, packets in past.items())
        yield Finding("drops", "note", f"none of these within {facts.seconds:.1f} s, but before: {listed}")
    elif not growing:
        yield Finding("drops", "ok", "none since the daemon is there")


def _output_drops(patient: Patient) -> Iterator[tuple[str, str, str, int]]:
    """Copies that were dropped meanwhile: input, output, reason, how many."""
    if patient.daemon.after is None:
        return
    for rule in patient.daemon.after.rules:
        growth = patient.daemon.rule_growth(rule.id)
        for number, output in enumerate(rule.outputs if growth else ()):
            assert growth
            if number < len(growth[0].outputs):
                grown = grew(growth[0].outputs[number].dropped, output.dropped)
                yield from ((rule.input, output.output, reason, copies) for reason, copies in grown.items())


def _culprit(patient: Patient, reason: str) -> tuple[str, str]:
    """The interface of an output that drops for this reason, and its rule's input."""
    for given, output, why, _copies in _output_drops(patient):
        if why == reason:
            return output.rpartition("%")[2].partition(",")[0], given
    for facts in patient.daemon.after.rules if patient.daemon.after else ():
        growth = patient.daemon.rule_growth(facts.id)
        if growth and {"own": growth[1].own > growth[0].own, "loop": growth[1].looped > growth[0].looped}.get(reason):
            return "INTERFACE", facts.input
    return "INTERFACE", "INPUT"


def _dropped_copies(patient: Patient, told: Mapping[str, int]) -> Iterator[Finding]:
    """Of packets of which other copies left, which no worker counts as dropped."""
    for given, output, reason, copies in _output_drops(patient):
        known = REASONS.get(reason)
        if reason not in told and known is not None:
            egress = output.rpartition("%")[2].partition(",")[0]
            fact = f"{copies:,} copies to {output} within {patient.daemon.seconds:.1f} s as {reason}: {known.cause}"
            mending = remedy(reason, egress=egress, rule=command(given))
            yield Finding("drops", "note" if known.expected else "bad", fact, mending)


def _daemon_interfaces(patient: Patient) -> Iterator[Finding]:
    """What the daemon counted of interfaces, and whether its buffers suffice."""
    facts = patient.daemon
    if facts.listing is None or facts.earlier is None:
        return
    earlier = {interface.name: interface for interface in facts.earlier.interfaces}
    for interface in facts.listing.interfaces:
        yield from _daemon_interface(interface, earlier.get(interface.name), facts.seconds)
    exhausted = sum(worker.pool_exhausted for worker in facts.after.workers) if facts.after else 0
    before = sum(worker.pool_exhausted for worker in facts.before.workers) if facts.before else 0
    if exhausted > before:
        fact = (
            f"all receive slots were in use {exhausted - before:,} times within {facts.seconds:.1f} s: outputs are slow"
        )
        yield Finding("slots", "bad", fact, "mcrelay run --ring-mib 64  # and look at outputs: tc -s qdisc")


def _daemon_interface(now: InterfaceFacts, before: InterfaceFacts | None, seconds: float) -> Iterator[Finding]:
    if not now.segmentation:
        fact = f"{now.name} refused segments {now.segments_refused:,} times: datagrams leave one by one, at more cost"
        mending = f"ethtool -k {now.name} | grep -E 'segmentation|checksum'  # tx-checksumming has to be on"
        yield Finding("segments", "note", fact, mending)
    grown = now.overruns - before.overruns if before else 0
    if grown > 0:
        fact = f"the rings of {now.name} overran by {grown:,} packets within {seconds:.1f} s: workers are too slow"
        yield Finding("rings", "bad", fact, "mcrelay run --ring-mib 64  # and more workers: --cores LIST")
    elif now.overruns:
        yield Finding("rings", "note", f"the rings of {now.name} overran before, by {now.overruns:,} packets")
    elif now.frames:
        yield Finding("rings", "ok", f"those of {now.name} did not overrun in {now.frames:,} frames")


# --- the host ---------------------------------------------------------------------------------------------------------


def _host(patient: Patient) -> Iterator[Finding]:
    host, earlier = patient.host, patient.earlier
    lost = host.backlog_dropped - earlier.backlog_dropped
    limit = host.sysctl("net.core.netdev_max_backlog")
    if lost > 0:
        fact = f"the kernel dropped {lost:,} frames before anybody saw them: a core's backlog was full"
        yield Finding("backlog", "bad", fact, f"sysctl -w net.core.netdev_max_backlog={max(BACKLOG, 2 * (limit or 0))}")
    else:
        size = f" of {limit} frames (net.core.netdev_max_backlog)" if limit is not None else ""
        yield Finding("backlog", "ok", f"no core's backlog{size} was full meanwhile")
    failed = host.reassembly_failures - earlier.reassembly_failures
    if failed > 0:
        fact = f"{failed:,} fragmented packets could not be put together: fragments are lost on the way"
        yield Finding("fragments", "bad", fact, "nstat -az IpReasmFails IpReasmTimeout Ip6ReasmFails")
    if host.problem:
        yield Finding("interfaces", "unknown", host.problem)
    for link in host.links.values():
        if link.bridge is not None and link.bridge.snooping and not link.bridge.querier:
            yield no_querier(link.name, None)


def _links(patient: Patient) -> Iterator[Finding]:
    """Interfaces that rules take packets from, and where they lead."""
    host = patient.host
    for link in patient.ingress():
        if link.name in patient.earlier.links:
            dropped = link.received_dropped - patient.earlier.links[link.name].received_dropped
            if dropped > 0:
                fact = f"{link.name} dropped {dropped:,} frames meanwhile, before anybody saw them"
                yield Finding("interfaces", "bad", fact, f"ethtool -S {link.name} | grep -iE 'drop|miss|fifo'")
        filters = [host.sysctl(f"net.ipv4.conf.{name}.rp_filter") or 0 for name in ("all", link.name)]
        if max(filters):
            sysctl = f"net.ipv4.conf.{link.name.replace('.', '/')}.rp_filter"
            daemon = (
                "the daemon, which is rootless, does not get packets of sources without a route"
                if patient.daemon.is_rootless
                else "the daemon relays sources without a route all the same, but other programs here, and mcrelay "
                "receive, do not get them"
            )
            fact = f"{sysctl} is {max(filters)}: {daemon}"
            yield Finding("rp_filter", "note", fact, f"sysctl -w net.ipv4.conf.all.rp_filter=0 {sysctl}=0")
        if host.sysctl(f"net.ipv4.conf.{link.name}.mc_forwarding"):
            fact = f"a multicast router of this host uses {link.name}, too: what both send on arrives twice"
            yield Finding("routing", "note", fact, "ip mroute show")
        if host.sysctl(f"net.ipv4.conf.{link.name}.force_igmp_version") in (1, 2):
            fact = f"{link.name} is made to speak an older IGMP, which cannot ask for one source"
            mending = f"sysctl -w net.ipv4.conf.{link.name.replace('.', '/')}.force_igmp_version=0"
            yield Finding("igmp", "note", fact, mending)
    yield from _mtus(patient)


def _mtus(patient: Patient) -> Iterator[Finding]:
    told: set[tuple[str, str]] = set()
    for _facts, rule in patient.rules:
        given = [link for name, link in patient.host.links.items() if rule.input.is_on(name) and not link.is_loopback]
        for output in rule.outputs:
            link = patient.host.links.get(output.interface)
            for ingress in given:
                pair = ingress.name, output.interface
                if link is not None and link.mtu < ingress.mtu and pair not in told and len(told) < SHOWN_MAX:
                    told.add(pair)
                    fact = f"{ingress.name} has {ingress.mtu:,} and {link.name} {link.mtu:,}: longer ones are cut apart"
                    yield Finding("mtu", "note", fact, f"ip link set dev {link.name} mtu {ingress.mtu}")


def _next_hops(patient: Patient) -> Iterator[Finding]:
    """What outputs to single hosts are for, if nobody answers there."""
    for facts, rule in patient.rules:
        for output in rule.outputs:
            route = patient.host.routes.get((rule.address_of(output), output.interface))
            if route is None or output.paused:
                continue
            if route.error is not None:
                why = f"no route: {route.error}"
            elif route.neighbour in ("failed", "incomplete"):
                why = f"{route.gateway or rule.address_of(output)} does not answer ({route.neighbour})"
            else:
                continue
            yield Finding(
                "outputs", "bad", f"{output} of {rule.label}: {why}", command("mcrelay", "explain", facts.input)
            )


def wanted_routes(rules: Iterable[RuleFacts]) -> list[tuple[Address, str]]:
    """The outputs to single hosts, not more of them than can be asked for in a moment."""
    wanted = []
    for facts in rules:
        rule = parsed(facts)
        for output in rule.outputs if rule else ():
            address = rule.address_of(output) if rule else None
            if address is not None and not address.is_multicast:
                wanted.append((address, output.interface))
        if len(wanted) >= ROUTES_MAX:
            break
    return wanted[:ROUTES_MAX]


def _limits(patient: Patient) -> Iterator[Finding]:
    """The kernel's, on memberships."""
    host = patient.host
    groups = len({(one.interface, one.group) for one in host.joined if not _is_own(one.group.packed)})
    limit = host.sysctl("net.ipv4.igmp_max_memberships")
    fact = f"{groups:,} joined; net.ipv4.igmp_max_memberships = {limit} is for one socket, and the daemon opens more"
    yield Finding("memberships", "ok", fact)
    sources: dict[tuple[int, str, str], int] = {}  # by IP version, interface, group
    for _facts, rule in patient.rules:
        given = rule.input
        if given.source is not None and given.address.is_multicast:
            group = given.address.version, given.interface, str(given.address)
            sources[group] = sources.get(group, 0) + 1
    for key, version in (("net.ipv4.igmp_max_msf", 4), ("net.ipv6.mld_max_msf", 6)):
        most = max((number for group, number in sources.items() if group[0] == version), default=0)
        permitted = host.sysctl(key)
        if permitted is not None and most > permitted:
            fact = f"{most:,} sources of one group, and {key} permits a socket {permitted}"
            yield Finding("memberships", "note", fact, f"sysctl -w {key}={most}")
    for _facts, rule in patient.rules:
        if rule.input.address.version == 6 and host.sysctl(f"net.ipv6.conf.{rule.input.interface}.disable_ipv6"):
            fact = f"IPv6 is off on {rule.input.interface}, which rules for IPv6 name: it joins no group"
            name = rule.input.interface.replace(".", "/")
            yield Finding("ipv6", "bad", fact, f"sysctl -w net.ipv6.conf.{name}.disable_ipv6=0")
            break


def _is_own(packed: bytes) -> bool:
    """Groups that every host is a member of: all hosts, all nodes, solicited nodes, node-local."""
    if len(packed) == 4:
        return packed == b"\xe0\0\0\x01"
    return packed[:2] in (b"\xff\x01", b"\xff\x02") and packed[2:11] == bytes(9)

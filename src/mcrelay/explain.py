"""Explain: the packet's way through one input, step by step: what holds, what does not, and what mends it.

The walk is in the order in which a packet takes it: the daemon, the rule that takes it (or almost does), what is
between the wire and the daemon (arrival.py), the worker that it is steered to, the rule's counters, and what is between
the daemon and the next hop (departure.py). Pure: judges the facts of a Case.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from mcrelay import arrival, departure
from mcrelay.facts import Case, Daemon, Finding, command, grew
from mcrelay.nearness import Candidate, outputs_for
from mcrelay.reasons import REASONS, remedy

BPF_BIT: Final = 39
SYS_ADMIN_BIT: Final = 21  # which stands for CAP_BPF, too
SHOWN_MAX: Final = 4  # workers, or other rules, one by one


def explain(case: Case) -> list[Finding]:
    findings = [*daemon(case.daemon), *_rules(case)]
    if case.daemon.elsewhere is not None:
        return findings
    findings += [*arrival.interfaces(case), *arrival.packets(case)]
    taking = case.choice.taking
    if taking is not None:
        findings += [*_filter(case), *_workers(case, taking), *_counters(case, taking)]
        findings += departure.outputs(case, taking)
    return findings


def daemon(facts: Daemon) -> Iterator[Finding]:
    if facts.problem is not None:
        yield Finding("daemon", "bad" if facts.is_at_fault else "unknown", facts.problem, facts.remedy)
        return
    yield Finding("daemon", "ok", f"mcrelay {facts.version} answers at {facts.path}")
    if facts.elsewhere is not None:
        fact = "the daemon is in another network namespace: interfaces and traffic have to be looked at there"
        yield Finding("namespace", "bad", fact, facts.elsewhere)


# --- rules ------------------------------------------------------------------------------------------------------------


def _rules(case: Case) -> Iterator[Finding]:
    if case.daemon.listing is None:
        yield Finding("rule", "unknown", "not known: the daemon was not asked")
        return
    taking = case.choice.taking
    if taking is None:
        near = case.choice.near
        outputs = outputs_for(case.given, near[0].rule.outputs if near else ())
        fact = f"no rule takes {case.given}, of {len(case.daemon.rules):,}"
        is_there = case.given.is_pattern or any(case.given.is_on(name) for name in case.host.links)
        yield Finding("rule", "bad", fact, command("mcrelay", "add", case.given, *outputs) if is_there else None)
    else:
        yield from _taken(case, taking)
    for candidate in case.choice.passed_over[:SHOWN_MAX]:
        fact = f"{_called(candidate)} would take it, too; the other is more specific"
        yield Finding("other rule", "note", fact)
    for candidate in case.choice.near if taking is None else ():
        paused = "; all of its outputs are paused" if candidate.is_paused else ""
        fact = f"{_called(candidate)} almost takes it. {_sentence(candidate.differences)}{paused}"
        yield Finding("other rule", "note", fact, command("mcrelay", "explain", candidate.rule.input))


def _sentence(differences: Iterable[str]) -> str:
    text = "; ".join(differences)
    return text[:1].upper() + text[1:]


def _called(candidate: Candidate) -> str:
    name = f"{candidate.rule.name} " if candidate.rule.name else ""
    return f"rule {name}{candidate.facts.id} for {candidate.rule.input}"


def _taken(case: Case, taking: Candidate) -> Iterator[Finding]:
    problems = "; ".join(taking.facts.problems)
    match taking.facts.state:
        case "active":
            yield Finding("rule", "ok", f"{_called(taking)} takes it: active, {_outputs(taking)}")
        case "suspended":
            mending = remedy("loop", rule=case.text)
            yield Finding("rule", "bad", f"{_called(taking)} is suspended: {problems}", mending)
        case state:
            yield Finding("rule", "bad", f"{_called(taking)} is {state}: {problems}")
    if taking.is_paused:
        yield Finding("rule", "note", f"all outputs of {_called(taking)} are paused: it sends nothing")


def _outputs(taking: Candidate) -> str:
    number = len(taking.rule.outputs)
    return f"{number} output" + ("s" if number != 1 else "")


# --- the daemon's part ------------------------------------------------------------------------------------------------


def _filter(case: Case) -> Iterator[Finding]:
    """The kernel's filter in front of the daemon's packet sockets, which cannot be asked what it admits."""
    capabilities = case.daemon.capabilities
    if capabilities is None:
        yield Finding("filter", "unknown", "what the daemon may do is not known")
    elif case.daemon.is_rootless:
        yield from _ordinary_sockets(case)
    elif capabilities >> BPF_BIT & 1 or capabilities >> SYS_ADMIN_BIT & 1:
        moved = _taken_up(case)
        came = sum(flow.packets for flow in case.wanted().values())
        if moved is not None and came and not moved:
            fact = f"{came:,} packets came, and the daemon's sockets on {', '.join(case.ingress())} took none up"
            yield Finding("filter", "bad", fact, "mcrelay workers  # then: mcrelay restart-worker N, for each of them")
        else:
            took = f"; its sockets took up {moved:,} frames meanwhile" if moved is not None else ""
            yield Finding("filter", "ok", f"the daemon may load it (CAP_BPF){took}")
    else:
        fact = "the daemon has no CAP_BPF: its workers look at each packet of the interface, wanted or not"
        yield Finding("filter", "note", fact, "sudo mcrelay run")


def _ordinary_sockets(case: Case) -> Iterator[Finding]:
    """In front of a rootless daemon's sockets is all that is in front of any program's."""
    came = sum(flow.packets for flow in case.wanted().values())
    if came and _taken_up(case) == 0:
        fact = f"{came:,} packets came, and the kernel gave none to the rootless daemon: it has no route back to their "
        fact += "source (rp_filter), or a firewall drops them"
        settings = (f"net.ipv4.conf.{name.replace('.', '/')}.rp_filter=0" for name in ("all", *case.ingress()))
        yield Finding("sockets", "bad", fact, command("sysctl", "-w", *settings))
    else:
        fact = "the daemon is rootless: its ordinary sockets get only what this host's kernel accepts"
        yield Finding("sockets", "note", fact, "sudo mcrelay run  # for the rest")


def _taken_up(case: Case) -> int | None:
    """Frames that the daemon read from the input's interfaces meanwhile."""
    if case.daemon.earlier is None or case.daemon.listing is None:
        return None
    before = {facts.name: facts.frames for facts in case.daemon.earlier.interfaces}
    after = {facts.name: facts.frames for facts in case.daemon.listing.interfaces}
    names = [name for name in after if case.given.is_on(name) and name in before]
    return sum(after[name] - before[name] for name in names) if names else None


def _workers(case: Case, taking: Candidate) -> Iterator[Finding]:
    workers = {worker.index: worker for worker in case.daemon.workers}
    if not workers:
        yield Finding("worker", "unknown", "the daemon's workers are not known")
        return
    owners = taking.rule.owners(len(workers))
    ready = [index for index in owners if index in workers and workers[index].state == "ready"]
    if len(ready) > SHOWN_MAX:
        yield Finding("worker", "ok", f"steered to {len(ready)} of {len(workers)} data planes, by destination: ready")
    for index in owners:
        worker = workers.get(index)
        if worker is None:
            yield Finding("worker", "bad", f"data/{index} is not there", command("mcrelay", "workers"))
        elif worker.state != "ready" or len(ready) <= SHOWN_MAX:
            fact = f"steered to data/{index} of {len(workers)}: {worker.state}"
            if worker.state == "ready":
                fact += f", core {worker.cores}, {worker.engine}"
            if worker.restarts:
                fact += f", restarted {worker.restarts} times"
            log = "journalctl -u mcrelay -n 50  # the daemon's log says why"
            yield Finding("worker", *(("ok", fact) if worker.state == "ready" else ("bad", fact, log)))


def _counters(case: Case, taking: Candidate) -> Iterator[Finding]:
    growth = case.daemon.rule_growth(taking.facts.id)
    seconds = case.daemon.seconds
    if growth is None:
        yield Finding("counters", "unknown", "the rule was not counted all the time")
        return
    before, after = growth
    packets = after.packets - before.packets
    came = sum(flow.packets for flow in case.wanted().values())
    if packets:
        forwarded, dropped = after.forwarded - before.forwarded, after.dropped - before.dropped
        fact = f"the rule took {packets:,} packets within {seconds:.1f} s: {forwarded:,} forwarded, {dropped:,} dropped"
        yield Finding("counters", "ok" if forwarded or not dropped else "bad", fact)
    elif came:
        yield from _uncounted(case, came, after.own - before.own, after.looped - before.looped)
    else:
        fact = f"the rule took nothing within {seconds:.1f} s, {after.packets:,} packets since it is there"
        yield Finding("counters", "unknown" if case.seen.problem else "note", fact)
    for reason, number in grew(
        {"own": before.own, "loop": before.looped}, {"own": after.own, "loop": after.looped}
    ).items():
        known = REASONS[reason]
        fact = f"{number:,} packets matched the rule and were dropped as {reason}: {known.cause}"
        yield Finding("counters", "bad", fact, remedy(reason, rule=case.text))


def _uncounted(case: Case, came: int, own: int, looped: int) -> Iterator[Finding]:
    """Packets came, and the rule did not take them: what did the workers do with them?"""
    if own or looped:
        return
    ingress = min(case.ingress(), default="INTERFACE")
    grown = case.daemon.drops_growth()
    what = f"{came:,} packets came, and the rule took none"
    if not grown:
        yield Finding("counters", "bad", f"{what}; workers dropped none either", command("mcrelay", "workers"))
    for reason, packets in sorted(grown.items(), key=lambda item: -item[1])[:3]:
        known = REASONS.get(reason)
        cause = f": {known.cause}" if known else ""
        mending = remedy(reason, ingress=ingress, rule=case.text) if known else None
        yield Finding("counters", "bad", f"{what}; workers dropped {packets:,} as {reason}{cause}", mending)

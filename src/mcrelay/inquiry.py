"""Inquiry: the facts of a diagnosis, gathered and judged.

Asks the daemon before and after some seconds, looks at the host and at what comes in meanwhile, and gives all of it to
mcrelay.explain or mcrelay.doctor. Runs in the hands of whoever types the command, with the rights that person has, and
changes nothing, but that net/watch.py may join a group for that time.
"""

from __future__ import annotations

import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final

from mcrelay import departure, doctor, explain
from mcrelay.api import RuleFacts
from mcrelay.client import DEFAULT_SOCKET, Client
from mcrelay.errors import Error, NotPermitted, UsageError
from mcrelay.facts import Case, Daemon, Finding, Host, Sightings, is_too_wide
from mcrelay.nearness import Candidate, Choice, choose, parsed
from mcrelay.net.survey import in_our_network, lockable_memory, relays, survey, with_routes
from mcrelay.net.watch import watch
from mcrelay.rules import Input
from mcrelay.ruletext import parse_input

JOIN_MAX: Final = 8  # interfaces of a pattern that a group is joined on for the time of looking
ASKING: Final = re.compile(
    r"mcrelay (run|explain|doctor|add|remove|pause|resume|list|stats|workers|restart-worker|upgrade)\b"
)


def about(given: Input, seconds: float, path: str) -> list[Finding]:
    """What is found on the way of an input's packets."""
    earlier = survey()
    daemon, seen = _ask(path, lambda facts: watch(given, seconds, _not_joined(given, earlier, facts), given.source))
    if seen.problem:
        seen.remedy = _with_sudo(path)
    host = survey()
    choice = choose(given, daemon.rules)
    if choice.taking is not None:
        host = _on_the_way_out(choice.taking)
    findings = explain.explain(Case(given, choice, host, earlier, daemon, seen))
    return [_at(path, finding) for finding in findings]


def at_large(seconds: float, path: str) -> list[Finding]:
    """What is found of the host and the daemon."""
    earlier = survey()
    daemon, _nothing = _ask(path, lambda _facts: time.sleep(seconds))
    host = with_routes(survey(earlier.links), doctor.wanted_routes(daemon.rules))
    host = replace(host, relays=dict(relays()))
    findings = doctor.examine(doctor.Patient(host, earlier, daemon, seconds))
    return [_at(path, finding) for finding in findings]


def of_routes(facts: RuleFacts, client: Client) -> list[Finding]:
    """What is wrong with the routes of a rule's outputs. Nothing where that cannot be told from here."""
    rule = parsed(facts)
    if rule is None:
        return []
    supervisor = next((process.pid for process in client.workers() if process.role == "supervisor"), None)
    if supervisor is None or not in_our_network(supervisor):
        return []
    taking = Candidate(facts, rule, ())
    host = _on_the_way_out(taking)
    case = Case(rule.input, Choice(taking), host, host, Daemon(""), Sightings(0.0))
    found = departure.outputs(case, taking)
    return [finding for finding in found if finding.verdict == "bad" and finding.step.endswith(" route")]


def _on_the_way_out(candidate: Candidate) -> Host:
    """With the settings and the routes that the outputs of a rule depend on."""
    names = [output.interface for output in candidate.rule.outputs]
    return with_routes(survey(names), departure.wanted_routes(candidate))


def parse(text: str, source: str | None) -> Input:
    given = parse_input(text)
    if source is None:
        return given
    if given.source is not None:
        raise UsageError(f"input {text!r} has a source, and --from {source} names one, too", "give one of them")
    return parse_input(f"{source}@{text}")


def _not_joined(given: Input, host: Host, facts: Daemon) -> Sequence[str]:
    """The interfaces where nobody asks for the group, or as far as is known only for it from others."""
    if not given.address.is_multicast or given.prefix is not None:
        return []
    taking = choose(given, facts.earlier.rules if facts.earlier else ()).taking
    if taking is not None and is_too_wide(taking.rule.input):
        return []  # a rule that joins nothing: whether its groups come all the same is the question
    joined = {
        one.interface
        for one in host.joined
        if one.group == given.address and (not one.sources or given.source in one.sources)
    }
    names = [name for name, link in host.links.items() if given.is_on(name) and link.is_up and not link.is_loopback]
    return [name for name in names if name not in joined][:JOIN_MAX]


# --- the daemon -------------------------------------------------------------------------------------------------------


def _ask(path: str, meanwhile: Callable[[Daemon], Any]) -> tuple[Daemon, Any]:
    """What the daemon says before and after; `meanwhile` happens in any case."""
    facts, client = Daemon(path), None
    try:
        client = Client(path)
        facts = replace(
            facts,
            version=client.version().version,
            earlier=client.listing(),
            processes=client.workers(),
            before=client.stats(),
        )
    except Error as error:
        facts = _unasked(path, error)
    started = time.monotonic()
    happened = meanwhile(facts)
    if client is None or facts.problem is not None:
        return facts, happened
    try:
        with client:
            took = time.monotonic() - started
            facts = replace(facts, after=client.stats(), listing=client.listing(), processes=client.workers())
    except Error as error:
        return _unasked(path, error), happened
    return _placed(replace(facts, seconds=took)), happened


def _unasked(path: str, error: Error) -> Daemon:
    if error.code == NotPermitted.code:
        return Daemon(path, problem=error.message, remedy=_with_sudo(path), is_at_fault=False)
    start = "sudo mcrelay run" + (f" --socket {shlex.quote(path)}" if path != DEFAULT_SOCKET else "")
    return Daemon(path, problem=error.message, remedy=start if error.code == "unavailable" else error.hint or None)


def _at(path: str, finding: Finding) -> Finding:
    """The finding with commands for the same daemon."""
    if finding.remedy is None or path == DEFAULT_SOCKET:  # a variable would not survive sudo
        return finding
    commands, hash_sign, comment = finding.remedy.partition("  #")
    option = f" --socket {shlex.quote(path)}"
    asked = [one + option if ASKING.match(one) and "--socket" not in one else one for one in commands.split(" && ")]
    return replace(finding, remedy=" && ".join(asked) + hash_sign + comment)


def _with_sudo(path: str) -> str:
    """The same command again, with more rights."""
    return shlex.join(["sudo", *_again(path)])


def _again(path: str) -> list[str]:
    """The same command, for the same daemon even where the environment is another one."""
    arguments = sys.argv[1:]
    said = path == DEFAULT_SOCKET or any(word.partition("=")[0] == "--socket" for word in arguments)
    return ["mcrelay", *arguments, *([] if said else ["--socket", path])]


def _placed(daemon: Daemon) -> Daemon:
    """What the kernel says of the supervisor."""
    pid = next((process.pid for process in daemon.processes if process.role == "supervisor"), None)
    if pid is None:
        return daemon
    elsewhere = None
    if in_our_network(pid) is False:
        elsewhere = shlex.join(["sudo", "nsenter", f"--net=/proc/{pid}/ns/net", *_again(daemon.path)])
    return replace(daemon, elsewhere=elsewhere, locked_memory=lockable_memory(pid))

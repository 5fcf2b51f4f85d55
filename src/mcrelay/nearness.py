"""Nearness: which rule takes what an input describes, and which almost do, and why they do not.

An input is a description of packets here: of a destination, a port, an interface, perhaps a source. Owns the comparison
of one input with another, in words. Which of several rules comes first is that of rules.py. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from mcrelay.api import RuleFacts
from mcrelay.errors import RuleError
from mcrelay.rules import Input, Output, Rule, bits, masked
from mcrelay.ruletext import parse_rule

# How far a rule may be to be near. Each difference is one step, and another group is two: many rules share their port.
NEAR_MAX: Final = 3
ADDRESS_STEPS: Final = 2
OTHER_WORLD_STEPS: Final = NEAR_MAX + 1  # another IP version, or a group where a host was asked about
SHOWN_MAX: Final = 3


@dataclass(frozen=True)
class Candidate:
    """A rule of the daemon, and what keeps it from taking what was asked about."""

    facts: RuleFacts
    rule: Rule
    differences: tuple[str, ...]
    distance: int = 0

    @property
    def is_paused(self) -> bool:
        return all(output.paused for output in self.rule.outputs)


@dataclass(frozen=True)
class Choice:
    """`taking` is the rule that takes it; `passed_over` would if that one were not there; `near` do not."""

    taking: Candidate | None
    passed_over: Sequence[Candidate] = ()
    near: Sequence[Candidate] = ()


def choose(given: Input, rules: Iterable[RuleFacts]) -> Choice:
    """Of all rules, those that have to do with packets of this description."""
    candidates = [candidate for facts in rules if (candidate := _compare(given, facts))]
    for candidate in candidates:
        if candidate.rule.input == given:
            return Choice(candidate, near=_near(given, candidates))
    matching = sorted((c for c in candidates if not c.differences), key=_precedence)
    return Choice(matching[0] if matching else None, matching[1:], _near(given, candidates))


def _near(given: Input, candidates: Iterable[Candidate]) -> list[Candidate]:
    """Of those that are equally near, first the ones whose address begins like the one that was asked about."""
    near = [candidate for candidate in candidates if 1 <= candidate.distance <= NEAR_MAX]
    near.sort(key=lambda c: (c.distance, int(c.rule.input.address) ^ int(given.address)))
    return [candidate for candidate in near if candidate.distance == near[0].distance][:SHOWN_MAX]


def _compare(given: Input, facts: RuleFacts) -> Candidate | None:
    rule = parsed(facts)
    if rule is None:
        return None
    found = tuple(differences(given, rule.input))
    own, asked = rule.input.address, given.address
    if (own.version, own.is_multicast) != (asked.version, asked.is_multicast):
        steps = OTHER_WORLD_STEPS
    else:
        steps = len(found) + (0 if _holds(rule.input, given) else ADDRESS_STEPS - 1)
    return Candidate(facts, rule, found, steps)


def outputs_for(given: Input, like: Iterable[Output]) -> tuple[object, ...]:
    """Outputs to propose for a rule with this input: like these, if it may have them."""
    texts = [str(replace(output, paused=False)) for output in like]
    try:
        return parse_rule(str(given), texts).outputs
    except RuleError:
        return (f"ADDRESS:{'esp' if given.protocol == 'esp' else 'PORT'}%INTERFACE",)


def parsed(facts: RuleFacts) -> Rule | None:
    """None if the daemon knows more of rules than we do."""
    try:
        return parse_rule(facts.input, facts.outputs, facts.name)
    except RuleError:
        return None


def _precedence(candidate: Candidate) -> tuple[int, bool, bool, bool, int]:
    """The rule that comes first sorts first."""
    own = candidate.rule.input
    return (
        -_length(own),
        own.source is None,
        own.port is None,
        own.is_pattern,
        -len(own.interface),
    )


def differences(given: Input, own: Input) -> Iterable[str]:
    """Why a rule for `own` does not take all of what `given` describes."""
    if own.address.version != given.address.version:
        yield f"IPv{own.address.version}: it is for {own.address}"
    elif not _holds(own, given):
        if own.prefix is not None:
            yield f"other groups: its {own.address}/{own.prefix} does not hold {given.address}"
        elif given.prefix is not None and masked(own.address, given.prefix) == int(given.address):
            yield f"a part only: it is for {own.address} alone"
        else:
            yield f"another address: it is for {own.address}"
    if own.protocol != given.protocol:
        yield f"another protocol: it is for {own.protocol.upper()}"
    elif own.port is not None and own.port != given.port:
        yield f"another port: it is for {own.port}"
    if not own.is_on(given.interface):
        yield f"another interface: it is for {own.interface}"
    if own.vlan != given.vlan:
        yield f"it is for VLAN {own.vlan}" if own.vlan is not None else "it is for untagged packets"
    if own.source is not None and own.source != given.source:
        yield f"another source: it is for packets from {own.source}"


def _length(own: Input) -> int:
    return bits(own.address) if own.prefix is None else own.prefix


def _holds(own: Input, given: Input) -> bool:
    if own.address.version != given.address.version:
        return False
    prefix = _length(own)
    return prefix <= _length(given) and masked(own.address, prefix) == masked(given.address, prefix)

"""Cycles: rule sets that feed themselves.

A rule feeds another if it sends to what the other takes. Two kinds of that are told apart. What leaves by an interface
whose other end is in this host (a loopback device, a veth pair) really comes in again. What leaves by any other does
not: packet sockets do not see what their own host sends. So a set that relays one group between segments in both
directions, address and port unchanged, is no cycle: it is how mDNS and the like are relayed. Any other cycle either
feeds itself at once, or would as soon as another relay or a cable sends something back; nobody wants that.

Pure: which interfaces hear each other is told by whoever knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final

from mcrelay.errors import RuleError
from mcrelay.rules import Output, Rule, Target

SHOWN_MAX: Final = 8  # rules of a cycle that are spelled out

Heard = Mapping[str, Iterable[str]]  # interface -> interfaces of this host that hear what it sends
Find = Callable[[Target], Rule | None]  # the rule with this input
Step = tuple[Rule, bool]  # a rule, and whether the way to it makes a cycle one


def check_no_cycle(rule: Rule, find: Find, heard: Heard) -> None:
    """RuleError with the cycle spelled out if the rule is part of one. `find` knows the rule, too."""
    start: Step = (rule, False)
    came_from: dict[tuple[str, bool], tuple[Step, Output]] = {}
    left = [start]
    while left:
        step = left.pop()
        for output, fed, counts in _feeds(step[0], find, heard):
            following = (fed, step[1] or counts)
            key = (fed.id, following[1])
            if key in came_from:
                continue
            came_from[key] = (step, output)
            if key == (rule.id, True):
                raise RuleError(
                    f"rule {rule.label} closes a cycle: {_spell(rule, came_from)}",
                    "leave one of them out; to relay one group both ways, keep its address and port",
                )
            left.append(following)


def _feeds(rule: Rule, find: Find, heard: Heard) -> Iterator[tuple[Output, Rule, bool]]:
    """Each output that feeds a rule, that rule, and whether a cycle by way of it is one."""
    for output in rule.outputs:
        ends = tuple(heard.get(output.interface, ()))
        changed = (output.address, output.port) != (rule.input.group, rule.input.port)
        if output.interface not in ends and (fed := find((output.address, output.port, output.interface))):
            yield output, fed, changed
        for end in ends:
            if fed := find((output.address, output.port, end)):
                yield output, fed, True


def _spell(rule: Rule, came_from: dict[tuple[str, bool], tuple[Step, Output]]) -> str:
    """From the rule's input by way of each output to that input again."""
    parts: list[str] = []
    key = (rule.id, True)
    while True:
        (before, counts), output = came_from[key]
        parts.append(f"{output} (rule {before.label})")
        key = (before.id, counts)
        if key == (rule.id, False):
            break
    parts.reverse()
    if len(parts) > SHOWN_MAX:
        parts[SHOWN_MAX - 1 : -1] = [f"{len(parts) - SHOWN_MAX} more"]
    return " -> ".join([str(rule.input), *parts, str(rule.input)])

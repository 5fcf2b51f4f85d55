"""Cycles: rule sets that feed themselves.

A rule feeds another if it sends to what the other takes. Two kinds of that are told apart. What leaves by an interface
whose other end is in this host (a loopback device, a veth pair, a bridge in front of one) really comes in again. What
leaves by any other does not: packet sockets do not see what their own host sends. So a set that relays one group
between segments in both directions, address and port unchanged, is no cycle: it is how mDNS and the like are relayed.
Any other cycle either feeds itself at once, or would as soon as another relay or a cable sends something back; nobody
wants that.

Pure: where what is sent comes in again is told by whoever knows. Takes time in proportion to the rules that are reached
and to who feeds whom among them.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from typing import Final

from mcrelay.errors import RuleError
from mcrelay.rules import Output, Rule, Target

SHOWN_MAX: Final = 8  # rules of a cycle that are spelled out

Heard = Callable[[Target], Iterable[Target]]  # as what, and where, this host hears what it sends there
Find = Callable[[Target], Iterable[Rule]]  # the rules that may take what is sent there
Feed = tuple[Rule, Output, Rule, bool]  # who feeds, by what, whom, and whether a cycle by way of it is one


class Cycle(RuleError):
    """A circle of feeds, of which one of the added rules is part. Without the first of them, that makes it one, it is
    none: `rule` and `output` are who feeds there, and by what."""

    def __init__(self, feeds: list[Feed], added: Container[str]) -> None:
        closing = next((feed[0] for feed in feeds if feed[0].id in added), feeds[0][0])
        super().__init__(
            f"rule {closing.label} closes a cycle: {_spell(feeds)}", "send to another group, port or interface"
        )
        self.rule, self.output, *_others = feeds[0]


def check_no_cycle(added: Iterable[Rule], find: Find, heard: Heard) -> None:
    """Cycle, spelled out, if one of these rules is part of one. `find` knows them, too."""
    for _step in look_for_cycle(added, find, heard):
        pass


def look_for_cycle(added: Iterable[Rule], find: Find, heard: Heard) -> Iterator[None]:
    """The same in small steps, for those who have something else to do in between. No rule may change meanwhile."""
    component: dict[str, int] = {}  # by rule id: rules that feed each other have the same
    reached: dict[str, Rule] = {}  # those that feed any
    culprits: dict[int, Rule] = {}  # an added rule for each component that has one
    ids: set[str] = set()
    for rule in added:
        ids.add(rule.id)
        if rule.id not in component:
            yield from _find_components(rule, component, reached, find, heard)
        culprits.setdefault(component[rule.id], rule)
    # The added ones first, as people would tell it.
    for rule in {rule.id: rule for rule in [*culprits.values(), *reached.values()] if rule.id in reached}.values():
        for feed in _feeds(rule, find, heard):
            yield
            if feed is None:
                continue
            _rule, _output, fed, counts = feed
            if counts and component[fed.id] == component[rule.id] and component[rule.id] in culprits:
                raise Cycle(_cycle_by(feed, component, find, heard), ids)


def _feeds(rule: Rule, find: Find, heard: Heard) -> Iterator[Feed | None]:
    """Whom it feeds; None for each output that was looked at. One that is paused feeds nobody."""
    for output in rule.outputs:
        if output.paused:
            yield None
            continue
        target = rule.target(output)
        ends = tuple(heard(target))
        changed = not rule.keeps_destination(output)
        if target not in ends:
            for fed in find(target):
                yield rule, output, fed, changed
        for end in ends:
            for fed in find(end):
                yield rule, output, fed, True
        yield None


def _find_components(
    start: Rule, component: dict[str, int], reached: dict[str, Rule], find: Find, heard: Heard
) -> Iterator[None]:
    """Number the strongly connected components of what the rule reaches (Tarjan), without recursion: a chain may be as
    long as there are rules. A number is that of the component's first rule."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    path: list[str] = []  # reached, and not yet in a component
    stack = [(start, _feeds(start, find, heard))]
    first = len(component)
    order[start.id] = lowest[start.id] = first
    path.append(start.id)
    while stack:
        rule, feeds = stack[-1]
        for feed in feeds:
            yield
            if feed is None:
                continue
            _rule, _output, fed, _counts = feed
            reached[rule.id] = rule
            if fed.id in component:
                continue
            if fed.id in order:
                lowest[rule.id] = min(lowest[rule.id], order[fed.id])
                continue
            order[fed.id] = lowest[fed.id] = first + len(order)
            path.append(fed.id)
            stack.append((fed, _feeds(fed, find, heard)))
            break
        else:
            stack.pop()
            if stack:
                above = stack[-1][0].id
                lowest[above] = min(lowest[above], lowest[rule.id])
            if lowest[rule.id] == order[rule.id]:
                while path[-1] != rule.id:
                    component[path.pop()] = order[rule.id]
                component[path.pop()] = order[rule.id]


def _cycle_by(first: Feed, component: dict[str, int], find: Find, heard: Heard) -> list[Feed]:
    """A shortest cycle that begins with this feed, which is one within its component."""
    start, _output, fed, _counts = first
    came_by: dict[str, Feed] = {fed.id: first}
    left = [fed]
    for rule in left:  # grows while it is gone through
        if rule.id == start.id:
            break
        for feed in filter(None, _feeds(rule, find, heard)):
            following = feed[2]
            if component[following.id] == component[start.id] and following.id not in came_by:
                came_by[following.id] = feed
                left.append(following)
    way = [came_by[start.id]]
    while way[-1] is not first:
        way.append(came_by[way[-1][0].id])
    return way[::-1]


def _spell(cycle: list[Feed]) -> str:
    """Each rule with the output that feeds the next one."""
    parts = [_spell_feed(feed) for feed in cycle]
    if len(parts) > SHOWN_MAX:
        parts[SHOWN_MAX - 1 : -1] = [f"{len(parts) - SHOWN_MAX} more"]
    return ", ".join(parts)


def _spell_feed(feed: Feed) -> str:
    rule, output, fed, _counts = feed
    heard = f", heard at {fed.input.interface}" if fed.input.interface != output.interface else ""
    return f"{rule.input} -> {output}{heard} (rule {rule.label})"

"""Patterns: the interfaces that rules with a pattern stand for, chosen so that all rules fit a worker's table.

A pattern (eth+) is an entry of the table for each interface that it stands for, with all its outputs, so a few hundred
rules and some dozens of interfaces fill it. Owns the count of that, the choice of interfaces, and what workers know of
it; links.py, whose turns this happens in, has the interfaces. An interface is either there for all patterns that match
its name or left out of all. The count is that of all rules, as if one worker had them all: whether a rule is taken does
not depend on how the kernel steers.

Workers are told before such an interface is given to them and before its slot is another's, so that a rule knows an
interface before the first frame comes in by it, and never takes one of a stranger.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Final, NamedTuple

from mcrelay.children import Child
from mcrelay.errors import RuleError
from mcrelay.limits import OUTPUTS_MAX, RULES_MAX
from mcrelay.messages import SetPatternInterfaces
from mcrelay.net.attachments import Attachments
from mcrelay.rules import Rule

log = logging.getLogger(__name__)

ENTRY_S: Final = 0.0001  # that a worker may take for each entry of its table
NAMED: Final = ""  # in the place of a pattern: of all rules that name their interface


class Load(NamedTuple):
    """What something takes of a table."""

    entries: int
    outputs: int

    def __add__(self, other: object) -> Load:
        assert isinstance(other, Load)
        return Load(self.entries + other.entries, self.outputs + other.outputs)

    @property
    def fits(self) -> bool:
        return self.entries <= RULES_MAX and self.outputs <= OUTPUTS_MAX


class Loads:
    """What rules take of a table, by pattern."""

    def __init__(self) -> None:
        self._rules: Counter[str] = Counter()
        self._outputs: Counter[str] = Counter()

    def changed(self, added: Iterable[Rule], removed: Iterable[Rule]) -> Loads:
        """With these rules more and those less."""
        other = Loads()
        other._rules, other._outputs = Counter(self._rules), Counter(self._outputs)
        for rule in removed:
            other.count(rule, -1)
        for rule in added:
            other.count(rule)
        return other

    def count(self, rule: Rule, times: int = 1) -> None:
        key = rule.input.interface if rule.input.is_pattern else NAMED
        self._rules[key] += times
        self._outputs[key] += times * len(rule.outputs)
        if not self._rules[key]:
            del self._rules[key], self._outputs[key]

    @property
    def has_patterns(self) -> bool:
        return len(self._rules) > (NAMED in self._rules)

    def of(self, name: str) -> Load:
        """Of an interface: one entry for each rule with a pattern that matches. Nothing if none does."""
        keys = [key for key in self._rules if key != NAMED and name.startswith(key[:-1])]
        return Load(sum(self._rules[key] for key in keys), sum(self._outputs[key] for key in keys))

    def total(self, names: Iterable[str]) -> Load:
        """Of all rules, if patterns stand for these interfaces as far as they match."""
        total = Load(self._rules[NAMED], self._outputs[NAMED])
        for name in names:
            total += self.of(name)
        return total


class PatternLinks:
    """`workers`: the data planes to tell; others are told by introduce() when they come up."""

    def __init__(self, attachments: Attachments, workers: Callable[[], Sequence[Child]]) -> None:
        self._attachments = attachments
        self._workers = workers
        self._loads = Loads()  # of active rules
        self._told: dict[str, int] = {}  # name and slot of each interface that patterns are for
        self._is_unsure = False  # some worker may not know that

    def count(self, rule: Rule, times: int = 1) -> None:
        """The rule is active; with -1 it is no longer."""
        self._loads.count(rule, times)

    def names(self) -> set[str]:
        """What active patterns stand for."""
        return {name for _rule, names in self._attachments.patterns() for name in names}

    @property
    def patience_s(self) -> float:
        """How much longer a worker may take to compile all that patterns stand for."""
        return self._loads.total(self._told).entries * ENTRY_S if self._loads.has_patterns else 0.0

    def check(self, names: Iterable[str], added: Iterable[Rule], removed: Iterable[Rule]) -> None:
        """RuleError if the table has no room for the rules after this change, with patterns for these interfaces."""
        after = self._loads.changed(added, removed)
        if not after.has_patterns:
            return  # there are no more rules and outputs than counters
        load = after.total(names)
        if not load.fits:
            raise RuleError(
                f"a pattern counts once for each interface that it matches: that would be {load.entries} rules of at "
                f"most {RULES_MAX}, with {load.outputs} outputs of at most {OUTPUTS_MAX}",
                "use patterns that match fewer interfaces, fewer rules or outputs, or another daemon for the rest",
            )

    def choose(self, present: Iterable[str], claim: Callable[[str], None]) -> set[str]:
        """The interfaces for active patterns to stand for: what they stand for now first, as many as there is room
        for. Those that have no entry yet are claimed; those that there is no room for are left out."""
        before, matching = self.names(), {name: load for name in present if (load := self._loads.of(name)).entries}
        chosen: set[str] = set()
        total = self._loads.total(())
        left_out: dict[str, str] = {}
        for name in sorted(matching, key=lambda name: (name not in before, name)):
            if not (total + matching[name]).fits:
                left_out[name] = "all rules for all their interfaces would be more than a worker's table takes"
            elif name not in self._attachments and self._attachments.is_full:
                left_out[name] = "a daemon serves no more interfaces"
            else:
                if name not in self._attachments:
                    claim(name)
                total += matching[name]
                chosen.add(name)
        for name in left_out.keys() - self._attachments.left_out:
            log.warning("interface %s is left out of the patterns that match it: %s", name, left_out[name])
        self._attachments.left_out = set(left_out)
        return chosen

    def adopt(self, names: Iterable[str]) -> None:
        """Patterns are for these interfaces. Before there are workers."""
        self._told = {name: self._attachments[name].slot for name in sorted(names)}

    async def tell(self, names: Iterable[str]) -> None:
        """Have all workers know that patterns are for these interfaces, which have a slot, and no others. Busy if one
        cannot."""
        told = self._told
        self.adopt(names)
        if told == self._told and not self._is_unsure:
            return
        self._is_unsure = True
        # All of them have to be through before any of it is taken back.
        for result in await asyncio.gather(*map(self.introduce, self._workers()), return_exceptions=True):
            if isinstance(result, BaseException):
                raise result
        self._is_unsure = False

    async def introduce(self, child: Child) -> None:
        ticket = child.ticket()
        message = SetPatternInterfaces(ticket=ticket, slots=self._told)
        await child.command(ticket, (message, ()), patience_s=self.patience_s)

"""Declared rules: how those that run differ from those that a file wants, and the one change that makes them equal.

A rule is known by its input. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from mcrelay.rules import Rule


@dataclass(frozen=True)
class Difference:
    """What has to happen to the rules that run. Empty, and false, if nothing has to."""

    added: tuple[Rule, ...]
    removed: tuple[Rule, ...]
    changed: tuple[tuple[Rule, Rule], ...]  # before and after: of the same input

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.changed)

    @property
    def adds(self) -> tuple[Rule, ...]:
        """What the change adds; a rule that changes is removed and added in one step."""
        return (*self.added, *(after for _before, after in self.changed))

    @property
    def removes(self) -> tuple[Rule, ...]:
        return (*self.removed, *(before for before, _after in self.changed))

    def summary(self) -> str:
        counts = ((len(self.added), "added"), (len(self.removed), "removed"), (len(self.changed), "changed"))
        return ", ".join(f"{count} {what}" for count, what in counts if count) or "nothing to change"

    def lines(self) -> Iterator[str]:
        """For people, as diff(1) marks them."""
        for rule in self.removed:
            yield f"- {_text(rule)}"
        for rule in self.added:
            yield f"+ {_text(rule)}"
        for before, after in self.changed:
            yield f"  {before.label}  {before.input}"
            if before.name != after.name:
                yield f"-   name {before.name or '(none)'}"
                yield f"+   name {after.name or '(none)'}"
            old, new = list(map(str, before.outputs)), list(map(str, after.outputs))
            yield from (f"-   -> {text}" for text in old if text not in new)
            yield from (f"+   -> {text}" for text in new if text not in old)


def difference(running: Iterable[Rule], wanted: Iterable[Rule]) -> Difference:
    """The order of rules and of outputs makes none."""
    before = {rule.id: rule for rule in running}
    after = {rule.id: rule for rule in wanted}
    return Difference(
        added=tuple(rule for rule_id, rule in after.items() if rule_id not in before),
        removed=tuple(rule for rule_id, rule in before.items() if rule_id not in after),
        changed=tuple(
            (before[rule_id], rule)
            for rule_id, rule in after.items()
            if rule_id in before and _essence(before[rule_id]) != _essence(rule)
        ),
    )


def _essence(rule: Rule) -> tuple[str | None, frozenset[str]]:
    return rule.name, frozenset(map(str, rule.outputs))


def _text(rule: Rule) -> str:
    return f"{rule.label}  {rule.input} -> {' '.join(map(str, rule.outputs))}"

"""The flow table: the rules that are active, as the control plane knows them.

Owns each rule's record, what is known of the interfaces that rules name, and which counters are free. It is changed
only by what the supervisor has recorded. Knows nothing of clients or channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from mcrelay.api import RuleFacts
from mcrelay.errors import Busy
from mcrelay.limits import OUTPUTS_MAX, RULES_MAX
from mcrelay.messages import InterfaceRecord, RuleRecord
from mcrelay.rules import GROUPS_JOINED_MAX, Output, Rule, RuleSet
from mcrelay.ruletext import parse_rule
from mcrelay.ways import Direction

OUTPUTS_PER_REPLY: Final = 1500  # of rules listed, so that a reply fits a frame (about 300 bytes each)

NOT_JOINED: Final = (
    f"no group is joined: more than {GROUPS_JOINED_MAX} would be a burden to the network; the rule takes what arrives"
)


class FreeNumbers:
    """The numbers below `limit` that are not in use; those that were never used, without a list of them."""

    def __init__(self, limit: int, used: set[int]) -> None:
        self._fresh = max(used, default=-1) + 1
        self._limit = limit
        self._returned = {n: None for n in range(self._fresh) if n not in used}  # the first one goes first

    def __len__(self) -> int:
        return len(self._returned) + self._limit - self._fresh

    def take(self) -> int:
        if self._returned:
            number = next(iter(self._returned))
            del self._returned[number]
            return number
        self._fresh += 1
        return self._fresh - 1

    def claim(self, number: int) -> None:
        """This one is in use, whoever took it."""
        self._returned.pop(number, None)
        if number >= self._fresh:
            self._returned.update(dict.fromkeys(range(self._fresh, number)))
            self._fresh = number + 1

    def give_back(self, number: int) -> None:
        self._returned[number] = None


@dataclass
class FlowTable:
    """Active rules, each with its record, and the counters that no rule uses."""

    rules: RuleSet = field(default_factory=RuleSet)
    records: dict[str, RuleRecord] = field(default_factory=dict)
    interfaces: dict[str, InterfaceRecord] = field(default_factory=dict)  # that rules name
    generation: int = 0

    def __post_init__(self) -> None:
        """Every counter is free that no record uses."""
        records = self.records.values()
        self._rule_counters = FreeNumbers(RULES_MAX, {record.counter for record in records})
        self._output_counters = FreeNumbers(OUTPUTS_MAX, {n for record in records for n in record.output_counters})

    def reserve(self, rule: Rule) -> RuleRecord:
        """A record with counters of its own. Busy if there are too many rules."""
        if not len(self._rule_counters) or len(self._output_counters) < len(rule.outputs):
            raise Busy(
                f"{len(self.records)} rules are active, there is no room for more",
                f"at most {RULES_MAX} rules with {OUTPUTS_MAX} outputs are possible",
            )
        return RuleRecord(
            input=str(rule.input),
            outputs=tuple(map(str, rule.outputs)),
            name=rule.name,
            counter=self._rule_counters.take(),
            output_counters=tuple(self._output_counters.take() for _ in rule.outputs),
        )

    def free(self, record: RuleRecord) -> None:
        self._rule_counters.give_back(record.counter)
        for counter in record.output_counters:
            self._output_counters.give_back(counter)

    def put(self, record: RuleRecord) -> str:
        """Returns the rule's id."""
        rule = parse_rule(record.input, record.outputs, record.name)
        self.rules.add(rule)
        self.records[rule.id] = record
        self._rule_counters.claim(record.counter)
        for counter in record.output_counters:
            self._output_counters.claim(counter)
        return rule.id

    def replace(self, record: RuleRecord) -> bool:
        """Put a rule in the place of the one with its input, if that is counted in the same place. False if not."""
        rule = parse_rule(record.input, record.outputs, record.name)
        before = self.records.get(rule.id)
        if before is None or (before.counter, before.output_counters) != (record.counter, record.output_counters):
            return False
        self.rules.replace(rule)
        self.records[rule.id] = record
        return True

    def take(self, rule_id: str) -> None:
        self.rules.remove(rule_id)
        self.free(self.records.pop(rule_id))

    def facts(self, rule: Rule) -> RuleFacts:
        """The rule, and whether it works."""
        wrong = self._ingress_problems(rule)
        wrong_outputs = [self._output_problem(rule, output) for output in rule.outputs]
        is_pending = all(wrong) or all(wrong_outputs)
        is_partial = any(wrong) or any(wrong_outputs)
        unjoined = self._unjoined(rule)
        notes = [NOT_JOINED] if rule.input.is_too_wide else []
        return RuleFacts(
            id=rule.id,
            name=rule.name,
            input=str(rule.input),
            outputs=tuple(map(str, rule.outputs)),
            state="pending" if is_pending else "partial" if is_partial or unjoined else "active",
            problems=tuple(
                dict.fromkeys(problem for problem in [*wrong, *wrong_outputs, *unjoined, *notes] if problem)
            ),
        )

    def _ingress_problems(self, rule: Rule) -> list[str | None]:
        """One of each interface that packets come in by."""
        if not rule.input.is_pattern:
            return [self._problem(rule.input.interface, "ingress")]
        names = [
            name
            for name, record in self.interfaces.items()
            if record.present and "ingress" in record.used and rule.input.is_on(name)
        ]
        if not names:
            return [f"there is no interface that {rule.input.interface!r} matches"]
        return [self._problem(name, "ingress") for name in names]

    def _output_problem(self, rule: Rule, output: Output) -> str | None:
        direction = rule.way(output).direction
        record = self.interfaces.get(output.interface)
        version = rule.address_of(output).version
        problem = self._problem(output.interface, direction)
        # Others have a way for each version; here we write the address ourselves.
        writes_address = direction in ("frame", "raw4", "raw6") and output.source is None
        if record and not problem and writes_address and version not in record.versions:
            return f"interface {record.name!r} has no IPv{version} address to send from"
        return problem

    def _problem(self, interface: str, direction: Direction) -> str | None:
        record = self.interfaces.get(interface)
        return record.problems.get(direction) if record else None

    def _unjoined(self, rule: Rule) -> list[str]:
        """The groups that could not be joined for the rule."""
        return [
            record.unjoined[membership.text]
            for name, record in self.interfaces.items()
            if record.unjoined and rule.input.is_on(name)
            for membership in rule.input.memberships(name)
            if membership.text in record.unjoined
        ]

    def page(self, after: str | None) -> tuple[list[tuple[Rule, RuleRecord]], bool]:
        """As many rules as fit a reply, from behind the one with the id `after` on, and whether there are more. Busy if
        that one is gone."""
        page: list[tuple[Rule, RuleRecord]] = []
        weight = 0
        for rule, record in self.after(after):
            weight += 1 + len(rule.outputs)
            if page and weight > OUTPUTS_PER_REPLY:
                return page, True
            page.append((rule, record))
        return page, False

    def after(self, rule_id: str | None) -> Iterator[tuple[Rule, RuleRecord]]:
        """Rules in the order of their addition, from behind `rule_id` on. Busy if that one is gone."""
        if rule_id is not None and rule_id not in self.rules:
            raise Busy("the rules changed while they were listed", "ask again from the start")
        skipping = rule_id is not None
        for rule in self.rules:
            if not skipping:
                yield rule, self.records[rule.id]
            elif rule.id == rule_id:
                skipping = False

"""What an import has found: rules, settings, and what has no equivalent; and the configuration file that says it.

Rules are checked as if they had been typed. Those of one input become one, since an input belongs to one rule.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from mcrelay.errors import BadConfig, RuleError
from mcrelay.limits import RULES_MAX
from mcrelay.rules import Rule, RuleSet, shown
from mcrelay.ruletext import check_name, parse_rule

NAME_MAX: Final = 64
KEPT: Final = "source=keep,sport=keep"  # as routers do, and those that send raw packets


class BadImport(BadConfig):
    """A text that is none of that format."""

    def __init__(self, what: str, remedy: str, line: int | None = None) -> None:
        super().__init__(what if line is None else f"line {line}: {what}", remedy)


@dataclass(frozen=True)
class Remark:
    """What was not translated, or not exactly."""

    line: int | None
    what: str
    remedy: str

    def __str__(self) -> str:
        place = "" if self.line is None else f"line {self.line}: "
        return f"{place}{self.what}; {self.remedy}"


class Imported:
    def __init__(self) -> None:
        self.remarks: list[Remark] = []
        self.cores: str | None = None  # for the daemon
        self._rules: dict[str, Rule] = {}  # by id

    def remark(self, line: int | None, what: str, remedy: str) -> None:
        self.remarks.append(Remark(line, what, remedy))

    def add(self, line: int | None, input: str, outputs: Iterable[str], name: str | None = None) -> None:
        """A rule, or more outputs of one. What cannot be is remarked on."""
        try:
            rule = parse_rule(input, outputs, self._name(line, name))
            if before := self._rules.get(rule.id):
                texts = [*map(str, before.outputs), *map(str, rule.outputs)]
                rule = parse_rule(input, dict.fromkeys(texts), before.name or rule.name)
            elif len(self._rules) == RULES_MAX:
                raise BadImport("there are too many rules", f"at most {RULES_MAX} are possible")
            RuleSet.of([*(r for r in self._rules.values() if r.id != rule.id and r.name == rule.name), rule])
        except RuleError as error:
            self.remark(line, error.message, error.hint)
        else:
            self._rules[rule.id] = rule

    def _name(self, line: int | None, name: str | None) -> str | None:
        """As near to it as a name of ours can be."""
        if not name:
            return None
        made = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")[:NAME_MAX]
        try:
            check_name(made)
        except RuleError:
            self.remark(line, f"{shown(name)} cannot be a rule's name", "give it another, or none")
            return None
        if made != name:
            self.remark(line, f"{shown(name)} cannot be a rule's name", f"it is called {made}")
        return made

    def toml(self) -> Iterator[str]:
        """The lines of a configuration file."""
        for remark in self.remarks:
            yield f"# {_printable(str(remark))}"
        if self.cores is not None:
            yield from ("[daemon]", f"cores = {_quoted(self.cores)}", "")
        for rule in self._rules.values():
            yield "[[rule]]"
            if rule.name:
                yield f"name = {_quoted(rule.name)}"
            yield f"input = {_quoted(str(rule.input))}"
            outputs = [_quoted(str(output)) for output in rule.outputs]
            if len(outputs) == 1:
                yield f"output = {outputs[0]}"
            else:
                yield from ("output = [", *(f"    {text}," for text in outputs), "]")
            yield ""


def between(interfaces: Iterable[str], destination: str, options: str) -> Iterator[tuple[str, list[str]]]:
    """(input, outputs) of a relay that sends what comes in by one interface out by all others."""
    names = list(dict.fromkeys(interfaces))
    for name in names:
        others = [f"=:=%{other}{options}" for other in names if other != name]
        if others:
            yield f"{destination}%{name}", others


def _quoted(text: str) -> str:
    return json.dumps(text)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)

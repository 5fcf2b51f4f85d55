"""What an import has found: rules, settings, and what has no equivalent; and the configuration file that says it.

Rules are checked as if they had been typed. Those of one input become one, since an input belongs to one rule. Nothing
is dropped without a remark. Also what the formats have in common: lines, and command lines.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from mcrelay.errors import BadConfig, RuleError
from mcrelay.limits import RULES_MAX
from mcrelay.rules import Rule, RuleSet, shown
from mcrelay.ruletext import check_name, parse_rule

NAME_MAX: Final = 64
KEPT: Final = "source=keep,sport=keep"  # as routers do, and those that send raw packets
BY_HAND: Final = "write a [[rule]] for it by hand: docs/rules.md"
# Programs that start others, and say nothing of what is relayed.
STARTERS: Final = {"sudo", "exec", "nohup", "env", "python", "python3"}


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

    @property
    def has_rules(self) -> bool:
        return bool(self._rules)

    def leave_out(self, line: int | None, what: str, why: str, remedy: str = BY_HAND) -> None:
        self.remark(line, f"{what} is left out: {why}", remedy)

    def once(self, line: int | None, names: Iterable[str], what: str) -> list[str]:
        """Each name once, in their order; one that comes again is remarked on."""
        given: dict[str, None] = {}
        for name in names:
            if name in given:
                self.remark(line, f"{what} {shown(name)} is named twice, and counts once", "name it once")
            given[name] = None
        return list(given)

    def add(
        self,
        line: int | None,
        input: str,
        outputs: Iterable[str],
        name: str | None = None,
        what: str = "this rule",
    ) -> None:
        """A rule, or more outputs of one. What cannot be is left out, and `what` says so."""
        try:
            rule = parse_rule(input, outputs, self._name(line, name))
            if before := self._rules.get(rule.id):
                texts = [*map(str, before.outputs), *map(str, rule.outputs)]
                if before.name and rule.name not in (None, before.name):
                    told = f"{what} has the input of {shown(before.name)}, and its outputs are added there"
                    self.remark(line, told, "an input belongs to one rule: its name is the first")
                rule = parse_rule(input, dict.fromkeys(texts), before.name or rule.name)
            elif len(self._rules) == RULES_MAX:
                raise BadImport("there are too many rules", f"at most {RULES_MAX} are possible")
            if rule.name is not None:
                RuleSet.of([*(r for r in self._rules.values() if r.id != rule.id and r.name == rule.name), rule])
        except RuleError as error:
            self.leave_out(line, what, error.message, f"{error.hint}; or {BY_HAND}")
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
            self.remark(line, f"{shown(name)} cannot be a rule's name, and the rule has none", "give it another")
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
    """(input, outputs) of a relay that sends what comes in by one interface out by all others. Names are there once."""
    names = list(interfaces)
    for name in names:
        others = [f"=:=%{other}{options}" for other in names if other != name]
        if others:
            yield f"{destination}%{name}", others


def lines(text: str) -> list[str]:
    """As an editor counts them: no other character than a line feed ends one."""
    return text.split("\n")


def command_lines(text: str) -> Iterator[tuple[int, list[str]]]:
    """The words of each, with the number of its first line; those that end in a backslash go on in the next.

    BadImport if the shell would have to be asked what is meant."""
    begun: list[str] = []
    for number, line in enumerate([*lines(text), ""], 1):
        part = line.rstrip("\r")
        begun.append(part.removesuffix("\\"))
        if not part.endswith("\\"):
            first = number - len(begun) + 1
            words = _words(first, "\n".join(begun))  # where a comment ends
            begun = []
            if words:
                yield first, words


def _words(number: int, line: str) -> list[str]:
    try:
        words = shlex.split(line, comments=True)
    except ValueError as error:
        raise BadImport(f"this is no command line: {error}", "close the quotes", number) from None
    for word in words:
        if "$" in word or "`" in word:
            raise BadImport(f"{shown(word)} is known to the shell alone", "write what it stands for", number)
    return words


def after_program(imported: Imported, number: int, words: Sequence[str], program: re.Pattern[str]) -> list[str]:
    """The words behind the program's name, if it is there; what starts it is remarked on if it says more than that."""
    for place, word in enumerate(words):
        if program.fullmatch(word.rpartition("/")[2]):
            before = [*words[:place]]
            if any(text.rpartition("/")[2] not in STARTERS for text in before):
                what = f"{shown(' '.join(before))} in front of the program is not translated"
                imported.remark(number, what, "if it chooses a network namespace, start mcrelay there")
            return [*words[place + 1 :]]
        if word.startswith("--"):
            break
    return [*words[1:]] if words and "/" in words[0] and not words[0].startswith("-") else [*words]


def _quoted(text: str) -> str:
    """A basic string of TOML. Unlike JSON's, it has no surrogates, and escapes DEL."""
    escaped = json.dumps(text, ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in escaped)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)

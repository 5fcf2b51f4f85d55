"""What an import has found: rules, settings, and what has no equivalent; and the configuration file that says it.

Rules are checked as if they had been typed. Those of one input become one, since an input belongs to one rule. Nothing
is dropped without a remark. Also what the formats have in common: lines, and command lines.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from typing import Final

from mcrelay.errors import BadConfig, RuleError
from mcrelay.limits import RULES_MAX
from mcrelay.rules import Rule, RuleSet, shown
from mcrelay.ruletext import check_interface, check_name, parse_rule

NAME_MAX: Final = 64
KEPT: Final = "source=keep,sport=keep"  # as routers do, and those that send raw packets
BY_HAND: Final = "write a [[rule]] for it by hand: docs/rules.md"
# Programs that start others, and say nothing of what is relayed.
STARTERS: Final = {"sudo", "exec", "nohup", "env", "python", "python3"}
# What a shell's command lines are made of. No alternative can begin where another does.
PIECE: Final = re.compile(
    r"""(?P<blank>[ \t\r]+) | (?P<end>\n) | (?P<join>\\\n)
    | '(?P<raw>[^']*)' | "(?P<quoted>(?:[^"\\]|\\.)*+)" | \\(?P<escaped>[^\n]) | (?P<plain>[^ \t\r\n'"\\]+)""",
    re.DOTALL | re.VERBOSE,
)
ESCAPED_IN_QUOTES: Final = re.compile(r'\\(?:\n|(["\\$`]))')


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

    @property
    def rules(self) -> list[Rule]:
        return list(self._rules.values())

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

    # What a rule's text is made of is looked at before: in it, a name with a comma would be options.

    def is_interface(self, line: int | None, name: str, what: str, *, or_pattern: bool = False) -> bool:
        """Whether it is the name of one here, too; if not, `what` is left out."""
        try:
            check_interface(name, what)
        except RuleError:
            why = f"{shown(name)} is not possible as an interface's name in rules"
            remedy = (
                "use 1 to 15 bytes without spaces, '/', ':', '%', ',' and '@'; 'ip link set NAME name NEW' renames one"
            )
            self.leave_out(line, what, why, remedy)
            return False
        if name.endswith("+") and not or_pattern:
            why = f"{shown(name)} would be a pattern in rules, of all interfaces that begin so"
            self.leave_out(line, what, why, "rename the interface, or write a rule with the pattern by hand")
            return False
        return True

    def is_address(self, line: int | None, text: str, what: str) -> bool:
        """Whether it is one IP address; if not, `what` is left out."""
        try:
            address = ip_address(text)
        except ValueError:
            address = None
        if address is None or (isinstance(address, IPv6Address) and address.scope_id is not None):
            self.leave_out(line, what, f"{shown(text)} is not an IP address", f"mend it, or {BY_HAND}")
            return False
        return True

    def are_enough(self, line: int | None, interfaces: Sequence[str], option: str) -> bool:
        """Whether something can be relayed between them; if not, the relay is left out."""
        if len(interfaces) < 2:
            why = "packets go from one interface to others, and fewer than two are left"
            self.leave_out(line, "this relay", why, f"name two interfaces or more behind {option}")
            return False
        return True

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
    """The words of each, as a shell would have them, with the number of its first line.

    BadImport if the shell would have to be asked what is meant."""
    text = text.replace("\r\n", "\n") + "\n\n"  # two: the first may be behind a backslash
    words: list[str] = []
    word: list[str] | None = None  # the pieces of one that has begun
    number = first = 1
    place = 0
    while place < len(text):
        if word is None and text[place] == "#":
            place = text.index("\n", place)
        piece = PIECE.match(text, place)
        if piece is None:
            raise BadImport("this is no command line: a quote has no end", "close the quotes", number)
        match piece.lastgroup:
            case "join":
                pass
            case "blank" | "end" as gap:
                if word is not None:
                    words.append(_known("".join(word), first))
                    word = None
                if gap == "end" and words:
                    yield first, words
                    words = []
            case kind:
                if word is None:
                    first = first if words else number
                    word = []
                given = piece[kind or 0]
                word.append(ESCAPED_IN_QUOTES.sub(r"\1", given) if kind == "quoted" else given)
        number += piece[0].count("\n")
        place = piece.end()


def _known(word: str, number: int) -> str:
    if "$" in word or "`" in word:
        raise BadImport(f"{shown(word)} is known to the shell alone", "write what it stands for", number)
    return word


def after_program(imported: Imported, number: int | None, words: Sequence[str], program: re.Pattern[str]) -> list[str]:
    """The words behind the program's name, if it is there; what starts it is remarked on if it says more than that.
    BadImport if it is another program."""
    for place, word in enumerate(words):
        if program.fullmatch(word.rpartition("/")[2]):
            before = [*words[:place]]
            if any(text.rpartition("/")[2] not in STARTERS for text in before):
                what = f"{shown(' '.join(before))} in front of the program is not translated"
                imported.remark(number, what, "if it chooses a network namespace, start mcrelay there")
            return [*words[place + 1 :]]
        if word.startswith("--"):
            break
    if words and "/" in words[0] and not words[0].startswith("-"):
        what = f"{shown(words[0])} is another program"
        raise BadImport(what, "write its options alone if it is this one by another name", number)
    return [*words]


def _quoted(text: str) -> str:
    """A basic string of TOML. Unlike JSON's, it has no surrogates, and escapes DEL."""
    escaped = json.dumps(text, ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in escaped)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)

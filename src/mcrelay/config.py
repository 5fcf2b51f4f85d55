"""Configuration: TOML texts read into settings and rules, and what is wrong with them, file and line.

A configuration is a file and its drop-ins, conf.d/*.toml beside it, in the order of their names. Settings of a later
one replace those of an earlier one, key by key; rules add up. Every problem that can be told without the host it is
meant for is found at once, and each says where it is and what would be right. Pure: config_files.py has the files.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Annotated, Any, Final, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

import msgspec

from mcrelay.cells import printable
from mcrelay.cores import check_worker, parse_cores
from mcrelay.cycles import Cycle, look_for_cycle
from mcrelay.endpoint import check_socket_path, parse_endpoint
from mcrelay.errors import BadConfig, Error, RuleError, UsageError
from mcrelay.levels import DEFAULT, checked
from mcrelay.limits import RULES_MAX
from mcrelay.rootless import check_rule, no_ring
from mcrelay.rules import Rule, RuleSet, shown
from mcrelay.ruletext import check_interface, parse_rule
from mcrelay.settings import WORKER, DaemonSection, InterfaceSection, RuleSection, Section, Settings, WorkerSection

Path = tuple[str | int, ...]  # of a value in a document: keys, and positions in lists
S = TypeVar("S")

PROBLEMS_MAX: Final = 50  # that are told at once
BYTE_ORDER_MARK: Final = "\ufeff"

BARE_KEY: Final = re.compile(r"[A-Za-z0-9_-]+")
TABLE: Final = re.compile(r"\s*(\[\[?)\s*([^\[\]]+?)\s*\]\]?\s*(?:#.*)?$")
KEY: Final = re.compile(
    r"""\s*((?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*'))*)\s*="""
)
KEY_PART: Final = re.compile(r"""[A-Za-z0-9_-]+|"[^"]*"|'[^']*'""")
UNKNOWN: Final = re.compile(r"Object contains unknown field `(?P<key>.*)`", re.DOTALL)
MISSING: Final = re.compile(r"Object missing required field `(?P<key>.*)`", re.DOTALL)
CHOICE: Final = re.compile(r"Invalid enum value '(?P<text>.*)'", re.DOTALL)
STEP: Final = re.compile(r"\.([^.\[\]]+)|\[(\d+|\.\.\.)\]")
WORDS: Final = {
    "int": "a whole number",
    "float": "a number",
    "str": "a text in quotes",
    "bool": "true or false",
    "object": "a table",
    "array": "a list",
}


def _check_user(text: str, what: str) -> None:
    """Whether there is such a user, only the host knows."""
    if text in ("", "root"):
        problem = f"{text}: workers do not run as root" if text else "is empty"
        raise UsageError(f"{what} {problem}", "name an unprivileged user, or leave it out")


# Values whose text has a form.
TEXTS: Final[Mapping[tuple[str, str], Callable[[str, str], object]]] = {
    ("daemon", "socket"): check_socket_path,
    ("daemon", "cores"): parse_cores,
    ("daemon", "user"): _check_user,
    ("metrics", "listen"): parse_endpoint,
}
# What is a section of its own in a table of many.
BY_NAME: Final[Mapping[str, type[Section]]] = {"interface": InterfaceSection, "worker": WorkerSection}


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong at a place of a file."""

    file: str
    line: int | None
    what: str
    remedy: str

    @property
    def place(self) -> str:
        file = printable(self.file)
        return file if self.line is None else f"{file}:{self.line}"

    def __str__(self) -> str:
        return f"{self.place}: {self.what}; {self.remedy}"


class ConfigError(BadConfig):
    """All that is wrong with a configuration; the message has the first."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        first, *others = problems
        more = f" (and {len(others)} more: 'mcrelay check' shows them)" if others else ""
        super().__init__(f"{first.place}: {first.what}", f"{first.remedy}{more}")
        self.problems = tuple(problems)


@dataclass(frozen=True)
class Configuration:
    """What the files say together, and where."""

    settings: Settings = field(default_factory=Settings)
    rules: tuple[Rule, ...] = ()
    documents: Sequence[_Document] = field(default=(), compare=False, repr=False)

    def problem(self, paths: Iterable[Path], error: Error) -> Problem | None:
        """At the last of these values that is given; None if none is."""
        for document in reversed(self.documents):
            for path in paths:
                if document.has(path):
                    return document.problem(path, error.message, error.hint)
        return None

    @contextlib.contextmanager
    def answers_for(self, *paths: Path) -> Iterator[None]:
        """What is refused meanwhile is wrong with the file, if it has one of these values."""
        try:
            yield
        except UsageError as error:
            problem = self.problem(paths, error)
            if problem is None:
                raise
            raise ConfigError([problem]) from None


def read(files: Iterable[tuple[str, bytes]], *, alone: bool = True) -> Configuration:
    """Of files, as their names and contents, the main one first. ConfigError with everything that is wrong. If they do
    not stand `alone`, a command line may say how many workers there are."""
    reading = Reading(files, alone=alone)
    for _step in reading.steps():
        pass
    return reading.result()


class Reading:
    """The same in small steps, for those who have something else to do in between: all steps(), then result()."""

    def __init__(self, files: Iterable[tuple[str, bytes]], *, alone: bool = True) -> None:
        self._files = list(files)
        self._is_full = False
        self._alone = alone
        self._documents: list[_Document] = []
        self._problems: list[Problem] = []
        self._rules = RuleSet()
        self._places: dict[str, tuple[_Document, int]] = {}  # by rule id

    def steps(self) -> Iterator[None]:
        for name, content in self._files:
            yield
            document = _Document(name, content)
            self._documents.append(document)
            yield from document.check()
            self._problems += document.problems
        for document in self._documents:
            for index, section in document.rules:
                yield
                if len(self._problems) < PROBLEMS_MAX and not self._is_full:
                    self._take(document, index, section)
        if not self._problems:
            yield from self._find_cycle()

    def result(self) -> Configuration:
        """ConfigError with everything that is wrong."""
        if self._problems:
            order = [document.name for document in self._documents]
            self._problems.sort(key=lambda problem: (order.index(problem.file), problem.line or 0))
            raise ConfigError(self._problems[:PROBLEMS_MAX])
        merged: dict[str, Any] = {}
        for document in self._documents:
            _merge(merged, {key: value for key, value in document.values.items() if key != "rule"})
        found = Configuration(msgspec.convert(merged, Settings), tuple(self._rules), self._documents)
        problems = [
            problem
            for paths, error in _contradictions(found.settings, alone=self._alone)
            if (problem := found.problem(paths, error))
        ]
        if found.settings.daemon.rootless:
            problems += self._beyond_rootless()
        if problems:
            raise ConfigError(problems[:PROBLEMS_MAX])
        return found

    def _beyond_rootless(self) -> Iterator[Problem]:
        """What no host allows without privilege."""
        for rule in self._rules:
            document, index = self._places[rule.id]
            try:
                check_rule(rule)
            except RuleError as error:
                yield document.problem(("rule", index), error.message, error.hint)

    def _take(self, document: _Document, index: int, section: RuleSection) -> None:
        try:
            rule = parse_rule(section.input, section.outputs, section.name)
            for other in (self._rules.with_input(rule.id), self._rules.with_name(rule.name)):
                if other:
                    raise _said_twice(rule, other, *self._places[other.id])
            if len(self._rules) == RULES_MAX:
                self._is_full = True
                raise RuleError("from here on there are too many rules", f"at most {RULES_MAX} are possible")
        except RuleError as error:
            self._problems.append(document.rule_problem(index, section, error))
        else:
            self._rules.add(rule)
            self._places[rule.id] = document, index

    def _find_cycle(self) -> Iterator[None]:
        """What the host hears of what it sends, only the host knows."""
        try:
            yield from look_for_cycle(self._rules, self._rules.fed_by, lambda _target: ())
        except Cycle as cycle:
            document, index = self._places[cycle.rule.id]
            self._problems.append(document.problem(("rule", index), cycle.message, cycle.hint))


def _contradictions(settings: Settings, *, alone: bool) -> Iterator[tuple[Sequence[Path], UsageError]]:
    """Values that are fine, but not together: where, and why. Where none of it is given, the defaults give way."""
    daemon, events = settings.daemon, settings.events
    if daemon.workers is not None and daemon.cores is not None:
        both = UsageError("daemon.workers and daemon.cores are both given", "keep one")
        yield [("daemon", "cores"), ("daemon", "workers")], both
    workers = daemon.workers if daemon.cores is None else len(parse_cores(daemon.cores))
    for number in settings.worker if alone else ():
        try:
            if workers is not None:
                check_worker(number, workers)
        except UsageError as error:
            yield [("worker", number)], error
    if daemon.rootless and workers is not None and workers > 1:
        what = "daemon.rootless has one data plane worker: of several, each would get all of a group's datagrams"
        remedy = "leave out daemon.workers, and name one core if any"
        yield [("daemon", "workers"), ("daemon", "cores")], UsageError(what, remedy)
    if daemon.rootless and daemon.ring_mib != DaemonSection().ring_mib:
        yield [("daemon", "ring_mib")], no_ring("daemon.ring_mib")
    if events.stopped_s < events.silent_s:
        what = f"events.stopped_s is {events.stopped_s:g}, and events.silent_s {events.silent_s:g}"
        yield [("events", "stopped_s")], UsageError(what, "a flow is silent before it has stopped")


def _merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, dict):
            _merge(into.setdefault(key, {}), value)
        else:
            into[key] = value


def _said_twice(rule: Rule, other: Rule, document: _Document, index: int) -> RuleError:
    what = f"input '{rule.input}'" if rule.id == other.id else f"the name {rule.name!r}"
    line = document.line(("rule", index))
    return RuleError(f"{what} is also that of the rule at {document.name}:{line}", "keep one, or choose another")


def rule_tables(content: bytes) -> list[range]:
    """The lines, from 1 on, of each [[rule]] of a file without problems, up to its last key: comments and empty lines
    behind that belong to what follows."""
    document = _Document("", content)
    tables = [place for place in document.places if place.is_table]
    ends = [*(place.line for place in tables[1:]), len(document.lines) + 1]
    found = []
    for place, end in zip(tables, ends, strict=False):
        if place.path[0] == "rule":
            while end > place.line + 1 and document.lines[end - 2].lstrip()[:1] in ("", "#"):
                end -= 1
            found.append(range(place.line, end))
    return found


class _Place(NamedTuple):
    line: int
    path: Path
    is_table: bool


class _Document:
    """One file: its values, which are as they should be if it has no problems, and where they stand."""

    def __init__(self, name: str, content: bytes) -> None:
        self.name = name
        self.values: dict[str, Any] = {}
        self.rules: list[tuple[int, RuleSection]] = []  # with their position
        self.problems: list[Problem] = []
        self.lines: list[str] = []
        try:
            text = content.decode()
            self.lines = text.split("\n")
            if text.startswith(BYTE_ORDER_MARK):
                remedy = "save the file as UTF-8 without one"
                self.problems.append(Problem(name, 1, "this begins with a byte order mark", remedy))
            else:
                self.values = tomllib.loads(text)
        except UnicodeDecodeError as error:
            line = content[: error.start].count(b"\n") + 1
            self.problems.append(Problem(name, line, "this is not UTF-8", "save the file as UTF-8 text"))
        except tomllib.TOMLDecodeError as error:
            self.problems.append(self._syntax(str(error)))
        except ValueError as error:  # a number of thousands of digits
            self.problems.append(self._syntax(str(error)))
        except RecursionError:
            self.problems.append(Problem(name, None, "it is nested too deeply", "see mcrelay.toml(5)"))

    def has(self, path: Path) -> bool:
        found: Any = self.values
        for key in path:
            if key not in found:
                return False
            found = found[key]
        return True

    def problem(self, path: Path, what: str, remedy: str) -> Problem:
        return Problem(self.name, self.line(path), what, remedy)

    def _syntax(self, why: str) -> Problem:
        at = re.search(r" \(at line (\d+), column \d+\)$", why)
        line = int(at[1]) if at else len(self.lines)
        what = why[: at.start()] if at else why.removesuffix(" (at end of document)")
        return Problem(self.name, line, f"this is not TOML: {what[:1].lower()}{what[1:]}", "see mcrelay.toml(5)")

    def check(self) -> Iterator[None]:
        """Find what is wrong, and the rules, in small steps."""
        for key, value in self.values.items():
            if len(self.problems) >= PROBLEMS_MAX:
                return
            if key in BY_NAME and isinstance(value, dict):
                for name, section in value.items():
                    self._convert(section, BY_NAME[key], (key, name))
                    self._check_name(key, name)
            elif key == "rule" and isinstance(value, list):
                for index, section in enumerate(value):
                    yield
                    if len(self.problems) >= PROBLEMS_MAX:
                        return
                    rule = self._convert(section, RuleSection, (key, index))
                    if rule is not None:
                        self.rules.append((index, rule))
            else:
                found = self._convert({key: value}, Settings, ())
                if key == "log" and isinstance(value, dict) and isinstance(levels := value.get("levels"), dict):
                    self._check_components(levels)
                for path, parse in TEXTS.items() if found else ():
                    text = getattr(getattr(found, path[0]), path[1])
                    if path[0] == key and text is not None:
                        self._check_text(path, text, parse)

    def _check_components(self, named: Iterable[str]) -> None:
        for component in named:
            try:
                checked(None, {component: DEFAULT})
            except UsageError as error:
                self.problems.append(self.problem(("log", "levels", component), error.message, error.hint))

    def _check_text(self, path: Path, text: str, parse: Callable[[str, str], object]) -> None:
        try:
            parse(text, _spell(path))
        except UsageError as error:
            self.problems.append(self.problem(path, error.message, error.hint))

    def _check_name(self, table: str, name: str) -> None:
        path = (table, name)
        if table == "worker" and not re.fullmatch(WORKER, name):
            what = f"there is no worker {shown(name)}"
            self.problems.append(self.problem(path, what, "workers have numbers, from 0 on"))
        if table == "interface":
            try:
                check_interface(name, "[interface]")
                if name.endswith("+"):
                    raise RuleError(
                        f"[interface]: {shown(name)} is a pattern", "give each interface a table of its own"
                    )
            except RuleError as error:
                self.problems.append(self.problem(path, error.message, error.hint))

    def _convert(self, value: Any, into: type[S], path: Path) -> S | None:
        """None if it is not of that type, and a problem more for each key that is wrong."""
        try:
            return msgspec.convert(value, into)
        except msgspec.ValidationError as error:
            of_each = _kinds_of_items(into)
            if isinstance(into, type) and issubclass(into, Section) and isinstance(value, dict):
                self._convert_keys(value, into, path)
            elif of_each is not None and isinstance(value, dict):
                for key, one in value.items():
                    self._convert(one, of_each, (*path, key))
            else:
                self.problems.append(self._explain(str(error), path, _choices(into)))
            return None

    def _convert_keys(self, table: dict[str, Any], into: type[Section], path: Path) -> None:
        kinds = _kinds(into)
        for known in msgspec.structs.fields(into):
            if known.required and known.name not in table:
                self.problems.append(self._explain(f"Object missing required field `{known.name}`", path))
        for key, value in table.items():
            if key not in kinds:
                self.problems.append(self._explain(f"Object contains unknown field `{key}`", path))
            else:
                self._convert(value, kinds[key], (*path, key))

    def _explain(self, why: str, path: Path, choices: Sequence[str] = ()) -> Problem:
        """The library's complaint in the words of the file; `choices` are the texts that are possible there, if it is
        about one of few."""
        what, _at, where = why.partition(" - at `")
        steps = [key or number for key, number in STEP.findall(where.removesuffix("`"))]
        full = (*path, *(int(step) if step.isdigit() else step for step in steps if step != "..."))
        if found := UNKNOWN.match(what):
            key = found["key"]
            known = _keys(full)
            return self.problem((*full, key), f"unknown key {shown(key)}{_in(full)}", _nearest(key, known))
        if found := MISSING.match(what):
            return self.problem(full, f"there is no {found['key']!r}{_in(full)}", "add it; see mcrelay.toml(5)")
        if choices and (found := CHOICE.fullmatch(what)):
            what = f"{_spell(full)}: there is no {shown(found['text'])}"
            return self.problem(full, what, _nearest(found["text"], choices))
        what = re.sub(r"`([a-z |]+)`", lambda m: _in_words(m[1].split(" | ")), what)
        what = f"{what[:1].lower()}{what[1:]}".replace("`", "")
        remedy = "write [[rule]] for each" if full == ("rule",) else "see mcrelay.toml(5)"
        return self.problem(full, f"{_spell(full)}: {what}", remedy)

    def rule_problem(self, index: int, section: RuleSection, error: RuleError) -> Problem:
        """At the text that the error quotes, if it does."""
        path: Path = ("rule", index)
        if section.name is not None and repr(section.name) in error.message:
            path = (*path, "name")
        elif repr(section.input) in error.message:
            path = (*path, "input")
        else:
            for text in section.outputs:
                if repr(text) in error.message:
                    line = self.line((*path, "output"))
                    offset = next((n for n, one in enumerate(self.lines[line - 1 :]) if text in one), 0)
                    return Problem(self.name, line + offset, error.message, error.hint)
        return self.problem(path, error.message, error.hint)

    def line(self, path: Path) -> int:
        """Where the value stands, or the nearest thing around it that can be found; from 1 on."""
        best, depth = 1, 0
        for place in self.places:
            length = len(place.path)
            if length > depth and path[:length] == place.path:
                best, depth = place.line, length
        return best

    @cached_property
    def places(self) -> list[_Place]:
        """What begins where. Good for files as people write them: what stands in a text of several lines is taken for
        what it looks like."""
        found: list[_Place] = []
        table: Path = ()
        counts: Counter[Path] = Counter()
        for number, line in enumerate(self.lines, 1):
            if header := TABLE.match(line):
                table = _names(header[2])
                if header[1] == "[[":
                    counts[table] += 1
                    table = (*table, counts[table] - 1)
                found.append(_Place(number, table, is_table=True))
            elif key := KEY.match(line):
                found.append(_Place(number, (*table, *_names(key[1])), is_table=False))
        return found


def _kinds_of_items(kind: Any) -> Any:
    """The type of the values of a table with keys of all kinds; None if it is not one."""
    while get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    return get_args(kind)[1] if get_origin(kind) is dict else None


@cache
def _kinds(section: type[Section]) -> dict[str, Any]:
    """The type of each key."""
    return get_type_hints(section, include_extras=True)


def _names(dotted: str) -> Path:
    return tuple(part.strip("\"'") for part in KEY_PART.findall(dotted))


def _keys(path: Path) -> list[str]:
    """The keys that are known there."""
    match path:
        case ():
            section: type[Section] = Settings
        case ("rule", _):
            section = RuleSection
        case (("interface" | "worker") as table, _):
            section = BY_NAME[str(table)]
        case _:
            section = type(getattr(Settings(), str(path[0])))
    return list(section.__struct_fields__)


def _choices(kind: Any) -> tuple[str, ...]:
    """The texts that a value of this type may be, if they are few."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    return tuple(choice for part in get_args(kind) for choice in _choices(part))


def _nearest(text: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(text, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known are: {', '.join(known)}"


def _in_words(types: Iterable[str]) -> str:
    """A key that may be left out is never null in TOML."""
    return " or ".join(WORDS.get(name, name) for name in types if name != "null")


def _spell(path: Path) -> str:
    """As one writes it in TOML."""
    keys = map(str, (path[0], *path[2:]) if path[0] == "rule" else path)
    return ".".join(key if BARE_KEY.fullmatch(key) else json.dumps(printable(key), ensure_ascii=False) for key in keys)


def _in(path: Path) -> str:
    if not path:
        return ""
    return f" in [[{path[0]}]]" if path[0] == "rule" else f" in [{_spell(path)}]"

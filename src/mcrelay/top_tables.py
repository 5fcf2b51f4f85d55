"""The tables of `mcrelay top`: for each view its columns, rows, order and what its filter looks at.

A column says how a cell is written and by what it is sorted; a cell is only written for a row that is seen. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

from mcrelay.cells import human, width
from mcrelay.rates import InterfaceRow, OutputRow, Rates, RuleRow, WorkerRow, is_loss

Style = Literal["plain", "title", "header", "selected", "good", "warning", "bad"]
View = Literal["rules", "outputs", "workers", "interfaces"]

VIEWS: Final[tuple[View, ...]] = ("rules", "outputs", "workers", "interfaces")
GAP: Final = 1  # cells between columns
NUMBER: Final = 8  # cells: 999 and a prefix, or a title with its arrow
NAME_MIN: Final = 8
NAME_MAX: Final = 40
STATE: Final = 10
STYLES: Final[dict[str, Style]] = {
    "active": "good",
    "ready": "good",
    "partial": "warning",
    "starting": "warning",
    "pending": "bad",
    "suspended": "bad",
    "waiting": "bad",
}


class Output(NamedTuple):
    """An output, and whose it is."""

    rule: RuleRow
    number: int  # from 0
    row: OutputRow


@dataclass(frozen=True, slots=True)
class Column:
    """`least` to `most` cells, as its cells need. Rows are of the view's type."""

    title: str
    text: Callable[[Any, Rates], str]
    key: Callable[[Any, Rates], Any]
    style: Callable[[Any, Rates], Style]
    least: int = NUMBER
    most: int = NUMBER
    is_number: bool = True


@dataclass(frozen=True, slots=True)
class Table:
    columns: tuple[Column, ...]
    rows: Callable[[Rates], Sequence[Any]]
    name: Callable[[Any], str]  # of a row, whatever its place
    words: Callable[[Any], Sequence[str | None]]  # that the filter looks at
    sort: int  # the column that it is sorted by at first

    def found(self, shown: Rates, text: str) -> list[Any]:
        """Rows that have the text in one of their words, whatever its case."""
        rows = self.rows(shown)
        if not text:
            return list(rows)
        text = text.casefold()
        return [row for row in rows if any(word and text in word.casefold() for word in self.words(row))]

    def widths(self, cells: Sequence[Sequence[str]], total: int) -> list[int]:
        """Of the columns that there is room for, from the left, in cells. The first always is."""
        columns = list(self.columns)
        while len(columns) > 1 and sum(column.least + GAP for column in columns) - GAP > total:
            columns.pop()
        found = [
            min(column.most, max(column.least, *(width(row[n]) for row in cells), 0))
            for n, column in enumerate(columns)
        ]
        excess = sum(found) + GAP * (len(found) - 1) - total
        for n in reversed(range(len(found))):
            cut = max(0, min(excess, found[n] - (columns[n].least if n else 0)))
            found[n] -= cut
            excess -= cut
        return found


# --- cells -----------------------------------------------------------------------------------------------------------


def rate_text(value: float, shown: Rates) -> str:
    """A rate, or that there is none yet."""
    return human(value) if shown.seconds else "-"


def percent(value: float, shown: Rates) -> str:
    if not shown.seconds:
        return "-"
    return f"{100 * value:.3g}%" if value >= 0.0001 or not value else "<0.01%"


def reasons_text(reasons: Mapping[str, float]) -> str:
    return ", ".join(f"{reason} {human(rate)}/s" for reason, rate in reasons.items())


def _plain(_row: Any, _shown: Rates) -> Style:
    return "plain"


def _loss_style(row: Any, _shown: Rates) -> Style:
    return "bad" if row.loss else "plain"


def _text(
    title: str,
    text: Callable[[Any, Rates], str],
    style: Callable[[Any, Rates], Style] = _plain,
    *,
    least: int = NAME_MIN,
    most: int = NAME_MAX,
) -> Column:
    return Column(title, text, text, style, least, most, is_number=False)


def _rate(title: str, value: Callable[[Any], float], style: Callable[[Any, Rates], Style] = _plain) -> Column:
    return Column(title, lambda row, shown: rate_text(value(row), shown), lambda row, _: value(row), style)


def _loss(get: Callable[[Any], Any] = lambda row: row) -> Column:
    return Column(
        "LOSS",
        lambda row, shown: percent(get(row).loss, shown),
        lambda row, _: get(row).loss,
        lambda row, shown: _loss_style(get(row), shown),
    )


def _number(title: str, value: Callable[[Any, Rates], float | None], text: Callable[[float], str] = human) -> Column:
    def shown_as(row: Any, shown: Rates) -> str:
        number = value(row, shown)
        return "-" if number is None else text(number)

    return Column(title, shown_as, lambda row, shown: value(row, shown) or 0, _plain)


# --- rules -----------------------------------------------------------------------------------------------------------


def title_of(rule: RuleRow) -> str:
    return rule.now.name or rule.now.input


def _rule_why(rule: RuleRow, shown: Rates) -> str:
    return "; ".join([*shown.problems(rule), *filter(None, [reasons_text(rule.reasons)])])


def _why_style(problems: Sequence[str], reasons: Mapping[str, float]) -> Style:
    return "bad" if problems or any(map(is_loss, reasons)) else "plain"


def _state_style(state: str) -> Style:
    return STYLES.get(state, "plain")


_RULES: Final = Table(
    columns=(
        _text("RULE", lambda rule, _: title_of(rule)),
        _text(
            "STATE",
            lambda rule, shown: shown.state(rule),
            lambda rule, shown: _state_style(shown.state(rule)),
            least=STATE,
            most=STATE,
        ),
        _rate("PKT/S", lambda rule: rule.rate("packets")),
        _rate("BIT/S", lambda rule: 8 * rule.rate("bytes")),
        _rate("COPY/S", lambda rule: rule.copies),
        _rate("DROP/S", lambda rule: rule.drops),
        _loss(),
        _text("WHY", _rule_why, lambda rule, shown: _why_style(shown.problems(rule), rule.reasons), most=60),
        _text("INPUT", lambda rule, _: rule.now.input, least=20),
    ),
    rows=lambda shown: shown.rules,
    name=lambda rule: rule.now.id,
    words=lambda rule: [rule.now.name, rule.now.id, rule.now.input, *(output.output for output in rule.now.outputs)],
    sort=2,
)


# --- outputs ---------------------------------------------------------------------------------------------------------


def _outputs(shown: Rates) -> list[Output]:
    return [Output(rule, number, row) for rule in shown.rules for number, row in enumerate(rule.outputs)]


_OUTPUTS: Final = Table(
    columns=(
        _text("OUTPUT", lambda output, _: output.row.now.output),
        _text("RULE", lambda output, _: title_of(output.rule)),
        _rate("COPY/S", lambda output: output.row.rate("packets")),
        _rate("BIT/S", lambda output: 8 * output.row.rate("bytes")),
        _rate("DROP/S", lambda output: output.row.drops),
        _loss(lambda output: output.row),
        _text(
            "WHY",
            lambda output, _: reasons_text(output.row.reasons),
            lambda output, _: _why_style((), output.row.reasons),
            most=60,
        ),
    ),
    rows=_outputs,
    name=lambda output: f"{output.rule.now.id} {output.number}",
    words=lambda output: [output.row.now.output, output.rule.now.name, output.rule.now.id, output.rule.now.input],
    sort=2,
)


# --- workers ---------------------------------------------------------------------------------------------------------


def worker_name(worker: WorkerRow) -> str:
    return f"data/{worker.now.index}"


def _process_state(worker: WorkerRow, shown: Rates) -> str:
    process = shown.reading.processes.get(worker.now.index)
    return process.state if process else "-"


def _pool_used(worker: WorkerRow, _shown: Rates) -> float:
    slots = worker.now.pool_slots
    return (slots - worker.now.pool_free) / slots if slots > 0 else 0.0


def _per(part: str, whole: str) -> Callable[[WorkerRow, Rates], float | None]:
    def mean(worker: WorkerRow, _shown: Rates) -> float | None:
        times = worker.rate(whole)
        return worker.rate(part) / times if times else None

    return mean


def _restarts(worker: WorkerRow, shown: Rates) -> float | None:
    process = shown.reading.processes.get(worker.now.index)
    return process.restarts if process else None


_WORKERS: Final = Table(
    columns=(
        _text("WORKER", lambda worker, _: worker_name(worker)),
        _text("STATE", _process_state, lambda worker, shown: _state_style(_process_state(worker, shown)), least=STATE),
        _rate("PKT/S", lambda worker: worker.rate("received")),
        _rate("BIT/S", lambda worker: 8 * worker.rate("received_bytes")),
        _rate("COPY/S", lambda worker: worker.rate("copies")),
        _rate("OUT/S", lambda worker: 8 * worker.rate("copies_bytes")),
        _rate("DROP/S", lambda worker: worker.drops),
        _loss(),
        _number("POOL", _pool_used, lambda used: f"{100 * used:.3g}%"),
        _number("BATCH", _per("received", "batches")),
        _number("SEND", _per("copies", "sends")),
        _number("RESTART", _restarts),
        _text(
            "WHY",
            lambda worker, _: reasons_text(worker.reasons),
            lambda worker, _: _why_style((), worker.reasons),
            most=60,
        ),
    ),
    rows=lambda shown: shown.workers,
    name=worker_name,
    words=lambda worker: [worker_name(worker)],
    sort=0,
)


# --- interfaces ------------------------------------------------------------------------------------------------------

_INTERFACES: Final = Table(
    columns=(
        _text("INTERFACE", lambda interface, _: interface.now.name, least=10),
        _rate("FRAME/S", lambda interface: interface.rate("frames")),
        _rate("OVERR/S", lambda interface: interface.rate("overruns")),
        _rate("MERGE/S", lambda interface: interface.rate("merged")),
        _loss(),
        _text("SEGMENT", lambda interface, _: "yes" if interface.now.segmentation else "no", most=NAME_MIN),
        _text(
            "WHY",
            lambda interface, _: "; ".join(interface.now.problems),
            lambda interface, _: _why_style(interface.now.problems, {}),
            most=60,
        ),
    ),
    rows=lambda shown: shown.interfaces,
    name=lambda interface: interface.now.name,
    words=lambda interface: [interface.now.name, *interface.now.problems],
    sort=0,
)

TABLES: Final[Mapping[View, Table]] = {
    "rules": _RULES,
    "outputs": _OUTPUTS,
    "workers": _WORKERS,
    "interfaces": _INTERFACES,
}

# What the details of a row are of.
Subject = RuleRow | WorkerRow | InterfaceRow


def subject(row: Any) -> Subject:
    return row.rule if isinstance(row, Output) else row

"""The details that `mcrelay top` shows of a rule, a worker or an interface: everything that is counted of it, and for
each drop reason what brings it about and the command that mends it. Pure.
"""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, Final

from mcrelay import reasons
from mcrelay.api import OutputStats
from mcrelay.cells import human
from mcrelay.rates import InterfaceRow, Rates, Row, RuleRow, WorkerRow, is_loss, per_second
from mcrelay.top_tables import STYLES, Style, Subject, percent, rate_text, worker_name

Text = tuple[str, Style]  # a line of one style

LABEL: Final = 12
INDENT: Final = " " * 4


def details(row: Subject, shown: Rates, columns: int) -> Iterator[Text]:
    """Lines; those that can be are wrapped to so many cells."""
    match row:
        case RuleRow():
            yield from _of_rule(row, shown, columns)
        case WorkerRow():
            yield from _of_worker(row, shown, columns)
        case InterfaceRow():
            yield from _of_interface(row, shown, columns)


def _of_rule(rule: RuleRow, shown: Rates, columns: int) -> Iterator[Text]:
    now, state = rule.now, shown.state(rule)
    yield f"rule {now.name or now.id}", "title"
    yield _fact("id", now.id)
    yield _fact("input", now.input)
    yield f"{'state':<{LABEL}}{state}", STYLES.get(state, "plain")
    for problem in shown.problems(rule):
        yield from _wrapped(f"{'problem':<{LABEL}}{problem}", columns, "bad")
    yield _count("packets", rule, "packets", shown)
    yield _bytes("bytes", now.bytes, rule.rate("bytes"), shown)
    yield _count("forwarded", rule, "forwarded", shown)
    yield _count("dropped", rule, "dropped", shown)
    if now.suspensions:
        yield _fact("suspended", f"{now.suspensions} times")
    for reason, counter in (("own", now.own), ("loop", now.looped)):
        if counter:
            rate = rule.rate("own" if reason == "own" else "looped")
            yield from _reason(reason, counter, rate, shown, columns, _places(rule))
    for number, output in enumerate(rule.outputs, 1):
        yield "", "plain"
        yield f"output {number}: {output.now.output}", "title"
        yield _count("copies", output, "packets", shown)
        yield _bytes("bytes", output.now.bytes, output.rate("bytes"), shown)
        yield _fact("loss", percent(output.loss, shown))
        before = output.before.dropped if output.before else {}
        places = _places(rule, output.now)
        yield from _reasons(output.now.dropped, before, shown, columns, places)


def _of_worker(worker: WorkerRow, shown: Rates, columns: int) -> Iterator[Text]:
    now = worker.now
    yield f"worker {worker_name(worker)}", "title"
    process = shown.reading.processes.get(now.index)
    if process:
        yield f"{'state':<{LABEL}}{process.state}", STYLES.get(process.state, "plain")
        for label, value in (("pid", process.pid), ("cores", process.cores), ("engine", process.engine)):
            yield _fact(label, "-" if value is None else str(value))
        yield _fact("restarts", str(process.restarts))
    yield _count("received", worker, "received", shown)
    yield _bytes("bytes", now.received_bytes, worker.rate("received_bytes"), shown)
    yield _count("forwarded", worker, "forwarded", shown)
    yield _count("copies", worker, "copies", shown)
    yield _bytes("bytes out", now.copies_bytes, worker.rate("copies_bytes"), shown)
    yield _count("batches", worker, "batches", shown)
    yield _count("sends", worker, "sends", shown)
    yield _count("refused", worker, "segments_refused", shown)
    yield _fact("pool", f"{now.pool_free} of {now.pool_slots} slots are free; {now.pool_exhausted} times none was")
    yield _fact("loss", percent(worker.loss, shown))
    before = worker.before.dropped if worker.before else {}
    yield from _reasons(now.dropped, before, shown, columns, {})


def _of_interface(interface: InterfaceRow, shown: Rates, columns: int) -> Iterator[Text]:
    now = interface.now
    yield f"interface {now.name}", "title"
    for problem in now.problems:
        yield from _wrapped(f"{'problem':<{LABEL}}{problem}", columns, "bad")
    yield _count("frames", interface, "frames", shown)
    places = {"ingress": shlex.quote(now.name)}
    for reason, counter in (("ingress_overrun", "overruns"), ("merged", "merged")):
        if count := getattr(now, counter):
            yield from _reason(reason, count, interface.rate(counter), shown, columns, places)
    yield _fact("segments", "taken" if now.segmentation else f"refused, {now.segments_refused} times")


def _places(rule: RuleRow, output: OutputStats | None = None) -> dict[str, str]:
    """What stands for names in a remedy."""
    places = {"ingress": _interface(rule.now.input), "rule": shlex.quote(rule.now.input)}
    return places | ({"egress": _interface(output.output)} if output else {})


def _interface(text: str) -> str:
    """Of an input or output, quoted for a shell."""
    return shlex.quote(text.rpartition("%")[2].partition(",")[0])


def _fact(label: str, value: str) -> Text:
    return f"{label:<{LABEL}}{value}", "plain"


def _count(label: str, row: Row[Any], counter: str, shown: Rates) -> Text:
    return _fact(label, f"{getattr(row.now, counter)}  {rate_text(row.rate(counter), shown)}/s")


def _bytes(label: str, count: int, rate: float, shown: Rates) -> Text:
    return _fact(label, f"{count}  {human(8 * rate, 'bit/s') if shown.seconds else '-'}")


def _reasons(
    dropped: Mapping[str, int], before: Mapping[str, int], shown: Rates, columns: int, places: Mapping[str, str]
) -> Iterator[Text]:
    for reason, count in dropped.items():
        if count:
            rate = per_second(before.get(reason, 0), count, shown.seconds)
            yield from _reason(reason, count, rate, shown, columns, places)


def _reason(
    reason: str, count: int, rate: float, shown: Rates, columns: int, places: Mapping[str, str]
) -> Iterator[Text]:
    style: Style = "bad" if rate and is_loss(reason) else "plain"
    yield f"{reason}: {count}  {rate_text(rate, shown)}/s", style
    if reason in reasons.REASONS:
        yield from _wrapped(f"{INDENT}{reasons.REASONS[reason].cause}", columns, "plain")
        yield f"{INDENT}$ {reasons.remedy(reason, **places)}", "plain"  # in one piece, to be copied


def _wrapped(text: str, columns: int, style: Style) -> Iterator[Text]:
    indent = INDENT if text.startswith(INDENT) else " " * LABEL
    room = max(columns, len(indent) + 16)
    for line in textwrap.wrap(text, room, subsequent_indent=indent, drop_whitespace=True):
        yield line, style

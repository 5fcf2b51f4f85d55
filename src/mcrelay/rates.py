"""Rates: two readings of the counters, and what happened in between.

Owns the arithmetic of `mcrelay top` and `mcrelay stats --watch`. A row has a thing's latest counters and computes its
rates when they are asked for: with thousands of rules, only what is shown or sorted by. A counter that went back began
anew, with another rule in the old one's place or another daemon: then, as with one that was not there before, the rate
is from zero, and never negative. All rates are per second, bits are of UDP payload as the counters' bytes are.

Loss is the share of what should have been forwarded and was not; what is dropped as somebody wants it (reasons.py:
`expected`), as by an output that is paused, is no loss, nor is what this host itself sent (`own`). Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

from mcrelay.api import InterfaceFacts, OutputStats, RuleFacts, RuleStats, Stats, WorkerStats
from mcrelay.messages import ProcessFacts
from mcrelay.reasons import REASONS

Counted = TypeVar("Counted", WorkerStats, RuleStats, OutputStats, InterfaceFacts)
Dropping = TypeVar("Dropping", WorkerStats, OutputStats)

UNKNOWN: Final = "-"  # the state of a rule that was not listed


def per_second(before: int, after: int, seconds: float) -> float:
    """0 where there is nothing to compare with."""
    if seconds <= 0:
        return 0.0
    return max(0, after - before if after >= before else after) / seconds


def is_loss(reason: str) -> bool:
    return reason != "own" and not (reason in REASONS and REASONS[reason].expected)


@dataclass(frozen=True, slots=True)
class Row(Generic[Counted]):
    """Counters now, and as they were `seconds` ago; 0: nobody looked."""

    now: Counted
    before: Counted | None
    seconds: float

    def rate(self, counter: str) -> float:
        earlier = getattr(self.before, counter) if self.before is not None else 0
        return per_second(earlier, getattr(self.now, counter), self.seconds)


class _Dropping(Row[Dropping]):
    """Of what has drops by reason."""

    __slots__ = ()

    @property
    def reasons(self) -> dict[str, float]:
        """Drops by reason, those that occurred meanwhile, the most frequent first."""
        before = self.before.dropped if self.before else {}
        return by_rate(
            {
                reason: per_second(before.get(reason, 0), packets, self.seconds)
                for reason, packets in self.now.dropped.items()
            }
        )

    @property
    def drops(self) -> float:
        return sum(self.reasons.values())

    @property
    def lost(self) -> float:
        return lost(self.reasons)


class WorkerRow(_Dropping[WorkerStats]):
    """A data plane worker: packets in, packets of which a copy left, copies out."""

    __slots__ = ()

    @property
    def loss(self) -> float:
        """0 to 1."""
        return share(self.lost, self.rate("received") - (self.drops - self.lost))


class OutputRow(_Dropping[OutputStats]):
    """An output of a rule: copies."""

    __slots__ = ()

    @property
    def loss(self) -> float:
        return share(self.lost, self.rate("packets") + self.lost)


class InterfaceRow(Row[InterfaceFacts]):
    """An interface that rules use: frames."""

    __slots__ = ()

    @property
    def drops(self) -> float:
        return self.rate("overruns") + self.rate("merged")

    @property
    def loss(self) -> float:
        return share(self.drops, max(self.rate("frames"), self.drops))


class RuleRow(Row[RuleStats]):
    """A rule: packets that matched, and the copies of all its outputs."""

    __slots__ = ()

    @property
    def outputs(self) -> list[OutputRow]:
        before = self.before.outputs if self.before else ()
        # By place: an output that was paused meanwhile has another text, and goes on counting.
        return [
            OutputRow(now, before[n] if n < len(before) else None, self.seconds)
            for n, now in enumerate(self.now.outputs)
        ]

    @property
    def copies(self) -> float:
        return sum(output.rate("packets") for output in self.outputs)

    @property
    def reasons(self) -> dict[str, float]:
        """Copies that did not leave, over all outputs; and packets that came from this host (`own`) or came round again
        (`loop`), of which there are no copies."""
        rates: dict[str, float] = {}
        for output in self.outputs:
            for reason, rate in output.reasons.items():
                rates[reason] = rates.get(reason, 0.0) + rate
        for reason, counter in (("own", "own"), ("loop", "looped")):
            rates[reason] = rates.get(reason, 0.0) + self.rate(counter)
        return by_rate(rates)

    @property
    def drops(self) -> float:
        return sum(self.reasons.values())

    @property
    def loss(self) -> float:
        gone = lost(self.reasons)
        return share(gone, self.copies + gone)


@dataclass(frozen=True, slots=True)
class Reading:
    """What a daemon said at one time: besides the counters, rules as listed, by id, and data plane workers'
    processes, by index."""

    stats: Stats
    rules: Mapping[str, RuleFacts] = field(default_factory=dict)
    interfaces: tuple[InterfaceFacts, ...] = ()
    processes: Mapping[int, ProcessFacts] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rates:
    """Everything between two readings, in the daemon's order."""

    seconds: float  # between them; 0: there is only one
    workers: tuple[WorkerRow, ...]
    rules: tuple[RuleRow, ...]
    interfaces: tuple[InterfaceRow, ...]
    reading: Reading  # the later one

    def state(self, rule: RuleRow) -> str:
        facts = self.reading.rules.get(rule.now.id)
        return facts.state if facts else UNKNOWN

    def problems(self, rule: RuleRow) -> tuple[str, ...]:
        facts = self.reading.rules.get(rule.now.id)
        return facts.problems if facts else ()

    def total(self, counter: str) -> float:
        """Of all workers."""
        return sum(worker.rate(counter) for worker in self.workers)

    @property
    def reasons(self) -> dict[str, float]:
        """Of all workers."""
        rates: dict[str, float] = {}
        for worker in self.workers:
            for reason, rate in worker.reasons.items():
                rates[reason] = rates.get(reason, 0.0) + rate
        return by_rate(rates)


def between(before: Reading | None, after: Reading, seconds: float) -> Rates:
    """Rows with rates; without a reading before, with rates of 0."""
    if before is None or seconds <= 0:
        before, seconds = None, 0.0
    workers = {w.index: w for w in before.stats.workers} if before else {}
    rules = {r.id: r for r in before.stats.rules} if before else {}
    interfaces = {i.name: i for i in before.interfaces} if before else {}
    return Rates(
        seconds,
        tuple(WorkerRow(w, workers.get(w.index), seconds) for w in after.stats.workers),
        tuple(RuleRow(r, rules.get(r.id), seconds) for r in after.stats.rules),
        tuple(InterfaceRow(i, interfaces.get(i.name), seconds) for i in after.interfaces),
        after,
    )


def by_rate(rates: Mapping[str, float]) -> dict[str, float]:
    """Those that are not 0, the highest first."""
    return {key: rate for key, rate in sorted(rates.items(), key=lambda item: -item[1]) if rate}


def lost(reasons: Mapping[str, float]) -> float:
    return sum(rate for reason, rate in reasons.items() if is_loss(reason))


def share(part: float, whole: float) -> float:
    """0 to 1; 0 of nothing."""
    return min(1.0, part / whole) if whole > 0 else 0.0

"""Metrics: what Prometheus gets to see, from a snapshot of facts (docs/metrics.md).

Owns names, types, labels and texts of all metrics, and how many series there can be: a rule has series of its own only
up to a number of rules and outputs, those of all others are summed up. Pure: who gathers the facts, when, and for whom
is exposition.py's business.

Counters are as the workers' pages have them, so they go on when a process dies. Those of a rule begin at 0 when it is
added; Prometheus takes a counter that is less than before for one that has begun anew, which is what happened.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final, get_args

from prometheus_client import exposition
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector as AnyCollector

from mcrelay.api import InterfaceFacts, OutputStats, RuleFacts, RuleState, RuleStats, WorkerStats
from mcrelay.counters import DROP_REASONS, OUTPUT_REASONS
from mcrelay.messages import FileState, ProcessFacts

OTHERS: Final = "(others)"  # no rule and no output can be called that
OUTPUTS_PER_RULE: Final = 4  # so many times the rules that are listed, outputs may be
SAMPLES_PER_PIECE: Final = 250  # some milliseconds of rendering

TEXT: Final = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS: Final = "application/openmetrics-text; version=1.0.0; charset=utf-8"

ListedRule = tuple[RuleFacts, RuleStats]


@dataclass(frozen=True)
class Snapshot:
    """Facts of one moment, more or less."""

    version: str
    generation: int
    processes: Sequence[ProcessFacts] | None  # None: the supervisor does not answer
    started_s: float | None  # None, too, then
    file: FileState | None
    workers: Sequence[WorkerStats]
    interfaces: Sequence[InterfaceFacts]
    states: dict[RuleState, int]  # of all rules
    listed: Sequence[ListedRule]
    others: RuleStats | None  # the sum of all rules that are not listed, of now and before; None: there never were any
    unlisted: int
    clients: int
    frames_malformed: int
    scrape_s: float | None  # that the last rendering took, from the first question to the last line


# --- which rules are listed ------------------------------------------------------------------------------------------


class Listing:
    """Which rules have series of their own: those that were added first, up to `rules_max` of them with
    OUTPUTS_PER_RULE times as many outputs."""

    def __init__(self, rules_max: int) -> None:
        self.rules: list[ListedRule] = []
        self._rules_max = rules_max
        self._outputs = 0

    def take(self, facts: RuleFacts, stats: RuleStats) -> bool:
        outputs = self._outputs + len(stats.outputs)
        if len(self.rules) >= self._rules_max or outputs > OUTPUTS_PER_RULE * self._rules_max:
            return False
        self.rules.append((facts, stats))
        self._outputs = outputs
        return True


Sums = tuple[int, ...]  # as _sums makes them
RULE_SUMS: Final = ("packets", "bytes", "forwarded", "dropped", "own", "looped", "suspensions")


class Remainder:
    """The sum of the rules that are not listed. It never becomes less: what a rule had counted stays in it when it is
    removed, or listed because another was removed."""

    def __init__(self) -> None:
        self._carried: Sums = (0,) * (len(RULE_SUMS) + 2 + len(OUTPUT_REASONS))
        self._before: dict[str, Sums] = {}
        self._now: dict[str, Sums] = {}

    def count(self, stats: RuleStats) -> None:
        """One of the rules."""
        sums = _sums(stats)
        before = self._before.pop(stats.id, None)
        if before and any(new < old for new, old in zip(sums, before, strict=True)):  # removed, and added anew
            self._carried = _added(self._carried, before)
        self._now[stats.id] = sums

    def total(self) -> RuleStats | None:
        """When all of this turn are counted. None if there never were any."""
        for gone in self._before.values():
            self._carried = _added(self._carried, gone)
        self._before, self._now = self._now, {}
        sums = self._carried
        for one in self._before.values():
            sums = _added(sums, one)
        if not self._before and not any(sums):
            return None
        rule, (sent, size), drops = sums[: len(RULE_SUMS)], sums[len(RULE_SUMS) :][:2], sums[len(RULE_SUMS) + 2 :]
        dropped = {reason: n for reason, n in zip(OUTPUT_REASONS, drops, strict=True) if n}
        output = OutputStats(output=OTHERS, packets=sent, bytes=size, dropped=dropped)
        return RuleStats(
            id=OTHERS, name=None, input=OTHERS, outputs=(output,), **dict(zip(RULE_SUMS, rule, strict=True))
        )


def _sums(stats: RuleStats) -> Sums:
    sent = sum(output.packets for output in stats.outputs)
    size = sum(output.bytes for output in stats.outputs)
    drops = (sum(output.dropped.get(reason, 0) for output in stats.outputs) for reason in OUTPUT_REASONS)
    return (*(getattr(stats, field) for field in RULE_SUMS), sent, size, *drops)


def _added(one: Sums, other: Sums) -> Sums:
    return tuple(a + b for a, b in zip(one, other, strict=True))


# --- families --------------------------------------------------------------------------------------------------------

# Field of the API's types: (name of the metric, text).
WORKER_COUNTERS: Final = {
    "received": ("received_packets", "Packets that came in by interfaces of rules."),
    "received_bytes": ("received_bytes", "The same in bytes of payload, of those that could be read."),
    "forwarded": ("forwarded_packets", "Packets of which at least one copy left."),
    "copies": ("copies", "Datagrams that left by outputs."),
    "copies_bytes": ("copies_bytes", "The same in bytes of payload."),
    "batches": ("batches", "Turns in which packets were taken up."),
    "sends": ("sends", "System calls that sent copies, several at once where they could be segments."),
    "segments_refused": ("segments_refused", "Sends of segments that a device or path refused."),
    "pool_exhausted": ("pool_exhausted", "Times that no receive slot was free."),
    "frames_malformed": ("malformed_messages", "Messages of the supervisor that could not be read."),
}
WORKER_GAUGES: Final = {
    "pool_slots": ("pool_slots", "Receive slots."),
    "pool_free": ("pool_free_slots", "Receive slots that hold no packet."),
}
INTERFACE_COUNTERS: Final = {
    "frames": ("frames", "Frames that came in for rules, or nearly."),
    "overruns": ("overruns", "Frames that the kernel dropped since a worker did not read fast enough."),
    "merged": ("merged_frames", "Frames of several datagrams that had to be dropped."),
    "segments_refused": ("segments_refused", "Sends of segments that the interface refused."),
}
RULE_COUNTERS: Final = {
    "packets": ("received_packets", "Packets that matched the rule."),
    "bytes": ("received_bytes", "The same in bytes of payload."),
    "forwarded": ("forwarded_packets", "Packets of which at least one copy left."),
    "dropped": ("dropped_packets", "Packets of which no copy left."),
    "own": ("own_packets", "Packets that matched but came from this host; not among those received."),
    "looped": ("looped_packets", "Packets that came while the rule was suspended; not among those received."),
    "suspensions": ("suspensions", "Times that the rule was suspended, since its output came back."),
}
OUTPUT_COUNTERS: Final = {
    "packets": ("sent_packets", "Datagrams that left by the output."),
    "bytes": ("sent_bytes", "The same in bytes of payload."),
}
STATES: Final[tuple[RuleState, ...]] = get_args(RuleState)


def families(snapshot: Snapshot) -> Iterator[Metric]:
    """All metrics, one family after the other."""
    yield InfoMetricFamily("mcrelay_build", "The daemon's version.", {"version": snapshot.version})
    yield from _of_processes(snapshot)
    yield from _of_workers(snapshot.workers)
    yield from _of_interfaces(snapshot.interfaces)
    yield from _of_all_rules(snapshot)
    yield from _of_rules(snapshot.listed, snapshot.others)
    others = [snapshot.others] if snapshot.others else []
    yield from _of_outputs([*(stats for _facts, stats in snapshot.listed), *others])


def _of_processes(snapshot: Snapshot) -> Iterator[Metric]:
    answers = snapshot.processes is not None
    yield GaugeMetricFamily("mcrelay_supervisor_up", "Whether the supervisor answers the control plane.", answers)
    ready = GaugeMetricFamily("mcrelay_process_up", "Whether a worker is ready.", labels=("process",))
    restarts = CounterMetricFamily(
        "mcrelay_process_restarts", "Lives of a worker that have ended since the daemon started.", labels=("process",)
    )
    for process in snapshot.processes or ():
        if process.role in ("control", "data"):
            name = f"data/{process.index}" if process.role == "data" else process.role
            ready.add_metric((name,), process.state == "ready")
            restarts.add_metric((name,), process.restarts)
    yield from (ready, restarts)
    if snapshot.started_s is not None:
        text = "When the daemon was started, in Unix time; an upgrade is no start."
        yield GaugeMetricFamily("mcrelay_start_time", text, snapshot.started_s, unit="seconds")
    if snapshot.file is not None:
        text = "Whether the file is in force as it was at the start or the last reload."
        yield GaugeMetricFamily("mcrelay_config_last_reload_successful", text, snapshot.file.in_force)
        text = "When it was read last and is in force since, in Unix time."
        name = "mcrelay_config_last_reload_success_timestamp"
        yield GaugeMetricFamily(name, text, snapshot.file.since_s, unit="seconds")
    yield GaugeMetricFamily("mcrelay_clients", "Clients of the API that are connected.", snapshot.clients)
    yield CounterMetricFamily(
        "mcrelay_malformed_messages",
        "Messages of clients and of the supervisor that the control plane could not read.",
        snapshot.frames_malformed,
    )
    if snapshot.scrape_s is not None:
        yield GaugeMetricFamily(
            "mcrelay_scrape_duration",
            "How long the last rendering of the metrics took; others had their turns meanwhile.",
            snapshot.scrape_s,
            unit="seconds",
        )


def _of_workers(workers: Sequence[WorkerStats]) -> Iterator[Metric]:
    for field, (name, text) in WORKER_COUNTERS.items():
        counter = CounterMetricFamily(f"mcrelay_worker_{name}", text, labels=("worker",))
        for worker in workers:
            counter.add_metric((str(worker.index),), getattr(worker, field))
        yield counter
    for field, (name, text) in WORKER_GAUGES.items():
        gauge = GaugeMetricFamily(f"mcrelay_worker_{name}", text, labels=("worker",))
        for worker in workers:
            gauge.add_metric((str(worker.index),), getattr(worker, field))
        yield gauge
    dropped = CounterMetricFamily(
        "mcrelay_worker_dropped_packets", "Packets of which no copy left, by reason.", labels=("worker", "reason")
    )
    for worker in workers:
        for reason in DROP_REASONS[1:]:  # all, so that the first drop is seen as a growth
            dropped.add_metric((str(worker.index), reason), worker.dropped.get(reason, 0))
    yield dropped


def _of_interfaces(interfaces: Sequence[InterfaceFacts]) -> Iterator[Metric]:
    for field, (name, text) in INTERFACE_COUNTERS.items():
        counter = CounterMetricFamily(f"mcrelay_interface_{name}", text, labels=("interface",))
        for interface in interfaces:
            counter.add_metric((interface.name,), getattr(interface, field))
        yield counter
    usable = GaugeMetricFamily(
        "mcrelay_interface_up", "Whether rules can use the interface as they want to.", labels=("interface",)
    )
    for interface in interfaces:
        usable.add_metric((interface.name,), not interface.problems)
    yield usable


def _of_all_rules(snapshot: Snapshot) -> Iterator[Metric]:
    states = GaugeMetricFamily("mcrelay_rules", "Rules, by state.", labels=("state",))
    for state in STATES:
        states.add_metric((state,), snapshot.states.get(state, 0))
    yield states
    yield GaugeMetricFamily(
        "mcrelay_rules_unlisted", f'Rules without series of their own, summed up as rule="{OTHERS}".', snapshot.unlisted
    )
    yield GaugeMetricFamily("mcrelay_rules_generation", "Counts the changes of the rules.", snapshot.generation)


def _of_rules(listed: Sequence[ListedRule], others: RuleStats | None) -> Iterator[Metric]:
    info = GaugeMetricFamily("mcrelay_rule_info", "1 for each rule.", labels=("rule", "id", "input"))
    states = GaugeMetricFamily("mcrelay_rule_state", "1 for the rule's state.", labels=("rule", "state"))
    for facts, stats in listed:
        info.add_metric((_label(stats), stats.id, stats.input), 1)
        for state in STATES:
            states.add_metric((_label(stats), state), facts.state == state)
    yield from (info, states)
    for field, (name, text) in RULE_COUNTERS.items():
        counter = CounterMetricFamily(f"mcrelay_rule_{name}", text, labels=("rule",))
        for _facts, stats in listed:
            counter.add_metric((_label(stats),), getattr(stats, field))
        if others:
            counter.add_metric((OTHERS,), getattr(others, field))
        yield counter


def _of_outputs(rules: Sequence[RuleStats]) -> Iterator[Metric]:
    """An output is called by its address, port and interface, which no other of its rule has, and which stay when it is
    paused."""
    for field, (name, text) in OUTPUT_COUNTERS.items():
        counter = CounterMetricFamily(f"mcrelay_output_{name}", text, labels=("rule", "output"))
        for stats in rules:
            for output in stats.outputs:
                counter.add_metric((_label(stats), output.output.split(",")[0]), getattr(output, field))
        yield counter
    dropped = CounterMetricFamily(
        "mcrelay_output_dropped_packets",
        "Datagrams that did not leave by the output, by reason, of those that occurred.",
        labels=("rule", "output", "reason"),
    )
    for stats in rules:
        for output in stats.outputs:
            for reason, packets in output.dropped.items():
                dropped.add_metric((_label(stats), output.output.split(",")[0], reason), packets)
    yield dropped


def _label(stats: RuleStats) -> str:
    return stats.name or stats.id


# --- text ------------------------------------------------------------------------------------------------------------


class Collector(AnyCollector):
    """The metrics of a snapshot, for prometheus_client; or some of them."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics


def chosen_format(accept: str) -> str:
    """The content type for a request's Accept header: OpenMetrics for whoever names it, else the older format."""
    for choice in accept.lower().split(","):
        media_type, *parameters = (part.strip().replace(" ", "") for part in choice.split(";"))
        if media_type == "application/openmetrics-text" and "q=0" not in parameters:
            version = next((p.removeprefix("version=") for p in parameters if p.startswith("version=")), "1.0.0")
            if version in ("1.0.0", "0.0.1"):
                return OPENMETRICS
    return TEXT


def rendered(snapshot: Snapshot, content_type: str) -> Iterator[bytes]:
    """The text, in pieces that take some milliseconds each."""
    for family in families(snapshot):
        samples = iter(family.samples)
        is_first = True
        while piece := list(islice(samples, SAMPLES_PER_PIECE)):
            family.samples = piece
            text = _text(family, content_type)
            yield text if is_first else _without_head(text)
            is_first = False
    if content_type == OPENMETRICS:
        yield END


END: Final = b"# EOF\n"


def _text(family: Metric, content_type: str) -> bytes:
    if content_type == OPENMETRICS:
        text: bytes = openmetrics.generate_latest(Collector([family]))  # type: ignore[no-untyped-call] # it has no types
        return text.removesuffix(END)
    return exposition.generate_latest(Collector([family]))


def _without_head(text: bytes) -> bytes:
    """Without the comments at its begin: a family has them once."""
    while text.startswith(b"#"):
        text = text.partition(b"\n")[2]
    return text

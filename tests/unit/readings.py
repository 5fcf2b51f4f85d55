"""Readings of a daemon's counters, made up: for the tests of what shows them."""

from __future__ import annotations

from zlib import crc32

from hypothesis import strategies as st

from mcrelay.api import InterfaceFacts, OutputStats, RuleFacts, RuleStats, Stats, WorkerStats
from mcrelay.counters import DROP_REASONS, OUTPUT_REASONS
from mcrelay.messages import ProcessFacts
from mcrelay.rates import Reading

NO_COUNTS = dict.fromkeys(WorkerStats.__struct_fields__, 0)


def worker(index: int = 0, dropped: dict[str, int] | None = None, **counts: int) -> WorkerStats:
    return WorkerStats(**{**NO_COUNTS, "index": index, "dropped": dropped or {}, **counts})  # type: ignore[arg-type]


def output(text: str = "239.2.2.2:6000%out0", packets: int = 0, size: int = 0, **dropped: int) -> OutputStats:
    return OutputStats(text, packets, size, dropped)


def rule(name: str | None, *outputs: OutputStats, packets: int = 0, id: str = "", **counts: int) -> RuleStats:
    none = dict.fromkeys(("bytes", "forwarded", "dropped", "own", "looped", "suspensions"), 0)
    return RuleStats(
        id=id or f"{crc32(repr(name).encode()):012x}",
        name=name,
        input="239.1.1.1:5000%in0",
        packets=packets,
        outputs=outputs,
        **{**none, **counts},
    )


def stats(*rules: RuleStats, workers: tuple[WorkerStats, ...] = ()) -> Stats:
    return Stats(id=1, generation=1, workers=workers, rules=rules, more=False, frames_malformed=0)


def reading(
    *rules: RuleStats, workers: tuple[WorkerStats, ...] = (), problems: dict[str, str] | None = None
) -> Reading:
    """`problems` are of rules, by name; those are pending."""
    facts = {
        one.id: RuleFacts(
            id=one.id,
            name=one.name,
            input=one.input,
            outputs=tuple(output.output for output in one.outputs),
            state="pending" if problem else "active",
            problems=(problem,) if problem else (),
        )
        for one in rules
        for problem in [(problems or {}).get(one.name or "", "")]
    }
    return Reading(stats(*rules, workers=workers), facts)


# Whatever a daemon may say, and more.
counts = st.integers(0, 2**64 - 1)
texts = st.text(max_size=30)
outputs = st.builds(
    OutputStats,
    output=texts,
    packets=counts,
    bytes=counts,
    dropped=st.dictionaries(st.sampled_from(OUTPUT_REASONS) | texts, counts),
)
rules = st.builds(
    RuleStats,
    id=texts,
    name=st.none() | texts,
    input=texts,
    outputs=st.lists(outputs, max_size=3).map(tuple),
    **dict.fromkeys(("packets", "bytes", "forwarded", "dropped", "own", "looped", "suspensions"), counts),
)
workers = st.builds(
    WorkerStats,
    dropped=st.dictionaries(st.sampled_from(DROP_REASONS[1:]) | texts, counts),
    **{field: counts for field in WorkerStats.__struct_fields__ if field != "dropped"},
)
facts = st.builds(
    RuleFacts,
    id=texts,
    name=st.none() | texts,
    input=texts,
    outputs=st.just(()),
    state=st.sampled_from(["active", "partial", "pending", "suspended"]),
    problems=st.lists(texts, max_size=2).map(tuple),
)
interfaces = st.builds(
    InterfaceFacts,
    name=texts,
    problems=st.lists(texts, max_size=2).map(tuple),
    segmentation=st.booleans(),
    **dict.fromkeys(("frames", "overruns", "merged", "segments_refused"), counts),
)
processes = st.builds(
    ProcessFacts,
    role=st.just("data"),
    index=counts,
    state=st.sampled_from(["starting", "ready", "waiting"]),
    pid=st.none() | counts,
    uid=st.none(),
    capabilities=st.none(),
    cores=st.none() | texts,
    restarts=counts,
    engine=st.none() | texts,
)


@st.composite
def readings(draw: st.DrawFn) -> Reading:
    said = stats(*draw(st.lists(rules, max_size=5)), workers=tuple(draw(st.lists(workers, max_size=3))))
    listed = {one.id: draw(facts) for one in said.rules}
    running = {one.index: draw(processes) for one in said.workers}
    return Reading(said, listed, tuple(draw(st.lists(interfaces, max_size=3))), running)

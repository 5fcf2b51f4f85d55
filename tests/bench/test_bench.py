"""The benchmarks: what is pure of them, and one tiny run in namespaces. No assertion on time or speed."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from bench import course, report
from bench.__main__ import parse
from bench.network import Counters
from bench.relays import RELAYS, rules
from bench.samples import FULL, QUICK, Parameters, Profile, Results, Sample, Summary
from bench.search import REACHED, Attempt, Found, zero_loss_rate
from bench.targets import TARGETS, processor_us, verdicts
from bench.trials import TICKS, Process, Processor, others_s
from lab.namespaces import NETNS_DIRECTORY, unsupported

_reason = unsupported()
needs_namespaces = pytest.mark.skipif(_reason is not None, reason=_reason or "")


# --- the search ------------------------------------------------------------------------------------------------------


class Device:
    """Forwards up to `capacity`, is offered up to `generator`, and `noise` of its trials lose one for no reason."""

    def __init__(self, capacity: float, generator: float = 1e9, noise: float = 0.0) -> None:
        self.capacity, self.generator, self.noise = capacity, generator, noise
        self.random = random.Random(1)
        self.asked: list[float] = []

    def __call__(self, rate: float) -> Attempt:
        self.asked.append(rate)
        offered = min(rate, self.generator)
        lost = round(max(0.0, offered - self.capacity)) + (self.random.random() < self.noise)
        return Attempt(rate, offered, lost)


def search(device: Device, start: float = 100_000, **options: float) -> Found:
    return zero_loss_rate(device, start=start, ceiling=device.generator, resolution=options.get("resolution", 0.02))


@pytest.mark.parametrize("start", [1_000, 100_000, 900_000])
@pytest.mark.parametrize("capacity", [7_000, 123_456, 600_000])
def test_a_search_finds_the_capacity_from_below(capacity: float, start: float) -> None:
    device = Device(capacity)
    found = search(device, start)
    assert found.limit == "loss"
    assert 0.975 * capacity <= found.rate <= capacity
    assert len(device.asked) <= 40


def test_a_loss_that_does_not_happen_again_is_no_limit() -> None:
    found = search(Device(200_000, noise=0.2))
    assert found.rate >= 0.8 * 200_000
    assert any(attempt.lost for attempt in found.attempts)


def test_a_load_that_the_generator_cannot_offer_is_no_throughput() -> None:
    device = Device(1e9, generator=400_000)
    found = search(device)
    assert found.limit == "generator"
    assert REACHED * 400_000 <= found.rate <= 400_000


def test_a_device_that_always_loses_has_no_throughput() -> None:
    found = search(Device(-1))
    assert (found.rate, found.limit) == (0.0, "loss")


# --- counting --------------------------------------------------------------------------------------------------------


def test_datagrams_are_found_in_frames_in_runs_and_among_others() -> None:
    assert Counters(packets=10, bytes=10 * 1042, dropped=0).datagrams(1000) == 10
    assert Counters(packets=2, bytes=2 * 42 + 64 * 1000 + 7 * 1000, dropped=0).datagrams(1000) == 71
    assert Counters(packets=11, bytes=10 * 1042 + 54, dropped=0).datagrams(1000) == 10
    assert Counters(packets=10, bytes=10 * 106, dropped=3).datagrams(64) == 13


def stat(user: int, idle: int, iowait: int = 0, softirq: int = 0) -> str:
    line = f"{user} 0 0 {idle} {iowait} 0 {softirq} 0 0 0"
    return f"cpu  {line}\ncpu0 {line}\ncpu1 {line}\nintr 1 2 3\n"


def test_processor_time_is_what_was_neither_idle_nor_others() -> None:
    before = Processor.parse(stat(100, 1000, 50), at=10.0, others=3.0)
    after = Processor.parse(stat(100 + TICKS // 2, 1000 + TICKS, 50 + TICKS // 4, TICKS // 4), at=11.0, others=3.25)
    used = after - before
    assert used.cores == 2
    assert used.busy == pytest.approx(0.75)
    assert used.idle == pytest.approx(1.25)
    assert used.used == pytest.approx(2.0 - 1.25 - 0.25)


def test_others_are_neither_descendants_nor_threads_of_the_kernel() -> None:
    processes = {
        1: Process(0, 1 * TICKS),
        2: Process(0, 10 * TICKS),  # kthreadd
        3: Process(2, 100 * TICKS),  # ksoftirqd
        10: Process(1, 1000 * TICKS),  # us
        11: Process(10, 10_000 * TICKS),
        12: Process(11, 100_000 * TICKS),
        20: Process(1, 7 * TICKS),
    }
    assert others_s(processes, 10) == 8


# --- what is shown ---------------------------------------------------------------------------------------------------


def results(*samples: Sample) -> Results:
    facts: dict[str, Any] = dict.fromkeys(("mcrelay", "commit", "kernel", "cores", "processor", "python"), "x")
    facts |= {"busy_before": 0.0, "options": {"mode": "quick", "repeat": 2, "steering": "relay"}}
    return Results(facts, list(samples), ["mcr: mcrd not installed"])


def throughput(relay: str, repetition: int, rate: float, *notes: str, **different: int | str) -> Sample:
    plain: Parameters = {"steering": "sender", "size": 1000, "outputs": 1, "rules": 1, "flows": 1, "sent": "runs"}
    parameters: Parameters = {**plain, **different}
    parameters["segmentation"] = "software"
    figures = {"datagrams_per_s": rate, "copies_per_s": rate * int(different.get("outputs", 1))}
    return Sample("throughput", relay, repetition, parameters, figures, notes)


def load(relay: str, cores: float) -> Sample:
    figures = {"offered_per_s": 200_000.0, "loss_percent": 0.0, "processor_cores": cores}
    return Sample("load", relay, 1, {"rate": 200_000}, figures)


SOME = (
    throughput("mcrelay", 1, 500_000),
    throughput("mcrelay", 2, 700_000),
    throughput("kernel", 1, 300_000),
    throughput("socat", 1, 60_000, "generator-bound"),
    load("none", 0.5),
    load("mcrelay", 0.7),
    load("kernel", 0.9),
)


def test_a_table_has_median_spread_and_ratios() -> None:
    shown = report.text(results(*SOME))
    line = next(line for line in shown.splitlines() if line.split()[:1] == ["mcrelay"] and "600,000" in line)
    assert "600,000 (500,000 to 700,000)" in line
    assert " 2.00 " in line
    assert " 10.00 " in line
    assert "> 60,000" in shown
    assert "mcr: mcrd not installed" in shown


def test_columns_are_aligned_and_pipes_are_closed() -> None:
    table = report.Table("t", "r", ("a", "b", "c"), [("x", "1", "yes"), ("long", "1,000", "no")])
    assert report.aligned(table).splitlines() == ["  a         b  c", "  x         1  yes", "  long  1,000  no"]
    assert report.piped(table).splitlines()[:2] == ["| a | b | c |", "|---|---|---|"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0.0, "0"),
        (0.1234, "0.123"),
        (7.0, "7"),
        (12.345, "12.3"),
        (999_499.0, "999,000"),
        (1234.5, "1,230"),
    ],
)
def test_a_number_has_the_digits_that_matter(value: float | None, text: str) -> None:
    assert report.number(value) == text


def test_processor_time_per_datagram_is_the_difference_to_no_relay() -> None:
    assert processor_us(results(*SOME), "mcrelay", 200_000) == pytest.approx(1.0)
    assert processor_us(results(*SOME), "socat", 200_000) is None


def test_targets_are_reached_missed_or_not_measured() -> None:
    found = {verdict.target.name: verdict for verdict in verdicts(results(*SOME))}
    assert len(found) == len(TARGETS) == 15
    assert found["zero-loss throughput 1 to 1, of the kernel's"].word == "reached"
    assert found["zero-loss throughput 1 to 1, of the kernel's"].value == pytest.approx(2.0)
    assert found["processor time per datagram at 200,000/s, of the kernel's"].value == pytest.approx(0.5)
    assert found["join delay, p50"].word == "not measured"
    slow = verdicts(results(throughput("mcrelay", 1, 100_000), throughput("socat", 1, 60_000)))
    assert slow[0].word == "NOT REACHED"
    one_by_one = (
        throughput("mcrelay", 1, 120_000, "generator-bound", rules=50, flows=50, sent="one by one"),
        throughput("mcrelay", 1, 160_000, sent="one by one"),
    )
    flows = verdicts(results(*SOME, *one_by_one))
    assert flows[2].value == 75  # of one flow that is sent like them
    assert "the generator's limit" in flows[2].figures


def test_the_document_holds_every_sample() -> None:
    document = json.loads(json.dumps(results(*SOME).document()))
    assert set(document) == {"schema", "environment", "samples", "skipped"}
    assert len(document["samples"]) == len(SOME)
    assert set(document["samples"][0]) == {"measurement", "relay", "repetition", "parameters", "figures", "notes"}


def test_a_summary_is_of_all_repetitions() -> None:
    assert Summary.of([3.0, 1.0, 2.0]) == Summary(2.0, 1.0, 3.0, 3)


# --- what runs -------------------------------------------------------------------------------------------------------


def test_arguments_name_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(["--only", "latency,outputs", "--relays", "kernel"]).only == ["latency", "outputs"]
    for wrong in (["--only", "speed"], ["--relays", "nobody"], ["--repeat", "0"]):
        with pytest.raises(SystemExit):
            parse(wrong)
    assert "'nobody' is none of mcrelay, " in capsys.readouterr().err


@pytest.mark.parametrize("profile", [QUICK, FULL], ids=lambda profile: profile.name)
def test_a_profile_names_relays_that_exist_and_can_be_selected_from(profile: Profile) -> None:
    assert set(profile.relays) <= set(RELAYS)
    whole = course.settings(profile)
    assert course.selected(whole, []) == whole
    assert [setting.measurements for setting in course.selected(whole, ["latency"])] == [("latency",)]
    assert {setting.name for setting in course.selected(whole, ["outputs"])} == {"outputs"}


def test_rules_are_of_the_groups_that_the_generator_counts_through() -> None:
    assert [rule.group for rule in rules(300)][::255] == ["239.1.0.1", "239.1.1.0"]


TINY = Profile(
    name="tiny",
    repeat=2,
    trial_s=0.1,
    load_s=0.1,
    latency_s=0.1,
    resolution=0.5,
    payloads=(1000,),
    loads=(2_000,),
    latency_rates=(2_000,),
    outputs=(2,),
    rules=(),
    idle_rules=(),
    joins=2,
    noise_s=0.2,
    segmentations=("software",),
    relays=("mcrelay", "kernel"),
    steerings=(),
    comparing=False,
)


@needs_namespaces
def test_a_tiny_run_measures_interleaved_and_leaves_nothing(tmp_path: Path) -> None:
    """Loads that anything forwards, so that the counters have to agree; how fast is not looked at."""
    before = set(NETNS_DIRECTORY.iterdir()) if NETNS_DIRECTORY.exists() else set()
    found = Results({**results().environment})
    said: list[str] = []
    wanted = ["load", "latency", "accounted", "memory", "delays"]
    course.run(found, TINY, TINY.relays, wanted, "relay", said.append)

    installed = [name for name in TINY.relays if RELAYS[name].missing() is None]
    assert len(found.skipped) == len(TINY.relays) - len(installed)
    loads = [sample for sample in found.samples if sample.measurement == "load"]
    assert [(s.relay, s.repetition) for s in loads] == [(name, n) for n in (1, 2) for name in ("none", *installed)]
    assert {sample.figures["loss_percent"] for sample in loads if sample.relay == "none"} == {100.0}
    assert {sample.figures["loss_percent"] for sample in loads if sample.relay != "none"} == {0.0}
    for sample in found.samples:
        if sample.measurement == "accounted":
            assert sample.figures["received"] == sample.figures["sent"] > 0
        if sample.measurement == "latency":
            assert sample.figures["lost"] == 0
    ours = {sample.measurement for sample in found.samples if sample.relay == "mcrelay"}
    assert ours == {"load", "latency", "accounted", "memory", "delays"}
    assert "Latency" in report.text(found)
    assert set(NETNS_DIRECTORY.iterdir()) == before

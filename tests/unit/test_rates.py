"""Rates between two readings of the counters."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcrelay.api import InterfaceFacts
from mcrelay.rates import Reading, between, is_loss, per_second
from tests.unit.readings import output, reading, readings, rule, stats, worker


def test_rates_are_of_the_time_between() -> None:
    before = reading(rule("a", output(packets=10, size=1000), packets=10, bytes=1000), workers=(worker(received=5),))
    after = reading(rule("a", output(packets=40, size=9000), packets=30, bytes=2000), workers=(worker(received=9),))
    shown = between(before, after, 2.0)
    (row,) = shown.rules
    assert (row.rate("packets"), row.rate("bytes"), row.copies) == (10.0, 500.0, 15.0)
    assert row.outputs[0].rate("bytes") == 4000.0
    assert shown.total("received") == 2.0


@pytest.mark.parametrize(
    ("before", "after", "rate"),
    [(100, 150, 25.0), (100, 100, 0.0), (100, 40, 20.0), (100, 0, 0.0)],
    ids=["counts on", "rests", "began anew", "began anew and rests"],
)
def test_a_counter_that_went_back_counts_from_zero(before: int, after: int, rate: float) -> None:
    assert per_second(before, after, 2.0) == rate


def test_what_was_not_there_before_counts_from_zero() -> None:
    shown = between(reading(rule("a")), reading(rule("a"), rule("b", output(packets=6), packets=4)), 2.0)
    assert [row.rate("packets") for row in shown.rules] == [0.0, 2.0]
    assert shown.rules[1].copies == 3.0


def test_a_rule_with_another_ones_counters_counts_from_zero() -> None:
    """Replaced in its place: of its outputs, some are others, and some more or fewer."""
    before = reading(rule("a", output("x", packets=100), output("y", packets=100), packets=100))
    after = reading(rule("a", output("z", packets=10), packets=10))
    (row,) = between(before, after, 1.0).rules
    assert (row.rate("packets"), row.copies) == (10.0, 10.0)


def test_an_output_that_was_paused_meanwhile_goes_on() -> None:
    before = reading(rule("a", output("239.2.2.2:6000%out0", packets=1000)))
    after = reading(rule("a", output("239.2.2.2:6000%out0,paused", packets=1001, paused=9)))
    (row,) = between(before, after, 1.0).rules[0].outputs
    assert (row.rate("packets"), row.reasons) == (1.0, {"paused": 9.0})


def test_without_a_reading_before_there_are_no_rates() -> None:
    after = reading(rule("a", output(packets=6, egress_full=3), packets=4), workers=(worker(received=7),))
    for shown in (between(None, after, 1.0), between(after, after, 0.0), between(after, after, -1.0)):
        assert shown.seconds == 0
        assert (shown.rules[0].rate("packets"), shown.rules[0].loss, shown.total("received")) == (0, 0, 0)


def test_loss_is_what_nobody_asked_for() -> None:
    before = reading(rule("a", output(), output()))
    after = reading(rule("a", output(packets=60, egress_full=20, paused=1000), output(packets=20), own=5))
    (row,) = between(before, after, 1.0).rules
    assert row.outputs[0].loss == 0.25
    assert row.loss == 0.2
    assert list(row.reasons.items()) == [("paused", 1000.0), ("egress_full", 20.0), ("own", 5.0)]
    assert row.drops == 1025.0
    assert [is_loss(reason) for reason in ("egress_full", "paused", "no_rule", "own", "of a later version")] == [
        *(True, False, False, False, True)
    ]


def test_loss_of_a_worker_is_of_what_was_meant_for_it() -> None:
    before = reading(workers=(worker(), worker(1)))
    after = reading(
        workers=(
            worker(received=1000, forwarded=90, dropped={"no_rule": 900, "bad_udp_checksum": 10}),
            worker(1, dropped={"no_rule": 1}),
        )
    )
    shown = between(before, after, 1.0)
    assert [row.loss for row in shown.workers] == [0.1, 0.0]
    assert list(shown.reasons.items()) == [("no_rule", 901.0), ("bad_udp_checksum", 10.0)]


def test_loss_of_an_interface_is_what_the_kernel_dropped() -> None:
    def seen(frames: int, overruns: int) -> Reading:
        facts = InterfaceFacts("in0", (), frames, overruns, merged=0, segments_refused=0, segmentation=True)
        return Reading(stats(), interfaces=(facts,))

    (row,) = between(seen(100, 0), seen(200, 25), 1.0).interfaces
    assert (row.drops, row.loss) == (25.0, 0.25)


def test_a_rule_has_its_state_if_it_was_listed() -> None:
    listed = between(None, reading(rule("a"), rule("b"), problems={"b": "no such interface"}), 1.0)
    assert [listed.state(row) for row in listed.rules] == ["active", "pending"]
    assert listed.problems(listed.rules[1]) == ("no such interface",)
    unlisted = between(None, Reading(stats(rule("a"))), 1.0)
    assert (unlisted.state(unlisted.rules[0]), unlisted.problems(unlisted.rules[0])) == ("-", ())


@given(readings(), readings(), st.floats(0.001, 1e6))
def test_no_rate_is_negative_and_no_loss_more_than_all(before: Reading, after: Reading, seconds: float) -> None:
    shown = between(before, after, seconds)
    rows: list[Any] = [*shown.workers, *shown.rules, *shown.interfaces]
    rows += [output for row in shown.rules for output in row.outputs]
    for row in rows:
        for counter in (field for field in row.now.__struct_fields__ if isinstance(getattr(row.now, field), int)):
            assert row.rate(counter) >= 0
        assert row.drops >= 0
        assert 0 <= row.loss <= 1

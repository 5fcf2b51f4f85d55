"""Counters: the page and the limits as Python states them are those that C states, and the page says what was written
to it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcrelay import counters
from mcrelay.counters import DROP_REASONS, OUTPUT_REASONS, PAGE_SIZE, REASON, TOTALS, LoopFacts, Page
from mcrelay.engines import loops
from mcrelay.engines.reference import DATAGRAMS_MAX
from mcrelay.limits import (
    ADDRESSES_MAX,
    INTERFACES_MAX,
    LATENCY_BUDGET_US_MAX,
    OUTPUTS_MAX,
    RULE_OUTPUTS_MAX,
    RULES_MAX,
)

NATIVE = Path(__file__).resolve().parents[2] / "native"
HEADER = NATIVE / "counters.h"


@pytest.fixture
def page() -> Page:
    return Page(memoryview(bytearray(PAGE_SIZE)))


# --- the layout ------------------------------------------------------------------------------------------------------


def test_the_extension_has_the_same_page(native: ModuleType) -> None:
    assert native.PAGE_SIZE == PAGE_SIZE
    assert native.PAGE_MAGIC == counters.MAGIC
    assert native.PAGE_VERSION == counters.VERSION
    assert len(DROP_REASONS) == native.DROP_REASON_COUNT


def test_the_header_has_the_same_reasons_in_the_same_order() -> None:
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)
    (body,) = re.findall(r"enum drop_reason \{(.*?)\}", text, re.DOTALL)
    names = [entry.partition("=")[0].strip() for entry in body.split(",")]
    assert names[-1] == "DROP_REASONS"
    assert [name.removeprefix("DROP_").lower() for name in names[:-1]] == list(DROP_REASONS)
    assert {reason for reason in DROP_REASONS if reason.startswith("egress_")} < set(OUTPUT_REASONS)


# C expression -> what we say it is.
STATED = {
    "sizeof(struct counters_page)": PAGE_SIZE,
    "sizeof(struct counters_rule)": 8 * counters.RULE_WORDS,
    "sizeof(struct counters_output)": 8 * counters.OUTPUT_WORDS,
    "COUNTERS_MAGIC": counters.MAGIC,
    "COUNTERS_VERSION": counters.VERSION,
    "COUNTERS_RULES_MAX": RULES_MAX,
    "COUNTERS_OUTPUTS_MAX": OUTPUTS_MAX,
    "TABLE_INTERFACES_MAX": INTERFACES_MAX,
    "ADDRESSES_MAX": ADDRESSES_MAX,
    **{f"LOOP_{name}": value for name, value in vars(loops).items() if name.isupper() and isinstance(value, int)},
    "PACE_BUDGET_US_MAX": LATENCY_BUDGET_US_MAX,
    "PACKET_DATAGRAMS_MAX": DATAGRAMS_MAX,
    "TABLE_OUTPUTS_PER_RULE_MAX": RULE_OUTPUTS_MAX,
    "COUNTERS_OUTPUT_DROPS": OUTPUT_REASONS.index("interrupted"),
    "DROP_REASONS": len(DROP_REASONS),
    "DROP_EGRESS_FULL": REASON["egress_full"],
    "DROP_EGRESS_LIMITED": REASON["egress_limited"],
    "offsetof(struct counters_page, magic)": 0,
    "offsetof(struct counters_page, version)": 8,
    "offsetof(struct counters_page, dropped)": 8 * counters.DROPPED,
    "sizeof(struct counters_interface)": 8 * counters.INTERFACE_WORDS,
    "COUNTERS_INTERFACES_MAX": INTERFACES_MAX,
    "offsetof(struct counters_page, interfaces)": 8 * counters.INTERFACES_OFFSET,
    **{
        f"offsetof(struct counters_interface, {name})": 8 * word
        for word, name in enumerate(counters.INTERFACE_COUNTERS)
    },
    "offsetof(struct counters_page, rules)": 8 * counters.RULES_OFFSET,
    "offsetof(struct counters_page, outputs)": 8 * counters.OUTPUTS_OFFSET,
    **{f"offsetof(struct counters_page, {name})": 8 * word for name, word in TOTALS.items()},
    **{
        f"offsetof(struct counters_rule, {name})": 8 * word
        for word, name in enumerate(("packets", "bytes", "forwarded", "dropped", *LoopFacts._fields))
    },
    **{
        f"offsetof(struct counters_output, {name})": 8 * word
        for word, name in enumerate(("packets", "bytes", "dropped"))
    },
}


def test_a_compiler_lays_the_page_out_in_the_same_way(tmp_path: Path) -> None:
    program = tmp_path / "layout"
    source = program.with_suffix(".c")
    prints = "\n".join(f'printf("%llu\\n", (unsigned long long)({expression}));' for expression in STATED)
    headers = "\n".join(
        f'#include "{name}"' for name in ("counters.h", "table.h", "addresses.h", "loops.h", "pace.h", "stdio.h")
    )
    source.write_text(f"{headers}\nint main(void)\n{{\n{prints}\nreturn 0;\n}}\n")
    subprocess.run(["cc", "-std=gnu11", f"-I{NATIVE}", "-o", program, source], check=True, timeout=30)
    printed = subprocess.run([program], check=True, capture_output=True, text=True, timeout=30).stdout
    assert dict(zip(STATED, map(int, printed.split()), strict=True)) == STATED


def test_every_total_of_the_header_is_read() -> None:
    """A counter added to the page in C only would be counted and never seen."""
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)
    (body,) = re.findall(r"struct counters_page \{(.*?)\};", text, re.DOTALL)
    assert set(re.findall(r"\bcounter (\w+);", body)) == set(TOTALS)


# --- reading and writing ---------------------------------------------------------------------------------------------


def test_a_fresh_page_is_marked_and_counts_nothing(page: Page) -> None:
    page.initialise()
    assert not any(page.totals().values())
    assert page.dropped() == {}
    assert page.rule(0) == (0, 0, 0, 0)
    assert page.output(0) == (0, 0, {})


def test_a_page_begins_with_its_mark() -> None:
    buffer = bytearray(PAGE_SIZE)
    Page(memoryview(buffer)).initialise()
    assert int.from_bytes(buffer[:8], sys.byteorder) == counters.MAGIC == int.from_bytes(b"mcrelay1", "big")
    assert int.from_bytes(buffer[8:16], sys.byteorder) == counters.VERSION


def test_a_successor_goes_on_counting() -> None:
    buffer = bytearray(PAGE_SIZE)
    first = Page(memoryview(buffer))
    first.initialise()
    first.count(counters.RECEIVED, 5)
    first.release()
    second = Page(memoryview(buffer))
    second.initialise()
    second.count(counters.RECEIVED)
    assert second.totals()["received"] == 6


@pytest.mark.parametrize("name", TOTALS)
def test_a_total_reads_as_counted_and_is_no_other(page: Page, name: str) -> None:
    page.count(TOTALS[name], 3)
    page.count(TOTALS[name])
    assert page.totals() == {other: 4 if other == name else 0 for other in TOTALS}
    page.set(TOTALS[name], 2**64 - 1)
    assert page.totals()[name] == 2**64 - 1
    assert page.dropped() == {}


@pytest.mark.parametrize("name", DROP_REASONS[1:])
def test_a_drop_reads_under_its_reason(page: Page, name: str) -> None:
    page.count_dropped(REASON[name])
    page.count_dropped(REASON[name], 2)
    assert page.dropped() == {name: 3}
    assert not any(page.totals().values())


@pytest.mark.parametrize("name", OUTPUT_REASONS)
def test_a_drop_of_an_output_reads_under_its_reason(page: Page, name: str) -> None:
    page.count_output_dropped(7, REASON[name])
    page.count_output(7, 100)
    assert page.output(7) == (1, 100, {name: 1})
    assert page.output(6) == page.output(8) == (0, 0, {})


rule_numbers = st.sampled_from([0, 1, 2, RULES_MAX - 2, RULES_MAX - 1])
output_numbers = st.sampled_from([0, 1, 2, OUTPUTS_MAX - 2, OUTPUTS_MAX - 1])
small = st.integers(0, 10**6)


@pytest.fixture(scope="module")
def cleared() -> Iterator[Page]:
    """One page for all examples, which clear() makes fresh: 5 MB each would be slow."""
    opened = Page(memoryview(bytearray(PAGE_SIZE)))
    yield opened
    opened.release()


@given(
    st.lists(st.tuples(rule_numbers, small, small, small, small), max_size=20),
    st.lists(st.tuples(output_numbers, small), max_size=20),
)
def test_rules_and_outputs_read_as_counted_until_cleared(
    cleared: Page, rules: list[tuple[int, int, int, int, int]], outputs: list[tuple[int, int]]
) -> None:
    rule_model = dict.fromkeys((0, 1, 2, RULES_MAX - 2, RULES_MAX - 1), (0, 0, 0, 0))
    output_model = dict.fromkeys((0, 1, 2, OUTPUTS_MAX - 2, OUTPUTS_MAX - 1), (0, 0))
    for index, packets, size, forwarded, dropped in rules:
        cleared.count_rule(index, packets=packets, size=size, forwarded=forwarded, dropped=dropped)
        a, b, c, d = rule_model[index]
        rule_model[index] = (a + packets, b + size, c + forwarded, d + dropped)
    for index, size in outputs:
        cleared.count_output(index, size)
        packets, total = output_model[index]
        output_model[index] = (packets + 1, total + size)
    assert {index: cleared.rule(index) for index in rule_model} == rule_model
    assert {index: cleared.output(index)[:2] for index in output_model} == output_model
    assert not any(cleared.totals().values())
    assert cleared.dropped() == {}

    cleared.clear(rule_model, output_model)
    assert {cleared.rule(index) for index in rule_model} == {(0, 0, 0, 0)}
    assert all(cleared.output(index) == (0, 0, {}) for index in output_model)


def test_clearing_takes_only_what_it_names(page: Page) -> None:
    for index in (4, 5, 6):
        page.count_rule(index, packets=1, size=2, forwarded=3, dropped=4)
        page.count_output(index, 100)
        page.count_output_dropped(index, REASON["egress_error"])
    page.count(counters.RECEIVED, 9)
    page.clear([5], [6])
    assert [page.rule(index)[0] for index in (4, 5, 6)] == [1, 0, 1]
    assert [page.output(index) for index in (4, 5, 6)] == [
        (1, 100, {"egress_error": 1}),
        (1, 100, {"egress_error": 1}),
        (0, 0, {}),
    ]
    assert page.totals()["received"] == 9


def test_what_a_rule_was_not_to_forward_reads_apart_from_what_it_was(page: Page) -> None:
    page.count_rule(7, packets=1, size=2, forwarded=3, dropped=4)
    page.count_loop(7, own=5)
    page.count_loop(7, looped=6)
    page.count_loop(7, own=1, looped=1)
    page.suspend_rule(7, 10**18)
    page.suspend_rule(7, 2 * 10**18)
    assert page.loop(7) == LoopFacts(own=6, looped=7, suspensions=2, suspended_until_ns=2 * 10**18)
    assert page.rule(7) == (1, 2, 3, 4)
    assert page.loop(6) == page.loop(8) == LoopFacts(0, 0, 0, 0)
    assert page.rule(6) == page.rule(8) == (0, 0, 0, 0)
    page.clear([7], [])
    assert page.loop(7) == LoopFacts(0, 0, 0, 0)


def test_a_suspension_ends_with_the_worker_that_kept_it(page: Page) -> None:
    page.count_loop(3, own=1, looped=2)
    page.suspend_rule(3, 10**18)
    page.settle([(3, [])])
    assert page.loop(3) == LoopFacts(own=1, looped=2, suspensions=1, suspended_until_ns=0)


@pytest.mark.parametrize("index", [-1, RULES_MAX, 2**32])
def test_there_is_no_such_rule(page: Page, index: int) -> None:
    with pytest.raises(IndexError, match=f"rule counter {index}"):
        page.rule(index)
    with pytest.raises(IndexError):
        page.loop(index)
    with pytest.raises(IndexError):
        page.count_rule(index, packets=1)
    with pytest.raises(IndexError):
        page.count_loop(index, own=1)
    with pytest.raises(IndexError):
        page.suspend_rule(index, 1)
    with pytest.raises(IndexError):
        page.clear([index], [])


@pytest.mark.parametrize("index", [-1, OUTPUTS_MAX, 2**32])
def test_there_is_no_such_output(page: Page, index: int) -> None:
    with pytest.raises(IndexError, match=f"output counter {index}"):
        page.output(index)
    with pytest.raises(IndexError):
        page.count_output(index, 1)
    with pytest.raises(IndexError):
        page.count_output_dropped(index, REASON["egress_full"])
    with pytest.raises(IndexError):
        page.clear([], [index])


def test_a_page_has_its_size() -> None:
    with pytest.raises(ValueError, match=f"{PAGE_SIZE} bytes, this one {PAGE_SIZE - 8}"):
        Page(memoryview(bytearray(PAGE_SIZE - 8)))


def test_a_reader_cannot_write() -> None:
    reader = Page(memoryview(bytes(PAGE_SIZE)))
    assert reader.dropped() == {}
    with pytest.raises(TypeError, match="read-only"):
        reader.count(counters.RECEIVED)


def test_a_released_page_is_neither_read_nor_held() -> None:
    buffer = bytearray(PAGE_SIZE)
    released = Page(memoryview(buffer))
    released.release()
    with pytest.raises(ValueError, match="released"):
        released.totals()

"""What text takes of a line, and numbers as people read them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcrelay.cells import clip, fit, human, printable, width


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("feed-a", "feed-a"),
        ("\x1b[2J\x07\n\x7f", "?[2J???"),
        ("a\x9b31mb", "a?31mb"),  # an escape sequence's beginning in eight bits
        ("\u202etxt", "?txt"),  # would turn the writing around
        ("\u00fcber \u7db2\u8def", "\u00fcber \u7db2\u8def"),
        ("\ud800", "?"),
    ],
)
def test_only_what_is_printed_as_itself_is_left(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_characters_take_no_cell_one_or_two() -> None:
    assert [width(text) for text in ("abc", "\u00fc", "u\u0308", "\u7db2\u8def")] == [3, 1, 1, 4]
    assert clip("abcdef", 4) == "abc~"
    assert clip("\u7db2\u8def\u5668", 4) == "\u7db2~"  # the second would stand half outside
    assert (fit("ab", 4), fit("ab", 4, right=True), fit("abc", 0)) == ("ab  ", "  ab", "")


@given(st.text(), st.integers(0, 50))
def test_what_is_made_to_fit_fits(text: str, cells: int) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert width(clip(shown, cells)) <= cells
    assert width(fit(shown, cells)) == cells


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0, "", "0"),
        (999, "", "999"),
        (0.04, "", "0.0"),
        (1.25, "", "1.2"),
        (999.4, "", "999"),
        (999.6, "", "1.0k"),
        (1000, "", "1.0k"),
        (1_234_567, "bit/s", "1.2 Mbit/s"),
        (35e6, "bit/s", "35.0 Mbit/s"),
        (99.96, "", "100"),
        (12, "B", "12 B"),
        (2**64, "B", "18.4 EB"),
    ],
)
def test_numbers_are_short(value: float, unit: str, text: str) -> None:
    assert human(value, unit) == text

"""The screen of `mcrelay top`, without a terminal: what keys do, and what is seen."""

from __future__ import annotations

from collections.abc import Iterable

import click
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcrelay import cells, cli_top, top_tables
from mcrelay.rates import Rates, Reading, between
from mcrelay.top import INTERVALS, Screen, State, layout, press
from tests.unit.readings import output, reading, readings, rule, worker

SIZE = (24, 120)
NAMED_KEYS = ["up", "down", "pageup", "pagedown", "home", "end", "left", "right", "enter", "escape"]
NAMED_KEYS += ["tab", "backtab", "backspace"]


def rated(count: int = 3) -> Rates:
    """feed-0, feed-1, ... with as many packets a second; the last drops 4 copies of 8."""
    before = reading(*(rule(f"feed-{n}", output(), id=f"{n:012x}") for n in range(count)), workers=(worker(),))
    last = rule(f"feed-{count - 1}", output(packets=4, egress_full=4), packets=count - 1, id=f"{count - 1:012x}")
    others = (rule(f"feed-{n}", output(packets=n), packets=n, id=f"{n:012x}") for n in range(count - 1))
    dropped = {"egress_full": 4}
    workers = (worker(received=9, copies=7, copies_bytes=500, dropped=dropped),)
    problems = {"feed-0": "there is no interface 'in0'"}
    return between(before, reading(*others, last, workers=workers, problems=problems), 1.0)


def after(keys: Iterable[str], shown: Rates | None, size: tuple[int, int] = SIZE, state: State | None = None) -> Screen:
    """The screen after keys, each of which somebody has seen the effect of."""
    screen = layout(state or State(), shown, size, heading="/run/x")
    for key in keys:
        screen = layout(press(screen.state, key), shown, size, heading="/run/x")
    return screen


def texts(screen: Screen) -> list[str]:
    return ["".join(span.text for span in line).rstrip() for line in screen.lines]


def names(screen: Screen) -> list[str]:
    """The first cells of the rows."""
    return [text.split()[0] for text in texts(screen)[4:-1] if text]


def marked(screen: Screen) -> list[str]:
    """What is selected among the rows."""
    return [line[0].text.strip() for line in screen.lines[4:-1] if line and line[0].style == "selected"]


# --- what is seen ----------------------------------------------------------------------------------------------------


def test_rules_are_shown_with_rates_loss_and_what_is_wrong() -> None:
    screen = after([], rated())
    lines = texts(screen)
    assert lines[0] == "every 1 s, rates over 1.0 s  /run/x"
    assert lines[1] == "in 9/s 0 bit/s  out 7/s 4.0 kbit/s  dropped 4/s loss 44.4%: egress_full 4/s"
    assert lines[2] == "1 rules 3  2 outputs 3  3 workers 1  4 interfaces 0"
    assert lines[3].split()[:8] == ["RULE", "STATE", "PKT/Sv", "BIT/S", "COPY/S", "DROP/S", "LOSS", "WHY"]
    assert lines[4].split()[:9] == ["feed-2", "active", "2", "0", "4", "4", "50%", "egress_full", "4/s"]
    assert lines[6].split()[:7] == ["feed-0", "pending", "0", "0", "0", "0", "0%"]
    assert "there is no interface 'in0'" in lines[6]
    assert "q quit" in lines[-1]
    styles = {span.text.strip(): span.style for line in screen.lines for span in line}
    assert (styles["pending"], styles["active"], styles["50%"], styles["0%"]) == ("bad", "good", "bad", "plain")


def test_before_there_are_rates_none_are_shown() -> None:
    assert texts(layout(State(), None, SIZE, heading="/run/x"))[:2] == ["/run/x", "reading the counters"]
    once = between(None, rated().reading, 0.0)
    assert texts(after([], once))[6].split()[2:7] == ["-"] * 5


def test_a_lost_daemon_is_said_and_what_was_known_is_still_shown() -> None:
    notice = "no daemon at /run/x; reconnecting"
    screen = layout(State(), rated(), SIZE, heading="/run/x", notice=notice)
    assert texts(screen)[1] == notice
    assert names(screen) == ["feed-2", "feed-1", "feed-0"]
    for rows in range(1, 6):
        assert notice in texts(layout(State(), rated(), (rows, 80), notice=notice))
        assert notice in texts(layout(State(), None, (rows, 80), notice=notice))
        assert notice in texts(layout(State(page="help"), None, (rows, 80), notice=notice)) or rows == 1


@pytest.mark.parametrize("key", ["1", "2", "3", "4"])
def test_each_view_has_its_key(key: str) -> None:
    view = top_tables.VIEWS[int(key) - 1]
    assert after([key], rated()).state.view == view
    assert after(["tab"] * (int(key) - 1), rated()).state.view == view
    assert after(["backtab"] * (5 - int(key)), rated()).state.view == view
    assert after(["4", "tab"], rated()).state.view == "rules"


def test_only_what_is_seen_is_laid_out(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = rated(8192)
    written: list[float] = []

    def percent(value: float, _shown: Rates) -> str:
        written.append(value)
        return "%"

    monkeypatch.setattr(top_tables, "percent", percent)
    assert names(after([], shown))[0] == "feed-8191"
    assert len(written) == SIZE[0] - 5


# --- order -----------------------------------------------------------------------------------------------------------


def test_rows_are_sorted_by_any_column_in_either_order() -> None:
    assert names(after([], rated())) == ["feed-2", "feed-1", "feed-0"]
    assert names(after(["r"], rated())) == ["feed-0", "feed-1", "feed-2"]
    by_state = after(["<"], rated())
    assert "STATE^" in texts(by_state)[3]
    assert names(by_state)[-1] == "feed-0"  # active, active, pending
    assert names(after(["<", "r"], rated()))[0] == "feed-0"
    assert "RULE^" in texts(after(["<"] * 9, rated()))[3]
    assert "LOSSv" in texts(after([">"] * 4, rated()))[3]
    last = after([">"] * 99, rated()).state
    assert last.sort.column == len(top_tables.TABLES["rules"].columns) - 1
    back = after([">", "2", "1"], rated())  # each view has its own
    assert "BIT/Sv" in texts(back)[3]


# --- selection -------------------------------------------------------------------------------------------------------


def test_a_selection_stays_with_its_row() -> None:
    assert marked(after([], rated())) == []
    screen = after(["down", "down"], rated())
    assert marked(screen) == ["feed-1"]
    assert marked(after(["r", "<"], rated(), state=screen.state)) == ["feed-1"]
    assert marked(after(["k"], rated(), state=screen.state)) == ["feed-2"]
    assert marked(after(["up"] * 5, rated(), state=screen.state)) == ["feed-2"]
    assert marked(after(["end"], rated(), state=screen.state)) == ["feed-0"]
    for key in ("home", "escape"):
        assert marked(after([key], rated(), state=screen.state)) == []


def test_where_a_selected_row_is_gone_its_neighbour_is_selected() -> None:
    screen = after(["down", "down", "down"], rated(3))  # feed-0
    without = between(None, reading(*rated(3).reading.stats.rules[1:]), 1.0)
    assert marked(layout(screen.state, without, SIZE)) == ["feed-2"]  # the last one


def test_the_selected_row_is_seen() -> None:
    shown = rated(100)
    screen = after(["end"], shown)
    assert marked(screen) == ["feed-0"]
    assert names(screen)[-1] == "feed-0"
    screen = after(["pageup"], shown, state=screen.state)
    assert marked(screen) == [names(screen)[0]] == [f"feed-{SIZE[0] - 5}"]
    small = layout(screen.state, shown, (8, 60))
    assert marked(small) == marked(screen)
    assert marked(after(["pagedown"] * 20, shown)) == ["feed-0"]


# --- filter ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("feed-1", ["feed-1"]),
        ("FEED-2", ["feed-2"]),
        (f"{0:012x}", ["feed-0"]),
        ("%in0", ["feed-2", "feed-1", "feed-0"]),
    ],
)
def test_a_filter_leaves_what_has_its_text(text: str, found: list[str]) -> None:
    screen = after(["/", *text], rated())
    assert names(screen) == found
    assert texts(screen)[-1] == f"/{text}_"
    assert f"1 rules {len(found)}/3 " in texts(screen)[2]
    kept = after(["enter"], rated(), state=screen.state)
    assert names(kept) == found
    assert f"filter: {text}" in texts(kept)[2]
    assert "q quit" in texts(kept)[-1]
    assert len(names(after(["escape"], rated(), state=kept.state))) == 3


def test_a_filter_is_typed_like_text() -> None:
    screen = after(["/", "q", "h", "1", "\u00fc", "\x1b", "backspace"], rated())
    assert screen.state.filter == "qh1"
    assert not screen.state.is_done
    assert names(screen) == []
    assert names(after(["enter", "down", "enter"], rated(), state=screen.state)) == []
    assert after(["backspace"] * 4, rated(), state=screen.state).state.is_typing is False
    assert len(names(after(["escape"], rated(), state=screen.state))) == 3
    assert len(after(["/", *("x" * 1000)], rated()).state.filter) <= 100


# --- details and help ------------------------------------------------------------------------------------------------


def test_details_have_all_that_is_counted_and_what_to_do() -> None:
    screen = after(["enter"], rated(), size=(40, 80))  # the first, where none is selected
    text = "\n".join(texts(screen))
    assert text.startswith("rule feed-2\n")
    for words in (
        "input       239.1.1.1:5000%in0",
        "state       active",
        "packets     2  2/s",
        "output 1: 239.2.2.2:6000%out0",
        "loss        50%",
        "egress_full: 4  4/s",
        "    $ tc -s qdisc show dev out0",
    ):
        assert words in text
    assert names(after(["enter", "escape"], rated())) == ["feed-2", "feed-1", "feed-0"]
    problem = "\n".join(texts(after(["end", "enter"], rated())))
    assert "problem     there is no interface 'in0'" in problem
    of_output = texts(after(["2", "down", "enter"], rated()))
    assert of_output[0] == "rule feed-2"
    of_worker = "\n".join(texts(after(["3", "enter"], rated())))
    assert of_worker.startswith("worker data/0\n")
    assert "egress_full: 4  4/s" in of_worker


def test_details_of_a_rule_stay_there_and_say_that_it_is_gone() -> None:
    screen = after(["down", "down", "enter"], rated())
    assert texts(screen)[0] == "rule feed-1"
    filtered = State(**{**{f: getattr(screen.state, f) for f in State.__slots__}, "filter": "feed-2"})
    assert texts(layout(filtered, rated(), SIZE))[0] == "rule feed-1"
    without = between(None, reading(*rated().reading.stats.rules[2:]), 1.0)
    assert texts(layout(screen.state, without, SIZE))[0] == "it is not there"
    assert texts(after(["enter"], between(None, reading(), 1.0)))[0] == "it is not there"


def test_long_details_are_scrolled() -> None:
    many = between(None, reading(rule("many", *(output(f"239.2.2.2:{n}%out0") for n in range(1, 1001)))), 1.0)
    screen = after(["enter"], many)
    assert texts(screen)[0] == "rule many"
    assert texts(after(["down"], many, state=screen.state))[0] != "rule many"
    ended = after(["end"], many, state=screen.state)
    assert any("1000" in text for text in texts(ended))
    assert texts(after(["home"], many, state=ended.state))[0] == "rule many"


def test_help_names_the_keys() -> None:
    for key in ("h", "?"):
        screen = after([key], rated(), size=(40, 120))
        assert texts(screen)[0] == "mcrelay top"
        for name in ("filter", "quit", "details", "pause", "sort"):
            assert name in " ".join(texts(screen)).lower()
        assert all(not text.endswith("~") for text in texts(after([key], rated(), size=(40, 80))))
    assert names(after(["h", "q"], rated())) == ["feed-2", "feed-1", "feed-0"]


# --- the rest --------------------------------------------------------------------------------------------------------


def test_pause_interval_and_quit() -> None:
    assert "PAUSED" in texts(after([" "], rated()))[0]
    assert "PAUSED" not in texts(after([" ", "p"], rated()))[0]
    assert "every 2 s" in texts(after(["+"], rated()))[0]
    assert "every 0.5 s" in texts(after(["-"], rated()))[0]
    assert after(["+"] * 99, rated()).state.interval_s == INTERVALS[-1]
    assert after(["-"] * 99, rated()).state.interval_s == INTERVALS[0]
    assert after(["q"], rated()).state.is_done


def test_hostile_names_do_not_reach_the_terminal() -> None:
    evil = "\x1b[2J\x9b31m\u202e\r\nx"
    shown = between(None, reading(rule(evil, output(evil, egress_full=1), id=evil), problems={evil: evil}), 1.0)
    for keys in ([], ["2"], ["enter"], ["/", "x"]):
        for text in texts(after(keys, shown)):
            assert text.isprintable()


keys_pressed = st.lists(st.sampled_from([*NAMED_KEYS, *"1234hqr<>+-pjk/? ="]) | st.characters(), max_size=12)
sizes = st.tuples(st.integers(0, 50), st.integers(0, 150))


@settings(max_examples=100)
@given(st.none() | readings(), readings(), keys_pressed, st.lists(sizes, min_size=1, max_size=3), st.text(), st.text())
def test_whatever_comes_the_screen_is_big_enough(
    before: Reading | None,
    after: Reading,
    keys: list[str],
    given_sizes: list[tuple[int, int]],
    heading: str,
    notice: str,
) -> None:
    state = State()
    for number, key in enumerate(["", *keys]):
        state = press(state, key)
        shown = None if number % 7 == 6 else between(before, after, 1.0)
        rows, columns = given_sizes[number % len(given_sizes)]
        screen = layout(state, shown, (rows, columns), heading=heading, notice=notice if number % 3 else "")
        assert len(screen.lines) <= rows
        for line in screen.lines:
            assert sum(cells.width(span.text) for span in line) <= columns
            assert all(span.text.isprintable() for span in line)
        state = screen.state


def test_the_command_line_takes_the_intervals_that_keys_do() -> None:
    (interval,) = (option.type for option in cli_top.top.params if option.name == "interval_s")
    assert isinstance(interval, click.FloatRange)
    assert (interval.min, interval.max) == (INTERVALS[0], INTERVALS[-1])

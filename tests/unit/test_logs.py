"""Log lines: nothing hostile gets into one, what is suppressed is counted, and levels are as people write them."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcrelay import logs
from mcrelay.errors import UsageError
from mcrelay.levels import COMPONENTS, changed, checked, split
from mcrelay.logs import BURST, BURST_DEBUG, WINDOW_S, WINDOWS_MAX, JournalFormat, JsonFormat, Limit, Stderr, TextFormat
from mcrelay.messages import Levels

HOSTILE = st.text(
    st.one_of(st.characters(), st.sampled_from('\n\r\0\x1b\x7f\x85\u2028\u202e\ud800"\\%{}<>')), max_size=40
)


def record(text: str, *args: object, level: int = logging.WARNING, name: str = "mcrelay.links") -> logging.LogRecord:
    return logging.LogRecord(name, level, "", 0, text, args, None)


def failed(error: Exception) -> logging.LogRecord:
    made = record("cannot")
    try:
        raise error
    except type(error):
        made.exc_info = sys.exc_info()
    return made


# --- formats ---------------------------------------------------------------------------------------------------------


def test_text_is_time_process_level_and_message() -> None:
    line = TextFormat("data/0").format(record("%s is gone", "eth0"))
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} mcrelay\[data/0\] WARNING eth0 is gone", line)
    assert " mcrelay WARNING " in TextFormat("supervisor").format(record("x"))


@pytest.mark.parametrize(("level", "priority"), [(10, 7), (20, 6), (25, 6), (30, 4), (40, 3), (50, 2), (5, 7)])
def test_the_journal_gets_a_priority_and_no_time(level: int, priority: int) -> None:
    assert JournalFormat("control").format(record("x %d", 1, level=level)) == f"<{priority}>control: x 1"


def test_json_has_a_field_for_each_thing() -> None:
    made = record("%(name)s: %(more)d", {"name": "eth0", "more": 3}, name="mcrelay.net.interfaces")
    made.__dict__ |= {"rule": "a\nb", "level": "forged", "nothing": None, "share": 0.5, "way": ["x"], "huge": 2**70}
    line = JsonFormat("data/1").format(made)
    found = json.loads(line)
    assert datetime.fromisoformat(found.pop("time")).utcoffset() == timedelta(0)
    assert re.match(r'\{"time":"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}\+00:00"', line)
    assert found == {
        "level": "warning",
        "component": "net.interfaces",
        "process": "data/1",
        "pid": os.getpid(),
        "message": "eth0: 3",
        "rule": "a\\nb",
        "nothing": None,
        "share": 0.5,
        "way": "['x']",
        "huge": str(2**70),
        "name": "eth0",
        "more": 3,
    }


@pytest.mark.parametrize("style", [TextFormat, JournalFormat])
def test_each_line_of_a_traceback_says_whose_it_is(style: Callable[[str], logging.Formatter]) -> None:
    lines = style("control").format(failed(ValueError("one\n2026-01-01 mcrelay INFO forged\x1b[2J"))).split("\n")
    begin = lines[0].removesuffix("cannot")
    assert len(lines) > 3
    assert all(line.startswith(f"{begin}| ") for line in lines[1:])
    assert lines[-1] == f"{begin}| 2026-01-01 mcrelay INFO forged\\x1b[2J"


def test_a_traceback_is_a_field_of_json() -> None:
    found = json.loads(JsonFormat("control").format(failed(ValueError("a\u2028b"))))
    assert found["message"] == "cannot"
    assert found["traceback"].startswith("Traceback (most recent call last):\n")
    assert found["traceback"].endswith("ValueError: a\\u2028b")


@given(HOSTILE, HOSTILE)
def test_no_text_can_end_a_line_or_move_a_cursor(template: str, argument: str) -> None:
    """A template, too: other packages make theirs of whatever they have, and get the percent signs wrong."""
    for made in (
        record(template),
        record("from %s", argument),
        record(template, argument),
        record("%s", {argument: argument}),
    ):
        made.__dict__["field " + argument] = argument
        for style in (TextFormat("control"), JournalFormat("control"), JsonFormat("control")):
            line = style.format(made)
            assert line.isprintable()
            line.encode()
        assert json.loads(line)["message"].isprintable()


@given(HOSTILE)
def test_nor_can_that_of_an_exception(text: str) -> None:
    made = failed(ValueError(text))
    for style in (TextFormat("control"), JournalFormat("control"), JsonFormat("control")):
        assert all(line.isprintable() for line in style.format(made).split("\n"))
    found = json.loads(JsonFormat("control").format(made))
    assert found["traceback"].split("\n")[-1 - text.count("\n")].startswith("ValueError")


def test_what_can_be_printed_stays_as_it_is() -> None:
    assert logs.clean("Grüße, 你好 \\n 'x' \"y\"") == "Grüße, 你好 \\n 'x' \"y\""
    assert logs.clean("a\nb\tc\x1b[0m\x85\u202e\ud800") == "a\\nb\\tc\\x1b[0m\\x85\\u202e\\ud800"


def test_a_long_text_is_cut() -> None:
    line = JournalFormat("control").format(record("no rule %s", "x" * 2**20))
    assert line.endswith("x... (1048584 characters)")
    assert len(line) < 2100


def test_the_journal_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    status = os.fstat(2)
    monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
    assert logs.resolved("auto") == "journal"
    assert logs.resolved("json") == "json"
    monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino + 1}")
    assert logs.resolved("auto") == "text"  # of a parent whose standard error it was
    monkeypatch.delenv("JOURNAL_STREAM")
    assert logs.resolved("auto") == "text"


@pytest.mark.parametrize("style", ["text", "json", "journal"])
def test_last_words_are_of_the_same_format(style: str) -> None:
    """Written without Python (native/forbidden.c), between these two."""
    code = (
        "from mcrelay import logs\n"
        f"logs.begin('data/0', {style!r})\n"
        "print(*logs.around('sandbox', process='data'), sep='|')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=True)
    before, after = done.stdout.rstrip("\n").split("|")
    assert len(before) <= 128
    assert len(after) <= 16  # native/forbidden.c
    if style == "json":
        found = json.loads(f"{before}forbidden{after}")
        assert (found["level"], found["component"], found["process"]) == ("critical", "sandbox", "data")
    else:
        assert (before, after) == ({"text": "mcrelay[data] CRITICAL ", "journal": "<2>data: "}[style], "")


# --- the limit -------------------------------------------------------------------------------------------------------


class Sink:
    """A pipe that is standard error, with a clock of its own."""

    def __init__(self) -> None:
        self.now = 100.0
        self._read, write = os.pipe()
        os.set_blocking(self._read, False)
        self.handler = Stderr(write, lambda: self.now)
        self.handler.setFormatter(JsonFormat("control"))

    def lines(self) -> list[dict[str, Any]]:
        try:
            return [json.loads(line) for line in os.read(self._read, 2**20).splitlines()]
        except BlockingIOError:
            return []

    def said(self) -> list[str]:
        return [line["message"] for line in self.lines()]


@pytest.fixture
def sink() -> Sink:
    return Sink()


def test_what_comes_again_and_again_is_shown_so_often_and_then_counted(sink: Sink) -> None:
    for number in range(BURST + 7):
        sink.handler.handle(record("frame %d is bad", number))
    assert sink.said() == [f"frame {number} is bad" for number in range(BURST)]
    sink.now += WINDOW_S - 0.1
    sink.handler.handle(record("frame %d is bad", 99))
    assert sink.lines() == []
    sink.now += 0.1
    sink.handler.handle(record("something else"))
    summary, other = sink.lines()
    assert summary["message"] == "8 more of these were suppressed in 5 s: frame 99 is bad"
    assert (summary["suppressed"], summary["level"], summary["component"]) == (8, "warning", "links")
    assert other["message"] == "something else"
    sink.handler.handle(record("frame %d is bad", 100))
    assert sink.said() == ["frame 100 is bad"]


def test_other_templates_levels_and_components_have_limits_of_their_own(sink: Sink) -> None:
    for _ in range(BURST + 1):
        sink.handler.handle(record("flood"))
    assert len(sink.said()) == BURST
    others = [
        record("another"),
        record("flood", level=logging.ERROR),
        record("flood", level=logging.CRITICAL),
        record("flood", name="mcrelay.clients"),
    ]
    for other in others:
        sink.handler.handle(other)
    assert len(sink.said()) == len(others)


def test_who_asked_for_debug_gets_more_of_it(sink: Sink) -> None:
    for _ in range(BURST_DEBUG + 1):
        sink.handler.handle(record("told", level=logging.DEBUG))
    assert len(sink.said()) == BURST_DEBUG


def test_what_was_suppressed_is_told_by_itself(sink: Sink) -> None:
    """By a timer of the loop, which is there only meanwhile."""

    async def test() -> None:
        loop = asyncio.get_running_loop()
        sink.handler.loop = loop
        timers: list[float] = []
        call_later = loop.call_later

        def count(delay: float, *args: Any) -> asyncio.TimerHandle:
            timers.append(delay)
            return call_later(0, *args)

        loop.call_later = count  # type: ignore[method-assign,assignment]
        for _ in range(BURST):
            sink.handler.handle(record("flood"))
        await asyncio.sleep(0)
        assert timers == []
        # From the engine's thread, say.
        await loop.run_in_executor(None, lambda: [sink.handler.handle(record("flood")) for _ in range(3)])
        assert len(sink.said()) == BURST
        sink.now += 1
        async with asyncio.timeout(10):
            while not timers:
                await asyncio.sleep(0)
            assert timers[0] <= WINDOW_S
            sink.now += WINDOW_S
            while not (said := sink.said()):
                await asyncio.sleep(0)
        assert said == ["3 more of these were suppressed in 6 s: flood"]
        former = len(timers)
        for _ in range(10):
            await asyncio.sleep(0)
        assert len(timers) == former

    asyncio.run(test())


def test_or_at_the_end() -> None:
    code = (
        "import logging; from mcrelay import logs\n"
        "logs.begin('control', 'journal')\n"
        f"for n in range({BURST + 5}): logging.getLogger('mcrelay.links').error('flood %d', n)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=True)
    lines = done.stderr.splitlines()
    assert len(lines) == BURST + 1
    assert lines[-1] == f"<3>control: 5 more of these were suppressed in 1 s: flood {BURST + 4}"


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 4)), max_size=300))
def test_nothing_is_lost_and_nothing_is_counted_twice(flood: list[tuple[str, float]]) -> None:
    limit, now = Limit(), 0.0
    shown: dict[str, int] = {}

    def tell(found: Iterator[logging.LogRecord]) -> None:
        for summary in found:
            text = summary.getMessage()
            shown[text[-1]] = shown.get(text[-1], 0) + int(text.split()[0])

    for text, passed in flood:
        now += passed if passed > 3 else 0.0
        tell(limit.ended(now))
        if limit.admits(record(text), now):
            shown[text] = shown.get(text, 0) + 1
    tell(limit.ended(now, at_exit=True))
    assert shown == {text: sum(1 for other, _ in flood if other == text) for text in {text for text, _ in flood}}


def test_templates_that_somebody_makes_up_take_no_memory() -> None:
    limit = Limit()
    told = 0
    for number in range(3 * WINDOWS_MAX):
        told += len(list(limit.ended(0.0)))
        for _ in range(BURST + 1):
            limit.admits(record(f"made up {number}"), 0.0)
    assert told >= 2 * WINDOWS_MAX  # and still nothing is lost
    assert told + len(list(limit.ended(0.0, at_exit=True))) == 3 * WINDOWS_MAX


def test_nobody_reading_is_no_reason_to_fail(sink: Sink) -> None:
    os.close(sink._read)
    sink.handler.handle(record("x"))  # SIGPIPE is ignored by Python


# --- levels ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def _levels_back() -> Iterator[None]:
    before = logging.root.level
    yield
    logs.set_levels(Levels())
    logging.root.setLevel(before)
    logging.getLogger("mcrelay").setLevel(logging.NOTSET)


@pytest.mark.usefixtures("_levels_back")
def test_levels_are_in_force_for_what_they_name_and_go_again() -> None:
    links, clients = logging.getLogger("mcrelay.links"), logging.getLogger("mcrelay.clients")
    logs.set_levels(Levels("warning", {"links": "debug"}))
    assert (links.getEffectiveLevel(), clients.getEffectiveLevel()) == (logging.DEBUG, logging.WARNING)
    assert logging.getLogger("asyncio").getEffectiveLevel() == logging.WARNING
    logs.set_levels(Levels("debug", {"clients": "error"}))
    assert (links.getEffectiveLevel(), clients.getEffectiveLevel()) == (logging.DEBUG, logging.ERROR)
    assert logging.getLogger("asyncio").getEffectiveLevel() == logging.INFO
    logs.set_levels(Levels())
    assert (links.getEffectiveLevel(), clients.getEffectiveLevel()) == (logging.INFO, logging.INFO)
    assert logs.levels() == Levels()


def test_a_change_leaves_what_it_does_not_name() -> None:
    levels = changed(Levels(), *checked(*split(["links=debug", "clients=error"])))
    assert levels == Levels("info", {"clients": "error", "links": "debug"})
    levels = changed(levels, *checked(*split(["warning", "links=default", "own=info"])))
    assert levels == Levels("warning", {"clients": "error", "own": "info"})
    assert changed(levels, None, {"no.such": "debug"}) == levels  # of another version, by an upgrade


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["lnks=debug"], "there is no component 'lnks'; did you mean links?"),
        (["interfaces=debug"], "there is no component 'interfaces'; did you mean net.interfaces?"),
        (["=debug"], f"there is no component ''; there are {', '.join(COMPONENTS)}"),
        (["links=dbug"], "links=dbug: there is no such log level; did you mean debug?"),
        (["links="], "links=: there is no such log level; there are debug, info, warning, error, default"),
        (["links=de\nbug"], "links=de\\nbug: there is no such log level; did you mean debug?"),
        (["warn"], "there is no log level 'warn'; did you mean warning?"),
        (["default"], "there is no log level 'default'; there are debug, info, warning, error"),
        (["links"], "'links' is a component, not a level; write, for example, links=debug"),
        (["info", "debug"], "both 'info' and 'debug' are to be the level of all; give one of them"),
        (["own=info", "own=debug"], "component 'own' is there twice; give it one level"),
        (["x" * 9999], f"there is no log level '{'x' * 40}...'; there are debug, info, warning, error"),
    ],
)
def test_what_is_no_level_is_refused_with_the_nearest(texts: list[str], message: str) -> None:
    with pytest.raises(UsageError) as refusal:
        checked(*split(texts))
    assert str(refusal.value) == message

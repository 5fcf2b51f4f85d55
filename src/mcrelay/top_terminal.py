"""The terminal of `mcrelay top`: shows the lines of mcrelay.top, and brings it keys and readings of the counters.

Owns the terminal, which is as it was when this ends, however it ends, and the thread that asks the daemon: keys are
answered while that waits. Lines reach the terminal through curses, in the characters that its locale can write.
Colours are emphasis, where there are any and NO_COLOR is not set; without, it is bold, underlined or reversed.

It asks no more than half of the time: reading thousands of rules costs the control plane something, though not the
data plane.
"""

from __future__ import annotations

import contextlib
import curses
import locale
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

from mcrelay import cells, rates, top
from mcrelay.cli_print import colours
from mcrelay.cli_tap import until_stopped
from mcrelay.client import Client
from mcrelay.errors import Busy, Error, Unavailable, UsageError
from mcrelay.rates import Rates, Reading
from mcrelay.top_tables import Style

LOOK_MS: Final = 100  # how long a key is waited for before we look whether there is a new reading
FIRST_S: Final = 0.3  # from the first reading to the second, which has rates
AGAIN_S: Final = 0.5  # between attempts to reach a daemon that is not there
PATIENCE_S: Final = 2.0  # beyond the interval, until we say that there is no answer
ESCAPE_MS: Final = 25  # what comes so soon after Esc belongs to it
KEYS: Final = {
    curses.KEY_UP: "up",
    curses.KEY_DOWN: "down",
    curses.KEY_LEFT: "left",
    curses.KEY_RIGHT: "right",
    curses.KEY_PPAGE: "pageup",
    curses.KEY_NPAGE: "pagedown",
    curses.KEY_HOME: "home",
    curses.KEY_END: "end",
    curses.KEY_ENTER: "enter",
    curses.KEY_BTAB: "backtab",
    curses.KEY_BACKSPACE: "backspace",
    "\n": "enter",
    "\r": "enter",
    "\t": "tab",
    "\x1b": "escape",
    "\x7f": "backspace",
    "\b": "backspace",
}
ATTRIBUTES: Final[dict[Style, int]] = {
    "plain": curses.A_NORMAL,
    "title": curses.A_BOLD,
    "header": curses.A_UNDERLINE,
    "selected": curses.A_REVERSE,
    "good": curses.A_NORMAL,
    "warning": curses.A_BOLD,
    "bad": curses.A_BOLD,
}
COLOURS: Final[dict[Style, int]] = {
    "good": curses.COLOR_GREEN,
    "warning": curses.COLOR_YELLOW,
    "bad": curses.COLOR_RED,
}


def show(path: str, interval_s: float) -> None:
    """Until q, Ctrl-C or SIGTERM. Error if there is no daemon to begin with."""
    asking = _Asking(Client(path), path, interval_s)
    with until_stopped(), _window() as window:
        _show(window, asking, path, top.State(interval_s=interval_s))


def check() -> None:
    """UsageError where no screen can be shown."""
    hint = "for a pipe or a file there is 'mcrelay stats --watch --json'"
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UsageError("top needs a terminal", hint)
    name = os.environ.get("TERM", "")
    try:
        curses.setupterm(name or "dumb")
        can = bool(curses.tigetstr("cup"))
    except curses.error:
        can = False
    if not can:
        raise UsageError(f"top cannot use a terminal of TERM={name!r}", f"set TERM, say to vt100; {hint}")


# --- asking ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Answer:
    """What the daemon's counters have last shown, and since when nothing has come."""

    shown: Rates | None
    notice: str
    since: float  # time.monotonic()


class _Asking:
    """A thread that reads the counters again and again. It owns the connection, and does not keep the program."""

    def __init__(self, client: Client, path: str, interval_s: float) -> None:
        self.interval_s = interval_s
        self.is_paused = False
        self._client: Client | None = client
        self._path = path
        self._answer = _Answer(None, "", time.monotonic())
        self._failure: Exception | None = None  # of this thread
        self._soon = threading.Event()
        threading.Thread(target=self._run, name="asking", daemon=True).start()

    def change(self, interval_s: float, *, is_paused: bool) -> None:
        if (interval_s, is_paused) == (self.interval_s, self.is_paused):
            return
        if self.is_paused:  # nobody was asked meanwhile
            self._answer = replace(self._answer, since=time.monotonic())
        self.interval_s, self.is_paused = interval_s, is_paused
        self._soon.set()

    @property
    def answer(self) -> _Answer:
        if self._failure:
            raise self._failure
        answer = self._answer
        silent_s = time.monotonic() - answer.since
        if not answer.notice and not self.is_paused and silent_s > self.interval_s + PATIENCE_S:
            notice = f"no answer from the daemon at {self._path} for {silent_s:.0f} s"
            return replace(answer, notice=notice)
        return answer

    def _run(self) -> None:
        try:
            self._ask()
        except Exception as error:
            self._failure = error

    def _ask(self) -> None:
        before: Reading | None = None
        then = 0.0
        while True:
            started = time.monotonic()
            try:
                reading = self._read()
            except Busy:  # the rules changed meanwhile
                self._wait(started, AGAIN_S)
                continue
            except Error as error:
                self._lose(error)
                before = None
                self._wait(started, AGAIN_S)
                continue
            now = time.monotonic()
            self._answer = _Answer(rates.between(before, reading, now - then), "", now)
            wait_s = self.interval_s if before else min(FIRST_S, self.interval_s)
            before, then = reading, now
            took_s = now - started
            self._wait(started, max(wait_s, 2 * took_s), 2 * took_s)

    def _read(self) -> Reading:
        if self._client is None:
            self._client = Client(self._path)
        stats, listing = self._client.stats(), self._client.listing()
        processes = {process.index: process for process in self._client.workers() if process.role == "data"}
        return Reading(stats, {rule.id: rule for rule in listing.rules}, listing.interfaces, processes)

    def _lose(self, error: Error) -> None:
        if self._client:
            self._client.close()
            self._client = None
        notice = f"no daemon at {self._path}" if isinstance(error, Unavailable) else error.message
        self._answer = _Answer(self._answer.shown, f"{notice}; reconnecting", time.monotonic())

    def _wait(self, started: float, seconds: float, least: float = 0.0) -> None:
        """Until so long after the start, or a shorter interval, and until nobody pauses."""
        while self.is_paused or time.monotonic() - started < seconds:
            left_s = None if self.is_paused else max(0.0, started + seconds - time.monotonic())
            if self._soon.wait(left_s):
                self._soon.clear()
                seconds = max(least, min(seconds, self.interval_s))


# --- the terminal ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _window() -> Iterator[curses.window]:
    """The whole terminal, without echo and line by line no more; inside only. (curses.wrapper begins with colours.)"""
    try:
        window = curses.initscr()
        curses.noecho()
        curses.cbreak()
        window.keypad(True)
        curses.set_escdelay(ESCAPE_MS)
        with contextlib.suppress(curses.error):  # not every terminal can hide it
            curses.curs_set(0)
        window.timeout(LOOK_MS)
        yield window
    finally:
        with contextlib.suppress(curses.error):  # it did not begin
            curses.nocbreak()
            curses.echo()
            curses.endwin()


def _show(window: curses.window, asking: _Asking, path: str, state: top.State) -> None:
    """Until q."""
    attributes = _attributes()
    drawn: object = None
    while not state.is_done:
        answer = asking.answer
        wanted = (state, answer.notice, id(answer.shown), window.getmaxyx())
        if wanted != drawn:
            screen = top.layout(state, answer.shown, window.getmaxyx(), heading=path, notice=answer.notice)
            _draw(window, screen.lines, attributes)
            state = screen.state
            drawn = (state, *wanted[1:])
        key = _key(window)
        if key is not None:
            state = top.press(state, key)
            asking.change(state.interval_s, is_paused=state.is_paused)


def _key(window: curses.window) -> str | None:
    """The next key, if one comes soon."""
    try:
        key = window.get_wch()
    except curses.error:
        return None
    if key == curses.KEY_RESIZE:
        curses.update_lines_cols()
        window.clear()
        return None
    return KEYS.get(key, key if isinstance(key, str) else None)


def _attributes() -> dict[Style, int]:
    attributes = dict(ATTRIBUTES)
    if colours() is False or not curses.has_colors():
        return attributes
    with contextlib.suppress(curses.error):
        curses.start_color()
        curses.use_default_colors()
        for pair, (style, colour) in enumerate(COLOURS.items(), 1):
            curses.init_pair(pair, colour, -1)
            attributes[style] |= curses.color_pair(pair)
    return attributes


def _draw(window: curses.window, lines: tuple[top.Line, ...], attributes: dict[Style, int]) -> None:
    codec = locale.nl_langinfo(locale.CODESET)
    window.erase()
    for row, line in enumerate(lines):
        column = 0
        for text, style in line:
            written = text if text.isascii() else text.encode(codec, "replace").decode(codec)
            with contextlib.suppress(curses.error):  # of the last cell, behind which the cursor cannot be
                window.addstr(row, column, written, attributes[style])
            column += cells.width(text)
    window.refresh()

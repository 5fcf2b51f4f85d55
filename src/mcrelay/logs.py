"""Logs: how a log record becomes lines on standard error.

Owns the formats, what is safe to print, the limit on messages that come again and again, and the levels in force in
this process. levels.py has what people may ask for. Workers are in their sandbox: nothing is opened here, and nothing
sent; a line is one write(2) to standard error, which all processes of a daemon share.

Messages have texts in them that clients, files and the network have chosen: no character of those is printed that is
not printable, so none ends a line, moves a cursor or hides what follows. Only a traceback takes several lines; each of
them begins as its message does, and goes on with "| ".
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from types import MappingProxyType, TracebackType
from typing import Any, Final, cast, get_args

import msgspec

from mcrelay.messages import Levels
from mcrelay.settings import LogFormat

log = logging.getLogger(__name__)

STDERR: Final = 2
PACKAGE: Final = "mcrelay."

# A line of ASCII is below PIPE_BUF (4096 bytes), so that those of several processes do not mix in a pipe.
MESSAGE_MAX: Final = 2000  # characters

WINDOW_S: Final = 5.0
BURST: Final = 10  # messages of a template in a window
BURST_DEBUG: Final = 100  # which somebody asked for
TEMPLATE_MAX: Final = 200  # characters that tell templates apart
WINDOWS_MAX: Final = 512  # templates of ours are a fifth of that; others may make theirs up as they go

LEVEL_NUMBERS: Final = MappingProxyType(
    {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
)
# sd-daemon(3)
PRIORITIES: Final = MappingProxyType(
    {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}
)


# --- texts -----------------------------------------------------------------------------------------------------------


def clean(text: str) -> str:
    """The text with everything that is not printable written as an escape: control characters, line and paragraph
    separators, what changes the direction of writing, surrogates."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _escape(c) for c in text)


def _escape(character: str) -> str:
    """As Python writes it; without its codec for that, which a worker in its sandbox could not load."""
    number = ord(character)
    if character in "\n\r\t":
        return {"\n": "\\n", "\r": "\\r", "\t": "\\t"}[character]
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def _clipped(text: str) -> str:
    return text if len(text) <= MESSAGE_MAX else f"{text[:MESSAGE_MAX]}... ({len(text)} characters)"


def message_of(record: logging.LogRecord) -> str:
    """A record's message, safe to print."""
    try:
        text = record.getMessage()
    except Exception as error:  # our mistake, which must not cost the message
        text = f"{record.msg}: {error!r}"
    return clean(_clipped(text))


def component_of(record: logging.LogRecord) -> str:
    return record.name.removeprefix(PACKAGE)


def _traceback_of(record: logging.LogRecord) -> list[str]:
    """Its lines, safe to print, of a record that has one."""
    parts = []
    if record.exc_info:
        parts.append(logging.Formatter().formatException(record.exc_info))
    if record.stack_info:
        parts.append(record.stack_info)
    return [clean(_clipped(line)) for part in parts for line in part.split("\n")]


# --- formats ---------------------------------------------------------------------------------------------------------


class TextFormat(logging.Formatter):
    """For people. `process` is a worker's name, or "supervisor"."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._name = "mcrelay" if process == "supervisor" else f"mcrelay[{process}]"

    def format(self, record: logging.LogRecord) -> str:
        before = f"{self.formatTime(record)} {self._name} {record.levelname} "
        return "\n".join([before + message_of(record), *(f"{before}| {line}" for line in _traceback_of(record))])


class JournalFormat(logging.Formatter):
    """For systemd's journal, which knows the time: each line begins with its priority (sd-daemon(3))."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        before = f"<{_priority(record.levelno)}>{self._process}: "
        return "\n".join([before + message_of(record), *(f"{before}| {line}" for line in _traceback_of(record))])


class JsonFormat(logging.Formatter):
    """For programs: one object in a line. Fields of the record's own stand beside those of every record: what `extra`
    gave it, and what a template names."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        document: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds"),
            "level": record.levelname.lower(),
            "component": component_of(record),
            "process": self._process,
            "pid": record.process,
            "message": message_of(record),
        }
        if traceback := _traceback_of(record):
            document["traceback"] = "\n".join(traceback)
        for name, value in _fields(record):
            document.setdefault(clean(name), _plain(value))
        return msgspec.json.encode(document).decode()


ORDINARY: Final = frozenset(logging.makeLogRecord({}).__dict__) | {"taskName", "message", "asctime"}


def _fields(record: logging.LogRecord) -> Iterator[tuple[str, object]]:
    yield from ((name, value) for name, value in record.__dict__.items() if name not in ORDINARY)
    if isinstance(record.args, Mapping):
        yield from record.args.items()


def _plain(value: object) -> object:
    """What JSON has for it."""
    if value is None or isinstance(value, bool | float) or (isinstance(value, int) and abs(value) < 2**53):
        return value
    return clean(_clipped(str(value)))


def _priority(level: int) -> int:
    return min((priority for number, priority in PRIORITIES.items() if level >= number), default=7)


FORMATS: Final[Mapping[LogFormat, Callable[[str], logging.Formatter]]] = MappingProxyType(
    {"text": TextFormat, "json": JsonFormat, "journal": JournalFormat}
)


def checked_format(text: str) -> LogFormat:
    """ValueError unless it is one that can be written in."""
    if text not in get_args(LogFormat) or text == "auto":
        raise ValueError(text)
    return cast(LogFormat, text)


def resolved(log_format: LogFormat) -> LogFormat:
    """What `auto` is here: systemd names the journal's stream in the environment of what writes to it."""
    if log_format != "auto":
        return log_format
    try:
        status = os.fstat(STDERR)
    except OSError:
        return "text"
    return "journal" if os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}" else "text"


# --- the limit -------------------------------------------------------------------------------------------------------

Key = tuple[str, int, str]  # component, level, template


@dataclass(slots=True)
class _Window:
    """The seconds that began with a message of one template."""

    began: float
    shown: int = 0
    suppressed: int = 0
    last: str = ""  # of those that were suppressed


class Limit:
    """At most BURST messages of a template, from one component at one level, in WINDOW_S. What is beyond that is
    counted, and told when the window ends."""

    def __init__(self) -> None:
        self._windows: dict[Key, _Window] = {}  # in the order in which they began

    def admits(self, record: logging.LogRecord, now: float) -> bool:
        """Whether it is to be shown. Take what has ended() by now before."""
        template = str(record.msg).partition("\n")[0][:TEMPLATE_MAX]
        window = self._windows.setdefault((record.name, record.levelno, template), _Window(now))
        if window.shown < (BURST_DEBUG if record.levelno <= logging.DEBUG else BURST):
            window.shown += 1
            return True
        window.suppressed += 1
        window.last = message_of(record)
        return False

    def ended(self, now: float, *, at_exit: bool = False) -> Iterator[logging.LogRecord]:
        """What is to be told of windows that are over; with too many, the oldest are."""
        while self._windows:
            key, window = next(iter(self._windows.items()))
            if now - window.began < WINDOW_S and len(self._windows) < WINDOWS_MAX and not at_exit:
                break
            del self._windows[key]
            if window.suppressed:
                yield _summary(key, window, now)

    def next_end(self) -> float | None:
        """When the next window ends of which something was suppressed."""
        ends = (window.began + WINDOW_S for window in self._windows.values() if window.suppressed)
        return next(ends, None)


def _summary(key: Key, window: _Window, now: float) -> logging.LogRecord:
    name, level, _template = key
    seconds = max(1, round(now - window.began))
    text = f"{window.suppressed} more of these were suppressed in {seconds} s: {window.last}"
    record = logging.LogRecord(name, level, "", 0, text, None, None)
    record.suppressed = window.suppressed
    return record


# --- standard error --------------------------------------------------------------------------------------------------


class Stderr(logging.Handler):
    """Writes records to a descriptor, within the limit. What was suppressed is told by the loop's timer, which runs
    only meanwhile, and at exit."""

    def __init__(self, fd: int = STDERR, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self.loop: asyncio.AbstractEventLoop | None = None
        self._fd = fd
        self._clock = clock
        self._limit = Limit()
        self._timer_set = False

    def emit(self, record: logging.LogRecord) -> None:
        now = self._clock()
        for summary in self._limit.ended(now):
            self._write(summary)
        if self._limit.admits(record, now):
            self._write(record)
        elif not self._timer_set:
            self._set_timer()

    def end(self) -> None:
        """Tell what has not been told: nothing may follow that would."""
        with self.lock:  # type: ignore[union-attr] # which handlers have
            for summary in self._limit.ended(self._clock(), at_exit=True):
                self._write(summary)

    def close(self) -> None:
        """At exit."""
        self.end()
        super().close()

    def _set_timer(self) -> None:
        """From whichever thread."""
        if self.loop is None:
            return
        try:
            self.loop.call_soon_threadsafe(self._wait)
            self._timer_set = True
        except RuntimeError:
            self.loop = None  # it is closed

    def _wait(self) -> None:
        with self.lock:  # type: ignore[union-attr]
            end = self._limit.next_end()
            self._timer_set = end is not None
        if end is not None:
            asyncio.get_running_loop().call_later(max(0.0, end - self._clock()), self._tell)

    def _tell(self) -> None:
        with self.lock:  # type: ignore[union-attr]
            for summary in self._limit.ended(self._clock()):
                self._write(summary)
        self._wait()

    def _write(self, record: logging.LogRecord) -> None:
        left = memoryview(f"{self.format(record)}\n".encode(errors="backslashreplace"))
        try:
            while left:
                left = left[os.write(self._fd, left) :]
        except OSError:
            pass  # there is nobody to tell


_stderr: Final = Stderr()
_levels = Levels()


def begin(process: str, log_format: LogFormat, levels: Levels | None = None) -> None:
    """Log to standard error from now on, as this process. To be called again when more is known."""
    _stderr.setFormatter(FORMATS[log_format](process))
    logging.root.handlers[:] = [_stderr]
    logging.captureWarnings(True)
    sys.excepthook = _unexpected
    set_levels(levels or Levels())


def follow(loop: asyncio.AbstractEventLoop) -> None:
    """Whose timers tell what was suppressed."""
    _stderr.loop = loop


def end() -> None:
    """Tell what was suppressed: what comes next is to be read as the last."""
    _stderr.end()


def set_levels(levels: Levels) -> None:
    """Log from these levels on. Other packages never log below info."""
    global _levels
    level = LEVEL_NUMBERS[levels.level]
    logging.root.setLevel(max(level, logging.INFO))
    logging.getLogger("mcrelay").setLevel(level)
    for component in _levels.components.keys() - levels.components.keys():
        logging.getLogger(PACKAGE + component).setLevel(logging.NOTSET)
    for component, own in levels.components.items():
        logging.getLogger(PACKAGE + component).setLevel(LEVEL_NUMBERS[own])
    _levels = levels


def levels() -> Levels:
    """Those in force."""
    return _levels


def around(component: str, *, process: str) -> tuple[str, str]:
    """What stands before and behind a critical message that is written without Python (native/forbidden.c)."""
    if isinstance(_stderr.formatter, JsonFormat):
        who = f'"component":"{component}","process":"{process}","pid":{os.getpid()}'
        return f'{{"level":"critical",{who},"message":"', '"}'
    if isinstance(_stderr.formatter, JournalFormat):
        return f"<{PRIORITIES[logging.CRITICAL]}>{process}: ", ""
    return f"mcrelay[{process}] CRITICAL ", ""


def _unexpected(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)
        return
    log.critical("unexpected: %r", error, exc_info=(kind, error, traceback))

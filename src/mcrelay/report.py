"""The report: what the service manager is told of a daemon's state, and when.

Owns the order of sd_notify(3)'s messages: readiness, reloads, the end, a status line for 'systemctl status', and signs
of life as often as the manager wants them (WatchdogSec=). They come from the supervisor's event loop, so a loop that
hangs is noticed; whether workers hang is the supervisor's to notice. Without a service manager, nothing happens.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Final

from mcrelay import notify

STATUS_S: Final = 1.0  # at most one status line in so long
AGAIN_S: Final = 0.1  # after a sign of life that could not be given


class Report:
    """`status` says how things stand, in a line. `started_s`: when the daemon was started whose place this one takes,
    in Unix time."""

    def __init__(self, status: Callable[[], str], started_s: float | None = None) -> None:
        self._status = status
        self.started_s = started_s or time.time()
        self._said = ""
        self._is_due = False
        self._loop = asyncio.get_running_loop()

    def ready(self) -> None:
        """The daemon relays. From now on, signs of life."""
        self._said = self._status()
        _tell(f"READY=1\nSTATUS={self._said}")
        with contextlib.suppress(ValueError):
            # WATCHDOG_PID is not compared: after an upgrade the main process is another one.
            if interval_us := int(os.environ.get("WATCHDOG_USEC", "0")):
                self._live(interval_us / 2e6)

    def _live(self, interval_s: float) -> None:
        done = _tell("WATCHDOG=1", patience_s=0)
        self._loop.call_later(interval_s if done else min(interval_s, AGAIN_S), self._live, interval_s)

    def changed(self) -> None:
        """The status may be another: say so soon."""
        if not self._is_due:
            self._is_due = True
            self._loop.call_later(STATUS_S, self._say)

    def _say(self) -> None:
        self._is_due = False
        status = self._status()
        if status == self._said:
            return
        if _tell(f"STATUS={status}", patience_s=0):
            self._said = status
        else:
            self.changed()

    @contextlib.contextmanager
    def reloading(self) -> Iterator[None]:
        _tell(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            yield
        finally:
            self._said = self._status()
            _tell(f"READY=1\nSTATUS={self._said}")

    def handed_over(self, pid: int) -> None:
        """Another process goes on."""
        _tell(f"MAINPID={pid}")

    def stopping(self) -> None:
        _tell("STOPPING=1\nSTATUS=stopping")


def _tell(text: str, *, patience_s: float = notify.TOLD_S) -> bool:
    """Whether it could be said; a manager that does not listen is no reason not to relay. Without patience where a
    later message makes up for a lost one."""
    try:
        notify.notify(text, patience_s=patience_s)
    except OSError:
        return False
    return True

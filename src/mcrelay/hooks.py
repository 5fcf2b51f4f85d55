"""Hooks: a program that is run for each event.

Owns its runs: one after the other, in the order of the events, each with a deadline. What cannot wait is dropped and
counted: events are told as they happen, and a program that hangs must not keep them from others, nor the end waiting.
"""

from __future__ import annotations

import contextlib
import functools
import os
import queue
import subprocess
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

from mcrelay.api import Event
from mcrelay.codec import json_text, to_json

WAITING_MAX: Final = 256  # events
DEADLINE_S: Final = 30.0  # of one run
LEFT_S: Final = 2.0  # for the run under way, when somebody wants an end


def _unless_nobody_reads(complain: Callable[[str], None], text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        complain(text)


class Hook:
    """A context manager: all that was told has run behind it, unless an exception ends it. `program` gets the event's
    kind and subject as arguments, all of it in the environment (MCRELAY_EVENT, _SUBJECT, _TEXT) and as JSON on standard
    input. `complain` is told in a line what went wrong."""

    def __init__(self, program: str, complain: Callable[[str], None], *, deadline_s: float = DEADLINE_S) -> None:
        self._program = program
        self._complain = functools.partial(_unless_nobody_reads, complain)
        self._deadline_s = deadline_s
        self._waiting: queue.Queue[Event | None] = queue.Queue(WAITING_MAX)
        self._dropped = 0
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def tell(self, event: Event) -> None:
        try:
            self._waiting.put_nowait(event)
        except queue.Full:
            self._dropped += 1
            if self._dropped == 1:
                self._complain(f"{self._program} is too slow: {WAITING_MAX} events wait, others are dropped")
        else:
            if self._dropped:
                self._complain(f"{self._program}: {self._dropped} events were dropped")
                self._dropped = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and (dropped := self._drop()):
            self._complain(f"{self._program}: {dropped} events were dropped at the end")
        self._waiting.put(None)
        self._thread.join(None if kind is None else LEFT_S)
        if self._thread.is_alive():
            self._complain(f"{self._program} still runs, and is left alone")

    def _drop(self) -> int:
        """How many events waited."""
        dropped = 0
        with contextlib.suppress(queue.Empty):
            while True:
                self._waiting.get_nowait()
                dropped += 1
        return dropped

    def _work(self) -> None:
        while (event := self._waiting.get()) is not None:
            try:
                self._run(event)
            except Exception as error:  # whatever it is, the next event is another
                self._complain(f"cannot run {self._program}: {error!r}")

    def _run(self, event: Event) -> None:
        environment = {"MCRELAY_EVENT": event.kind, "MCRELAY_SUBJECT": event.subject, "MCRELAY_TEXT": event.text}
        try:
            done = subprocess.run(
                [self._program, event.kind, event.subject],
                input=json_text(to_json(event), indent=0).encode(),
                env={**os.environ, **environment},
                timeout=self._deadline_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            self._complain(f"{self._program} did not end within {self._deadline_s:.0f} s: it was ended")
        except OSError as error:
            self._complain(f"cannot run {self._program}: {error.strerror}")
        else:
            if done.returncode:
                self._complain(f"{self._program} failed for {event.kind} {event.subject}: exit code {done.returncode}")

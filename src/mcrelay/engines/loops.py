"""Loops: which rules go round in circles by way of another relay, and for how long they are suspended for it.

The same in plain Python as native/loops.h, which explains it. Knows nothing of sockets or clocks: the caller says what
time it is.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

RETURNS_MIN: Final = 32
RETURNS_PER_REPEAT: Final = 8
ALTERNATE_NS: Final = 10**8
WATCH_NS: Final = 10**9
RETURNING_NS: Final = 2 * 10**9
SUSPENSION_S: Final = 1
SUSPENSION_MAX_S: Final = 64
DRAIN_NS: Final = 5 * 10**8
REST: Final = 4


class Verdict(enum.Enum):
    NONE = enum.auto()  # forward the packet
    FOUND = enum.auto()  # do not: the rule has just been suspended
    SUSPENDED = enum.auto()  # do not: it is suspended
    ACQUITTED = enum.auto()  # forward it: this was no loop, and the rule is suspended no longer


@dataclass(frozen=True, slots=True)
class Look:
    """What a payload is known by: its length and its ends."""

    length: int
    first: bytes
    last: bytes

    @classmethod
    def of(cls, payload: memoryview) -> Look:
        return cls(len(payload), bytes(payload[:8]), bytes(payload[-8:]))


@dataclass(slots=True)
class Watched:
    """The one payload that is watched of a rule."""

    look: Look
    source: bytes
    armed_ns: int
    repeats: int = 0
    returner: bytes | None = None
    returns: int = 0

    @property
    def is_returning(self) -> bool:
        return self.returns >= RETURNS_PER_REPEAT * (1 + self.repeats)

    def is_over(self, source: bytes, now_ns: int) -> bool:
        """Whether a packet from this source is to be watched instead."""
        age_ns = now_ns - self.armed_ns
        if age_ns <= ALTERNATE_NS:
            return False
        if self.is_returning:
            return age_ns > RETURNING_NS
        return age_ns > WATCH_NS or source != self.source

    def count(self, source: bytes) -> None:
        if source == self.source:
            self.repeats += 1
        elif self.returner in (None, source):
            self.returner = source
            self.returns += 1


@dataclass(slots=True)
class Watch:
    """What is known of one rule."""

    rule: int  # its id
    watched: Watched | None = None
    suspect: Watched | None = None  # for which it is suspended
    acquitted: tuple[Look, bytes | None] | None = None
    suspended_until_ns: int = 0
    suspension_s: int = 0  # how long the last one was; 0: none to remember

    def judge(self, payload: memoryview, source: bytes, now_ns: int) -> Verdict:
        look = Look.of(payload)
        if now_ns < self.suspended_until_ns:
            return self._judge_suspended(look, source, now_ns)
        watched = self.watched
        if watched is None or watched.is_over(source, now_ns):
            self.watched = Watched(look, source, now_ns)
            return Verdict.NONE
        if look != watched.look:
            return Verdict.NONE
        watched.count(source)
        found = watched.returns >= RETURNS_MIN and watched.is_returning
        if not found or (watched.look, watched.returner) == self.acquitted:
            return Verdict.NONE
        self._suspend(now_ns)
        return Verdict.FOUND

    def _judge_suspended(self, look: Look, source: bytes, now_ns: int) -> Verdict:
        suspect, began_ns = self.suspect, self.suspended_until_ns - self.suspension_s * 10**9
        assert suspect is not None
        if now_ns < began_ns + DRAIN_NS or (look, source) != (suspect.look, suspect.returner):
            return Verdict.SUSPENDED
        self.acquitted = look, source
        self.suspended_until_ns = now_ns
        self.suspension_s = 0
        return Verdict.ACQUITTED

    def _suspend(self, now_ns: int) -> None:
        if now_ns - self.suspended_until_ns >= REST * self.suspension_s * 10**9:
            self.suspension_s = SUSPENSION_S
        else:
            self.suspension_s = min(2 * self.suspension_s, SUSPENSION_MAX_S)
        self.suspended_until_ns = now_ns + self.suspension_s * 10**9
        self.watched, self.suspect = None, self.watched


class Loops:
    """The watches of all rules, by their counters."""

    def __init__(self) -> None:
        self._watches: dict[int, Watch] = {}

    def watch(self, counter: int, rule: int) -> Watch:
        """A rule's; another one's that had its counter is forgotten."""
        watch = self._watches.get(counter)
        if watch is None or watch.rule != rule:
            watch = self._watches[counter] = Watch(rule)
        return watch

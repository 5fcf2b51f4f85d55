"""Flows: which rules' packets come, stop coming, or get lost, as their counters tell from one look to the next.

Owns the state of each rule's flow and when a change of it is an event. Pure: whoever looks gives counters and time.
A flow that goes on while it is first looked at is no event; only changes are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from mcrelay.api import EventKind
from mcrelay.settings import EventsSection

LOSS_PACKETS_MIN: Final = 2  # of a look, that loss is made of: one in a handful is none


class Look(NamedTuple):
    """A rule's counters at one moment."""

    rule: str  # id
    packets: int  # that matched
    dropped: int
    is_suspended: bool


class Change(NamedTuple):
    """What became of a flow."""

    kind: EventKind
    rule: str
    text: str
    values: dict[str, float]


@dataclass(slots=True)
class _Flow:
    packets: int
    dropped: int
    moved_s: float  # when packets came last, as far as is known
    state: Literal["new", "idle", "flowing", "silent"]  # new: it may be any of the others
    is_losing: bool = False
    is_suspended: bool = False


class Flows:
    """All of them. `settings` may be replaced."""

    def __init__(self, settings: EventsSection) -> None:
        self.settings = settings
        self._flows: dict[str, _Flow] = {}

    def begin(self, look: Look, now_s: float) -> None:
        """What a rule has counted when somebody begins to look."""
        self._flows[look.rule] = _Flow(
            look.packets, look.dropped, now_s, "new" if look.packets else "idle", is_suspended=look.is_suspended
        )

    def see(self, look: Look, now_s: float) -> Iterator[Change]:
        """What has changed since the last look at that rule. One that was never seen has just begun."""
        flow = self._flows.setdefault(look.rule, _Flow(0, 0, now_s, "idle"))
        # A rule that is another by now counts from zero.
        came = look.packets - flow.packets if look.packets >= flow.packets else look.packets
        lost = look.dropped - flow.dropped if look.dropped >= flow.dropped else look.dropped
        flow.packets, flow.dropped = look.packets, look.dropped
        yield from self._moved(look.rule, flow, came, now_s)
        yield from self._lost(look.rule, flow, came, lost)
        if look.is_suspended != flow.is_suspended:
            flow.is_suspended = look.is_suspended
            if look.is_suspended:
                yield Change("rule_suspended", look.rule, "suspended: another relay sends its output back", {})
            else:
                yield Change("rule_resumed", look.rule, "not suspended any more", {})

    def forget(self, rules: Iterable[str]) -> None:
        for rule in rules:
            self._flows.pop(rule, None)

    def _moved(self, rule: str, flow: _Flow, came: int, now_s: float) -> Iterator[Change]:
        paused_s = now_s - flow.moved_s
        if came:
            if flow.state == "idle":
                yield Change("flow_started", rule, "packets come", {"packets": came})
            elif flow.state == "silent":
                text = f"packets come again, after {paused_s:.0f} s"
                yield Change("flow_started", rule, text, {"packets": came, "silent_s": paused_s})
            flow.state, flow.moved_s = "flowing", now_s
        elif flow.state == "new":
            flow.state = "silent" if paused_s >= self.settings.silent_s else "new"
        elif flow.state == "flowing" and paused_s >= self.settings.silent_s:
            flow.state = "silent"
            yield Change("flow_silent", rule, f"no packet for {paused_s:.0f} s", {"silent_s": paused_s})
        elif flow.state == "silent" and paused_s >= self.settings.stopped_s:
            flow.state = "idle"
            yield Change("flow_stopped", rule, f"no packet for {paused_s:.0f} s", {"silent_s": paused_s})

    def _lost(self, rule: str, flow: _Flow, came: int, lost: int) -> Iterator[Change]:
        """Above the threshold, and below it again."""
        share = 100 * lost / max(came, lost, 1)
        is_losing = lost >= LOSS_PACKETS_MIN and share >= self.settings.loss_percent
        if is_losing and not flow.is_losing:
            text = f"{lost} of {max(came, lost)} packets dropped ({share:.1f} %); 'mcrelay stats' has the reasons"
            yield Change("loss", rule, text, {"dropped": lost, "percent": share})
        elif flow.is_losing and not is_losing and came:
            yield Change("loss_over", rule, "packets get through again", {"percent": share})
        if came or lost:
            flow.is_losing = is_losing

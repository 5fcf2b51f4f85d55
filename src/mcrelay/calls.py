"""The calls of the API, each once for all kinds of clients: its requests, and what is made of the answers.

Owns how a result comes about: a long change in several messages, a long list in several answers. Knows no connection
(conversation.py says what a Dialogue and a Stream are); client.py says what each call means to its user.

A new call is a function here, and a method of the same name and parameters in Client and in AsyncClient.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

import msgspec

from mcrelay.api import (
    EVENT_KINDS,
    Add,
    Added,
    Change,
    Changed,
    EventKind,
    GetLogLevels,
    GetStats,
    GetStatus,
    GetVersion,
    GetWorkers,
    Happened,
    ListRules,
    LogLevels,
    Pause,
    Paused,
    Ping,
    Pong,
    Remove,
    Removed,
    Restarted,
    RestartWorker,
    RuleFacts,
    Rules,
    RuleText,
    SetLogLevels,
    StartTap,
    Stats,
    Status,
    Subscribe,
    Subscribed,
    TapEnded,
    Tapped,
    TapStarted,
    Upgrade,
    Upgraded,
    Version,
    Workers,
)
from mcrelay.codec import in_frames
from mcrelay.conversation import ID, Dialogue, Stream, ask, seconds
from mcrelay.errors import Busy, ProtocolError, UsageError
from mcrelay.messages import Message, ProcessFacts

UPGRADE_S: Final = 35.0  # for the new daemon to start and take over, or not
PAGINGS: Final = 5  # of a list that changes meanwhile
NAMES_PER_FRAME: Final = 8000  # of 64 characters

Paged = TypeVar("Paged", Rules, Stats)
Value = TypeVar("Value")


def ping() -> Dialogue[None]:
    yield from ask(Ping(id=ID), Pong, reads=True)


def version() -> Dialogue[Version]:
    return ask(GetVersion(id=ID), Version, reads=True)


def status() -> Dialogue[Status]:
    return ask(GetStatus(id=ID), Status, reads=True)


def add(input: str, outputs: Sequence[str], name: str | None) -> Dialogue[Added]:
    return ask(Add(id=ID, input=input, outputs=_listed("outputs", outputs), name=name), Added)


def _listed(what: str, values: Sequence[Value]) -> tuple[Value, ...]:
    """UsageError if that is no list; a text would be one of its letters."""
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise UsageError(f"{what}: {reprlib.repr(values)} is no list", "write [...]")
    return tuple(values)


def remove(rule: str) -> Dialogue[Removed]:
    return ask(Remove(id=ID, rule=rule), Removed)


def pause(rule: str, output: str | None, *, paused: bool) -> Dialogue[Paused]:
    return ask(Pause(id=ID, rule=rule, output=output, paused=paused), Paused)


def change(
    add: Sequence[tuple[str, Sequence[str], str | None]], remove: Sequence[str], expect: int | None
) -> Dialogue[Changed]:
    texts = [_text(rule) for rule in _listed("add", add)]
    remove = _listed("remove", remove)
    pieces = [
        Change(id=ID, add=(), remove=tuple(remove[at : at + NAMES_PER_FRAME]), complete=False)
        for at in range(0, len(remove), NAMES_PER_FRAME)
    ]
    pieces += [Change(id=ID, add=piece, remove=(), complete=last, expect=expect) for piece, last in in_frames(texts)]
    return ask(tuple(pieces), Changed)


def _text(rule: tuple[str, Sequence[str], str | None]) -> RuleText:
    if isinstance(rule, str) or not isinstance(rule, Sequence) or len(rule) != 3:
        raise UsageError(f"add: {reprlib.repr(rule)} is no rule", "give (INPUT, [OUTPUT, ...], NAME or None)")
    given, outputs, name = rule
    return RuleText(input=given, outputs=_listed("outputs", outputs), name=name)


def listing() -> Dialogue[Rules]:
    return _all_pages(lambda after: ListRules(id=ID, after=after), Rules)


def rules() -> Dialogue[tuple[RuleFacts, ...]]:
    return (yield from listing()).rules


def stats() -> Dialogue[Stats]:
    return _all_pages(lambda after: GetStats(id=ID, after=after), Stats)


def _all_pages(request: Callable[[str | None], Message], expect: type[Paged]) -> Dialogue[Paged]:
    """The last answer, with the rules of all of them; from the start again if a page's last rule went away."""
    found: list[Any] = []
    left = PAGINGS
    while True:
        try:
            reply = yield from ask(request(found[-1].id if found else None), expect, reads=True)
        except Busy:
            left -= 1
            if not found or not left:
                raise
            found = []
            continue
        found += reply.rules
        if not reply.more:
            return msgspec.structs.replace(reply, rules=tuple(found))
        if not reply.rules:
            raise ProtocolError("the daemon's list has no end", "is it the same version?")


def workers() -> Dialogue[tuple[ProcessFacts, ...]]:
    return (yield from ask(GetWorkers(id=ID), Workers, reads=True)).processes


def log_levels() -> Dialogue[LogLevels]:
    return ask(GetLogLevels(id=ID), LogLevels, reads=True)


def set_log_levels(level: str | None, components: Mapping[str, str]) -> Dialogue[LogLevels]:
    return ask(SetLogLevels(id=ID, level=level, components=dict(components)), LogLevels)


def restart_worker(index: int) -> Dialogue[Restarted]:
    return ask(RestartWorker(id=ID, index=index), Restarted)


def upgrade() -> Dialogue[Upgraded]:
    return ask(Upgrade(id=ID), Upgraded, patience_s=UPGRADE_S)


def events(kinds: Sequence[EventKind], patience_s: float | None = None) -> Stream[Happened]:
    listed = _listed("kinds", kinds)
    for kind in listed:
        if kind not in EVENT_KINDS:
            raise UsageError(f"there is no event {reprlib.repr(kind)}", f"there are {', '.join(EVENT_KINDS)}")
    return Stream(
        Subscribe(id=ID, kinds=listed),
        started=Subscribed,
        item=Happened,
        silence=lambda _last: Happened(id=ID, events=()),
        patience_s=None if patience_s is None else seconds("patience_s", patience_s),
    )


def tap(rule: str, count: int | None, snap_length: int, patience_s: float | None = None) -> Stream[Tapped]:
    return Stream(
        StartTap(id=ID, rule=rule, count=count, snap_length=snap_length),
        started=TapStarted,
        item=Tapped,
        ended=TapEnded,
        silence=lambda last: Tapped(id=ID, packets=(), lost=last.lost if last else 0),
        patience_s=None if patience_s is None else seconds("patience_s", patience_s),
    )

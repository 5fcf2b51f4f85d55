"""The codec: who may say which message where, and the way from messages to frames and back.

A frame is a 4-byte big-endian length and as many bytes of one JSON object, tagged by "type", at most FRAME_MAX.
Decoding is strict: an unknown type, an unknown or missing field, a wrong type or a number out of range is an error,
and so is a message that its sender may not send on that channel, or a field that a client gives twice. Knows nothing
of sockets or event loops: bytes come in, messages come out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final, TypeVar

import msgspec

from mcrelay.api import (
    Add,
    Added,
    Change,
    Changed,
    Failure,
    GetLogLevels,
    GetStats,
    GetStatus,
    GetVersion,
    GetWorkers,
    Happened,
    Hello,
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
    Welcome,
    Workers,
)
from mcrelay.frames import FRAME_MAX, HEADER, Malformed
from mcrelay.messages import (
    Acknowledge,
    AddRule,
    Applied,
    ApplyRules,
    AttachInterface,
    AttachPort,
    ChangeLevels,
    ChannelName,
    Client,
    Configure,
    DetachInterface,
    DetachPort,
    Failed,
    GetProcesses,
    HandedOver,
    HandOver,
    Inherit,
    InheritAbsorber,
    InheritInterface,
    InheritMemberships,
    InheritMetrics,
    InheritPort,
    InheritRules,
    LevelsChanged,
    Message,
    OpenTap,
    Prepared,
    Probe,
    Proceed,
    Processes,
    Ready,
    RecordRules,
    Refused,
    RemoveRule,
    Replaced,
    ReplaceWorker,
    RequestTap,
    Role,
    RuleRecord,
    Scraper,
    SetLevels,
    SetOwnAddresses,
    SetPatternInterfaces,
    Shutdown,
    Start,
    SyncRules,
    TapOpened,
    TookOver,
    WorkerChanged,
)
from mcrelay.names import check_names

PIECE_MAX: Final = 640 * 1024  # bytes of rules in one frame of several, with room for what stands around them
RECORD_BYTES: Final = 256  # of a rule's record beside its texts, at most
OUTPUT_BYTES: Final = 32  # of an output's counter, punctuation, and characters that JSON writes as two

# Who may say what where.
PERMITTED: Final[dict[tuple[ChannelName, Role, Role], tuple[type[Message], ...]]] = {
    ("supervisor_sock", "supervisor", "control"): (
        Start,
        Client,
        Scraper,
        RecordRules,
        WorkerChanged,
        Shutdown,
    ),
    ("supervisor_sock", "supervisor", "data"): (Start,),
    ("request_sock", "control", "supervisor"): (
        Ready,
        Failed,
        ApplyRules,
        ChangeLevels,
        ReplaceWorker,
        RequestTap,
        HandOver,
        GetProcesses,
        Acknowledge,
        Rules,
        Stats,
    ),
    ("request_sock", "supervisor", "control"): (
        Applied,
        Refused,
        LevelsChanged,
        Replaced,
        TapOpened,
        HandedOver,
        Processes,
        ListRules,
        GetStats,
        Configure,
        SetLevels,
        Probe,
    ),
    ("request_sock", "data", "supervisor"): (Ready, Failed, Acknowledge),
    ("request_sock", "supervisor", "data"): (),
    ("command_sock", "supervisor", "data"): (
        AttachInterface,
        AttachPort,
        DetachPort,
        DetachInterface,
        AddRule,
        RemoveRule,
        SyncRules,
        SetOwnAddresses,
        SetPatternInterfaces,
        OpenTap,
        SetLevels,
        Probe,
        Shutdown,
    ),
    ("client", "client", "control"): (
        Hello,
        Ping,
        GetVersion,
        GetStatus,
        Add,
        Remove,
        Pause,
        Change,
        ListRules,
        GetStats,
        GetWorkers,
        RestartWorker,
        Upgrade,
        StartTap,
        Subscribe,
        GetLogLevels,
        SetLogLevels,
    ),
    ("client", "control", "client"): (
        Welcome,
        Pong,
        Version,
        Status,
        Added,
        Removed,
        Paused,
        Changed,
        Rules,
        Stats,
        Workers,
        Restarted,
        Upgraded,
        TapStarted,
        Tapped,
        TapEnded,
        Subscribed,
        Happened,
        LogLevels,
        Failure,
    ),
    ("handover_sock", "supervisor", "successor"): (
        Inherit,
        InheritMetrics,
        InheritInterface,
        InheritMemberships,
        InheritAbsorber,
        InheritPort,
        InheritRules,
        Proceed,
    ),
    ("handover_sock", "successor", "supervisor"): (Prepared, TookOver, Failed),
}
# A worker never speaks on supervisor_sock or command_sock; what it sends there is malformed.


class _Nothing(msgspec.Struct, frozen=True, tag_field="type", tag="nothing"):
    """Not a message, and permitted to nobody."""


class Codec:
    """Messages from one role to another on one channel."""

    def __init__(self, channel: ChannelName, sender: Role, receiver: Role) -> None:
        self.permitted = PERMITTED.get((channel, sender, receiver), ())
        # A union even of one: msgspec asks for the tag only where there is a choice.
        union: Any = _Nothing
        for message in self.permitted:
            union = union | message
        self._decoder = msgspec.json.Decoder(union) if self.permitted else None
        self._sender = sender
        self._is_foreign = sender == "client"
        self.takes_descriptors = any(m.descriptors is not Message.descriptors for m in self.permitted)

    def decode(self, body: bytes) -> Message:
        """One message, or Malformed."""
        if self._decoder is None:
            raise Malformed("decode", f"the {self._sender} may not send anything here")
        try:
            message: Message | _Nothing = self._decoder.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise Malformed("decode", str(error)) from None
        if isinstance(message, _Nothing):
            raise Malformed("decode", "nothing is no message")
        if self._is_foreign:
            check_names(body)
        return message


_encoder = msgspec.json.Encoder()


def encode(message: Message) -> bytes:
    """The frame of a message. ValueError if it would exceed FRAME_MAX: split it."""
    body = _encoder.encode(message)
    if len(body) > FRAME_MAX:
        raise ValueError(f"{type(message).__name__} of {len(body)} bytes exceeds a frame")
    return HEADER.pack(len(body)) + body


def to_json(value: Any) -> Any:
    """A message or part of one as plain JSON values."""
    return msgspec.to_builtins(value)


def json_text(document: Any, *, indent: int) -> str:
    """JSON for programs and people to read; indent 0 is one line."""
    encoded = _encoder.encode(document)
    return (msgspec.json.format(encoded, indent=indent) if indent else encoded).decode()


Listed = TypeVar("Listed", RuleRecord, RuleText)


def in_frames(records: Sequence[Listed]) -> Iterator[tuple[tuple[Listed, ...], bool]]:
    """Cut a list of rules into pieces that fit a frame: (piece, it is the last). An empty list is one empty piece. What
    is longer than a rule can be may not fit: encode() says so."""
    piece: list[Listed] = []
    size = 0
    for record in records:
        texts = len(record.input) + sum(map(len, record.outputs))
        needed = RECORD_BYTES + OUTPUT_BYTES * len(record.outputs) + texts
        if piece and size + needed > PIECE_MAX:
            yield tuple(piece), False
            piece, size = [], 0
        piece.append(record)
        size += needed
    yield tuple(piece), True

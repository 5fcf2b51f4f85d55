"""The API: what clients and the control plane say to each other (docs/protocol.md).

Owns those messages; messages.py has their base and all others, codec.py who may say them. Requests have an id, which
the reply repeats.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal, get_args

import msgspec

from mcrelay.limits import RULE_OUTPUTS_MAX, TAP_BYTES_MAX
from mcrelay.messages import (
    FileState,
    HugeText,
    Id,
    LongText,
    Message,
    PacketCount,
    Positive,
    ProcessFacts,
    SnapLength,
    Text,
)
from mcrelay.settings import LogLevel, Settings

PROTOCOL: Final = 2  # another with every change of a message (handshake.py)
PROTOCOL_OLDEST: Final = 2  # that a client may speak


class Hello(Message, frozen=True):
    """The first message of a connection, or none. The same in all protocols, as are Welcome and Failure."""

    id: Id
    protocol: Annotated[int, msgspec.Meta(ge=0, lt=2**31)]  # that the client speaks
    client: Text  # what it is: for who reads why it was refused


class Welcome(Message, frozen=True):
    id: Id
    version: Text  # of the daemon
    protocol: Positive  # of this connection: as the client asked
    oldest: Positive  # that this daemon understands
    newest: Positive


class Ping(Message, frozen=True):
    id: Id


class Pong(Message, frozen=True):
    id: Id


class GetVersion(Message, frozen=True):
    id: Id


class Version(Message, frozen=True):
    id: Id
    version: str
    protocol: int


class GetStatus(Message, frozen=True):
    id: Id


class Status(Message, frozen=True):
    """The daemon as a whole."""

    id: Id
    version: str
    protocol: int
    config: str | None  # its file
    settings: Settings  # what the file said when the daemon started; rules apart, which are what they are now
    rootless: bool
    generation: Id
    rules: Positive


class Add(Message, frozen=True):
    id: Id
    # Generous: the parser says better what is wrong with a long text.
    input: HugeText
    outputs: Annotated[tuple[HugeText, ...], msgspec.Meta(max_length=4 * RULE_OUTPUTS_MAX)]  # parse_rule says why not
    name: HugeText | None = None


RuleState = Literal["active", "partial", "pending", "suspended"]


class RuleFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A rule, and whether it works now. `partial`: some outputs do not; `pending`: the input does not, or no output
    does; `suspended`: its output came back by way of another relay. `problems` says why."""

    id: str
    name: str | None
    input: str
    outputs: tuple[str, ...]
    state: RuleState
    problems: tuple[str, ...]


class Added(Message, frozen=True):
    id: Id
    rule: RuleFacts
    generation: Id
    workers: Positive


class Remove(Message, frozen=True):
    id: Id
    rule: HugeText  # name or id


class Removed(Message, frozen=True):
    id: Id
    rule: RuleFacts
    generation: Id
    workers: Positive


class Pause(Message, frozen=True):
    """Have an output of a rule, or all of them, send nothing, or send again."""

    id: Id
    rule: HugeText  # name or id
    output: HugeText | None  # its text, its ADDRESS:PORT%INTERFACE, or its number, counted from 1; null: all
    paused: bool


class Paused(Message, frozen=True):
    id: Id
    rule: RuleFacts
    generation: Id
    workers: Positive


class RuleText(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A rule as a client writes it."""

    input: HugeText
    outputs: Annotated[tuple[HugeText, ...], msgspec.Meta(max_length=4 * RULE_OUTPUTS_MAX)]
    name: HugeText | None = None


class Change(Message, frozen=True):
    """Add and remove rules: all of it or nothing. A long list takes several messages of one id, of which the last is
    `complete`; nothing happens before that. With `expect`, the last one's, only if the rules are still those of that
    generation."""

    id: Id
    add: tuple[RuleText, ...]
    remove: tuple[HugeText, ...]  # names or ids
    complete: bool
    expect: Id | None = None


class Changed(Message, frozen=True):
    id: Id
    generation: Id
    added: Positive
    removed: Positive
    workers: Positive


class ListRules(Message, frozen=True):
    id: Id
    after: Text | None = None  # the id of the last rule already seen


class InterfaceFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An interface that rules name, over all workers."""

    name: str
    problems: tuple[str, ...]  # why rules cannot use it
    frames: int  # that came in for rules, or nearly
    overruns: int  # of which the kernel dropped so many, because workers did not read fast enough
    merged: int  # frames of several datagrams that had to be dropped
    segments_refused: int
    segmentation: bool  # false: it refused segments, and datagrams leave it one by one


class Rules(Message, frozen=True):
    id: Id
    generation: Id
    rules: tuple[RuleFacts, ...]
    interfaces: tuple[InterfaceFacts, ...]
    more: bool


class OutputStats(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    output: str
    packets: int
    bytes: int
    dropped: dict[str, int]


class RuleStats(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    id: str
    name: str | None
    input: str
    packets: int  # that matched
    bytes: int
    forwarded: int
    dropped: int
    own: int  # that matched, but came from this host: not in packets
    looped: int  # that matched, but while the rule was suspended: not in packets
    suspensions: int
    outputs: tuple[OutputStats, ...]


class WorkerStats(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    index: int
    received: int
    received_bytes: int
    forwarded: int
    copies: int
    copies_bytes: int
    pool_exhausted: int
    pool_slots: int
    pool_free: int
    batches: int
    sends: int  # calls that sent the copies: several copies at once where they could be segments
    segments_refused: int
    frames_malformed: int
    dropped: dict[str, int]


class GetStats(Message, frozen=True):
    id: Id
    after: Text | None = None


class Stats(Message, frozen=True):
    """Counters of all workers, and of as many rules as a frame holds: ask again with `after` while there is more."""

    id: Id
    generation: Id
    workers: tuple[WorkerStats, ...]
    rules: tuple[RuleStats, ...]
    more: bool
    frames_malformed: int  # from clients and on the control plane's own channels


class RestartWorker(Message, frozen=True):
    """Replace a data plane's process; nothing is lost."""

    id: Id
    index: Positive


class Restarted(Message, frozen=True):
    id: Id
    index: Positive
    pid: int


class Upgrade(Message, frozen=True):
    """Have the program, as it is installed now, take the place of the running daemon; nothing is lost."""

    id: Id


class Upgraded(Message, frozen=True):
    id: Id
    pid: int  # of the new daemon


class StartTap(Message, frozen=True):
    """Show the next packets of a rule, `count` of them if given, no more than `snap_length` bytes of each. It ends with
    the connection at the latest."""

    id: Id
    rule: HugeText  # name or id
    count: PacketCount | None = None
    snap_length: SnapLength = TAP_BYTES_MAX


class TapStarted(Message, frozen=True):
    id: Id
    rule: RuleFacts
    workers: Positive  # that have the rule


class OutputDrop(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An output by which no copy left, or not all of them, and why."""

    output: str
    reason: str


class TappedPacket(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A packet that matched a rule, and what became of it."""

    time_ns: Positive  # since the epoch: when it arrived, or where that is not known, when the worker took it up
    worker: Positive
    interface: str  # that it came in by
    vlan: Positive  # 0: untagged
    length: Positive  # of the IP packet
    datagrams: Annotated[int, msgspec.Meta(ge=1)]  # in the packet: several where a device merged them
    outputs: Positive  # of the rule
    copies: Positive  # datagrams that left, over all outputs
    verdict: str  # "forwarded", if any copy left, or the reason of the drop
    dropped: tuple[OutputDrop, ...]  # the first of them
    data: bytes  # the packet from its IP header on, as far as was asked for


class Tapped(Message, frozen=True):
    """Packets of a tap."""

    id: Id
    packets: tuple[TappedPacket, ...]
    lost: Positive  # so far: more than could be shown in time


class TapEnded(Message, frozen=True):
    """As many packets as were asked for have been shown."""

    id: Id


EventKind = Literal[
    "rule_added",
    "rule_removed",
    "rule_changed",
    "rule_suspended",
    "rule_resumed",
    "interface_up",
    "interface_down",
    "worker_down",
    "worker_up",
    "flow_started",
    "flow_silent",
    "flow_stopped",
    "loss",
    "loss_over",
]
EVENT_KINDS: Final[tuple[EventKind, ...]] = get_args(EventKind)


class Event(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Something that happened."""

    time_ns: Positive  # since the epoch
    kind: EventKind
    subject: str  # name or id of the rule, name of the interface, number of the worker
    text: str  # for people
    values: dict[str, float]  # what it was about, in figures


class Subscribe(Message, frozen=True):
    """Tell what happens from now on, of these kinds or, without any, of all. It ends with the connection."""

    id: Id
    kinds: Annotated[tuple[EventKind, ...], msgspec.Meta(max_length=64)] = ()


class Subscribed(Message, frozen=True):
    id: Id


class Happened(Message, frozen=True):
    """Events of a subscription."""

    id: Id
    events: tuple[Event, ...]


class GetLogLevels(Message, frozen=True):
    id: Id


class SetLogLevels(Message, frozen=True):
    """Log from `level` on (null: as before), and of `components` from theirs on; "default" takes a component's away."""

    id: Id
    level: HugeText | None = None
    components: dict[HugeText, HugeText] = msgspec.field(default_factory=dict)


class LogLevels(Message, frozen=True):
    """The levels in force, in all processes. `known`: all components, which have `level` if none of their own."""

    id: Id
    level: LogLevel
    components: dict[str, LogLevel]
    known: tuple[str, ...]


class GetWorkers(Message, frozen=True):
    id: Id


class Workers(Message, frozen=True):
    id: Id
    processes: tuple[ProcessFacts, ...]
    started_s: float = 0.0  # when the daemon was: Unix time, seconds
    file: FileState | None = None  # if it has one


class Failure(Message, frozen=True):
    """What was asked for did not happen. `id` is null if the request's could not be read."""

    id: Id | None
    code: Text
    message: LongText
    hint: LongText

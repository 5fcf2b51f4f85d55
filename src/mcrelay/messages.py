"""Messages: everything that processes of mcrelay, and its clients, say to each other.

Owns every message type; codec.py has who may say it where, and the way to bytes and back. Descriptors travel
beside a message (SCM_RIGHTS); `descriptors()` says how many belong to it.

    channel          from -> to                     what
    supervisor_sock  supervisor -> any worker       Start; to the control plane also Client, Scraper, RecordRules
    request_sock     any worker <-> supervisor      requests and replies by id, Ready, Acknowledge
    command_sock     supervisor -> data plane       interfaces, rules, own addresses, Shutdown
    client           client <-> control plane       the API (api.py)
    handover_sock    supervisor <-> its successor   what outlives a daemon
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec

from mcrelay.frames import FRAME_MAX
from mcrelay.limits import (
    ADDRESSES_MAX,
    FILES_MAX,
    INTERFACES_MAX,
    LATENCY_BUDGET_US_MAX,
    OUTPUTS_MAX,
    RULE_OUTPUTS_MAX,
    RULES_MAX,
    TAP_BYTES_MAX,
    WORKERS_MAX,
)
from mcrelay.settings import LogFormat, LogLevel, LogSection, Settings
from mcrelay.ways import Direction

ChannelName = Literal["supervisor_sock", "request_sock", "command_sock", "client", "handover_sock"]
Role = Literal["supervisor", "control", "data", "client", "successor"]
Id = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Text = Annotated[str, msgspec.Meta(max_length=256)]
LONG_TEXT_MAX: Final = 4096  # characters
LongText = Annotated[str, msgspec.Meta(max_length=LONG_TEXT_MAX)]
AddressText = Annotated[str, msgspec.Meta(max_length=45)]  # IPv6 with a mapped IPv4 address written out
HugeText = Annotated[str, msgspec.Meta(max_length=FRAME_MAX)]
Outputs = Annotated[tuple[Text, ...], msgspec.Meta(max_length=RULE_OUTPUTS_MAX)]
RuleCounter = Annotated[int, msgspec.Meta(ge=0, lt=RULES_MAX)]
OutputCounter = Annotated[int, msgspec.Meta(ge=0, lt=OUTPUTS_MAX)]
Slot = Annotated[int, msgspec.Meta(ge=0, lt=INTERFACES_MAX)]
Mtu = Annotated[int, msgspec.Meta(ge=68, le=65536)]
Port = Annotated[int, msgspec.Meta(ge=1, lt=2**17)]  # of rootless mode: a port, and 2**16 for IPv6
Positive = Annotated[int, msgspec.Meta(ge=0)]
PacketCount = Annotated[int, msgspec.Meta(ge=1, le=2**53)]
SnapLength = Annotated[int, msgspec.Meta(ge=0, le=TAP_BYTES_MAX)]  # bytes of a packet
Occasion = Literal["start", "reload"]  # for reading the configuration
NewLevel = Literal[LogLevel, "default"]  # of a component: "default" takes its own away
UNJOINED_MAX: Final = 100  # groups, of all interfaces, that are told; a log line has how many there are


def _tag(class_name: str) -> str:
    return "".join("_" + c.lower() if c.isupper() else c for c in class_name).lstrip("_")


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag=_tag, omit_defaults=True):
    """Base of all messages."""

    def descriptors(self) -> int:
        """How many descriptors travel with the message."""
        return 0


class RuleRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A rule between our processes: its canonical texts and where it is counted."""

    input: Text
    outputs: Outputs
    name: Text | None
    counter: RuleCounter
    output_counters: Annotated[tuple[OutputCounter, ...], msgspec.Meta(max_length=RULE_OUTPUTS_MAX)]


class InterfaceRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An interface that rules name or stand for, between our processes: its slot, which directions rules use, why one
    of those does not work, and the groups (SOURCE@GROUP) that the kernel does not let us join there, up to a number."""

    name: Text
    slot: Slot
    present: bool  # there is an interface of that name
    used: tuple[Direction, ...]
    versions: tuple[Literal[4, 6], ...]  # of IP, of which it has an address to send from
    problems: dict[Direction, Text]
    unjoined: Annotated[dict[Text, Text], msgspec.Meta(max_length=UNJOINED_MAX)]


class Levels(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """From which level on messages are logged: `level`, but of `components` that have one of their own."""

    level: LogLevel = "info"
    components: dict[Text, LogLevel] = {}


class LogSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is logged, and how. With `watch` it includes whatever blocks an event loop."""

    levels: Levels = Levels()
    format: LogFormat = "text"
    watch: bool = False


class ProcessFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the kernel says of one process, and what the supervisor knows of it."""

    role: Literal["supervisor", "control", "data", "spare"]
    index: Positive
    state: Literal["starting", "ready", "waiting"]  # waiting: dead, to be restarted after its back-off
    pid: int | None
    uid: int | None
    capabilities: str | None  # effective set, hexadecimal
    cores: str | None  # as in Cpus_allowed_list
    restarts: Positive
    engine: str | None = None
    frames_malformed: Positive = 0


# --- supervisor_sock: supervisor to worker ---------------------------------------------------------------------------


class Start(Message, frozen=True):
    """The first message a worker gets. With it: request_sock; for a data plane also command_sock and its writable
    counter page; for the control plane one readable page for each data plane."""

    role: Literal["control", "data"]
    index: Positive
    workers: Annotated[int, msgspec.Meta(ge=1, le=WORKERS_MAX)]
    core: Positive | None  # of a data plane: where it runs
    engine: Literal["auto", "uring", "reference"]
    latency_budget_us: Annotated[int, msgspec.Meta(ge=0, le=LATENCY_BUDGET_US_MAX)]
    busy_poll: bool
    version: str
    logs: LogSettings
    config: LongText | None = None  # of the control plane: the file, and what of its settings is in force
    settings: Settings = Settings()

    def descriptors(self) -> int:
        return 3 if self.role == "data" else 1 + self.workers


class Client(Message, frozen=True):
    """An accepted client connection, and who the kernel says is at its other end."""

    pid: int
    uid: Positive
    gid: Positive

    def descriptors(self) -> int:
        return 1


class Scraper(Message, frozen=True):
    """An accepted connection of somebody who wants metrics."""

    address: Text  # and port

    def descriptors(self) -> int:
        return 1


class RecordRules(Message, frozen=True):
    """Rules that ceased to be active or became so, in this order. A generation may take several messages; the last is
    `complete`. With `snapshot` what was known before is void. One without rules is about the interfaces. There is a
    `reason` where nobody has asked for the change."""

    generation: Id
    added: tuple[RuleRecord, ...]
    removed: tuple[Text, ...]
    complete: bool
    interfaces: tuple[InterfaceRecord, ...]  # all that rules name
    snapshot: bool = False
    reason: LongText = ""


class WorkerChanged(Message, frozen=True):
    """A data plane's process has ended, or another one is ready."""

    index: Positive
    is_ready: bool
    pid: int | None
    restarts: Positive


# --- request_sock: both ways -----------------------------------------------------------------------------------------


class Ready(Message, frozen=True):
    """A worker works. `engine` is the one that runs."""

    engine: str | None = None


class Failed(Message, frozen=True):
    """A worker cannot work here, and a restart would not help."""

    code: Text
    message: LongText
    hint: LongText


class Acknowledge(Message, frozen=True):
    """A worker has done the command with this ticket, or has refused it. Of Configure: the settings that are in force
    by then, and those that the files want."""

    ticket: Id
    error: LongText | None = None
    hint: LongText = ""
    code: Text = "busy"
    settings: Settings | None = None
    wanted: Settings | None = None


class ApplyRules(Message, frozen=True):
    """Change the active rules: all of it or nothing. A long list takes several messages of one id, of which the last is
    `complete` and says which generation it `expect`s, if that matters."""

    id: Id
    add: tuple[RuleRecord, ...]
    remove: tuple[Text, ...]
    complete: bool
    expect: Id | None = None


class Applied(Message, frozen=True):
    id: Id
    generation: Id
    workers: Positive  # that acknowledged


class ChangeLevels(Message, frozen=True):
    """Log from these levels on, in all processes; what is not named stays."""

    id: Id
    level: LogLevel | None
    components: dict[Text, NewLevel]


class LevelsChanged(Message, frozen=True):
    """All processes do."""

    id: Id
    levels: Levels


class SetLevels(Message, frozen=True):
    """Log from these levels on. To a data plane on command_sock."""

    ticket: Id
    levels: Levels


class ReplaceWorker(Message, frozen=True):
    """Have a data plane finish what is in hand, and another process take its place."""

    id: Id
    index: Positive


class Replaced(Message, frozen=True):
    id: Id
    pid: int


class RequestTap(Message, frozen=True):
    """Have the workers show the next packets of a rule."""

    id: Id
    rule: Text  # id
    count: PacketCount
    snap_length: SnapLength


class TapOpened(Message, frozen=True):
    """These workers do, and with the message comes a socket from each, in this order."""

    id: Id
    workers: Annotated[tuple[Positive, ...], msgspec.Meta(max_length=WORKERS_MAX)]

    def descriptors(self) -> int:
        return len(self.workers)


class HandOver(Message, frozen=True):
    """Have a new daemon take the place of this one."""

    id: Id


class HandedOver(Message, frozen=True):
    id: Id
    pid: int


class Refused(Message, frozen=True):
    id: Id
    code: Text
    message: LongText
    hint: LongText


class FileState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of the daemon's file: whether it is in force as it was when it was to be read last, and since when one is. Unix
    time, seconds."""

    in_force: bool
    since_s: float


class Configure(Message, frozen=True):
    """Read these files, which come with the message, and have their rules and settings: at the start of a daemon all
    rules that can be, at a reload all or nothing. It is meant for the rules of that generation or later ones, whose
    records come by another channel."""

    ticket: Id
    generation: Id
    files: Annotated[tuple[LongText, ...], msgspec.Meta(max_length=FILES_MAX)]
    occasion: Occasion

    def descriptors(self) -> int:
        return len(self.files)


class GetProcesses(Message, frozen=True):
    id: Id


class Processes(Message, frozen=True):
    id: Id
    processes: tuple[ProcessFacts, ...]
    started_s: float  # when this daemon was: Unix time, seconds
    file: FileState | None  # if it has one


# --- command_sock: supervisor to data plane --------------------------------------------------------------------------


class Ring(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The geometry of a packet socket's ring, in bytes."""

    block_size: Positive
    blocks: Positive
    frame_size: Positive


class AttachInterface(Message, frozen=True):
    """Receive or send on the interface with this slot through the socket that comes with the message."""

    ticket: Id
    slot: Slot
    name: Text  # what people call it
    mtu: Mtu
    direction: Direction
    ring: Ring | None = None
    loopback: bool = False  # local programs send on it from addresses of this host
    plain: bool = False  # through none, but those that come with AttachPort
    link: Text | None = None  # ways.Link, packed, in hexadecimal digits: of a way out for which we write headers

    def descriptors(self) -> int:
        return 0 if self.plain else 1


class AttachPort(Message, frozen=True):
    """Receive on the interface, which is a plain one, through this ordinary UDP socket, too."""

    ticket: Id
    slot: Slot
    port: Port

    def descriptors(self) -> int:
        return 1


class DetachPort(Message, frozen=True):
    """Do so no more, and close the socket."""

    ticket: Id
    slot: Slot
    port: Port


class DetachInterface(Message, frozen=True):
    """Do so no more, and close the socket."""

    ticket: Id
    slot: Slot
    direction: Direction


class AddRule(Message, frozen=True):
    """Forward by this rule, too. `slots` has those of the interfaces that it names."""

    ticket: Id
    rule: RuleRecord
    slots: dict[Text, Slot]


class RemoveRule(Message, frozen=True):
    ticket: Id
    rule: Text  # id


class SetOwnAddresses(Message, frozen=True):
    """These are the addresses of this host, and no others. What comes from one of them is not forwarded, unless it came
    on a loopback device."""

    ticket: Id
    addresses: Annotated[tuple[AddressText, ...], msgspec.Meta(max_length=ADDRESSES_MAX)]


class SetPatternInterfaces(Message, frozen=True):
    """Rules with a pattern are for these interfaces, as far as it matches their names, and for no others. Said before
    they are attached, so that rules know them before the first frame comes in."""

    ticket: Id
    slots: Annotated[dict[Text, Slot], msgspec.Meta(max_length=INTERFACES_MAX)]


class OpenTap(Message, frozen=True):
    """Show the next packets of the rule with this counter, no more than `snap_length` bytes of each, by the socket that
    comes with the message, until that is closed at its other end."""

    ticket: Id
    rule: RuleCounter
    count: PacketCount
    snap_length: SnapLength

    def descriptors(self) -> int:
        return 1


class Probe(Message, frozen=True):
    """Show that you work: a data plane acknowledges it by way of its engine."""

    ticket: Id


class SyncRules(Message, frozen=True):
    """These rules and no others; a long list takes several messages, of which the last is `complete`."""

    ticket: Id
    rules: tuple[RuleRecord, ...]
    slots: dict[Text, Slot]
    complete: bool


class Shutdown(Message, frozen=True):
    """Finish what is in hand and exit."""


# --- handover_sock ---------------------------------------------------------------------------------------------------


class Inherit(Message, frozen=True):
    """The first message a successor gets. With it: the clients' listening socket and each data plane's counter page."""

    version: Text
    workers: Annotated[int, msgspec.Meta(ge=1, le=WORKERS_MAX)]
    generation: Id
    counters_version: Positive
    counters_size: Positive  # bytes of a page
    rootless: bool = False
    levels: Levels | None = None
    log: LogSection | None = None  # what the file said of them, as it was read last
    network: Text | None = None  # the namespace of the sockets (process.network_namespace)
    started_s: float = 0.0  # when the first daemon was started: Unix time, seconds
    file: FileState | None = None

    def descriptors(self) -> int:
        return 1 + self.workers


class InheritMetrics(Message, frozen=True):
    """The listening socket that metrics are served at."""

    address: Text
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)]

    def descriptors(self) -> int:
        return 1


class InheritInterface(Message, frozen=True):
    """One direction of an interface. With it: a socket for each worker, and, if it `filters`, the filter's two maps
    and its program."""

    name: Text
    slot: Slot
    direction: Direction
    index: Positive
    mtu: Mtu
    ring: Ring | None
    loopback: bool
    filters: bool
    workers: Annotated[int, msgspec.Meta(ge=1, le=WORKERS_MAX)]
    plain: bool = False  # no socket, but those that come with InheritPort

    def descriptors(self) -> int:
        return 0 if self.plain else self.workers + (3 if self.filters else 0)


class InheritPort(Message, frozen=True):
    """An ordinary UDP socket of an interface that was inherited."""

    name: Text
    port: Port

    def descriptors(self) -> int:
        return 1


class Member(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    index: Positive  # of the interface
    group: AddressText
    source: AddressText | None


class InheritMemberships(Message, frozen=True):
    """A socket that is a member of these groups."""

    memberships: tuple[Member, ...]

    def descriptors(self) -> int:
        return 1


class InheritAbsorber(Message, frozen=True):
    """A socket by which this host takes what comes to a unicast input. `port` 0 is ESP; `interface` is given for an
    address of link-local scope."""

    address: AddressText
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)]
    interface: Text

    def descriptors(self) -> int:
        return 1


class InheritRules(Message, frozen=True):
    """Rules to forward by; with the last of them, which is `complete`, everything is said."""

    rules: tuple[RuleRecord, ...]
    complete: bool


class Prepared(Message, frozen=True):
    """The successor's workers want nothing but their packet sockets."""


class Proceed(Message, frozen=True):
    """Nobody else reads the packet sockets any more."""


class TookOver(Message, frozen=True):
    """The successor forwards."""

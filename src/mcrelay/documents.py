"""Documents: what commands print with --json where that is no reply of the daemon as it is (api.py). The one of a
diagnosis is in facts.py.

Their fields are what programs rely on: tests/unit/snapshots has a schema of each, and of the replies. Pure.
"""

from __future__ import annotations

from typing import TypedDict

from mcrelay.api import InterfaceFacts, RuleFacts
from mcrelay.config import Problem
from mcrelay.messages import ProcessFacts
from mcrelay.settings import LogLevel


class Answered(TypedDict):
    """Of `mcrelay ping`."""

    socket: str
    took_ms: float


class Versions(TypedDict):
    """Of `mcrelay version`; without a daemon it is this program's alone."""

    client: str
    daemon: str | None
    protocol: int | None


class LevelsInForce(TypedDict):
    """Of `mcrelay log`."""

    level: LogLevel
    components: dict[str, LogLevel]
    known: tuple[str, ...]  # all components


class Listing(TypedDict):
    """Of `mcrelay list`."""

    generation: int
    rules: tuple[RuleFacts, ...]
    interfaces: tuple[InterfaceFacts, ...]


class Processes(TypedDict):
    """Of `mcrelay workers`."""

    processes: tuple[ProcessFacts, ...]


class OutputDrop(TypedDict):
    output: str
    reason: str


class PacketHeaders(TypedDict, total=False):
    """Of a packet, as far as they can be read."""

    source: str
    source_port: int | None
    destination: str
    destination_port: int | None
    protocol: int
    ttl: int
    dscp: int


class Packet(PacketHeaders):
    """A line of `mcrelay trace`."""

    time_ns: int
    worker: int
    interface: str
    vlan: int
    length: int
    datagrams: int
    verdict: str
    outputs: int
    copies: int
    dropped: list[OutputDrop]
    data: str  # in hexadecimal


class CheckedFile(TypedDict):
    """Of `mcrelay check`."""

    problems: tuple[Problem, ...]
    remarks: tuple[Problem, ...]  # what this host does not have, and perhaps the one that the file is for


class RuleTexts(TypedDict):
    name: str | None
    input: str
    outputs: list[str]


class ChangedRule(TypedDict):
    before: RuleTexts
    after: RuleTexts


class Comparison(TypedDict):
    """What would have to happen to the rules that run, or to those in a file."""

    added: list[RuleTexts]
    removed: list[RuleTexts]
    changed: list[ChangedRule]


class Waiting(TypedDict):
    """Settings of a file that come into force later: their keys."""

    reload: list[str]  # with a reload or a restart
    restart: list[str]


class FileComparison(Comparison, Waiting):
    """Of `mcrelay diff`."""


class AppliedFile(FileComparison):
    """Of `mcrelay apply`."""

    applied: bool


class SavedFile(Comparison):
    """Of `mcrelay save`."""

    file: str

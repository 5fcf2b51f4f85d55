"""Settings: what a configuration file may say, key by key.

Owns the types, bounds, defaults and the one-line description of each key; the JSON Schema is made of them, a test
compares mcrelay.toml(5) with them. config.py reads files into them. Pure.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from mcrelay.limits import (
    LATENCY_BUDGET_US_DEFAULT,
    LATENCY_BUDGET_US_MAX,
    RING_MEMORY_DEFAULT,
    RULES_MAX,
    WORKERS_MAX,
)

RING_MIB_MAX: Final = 1024
WORKER: Final = "^(0|[1-9][0-9]{0,2})$"  # a number, as it is written
# For editors; ruletext.py has the checks.
INTERFACE: Final[dict[str, Any]] = {"pattern": r"^[^\s/:%,@]{1,15}$"}
NAME: Final[dict[str, Any]] = {"pattern": "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"}
OUTPUTS: Final[dict[str, Any]] = {"minItems": 1}
METRICS_RULES_DEFAULT: Final = 1000  # with two outputs each, 16,000 series in 1 MB of text

LogLevel = Literal["debug", "info", "warning", "error"]
Engine = Literal["auto", "uring", "reference"]
Ingress = Literal["ring", "recv"]
LogFormat = Literal["auto", "text", "json", "journal"]
RingMib = Annotated[int, Meta(ge=1, le=RING_MIB_MAX)]
Budget = Annotated[int, Meta(ge=0, le=LATENCY_BUDGET_US_MAX)]


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A table of the file."""


class DaemonSection(Section, frozen=True):
    """What `mcrelay run` takes, too; what stands on its command line counts more."""

    socket: Annotated[str | None, Meta(description="The clients' socket.")] = None
    rootless: Annotated[bool, Meta(description="Use no privilege (docs/rootless.md).")] = False
    workers: Annotated[
        Annotated[int, Meta(ge=1, le=WORKERS_MAX)] | None,
        Meta(description="Data plane workers, one per core; without it, one on each core."),
    ] = None
    cores: Annotated[str | None, Meta(description="The cores for them, for example '0,2-3'.")] = None
    user: Annotated[str | None, Meta(description="Who workers run as: mcrelay if it exists, else nobody.")] = None
    engine: Annotated[Engine, Meta(description="What moves the packets.")] = "auto"
    ingress: Annotated[Ingress, Meta(description="How packets come in.")] = "ring"
    ring_mib: Annotated[RingMib, Meta(description="MiB for each ring: one per worker and ingress interface.")] = (
        RING_MEMORY_DEFAULT // 2**20
    )
    latency_budget_us: Annotated[
        Budget, Meta(description="Microseconds that a packet may wait for others at high rates; 0: none waits.")
    ] = LATENCY_BUDGET_US_DEFAULT
    busy_poll: Annotated[bool, Meta(description="Never sleep: a whole core per worker.")] = False
    restore: Annotated[
        bool, Meta(description="Begin with the rules of the last daemon, then change only what differs.")
    ] = True


class LogSection(Section, frozen=True):
    """What is logged, and how."""

    format: Annotated[LogFormat, Meta(description="auto: for the journal if it is that, else text.")] = "auto"
    level: Annotated[LogLevel, Meta(description="What is not logged is below that.")] = "info"
    levels: Annotated[dict[str, LogLevel], Meta(description="Of single components, for example links = 'debug'.")] = {}


class MetricsSection(Section, frozen=True):
    """The endpoint for Prometheus."""

    listen: Annotated[
        str | None, Meta(description="ADDRESS:PORT to serve /metrics and /health on; without it, nowhere.")
    ] = None
    rules_max: Annotated[
        Annotated[int, Meta(ge=0, le=RULES_MAX)],
        Meta(description="Rules that have metrics of their own; those of the others are summed up."),
    ] = METRICS_RULES_DEFAULT


class EventsSection(Section, frozen=True):
    """When something is an event."""

    silent_s: Annotated[
        Annotated[float, Meta(ge=1, le=86400)],
        Meta(description="Seconds without a packet, after which a flow is silent."),
    ] = 5.0
    stopped_s: Annotated[
        Annotated[float, Meta(ge=1, le=86400)],
        Meta(description="Seconds without a packet, after which it has stopped."),
    ] = 60.0
    loss_percent: Annotated[
        Annotated[float, Meta(gt=0, le=100)], Meta(description="Dropped packets of a second, from which on it is loss.")
    ] = 1.0


class InterfaceSection(Section, frozen=True):
    """Of one interface."""

    ring_mib: Annotated[RingMib | None, Meta(description="MiB for each of its rings, instead of daemon.ring_mib.")] = (
        None
    )


class WorkerSection(Section, frozen=True):
    """Of one data plane worker."""

    latency_budget_us: Annotated[Budget | None, Meta(description="Instead of daemon.latency_budget_us.")] = None
    busy_poll: Annotated[bool | None, Meta(description="Instead of daemon.busy_poll.")] = None


class RuleSection(Section, frozen=True):
    """A rule, as 'mcrelay add' takes it."""

    input: Annotated[str, Meta(description="[SOURCE@]ADDRESS[/PREFIX]:PORT%INTERFACE[,vlan=N]")]
    output: Annotated[
        str | Annotated[tuple[str, ...], Meta(extra_json_schema=OUTPUTS)],
        Meta(description="ADDRESS[/PREFIX]:PORT%INTERFACE[,KEY=VALUE...], or a list of such."),
    ]
    name: Annotated[Annotated[str, Meta(extra_json_schema=NAME)] | None, Meta(description="What to call it.")] = None

    @property
    def outputs(self) -> tuple[str, ...]:
        return (self.output,) if isinstance(self.output, str) else self.output


class Settings(Section, frozen=True):
    """The whole file."""

    daemon: DaemonSection = DaemonSection()
    log: LogSection = LogSection()
    metrics: MetricsSection = MetricsSection()
    events: EventsSection = EventsSection()
    interface: Annotated[
        dict[Annotated[str, Meta(extra_json_schema=INTERFACE)], InterfaceSection],
        Meta(description="By the interface's name."),
    ] = {}
    worker: Annotated[
        dict[Annotated[str, Meta(pattern=WORKER)], WorkerSection],
        Meta(description="By the worker's number, from 0 on."),
    ] = {}
    rule: Annotated[tuple[RuleSection, ...], Meta(description="The rules, in order.")] = ()

    def changes_at_start(self, other: Settings) -> list[str]:
        """The keys that differ from `other` and count only when a daemon starts, as `daemon.workers`."""
        found = [
            f"{section}.{key}"
            for section in ("daemon", "metrics")
            for key in getattr(self, section).__struct_fields__
            if getattr(getattr(self, section), key) != getattr(getattr(other, section), key)
        ]
        found += [
            f"{table}.{name}"
            for table in ("interface", "worker")
            for name in sorted(getattr(self, table).keys() | getattr(other, table).keys())
            if getattr(self, table).get(name) != getattr(other, table).get(name)
        ]
        return found + (["log.format"] if self.log.format != other.log.format else [])

    def changes_at_reload(self, other: Settings) -> list[str]:
        """The keys that differ from `other` and count from a reload on."""
        return [
            f"{section}.{key}"
            for section in ("log", "events")
            for key in getattr(self, section).__struct_fields__
            if key != "format" and getattr(getattr(self, section), key) != getattr(getattr(other, section), key)
        ]


def schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of a configuration file."""
    made = msgspec.json.schema(Settings)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "mcrelay.toml", **made}

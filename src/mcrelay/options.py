"""Options: what a daemon was started with, as its supervisor needs it.

Made of the command line and the configuration file, and checked by then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mcrelay.endpoint import Endpoint
from mcrelay.messages import LogSettings
from mcrelay.settings import METRICS_RULES_DEFAULT, Settings, WorkerSection


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    socket: str
    cores: tuple[int, ...]  # one data plane worker on each
    user: str | None
    engine: Literal["auto", "uring", "reference"]
    ingress: Literal["ring", "recv"]
    ring_memory: int  # bytes per worker and interface
    latency_budget_us: int
    busy_poll: bool
    logs: LogSettings
    restore: bool  # the rules of the last daemon
    rootless: bool  # without any privilege
    metrics: Endpoint | None = None  # where they are served
    metrics_rules: int = METRICS_RULES_DEFAULT  # that have metrics of their own
    config: str | None = None  # the file
    settings: Settings = field(default_factory=Settings)  # what it said
    chosen: Mapping[str, Any] = field(default_factory=dict)  # of [daemon], what the command line said: it counts more

    def ring_memories(self) -> Mapping[str, int]:
        """Bytes, of interfaces with a size of their own."""
        mib = {name: section.ring_mib for name, section in self.settings.interface.items()}
        return {name: size * 2**20 for name, size in mib.items() if size is not None}

    def of_worker(self, index: int) -> tuple[int, bool]:
        """(latency_budget_us, busy_poll)"""
        own = self.settings.worker.get(str(index), WorkerSection())
        return (
            self.latency_budget_us if own.latency_budget_us is None else own.latency_budget_us,
            self.busy_poll if own.busy_poll is None else own.busy_poll,
        )

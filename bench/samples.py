"""What was measured, and how long and how often: samples, profiles, and the environment they come from.

Owns the schema of the JSON document (SCHEMA). Measures nothing.
"""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from mcrelay import __version__

SCHEMA: Final = 1
ROOT: Final = Path(__file__).resolve().parents[1]

Parameters = dict[str, str | int | float]


@dataclass(frozen=True)
class Sample:
    """One repetition of one measurement of one relay with one set of parameters."""

    measurement: str
    relay: str
    repetition: int
    parameters: Parameters
    figures: dict[str, float]  # name with its unit -> value
    notes: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[str, str, tuple[tuple[str, str | int | float], ...]]:
        """What repetitions of the same have in common."""
        return self.measurement, self.relay, tuple(sorted(self.parameters.items()))


@dataclass(frozen=True)
class Summary:
    """Median and spread of a figure over repetitions."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Summary:
        values = list(values)
        return cls(statistics.median(values), min(values), max(values), len(values))


@dataclass(frozen=True)
class Profile:
    """How much to measure."""

    name: str
    repeat: int
    trial_s: float  # of a search
    load_s: float  # of a fixed load
    latency_s: float
    resolution: float  # of a search, a fraction
    payloads: tuple[int, ...]
    loads: tuple[int, ...]  # datagrams/s
    latency_rates: tuple[int, ...]
    outputs: tuple[int, ...]
    rules: tuple[int, ...]  # with flows interleaved over all
    idle_rules: tuple[int, ...]  # of which one has a flow
    joins: int
    noise_s: float
    segmentations: tuple[str, ...]
    relays: tuple[str, ...]
    steerings: tuple[str, ...]  # of the throughput of one rule, besides the one that was asked for
    comparing: bool  # many rules with other relays, too, and what costs little for every variant of ours


QUICK: Final = Profile(
    name="quick",
    repeat=2,
    trial_s=0.4,
    load_s=0.5,
    latency_s=0.5,
    resolution=0.1,
    payloads=(1000,),
    loads=(50_000, 200_000, 400_000),
    latency_rates=(10_000, 100_000),
    outputs=(8,),
    rules=(50,),
    idle_rules=(10_000,),
    joins=20,
    noise_s=0.8,
    segmentations=("software",),
    relays=("mcrelay", "mcrelay-busy-poll", "mcrelay-source-keep", "mcrelay-prefix", "kernel", "socat"),
    steerings=("relay",),
    comparing=False,
)
FULL: Final = Profile(
    name="full",
    repeat=3,
    trial_s=1.5,
    load_s=2.0,
    latency_s=2.0,
    resolution=0.03,
    payloads=(64, 512, 1000, 1316, 1472),
    loads=(25_000, 50_000, 100_000, 200_000, 300_000, 400_000, 600_000, 800_000),
    latency_rates=(1_000, 10_000, 100_000),
    outputs=(1, 2, 8, 50),
    rules=(1, 50, 1_000, 10_000),
    idle_rules=(1, 50, 1_000, 10_000),
    joins=50,
    noise_s=3.0,
    segmentations=("software", "device"),
    relays=(
        "mcrelay",
        "mcrelay-budget-0",
        "mcrelay-busy-poll",
        "mcrelay-recv",
        "mcrelay-reference",
        "mcrelay-source-keep",
        "mcrelay-unicast",
        "mcrelay-unicast-source-keep",
        "mcrelay-prefix",
        "kernel",
        "socat",
        "mcr",
        "udp-broadcast-relay",
    ),
    steerings=("relay",),
    comparing=True,
)
PROFILES: Final = {profile.name: profile for profile in (QUICK, FULL)}


@dataclass
class Results:
    """All of a run."""

    environment: dict[str, Any]
    samples: list[Sample] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)  # what could not be measured, and why

    def summaries(self, measurement: str, figure: str) -> dict[tuple[str, tuple[Any, ...]], Summary]:
        """By (relay, parameters)."""
        found: dict[tuple[str, tuple[Any, ...]], list[float]] = {}
        for sample in self.samples:
            if sample.measurement == measurement and figure in sample.figures:
                found.setdefault(sample.key[1:], []).append(sample.figures[figure])
        return {key: Summary.of(values) for key, values in found.items()}

    def median(self, measurement: str, relay: str, figure: str, **parameters: str | int | float) -> float | None:
        """Over the repetitions whose parameters include the given ones; None if there is no sample."""
        values = [
            sample.figures[figure]
            for sample in self.samples
            if (sample.measurement, sample.relay) == (measurement, relay)
            and figure in sample.figures
            and parameters.items() <= sample.parameters.items()
        ]
        return statistics.median(values) if values else None

    def noted(self, measurement: str, relay: str, note: str, **parameters: str | int | float) -> bool:
        """Whether any of these samples has this note."""
        return any(
            note in sample.notes
            for sample in self.samples
            if (sample.measurement, sample.relay) == (measurement, relay)
            and parameters.items() <= sample.parameters.items()
        )

    def document(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "environment": self.environment,
            "samples": [asdict(sample) for sample in self.samples],
            "skipped": self.skipped,
        }


def environment(options: dict[str, Any], busy_before: float) -> dict[str, Any]:
    """Where the figures come from. `busy_before`: share of the machine that others used before the run."""
    return {
        "mcrelay": __version__,
        "commit": _output("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
        "kernel": platform.release(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "backlog_max": _read("/proc/sys/net/core/netdev_max_backlog"),
        "rmem_default": _read("/proc/sys/net/core/rmem_default"),
        "smcroute": _output("smcrouted", "-v"),
        "socat": next((line for line in _output("socat", "-V").splitlines() if "version" in line), ""),
        "busy_before": round(busy_before, 3),
        "options": options,
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _read(path: str) -> str:
    return Path(path).read_text().strip() if Path(path).exists() else ""


def _output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

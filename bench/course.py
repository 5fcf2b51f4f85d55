"""What runs in which order: settings of network and rules, and in each the relays in turn, again and again.

Interleaved: in each setting, repetition 1 of every relay comes before repetition 2 of any (A B C A B C), so that what
changes on the machine meanwhile meets all alike. A relay is started once for all measurements of a setting and
repetition, in a network that all of the setting share.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from bench.measurements import Measurement, Station
from bench.measurements.control import apply, delays, memory, noise
from bench.measurements.load import accounted, latency, load, throughput
from bench.network import Network, build
from bench.relays import RELAYS, Kernel, Mcrelay, NoRelay, Relay, Unsuitable, rules
from bench.samples import Profile, Results
from bench.trials import Processor
from lab.namespaces import Lab

MEASUREMENTS: Final[dict[str, Measurement]] = {
    "throughput": throughput,
    "load": load,
    "latency": latency,
    "accounted": accounted,
    "memory": memory,
    "noise": noise,
    "apply": apply,
    "delays": delays,
}
WITHOUT_RELAY: Final = ("load", "latency")
FEATURES: Final = (
    "mcrelay-before",
    "mcrelay-source-keep",
    "mcrelay-unicast",
    "mcrelay-unicast-source-keep",
    "mcrelay-prefix",
)
OURS: Final = ("noise", "apply")  # measured of mcrelay only


@dataclass(frozen=True)
class Setting:
    """One network and set of rules, and what is measured there."""

    name: str  # what --only chooses by, besides the names of measurements
    measurements: tuple[str, ...]
    outputs: int = 1
    rules: int = 1
    flows: int = 1
    relays: tuple[str, ...] = ()  # empty: all
    steering: str | None = None  # if another than the one that was asked for
    runs: bool = True  # the generator may send several datagrams of a flow in one call

    def takes(self, relay: type[Relay]) -> bool:
        return relay.name in self.relays or not (self.relays or relay.special)


def settings(profile: Profile) -> list[Setting]:
    course = [Setting("line", tuple(MEASUREMENTS))]
    course += [Setting("steering", ("throughput",), steering=steering) for steering in profile.steerings]
    several = ("mcrelay", "kernel", "mcr")
    many = several if profile.comparing else ("mcrelay",)
    course += [Setting("outputs", ("throughput",), outputs=n, relays=several) for n in profile.outputs if n > 1]
    course += [
        Setting("rules", ("throughput",), rules=n, flows=n, relays=many, runs=False) for n in {1, *profile.rules}
    ]
    course += [
        Setting("idle-rules", ("throughput", "memory"), rules=n, relays=many) for n in profile.idle_rules if n > 1
    ]
    # On one core with all that the relay causes: the generator of the line would be the bound.
    course.append(Setting("features", ("throughput",), relays=("mcrelay", *FEATURES), steering="relay"))
    return course


ONLY: Final = sorted({*MEASUREMENTS, "steering", "outputs", "rules", "idle-rules", "features"})


def selected(course: Iterable[Setting], only: Sequence[str]) -> list[Setting]:
    """What is left when only some are wanted: measurements of the line, or settings as a whole."""
    if not only:
        return list(course)
    found = []
    for setting in course:
        if setting.name in only:
            found.append(setting)
        elif setting.name == "line" and (chosen := tuple(name for name in setting.measurements if name in only)):
            found.append(Setting(setting.name, chosen))
    return found


def run(
    results: Results,
    profile: Profile,
    names: Sequence[str],
    only: Sequence[str],
    steering: str,
    progress: Callable[[str], None],
) -> None:
    """Run all of it; each sample is in `results` as soon as there is one, so that an interrupt loses none."""
    relays = list(available(names, results.skipped, progress))
    for setting in selected(settings(profile), only):
        with Lab() as lab:
            network = build(lab, outputs=setting.outputs, steering=setting.steering or steering)
            known: dict[str, dict[str, float]] = {}
            out: set[str] = set()  # relays that cannot do this setting
            for repetition in range(1, profile.repeat + 1):
                taking: list[type[Relay]] = [NoRelay] if set(setting.measurements) & set(WITHOUT_RELAY) else []
                for relay in [*taking, *(relay for relay in relays if setting.takes(relay))]:
                    if relay.name in out:
                        continue
                    where = f"{setting.name} {_size(setting)}{relay.name} {repetition}/{profile.repeat}"
                    station_progress = _prefixed(progress, where)
                    try:
                        _one(results, setting, relay, network, profile, repetition, known, station_progress)
                    except Unsuitable as reason:
                        out.add(relay.name)
                        _skip(results, progress, f"{setting.name} {_size(setting)}{relay.name}: {reason}")


def available(names: Sequence[str], skipped: list[str], progress: Callable[[str], None]) -> Iterable[type[Relay]]:
    for name in names:
        relay = RELAYS[name]
        if reason := relay.missing():
            skipped.append(f"{name}: {reason}")
            progress(f"skipped: {name}: {reason}")
        else:
            yield relay


def _one(
    results: Results,
    setting: Setting,
    relay: type[Relay],
    network: Network,
    profile: Profile,
    repetition: int,
    known: dict[str, dict[str, float]],
    progress: Callable[[str], None],
) -> None:
    with relay(network, rules(setting.rules, setting.outputs)) as running:
        station = Station(
            network=network,
            relay=running,
            profile=profile,
            repetition=repetition,
            flows=setting.flows,
            rules=setting.rules,
            runs=setting.runs,
            known=known.setdefault(relay.name, {}),
            progress=progress,
        )
        for name in setting.measurements:
            if relay is NoRelay and name not in WITHOUT_RELAY:
                continue
            if name in OURS and not issubclass(relay, Mcrelay):
                continue
            if name in (*OURS, "delays") and relay not in (Mcrelay, Kernel) and not profile.comparing:
                continue  # differs little from the default's
            for sample in MEASUREMENTS[name](station):
                results.samples.append(sample)


def _size(setting: Setting) -> str:
    parts = [f"{setting.outputs} outputs" if setting.outputs > 1 else "", f"{setting.rules} rules"]
    return " ".join(part for part in parts if part) + " " if setting.name != "line" else ""


def _skip(results: Results, progress: Callable[[str], None], text: str) -> None:
    results.skipped.append(text)
    progress(f"skipped: {text}")


def _prefixed(progress: Callable[[str], None], prefix: str) -> Callable[[str], None]:
    return lambda text: progress(f"{prefix:<36} {text}")


def busy_before(seconds: float = 0.5) -> float:
    """Share of the machine that is in use before anything is measured."""
    before = Processor.now()
    time.sleep(seconds)
    used = Processor.now() - before
    return 1 - used.idle / (used.at * used.cores)

"""What mcrelay is meant to reach, as ratios of medians, and whether a run did.

Data first: one row each. Pure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from bench.samples import Parameters, Results


@dataclass(frozen=True)
class Target:
    name: str
    at_least: bool  # else: at most
    bound: float
    unit: str
    # The value, and the figures it comes from; None where something was not measured.
    value: Callable[[Results], tuple[float, str] | None]


@dataclass(frozen=True)
class Verdict:
    target: Target
    value: float | None
    figures: str

    @property
    def reached(self) -> bool | None:
        if self.value is None:
            return None
        return self.value >= self.target.bound if self.target.at_least else self.value <= self.target.bound

    @property
    def word(self) -> str:
        return {True: "reached", False: "NOT REACHED", None: "not measured"}[self.reached]


def verdicts(results: Results) -> list[Verdict]:
    found = []
    for target in TARGETS:
        value = target.value(results)
        found.append(Verdict(target, *(value if value is not None else (None, ""))))
    return found


def quotient(dividend: float | None, divisor: float | None, unit: str) -> tuple[float, str] | None:
    if dividend is None or not divisor:
        return None
    return dividend / divisor, f"{dividend:,.4g} to {divisor:,.4g} {unit}"


LINE: Final[Parameters] = {
    "steering": "sender",
    "size": 1000,
    "outputs": 1,
    "rules": 1,
    "flows": 1,
    "segmentation": "software",
    "sent": "runs",
}


def _throughput(results: Results, relay: str = "mcrelay", different: Parameters | None = None) -> float | None:
    return results.median("throughput", relay, "datagrams_per_s", **{**LINE, **(different or {})})


def _of_throughput(other: str) -> Callable[[Results], tuple[float, str] | None]:
    return lambda results: quotient(_throughput(results), _throughput(results, other), "datagrams/s")


def _share_of_one_flow(**different: str | int | float) -> Callable[[Results], tuple[float, str] | None]:
    """Of one flow's that is sent in the same way: the generator sends interleaved flows datagram by datagram."""
    alike = {"sent": different.get("sent", "runs")}

    def value(results: Results) -> tuple[float, str] | None:
        one = _throughput(results, different=alike)
        found = quotient(_throughput(results, different=different), one, "datagrams/s")
        if found is None:
            return None
        bound = results.noted("throughput", "mcrelay", "generator-bound", **{**LINE, **different})
        return 100 * found[0], found[1] + (", the generator's limit" if bound else "")

    return value


def _share(relay: str, of: str) -> Callable[[Results], tuple[float, str] | None]:
    """Of the same traffic, where one core has all to do."""

    def value(results: Results) -> tuple[float, str] | None:
        one, other = (_throughput(results, name, {"steering": "relay"}) for name in (relay, of))
        found = quotient(one, other, "datagrams/s")
        return found and (100 * found[0], found[1])

    return value


def _fan_out(results: Results) -> tuple[float, str] | None:
    copies = [
        results.median("throughput", relay, "copies_per_s", **{**LINE, "outputs": 8}) for relay in ("mcrelay", "kernel")
    ]
    return quotient(copies[0], copies[1], "copies/s")


def _figure(measurement: str, figure: str, **parameters: int | float) -> Callable[[Results], tuple[float, str] | None]:
    def value(results: Results) -> tuple[float, str] | None:
        found = results.median(measurement, "mcrelay", figure, **parameters)
        return None if found is None else (found, "")

    return value


def processor_us(results: Results, relay: str, rate: int) -> float | None:
    """Processor time per datagram that a relay adds: medians with it less without it, per datagram offered."""
    with_it = results.median("load", relay, "processor_cores", rate=rate)
    without = results.median("load", "none", "processor_cores", rate=rate)
    offered = results.median("load", relay, "offered_per_s", rate=rate)
    if with_it is None or without is None or not offered:
        return None
    return (with_it - without) / offered * 1e6


def _processor(results: Results) -> tuple[float, str] | None:
    ours, theirs = (processor_us(results, relay, 200_000) for relay in ("mcrelay", "kernel"))
    if theirs is not None and theirs <= 0:
        return None  # lost in the noise
    return quotient(ours, theirs, "us")


def _latency(relay: str) -> Callable[[Results], tuple[float, str] | None]:
    def value(results: Results) -> tuple[float, str] | None:
        ours, theirs = (results.median("latency", name, "p50_us", rate=10_000) for name in (relay, "kernel"))
        return quotient(ours, theirs, "us")

    return value


TARGETS: Final = (
    Target("zero-loss throughput 1 to 1, of socat's", True, 8, "x", _of_throughput("socat")),
    Target("zero-loss throughput 1 to 1, of the kernel's", True, 1.5, "x", _of_throughput("kernel")),
    Target(
        "zero-loss throughput, 50 interleaved flows, of one flow's",
        True,
        70,
        "%",
        _share_of_one_flow(rules=50, flows=50, sent="one by one"),
    ),
    Target("copies/s 1 to 8, of the kernel's", True, 1.5, "x", _fan_out),
    Target("zero-loss throughput, 10,000 rules installed, of one's", True, 95, "%", _share_of_one_flow(rules=10_000)),
    Target("zero-loss throughput, of the version before", True, 97, "%", _share("mcrelay", "mcrelay-before")),
    Target("the same with source=keep, of normal outputs", True, 80, "%", _share("mcrelay-source-keep", "mcrelay")),
    Target(
        "the same to a host, of normal ones", True, 80, "%", _share("mcrelay-unicast-source-keep", "mcrelay-unicast")
    ),
    Target("by a prefix beside 10,000 exact rules, of one rule's", True, 80, "%", _share("mcrelay-prefix", "mcrelay")),
    Target("10,000 rules applied in", False, 2, "s", _figure("apply", "add_s")),
    Target("join delay, p50", False, 5, "ms", _figure("delays", "join_p50_ms")),
    Target("processor time per datagram at 200,000/s, of the kernel's", False, 1, "x", _processor),
    Target("latency p50 at 10,000/s, of the kernel's", False, 4, "x", _latency("mcrelay")),
    Target("the same with --busy-poll", False, 1.5, "x", _latency("mcrelay-busy-poll")),
    Target("unwanted multicast, of one core", False, 3, "%", _figure("noise", "noise_percent")),
)

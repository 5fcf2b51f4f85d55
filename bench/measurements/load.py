"""How much a relay forwards, and what that costs: throughput, overload, load."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

from bench.measurements import Station
from bench.samples import Sample
from bench.search import Attempt, zero_loss_rate
from bench.trials import Trial, offer, offer_to_receiver

OVERLOAD_S: Final = 2.0  # as many trials' lengths
RECOVERY_RATE: Final = 1_000.0
RECOVERY_SLOW_RATE: Final = 200.0
SIZE: Final = 1000  # of payload, where there is only one


def throughput(station: Station) -> Iterator[Sample]:
    """Zero-loss throughput (RFC 2544, section 26.1; to several outputs RFC 3918, section 4.3, aggregated multicast
    throughput): the highest offered load of which every copy reached the receiving devices. The forwarding rate under
    overload (RFC 2544, section 26.5, counted as RFC 2285, section 3.8.2 and 3.8.3 say) comes first, as the search needs
    it to begin with.

    Offered by the generator's report; emitted by the counters of the receiving devices.
    """
    # What the device would spare, and other sizes, are shown of one rule and one output.
    several = station.outputs * station.rules * station.flows > 1 or not station.runs
    for segmentation in ("software",) if several else station.profile.segmentations:
        if segmentation == "device" and not station.relay.runs:
            continue
        station.network.segmentation(in_device=segmentation == "device")
        try:
            sizes = (SIZE,) if several or segmentation == "device" else station.profile.payloads
            for size in sizes:
                yield from _throughput(station, segmentation, size)
        finally:
            station.network.segmentation(in_device=False)


def _throughput(station: Station, segmentation: str, size: int) -> Iterator[Sample]:
    profile, outputs = station.profile, station.outputs
    parameters: dict[str, str | int | float] = {
        "steering": station.network.steering,
        "segmentation": segmentation,
        "size": size,
        "outputs": outputs,
        "rules": station.rules,
        "flows": station.flows,
        "sent": "runs" if station.runs else "one by one",
    }
    segments = None if station.runs else 1
    overload = offer(
        station.network, 0, profile.trial_s * OVERLOAD_S, size=size, flows=station.flows, segments=segments
    )
    slow = station.relay.slow or station.relay.name == "socat"
    recovered = offer(station.network, RECOVERY_SLOW_RATE if slow else RECOVERY_RATE, 0.3, size=size)
    yield station.sample(
        "overload",
        parameters,
        {
            "offered_per_s": overload.offered,
            "forwarded_per_s": overload.emitted_rate / outputs,
            "copies_per_s": overload.emitted_rate,
            "ingress_dropped_percent": 100 * overload.ingress_dropped / max(1, overload.sent),
            "lost_after": float(recovered.lost(outputs)),
        },
        *_tester_loss(overload),
    )
    dropped = 0

    def trial(rate: float) -> Attempt:
        nonlocal dropped
        done = offer(station.network, rate, profile.trial_s, size=size, flows=station.flows, segments=segments)
        dropped += done.receiver_dropped
        return Attempt(rate, done.offered, done.lost(outputs))

    place = "-".join(map(str, parameters.values()))
    found = zero_loss_rate(
        trial,
        start=station.known.get(place) or _between(overload, outputs),
        ceiling=overload.offered,
        resolution=profile.resolution,
    )
    if found.rate:
        station.known[place] = found.rate
    notes = ["generator-bound"] if found.limit == "generator" else []
    if dropped:
        notes.append(f"{dropped} emitted copies were dropped by the receiving side")
    yield station.sample(
        "throughput",
        parameters,
        {"datagrams_per_s": found.rate, "copies_per_s": found.rate * outputs, "trials": float(len(found.attempts))},
        *notes,
    )


def _between(overload: Trial, outputs: int) -> float:
    """Where to begin a search: what is forwarded under overload may be far more or far less than without loss."""
    return max(1_000.0, math.sqrt(overload.emitted_rate / outputs * overload.offered))


def load(station: Station) -> Iterator[Sample]:
    """Loss ratio (RFC 2544, section 26.3, frame loss rate) and processor time at fixed offered loads.

    Processor time is that of the whole machine, in cores; the same without a relay is measured as relay "none", and the
    report takes the difference. Copies by the receiving devices' counters.
    """
    for rate in station.profile.loads:
        done = offer(station.network, rate, station.profile.load_s)
        lost = done.lost(station.outputs) / (done.sent * station.outputs) if done.sent else 0.0
        figures = {
            "offered_per_s": done.offered,
            "loss_percent": 100 * lost,
            "processor_cores": done.used_fraction,
            "others_cores": done.processor.others / done.processor.at,
        }
        yield station.sample("load", {"rate": rate}, figures, *_generator_bound(done), *_tester_loss(done))


def latency(station: Station) -> Iterator[Sample]:
    """Latency (RFC 2544, section 26.2; RFC 1242, section 3.8, store and forward): from the stamp right before the
    generator's send call to the receiving kernel's taking the datagram from the device, of every datagram, by sequence
    number. Relay "none" is the direct path: the receiver is where the relay would be.

    Up to 20,000 datagrams/s each leaves by itself; above that, those of 50 us leave in one go.
    """
    direct = station.relay.name == "none"
    for rate in station.profile.latency_rates:
        done = offer_to_receiver(station.network, rate, station.profile.latency_s, direct=direct)
        report = done.report
        assert report is not None
        figures = {"offered_per_s": done.offered, "lost": float(done.lost())}
        for name in ("p50", "p90", "p99", "p999", "max"):
            value = getattr(report, f"latency_{name}_us")
            if value is not None:
                figures[f"{name}_us"] = value
        yield station.sample("latency", {"rate": rate}, figures, *_generator_bound(done), *_tester_loss(done))


def accounted(station: Station) -> Iterator[Sample]:
    """That the counting at devices is right: a load that a receiver keeps up with, by sequence number, so that also
    reordering, duplicates and damage would show (RFC 4737, RFC 5560)."""
    rate = 10_000.0
    done = offer_to_receiver(station.network, rate, station.profile.latency_s)
    report = done.report
    assert report is not None
    names = ("received", "lost", "reordered", "duplicated", "corrupted")
    yield station.sample(
        "accounted", {"rate": rate}, {"sent": done.sent, **{name: float(getattr(report, name)) for name in names}}
    )


def _generator_bound(trial: Trial) -> list[str]:
    return ["generator-bound"] if trial.offered < 0.95 * trial.asked else []


def _tester_loss(trial: Trial) -> list[str]:
    return [f"{trial.receiver_dropped} dropped by the receiving side"] if trial.receiver_dropped else []

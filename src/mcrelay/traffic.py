"""Test traffic: what `mcrelay send` and `mcrelay receive` do, without their text.

Owns the plans (what was asked for, checked), the reports (what came of it), and the loop around the C core, which runs
for SLICE_NS at a time without the GIL; in between, signals, deadlines and progress are looked after. What a datagram
looks like and how it is paced and accounted for: native/payload.h, generator.h, analyser.h. Knows nothing of a daemon.

A report is complete whenever the loop ends, also by a signal; nothing is printed here.
"""

from __future__ import annotations

import errno
import math
import os
import signal
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any, Final

from mcrelay import _traffic
from mcrelay.errors import NotPermitted, SystemRefusal, UsageError
from mcrelay.net import traffic_sockets
from mcrelay.ruletext import INTERFACE

SIZE_MIN: Final = _traffic.SIZE_HEADER
SIZE_RTP_MIN: Final = _traffic.SIZE_HEADER + _traffic.SIZE_RTP_HEADER
SIZE_MAX: Final = _traffic.SIZE_MAX
SEGMENTS_MAX: Final = _traffic.SEGMENTS_MAX
FLOWS_MAX: Final = _traffic.RECEIVE_FLOWS_MAX
RATE_MAX: Final = 1e9  # datagrams/s: one per nanosecond, the resolution of the clock
SECONDS_MAX: Final = 1e9
COUNT_MAX: Final = 2**62
BURST_MAX: Final = 2**20
FLOW_IDS: Final = 2**32

SLICE_NS: Final = 50_000_000  # how late a signal, a deadline or a pause may be noticed
PROGRESS_S: Final = 0.5
DRAIN_S: Final = 1.0  # a full receive buffer takes less

TARGET_FORM: Final = "write ADDRESS:PORT[%INTERFACE], for example 239.1.1.1:5000%eth0 or [ff3e::8000:1]:5000%eth0"

Emit = Callable[[dict[str, Any]], None]
Stop = Callable[[], bool]


# --- what is asked for -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Target:
    """Where datagrams go, or come from."""

    address: IPv4Address | IPv6Address
    port: int
    interface: str | None = None

    @classmethod
    def parse(cls, text: str) -> Target:
        what = f"target {text if len(text) <= 100 else text[:97] + '...'!r}"
        endpoint, percent, interface = text.rpartition("%")
        if not percent:
            endpoint, interface = text, ""
        elif not INTERFACE.fullmatch(interface) or len(interface.encode()) > 15:
            raise UsageError(f"{what}: {interface[:100]!r} is not an interface name", "'ip -brief link' lists them")
        host, colon, port = endpoint.rpartition(":")
        if not colon or endpoint.endswith("]"):
            raise UsageError(f"{what} has no port", TARGET_FORM)
        bracketed = host.startswith("[") and host.endswith("]")
        try:
            address = ip_address(host[1:-1] if bracketed else host)
        except ValueError:
            raise UsageError(f"{what}: {host[:100]!r} is not an IP address", TARGET_FORM) from None
        if bracketed != (address.version == 6):
            raise UsageError(f"{what}: an IPv6 address, and no other, stands in brackets", TARGET_FORM)
        if not (port.isascii() and port.isdigit() and len(port) <= 5 and 1 <= int(port) <= 65535):
            raise UsageError(f"{what}: port {port[:100]!r} is not possible", "use a number from 1 to 65535")
        return cls(address, int(port), interface or None)

    def __str__(self) -> str:
        address = f"[{self.address}]" if self.address.version == 6 else str(self.address)
        return f"{address}:{self.port}" + (f"%{self.interface}" if self.interface else "")


@dataclass(frozen=True)
class Plan:
    """What sender and receiver have in common. UsageError if it cannot be."""

    target: str
    flows: int = 1
    flow_step: str = "port"
    rtp: bool = False

    def __post_init__(self) -> None:
        _check_range("--flows", self.flows, 1, FLOWS_MAX)
        if self.flow_step not in ("port", "group"):
            raise UsageError(f"--flow-step {self.flow_step!r} is not possible", "use port or group")
        first = self.first
        if first.address.version == 6 and not first.interface and (first.address.is_multicast or _is_local(first)):
            raise UsageError(
                f"target {self.target!r}: {first.address} may be reached by any interface", "name one: %INTERFACE"
            )
        if self.flow_step == "port" and first.port + self.flows > 65536:
            raise UsageError(
                f"target {self.target!r}: {self.flows} ports do not fit from {first.port} on",
                f"use a port of at most {65536 - self.flows}, or --flow-step group",
            )
        if self.flow_step == "group":
            try:
                last = first.address + (self.flows - 1)
            except ValueError:  # beyond the last address
                last = None
            if last is None or last.is_multicast != first.address.is_multicast:
                raise UsageError(
                    f"target {self.target!r}: {self.flows} addresses do not fit from {first.address} on",
                    "use a lower address, or --flow-step port",
                )

    @cached_property
    def first(self) -> Target:
        return Target.parse(self.target)

    @property
    def targets(self) -> list[Target]:
        """One for each flow."""
        first = self.first
        if self.flow_step == "group":
            return [Target(first.address + flow, first.port, first.interface) for flow in range(self.flows)]
        return [Target(first.address, first.port + flow, first.interface) for flow in range(self.flows)]


@dataclass(frozen=True)
class SendPlan(Plan):
    """Ends with the count or the duration, whichever is first; without them, when it is told to."""

    rate: float = 1000.0  # datagrams/s over all flows; 0: as fast as possible
    size: int = 1000  # bytes of UDP payload
    count: int | None = None  # datagrams over all flows
    duration_s: float | None = None
    ttl: int = 8
    source: str | None = None  # address to send from
    flow_id: int = 0  # of the first flow
    segments: int | None = None  # most datagrams in one send; None: as many as fit
    burst: int = 1  # consecutive datagrams of each flow before the next flow's

    def __post_init__(self) -> None:
        super().__post_init__()
        least = SIZE_RTP_MIN if self.rtp else SIZE_MIN
        if self.first.address.is_unspecified:
            raise UsageError(f"target {self.target!r}: cannot send to {self.first.address}", "name a host or a group")
        if not (math.isfinite(self.rate) and 0 <= self.rate <= RATE_MAX):
            raise UsageError(f"--rate {self.rate:g} is not possible", f"use 0 (no limit) to {RATE_MAX:.0f} a second")
        _check_range("--size", self.size, least, SIZE_MAX)
        _check_range("--count", self.count, 1, COUNT_MAX)
        _check_seconds("--duration", self.duration_s)
        _check_range("--ttl", self.ttl, 1, 255)
        _check_range("--flow-id", self.flow_id, 0, FLOW_IDS - self.flows)
        _check_range("--segments", self.segments, 1, min(SEGMENTS_MAX, max(1, SIZE_MAX // self.size)))
        _check_range("--burst", self.burst, 1, BURST_MAX)
        if self.source is not None:
            try:
                source = ip_address(self.source)
            except ValueError:
                raise UsageError(f"--source {self.source!r} is not an IP address", "name one of this host") from None
            if source.version != self.first.address.version:
                raise UsageError(
                    f"--source {self.source} and target {self.target!r} differ in IP version", "use the same"
                )

    @property
    def segments_most(self) -> int:
        return self.segments or min(SEGMENTS_MAX, max(1, SIZE_MAX // self.size))


@dataclass(frozen=True)
class ReceivePlan(Plan):
    """Ends with the count, a pause or the duration, whichever is first; without them, when it is told to."""

    count: int | None = None  # distinct datagrams over all flows
    expect: int | None = None  # how many were sent, for the loss
    idle_s: float | None = None  # end when nothing came for so long after the first
    duration_s: float | None = None
    linger_s: float = 0.0  # stay so long after the count, to see late duplicates

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_range("--count", self.count, 1, COUNT_MAX)
        _check_range("--expect", self.expect, 0, COUNT_MAX)
        _check_seconds("--idle", self.idle_s)
        _check_seconds("--duration", self.duration_s)
        if self.linger_s:
            _check_seconds("--linger", self.linger_s)


def _is_local(target: Target) -> bool:
    return target.address.is_link_local and not target.address.is_multicast


def _check_range(option: str, value: int | None, least: int, most: int) -> None:
    if value is not None and not least <= value <= most:
        raise UsageError(f"{option} {value} is not possible", f"use {least} to {most}")


def _check_seconds(option: str, value: float | None) -> None:
    if value is not None and not (math.isfinite(value) and 0 < value <= SECONDS_MAX):
        raise UsageError(f"{option} {value:g} is not possible", f"use seconds, above 0 and up to {SECONDS_MAX:.0f}")


# --- what comes of it ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SendReport:
    sent: int  # datagrams that the kernel took
    bytes: int  # of UDP payload
    seconds: float
    rate: float  # datagrams/s
    bits_per_second: float  # of UDP payload
    retried: int  # sends repeated: the interface's queue was full, or an earlier datagram had been refused
    postponed_s: float  # by how much the schedule was, as the sender fell behind: not 0 means the rate was not kept
    segments: int  # most datagrams that left in one send
    segments_refused: str | None  # why the kernel did not take several in one, if it did not
    ended: str  # "count", "duration", "stopped" or "error"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class ReceiveReport:
    """What became of the datagrams. `received + lost == expected` unless more arrived than were expected."""

    received: int  # distinct and intact; everything below is on top of it, but for `reordered` and `clock_skew`
    expected: int  # --expect, else --count, else all from the lowest sequence seen to the highest, of each flow
    lost: int
    reordered: int  # arrived after one with a higher sequence (RFC 4737, section 3)
    duplicated: int  # further intact copies
    late: int  # too old to say whether it is a duplicate
    corrupted: int  # ours, but not as sent
    foreign: int  # not ours, or, with --rtp, not RTP
    overrun: int  # dropped by the kernel as our own socket was full: our fault, not the network's
    clock_skew: int  # received with an impossible latency (below 0, or 69 s and more), and left out of the latencies
    flows: int
    bytes: int  # of UDP payload
    seconds: float  # from the first arrival to the last
    rate: float  # received per second
    bits_per_second: float  # of UDP payload
    latency_p50_us: float | None  # None: none of the datagrams says when it was sent
    latency_p90_us: float | None
    latency_p99_us: float | None
    latency_p999_us: float | None
    latency_max_us: float | None
    jitter_us: float | None  # RFC 3550, section 6.4.1; mean over flows
    ended: str  # "count", "idle", "duration" or "stopped"

    @property
    def clean(self) -> bool:
        """Everything arrived, once, intact and in order, and something did."""
        faults = self.lost + self.reordered + self.duplicated + self.late + self.corrupted + self.foreign
        return self.received > 0 and faults == 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


# --- sending ---------------------------------------------------------------------------------------------------------


def send(plan: SendPlan, emit: Emit, stop: Stop, *, progress: bool = False) -> SendReport:
    """Send; emits the events `ready`, with `progress` `progress`, and `report`, also when a send fails after others."""
    generator = None
    try:
        with traffic_sockets.open_sender(plan.targets, plan.ttl, plan.source) as sock:
            generator = _traffic.Generator(
                sock.fileno(),
                b"" if plan.flows == 1 else traffic_sockets.pack_addresses(plan.targets),
                count=plan.count or 0,
                duration_ns=round((plan.duration_s or 0) * 1e9),
                rate=plan.rate,
                flows=plan.flows,
                flow_id=plan.flow_id,
                size=plan.size,
                segments=plan.segments_most,
                burst=plan.burst,
                rtp=plan.rtp,
            )
            emit({"event": "ready", "target": plan.target, "flows": plan.flows, "segments_max": plan.segments_most})
            ended = _send_until_done(plan, generator, emit, stop, progress)
    except OSError as error:
        if generator and generator.totals()["sent"]:
            emit({"event": "report", **_send_report(plan, generator.totals(), "error").as_dict()})
        raise _send_refusal(error, plan) from None
    report = _send_report(plan, generator.totals(), ended)
    emit({"event": "report", **report.as_dict()})
    return report


def _send_until_done(plan: SendPlan, generator: _traffic.Generator, emit: Emit, stop: Stop, progress: bool) -> str:
    """Why it ended."""
    ticks = _ticks() if progress else None
    before = 0
    while not stop():
        if generator.run(SLICE_NS):
            return "count" if plan.count and generator.totals()["sent"] >= plan.count else "duration"
        if ticks and (seconds := next(ticks)):
            sent = generator.totals()["sent"]
            rate = (sent - before) / seconds
            before = sent
            emit(
                {
                    "event": "progress",
                    "sent": sent,
                    "rate": round(rate, 1),
                    "bits_per_second": round(rate * plan.size * 8),
                }
            )
    return "stopped"


def _send_report(plan: SendPlan, totals: dict[str, int], ended: str) -> SendReport:
    seconds = totals["elapsed_ns"] / 1e9
    rate = totals["sent"] / seconds if seconds else 0.0
    refused = totals["segments_refused"]
    return SendReport(
        sent=totals["sent"],
        bytes=totals["sent"] * plan.size,
        seconds=round(seconds, 6),
        rate=round(rate, 1),
        bits_per_second=round(rate * plan.size * 8),
        retried=totals["retried"],
        postponed_s=round(totals["postponed_ns"] / 1e9, 6),
        segments=totals["segments"],
        segments_refused=errno.errorcode.get(refused, str(refused)) if refused else None,
        ended=ended,
    )


def _send_refusal(error: OSError, plan: SendPlan) -> SystemRefusal | NotPermitted:
    what = f"cannot send to {plan.target}: {error.strerror}"
    match error.errno:
        case errno.EPERM | errno.EACCES:
            return NotPermitted(what, "a firewall forbids it, or it is a broadcast address")
        case errno.ENETUNREACH | errno.EHOSTUNREACH | errno.ENODEV:
            return SystemRefusal(what, "add a route, or name the interface: TARGET%INTERFACE")
        case errno.EMSGSIZE | errno.EINVAL:
            return SystemRefusal(what, "try a smaller --size")
        case errno.ENETDOWN:
            return SystemRefusal(what, "bring the interface up: ip link set NAME up")
        case errno.ECONNREFUSED:
            return SystemRefusal(what, "nobody listens there: start a receiver, or check the port")
        case _:
            return SystemRefusal(what, "'ip route get ADDRESS' shows which way it would go")


# --- receiving -------------------------------------------------------------------------------------------------------


def receive(plan: ReceivePlan, emit: Emit, stop: Stop, *, progress: bool = False) -> ReceiveReport:
    """Receive; emits the events `ready`, from which on nothing that is sent is missed, with `progress` `progress`, and
    `report`."""
    with traffic_sockets.open_receivers(plan.targets) as sockets:
        fds = array("i", [sock.fileno() for sock in sockets])
        collector = _traffic.Collector(fds, flows=plan.flows, rtp=plan.rtp)
        emit(
            {
                "event": "ready",
                "target": plan.target,
                "flows": plan.flows,
                "sockets": len(sockets),
                "receive_buffer": traffic_sockets.receive_buffer(sockets[0]),
            }
        )
        try:
            ended = _receive_until_done(plan, collector, emit, stop, progress)
        except OSError as error:
            raise SystemRefusal(f"cannot receive from {plan.target}: {error.strerror}", "try again") from None
        report = _receive_report(plan, collector, sum(map(traffic_sockets.dropped, sockets)), ended)
    emit({"event": "report", **report.as_dict()})
    return report


def _receive_until_done(
    plan: ReceivePlan, collector: _traffic.Collector, emit: Emit, stop: Stop, progress: bool
) -> str:
    """Why it ended."""
    started = changed_at = time.monotonic()
    deadline, reason = started + (plan.duration_s or math.inf), "duration"
    wanted = plan.count or 0
    ticks = _ticks() if progress else None
    seen = before = 0
    while True:
        now = time.monotonic()
        if stop() or now >= deadline:
            # What has already arrived belongs into the account, however far behind the loop is.
            until = now + DRAIN_S
            while not collector.run(SLICE_NS, wanted, True) and time.monotonic() < until:
                pass
            return reason if now >= deadline else "stopped"
        slice_ns = min(SLICE_NS, max(1, round((deadline - now) * 1e9))) if deadline < math.inf else SLICE_NS
        if collector.run(slice_ns, wanted, False) and wanted:
            if not plan.linger_s:
                return "count"
            wanted, reason = 0, "count"
            deadline = min(deadline, time.monotonic() + plan.linger_s)
        totals = collector.totals()
        activity = sum(totals[name] for name in ("received", "duplicated", "late", "corrupted"))
        now = time.monotonic()
        if activity != seen:
            seen, changed_at = activity, now
        elif plan.idle_s is not None and seen and reason != "count" and now - changed_at >= plan.idle_s:
            return "idle"
        if ticks and (seconds := next(ticks)):
            rate = (totals["received"] - before) / seconds
            before = totals["received"]
            mean = totals["bytes"] / totals["received"] if totals["received"] else 0
            emit(
                {
                    "event": "progress",
                    "received": totals["received"],
                    "lost": totals["expected"] - totals["received"],
                    "duplicated": totals["duplicated"],
                    "rate": round(rate, 1),
                    "bits_per_second": round(rate * mean * 8),
                }
            )


def _receive_report(plan: ReceivePlan, collector: _traffic.Collector, overrun: int, ended: str) -> ReceiveReport:
    totals = collector.totals()
    received = totals["received"]
    expected = plan.expect if plan.expect is not None else plan.count or totals["expected"]
    seconds = max(0, totals["last_ns"] - totals["first_ns"]) / 1e9
    # n arrivals span n - 1 intervals.
    rate = (received - 1) / seconds if seconds and received else 0.0

    def latency_us(fraction: float) -> float | None:
        latency_ns = collector.latency_ns(fraction)
        return None if latency_ns is None else round(latency_ns / 1e3, 3)

    jitter_ns = collector.jitter_ns()
    return ReceiveReport(
        received=received,
        expected=expected,
        lost=max(0, expected - received),
        reordered=totals["reordered"],
        duplicated=totals["duplicated"],
        late=totals["late"],
        corrupted=totals["corrupted"],
        foreign=totals["foreign"],
        overrun=overrun,
        clock_skew=totals["clock_skew"],
        flows=totals["flows"],
        bytes=totals["bytes"],
        seconds=round(seconds, 6),
        rate=round(rate, 1),
        bits_per_second=round(rate * totals["bytes"] * 8 / received) if received else 0.0,
        latency_p50_us=latency_us(0.5),
        latency_p90_us=latency_us(0.9),
        latency_p99_us=latency_us(0.99),
        latency_p999_us=latency_us(0.999),
        latency_max_us=totals["latency_max_ns"] / 1e3 if totals["latencies"] else None,
        jitter_us=None if jitter_ns is None else round(jitter_ns / 1e3, 3),
        ended=ended,
    )


# --- around both -----------------------------------------------------------------------------------------------------


def _ticks() -> Iterator[float]:
    """The seconds since the last tick when one is due, else 0."""
    last = time.monotonic()
    while True:
        now = time.monotonic()
        if now - last >= PROGRESS_S:
            yield now - last
            last = now
        else:
            yield 0.0


@contextmanager
def stopped_by_signals() -> Iterator[Stop]:
    """SIGINT and SIGTERM become true answers of the callable, inside."""
    stopped = False

    def note(_number: int, _frame: object) -> None:
        nonlocal stopped
        stopped = True

    earlier = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: stopped
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def pin(core: int) -> None:
    """Run on this core only."""
    available = sorted(os.sched_getaffinity(0))
    if core not in available:
        raise UsageError(f"--core {core} is not there for us", f"use one of {','.join(map(str, available))}")
    os.sched_setaffinity(0, {core})

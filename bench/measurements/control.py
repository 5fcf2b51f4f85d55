"""How quickly rules change, and what a relay takes and tolerates: delays, many rules at once, memory, noise."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator
from typing import Final

from bench.measurements import Station
from bench.network import GROUP, PORT, SENDER_CORE, TTL, Network
from bench.relays import Mcrelay, Rule, rules
from bench.samples import Sample
from bench.trials import TARGET, Trial, offer_to_receiver
from lab.capture import RECEIVE_BUFFER_SIZE, SO_RCVBUFFORCE
from lab.traffic import SendPlan, start_sender

PROBE_RATE: Final = 20_000.0  # datagrams/s: the resolution of a delay is 50 us
DELAY_DEADLINE_S: Final = 2.0
QUIET_S: Final = 0.03  # so long without a datagram, and the flow has ended
SO_TIMESTAMPNS: Final = 35  # <asm-generic/socket.h>
ETH_P_IP: Final = 0x0800
STAMP: Final = struct.Struct("@qq")
NOISE_TARGET: Final = "239.200.0.1:7000"
NOISE_RATE: Final = 500_000.0
WANTED_RATE: Final = 10_000.0
APPLIED: Final = 10_000


def delays(station: Station) -> Iterator[Sample]:
    """Group join delay and group leave delay (RFC 3918, sections 6.1 and 6.2; RFC 2432, section 3.4), with "join" being
    a rule that is added: from the call to the first copy at the receiving device, by the kernel's stamp, and from the
    acknowledgement; from the call to the last copy. The flow is there all the time."""
    if not station.relay.changes:
        return
    rule = Rule(GROUP, station.outputs)
    sender = start_sender(
        station.network.sender,
        SendPlan(TARGET, interface="eth0", rate=PROBE_RATE, duration_s=120, core=SENDER_CORE, ttl=TTL),
    )
    samples = []
    try:
        for number in range(station.profile.joins + 1):
            with _Watch(station.network) as watch:
                called = time.time_ns()
                station.relay.remove(rule)
                last = watch.last()
            if number and last is not None:
                samples.append(("leave", (last - called) / 1e6))
            with _Watch(station.network) as watch:
                called = time.time_ns()
                station.relay.add(rule)
                acknowledged = time.time_ns()
                first = watch.first()
            if number and first is not None:
                samples.append(("join", (first - called) / 1e6))
                samples.append(("after_acknowledgement", (first - acknowledged) / 1e6))
    finally:
        sender.stop()
    figures = {}
    for name in ("join", "after_acknowledgement", "leave"):
        values = sorted(value for kind, value in samples if kind == name)
        if values:
            figures[f"{name}_p50_ms"] = values[len(values) // 2]
            figures[f"{name}_max_ms"] = values[-1]
    yield station.sample("delays", {"changes": station.profile.joins}, figures)


def apply(station: Station) -> Iterator[Sample]:
    """Time to add 10,000 rules to one that is running, in one change, and to remove them: call to acknowledgement."""
    if not isinstance(station.relay, Mcrelay):
        return
    wanted = rules(APPLIED, station.outputs)
    station.relay.clear()
    started = time.monotonic()
    station.relay.apply(wanted)
    applied = time.monotonic()
    station.relay.clear()
    cleared = time.monotonic()
    station.relay.apply(rules(station.rules, station.outputs))
    yield station.sample("apply", {"rules": APPLIED}, {"add_s": applied - started, "remove_s": cleared - applied})


def memory(station: Station) -> Iterator[Sample]:
    """Resident set, and proportional set without packet rings, of all processes of the relay."""
    pids = station.relay.pids().values()
    sizes = [memory_kib(pid) for pid in pids]
    figures = {
        "resident_mb": sum(resident for resident, _, _ in sizes) / 1000,
        "proportional_mb": sum(total - rings for _, total, rings in sizes) / 1000,
        "rings_mb": sum(rings for _, _, rings in sizes) / 1000,
    }
    yield station.sample("memory", {"rules": station.rules}, figures)


def noise(station: Station) -> Iterator[Sample]:
    """Multicast that no rule wants, on the ingress interface (RFC 3918, section 4.2, mixed class, in spirit): processor
    time of the worker processes with it, less that without it, while a wanted flow of 10,000/s is counted by sequence
    number."""
    if not station.relay.worker_pids():
        return
    seconds = station.profile.noise_s
    quiet, _ = _worker_share(station, seconds)
    plan = SendPlan(
        NOISE_TARGET,
        interface="eth0",
        rate=NOISE_RATE,
        duration_s=seconds + 30,
        core=SENDER_CORE,
        ttl=TTL,
        segments=None,
    )
    background = start_sender(station.network.sender, plan)
    try:
        noisy, wanted = _worker_share(station, seconds)
    finally:
        report = background.stop()
    figures = {
        "noise_per_s": report.rate,
        "workers_percent": 100 * noisy,
        "workers_percent_without": 100 * quiet,
        "noise_percent": 100 * max(0.0, noisy - quiet),
        "wanted_sent": float(wanted.sent),
        "wanted_lost": float(wanted.lost()),
        "ingress_dropped": float(wanted.ingress_dropped),
    }
    notes = ["generator-bound"] if report.rate < 0.95 * NOISE_RATE else []
    yield station.sample("noise", {"rate": NOISE_RATE}, figures, *notes)


def _worker_share(station: Station, seconds: float) -> tuple[float, Trial]:
    """Processor time a second of the workers, and what became of the wanted flow meanwhile."""
    done = offer_to_receiver(station.network, WANTED_RATE, seconds, segments=1, watched=station.relay.worker_pids())
    return done.watched_s / done.processor.at, done


def memory_kib(pid: int) -> tuple[int, int, int]:
    """Resident set size, proportional set size, and how much of the latter is rings mapped from packet sockets."""
    resident = total = rings = 0
    in_ring = False
    with open(f"/proc/{pid}/smaps") as file:
        for line in file:
            if line.startswith("Rss:"):
                resident += int(line.split()[1])
            elif line.startswith("Pss:"):
                size = int(line.split()[1])
                total += size
                rings += size if in_ring else 0
            elif "-" in line.split(" ", 1)[0]:
                in_ring = "socket:[" in line
    return resident, total, rings


class _Watch:
    """When datagrams of the flow reach the first receiving device: kernel stamps (CLOCK_REALTIME) from a packet socket.

    Nothing is read while the change is made: the socket's buffer keeps what comes, and the stamps are the kernel's."""

    def __init__(self, network: Network) -> None:
        self._socket = network.receiver.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0)
        self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER_SIZE)
        self._socket.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        self._socket.bind(("eth0", ETH_P_IP))

    def __enter__(self) -> _Watch:
        return self

    def __exit__(self, *_error: object) -> None:
        self._socket.close()

    def first(self) -> int | None:
        """Of the flow, waiting for it; None if none came."""
        return self._next(time.monotonic() + DELAY_DEADLINE_S)

    def last(self) -> int | None:
        """Of the flow, once it has ended; None if there was none since the watch began."""
        stamp = last = None
        while (stamp := self._next(time.monotonic() + QUIET_S)) is not None:
            last = stamp
        return last

    def _next(self, deadline: float) -> int | None:
        group = socket.inet_aton(GROUP)
        while (left := deadline - time.monotonic()) > 0:
            self._socket.settimeout(left)
            try:
                packet, control, _, _ = self._socket.recvmsg(64, socket.CMSG_SPACE(STAMP.size))
            except TimeoutError:
                return None
            if packet[9] == socket.IPPROTO_UDP and packet[16:20] == group and packet[22:24] == PORT.to_bytes(2, "big"):
                seconds, nanoseconds = STAMP.unpack(control[0][2][: STAMP.size])
                return int(seconds * 10**9 + nanoseconds)
        return None

"""One trial: offer a load for a while, account for every datagram and for the processor time of the whole machine.

Owns how loss and processor time are counted; what to offer is the measurements' business.

- Offered is what the kernel took from the generator, by the generator's own report. A rate that it could not reach is
  visible in that, never assumed.
- Emitted is counted at the receiving devices after they have come to rest (bench.network.Counters), or, in trials with
  a receiver, by sequence number. What the receiving side itself dropped had been emitted, and is shown beside.
- Processor time is that of all cores, from the generator's readiness to its end: elapsed time less idle and waiting
  time, which the kernel accounts exactly (/proc/stat counts user and system time by sampling), less the time of
  processes that are neither ours nor the kernel's. A run without a relay tells what generator and network cost.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.network import GROUP, PORT, SENDER_CORE, TTL, Counters, Network
from lab.traffic import ReceivePlan, ReceiveReport, SendPlan, start_receiver, start_sender

TICKS: Final = os.sysconf("SC_CLK_TCK")
REST_S: Final = 0.04  # devices whose counters stand still for so long are at rest
REST_DEADLINE_S: Final = 3.0
TARGET: Final = f"{GROUP}:{PORT}"


@dataclass(frozen=True)
class Processor:
    """Time of all cores together since boot, in seconds; differences are what matters."""

    busy: float  # user, nice, system, irq, softirq, steal
    idle: float  # idle, iowait
    others: float  # of processes that are not ours
    at: float  # monotonic
    cores: int

    @classmethod
    def parse(cls, stat: str, at: float, others: float = 0.0) -> Processor:
        """Of the text of /proc/stat."""
        lines = stat.splitlines()
        user, nice, system, idle, iowait, irq, softirq, steal = map(int, lines[0].split()[1:9])
        cores = sum(line.startswith("cpu") for line in lines) - 1
        busy = user + nice + system + irq + softirq + steal
        return cls(busy / TICKS, (idle + iowait) / TICKS, others, at, cores)

    @classmethod
    def now(cls) -> Processor:
        others = others_s(_processes(), os.getpid())
        return cls.parse(Path("/proc/stat").read_text(), time.monotonic(), others)

    def __sub__(self, other: Processor) -> Processor:
        return Processor(
            self.busy - other.busy,
            self.idle - other.idle,
            self.others - other.others,
            self.at - other.at,
            self.cores,
        )

    @property
    def used(self) -> float:
        """What was neither idle nor others', in seconds of one core."""
        return max(0.0, self.at * self.cores - self.idle - self.others)


@dataclass(frozen=True)
class Process:
    parent: int
    ticks: int  # of itself and of the children it has waited for


def others_s(processes: dict[int, Process], root: int) -> float:
    """Processor time of all that neither descend from `root` nor are threads of the kernel (children of process 2)."""

    def ours(pid: int) -> bool:
        while pid in processes and pid != root:
            pid = processes[pid].parent
        return pid == root

    return (
        sum(found.ticks for pid, found in processes.items() if 2 not in (pid, found.parent) and not ours(pid)) / TICKS
    )


def _processes() -> dict[int, Process]:
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            # OSError: it has ended meanwhile.
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
                found[int(entry)] = Process(int(fields[1]), sum(map(int, fields[11:15])))
    return found


@dataclass(frozen=True)
class Trial:
    asked: float  # datagrams/s; 0: as fast as possible
    offered: float  # datagrams/s that the generator achieved
    sent: int
    seconds: float
    emitted: int  # copies, over all outputs
    receiver_dropped: int  # of them, dropped by the receiving side
    ingress_dropped: int  # frames that the relay's core dropped before the relay could see them (its backlog was full)
    processor: Processor  # a difference
    report: ReceiveReport | None = None  # of the receiver, in trials with one
    watched_s: float = 0.0  # processor time of the processes that were to be watched

    def lost(self, outputs: int = 1) -> int:
        return max(0, self.sent * outputs - self.emitted)

    @property
    def used_fraction(self) -> float:
        """Processor time a second, in cores."""
        return self.processor.used / self.processor.at

    @property
    def emitted_rate(self) -> float:
        return self.emitted / self.seconds if self.seconds else 0.0


def offer(
    network: Network,
    rate: float,
    seconds: float,
    *,
    size: int = 1000,
    flows: int = 1,
    segments: int | None = None,
) -> Trial:
    """A trial counted at the receiving devices."""
    before, ingress = network.emitted(), network.arrived()
    sender = start_sender(network.sender, _plan(rate, seconds, size=size, flows=flows, segments=segments))
    started = Processor.now()
    sent = sender.result(seconds + 30)
    ended = Processor.now()
    counted = at_rest(network) - before
    return Trial(
        asked=rate,
        offered=sent.rate,
        sent=sent.sent,
        seconds=sent.seconds,
        emitted=counted.datagrams(size),
        receiver_dropped=counted.dropped,
        ingress_dropped=(network.arrived() - ingress).dropped,
        processor=ended - started,
    )


def offer_to_receiver(
    network: Network,
    rate: float,
    seconds: float,
    *,
    size: int = 1000,
    direct: bool = False,
    segments: int | None = None,
    watched: Sequence[int] = (),
) -> Trial:
    """A trial counted by sequence number. `direct`: the receiver is where the relay would be. `watched`: pids."""
    namespace, interface = (network.relay, "in0") if direct else (network.receiver, "eth0")
    plan = ReceivePlan(
        TARGET,
        interface=interface,
        core=SENDER_CORE,
        count=max(1, round(rate * seconds)),
        idle_timeout_s=0.3,
        deadline_s=seconds + 10,
    )
    receiver, ingress = start_receiver(namespace, plan), network.arrived()
    sender = start_sender(network.sender, _plan(rate, seconds, size=size, segments=segments, count=plan.count))
    started, watched_before = Processor.now(), processor_s(watched)
    sent = sender.result(seconds + 30)
    ended, watched_after = Processor.now(), processor_s(watched)
    report = receiver.result(seconds + 30)
    return Trial(
        asked=rate,
        offered=sent.rate,
        sent=sent.sent,
        seconds=sent.seconds,
        emitted=report.received + report.duplicated + report.overrun,
        receiver_dropped=report.overrun,
        ingress_dropped=(network.arrived() - ingress).dropped,
        processor=ended - started,
        report=report,
        watched_s=watched_after - watched_before,
    )


def processor_s(pids: Sequence[int]) -> float:
    """Processor time of these processes so far."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / TICKS


def at_rest(network: Network) -> Counters:
    """The counters of the receiving devices once they stand still."""
    deadline = time.monotonic() + REST_DEADLINE_S
    seen = network.emitted()
    while time.monotonic() < deadline:
        time.sleep(REST_S)
        now = network.emitted()
        if now == seen:
            break
        seen = now
    return seen


def _plan(
    rate: float,
    seconds: float,
    *,
    size: int,
    flows: int = 1,
    segments: int | None,
    count: int | None = None,
) -> SendPlan:
    return SendPlan(
        TARGET,
        interface="eth0",
        rate=rate,
        count=count,
        duration_s=None if count else seconds,
        size=size,
        flows=flows,
        flow_step="group",
        core=SENDER_CORE,
        ttl=TTL,
        segments=segments,
    )

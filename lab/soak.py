"""The long run: traffic, rules that come and go, processes that die, for as long as is asked; then an account of it.

    python -m lab.soak SECONDS [--seed N] [--interfaces]        as root; `make soak`

                                   +-- out0 --- receiver
    sender 203.0.113.10 --- in0 relay
                                   +-- out1 --- receiver1

A steady flow goes to both outputs all along, many others meet rules that change at random. Data planes and spares are
killed or stopped, the control plane is killed or held up; with --interfaces, out1 goes down and comes back. What has to
hold at the end stands in `Soak.judge`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import statistics
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from lab.daemon import Daemon, settled
from lab.namespaces import Lab, unsupported, wait_until
from lab.plan import ReceivePlan, SendPlan
from lab.topology import RelayLine, relay_line
from lab.traffic import start_receiver, start_sender
from mcrelay.api import Stats
from mcrelay.errors import Error

STEADY: Final = ("239.1.1.1:5000", "239.2.2.2:6000")
STEADY_RATE: Final = 2000.0
OTHERS: Final = 20  # flows, one group after the other, that rules may be for or not
OTHERS_RATE: Final = 1000.0
# A stopped worker is found out after 3 s; its ring holds more than comes in that time.
OPTIONS: Final = ("--ring-mib", "64")
FAULT_EVERY_S: Final = 2.5  # a worker's death is forgiven after 2 s of life: no back-off
SAMPLE_EVERY_S: Final = 0.5
LATE_S: Final = 3.0  # for the last of a flow to arrive, and to be reported
DOWN_S: Final = 0.5
HELD_UP_S: Final = 1.0
BACK_S: Final = 20.0  # for everything to work again after a fault
BATCH: Final = 512  # PACKETS_PER_BATCH of the engine: what a dead worker may have sent and not given back
GROWTH_MAX: Final = 1024 * 1024  # bytes of a process, from one third of the run to the next
DESCRIPTORS_MORE: Final = 4


@dataclass
class Sample:
    memory: int  # bytes that are the process's own
    descriptors: int


@dataclass
class Soak:
    line: RelayLine
    daemon: Daemon
    rng: random.Random
    interfaces: bool = False
    failures: list[str] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    changes: Counter[str] = field(default_factory=Counter)
    samples: dict[str, list[Sample]] = field(default_factory=lambda: defaultdict(list))
    account: dict[str, Any] = field(default_factory=dict)
    _counted: dict[tuple[object, ...], int] = field(default_factory=dict)
    _over: threading.Event = field(default_factory=threading.Event)

    def run(self, seconds: float) -> None:
        """Soak for that long and judge."""
        with self.daemon.client() as client:
            client.add(f"{STEADY[0]}%in0", [f"{STEADY[1]}%out0", f"{STEADY[1]}%out1"], "steady")
        # Not even an outage ends a receiver: it is stopped when it has all there is.
        deadline_s = seconds + 120
        plan = ReceivePlan(STEADY[1], interface="eth0", idle_timeout_s=deadline_s, deadline_s=deadline_s, progress=True)
        receivers = [start_receiver(namespace, plan) for namespace in self.line.receivers]
        duration_s = seconds + 100
        senders = [
            start_sender(self.line.sender, plan)
            for plan in (
                SendPlan(STEADY[0], interface="eth0", rate=STEADY_RATE, size=200, duration_s=duration_s),
                SendPlan(
                    *("239.3.0.0:5000",),
                    interface="eth0",
                    rate=OTHERS_RATE,
                    flows=OTHERS,
                    flow_step="group",
                    duration_s=duration_s,
                ),
            )
        ]
        threads = [threading.Thread(target=self._go_on, args=(work,)) for work in (self._change, self._sample)]
        for thread in threads:
            thread.start()
        end = time.monotonic() + seconds
        try:
            while time.monotonic() < end and not self.failures:
                self._fault()
                time.sleep(max(0.0, min(FAULT_EVERY_S, end - time.monotonic())))
        finally:
            self._over.set()
            for thread in threads:
                thread.join(BACK_S)
        self._wait_until_back()
        sent = senders[0].stop().sent
        senders[1].stop()
        for receiver in receivers:
            with contextlib.suppress(TimeoutError):  # what is missing is found by its report
                wait_until(lambda r=receiver: r.progress.get("received", 0) >= sent, LATE_S)  # type: ignore[misc]
        self.judge(sent, [receiver.stop() for receiver in receivers])

    def _go_on(self, work: Callable[[], None]) -> None:
        """Until it is over, or something is not as it has to be. That nobody answers is a fault's doing."""
        while not self._over.is_set():
            try:
                work()
            except Error as error:
                self.changes[error.code] += 1
                self._over.wait(0.05)
            except Exception as error:
                self.failures.append(f"{work.__name__.lstrip('_')}: {error!r}")
                return

    # What is done to it.

    def _change(self) -> None:
        with self.daemon.client() as client:
            while not self._over.wait(self.rng.uniform(0.0, 0.1)):
                active = {rule.input: rule.id for rule in client.rules() if rule.name != "steady"}
                inputs = [f"239.3.0.{number}:5000%in0" for number in range(OTHERS)]
                gone = self.rng.sample(sorted(active), self.rng.randint(0, min(5, len(active))))
                free = [input for input in inputs if input not in active or input in gone]
                come = self.rng.sample(free, self.rng.randint(0 if gone else 1, min(5, len(free)))) if free else []
                output = f"239.4.0.1:{self.rng.randint(6000, 6100)}%out{self.rng.randint(0, 1)}"
                if gone or come:
                    client.change([(input, [output], None) for input in come], [active[input] for input in gone])
                    self.changes["made"] += 1

    def _fault(self) -> None:
        kinds = [self._kill_data, self._stop_data, self._kill_control, self._hold_up_control, self._kill_spare]
        if self.interfaces:
            kinds.append(self._take_down)
        # What the one before has left undone would make another of this one.
        self._wait_until_back()
        kind = self.rng.choice(kinds)
        self.faults[kind.__name__.lstrip("_").replace("_", " ")] += 1
        kind()

    def _pids(self, prefix: str) -> list[int]:
        return [pid for name, pid in sorted(self.daemon.pids().items()) if name.startswith(prefix)]

    def _kill_data(self) -> None:
        os.kill(self.rng.choice(self._pids("data/")), signal.SIGKILL)

    def _stop_data(self) -> None:
        os.kill(self.rng.choice(self._pids("data/")), signal.SIGSTOP)

    def _kill_control(self) -> None:
        os.kill(self._pids("control")[0], signal.SIGKILL)

    def _hold_up_control(self) -> None:
        pid = self._pids("control")[0]
        os.kill(pid, signal.SIGSTOP)
        time.sleep(HELD_UP_S)
        os.kill(pid, signal.SIGCONT)

    def _kill_spare(self) -> None:
        for pid in self._pids("spare"):
            os.kill(pid, signal.SIGKILL)

    def _take_down(self) -> None:
        self.line.relay.ip("link", "set", "out1", "down")
        time.sleep(DOWN_S)
        self.line.relay.ip("link", "set", "out1", "up")

    def _wait_until_back(self) -> None:
        wait_until(self._works, BACK_S, f"not everything works again:\n{self.daemon.log[-4000:]}")

    def _works(self) -> bool:
        try:
            with self.daemon.client() as client:
                processes = client.workers()
        except Error:
            return False
        roles = {process.role for process in processes}
        return "spare" in roles and all(p.state == "ready" and not _is_stopped(p.pid) for p in processes if p.pid)

    # What is looked at.

    def _sample(self) -> None:
        with self.daemon.client() as client:
            while not self._over.wait(SAMPLE_EVERY_S):
                self._compare(client.stats())
                for process in client.workers():
                    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                        assert process.pid is not None
                        name = f"data/{process.index}" if process.role == "data" else process.role
                        self.samples[name].append(_sample_of(process.pid))

    def _compare(self, stats: Stats) -> None:
        """No counter goes backwards."""
        now: dict[tuple[object, ...], int] = {}
        for worker in stats.workers:
            for name in ("received", "received_bytes", "forwarded", "copies", "copies_bytes", "batches", "sends"):
                now[worker.index, name] = getattr(worker, name)
            now |= {(worker.index, "dropped", reason): count for reason, count in worker.dropped.items()}
        for rule in stats.rules:
            if rule.name == "steady":
                now |= {("steady", name): getattr(rule, name) for name in ("packets", "bytes", "forwarded", "dropped")}
        for key, count in now.items():
            if count < self._counted.get(key, 0):
                self.failures.append(f"counter {key} went from {self._counted[key]} to {count}")
        self._counted |= now

    # What has to hold.

    def judge(self, sent: int, reports: list[Any]) -> None:
        """Received = forwarded + dropped; the steady flow is whole; nothing grows."""
        with self.daemon.client() as client:
            try:
                totals = settled(client, 10)
            except (AssertionError, TimeoutError) as error:
                self.failures.append(f"packets are not accounted for: {error}")
                return
            self._compare(client.stats())
        self.account = {"received": totals["received"], "forwarded": totals["forwarded"], **totals["dropped"]}
        for interface, report in zip(("out0", "out1"), reports, strict=True):
            if report.corrupted or (report.received != sent and not (self.interfaces and interface == "out1")):
                self.failures.append(f"steady flow on {interface}: {report.received} of {sent}, {report}")
            if report.duplicated > BATCH * self.faults.total():
                self.failures.append(f"steady flow on {interface}: {report.duplicated} came twice")
        for name, samples in self.samples.items():
            third = len(samples) // 3
            if third < 3:
                continue
            middle, last = samples[third : 2 * third], samples[2 * third :]
            memory = [statistics.median(s.memory for s in part) for part in (middle, last)]
            descriptors = [statistics.median(s.descriptors for s in part) for part in (middle, last)]
            if memory[1] > memory[0] + GROWTH_MAX:
                self.failures.append(f"{name} grew from {memory[0]:,.0f} to {memory[1]:,.0f} bytes")
            if descriptors[1] > descriptors[0] + DESCRIPTORS_MORE:
                self.failures.append(f"{name} had {descriptors[0]:.0f} descriptors, then {descriptors[1]:.0f}")
        if not self.changes["made"]:
            self.failures.append("no change was made")

    def table(self) -> str:
        rows = [(f"fault: {name}", f"{count:,}") for name, count in sorted(self.faults.items())]
        rows += [(f"changes: {name}", f"{count:,}") for name, count in sorted(self.changes.items())]
        rows += [(f"packets: {name}", f"{count:,}") for name, count in self.account.items()]
        for name, samples in sorted(self.samples.items()):
            memory = "{:.1f} to {:.1f} MiB".format(*_extremes([s.memory / 2**20 for s in samples]))
            rows.append((name, "{}, {:.0f} to {:.0f} descriptors".format(memory, *_descriptors(samples))))
        return "\n".join(f"{name:32} {value:>24}" for name, value in rows)


def _extremes(values: list[float]) -> tuple[float, float]:
    return min(values), max(values)


def _descriptors(samples: list[Sample]) -> tuple[float, float]:
    return _extremes([float(sample.descriptors) for sample in samples])


def _sample_of(pid: int) -> Sample:
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    if "RssAnon" not in status:  # dead, and not reaped
        raise ProcessLookupError(pid)
    return Sample(int(status["RssAnon"].split()[0]) * 1024, len(os.listdir(f"/proc/{pid}/fd")))


def _is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except (FileNotFoundError, ProcessLookupError):
        return True


def soak(seconds: float, *, seed: int, interfaces: bool = False) -> Soak:
    """A lab, a daemon in it, and the run."""
    with Lab() as lab:
        line = relay_line(lab, outputs=2)
        with Daemon(line.relay, *OPTIONS) as daemon:
            run = Soak(line, daemon, random.Random(seed), interfaces)
            run.run(seconds)
            return run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m lab.soak", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("seconds", type=float)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--interfaces", action="store_true", help="take an interface down, too")
    options = parser.parse_args()
    if reason := unsupported():
        print(f"cannot soak here: {reason}", file=sys.stderr)
        return 1
    print(f"seed {options.seed}, {options.seconds:g} s", flush=True)
    run = soak(options.seconds, seed=options.seed, interfaces=options.interfaces)
    print(run.table())
    for failure in run.failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    return 1 if run.failures else 0


if __name__ == "__main__":
    sys.exit(main())

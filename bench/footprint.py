"""What mcrelay costs when it does little: time to start, memory, idle processor time, delay of a new rule.

    python -m bench.footprint [--json] [--repeat N]

Every figure is the median of the repetitions, with the lowest and highest beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, Final

from bench.measurements.control import memory_kib
from bench.trials import processor_s
from lab.daemon import Daemon
from lab.namespaces import Lab, Namespace, unsupported
from lab.plan import SendPlan
from lab.program import PROGRAM
from lab.topology import RelayLine, relay_line
from lab.traffic import start_sender

INPUT: Final = "239.1.1.1:5000"
OUTPUT: Final = "239.2.2.2:6000"
IDLE_S: Final = 10.0
PROBE_RATE: Final = 20_000  # datagrams per second: the resolution of the join delay is 50 us


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.footprint", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON, with all samples")
    parser.add_argument("--repeat", type=int, default=5, help="repetitions (default: %(default)s)")
    options = parser.parse_args()
    if reason := unsupported():
        print(f"cannot measure here: {reason}", file=sys.stderr)
        return 1
    samples: dict[str, list[float]] = {}
    with Lab() as lab:
        line = relay_line(lab)
        for number in range(options.repeat):
            measure(line, samples, idle=number == 0)
    if options.json:
        print(json.dumps({"cores": os.cpu_count(), "kernel": os.uname().release, "samples": samples}, indent=2))
        return 0
    for name, values in samples.items():
        print(f"{name:<58} {statistics.median(values):>9.2f}   ({min(values):.2f} to {max(values):.2f})")
    return 0


def measure(line: RelayLine, samples: dict[str, list[float]], *, idle: bool) -> None:
    """One daemon's life; each figure is appended to its samples."""

    def note(name: str, value: float) -> None:
        samples.setdefault(name, []).append(value)

    started = time.monotonic()
    with Daemon(line.relay, "--workers", "2") as daemon:
        note("start to ready, s", time.monotonic() - started)
        sender = start_sender(line.sender, SendPlan(INPUT, interface="eth0", rate=PROBE_RATE, duration_s=60))
        with daemon.client() as client:
            sent_at, arrived_at = first_datagram(
                line.receiver, lambda: client.add(f"{INPUT}%in0", [f"{OUTPUT}%out0"], "probe")
            )
            note("client.add() called to first datagram out, ms", (arrived_at - sent_at) * 1000)
            client.remove("probe")
        command = [PROGRAM, "add", f"{INPUT}%in0", f"{OUTPUT}%out0", "--name", "probe", "--socket", daemon.socket]
        sent_at, arrived_at = first_datagram(
            line.receiver, lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        )
        note("'mcrelay add' started to first datagram out, ms", (arrived_at - sent_at) * 1000)
        sender.stop()
        pids = list(daemon.pids().values())
        _, total, rings = (sum(kib) for kib in zip(*map(memory_kib, pids), strict=True))
        note("proportional set size of all processes without rings, MB", (total - rings) / 1000)
        note("packet rings, MB", rings / 1000)
        if idle:
            before = processor_s(pids)
            time.sleep(IDLE_S)
            note("processor time while idle with one rule, %", (processor_s(pids) - before) / IDLE_S * 100)


def first_datagram(receiver: Namespace, act: Callable[[], Any]) -> tuple[float, float]:
    """When `act` was called, and when the first datagram reached the receiver's device after that."""
    watcher = subprocess.Popen(
        ["ip", "netns", "exec", receiver.name, sys.executable, "-c", WATCH],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert watcher.stdout
    watcher.stdout.readline()
    called = time.monotonic()
    act()
    arrived = float(watcher.stdout.readline())
    watcher.wait()
    watcher.stdout.close()
    return called, arrived


# Prints the monotonic time at which the first datagram to the output's group and port reaches the device.
WATCH: Final = """
import socket, time
sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0800))
sock.bind(("eth0", 0x0800))
sock.settimeout(30)
print("watching", flush=True)
while True:
    packet = sock.recv(64)
    if packet[9] == 17 and packet[16:20] == bytes([239, 2, 2, 2]):
        print(time.monotonic(), flush=True)
        break
"""


if __name__ == "__main__":
    sys.exit(main())

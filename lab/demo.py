"""The demonstration behind `make demo`: two networks that cannot reach each other, and mcrelay between them.

Everything happens in three network namespaces made for the purpose and removed afterwards, also after Ctrl-C.

        sender                       relay                              receiver
    203.0.113.10 ------- 192.0.2.1 (in0) (out0) 198.51.100.1 ------- 198.51.100.2
    sends to                         no route to 203.0.113.10,           listens to
    239.1.1.1:5000                   reverse-path filter strict          239.2.2.2:6000
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Final

from lab.daemon import Daemon, sum_workers
from lab.namespaces import Lab, unsupported
from lab.plan import ReceivePlan, SendPlan
from lab.topology import RelayLine, relay_line
from lab.traffic import ReceiveReport, SenderProcess, run_sender, start_receiver, start_sender
from mcrelay.client import Client

INPUT: Final = "239.1.1.1:5000"
OUTPUT: Final = "239.2.2.2:6000"
REFRESH_S: Final = 0.5
ON_TERMINAL: Final = sys.stdout.isatty()


def main() -> int:
    parser = argparse.ArgumentParser(prog="make demo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="how long to send (default: %(default)s)")
    parser.add_argument("--rate", type=int, default=20_000, help="datagrams per second (default: %(default)s)")
    parser.add_argument("--size", type=int, default=1000, help="bytes of a datagram (default: %(default)s)")
    options = parser.parse_args()
    if reason := unsupported():
        print(f"the demo cannot run here: {reason}", file=sys.stderr)
        return 1
    try:
        with Lab() as lab:
            return demonstrate(lab, options.seconds, options.rate, options.size)
    except KeyboardInterrupt:
        print("\ninterrupted; the namespaces and everything in them are gone")
        return 130


def demonstrate(lab: Lab, seconds: float, rate: int, size: int) -> int:
    say("Building three networks: sender | relay | receiver")
    print("\n".join((__doc__ or "").splitlines()[4:8]))
    line = relay_line(lab)

    say("Without mcrelay: 1000 datagrams to 239.1.1.1:5000, a listener for them in the receiver's network")
    receiver = start_receiver(line.receiver, ReceivePlan(INPUT, interface="eth0", deadline_s=30))
    run_sender(line.sender, SendPlan(INPUT, interface="eth0", rate=2000, count=1000))
    before = receiver.stop()
    print(f"   sent 1000, received {before.received}")

    say("Starting mcrelay in the relay's network")
    with Daemon(line.relay) as daemon, daemon.client() as client:
        print(f"   {daemon.log}")
        added = daemon.run(
            "add", f"{INPUT}%{line.ingress_interface}", f"{OUTPUT}%{line.egresses[0].interface},ttl=8", "--name", "demo"
        )
        print(f"   $ mcrelay add {INPUT}%in0 {OUTPUT}%out0,ttl=8 --name demo")
        print(f"   {added.stdout.strip()}")
        say(f"Sending {rate} datagrams of {size} bytes per second for {seconds:g} s")
        report, sent = relay(line, client, seconds, rate, size)
        say("The rule goes, and so does the traffic")
        daemon.run("remove", "demo")
        receiver = start_receiver(line.receiver, ReceivePlan(OUTPUT, interface="eth0", deadline_s=30))
        run_sender(line.sender, SendPlan(INPUT, interface="eth0", rate=2000, count=1000))
        after = receiver.stop()
        print(f"   sent 1000, received {after.received}")

    lost = sent - report.received
    print(
        f"\nVERDICT: sent {sent}, received {report.received}, lost {lost}, reordered {report.reordered}, "
        f"duplicated {report.duplicated}"
    )
    clean = report.clean and lost == 0 and before.received == 0 and after.received == 0
    return 0 if clean else 1


def relay(line: RelayLine, client: Client, seconds: float, rate: int, size: int) -> tuple[ReceiveReport, int]:
    """Send through the relay with a live table; what the receiver got, and how many were sent."""
    count = int(rate * seconds)
    receiver = start_receiver(
        line.receiver,
        ReceivePlan(OUTPUT, interface="eth0", count=count, expect=count, idle_timeout_s=2, deadline_s=seconds + 30),
    )
    sender = start_sender(line.sender, SendPlan(INPUT, interface="eth0", rate=rate, count=count, size=size))
    watch(client, sender)
    sent = sender.result()
    report = receiver.result()
    print(
        f"   latency p50 {report.latency_p50_us:.0f} us, p99 {report.latency_p99_us:.0f} us; "
        f"corrupted {report.corrupted}"
    )
    return report, sent.sent


def watch(client: Client, sender: SenderProcess) -> None:
    """A table that moves while the sender sends."""
    drawn = 0
    earlier: dict[int, tuple[int, float]] = {}
    while True:
        running = sender.process.poll() is None
        lines = ["   worker  packets/s   forwarded   dropped"]
        now = time.monotonic()
        for worker in client.stats().workers:
            packets, at = earlier.get(worker.index, (worker.received, now))
            per_second = (worker.received - packets) / (now - at) if now > at else 0.0
            earlier[worker.index] = (worker.received, now)
            reasons = ", ".join(f"{reason} {n}" for reason, n in worker.dropped.items()) or "0"
            lines.append(f"   {worker.index:>6} {per_second:>10.0f} {worker.forwarded:>11}   {reasons}")
        if ON_TERMINAL and drawn:
            print(f"\033[{drawn}F\033[J", end="")
        if ON_TERMINAL or not running:
            print("\n".join(lines), flush=True)
            drawn = len(lines)
        else:
            totals = sum_workers(client)
            print(f"   received {totals['received']}, forwarded {totals['forwarded']}", flush=True)
        if not running:
            return
        time.sleep(REFRESH_S)


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""What mcrelay loses when something happens to it, under load.

    python -m bench.reliability [--rate N] [--only NAME,...]

A flow of numbered datagrams goes through a relay to which something is done; the receiver says what is missing, came
twice or out of order. Processes are those of `mcrelay`; each measurement has a daemon of its own.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from bench.network import RELAY_CORE
from lab.daemon import Daemon, answers
from lab.namespaces import Lab, unsupported, wait_until
from lab.plan import ReceivePlan, SendPlan
from lab.topology import INGRESS_ADDRESS, SENDER_ADDRESS, RelayLine, relay_line
from lab.traffic import ReceiverProcess, SenderProcess, start_receiver, start_sender
from mcrelay.traffic import ReceiveReport

INPUT: Final = "239.1.1.1:5000"
OUTPUT: Final = "239.2.2.2:6000"
SIZE: Final = 1000  # bytes of payload
TIMES: Final = 20
UPGRADES: Final = 5
CYCLES: Final = 34  # of each of three kinds
TRAFFIC_CORE: Final = 0
DEADLINE_S: Final = 10.0
OPTIONS: Final = ("--cores", str(RELAY_CORE))
# A worker may die as often as it is killed here.
PROGRAM: Final = (
    sys.executable,
    "-c",
    "import sys, mcrelay.children as c; c.DEATHS_FORGIVEN = 1000; "
    "sys.argv[0] = 'mcrelay'; from mcrelay.cli import main; main()",
)


@dataclass
class Flow:
    """Traffic under way through a daemon."""

    daemon: Daemon
    line: RelayLine
    sender: SenderProcess
    receiver: ReceiverProcess

    def end(self) -> ReceiveReport:
        """The account of what was sent so far."""
        sent = self.sender.stop().sent
        report = self.receiver.result()
        # What was sent last and lost is not seen by the receiver.
        return replace(report, lost=sent - report.received)


@contextmanager
def flow(line: RelayLine, rate: int) -> Iterator[Flow]:
    with Daemon(line.relay, *OPTIONS, program=PROGRAM) as daemon:
        yield begin(daemon, line, rate)


def begin(daemon: Daemon, line: RelayLine, rate: int) -> Flow:
    daemon.run("add", f"{INPUT}%in0", f"{OUTPUT}%out0", "--name", "feed")
    receiver = start_receiver(
        line.receiver,
        ReceivePlan(OUTPUT, interface="eth0", idle_timeout_s=5, deadline_s=600, progress=True, core=TRAFFIC_CORE),
    )
    plan = SendPlan(INPUT, interface="eth0", rate=rate, duration_s=600, size=SIZE, core=TRAFFIC_CORE)
    sender = start_sender(line.sender, plan)
    wait_until(lambda: receiver.progress.get("received"), DEADLINE_S)
    return Flow(daemon, line, sender, receiver)


def account(report: ReceiveReport) -> str:
    return f"{report.received} received, {report.lost} lost, {report.duplicated} twice, {report.reordered} out of order"


def successor(daemon: Daemon, former: int, name: str = "data/0") -> None:
    def is_there() -> bool:
        if not answers(daemon.socket):
            return False
        processes = daemon.json("workers")["processes"]
        pids = {f"data/{p['index']}" if p["role"] == "data" else p["role"]: p["pid"] for p in processes}
        return pids.get(name, former) != former and "spare" in pids and all(p["state"] == "ready" for p in processes)

    wait_until(is_there, DEADLINE_S, f"{name} has no successor, or there is no spare that waits")


def again_and_again(line: RelayLine, rate: int, name: str, act: Callable[[Daemon, int], object]) -> str:
    """Do something to the process of this name, and wait for its successor, TIMES times: the account."""
    with flow(line, rate) as under_way:
        for _ in range(TIMES):
            former = under_way.daemon.pids()[name]
            act(under_way.daemon, former)
            successor(under_way.daemon, former, name)
            assert len(under_way.daemon.json("list")["rules"]) == 1
        return account(under_way.end())


def kill(daemon: Daemon, pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def killed_workers(line: RelayLine, rate: int) -> str:
    return f"{TIMES} kills: {again_and_again(line, rate, 'data/0', kill)}"


def replaced_workers(line: RelayLine, rate: int) -> str:
    account_of_it = again_and_again(line, rate, "data/0", lambda daemon, _pid: daemon.run("restart-worker", "0"))
    return f"{TIMES} replacements: {account_of_it}"


def killed_control_planes(line: RelayLine, rate: int) -> str:
    return f"{TIMES} kills, clients served again after each: {again_and_again(line, rate, 'control', kill)}"


def stopped_worker(line: RelayLine, rate: int) -> str:
    with flow(line, rate) as under_way:
        former = under_way.daemon.pids()["data/0"]
        began = time.monotonic()
        os.kill(former, signal.SIGSTOP)
        successor(under_way.daemon, former)
        took = time.monotonic() - began
        return f"replaced after {took:.1f} s: {account(under_way.end())}"


def upgraded(line: RelayLine, rate: int) -> str:
    with flow(line, rate) as under_way:
        for _ in range(UPGRADES):
            under_way.daemon.pid = under_way.daemon.json("upgrade")["pid"]
            wait_until(lambda: "spare" in under_way.daemon.pids(), DEADLINE_S)
        return f"{UPGRADES} upgrades: {account(under_way.end())}"


def killed_supervisor(line: RelayLine, rate: int) -> str:
    """As a service manager would start it again, at once."""
    with TemporaryDirectory() as directory:
        first = Daemon(line.relay, *OPTIONS, program=PROGRAM, directory=Path(directory)).__enter__()
        with first.client() as client:
            client.change([(f"239.1.{n >> 8}.{n & 255}:5000%in0", [f"{OUTPUT}%out0"], None) for n in range(1000, 2000)])
        under_way = begin(first, line, rate)
        os.kill(first.pid, signal.SIGKILL)
        first.process.wait()
        with Daemon(line.relay, *OPTIONS, directory=Path(directory)) as second:
            received = under_way.receiver.progress["received"]
            wait_until(lambda: under_way.receiver.progress["received"] > received + rate, DEADLINE_S)
            report = under_way.end()
            back = len(second.json("list")["rules"])
        first.stop(check=False)
    return f"{back} of 1001 rules back, gap {1000 * report.lost / rate:.0f} ms: {account(report)}"


def arrives(line: RelayLine) -> bool:
    """Whether a datagram comes through. A receiver of its own: memberships of a deleted interface stay a socket's."""
    with (
        line.sender.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
        line.receiver.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver,
    ):
        group, _, port = OUTPUT.partition(":")
        receiver.bind((group, int(port)))
        receiver.settimeout(0.005)
        sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 8)
        try:
            request = struct.pack("=4s4si", socket.inet_aton(group), b"", line.receiver.ifindex("eth0"))
            receiver.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, request)
            sender.sendto(b"probe", (INPUT.partition(":")[0], 5000))
            return bool(receiver.recv(16))
        except OSError:
            return False


def down_and_up(lab: Lab, line: RelayLine, name: str) -> None:
    line.relay.ip("link", "set", name, "down")
    line.relay.ip("link", "set", name, "up")


def delete_and_create(lab: Lab, line: RelayLine, name: str) -> None:
    line.relay.ip("link", "del", name)
    if name == "in0":
        ends = (line.sender, "eth0", line.relay, "in0")
        lab.veth(*ends, address_a=f"{SENDER_ADDRESS}/24", address_b=f"{INGRESS_ADDRESS}/24")
        line.sender.ip("route", "add", "224.0.0.0/4", "dev", "eth0")
    else:
        egress = line.egresses[0]
        ends = (line.relay, name, egress.receiver, "eth0")
        lab.veth(*ends, address_a=f"{egress.address}/24", address_b=f"{egress.receiver_address}/24")
        egress.receiver.ip("route", "add", "224.0.0.0/4", "dev", "eth0")


def rename_and_back(lab: Lab, line: RelayLine, name: str) -> None:
    for old, new in ((name, "other0"), ("other0", name)):
        line.relay.ip("link", "set", old, "down")
        line.relay.ip("link", "set", old, "name", new)
        line.relay.ip("link", "set", new, "up")


def moved_interfaces(lab: Lab, line: RelayLine) -> str:
    """Times from the last command that mends the interface to the first datagram that arrives."""
    changes: list[Callable[[Lab, RelayLine, str], None]] = [down_and_up, delete_and_create, rename_and_back]
    slowest = {change.__name__: 0.0 for change in changes}
    with Daemon(line.relay, *OPTIONS) as daemon:
        daemon.run("add", f"{INPUT}%in0", f"{OUTPUT}%out0", "--name", "feed")
        wait_until(lambda: arrives(line), DEADLINE_S)
        pids = {name: pid for name, pid in daemon.pids().items() if name != "spare"}
        before: dict[str, tuple[int, int]] = {}
        for cycle in range(CYCLES):
            for change in changes:
                for name in ("in0", "out0"):
                    change(lab, line, name)
                    began = time.monotonic()
                    wait_until(lambda: arrives(line), DEADLINE_S, f"{change.__name__} of {name}")
                    slowest[change.__name__] = max(slowest[change.__name__], time.monotonic() - began)
            if cycle == 2:
                before = {name: weight(pid) for name, pid in pids.items()}
        time.sleep(1)
        after = {name: weight(pid) for name, pid in pids.items()}
    times = ", ".join(f"{name.replace('_', ' ')} {1000 * value:.0f} ms" for name, value in slowest.items())
    grown = ", ".join(
        f"{name} {after[name][0] - before[name][0]:+d} descriptors {after[name][1] - before[name][1]:+d} KiB"
        for name in pids
    )
    return f"{CYCLES * len(changes)} cycles of both interfaces; slowest: {times}; from the third cycle on: {grown}"


def weight(pid: int) -> tuple[int, int]:
    """Descriptors, and KiB of resident memory."""
    with open(f"/proc/{pid}/status") as file:
        (resident,) = (int(line.split()[1]) for line in file if line.startswith("VmRSS"))
    return len(os.listdir(f"/proc/{pid}/fd")), resident


MEASUREMENTS: Final[dict[str, Callable[[RelayLine, int], str]]] = {
    "killed-workers": killed_workers,
    "replaced-workers": replaced_workers,
    "stopped-worker": stopped_worker,
    "killed-control-planes": killed_control_planes,
    "killed-supervisor": killed_supervisor,
    "upgrades": upgraded,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.reliability", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rate", type=int, default=100_000, help="datagrams per second (default: %(default)s)")
    parser.add_argument("--only", help=f"some of {', '.join([*MEASUREMENTS, 'moved-interfaces'])}")
    options = parser.parse_args()
    if reason := unsupported():
        print(f"cannot measure here: {reason}", file=sys.stderr)
        return 1
    chosen = options.only.split(",") if options.only else [*MEASUREMENTS, "moved-interfaces"]
    for name in chosen:
        with Lab() as lab:
            line = relay_line(lab)
            if name == "moved-interfaces":
                figure = moved_interfaces(lab, line)
            else:
                figure = MEASUREMENTS[name](line, options.rate)
        print(f"{name}: {figure}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

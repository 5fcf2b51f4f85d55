"""What tests of processes that die have in common.

The input of their rule, which worker has it, and when there is a successor to that one.
"""

from __future__ import annotations

import os
import sys
from ipaddress import IPv4Address

from lab.daemon import Daemon
from lab.namespaces import wait_until
from lab.topology import RelayLine
from mcrelay.steering import steer

INPUT = "239.1.1.1:5000"
# A daemon that restarts its workers at once, as often as it takes: the back-off between lives is not what is tested.
IMPATIENT = (
    sys.executable,
    "-c",
    "import sys, mcrelay.children as c; c.BACKOFF_FIRST_S = c.BACKOFF_MAX_S = 0.01; "
    "sys.argv[0] = 'mcrelay'; from mcrelay.cli import main; main()",
)


def packet_sockets(line: RelayLine) -> int:
    return len(line.relay.run("cat", "/proc/net/packet").stdout.strip().split("\n")) - 1


def owner_of_input(workers: int = len(os.sched_getaffinity(0))) -> int:
    """The worker that has INPUT."""
    group, _, port = INPUT.partition(":")
    return steer(int(IPv4Address(group)), int(port)) % workers


def wait_for_successor(daemon: Daemon, index: int, former: int) -> None:
    """Until another process has taken this worker's place, and a spare is there for the next time."""

    def is_there() -> bool:
        processes = daemon.json("workers")["processes"]
        (worker,) = (p for p in processes if p["role"] == "data" and p["index"] == index)
        return bool(worker["state"] == "ready" and worker["pid"] != former and processes[-1]["role"] == "spare")

    wait_until(is_there, 30, "no successor, or no spare")

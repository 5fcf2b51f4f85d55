"""Other people's programs through the relay: what they send arrives where they listen."""

from __future__ import annotations

import hashlib
import random
import re
import subprocess
from pathlib import Path
from typing import Final

from lab.daemon import Daemon
from lab.namespaces import Namespace, wait_until
from lab.topology import RelayLine

# 1000 bytes per datagram: a socket holds so many (net.core.rmem_default) while its program does not run.
SIZE: Final = 80_000


def is_member(namespace: Namespace, group: str) -> bool:
    return group in namespace.ip("-4", "maddress", "show", "dev", "eth0").stdout


def is_bound(namespace: Namespace, port: int) -> bool:
    return f":{port:04X} " in namespace.run("cat", "/proc/net/udp").stdout


def test_a_file_by_socat_from_group_to_group(daemon: Daemon, line: RelayLine, tmp_path: Path) -> None:
    source, received = tmp_path / "source", tmp_path / "received"
    source.write_bytes(random.Random(1).randbytes(SIZE))
    daemon.run("add", "239.1.1.1:5000%in0", "239.2.2.2:6000%out0")
    receiver = line.receiver.popen(
        "socat",
        *("-u", "-b", "1000"),
        f"UDP4-RECV:6000,ip-add-membership=239.2.2.2:eth0,rcvbuf={2**21}",
        f"OPEN:{received},creat,append",
    )
    wait_until(lambda: is_member(line.receiver, "239.2.2.2"), 5, "socat does not listen")
    # 1000 bytes per datagram.
    sender = line.sender.popen(
        *("socat", "-u", "-b", "1000", f"OPEN:{source},rdonly"),
        "UDP4-DATAGRAM:239.1.1.1:5000,ip-multicast-ttl=8,ip-multicast-if=203.0.113.10",
    )
    assert sender.wait(20) == 0
    wait_until(lambda: received.exists() and received.stat().st_size == SIZE, 20, "not all of the file arrived")
    receiver.terminate()
    receiver.wait(5)
    assert hashlib.sha256(received.read_bytes()).digest() == hashlib.sha256(source.read_bytes()).digest()


def test_iperf_from_group_to_group_and_to_unicast(daemon: Daemon, line: RelayLine) -> None:
    """iperf 2: its server counts what is lost and out of order. Its buffer of some 90 datagrams holds all of it, where
    the machine has no time for it."""
    unicast = line.egresses[1].receiver_address
    daemon.run("add", "239.1.1.1:5001%in0", "239.2.2.2:5001%out0", f"{unicast}:5001%out1", "--name", "iperf")
    servers = [
        line.receivers[0].popen("iperf", "-s", "-u", "-B", "239.2.2.2", "-p", "5001", stdout=subprocess.PIPE),
        line.receivers[1].popen("iperf", "-s", "-u", "-p", "5001", stdout=subprocess.PIPE),
    ]
    wait_until(lambda: is_member(line.receivers[0], "239.2.2.2"), 5, "iperf does not join")
    wait_until(lambda: is_bound(line.receivers[1], 5001), 5, "iperf does not listen")
    line.sender.run(
        *("iperf", "-c", "239.1.1.1", "-u", "-p", "5001", "-T", "8", "-l", "1000", "-b", "320k", "-t", "2"), timeout=30
    )
    for server in servers:
        output = ""
        assert server.stdout
        while not re.search(r"\d+/\s*\d+ \(", output):  # lost/total at the end of a flow
            text = server.stdout.readline()
            assert text, f"the server ended without a report:\n{output}"
            output += text
        match = re.search(r"(\d+)/\s*(\d+) \(", output)
        assert match
        lost, total = int(match[1]), int(match[2])
        assert lost == 0, output
        assert total > 70, output
        server.terminate()
        server.wait(5)
        server.stdout.close()
    wait_until(lambda: daemon.json("stats")["rules"][0]["forwarded"] >= total, 20)

"""What is wrong is refused in one clear line with its exit code, and changes nothing."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import socket
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from lab.daemon import Daemon
from lab.namespaces import wait_until
from lab.program import PROGRAM
from lab.topology import RelayLine
from tests.e2e.conftest import StartDaemon
from tests.e2e.test_privileges import descriptors

REFUSED: dict[str, tuple[list[str], int, list[str]]] = {
    "port 0": (["239.1.1.1:0%in0", "239.2.2.2:6000%out0"], 65, ["'0'", "1 to 65535"]),
    "port 65536": (["239.1.1.1:5000%in0", "239.2.2.2:65536%out0"], 65, ["'65536'", "1 to 65535"]),
    "not an address": (["239.1.1:5000%in0", "239.2.2.2:6000%out0"], 65, ["'239.1.1'", "239.1.1.1"]),
    "IPv6 without brackets": (["ff3e::1:5000%in0", "239.2.2.2:6000%out0"], 65, ["brackets"]),
    "a scope that stays here": (["239.1.1.1:5000%in0", "[ff01::1]:6000%out0"], 65, ["never leaves a host", "ff02::"]),
    "a prefix onto a shorter one": (["239.1.0.0/16:1%in0", "239.0.0.0/8:=%out0"], 65, ["same length", "write /16"]),
    "a source of the other family": (["239.1.1.1:5000%in0", "[ff05::1]:1%out0,source=keep"], 65, ["cannot be kept"]),
    "loop for unicast": (["239.1.1.1:5000%in0", "198.51.100.2:6000%out0,loop"], 65, ["loop is for multicast"]),
    "nobody's network": (["239.1.1.1:5000%in0", "240.0.0.1:6000%out0"], 65, ["240.0.0.0/4"]),
    "a loop": (["239.1.1.1:5000%in0", "239.1.1.1:5000%in0"], 65, ["feed itself"]),
    "a cycle": (["239.2.2.7:6000%out0", "239.1.1.7:5000%in0"], 65, ["closes a cycle", "(rule first)", "another group"]),
    "duplicate input": (["239.1.1.7:5000%in0", "239.2.2.2:6000%out0"], 65, ["already belongs to rule first"]),
    "duplicate name": (["239.1.1.1:5000%in0", "239.2.2.2:6000%out0", "--name", "first"], 65, ["'first'"]),
    "empty name": (["239.1.1.1:5000%in0", "239.2.2.2:6000%out0", "--name", ""], 65, ["empty"]),
    "no output": (["239.1.1.1:5000%in0"], 64, ["OUTPUTS"]),
    "any port of this host": (["192.0.2.1:*%in0", "239.2.2.2:6000%out0"], 65, ["name the port"]),
    "a shell's leftovers": (["239.1.1.1:5000%in0; reboot", "239.2.2.2:6000%out0"], 65, ["interface name"]),
    "ten thousand characters": (["9" * 10_000, "239.2.2.2:6000%out0"], 65, ["999...'"]),
    "control characters": (["239.1.1.1:5000%in\x1b[2J", "239.2.2.2:6000%out0"], 65, [r"\x1b"]),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_wrong_rule_is_refused_and_changes_nothing(shared: Daemon, kind: str) -> None:
    arguments, code, words = REFUSED[kind]
    before = shared.json("list"), shared.json("stats")["generation"]
    done = shared.run("add", *arguments, check=False)
    assert done.returncode == code, done
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("mcrelay: ")
    for word in words:
        assert word in done.stderr
    assert (shared.json("list"), shared.json("stats")["generation"]) == before


def test_an_unknown_rule_cannot_be_removed(shared: Daemon) -> None:
    done = shared.run("remove", "nothing", check=False)
    assert (done.returncode, done.stderr) == (
        65,
        "mcrelay: no rule is called 'nothing'; 'mcrelay list' shows the rules\n",
    )


@pytest.fixture
def shared(start: StartDaemon) -> Daemon:
    daemon = start("--workers", "1")
    daemon.run("add", "239.1.1.7:5000%in0", "239.2.2.7:6000%out0", "--name", "first")
    return daemon


def test_no_daemon(tmp_path: Path) -> None:
    done = subprocess.run(
        [PROGRAM, "list", "--socket", str(tmp_path / "none.sock")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 69
    assert done.stderr.count("\n") == 1
    assert "mcrelay run" in done.stderr


def test_two_daemons_on_one_socket(daemon: Daemon, line: RelayLine) -> None:
    done = line.relay.run(PROGRAM, "run", "--socket", daemon.socket, check=False, timeout=20)
    assert done.returncode == 73
    assert done.stderr == (
        f"mcrelay: another mcrelay already listens on {daemon.socket}; stop it, or choose another: --socket PATH\n"
    )
    daemon.run("ping")


# --- hostile clients --------------------------------------------------------------------------------------------------


def connect(daemon: Daemon) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(daemon.socket)
    sock.settimeout(10)
    return sock


def frame(body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + body


def reply(sock: socket.socket) -> dict[str, object]:
    (length,) = struct.unpack(">I", _exactly(sock, 4))
    answer: dict[str, object] = json.loads(_exactly(sock, length))
    return answer


def _exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += (part := sock.recv(size - len(data)))
        assert part, "the daemon closed the connection"
    return data


MALFORMED = {  # of which the log shows the first
    "oversized": struct.pack(">I", 2 * 1024 * 1024) + bytes(2 * 1024 * 1024),
    "not JSON": frame(b"hello"),
    "empty": frame(b""),
    "bad UTF-8": frame(b'{"type":"ping","id":"\xff\xfe"}'),
    "no type": frame(b'{"id":1}'),
    "unknown type": frame(b'{"type":"shutdown","id":1}'),
    "a message of another channel": frame(b'{"type":"sync_rules","ticket":1,"rules":[],"slots":{},"complete":true}'),
    "a message of the other direction": frame(b'{"type":"pong","id":1}'),
    "unknown field": frame(b'{"type":"ping","id":1,"extra":1}'),
    "missing field": frame(b'{"type":"ping"}'),
    "wrong type of a field": frame(b'{"type":"ping","id":"1"}'),
    "a giant number": frame(b'{"type":"ping","id":' + b"9" * 5000 + b"}"),
    "deeply nested": frame(b'{"type":"ping","id":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "an array": frame(b"[]"),
}


def test_malformed_requests_are_answered_counted_and_survived(daemon: Daemon) -> None:
    for number, kind in enumerate(MALFORMED, start=1):
        with connect(daemon) as sock:
            sock.sendall(MALFORMED[kind])
            answer = reply(sock)
            assert (answer["type"], answer["code"], answer["id"]) == ("failure", "protocol", None), (kind, answer)
            sock.sendall(frame(b'{"type":"ping","id":7}'))
            assert reply(sock) == {"type": "pong", "id": 7}, kind
        assert daemon.json("stats")["frames_malformed"] == number
    daemon.wait_for_log("malformed frame on client")
    daemon.wait_for_log("stage frame")
    daemon.wait_for_log("stage decode")


def test_descriptors_from_a_client_are_closed_and_counted(daemon: Daemon) -> None:
    control = daemon.pids()["control"]
    before = len(os.listdir(f"/proc/{control}/fd"))
    with connect(daemon) as sock, open("/dev/null") as null:
        socket.send_fds(sock, [frame(b'{"type":"ping","id":1}')], [null.fileno()] * 3)
        answers = sorted((reply(sock), reply(sock)), key=lambda answer: str(answer["type"]))
        assert [answer["type"] for answer in answers] == ["failure", "pong"]
    wait_until(lambda: len(os.listdir(f"/proc/{control}/fd")) <= before, 5, "descriptors stay open")
    daemon.wait_for_log("stage descriptors")


def test_a_client_that_only_sends_rubbish_is_sent_away(daemon: Daemon) -> None:
    with connect(daemon) as sock:
        sock.sendall(frame(b"rubbish") * 100)
        answers = 0
        while sock.recv(65536):
            answers += 1
        assert answers
    daemon.run("ping")


def test_slow_and_silent_clients_delay_nobody(daemon: Daemon) -> None:
    silent = [connect(daemon) for _ in range(50)]
    for half, sock in enumerate(silent):
        sock.sendall(frame(b'{"type":"ping","id":1}')[: half % 20])  # never the whole
    greedy = connect(daemon)
    greedy.setblocking(False)
    with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
        for _ in range(10_000):  # asks and never reads
            greedy.sendall(frame(b'{"type":"get_stats","id":1}') * 100)
    daemon.run("add", "239.1.1.1:5000%in0", "239.2.2.2:6000%out0", "--name", "feed")
    daemon.run("ping")
    daemon.run("remove", "feed")
    for sock in (*silent, greedy):
        sock.close()
    daemon.run("ping")


def test_many_requests_at_once_are_bounded(daemon: Daemon) -> None:
    """Changes are served one after the other; more than 32 of one client under way are refused, not queued."""
    with connect(daemon) as sock:
        sock.sendall(
            b"".join(
                frame(
                    json.dumps(
                        {
                            "type": "add",
                            "id": n,
                            "input": f"239.5.0.{n}:5000%in0",
                            "outputs": ["239.2.2.2:6000%out0"],
                        }
                    ).encode()
                )
                for n in range(1, 101)
            )
        )
        answers = [reply(sock) for _ in range(100)]
    added = {a["id"] for a in answers if a["type"] == "added"}
    busy = {a["id"] for a in answers if a.get("code") == "busy"}
    assert len(added) >= 32
    assert added | busy == set(range(1, 101))
    assert len(daemon.json("list")["rules"]) == len(added)


# --- malformed frames between our own processes -----------------------------------------------------------------------


def test_malformed_frames_from_a_worker_are_counted_and_the_system_forwards_on(
    daemon: Daemon, line: RelayLine, borrow: Callable[[int, int], socket.socket]
) -> None:
    """Written into the worker's own ends, as a worker gone mad would."""
    pids = daemon.pids()
    daemon.run("add", "239.1.1.1:5000%in0", "239.2.2.2:6000%out0", "--name", "feed")
    for name in ("control", "data/0"):
        for fd in _channels(pids[name]):
            with borrow(pids[name], fd) as end:
                end.setblocking(True)
                end.sendall(MALFORMED["not JSON"] + MALFORMED["bad UTF-8"] + MALFORMED["unknown type"])
                end.sendall(MALFORMED["oversized"])
                with open("/dev/null") as null:
                    socket.send_fds(end, [MALFORMED["wrong type of a field"]], [null.fileno()] * 2)
    channels = len(_channels(pids["control"])) + len(_channels(pids["data/0"]))

    def counted() -> int:
        processes = daemon.json("workers")["processes"]
        return sum(p["frames_malformed"] for p in processes)

    wait_until(lambda: counted() == 5 * channels, 10, f"{counted()} malformed frames were counted")
    assert daemon.pids() == pids, "a process was taken down"
    assert re.search("malformed frame on (supervisor|request|command)_sock of", daemon.log)
    daemon.run("remove", "feed")
    daemon.run("add", "239.1.1.1:5000%in0", "239.2.2.2:6000%out0")


def _channels(pid: int) -> list[int]:
    """The worker's ends of its channels to the supervisor: FD 3 and what came over it. asyncio's own pair comes first
    among the other sockets, made before the first message is read."""
    sockets = sorted(fd for fd, link in descriptors(pid).items() if link.startswith("socket:"))
    comm = Path(f"/proc/{pid}/comm").read_text().strip()
    return [sockets[0], *sockets[3 : 5 if comm == "mcrelay-data" else 4]]


@pytest.fixture
def borrow() -> Callable[[int, int], socket.socket]:
    """A duplicate of another process's descriptor (pidfd_getfd(2))."""

    libc = ctypes.CDLL(None, use_errno=True)

    def duplicate(pid: int, fd: int) -> socket.socket:
        pidfd = os.pidfd_open(pid)
        try:
            got = libc.syscall(438, pidfd, fd, 0)
            assert got >= 0, os.strerror(ctypes.get_errno())
            return socket.socket(fileno=got)
        finally:
            os.close(pidfd)

    return duplicate

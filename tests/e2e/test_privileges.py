"""Who may do what: read back from the kernel, from outside of the processes."""

from __future__ import annotations

import contextlib
import itertools
import os
import pwd
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lab.daemon import Daemon, answers, settled
from lab.namespaces import wait_until
from lab.plan import ReceivePlan, SendPlan
from lab.program import PROGRAM
from lab.topology import RelayLine
from lab.traffic import run_sender, start_receiver
from mcrelay.client import Client
from mcrelay.errors import Error, NotPermitted
from tests.e2e.conftest import StartDaemon

INPUT = "239.1.1.1:5000"
OUTPUT = "239.2.2.2:6000"
NOBODY = pwd.getpwnam("nobody")


def status(pid: int) -> dict[str, str]:
    with open(f"/proc/{pid}/status") as file:
        return dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)


def descriptors(pid: int) -> dict[int, str]:
    directory = f"/proc/{pid}/fd"
    links: dict[int, str] = {}
    for fd in os.listdir(directory):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            links[int(fd)] = os.readlink(f"{directory}/{fd}")
    return links


def all_ready(daemon: Daemon) -> bool:
    """Also the spare, which has dropped its privileges then."""
    processes = daemon.json("workers")["processes"]
    return processes[-1]["role"] == "spare" and all(process["state"] == "ready" for process in processes)


def test_workers_have_no_privilege_at_all(daemon: Daemon) -> None:
    wait_until(lambda: all_ready(daemon), 10)
    for name, pid in daemon.pids().items():
        if name == "supervisor":
            continue
        facts = status(pid)
        assert facts["Uid"].split() == [str(NOBODY.pw_uid)] * 4, name
        assert facts["Gid"].split() == [str(NOBODY.pw_gid)] * 4, name
        assert facts["Groups"].split() == [], name
        for capabilities in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
            assert int(facts[capabilities], 16) == 0, (name, capabilities)
        assert facts["NoNewPrivs"] == "1", name
    shown = {p["pid"]: p for p in daemon.json("workers")["processes"]}
    for name, pid in daemon.pids().items():
        assert shown[pid]["uid"] == int(status(pid)["Uid"].split()[1]), name
        assert shown[pid]["capabilities"] == status(pid)["CapEff"], name
        assert shown[pid]["cores"] == status(pid)["Cpus_allowed_list"], name


def test_a_worker_may_run_as_another_user(start: StartDaemon) -> None:
    daemon = start("--user", "daemon")
    assert status(daemon.pids()["control"])["Uid"].split()[1] == str(pwd.getpwnam("daemon").pw_uid)


def test_each_process_has_the_descriptors_it_should_and_no_other(daemon: Daemon, line: RelayLine) -> None:
    workers = sum(1 for name in daemon.pids() if name.startswith("data/"))
    daemon.run("add", f"{INPUT}%in0", f"{OUTPUT}%out0")
    wait_until(lambda: all_ready(daemon), 10)
    packet = _packet_inodes(line)
    assert len(packet) == workers
    seen: list[str] = []
    for name, pid in daemon.pids().items():
        links = descriptors(pid)
        kinds = [re.sub(r":\[\d+\]", "", link).split(" ")[0] for link in links.values()]
        counted = {kind: kinds.count(kind) for kind in set(kinds)}
        inodes = {match[1] for link in links.values() if (match := re.fullmatch(r"socket:\[(\d+)\]", link))}
        if name.startswith("data/"):
            # supervisor_sock, request_sock, command_sock, one packet socket, one egress socket; asyncio's own pair.
            assert counted["socket"] == 3 + 2 + 2, links
            assert len(inodes & packet) == 1
            seen += inodes & packet
            assert "socket" in links[3]
        elif name == "control":
            # supervisor_sock, request_sock, asyncio's own pair, and at most this very client.
            assert counted["socket"] in (4, 5), links
            assert not inodes & packet
        elif name == "spare":
            # supervisor_sock, asyncio's own pair.
            assert counted["socket"] == 1 + 2, links
            assert not inodes & packet
        else:
            assert inodes & packet == packet
        if name != "supervisor":
            files = {link for link in links.values() if link.startswith("/")}
            assert files <= {"/dev/null", "/memfd:mcrelay-counters (deleted)"}, links
    assert sorted(seen) == sorted(packet)  # each worker its own


def _packet_inodes(line: RelayLine) -> set[str]:
    """Of packet sockets that are bound to an interface; the supervisor has some in stock that are not."""
    lines = line.relay.run("cat", "/proc/net/packet").stdout.strip().split("\n")[1:]
    return {entry.split()[-1] for entry in lines if entry.split()[4] != "0"}


def test_standard_streams_that_were_closed_lead_nowhere(line: RelayLine, tmp_path: Path) -> None:
    """Else a socket would have their numbers, in the supervisor and in workers, and the log would go into it."""
    path = tmp_path / "control.sock"
    with line.relay.popen("sh", "-c", f'exec "{PROGRAM}" run --socket "{path}" --workers 1 0<&- 1>&- 2>&-') as process:
        try:
            wait_until(lambda: answers(str(path)), 20, "it does not answer")
            with Client(path) as client:
                pids = [found.pid for found in client.workers() if found.pid is not None]
            assert len(pids) >= 3
            for pid in pids:
                assert {os.readlink(f"/proc/{pid}/fd/{number}") for number in range(3)} == {"/dev/null"}, pid
        finally:
            process.terminate()
        assert process.wait(20) == 0


def test_the_control_plane_cannot_write_the_counters(daemon: Daemon) -> None:
    """Its descriptor is read-only, and the file behind it cannot be opened again for writing by who it runs as."""
    control = daemon.pids()["control"]
    pages = [fd for fd, link in descriptors(control).items() if "mcrelay-counters" in link]
    assert pages
    for fd in pages:
        path = f"/proc/{control}/fd/{fd}"
        with open(f"/proc/{control}/fdinfo/{fd}") as file:
            flags = int(dict(line.split(":\t") for line in file if "flags" in line)["flags"].strip(), 8)
        assert flags & os.O_ACCMODE == os.O_RDONLY
        assert os.stat(path).st_mode & 0o777 == 0o400
        assert os.stat(path).st_uid == 0


def test_the_control_plane_connects_to_nothing(line: RelayLine, tmp_path: Path) -> None:
    """Seen by strace: through clients, changes and its whole work it makes no socket, no connection, opens no file."""
    with Daemon(line.relay) as daemon:  # not with --debug, for which asyncio reads its own source
        trace_control_plane(daemon, tmp_path)


def trace_control_plane(daemon: Daemon, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    pid = daemon.pids()["control"]
    strace = subprocess.Popen(
        ["strace", "-f", "-p", str(pid), "-o", str(trace), "-e", "trace=network,open,openat,execve,recvmsg"],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert strace.stderr
        assert "attached" in strace.stderr.readline()
        daemon.run("add", f"{INPUT}%in0", f"{OUTPUT}%out0", "--name", "feed")
        daemon.run("list")
        daemon.run("stats")
        daemon.run("workers")
        daemon.run("add", "rubbish", f"{OUTPUT}%out0", check=False)
        daemon.run("remove", "feed")
    finally:
        strace.send_signal(signal.SIGINT)
        strace.wait(10)
        assert strace.stderr
        strace.stderr.close()
    calls = set(re.findall(r"^\d+\s+(\w+)\(", trace.read_text(), re.MULTILINE))
    # The command came in over FD 3 and went out over request_sock.
    assert "recvmsg" in calls
    assert re.search(r"recvmsg\(3, ", trace.read_text())
    assert not calls & {"connect", "socket", "bind", "listen", "accept", "accept4", "open", "openat", "execve"}, calls


def as_nobody(function: Callable[[], str]) -> str:
    """What the function returns in a process of user nobody, without groups."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setgid(NOBODY.pw_gid)
            os.setuid(NOBODY.pw_uid)
            os.write(writing, function().encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading) as file:
        said = file.read()
    os.waitpid(pid, 0)
    return said


def test_a_user_without_permission_is_told_so(daemon: Daemon) -> None:
    def connect() -> str:
        try:
            Client(daemon.socket)
        except NotPermitted as error:
            return f"{error.exit_code} {error}"
        return "connected"

    said = as_nobody(connect)
    assert said.startswith(f"77 not permitted to use {daemon.socket}; become root"), said


def test_a_stranger_is_refused_even_where_the_mode_lets_him_in(daemon: Daemon) -> None:
    """The kernel's word on who connects decides, not the file's mode alone."""
    os.chmod(daemon.socket, 0o666)

    def ask() -> str:
        try:
            with Client(daemon.socket, timeout_s=5) as client:
                client.ping()
        except Error as error:
            return f"{error.code} {error}"
        return "answered"

    said = as_nobody(ask)
    assert said.startswith("not_permitted user 65534"), said
    daemon.run("ping")


def test_workers_run_where_their_user_cannot_read_the_code(
    start: StartDaemon, line: RelayLine, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """As in a clone in root's home: the code is imported before privileges go."""
    private = tmp_path_factory.mktemp("private", numbered=True)
    (private / "venv").symlink_to(Path(sys.executable).parent.parent)
    private.chmod(0o700)
    daemon = start(program=(str(private / "venv" / "bin" / "python"), "-m", "mcrelay"))
    daemon.run("add", f"{INPUT}%in0", f"{OUTPUT}%out0")
    receiver = start_receiver(line.receiver, ReceivePlan(OUTPUT, interface="eth0", count=100, expect=100))
    run_sender(line.sender, SendPlan(INPUT, interface="eth0", rate=1000, count=100))
    assert receiver.result().lost == 0


def test_a_worker_started_by_hand_says_what_it_is() -> None:
    for module, arguments in itertools.product(
        ("mcrelay.control", "mcrelay.dataplane"),
        (["65534", "65534"], [], ["65534", "65534", "0"], ["nobody", "nobody"]),
    ):
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 64
        assert "not to be started by hand" in done.stderr
        assert len(done.stderr.splitlines()) == 1


# --- where io_uring is missing --------------------------------------------------------------------------------------

# Runs the rest of its arguments with io_uring_setup(2) failing as it does where io_uring is disabled.
WITHOUT_IO_URING = """
import ctypes, os, struct, sys
number = 425  # io_uring_setup, the same on every architecture that has it
program = b"".join(struct.pack("=HBBI", *i) for i in [
    (0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7FFF0000)])
buffer = ctypes.create_string_buffer(program, len(program))
class Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))
description = Program(4, ctypes.addressof(buffer))
libc = ctypes.CDLL(None)
assert libc.prctl(22, 2, ctypes.byref(description)) == 0
os.execv(sys.argv[1], sys.argv[1:])
"""


def test_without_io_uring_the_reference_engine_serves_and_says_so(start: StartDaemon, line: RelayLine) -> None:
    daemon = start(program=(sys.executable, "-c", WITHOUT_IO_URING, PROGRAM))
    assert "engine uring cannot run" in daemon.log
    assert "kernel.io_uring_disabled" in daemon.log
    assert {p["engine"] for p in daemon.json("workers")["processes"] if p["role"] == "data"} == {"reference"}
    daemon.run("add", f"{INPUT}%in0", f"{OUTPUT}%out0")
    receiver = start_receiver(line.receiver, ReceivePlan(OUTPUT, interface="eth0", count=500, expect=500))
    run_sender(line.sender, SendPlan(INPUT, interface="eth0", rate=1000, count=500))
    assert receiver.result().lost == 0


def test_without_the_right_to_load_a_filter_workers_drop_what_is_for_nobody(
    start: StartDaemon, line: RelayLine
) -> None:
    daemon = start(program=("setpriv", "--bounding-set", "-bpf,-sys_admin", PROGRAM))
    daemon.run("add", f"{INPUT}%in0", f"{OUTPUT}%out0")
    daemon.wait_for_log("CAP_BPF")
    daemon.run("add", "239.1.1.2:5000%in0", f"{OUTPUT}%out1")
    receiver = start_receiver(line.receiver, ReceivePlan(OUTPUT, interface="eth0", count=500, expect=500))
    run_sender(line.sender, SendPlan(INPUT, flows=2, interface="eth0", rate=1000, count=1000))
    assert receiver.result().lost == 0
    with daemon.client() as client:
        assert settled(client)["dropped"] == {"no_rule": 500}


def test_without_io_uring_engine_uring_is_refused(line: RelayLine, tmp_path: Path) -> None:
    started = time.monotonic()
    done = line.relay.run(
        *(sys.executable, "-c", WITHOUT_IO_URING, PROGRAM, "run", "--engine", "uring"),
        *("--socket", str(tmp_path / "control.sock")),
        check=False,
        timeout=30,
    )
    assert done.returncode == 71
    last = done.stderr.strip().split("\n")[-1]
    assert last.startswith("mcrelay: engine uring cannot run: io_uring is disabled"), done.stderr
    assert "--engine reference" in last
    assert not (tmp_path / "control.sock").exists()
    assert time.monotonic() - started < 20
    wait_until(lambda: not [p for p in line.relay.pids() if p != os.getpid()], 5, "workers are left")

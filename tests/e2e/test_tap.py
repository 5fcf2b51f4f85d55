"""`mcrelay trace` and `mcrelay capture`: packets of a rule, each with what became of it, for a person and for tshark.

sender 203.0.113.10 --- in0 relay out0 --- receiver
                                  out1 --- receiver1
"""

from __future__ import annotations

import json
import re
import select
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import pytest

from lab.capture import Capture, Frame, Injector
from lab.daemon import Daemon, settled
from lab.frames import ethernet_ipv4_udp
from lab.namespaces import wait_until
from lab.plan import ReceivePlan, SendPlan
from lab.program import PROGRAM
from lab.topology import RelayLine
from lab.traffic import run_sender, start_receiver
from mcrelay.errors import Error
from mcrelay.limits import TAPS_MAX
from tests.e2e.conftest import StartDaemon
from tests.e2e.test_bad_input import connect, frame, reply
from tests.e2e.test_privileges import descriptors

INPUT: Final = "239.1.1.1:5000"
OUTPUT: Final = "239.2.2.2:6000"
NOWHERE: Final = "239.2.2.3:6000%nowhere0"
DEADLINE_S: Final = 20.0
ESCAPE: Final = b"\x1b]0;owned\x07\x1b[2J\xff\r\n"

Watch = subprocess.Popen[str]


@pytest.fixture(params=["uring", "reference"])
def relay(start: StartDaemon, request: pytest.FixtureRequest) -> Daemon:
    """With a rule of which one output works."""
    daemon = start("--engine", request.param)
    daemon.run("add", f"{INPUT}%in0", f"{OUTPUT}%out0", NOWHERE, "--name", "feed")
    return daemon


@pytest.fixture
def watch() -> Iterator[Any]:
    """Start a command that watches; on return it does."""
    with ExitStack() as stack:

        def begin(daemon: Daemon, *arguments: str) -> Watch:
            before = sockets_of_workers(daemon)
            started = subprocess.Popen(
                [PROGRAM, *arguments, "--socket", daemon.socket],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            stack.enter_context(started)
            stack.callback(started.kill)
            wait_until(lambda: sockets_of_workers(daemon) - before, 20, "no worker has a tap")
            return started

        yield begin


def sockets_of_workers(daemon: Daemon) -> set[str]:
    """What their descriptors are of. One that is about to go may be among them."""
    pids = [pid for name, pid in daemon.pids().items() if name.startswith("data/")]
    return {link for pid in pids for link in descriptors(pid).values() if link.startswith("socket:")}


def finished(process: Watch) -> tuple[str, str]:
    out, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, err
    return out, err


def inject(line: RelayLine, *payloads: bytes, group: str = "239.1.1.1") -> None:
    with Injector(line.sender, "eth0") as injector:
        for payload in payloads:
            injector.send(ethernet_ipv4_udp("203.0.113.10", group, 4000, 5000, payload, ttl=8))


def test_a_trace_shows_what_became_of_each_packet(relay: Daemon, line: RelayLine, watch: Any) -> None:
    trace = watch(relay, "trace", "feed", "--count", "2")
    as_json = watch(relay, "trace", "feed", "--json", "--count", "2")
    hexadecimal = watch(relay, "trace", "feed", "--payload", "--count", "1")
    inject(line, b"nobody's", group="239.1.1.9")
    inject(line, ESCAPE, b"second")
    out, err = finished(trace)
    text = r"203\.0\.113\.10:4000 > 239\.1\.1\.1:5000 ttl 8 length {}: forwarded to 1 of 2 outputs "
    text += rf"\({re.escape(NOWHERE)}: egress_unreachable\)"
    lines = out.splitlines()
    assert len(lines) == 2
    for shown, length in zip(lines, (28 + len(ESCAPE), 28 + len(b"second")), strict=True):
        assert re.fullmatch(rf"\d\d:\d\d:\d\d\.\d{{6}} in0 {text.format(length)}", shown), shown
    assert err == "feed: 2 packets shown\n"
    documents = [json.loads(shown) for shown in finished(as_json)[0].splitlines()]
    assert [bytes.fromhex(document["data"])[28:] for document in documents] == [ESCAPE, b"second"]
    assert documents[0] | {"time_ns": 0, "worker": 0, "data": ""} == {
        "time_ns": 0,
        "worker": 0,
        "interface": "in0",
        "source": "203.0.113.10",
        "source_port": 4000,
        "destination": "239.1.1.1",
        "destination_port": 5000,
        "protocol": 17,
        "ttl": 8,
        "dscp": 0,
        "vlan": 0,
        "length": 28 + len(ESCAPE),
        "datagrams": 1,
        "verdict": "forwarded",
        "outputs": 2,
        "copies": 1,
        "dropped": [{"output": NOWHERE, "reason": "egress_unreachable"}],
        "data": "",
    }
    out, _err = finished(hexadecimal)
    assert out.replace("\n", "").isprintable()
    assert ".]0;owned..[2J.." in out
    # Without an output that works.
    with relay.client() as client:
        client.change([(f"{INPUT}%in0", [NOWHERE], "feed")], ["feed"])
    trace = watch(relay, "trace", "feed", "--count", "1")
    inject(line, b"third")
    assert finished(trace)[0].endswith(": dropped: egress_unreachable\n")
    with relay.client() as client:
        assert settled(client)["dropped"]["egress_unreachable"] == 1


def read_capture(path: Path, *fields: str) -> list[list[str]]:
    """Of each packet these fields, as tshark understands the file."""
    if not shutil.which("tshark"):
        pytest.skip("no tshark here")
    done = subprocess.run(
        ["tshark", "-n", "-r", str(path), "-T", "fields", *(word for field in fields for word in ("-e", field))],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "cut short" not in done.stderr
    return [shown.split("\t") for shown in done.stdout.splitlines()]


def _if_twenty(frames: list[Frame]) -> list[Frame]:
    return frames if len(frames) == 20 else []


def test_a_capture_is_read_by_others(relay: Daemon, line: RelayLine, watch: Any, tmp_path: Path) -> None:
    path, short = tmp_path / "feed.pcapng", tmp_path / "short.pcapng"
    path.write_bytes(b"of yesterday" * 1000)
    capture = watch(relay, "capture", "feed", "-w", str(path))
    counted = watch(relay, "capture", "feed", "-w", str(short), "--count", "3", "--snap-length", "30")
    with Capture(line.relay, "in0") as seen:
        inject(line, *(b"%02d" % number * 50 for number in range(20)))
        frames = wait_until(lambda: _if_twenty(seen.matching(lambda frame: frame.udp)), 5)
    finished(counted)
    comment = f"forwarded to 1 of 2 outputs ({NOWHERE}: egress_unreachable)"
    wait_until(lambda: path.read_bytes().count(comment.encode()) == 20, 10, "packets are not written as they come")
    capture.send_signal(signal.SIGINT)
    assert finished(capture)[1] == "feed: 20 packets written\n"
    fields = ("frame.interface_name", "frame.len", "frame.cap_len", "ip.src", "ip.dst", "udp.dstport", "ip.ttl", "data")
    shown = read_capture(path, *fields, "frame.comment", "frame.time_epoch")
    sent = [frame.data[14 : 14 + 128] for frame in frames]
    assert [row[:9] for row in shown] == [
        ["in0", "128", "128", "203.0.113.10", "239.1.1.1", "5000", "8", data[28:].hex(), comment] for data in sent
    ]
    times = [float(row[9]) for row in shown]
    assert times == sorted(times)
    assert read_capture(short, "frame.len", "frame.cap_len", "frame.number") == [
        ["128", "30", str(n)] for n in (1, 2, 3)
    ]


def test_a_capture_may_go_through_a_pipe_and_has_a_time(daemon: Daemon, line: RelayLine, tmp_path: Path) -> None:
    daemon.run("add", f"{INPUT}%in0", f"{OUTPUT}%out0", "--name", "feed")
    path = tmp_path / "piped.pcapng"
    with path.open("wb") as file:
        done = subprocess.run(
            [PROGRAM, "capture", "feed", "-w", "-", "--seconds", "0.5", "--socket", daemon.socket],
            stdout=file,
            stderr=subprocess.PIPE,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
    assert (done.returncode, done.stderr) == (0, "feed: 0 packets written\n")
    assert read_capture(path, "frame.number") == []


def test_what_cannot_be_tapped_or_written_is_refused(daemon: Daemon, tmp_path: Path) -> None:
    daemon.run("add", f"{INPUT}%in0", f"{OUTPUT}%out0", "--name", "feed")
    path = tmp_path / "kept"
    path.write_text("kept")
    for refused, code, word in (
        (("trace", "nothing"), 65, "no rule is called 'nothing'"),
        (("capture", "nothing", "-w", str(path)), 65, "no rule is called 'nothing'"),
        (("capture", "feed", "-w", str(tmp_path)), 74, "Is a directory"),
        (("capture", "feed", "-w", "/dev/full", "--count", "1"), 74, "No space left"),
    ):
        done = daemon.run(*refused, check=False)
        assert (done.returncode, done.stdout) == (code, "")
        assert re.fullmatch(rf"mcrelay: .*{re.escape(word)}.*; .+\n", done.stderr), done.stderr
    assert path.read_text() == "kept"


def test_a_client_that_does_not_read_delays_nothing_and_is_told_what_it_missed(
    start: StartDaemon, line: RelayLine
) -> None:
    daemon = start("--workers", "1")
    daemon.run("add", f"{INPUT}%in0", f"{OUTPUT}%out0", "--name", "feed")
    count = 10_000
    receiver = start_receiver(line.receiver, ReceivePlan(OUTPUT, interface="eth0", count=count, expect=count))
    with ExitStack() as stack:
        stalled = [stack.enter_context(connect(daemon)) for _ in range(TAPS_MAX)]
        for sock in stalled:
            sock.sendall(frame(b'{"type":"start_tap","id":1,"rule":"feed"}'))
            assert reply(sock)["type"] == "tap_started"
        with daemon.client() as client, pytest.raises(Error, match=f"{TAPS_MAX} taps are open") as refusal:
            client.tap("feed")
        assert refusal.value.code == "busy"
        run_sender(line.sender, SendPlan(INPUT, interface="eth0", rate=5000, count=count, size=1200))
        report = receiver.result()
        assert (report.received, report.lost) == (count, 0)
        # Each has what it could hold, and the number of the rest.
        seen, lost, injected = what_it_saw(stalled[0], line)
        assert 0 < seen < count
        assert count < seen + lost <= count + injected
    wait_until(lambda: can_tap(daemon), 20, "taps are not closed with their clients")


def what_it_saw(sock: socket.socket, line: RelayLine) -> tuple[int, int, int]:
    """Packets seen and lost up to one that is recognised, and how many such were sent to see one."""
    seen = injected = 0
    while True:
        if not select.select([sock], [], [], 0.2)[0]:
            inject(line, b"last")
            injected += 1
            continue
        message: dict[str, Any] = reply(sock)
        seen += len(message["packets"])
        if message["packets"][-1]["length"] == 28 + len(b"last"):
            return seen, message["lost"], injected


def can_tap(daemon: Daemon) -> bool:
    with daemon.client() as client:
        try:
            client.tap("feed").close()  # type: ignore[attr-defined] # a generator
        except Error:
            return False
    return True


def test_a_tap_ends_with_its_rule_its_worker_and_the_daemon(start: StartDaemon, line: RelayLine, watch: Any) -> None:
    daemon = start("--workers", "1")
    daemon.run("add", f"{INPUT}%in0", f"{OUTPUT}%out0", "--name", "feed")

    def ended(process: Watch, code: int, word: str) -> None:
        _out, err = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == code, err
        assert word in err, err

    trace = watch(daemon, "trace", "feed")
    daemon.run("restart-worker", "0")
    ended(trace, 75, "worker 0, which forwards by this rule, has been replaced; start it again")
    trace = watch(daemon, "trace", "feed")
    daemon.run("remove", "feed")
    ended(trace, 65, "the rule has been removed")
    daemon.run("add", f"{INPUT}%in0", f"{OUTPUT}%out0", "--name", "feed")
    trace = watch(daemon, "trace", "feed")
    daemon.upgrade()
    trace.communicate(timeout=DEADLINE_S)
    assert trace.returncode in (69, 75)  # by the connection that ends, or by the worker that goes, whichever is first
    trace = watch(daemon, "trace", "feed", "--count", "1")
    inject(line, b"after the upgrade")
    finished(trace)

"""The plans of test traffic, and what `mcrelay send` and `mcrelay receive` refuse, each in one line that says why."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from dataclasses import fields
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab import payload
from lab.program import PROGRAM, run_program
from mcrelay import traffic
from mcrelay.errors import Error, UsageError
from mcrelay.net.traffic_sockets import pack_addresses
from mcrelay.traffic import ReceivePlan, ReceiveReport, SendPlan, SendReport, Target

GROUP = "239.1.1.1:5000"

addresses = st.ip_addresses().filter(lambda address: getattr(address, "scope_id", None) is None)
interfaces = st.none() | st.from_regex(r"[a-z0-9_.\-]{1,15}", fullmatch=True)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_program(arguments, timeout=20)


# --- plans -----------------------------------------------------------------------------------------------------------


@given(addresses, st.integers(1, 65535), interfaces)
def test_a_target_survives_its_text(address: IPv4Address | IPv6Address, port: int, interface: str | None) -> None:
    target = Target(address, port, interface)
    assert Target.parse(str(target)) == target


@given(st.text(max_size=40).filter(lambda text: not text.startswith("[") and text.count(".") < 3))
def test_any_other_text_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(UsageError, match=r"^target [^\n]+; [^\n]+$"):
        Target.parse(text)


@given(st.integers(1, 10_000), st.integers(1, 65535), st.sampled_from(["port", "group"]))
def test_flows_count_up_or_do_not_fit(flows: int, port: int, step: str) -> None:
    try:
        targets = ReceivePlan(f"239.255.255.1:{port}", flows=flows, flow_step=step).targets
    except UsageError:
        assert port + flows > 65536 if step == "port" else flows > 255
        return
    assert len({(target.address, target.port) for target in targets}) == flows
    last = targets[-1]
    assert (int(last.address) - int(IPv4Address("239.255.255.1")), last.port - port) == (
        (0, flows - 1) if step == "port" else (flows - 1, 0)
    )


@given(st.integers(24, payload.SIZE_MAX))
def test_as_many_segments_as_fit(size: int) -> None:
    plan = SendPlan(GROUP, size=size)
    assert 1 <= plan.segments_most <= 64
    assert plan.segments_most * size <= payload.SIZE_MAX
    assert plan.segments_most == 64 or (plan.segments_most + 1) * size > payload.SIZE_MAX


def test_addresses_are_the_kernels() -> None:
    packed = pack_addresses(SendPlan(GROUP, flows=2).targets)
    assert packed[:8] == socket.AF_INET.to_bytes(2, sys.byteorder) + b"\x13\x88\xef\x01\x01\x01"
    assert len(packed) == 32
    assert packed[18:20] == b"\x13\x89"
    ipv6 = pack_addresses(SendPlan("[ff3e::1]:5000%lo", flows=2).targets)
    assert len(ipv6) == 2 * 28
    assert ipv6[2:8] == b"\x13\x88\0\0\0\0"
    assert ipv6[8:24] == socket.inet_pton(socket.AF_INET6, "ff3e::1")
    assert ipv6[24:28] == socket.if_nametoindex("lo").to_bytes(4, sys.byteorder)


@pytest.mark.parametrize("plan", [SendPlan, ReceivePlan])
def test_a_plan_from_a_program_is_checked_as_one_from_the_command_line(plan: type[Any]) -> None:
    with pytest.raises(UsageError):
        plan(GROUP, flows=0)
    with pytest.raises(UsageError):
        plan(GROUP, flow_step="address")
    with pytest.raises(UsageError):
        plan(GROUP, duration_s=float("nan"))


# --- refusals --------------------------------------------------------------------------------------------------------

REFUSED: list[tuple[str, int, str]] = [
    # arguments, exit code, part of the message
    ("send 239.1.1.1", 64, "has no port; write ADDRESS:PORT[%INTERFACE]"),
    ("send 239.1.1.1:0", 64, "port '0' is not possible"),
    ("send 239.1.1.1:65536", 64, "use a number from 1 to 65535"),
    ("send 239.1.1:5000", 64, "'239.1.1' is not an IP address"),
    ("send ff3e::1:5000", 64, "stands in brackets"),
    ("send [239.1.1.1]:5000", 64, "stands in brackets"),
    ("send [ff3e::1]:5000", 64, "name one: %INTERFACE"),
    ("receive [ff3e::1]:5000", 64, "name one: %INTERFACE"),
    ("send [fe80::1]:5000", 64, "name one: %INTERFACE"),
    ("send 0.0.0.0:5000", 64, "cannot send to 0.0.0.0"),
    ("send 239.1.1.1:5000%nonsense", 64, "there is no interface 'nonsense'; this host has lo"),
    ("receive 239.1.1.1:5000%nonsense", 64, "there is no interface 'nonsense'; this host has lo"),
    ("send 239.1.1.1:5000%", 64, "is not an interface name"),
    ("send 239.1.1.1:5000%sixteen-letters-", 64, "is not an interface name"),
    ("send 239.1.1.1:5000%lo --size 23", 64, "--size 23 is not possible; use 24 to 65507"),
    ("send 239.1.1.1:5000%lo --size 35 --rtp", 64, "use 36 to 65507"),
    ("send 239.1.1.1:5000%lo --size 65508", 64, "use 24 to 65507"),
    ("send 239.1.1.1:5000%lo --rate -1", 64, "use 0 (no limit) to"),
    ("send 239.1.1.1:5000%lo --rate nan", 64, "use 0 (no limit) to"),
    ("send 239.1.1.1:5000%lo --rate fast", 64, "'fast' is not a valid float"),
    ("send 239.1.1.1:5000%lo --count 0", 64, "--count 0 is not possible"),
    ("send 239.1.1.1:5000%lo --duration 0", 64, "--duration 0 is not possible"),
    ("send 239.1.1.1:5000%lo --duration inf", 64, "--duration inf is not possible"),
    ("send 239.1.1.1:5000%lo --ttl 256", 64, "use 1 to 255"),
    ("send 239.1.1.1:5000%lo --flows 0", 64, "use 1 to 10000"),
    ("send 239.1.1.1:5000%lo --flows 10001", 64, "use 1 to 10000"),
    ("send 239.1.1.1:65530%lo --flows 10", 64, "use a port of at most 65526, or --flow-step group"),
    ("receive 239.1.1.1:65530%lo --flows 10", 64, "use a port of at most 65526, or --flow-step group"),
    ("send 239.255.255.250:5000%lo --flows 10 --flow-step group", 64, "use a lower address, or --flow-step port"),
    ("send 255.255.255.250:5000%lo --flows 10 --flow-step group", 64, "use a lower address, or --flow-step port"),
    ("send 239.1.1.1:5000%lo --flow-step address", 64, "'address' is not one of"),
    ("send 239.1.1.1:5000%lo --flow-id 4294967296", 64, "use 0 to 4294967295"),
    ("send 239.1.1.1:5000%lo --flow-id 4294967295 --flows 2", 64, "use 0 to 4294967294"),
    ("send 239.1.1.1:5000%lo --segments 65", 64, "use 1 to 64"),
    ("send 239.1.1.1:5000%lo --segments 8 --size 9000", 64, "use 1 to 7"),
    ("send 239.1.1.1:5000%lo --burst 0", 64, "--burst 0 is not possible"),
    ("send 239.1.1.1:5000%lo --source somebody", 64, "'somebody' is not an IP address"),
    ("send 239.1.1.1:5000%lo --source ::1", 64, "differ in IP version"),
    ("send 239.1.1.1:5000%lo --source 192.0.2.77", 64, "no address of this host"),
    ("send 127.0.0.1:5000 --source 192.0.2.77", 64, "no address of this host"),
    ("send 239.1.1.1:5000%lo --core 4096", 64, "--core 4096 is not there for us; use one of"),
    ("send 255.255.255.255:5000 --count 1", 77, "broadcast"),
    ("receive 192.0.2.77:5000", 64, "no address of this host"),
    ("receive 239.1.1.1:5000%lo --count 0", 64, "--count 0 is not possible"),
    ("receive 239.1.1.1:5000%lo --expect -1", 64, "--expect -1 is not possible"),
    ("receive 239.1.1.1:5000%lo --idle 0", 64, "--idle 0 is not possible"),
    ("receive 239.1.1.1:5000%lo --linger -1", 64, "--linger -1 is not possible"),
    ("receive", 64, "Missing argument 'TARGET'"),
]


@pytest.mark.parametrize(("arguments", "exit_code", "words"), REFUSED, ids=[row[0] for row in REFUSED])
def test_bad_input_is_refused(arguments: str, exit_code: int, words: str) -> None:
    result = run(*arguments.split())
    assert (result.returncode, result.stdout) == (exit_code, ""), result.stderr
    assert re.fullmatch(r"mcrelay: [^\n]+; [^\n]+\n", result.stderr)
    assert words in result.stderr


def test_a_port_in_use_is_refused() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.1", 0))
        result = run("receive", f"127.0.0.1:{taken.getsockname()[1]}")
    assert (result.returncode, result.stdout) == (71, "")
    assert "'ss -lunp' shows which" in result.stderr


def test_more_sockets_than_may_be_open_are_refused() -> None:
    command = f"ulimit -n 200; exec {PROGRAM} receive 127.0.0.1:20000 --flows 300"
    result = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=20, check=False)
    assert (result.returncode, result.stdout) == (71, "")
    assert "300 flows take 300 sockets, and 136 may be opened; allow more open files" in result.stderr


def test_other_commands_do_not_load_it() -> None:
    code = "import sys, mcrelay.cli; print([name for name in sys.modules if 'mcrelay' in name and 'traffic' in name])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "['mcrelay.cli_traffic']\n"


# --- on this host alone ----------------------------------------------------------------------------------------------

SEND_FIELDS = [
    "sent",
    "bytes",
    "seconds",
    "rate",
    "bits_per_second",
    "retried",
    "postponed_s",
    "segments",
    "segments_refused",
    "ended",
]
RECEIVE_FIELDS = [
    "received",
    "expected",
    "lost",
    "reordered",
    "duplicated",
    "late",
    "corrupted",
    "foreign",
    "overrun",
    "clock_skew",
    "flows",
    "bytes",
    "seconds",
    "rate",
    "bits_per_second",
    "latency_p50_us",
    "latency_p90_us",
    "latency_p99_us",
    "latency_p999_us",
    "latency_max_us",
    "jitter_us",
    "ended",
]


def test_field_names_are_those_that_are_documented() -> None:
    document = (Path(__file__).resolve().parents[2] / "docs" / "traffic.md").read_text()
    for report, names in ((SendReport, SEND_FIELDS), (ReceiveReport, RECEIVE_FIELDS)):
        assert [field.name for field in fields(report)] == names
        assert [name for name in names if f"| `{name}` |" not in document] == []


def test_events_as_json_lines() -> None:
    """Over the loopback, to a port where nobody else is."""
    with subprocess.Popen(
        [PROGRAM, "receive", "127.0.0.1:47011", "--count", "40", "--duration", "20", "--json"],
        stdout=subprocess.PIPE,
        text=True,
    ) as receiver:
        assert receiver.stdout
        ready = json.loads(receiver.stdout.readline())
        sent = run("send", "127.0.0.1:47011", "--count", "40", "--rate", "0", "--size", "100", "--json")
        report = json.loads(receiver.stdout.readline())
        assert receiver.stdout.read() == ""
    assert receiver.returncode == 0
    assert list(ready) == ["event", "target", "flows", "sockets", "receive_buffer"]
    assert list(report) == ["event", *RECEIVE_FIELDS]
    assert {name: report[name] for name in ("event", "received", "lost", "bytes", "flows", "ended")} == {
        "event": "report",
        "received": 40,
        "lost": 0,
        "bytes": 4000,
        "flows": 1,
        "ended": "count",
    }
    first, last = map(json.loads, sent.stdout.splitlines())
    assert list(first) == ["event", "target", "flows", "segments_max"]
    assert list(last) == ["event", *SEND_FIELDS]
    assert (last["sent"], last["bytes"], last["segments"], last["ended"]) == (40, 4000, 40, "count")


def test_a_table_for_people() -> None:
    with subprocess.Popen(
        [PROGRAM, "receive", "127.0.0.1:47012", "--count", "3", "--duration", "20", "--progress"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as receiver:
        assert receiver.stderr
        assert receiver.stdout
        assert receiver.stderr.readline() == "receiving from 127.0.0.1:47012; Ctrl-C ends\n"
        sent = run("send", "127.0.0.1:47012", "--count", "3")
        table = receiver.stdout.read()
    assert re.search(r"^sent +3 in [\d.]+ s \(count\)$", sent.stdout, re.MULTILINE)
    assert sent.stderr == ""
    assert re.search(r"^received +3 of 3 in [\d.]+ s \(count\)$", table, re.MULTILINE)
    for line in ("lost         0", "reordered    0", "duplicated   0", "corrupted    0"):
        assert line in table.splitlines()
    assert re.search(r"^latency, us  p50 [\d.,]+  p90 ", table, re.MULTILINE)


def test_an_unexpected_argument_of_the_core_is_an_error_not_a_crash() -> None:
    from array import array

    from mcrelay import _traffic

    with pytest.raises(OSError, match="Invalid argument"):
        _traffic.Collector(array("i", [0]), flows=0, rtp=False)
    with pytest.raises(OSError, match="Bad file descriptor"):
        _traffic.Collector(array("i", [-1]), flows=1, rtp=False)
    options = {"count": 1, "duration_ns": 0, "rate": 0.0, "flow_id": 0, "size": 100, "segments": 1, "burst": 1}
    with pytest.raises(OSError, match="Invalid argument"):
        _traffic.Generator(-1, b"", flows=2, rtp=False, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="are not 2 addresses"):
        _traffic.Generator(-1, b"123", flows=2, rtp=False, **options)  # type: ignore[arg-type]
    with pytest.raises(OSError, match="Bad file descriptor"):
        _traffic.Generator(-1, b"", flows=1, rtp=False, **options).run(1)  # type: ignore[arg-type]


def test_the_kernels_refusals_have_a_remedy() -> None:
    import errno

    for number in errno.errorcode:
        refusal: Error = traffic._send_refusal(OSError(number, "refused"), SendPlan(GROUP))
        assert refusal.hint

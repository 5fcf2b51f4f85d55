r"""`mcrelay send` and `mcrelay receive` across a cable between two namespaces; and datagrams made here in their form.

+--------------------+     +--------------------+
| a                  |     |                  b |
|  eth0 192.0.2.1/24 +-----+ eth0 192.0.2.2/24  |
|  2001:db8::1/64    |     |    2001:db8::2/64  |
+--------------------+     +--------------------+
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from lab.capture import Capture, Injector
from lab.frames import ethernet_ipv4_udp
from lab.namespaces import Lab, Namespace, unsupported, wait_until
from lab.payload import PATTERN, parse, payload, rtp_header
from lab.program import PROGRAM

GROUP = "239.1.1.1:5000%eth0"
A_ADDRESS, B_ADDRESS = "192.0.2.1", "192.0.2.2"

DEADLINE_S = 20  # of a receiver that waits in vain

Pair = tuple[Namespace, Namespace]
Report = dict[str, Any]


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    if reason := unsupported():
        pytest.skip(reason)
    with Lab() as lab:
        yield connected(lab)


def connected(lab: Lab, **options: Any) -> Pair:
    a, b = lab.namespace("a", ipv6=True), lab.namespace("b", ipv6=True)
    lab.veth(a, "eth0", b, "eth0", address_a=f"{A_ADDRESS}/24", address_b=f"{B_ADDRESS}/24", **options)
    a.ip("address", "add", "2001:db8::1/64", "dev", "eth0")
    b.ip("address", "add", "2001:db8::2/64", "dev", "eth0")
    return a, b


class Receiver:
    """`mcrelay receive` that is ready."""

    def __init__(self, namespace: Namespace, *arguments: object, by: Sequence[str] = ()) -> None:
        bound = () if "--duration" in arguments else ("--duration", DEADLINE_S)
        command = (*by, PROGRAM, "receive", *arguments, *bound, "--json")
        self.process = namespace.popen(*map(str, command), stdout=subprocess.PIPE)
        self.ready = self.event()
        assert self.ready["event"] == "ready"

    def event(self) -> Report:
        assert self.process.stdout
        event: Report = json.loads(self.process.stdout.readline())
        return event

    def report(self) -> Report:
        report = self.event()
        assert self.process.wait(20) == 0
        assert report.pop("event") == "report"
        return report


def send(namespace: Namespace, *arguments: object) -> Report:
    done = namespace.run(PROGRAM, "send", *map(str, arguments), "--json", timeout=60)
    report: Report = json.loads(done.stdout.splitlines()[-1])
    return report


def inject(namespace: Namespace, datagrams: Sequence[bytes]) -> None:
    with Injector(namespace, "eth0") as injector:
        injector.send(*(ethernet_ipv4_udp(A_ADDRESS, "239.1.1.1", 4000, 5000, datagram) for datagram in datagrams))


def check(report: Report, **expected: object) -> None:
    assert {name: report[name] for name in expected} == expected, report


FAULTS = {"lost": 0, "reordered": 0, "duplicated": 0, "late": 0, "corrupted": 0, "foreign": 0}


# --- sender and receiver ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [GROUP, f"{B_ADDRESS}:5000", f"{B_ADDRESS}:5000%eth0"])
@pytest.mark.parametrize("options", [(), ("--rtp",), ("--segments", "1")], ids=" ".join)
def test_all_arrives_and_nothing_else(pair: Pair, target: str, options: tuple[str, ...]) -> None:
    a, b = pair
    rtp = options if "--rtp" in options else ()
    receiver = Receiver(b, target, "--count", 5000, *rtp)
    sent = send(a, target, "--rate", 50_000, "--count", 5000, "--size", 1000, *options)
    check(sent, sent=5000, bytes=5_000_000, ended="count", segments_refused=None)
    report = receiver.report()
    check(report, received=5000, expected=5000, bytes=5_000_000, flows=1, ended="count", clock_skew=0, **FAULTS)
    assert 0 < report["latency_p50_us"] <= report["latency_p99_us"] <= report["latency_max_us"]
    assert report["jitter_us"] >= 0


@pytest.mark.parametrize("size", [24, 36, 1472, 1473, 9000, 65507])
def test_sizes(pair: Pair, size: int) -> None:
    """Also those that the kernel fragments, and so does not take in segments."""
    a, b = pair
    receiver = Receiver(b, GROUP, "--count", 100)
    sent = send(a, GROUP, "--rate", 0, "--count", 100, "--size", size)
    check(sent, sent=100, segments=64 if size < 1024 else 44 if size == 1472 else 1)
    assert (sent["segments_refused"] is not None) == (1472 < size < 40000)
    check(receiver.report(), received=100, bytes=100 * size, **FAULTS)


@pytest.mark.parametrize("target", ["[ff3e::8000:1]:5000%eth0", "[2001:db8::2]:5000", "[2001:db8::2]:5000%eth0"])
def test_ipv6(pair: Pair, target: str) -> None:
    a, b = pair
    receiver = Receiver(b, target, "--count", 300, "--flows", 3)
    check(send(a, target, "--rate", 0, "--count", 300, "--flows", 3), sent=300)
    check(receiver.report(), received=300, flows=3, **FAULTS)


def test_ipv6_link_local(pair: Pair) -> None:
    a, b = pair
    addresses = [address for address in b.addresses["eth0"] if address.startswith("fe80:")]
    target = f"[{addresses[0].partition('/')[0]}]:5000%eth0"
    receiver = Receiver(b, target, "--count", 10)
    send(a, target, "--rate", 0, "--count", 10)
    check(receiver.report(), received=10, **FAULTS)


@pytest.mark.parametrize(("step", "limit"), [("port", None), ("group", None), ("group", 300)])
def test_a_thousand_flows(pair: Pair, step: str, limit: int | None) -> None:
    """With few descriptors, groups share sockets; ports cannot."""
    a, b = pair
    options = ("--flows", "1000", "--flow-step", step)
    shell = ("sh", "-c", f'ulimit -n {limit}; exec "$0" "$@"') if limit else ()
    receiver = Receiver(b, GROUP, "--count", 20_000, *options, by=shell)
    check(receiver.ready, flows=1000, sockets=50 if limit else 1000)
    check(send(a, GROUP, "--rate", 100_000, "--count", 20_000, "--size", 200, *options), sent=20_000)
    check(receiver.report(), received=20_000, flows=1000, overrun=0, **FAULTS)


def test_flows_do_not_mix(pair: Pair) -> None:
    """Another port, another group, and another receiver's group on the same port."""
    a, b = pair
    others = [Receiver(b, "239.1.1.2:5000%eth0"), Receiver(b, "239.1.1.1:5001%eth0")]
    receiver = Receiver(b, GROUP, "--count", 50)
    send(a, GROUP, "--rate", 0, "--count", 50)
    check(receiver.report(), received=50, **FAULTS)
    for other in others:
        other.process.terminate()
        check(other.report(), received=0, foreign=0, ended="stopped")


def test_two_senders_to_one_receiver(pair: Pair) -> None:
    a, b = pair
    receiver = Receiver(b, GROUP, "--count", 200)
    send(a, GROUP, "--rate", 0, "--count", 100, "--flow-id", 7)
    send(a, GROUP, "--rate", 0, "--count", 100, "--flow-id", 4294967295)
    check(receiver.report(), received=200, flows=2, **FAULTS)


def test_segments_and_plain_sends_are_the_same_on_the_wire() -> None:
    if reason := unsupported():
        pytest.skip(reason)
    with Lab() as lab:
        a, b = connected(lab, offloads=False)
        seen = []
        for options in (("--segments", 1), ("--segments", 5), ("--segments", 16, "--flows", 2, "--burst", 4)):
            with Capture(b, "eth0", only=lambda frame: frame.udp is not None and not frame.outgoing) as capture:
                report = send(a, GROUP, "--rate", 0, "--count", 40, "--size", 333, "--ttl", 3, *options)
                capture.wait_for(lambda frame: len(capture.udp()) == 40)
            assert (report["sent"], report["segments_refused"]) == (40, None)
            datagrams = capture.udp()
            assert {(d.source, d.destination, d.ttl, len(d.payload), d.checksum_valid) for d in datagrams} == {
                (A_ADDRESS, "239.1.1.1", 3, 333, True)
            }
            seen.append([(*parse(datagram.payload)[:2], datagram.destination_port) for datagram in datagrams])
    assert seen[0] == seen[1] == [(0, sequence, 5000) for sequence in range(40)]
    assert seen[2] == [(i // 4 % 2, i // 8 * 4 + i % 4, 5000 + i // 4 % 2) for i in range(40)]


def test_source_and_flow_id(pair: Pair) -> None:
    a, b = pair
    a.ip("address", "add", "192.0.2.77/24", "dev", "eth0")
    with Capture(b, "eth0") as capture:
        send(a, "239.1.1.1:5000", "--source", "192.0.2.77", "--flow-id", 9, "--count", 1, "--size", 100, "--rtp")
        datagram = capture.wait_for(lambda frame: frame.udp).udp
    assert datagram
    assert datagram.source == "192.0.2.77"
    flow, sequence, sent_ns = parse(datagram.payload[12:])
    assert (flow, sequence) == (9, 0)
    assert datagram.payload == payload(9, 0, 100, sent_ns, rtp=True)


# --- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sequences", "expected"),
    [
        ([0, 1, 2, 5, 6, 9], {"received": 6, "expected": 10, "lost": 4}),
        (
            [0, 1, 2, 2, 3, 5, 6, 7, 9, 8, 0],
            {"received": 9, "expected": 10, "lost": 1, "duplicated": 2, "reordered": 1},
        ),
        ([100, 101, 103], {"received": 3, "expected": 4, "lost": 1}),
        ([3, 2, 1, 0], {"received": 4, "expected": 4, "reordered": 3}),
    ],
)
def test_loss_duplicates_and_order(pair: Pair, sequences: list[int], expected: Report) -> None:
    a, b = pair
    receiver = Receiver(b, GROUP, "--progress")
    inject(a, [payload(0, sequence, 200) for sequence in sequences])
    wait_until(lambda: receiver.event()["received"] == expected["received"])
    receiver.process.send_signal(signal.SIGINT)
    while (report := receiver.event())["event"] == "progress":
        pass
    check(report, ended="stopped", **{**FAULTS, **expected})


def test_what_a_middle_drops_is_lost(pair: Pair) -> None:
    a, b = pair
    receiver = Receiver(b, GROUP, "--expect", 1100, "--idle", 2)
    inject(a, [payload(0, sequence, 100) for sequence in range(1000) if sequence % 7])
    check(receiver.report(), received=857, expected=1100, lost=243, duplicated=0, ended="idle")


def test_damage_and_strangers(pair: Pair) -> None:
    a, b = pair
    good = payload(0, 7, 200)
    damaged = bytearray(good)
    damaged[150] ^= 4
    moved = bytearray(good)
    moved[15] ^= 1  # the sequence
    receiver = Receiver(b, GROUP, "--count", 2)
    inject(a, [bytes(damaged), bytes(moved), good[:-1] + b"\0", good + b"\0", b"", b"hello", PATTERN[:200], good[:23]])
    inject(a, [good, payload(0, 8, 24)])
    check(receiver.report(), received=2, corrupted=4, foreign=4, lost=0, ended="count")


def test_a_clock_that_differs(pair: Pair) -> None:
    a, b = pair
    receiver = Receiver(b, GROUP, "--count", 3)
    inject(a, [payload(0, 0, 100, 2**62), payload(0, 1, 100, 0), payload(0, 2, 100)])
    report = receiver.report()
    check(report, received=3, clock_skew=2, corrupted=0)
    assert 0 < report["latency_p50_us"] <= report["latency_max_us"] < 60_000_000


def test_late_duplicates_are_seen_while_lingering(pair: Pair) -> None:
    a, b = pair
    receiver = Receiver(b, GROUP, "--count", 3, "--linger", 1)
    inject(a, [payload(0, sequence, 100) for sequence in (0, 1, 2, 0, 1)])
    check(receiver.report(), received=3, duplicated=2, ended="count")


def test_a_count_is_exact(pair: Pair) -> None:
    """What comes on top, even in the same batch, is not looked at."""
    a, b = pair
    receiver = Receiver(b, GROUP, "--count", 5)
    send(a, GROUP, "--rate", 0, "--count", 64)
    check(receiver.report(), received=5, expected=5, ended="count", **FAULTS)


def test_a_full_socket_is_our_own_fault(pair: Pair) -> None:
    """A receiver that is stopped (SIGSTOP) until its buffer is full."""
    a, b = pair
    receiver = Receiver(b, GROUP, "--flows", 64, "--expect", 2000)
    receiver.process.send_signal(signal.SIGSTOP)
    sent = send(a, GROUP, "--rate", 0, "--count", 2000, "--size", 1400, "--segments", 1)
    receiver.process.send_signal(signal.SIGTERM)
    receiver.process.send_signal(signal.SIGCONT)
    report = receiver.report()
    assert report["overrun"] > 0
    assert report["received"] + report["overrun"] == sent["sent"] == 2000
    check(report, lost=report["overrun"], corrupted=0, duplicated=0)


# --- RTP of strangers ------------------------------------------------------------------------------------------------


def test_any_rtp_stream(pair: Pair) -> None:
    """Two streams, one across the end of its 16-bit sequences: one lost, one twice, two exchanged; and RTCP."""
    a, b = pair
    ts = b"\x47" + bytes(187)
    one = [65533, 65534, 0, 65535, 1, 2, 2, 4]
    datagrams = [rtp_header(sequence, 3000 * n, 0xAAAA, 33) + ts * 7 for n, sequence in enumerate(one)]
    datagrams += [rtp_header(sequence, 0, 0xBBBB, 97) + b"x" for sequence in range(10, 15)]
    datagrams += [b"\x80\xc8\0\6" + bytes(24)]
    receiver = Receiver(b, GROUP, "--rtp", "--idle", 2)
    inject(a, datagrams)
    report = receiver.report()
    check(report, received=12, expected=13, lost=1, reordered=1, duplicated=1, foreign=1, flows=2, corrupted=0)
    check(report, latency_p50_us=None, latency_max_us=None, bytes=7 * (12 + 7 * 188) + 5 * 13)
    assert report["jitter_us"] > 0


# --- how it ends -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_both_with_a_report(pair: Pair, number: signal.Signals) -> None:
    a, b = pair
    receiver = Receiver(b, GROUP, "--progress")
    sender = a.popen(PROGRAM, "send", GROUP, "--rate", "2000", "--json", "--progress", stdout=subprocess.PIPE)
    wait_until(lambda: receiver.event()["received"] > 0)
    sender.send_signal(number)
    output, _ = sender.communicate(timeout=20)
    sent = json.loads(output.splitlines()[-1])
    assert (sender.returncode, sent["event"], sent["ended"]) == (0, "report", "stopped")
    wait_until(lambda: receiver.event()["received"] == sent["sent"])
    receiver.process.send_signal(number)
    while (report := receiver.event())["event"] == "progress":
        assert set(report) == {"event", "received", "lost", "duplicated", "rate", "bits_per_second"}
    check(report, received=sent["sent"], ended="stopped", **FAULTS)
    assert receiver.process.wait(20) == 0


def test_a_duration_ends_both(pair: Pair) -> None:
    a, b = pair
    receiver = Receiver(b, GROUP, "--duration", 0.7)
    check(send(a, GROUP, "--rate", 100, "--duration", 0.2), ended="duration")
    check(receiver.report(), ended="duration", lost=0)


def test_a_send_that_is_refused_is_repeated(pair: Pair) -> None:
    a, b = pair
    b.sysctl("net.ipv4.icmp_ratelimit", 0)
    sent = send(a, f"{B_ADDRESS}:5999", "--count", 100, "--segments", 1)
    assert sent["sent"] == 100
    assert sent["retried"] > 0


@pytest.mark.parametrize(
    ("target", "words"),
    [("198.51.100.7:5000", "unreachable; add a route"), ("239.1.1.1:5000%lo0", "no interface 'lo0'; this host has lo")],
)
def test_what_cannot_be_sent_says_why(pair: Pair, target: str, words: str) -> None:
    done = pair[0].run(PROGRAM, "send", target, "--count", "1", "--json", check=False)
    assert (done.returncode != 0, done.stdout) == (True, "")
    assert words in done.stderr


def test_an_interface_that_goes_down_ends_the_sender_with_a_report(pair: Pair) -> None:
    a, _b = pair
    a.ip("link", "add", "gone0", "type", "veth", "peer", "name", "gone1")
    a.ip("address", "add", "192.0.2.129/32", "dev", "gone0")
    a.ip("link", "set", "gone1", "up")
    a.ip("link", "set", "gone0", "up")
    wait_until(lambda: a.running("gone0"))
    arguments = ("send", "239.1.1.1:5000%gone0", "--json", "--progress")
    sender = a.popen(PROGRAM, *arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert sender.stdout
    assert json.loads(sender.stdout.readline())["event"] == "ready"
    assert json.loads(sender.stdout.readline())["event"] == "progress"
    a.ip("link", "delete", "gone0")
    output, errors = sender.communicate(timeout=20)
    assert sender.returncode == 71
    assert json.loads(output.splitlines()[-1])["ended"] == "error"
    assert errors.startswith("mcrelay: cannot send to 239.1.1.1:5000%gone0: ")


def test_somebody_without_privileges(pair: Pair) -> None:
    """Groups need none; a unicast socket on one interface may, and then says so."""
    a, b = pair
    code = "import os, sys, mcrelay.cli, mcrelay.traffic, mcrelay._traffic; os.setgroups([]); os.setuid(65534); "
    command = [sys.executable, "-c", code + "mcrelay.cli.main()", "receive", GROUP, "--count", "10", "--json"]
    process = b.popen(*command, stdout=subprocess.PIPE)
    assert process.stdout
    ready = json.loads(process.stdout.readline())
    assert ready["receive_buffer"] < 128 << 20
    send(a, GROUP, "--count", 10, "--rate", 0)
    report = json.loads(process.stdout.readline())
    check(report, received=10, **FAULTS)


def test_on_one_host(pair: Pair) -> None:
    """Sender and receiver of a group in the same namespace, by way of the kernel's loop."""
    a, _b = pair
    receiver = Receiver(a, GROUP, "--count", 10)
    send(a, GROUP, "--count", 10, "--rate", 0)
    check(receiver.report(), received=10, **FAULTS)

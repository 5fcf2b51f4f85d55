"""The lab itself: what the other tests stand on. Needs root; skips, and says so, without."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab.capture import Capture, Injector, inject
from lab.frames import (
    IGMP_V2_REPORT,
    IGMP_V3_REPORT,
    decode_igmp,
    decode_udp,
    ethernet_ipv4,
    ethernet_ipv4_udp,
    igmp_query,
    multicast_mac,
    udp_segment,
)
from lab.namespaces import NETNS_DIRECTORY, Lab, Namespace, sweep, unsupported, wait_until
from lab.payload import parse, payload
from lab.plan import arguments
from lab.topology import RelayLine, relay_line
from lab.traffic import ReceivePlan, SendPlan, run_sender, start_receiver, start_sender

ROOT = Path(__file__).resolve().parents[2]
GROUP = "239.1.1.1:5000"
A_ADDRESS, B_ADDRESS = "192.0.2.1", "192.0.2.2"

_reason = unsupported()
needs_namespaces = pytest.mark.skipif(_reason is not None, reason=_reason or "")


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab() as entered:
        yield entered


@pytest.fixture
def pair(lab: Lab) -> tuple[Namespace, Namespace]:
    r"""Two namespaces and a cable.

    +--------------------+     +--------------------+
    | a                  |     |                  b |
    |  eth0 192.0.2.1/24 +-----+ eth0 192.0.2.2/24  |
    +--------------------+     +--------------------+
    """
    a, b = lab.namespace("a"), lab.namespace("b")
    lab.veth(a, "eth0", b, "eth0", address_a=f"{A_ADDRESS}/24", address_b=f"{B_ADDRESS}/24")
    return a, b


def exists(name: str) -> bool:
    return (NETNS_DIRECTORY / name).exists()


def network_counter(namespace: Namespace, protocol: str, name: str) -> int:
    """A counter of /proc/net/netstat or /proc/net/snmp, which are tables of a header and a value line."""
    for file in ("netstat", "snmp"):
        lines = namespace.run("cat", f"/proc/net/{file}").stdout.splitlines()
        for names, values in zip(lines[::2], lines[1::2], strict=True):
            table = dict(zip(names.split(), values.split(), strict=True))
            if names.startswith(f"{protocol}:") and name in table:
                return int(table[name])
    raise KeyError(f"{protocol} {name}")


# --- namespaces and processes ---


@needs_namespaces
class TestLab:
    def test_namespaces_appear_and_vanish(self) -> None:
        with Lab() as lab:
            names = [lab.namespace(label).name for label in ("a", "b", "a")]
            assert len(set(names)) == 3
            assert all(exists(name) for name in names)
        assert not any(exists(name) for name in names)

    @pytest.mark.parametrize("exception", [RuntimeError, KeyboardInterrupt])
    def test_leaves_nothing_after_an_exception(self, exception: type[BaseException]) -> None:
        lab = Lab()
        namespace = lab.namespace("a")
        process = namespace.popen("sleep", "60")
        with pytest.raises(exception), lab:
            raise exception
        assert not exists(namespace.name)
        assert process.poll() == -signal.SIGTERM

    def test_ends_processes_that_ignore_sigterm_and_their_children(self) -> None:
        with Lab(term_deadline_s=0.2) as lab:
            namespace = lab.namespace("a")
            stubborn = namespace.popen("sh", "-c", "trap '' TERM; sleep 60 & echo $!; wait", stdout=subprocess.PIPE)
            assert stubborn.stdout is not None
            child = int(stubborn.stdout.readline())
            assert set(namespace.pids()) == {stubborn.pid, child}
        assert stubborn.poll() == -signal.SIGKILL
        wait_until(lambda: not Path(f"/proc/{child}/cmdline").exists() or is_zombie(child), message="child lives")

    def test_next_lab_sweeps_after_a_killed_one(self) -> None:
        program = (
            "import time; from lab.namespaces import Lab\n"
            "with Lab() as lab:\n"
            "    namespace = lab.namespace('orphaned')\n"
            "    print(namespace.name, namespace.popen('sleep', '60').pid, flush=True)\n"
            "    time.sleep(60)\n"
        )
        owner = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert owner.stdout is not None
        try:
            name, orphan = owner.stdout.readline().split()
            sweep()
            assert exists(name), "the owner is alive"
        finally:
            owner.kill()
            owner.wait(10)
            owner.stdout.close()
        assert exists(name)
        with Lab():
            assert not exists(name)
        wait_until(lambda: not Path(f"/proc/{orphan}").exists() or is_zombie(int(orphan)), message="orphan lives")

    def test_call_does_not_move_the_calling_thread(self, lab: Lab) -> None:
        namespace = lab.namespace("a")

        def here() -> str:
            return os.readlink(f"/proc/self/task/{threading.get_native_id()}/ns/net")

        before = here()
        assert namespace.call(here) != before
        assert here() == before
        with pytest.raises(ZeroDivisionError):
            namespace.call(lambda: 1 // 0)

    def test_namespace_is_configured_and_quiet(self, pair: tuple[Namespace, Namespace]) -> None:
        a, _b = pair
        assert a.addresses == {"lo": ["127.0.0.1/8"], "eth0": ["192.0.2.1/24"]}
        a.sysctl("net.ipv4.conf.eth0.rp_filter", 2)
        assert a.run("cat", "/proc/sys/net/ipv4/conf/eth0/rp_filter").stdout == "2\n"
        assert a.ifindex("eth0") > 1
        assert a.running("eth0")
        with pytest.raises(RuntimeError, match="nonsense"):
            a.ip("link", "show", "dev", "nonsense")

    def test_a_link_goes_down_with_its_peer(self, pair: tuple[Namespace, Namespace]) -> None:
        a, b = pair
        b.ip("link", "set", "eth0", "down")
        wait_until(lambda: not a.running("eth0"), message="still has a carrier")

    def test_wait_until(self) -> None:
        assert wait_until(lambda: "value") == "value"
        with pytest.raises(TimeoutError, match="never came"):
            wait_until(lambda: False, deadline_s=0.05, message="never came")


def is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


# --- traffic, of which tests/integration/test_traffic.py has more ---


@pytest.mark.parametrize(
    ("plan", "argv"),
    [
        (SendPlan(GROUP, count=5, segments=None), "send 239.1.1.1:5000 --rate 1000.0 --count 5 --size 1000 --ttl 8"),
        (SendPlan("[ff3e::1]:5000", interface="eth0", duration_s=1.5), "send [ff3e::1]:5000%eth0 --duration 1.5"),
        (SendPlan(GROUP, rate=0, flow_step="group", progress=True), "send 239.1.1.1:5000 --progress --rate 0"),
        (ReceivePlan(GROUP, core=1), "receive 239.1.1.1:5000 --core 1 --idle 1.0 --linger 0.0 --duration 60.0"),
    ],
)
def test_a_plan_is_a_command_line(plan: SendPlan | ReceivePlan, argv: str) -> None:
    written = arguments(plan)
    assert written[:2] == argv.split()[:2]
    assert set(argv.split()) <= set(written)
    assert "None" not in written


@needs_namespaces
class TestTraffic:
    @pytest.mark.parametrize("target", [GROUP, f"{B_ADDRESS}:5000"])
    def test_loses_nothing_at_50000_per_second(self, pair: tuple[Namespace, Namespace], target: str) -> None:
        a, b = pair
        count = 50_000
        receiver = start_receiver(b, ReceivePlan(target, interface="eth0", count=count, deadline_s=20))
        sent = run_sender(a, SendPlan(target, interface="eth0", rate=count, count=count, size=1000))
        report = receiver.result()
        assert (sent.sent, report.received, report.overrun) == (count, count, 0), report
        assert report.clean, report
        assert report.ended == "count"
        # The pacing never sends faster than told; how much slower is up to the machine.
        assert sent.rate <= count * 1.05

    def test_counts_what_arrives_twice_or_not_at_all(self, pair: tuple[Namespace, Namespace]) -> None:
        a, b = pair
        receiver = start_receiver(b, ReceivePlan(GROUP, interface="eth0", count=9, linger_s=0.3))
        with Injector(a, "eth0") as injector:
            for number in (0, 1, 2, 2, 3, 5, 6, 7, 9, 8, 0):
                injector.send(ethernet_ipv4_udp(A_ADDRESS, "239.1.1.1", 4000, 5000, payload(0, number, 200)))
        report = receiver.result()
        assert (report.received, report.duplicated, report.reordered) == (9, 2, 1), report
        assert report.expected == 9
        assert not report.clean

    def test_ends_when_idle(self, pair: tuple[Namespace, Namespace]) -> None:
        a, b = pair
        receiver = start_receiver(b, ReceivePlan(GROUP, interface="eth0", expect=60, idle_timeout_s=0.2))
        run_sender(a, SendPlan(GROUP, interface="eth0", count=50))
        report = receiver.result()
        assert (report.ended, report.received, report.lost) == ("idle", 50, 10)

    def test_ends_at_its_deadline(self, pair: tuple[Namespace, Namespace]) -> None:
        _a, b = pair
        report = start_receiver(b, ReceivePlan(GROUP, interface="eth0", deadline_s=0.1)).result()
        assert (report.ended, report.received, report.expected) == ("duration", 0, 0)

    def test_reports_when_stopped(self, pair: tuple[Namespace, Namespace]) -> None:
        a, b = pair
        receiver = start_receiver(b, ReceivePlan(GROUP, interface="eth0", progress=True))
        sender = start_sender(a, SendPlan(GROUP, interface="eth0", rate=2000, duration_s=30, progress=True))
        wait_until(lambda: receiver.progress.get("received", 0) > 0, message="no progress")
        sent = sender.stop()
        assert sent.ended == "stopped"
        report = receiver.stop()
        assert report.ended in ("stopped", "idle")
        assert (report.received, report.lost) == (sent.sent, 0)

    def test_a_stopped_receiver_accounts_for_what_is_queued(self, pair: tuple[Namespace, Namespace]) -> None:
        a, b = pair
        receiver = start_receiver(b, ReceivePlan(GROUP, interface="eth0"))
        receiver.process.send_signal(signal.SIGSTOP)
        run_sender(a, SendPlan(GROUP, interface="eth0", rate=0, count=1000))
        receiver.process.terminate()
        receiver.process.send_signal(signal.SIGCONT)
        report = receiver.result()
        assert (report.ended, report.received, report.lost) == ("stopped", 1000, 0)

    def test_a_program_that_fails_says_why(self, pair: tuple[Namespace, Namespace]) -> None:
        a, _b = pair
        with pytest.raises(RuntimeError, match="there is no interface 'nonsense'"):
            start_sender(a, SendPlan(GROUP, interface="nonsense", count=1))
        with pytest.raises(RuntimeError, match="unreachable"):
            start_sender(a, SendPlan("198.51.100.7:5000", count=1))


# --- captures and injected frames ---


@needs_namespaces
class TestCapture:
    def test_sees_a_join_and_a_leave(self, pair: tuple[Namespace, Namespace]) -> None:
        a, b = pair
        with Capture(a, "eth0") as capture:
            receiver = start_receiver(b, ReceivePlan(GROUP, interface="eth0"))
            joined = capture.wait_for(lambda frame: frame.igmp and frame.igmp.joins("239.1.1.1")).igmp
            assert joined is not None
            assert (joined.type, joined.source, joined.destination) == (
                IGMP_V3_REPORT,
                B_ADDRESS,
                "224.0.0.22",
            )
            receiver.stop()
            capture.wait_for(lambda frame: frame.igmp and frame.igmp.leaves("239.1.1.1"))
        assert capture.dropped == 0

    def test_an_injected_query_is_answered(self, pair: tuple[Namespace, Namespace]) -> None:
        a, b = pair
        start_receiver(b, ReceivePlan(GROUP, interface="eth0"))
        with Capture(a, "eth0", only=lambda frame: not frame.outgoing) as capture:
            inject(a, "eth0", igmp_query(A_ADDRESS, "239.1.1.1", version=2, max_response_code=1))
            report = capture.wait_for(lambda frame: frame.igmp and frame.igmp.type == IGMP_V2_REPORT).igmp
        assert report is not None
        assert report.joins("239.1.1.1")

    def test_sees_both_directions_and_the_datagram(self, pair: tuple[Namespace, Namespace]) -> None:
        a, b = pair
        with Capture(a, "eth0") as sending, Capture(b, "eth0") as receiving:
            run_sender(a, SendPlan(GROUP, interface="eth0", count=3, ttl=17, size=100))
            receiving.wait_for(lambda frame: len(receiving.udp()) == 3)
        assert len(sending.udp(outgoing=True)) == 3
        assert sending.udp(outgoing=False) == []
        assert receiving.udp(outgoing=True) == []
        first = receiving.udp(outgoing=False)[0]
        assert (first.source, first.destination, first.destination_port) == (A_ADDRESS, "239.1.1.1", 5000)
        assert (first.ttl, first.destination_mac) == (17, "01:00:5e:01:01:01")
        assert parse(first.payload)[:2] == (0, 0)

    def test_says_what_it_saw_instead(self, pair: tuple[Namespace, Namespace]) -> None:
        a, b = pair
        with Capture(b, "eth0") as capture:
            run_sender(a, SendPlan(GROUP, interface="eth0", count=1))
            with pytest.raises(TimeoutError, match=r"nothing like it on b/eth0 .*\n.*-> 239\.1\.1\.1:5000"):
                capture.wait_for(lambda frame: False, 0.2, "nothing like it")

    def test_is_bounded(self, pair: tuple[Namespace, Namespace]) -> None:
        a, b = pair
        with Capture(b, "eth0", frames_max=10) as capture:
            inject(a, "eth0", *[ethernet_ipv4_udp(A_ADDRESS, "239.1.1.1", 1, 2)] * 50)
            wait_until(lambda: capture.overflow == 40)
        assert len(capture.frames) == 10

    @pytest.mark.parametrize("offloads", [True, False])
    def test_offloads(self, lab: Lab, offloads: bool) -> None:
        a, b = lab.namespace("a"), lab.namespace("b")
        lab.veth(a, "eth0", b, "eth0", address_a="192.0.2.1/24", offloads=offloads)
        with Capture(b, "eth0") as capture:
            run_sender(a, SendPlan(GROUP, interface="eth0", count=1))
            frame = capture.wait_for(lambda frame: frame.udp)
        assert frame.udp is not None
        assert frame.checksum_pending is offloads
        assert frame.udp.checksum_valid is not offloads

    def test_injected_frames_arrive_as_the_kernel_judges_them(self, pair: tuple[Namespace, Namespace]) -> None:
        a, b = pair
        with b.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver, Injector(a, "eth0") as injector:
            receiver.bind(("", 5000))
            receiver.settimeout(5)
            mac = b.mac("eth0")

            def frame(body: bytes, **faults: Any) -> bytes:
                return ethernet_ipv4_udp(*(A_ADDRESS, B_ADDRESS, 4000, 5000, body), destination_mac=mac, **faults)

            injector.send(
                frame(b"wrong UDP checksum", udp_checksum=0x1234),
                frame(b"wrong IP checksum", ip_checksum=0x1234),
                frame(b"UDP length too long", udp_length=1000),
                frame(b"IP length too long", ip_length=1000),
                frame(b"version 5", ip_version=5),
                frame(b"header too short", ip_header_words=4),
                frame(b"tagged", vlan=7),
                frame(b"correct"),
                frame(b"no checksum", udp_checksum=0),
                frame(b"options", options=b"\x01\x01"),
            )
            received = [receiver.recv(2048) for _ in range(3)]
        assert received == [b"correct", b"no checksum", b"options"]

    def test_a_vlan_tag_is_reported(self, pair: tuple[Namespace, Namespace]) -> None:
        a, b = pair
        with Capture(b, "eth0") as capture:
            inject(a, "eth0", ethernet_ipv4_udp(A_ADDRESS, "239.1.1.1", 1, 2, b"tagged", vlan=7))
            frame = capture.wait_for(lambda frame: frame.udp)
        assert frame.vlan == 7


class TestFrames:
    def test_what_is_built_can_be_taken_apart(self) -> None:
        for body in (b"", b"x", b"odd length", bytes(range(256)) * 5):
            datagram = decode_udp(ethernet_ipv4_udp("192.0.2.9", "239.129.1.1", 4000, 5000, body, ttl=3))
            assert datagram is not None
            assert datagram[:6] == ("192.0.2.9", "239.129.1.1", 4000, 5000, 3, body)
            assert datagram.destination_mac == "01:00:5e:01:01:01"
            assert datagram.checksum_valid

    def test_ethernet_padding_is_not_payload(self) -> None:
        datagram = decode_udp(ethernet_ipv4_udp("192.0.2.9", "239.1.1.1", 1, 2, b"x") + bytes(17))
        assert datagram is not None
        assert datagram.payload == b"x"

    def test_truncated_frames_decode_to_nothing(self) -> None:
        for frame in (ethernet_ipv4_udp("192.0.2.9", "239.1.1.1", 1, 2, b"x"), igmp_query("192.0.2.9")):
            for length in range(len(frame)):
                assert decode_udp(frame[:length]) is None
                assert decode_igmp(frame[:length]) is None

    def test_a_fragment_is_no_datagram(self) -> None:
        segment = udp_segment("192.0.2.9", "239.1.1.1", 1, 2, bytes(100))
        first = ethernet_ipv4("192.0.2.9", "239.1.1.1", 17, segment[:64], more_fragments=True)
        second = ethernet_ipv4("192.0.2.9", "239.1.1.1", 17, segment[64:], fragment_offset=8)
        assert decode_udp(first) is None
        assert decode_udp(second) is None

    def test_unicast_needs_a_mac(self) -> None:
        with pytest.raises(ValueError, match="destination_mac"):
            ethernet_ipv4_udp("192.0.2.9", "192.0.2.1", 1, 2)
        assert multicast_mac("224.128.0.1") == multicast_mac("239.0.0.1") == "01:00:5e:00:00:01"


# --- topology ---


@needs_namespaces
class TestRelayLine:
    def test_nothing_passes_without_a_relay(self, lab: Lab) -> None:
        """sender 203.0.113.10 -> in0 192.0.2.1 | relay, strict rp_filter | out0 -> receiver"""
        line = relay_line(lab, ip_forward=True)
        count = 200
        at_receiver = start_receiver(line.receiver, ReceivePlan(GROUP, interface="eth0"))
        at_relay = start_receiver(line.relay, ReceivePlan(GROUP, interface="in0"))
        with Capture(line.relay, "in0") as ingress, Capture(line.relay, "out0") as egress:
            run_sender(line.sender, SendPlan(GROUP, interface="eth0", rate=5000, count=count))
            ingress.wait_for(lambda frame: len(ingress.udp()) == count, message="not on the relay's wire")
            wait_until(
                lambda: network_counter(line.relay, "TcpExt", "IPReversePathFilter") >= count,
                message="not dropped by the reverse-path check",
            )
        assert egress.udp() == []
        assert at_relay.stop().received == 0
        assert at_receiver.stop().received == 0

    def test_the_relay_can_send_to_every_receiver(self, lab: Lab) -> None:
        line = relay_line(lab, outputs=3, mtu=9000)
        assert [egress.interface for egress in line.egresses] == ["out0", "out1", "out2"]
        assert [egress.address for egress in line.egresses] == ["198.51.100.1", "10.1.0.1", "10.2.0.1"]
        for egress in line.egresses:
            for target in (GROUP, f"{egress.receiver_address}:5000"):
                receiver = start_receiver(egress.receiver, ReceivePlan(target, interface="eth0", count=20))
                run_sender(line.relay, SendPlan(target, interface=egress.interface, count=20, size=8000))
                assert receiver.result().clean

    def test_shape(self, lab: Lab) -> None:
        line: RelayLine = relay_line(lab)
        assert line.receivers == (line.receiver,)
        assert line.relay.addresses["in0"] == [f"{line.ingress_address}/24"]
        for scope in ("all", "default", "in0", "out0"):
            assert line.relay.run("cat", f"/proc/sys/net/ipv4/conf/{scope}/rp_filter").stdout == "1\n"
        assert line.relay.run("cat", "/proc/sys/net/ipv4/ip_forward").stdout == "0\n"
        assert "224.0.0.0/4" in line.sender.ip("route").stdout
        assert "224.0.0.0/4" in line.receiver.ip("route").stdout

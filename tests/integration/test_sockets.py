"""net/sockets.py against the kernel: steering, memberships, and what an egress socket is."""

from __future__ import annotations

import errno
import random
import select
import socket
import struct
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address

import pytest

from lab.capture import Capture, Frame, Injector
from lab.frames import decode_udp, ethernet_ipv4, ethernet_ipv4_udp
from lab.namespaces import Lab, Namespace, unsupported
from lab.topology import RelayLine, relay_line
from mcrelay.errors import SystemRefusal
from mcrelay.limits import RULES_MAX
from mcrelay.net.admission import Admission
from mcrelay.net.interfaces import Interface
from mcrelay.net.sockets import Memberships, open_egress, open_ingress
from mcrelay.steering import NETWORK, steer

# Before the payload in what a packet socket gives: virtio, Ethernet, IPv4 and UDP header.
HEADERS = 10 + 14 + 20 + 8


@pytest.fixture(scope="module")
def line() -> Iterator[RelayLine]:
    if reason := unsupported():
        pytest.skip(reason)
    with Lab() as lab:
        yield relay_line(lab)


def interface(namespace: Namespace, name: str) -> Interface:
    return Interface(name, namespace.ifindex(name), 1500, is_up=True, has_ipv4=True)


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_the_kernel_steers_as_we_compute(line: RelayLine, workers: int) -> None:
    source = random.Random(workers)
    flows = [(f"239.{source.randrange(256)}.{source.randrange(256)}.{n}", source.randint(1, 65535)) for n in range(64)]
    sockets = line.relay.call(open_ingress, interface(line.relay, "in0"), workers)
    sender = line.sender.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        for group, port in flows:
            sender.sendto(f"{group} {port}".encode(), (group, port))
        seen: dict[str, int] = {}
        while len(seen) < len(flows):
            readable, _, _ = select.select(sockets, [], [], 5)
            assert readable, f"only {len(seen)} of {len(flows)} datagrams arrived"
            for sock in readable:
                payload = sock.recv(2000)[HEADERS:].decode()
                assert payload not in seen, "a datagram came twice"
                seen[payload] = sockets.index(sock)
        for group, port in flows:
            assert seen[f"{group} {port}"] == steer(int(IPv4Address(group)), port) % workers
        assert not select.select(sockets, [], [], 0)[0], "something came twice"
    finally:
        for sock in (*sockets, sender):
            sock.close()


def test_only_incoming_udp_reaches_a_worker(line: RelayLine) -> None:
    """Neither what the host sends itself, nor other protocols."""
    (sock,) = line.relay.call(open_ingress, interface(line.relay, "in0"), 1)
    own = line.relay.socket(socket.AF_INET, socket.SOCK_DGRAM)
    own.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("192.0.2.1"))
    icmp = line.sender.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    udp = line.sender.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        own.sendto(b"own", ("239.1.1.1", 5000))
        icmp.sendto(struct.pack("!BBHHH", 8, 0, 0xF7FF, 0, 0), ("239.1.1.1", 0))
        udp.sendto(b"theirs", ("239.1.1.1", 5000))
        sock.settimeout(5)
        assert sock.recv(2000)[HEADERS:] == b"theirs"
        assert not select.select([sock], [], [], 0)[0]
    finally:
        for opened in (sock, own, icmp, udp):
            opened.close()


@pytest.mark.parametrize("network", [14, NETWORK])
def test_only_admitted_destinations_reach_a_worker(line: RelayLine, network: int) -> None:
    """Whatever else a packet has, and also behind IP options. A sentinel shows that nothing else is on its way."""
    source = random.Random(network)
    flows = [(f"239.1.{a}.{b}", port) for a in (0, 1) for b in (1, 2) for port in (5000, 5001, 65535)]
    admission = Admission(network)
    sockets = line.relay.call(open_ingress, interface(line.relay, "in0"), 2, None, None, admission)
    injector = Injector(line.sender, "eth0")

    def passing() -> set[tuple[str, int]]:
        admission.admit([(IPv4Address("239.9.9.9"), 9)])
        for group, port in [*flows, ("239.9.9.9", 9)]:
            options = bytes([1]) * source.choice([0, 4, 40])
            injector.send(
                ethernet_ipv4_udp("203.0.113.10", group, 4000, port, f"{group} {port}".encode(), options=options)
            )
            # The same bytes where the port would be, of another protocol.
            injector.send(ethernet_ipv4("203.0.113.10", group, 47, struct.pack("!HHHH", 4000, port, 8, 0)))
        seen: set[tuple[str, int]] = set()
        wait_s = 5.0
        while readable := select.select(sockets, [], [], wait_s)[0]:
            for sock in readable:
                frame = decode_udp(sock.recv(2000)[10:])
                assert frame is not None
                group, text = frame.payload.decode().split()
                assert (group, int(text)) not in seen
                seen.add((group, int(text)))
            if ("239.9.9.9", 9) in seen:
                wait_s = 0.0  # what was sent before it is there
        assert ("239.9.9.9", 9) in seen
        return seen - {("239.9.9.9", 9)}

    try:
        assert passing() == set()
        admitted = set(flows[::2])
        admission.admit((IPv4Address(group), port) for group, port in [*admitted, *admitted])
        assert passing() == admitted
        # Some of them were not admitted.
        admission.refuse((IPv4Address(group), port) for group, port in flows[:6])
        assert passing() == admitted - set(flows[:6])
        room = RULES_MAX - 1 - len(admitted - set(flows[:6]))
        with pytest.raises(OSError, match="bpf") as full:
            admission.admit((IPv4Address("239.200.0.0") + number, 1) for number in range(room + 1))
        assert full.value.errno == errno.E2BIG
        assert passing() == admitted - set(flows[:6])
        admission.admit((IPv4Address("239.200.0.0") + number, 1) for number in range(room))  # nothing was left of that
    finally:
        admission.close()
        injector.close()
        for sock in sockets:
            sock.close()


def test_an_egress_socket_receives_nothing_and_reaches_no_host_receiver(line: RelayLine) -> None:
    (sock,) = line.relay.call(open_egress, interface(line.relay, "out0"), 1)
    (incoming,) = line.relay.call(open_ingress, interface(line.relay, "out0"), 1)
    receiver = line.receiver.socket(socket.AF_INET, socket.SOCK_DGRAM)
    receiver.bind(("198.51.100.2", 7000))
    receiver.settimeout(5)
    try:
        sock.sendto(b"out", ("198.51.100.2", 7000))
        payload, (address, port) = receiver.recvfrom(100)
        assert (payload, address) == (b"out", "198.51.100.1")
        receiver.sendto(b"back", (address, port))
        incoming.settimeout(5)
        assert incoming.recv(2000)[HEADERS:] == b"back"  # it was there
        sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            sock.recv(100)
        # Multicast is not looped back to this host, where it would come in again.
        sock.sendto(b"looped?", ("239.2.2.2", 7000))
        receiver.sendto(b"after", ("198.51.100.1", 7001))
        assert incoming.recv(2000)[HEADERS:] == b"after"
    finally:
        for opened in (sock, incoming, receiver):
            opened.close()


def test_more_groups_than_a_socket_holds_are_joined_and_left(line: RelayLine) -> None:
    """igmp_max_memberships (20) is per socket. A report for each group leaves the host, and a leave as well."""
    groups = [IPv4Address(f"239.77.0.{n}") for n in range(1, 46)]
    where = interface(line.relay, "in0")
    memberships = line.relay.call(Memberships)
    before = joined(line.relay, "in0")
    with Capture(line.sender, "eth0") as capture:
        for group in groups:
            line.relay.call(memberships.join, where, group)
        assert joined(line.relay, "in0") == before | {str(group) for group in groups}
        for group in groups:
            capture.wait_for(_joins(str(group)), 10, f"no report for {group}")
        for group in groups:
            line.relay.call(memberships.leave, where.index, group)
        assert joined(line.relay, "in0") == before
        capture.wait_for(lambda f: f.igmp and f.igmp.leaves(str(groups[-1])), 10, "no leave was sent")
    memberships.close()


def test_a_kernel_that_allows_no_membership_is_told_from_others(line: RelayLine) -> None:
    where = interface(line.relay, "in0")
    memberships = line.relay.call(Memberships)
    line.relay.sysctl("net.ipv4.igmp_max_memberships", 0)
    try:
        with pytest.raises(SystemRefusal, match="igmp_max_memberships"):
            line.relay.call(memberships.join, where, IPv4Address("239.77.1.1"))
    finally:
        line.relay.sysctl("net.ipv4.igmp_max_memberships", 20)
        memberships.close()


def _joins(group: str) -> Callable[[Frame], object]:
    return lambda frame: frame.igmp and frame.igmp.joins(group)


def joined(namespace: Namespace, name: str) -> set[str]:
    """Groups that the kernel says are joined on an interface."""
    lines = namespace.ip("-4", "maddress", "show", "dev", name).stdout.split("\n")
    return {line.split()[1] for line in lines if line.strip().startswith("inet ")}

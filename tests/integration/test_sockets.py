"""net/sockets.py against the kernel: steering, and what comes in."""

from __future__ import annotations

import random
import select
import socket
import struct
from collections import Counter
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address

import pytest

from lab.capture import Injector
from lab.namespaces import Lab, Namespace, unsupported
from lab.topology import RelayLine, relay_line
from mcrelay.entries import mapped
from mcrelay.net import sockets
from mcrelay.net.admission import Admission, Destination
from mcrelay.net.interfaces import Interface
from mcrelay.net.sockets import open_ingress
from mcrelay.steering import steer, steer_address

UDP, FRAGMENT = 17, 44
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
    members = line.relay.call(open_ingress, interface(line.relay, "in0"), workers)
    sender = line.sender.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        for group, port in flows:
            sender.sendto(f"{group} {port}".encode(), (group, port))
        seen: dict[str, int] = {}
        while len(seen) < len(flows):
            readable, _, _ = select.select(members, [], [], 5)
            assert readable, f"only {len(seen)} of {len(flows)} datagrams arrived"
            for sock in readable:
                payload = sock.recv(2000)[HEADERS:].decode()
                assert payload not in seen, "a datagram came twice"
                seen[payload] = members.index(sock)
        for group, port in flows:
            assert seen[f"{group} {port}"] == steer(int(IPv4Address(group)), port) % workers
        assert not select.select(members, [], [], 0)[0], "something came twice"
    finally:
        for sock in (*members, sender):
            sock.close()


def test_the_kernel_steers_ipv6_by_its_destination(line: RelayLine) -> None:
    """Fragments as they come, whose datagram one worker thus gets whole, and in whatever VLAN."""
    workers = 3
    members = line.relay.call(open_ingress, interface(line.relay, "in0"), workers)
    groups = [IPv6Address(f"ff3e::{n:x}:{n * 2003:x}") for n in range(1, 32)]
    source = IPv6Address("2001:db8::9").packed
    try:
        with Injector(line.sender, "eth0") as injector:
            for number, group in enumerate(groups):
                for next_header, tag in ((UDP, b""), (FRAGMENT, b""), (UDP, b"\x81\x00\x00\x07")):
                    body = struct.pack("!HHHHB", 4000, 5000 + number, 9, 1, number)
                    header = struct.pack("!IHBB", 6 << 28, len(body), next_header, 8) + source + group.packed
                    injector.send(bytes(12) + tag + b"\x86\xdd" + header + body)
        seen: Counter[tuple[int, int]] = Counter()
        while seen.total() < 3 * len(groups):
            readable, _, _ = select.select(members, [], [], 5)
            assert readable, f"only {seen.total()} packets arrived"
            for sock in readable:
                seen[sock.recv(2000)[-1], members.index(sock)] += 1
        assert seen == {(n, steer_address(group.packed) % workers): 3 for n, group in enumerate(groups)}
    finally:
        for sock in members:
            sock.close()


@pytest.mark.parametrize("is_old_kernel", [False, True])
@pytest.mark.parametrize("has_admission", [False, True])
def test_only_incoming_udp_reaches_a_worker(
    line: RelayLine, monkeypatch: pytest.MonkeyPatch, has_admission: bool, is_old_kernel: bool
) -> None:
    """Neither what the host sends itself, nor other protocols."""
    if is_old_kernel:  # to which the flag says nothing
        monkeypatch.setattr(sockets, "PACKET_FANOUT_FLAG_IGNORE_OUTGOING", 0)
    admission = Admission(14) if has_admission else None
    if admission:
        admission.admit([Destination(mapped(IPv4Address("239.1.1.1")), port=5000)])
    (sock,) = line.relay.call(open_ingress, interface(line.relay, "in0"), 1, None, None, admission)
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
        if admission:
            admission.close()

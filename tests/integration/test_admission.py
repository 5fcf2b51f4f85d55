"""net/admission.py against the kernel: what its filter lets through to packet sockets, of all that comes in."""

from __future__ import annotations

import errno
import os
import select
import struct
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest

from lab.capture import Injector
from lab.frames import SOURCE_MAC, ethernet_ipv4, ethernet_ipv4_udp, udp_segment
from lab.namespaces import Lab, unsupported
from lab.topology import RelayLine, relay_line
from mcrelay.entries import mapped
from mcrelay.limits import RULES_MAX
from mcrelay.net.admission import Admission, Destination, destination_of
from mcrelay.net.interfaces import Interface
from mcrelay.net.sockets import open_ingress
from mcrelay.rules import Input
from mcrelay.steering import ESP, NETWORK, UDP

GROUP, OTHER_GROUP = "239.1.1.1", "239.1.1.2"
GROUP6, OTHER_GROUP6 = "ff3e::1:1", "ff3e::1:2"
SENTINEL = ("239.9.9.9", 9)


@pytest.fixture(scope="module")
def line() -> Iterator[RelayLine]:
    if reason := unsupported():
        pytest.skip(reason)
    with Lab() as lab:
        yield relay_line(lab)


def to(address: str, port: int = 0, *, prefix: int | None = None, vlan: int = 0, protocol: int = UDP) -> Destination:
    number = ip_address(address)
    whole = 128 if prefix is None else 96 + prefix if number.version == 4 else prefix
    return Destination(mapped(number), whole, port, vlan, protocol)


def ipv6(destination: str, next_header: int, body: bytes) -> bytes:
    mac = b"\x33\x33" + IPv6Address(destination).packed[-4:] + bytes.fromhex(SOURCE_MAC.replace(":", ""))
    header = struct.pack("!IHBB", 6 << 28, len(body), next_header, 8)
    return mac + b"\x86\xdd" + header + IPv6Address("2001:db8::9").packed + IPv6Address(destination).packed + body


def udp(port: int, payload: bytes) -> bytes:
    """With a checksum of no meaning: nobody here looks at it."""
    return struct.pack("!HHHH", 4000, port, 8 + len(payload), 1) + payload


def tagged(frame: bytes, tci: int) -> bytes:
    return frame[:12] + struct.pack("!HH", 0x8100, tci) + frame[12:]


def offered() -> dict[str, bytes]:
    """A frame of each kind by its name, which it ends with."""
    frames: dict[str, bytes] = {}

    def frame(name: str, bytes_before: bytes) -> None:
        frames[name] = bytes_before + f"|{name}".encode()

    source = "203.0.113.10"
    for group in (GROUP, OTHER_GROUP):
        for port in (5000, 5001):
            name = f"{group}:{port}"
            frames[name] = ethernet_ipv4_udp(source, group, 4000, port, f"|{name}".encode())
    for name, options in (("options4", bytes([1]) * 4), ("options40", bytes([1]) * 40)):
        frames[name] = ethernet_ipv4_udp(source, GROUP, 4000, 5000, f"|{name}".encode(), options=options)
    for name, tci in (("vlan7", 0x2007), ("vlan8", 8), ("priority", 0xE000)):
        frames[name] = ethernet_ipv4_udp(source, GROUP, 4000, 5000, f"|{name}".encode(), vlan=tci)
    for name, protocol in (("esp", ESP), ("gre", 47), ("tcp", 6)):
        frames[name] = ethernet_ipv4(
            source, GROUP, protocol, struct.pack("!HHHH", 4000, 5000, 8, 0) + f"|{name}".encode()
        )
    for group in (GROUP6, OTHER_GROUP6):
        for port in (5000, 5001):
            name = f"[{group}]:{port}"
            frames[name] = ipv6(group, UDP, udp(port, f"|{name}".encode()))
    for name, next_header in (("esp6", ESP), ("hopbyhop6", 0), ("fragment6", 44), ("icmp6", 58)):
        frames[name] = ipv6(GROUP6, next_header, struct.pack("!HHHH", 4000, 5000, 8, 0) + f"|{name}".encode())
    frames["vlan7 6"] = tagged(ipv6(GROUP6, UDP, udp(5000, b"|vlan7 6")), 7)
    frames["arp"] = bytes.fromhex("ffffffffffff020000000001") + b"\x08\x06" + bytes(46) + b"|arp"
    return frames


BESIDES6 = {"hopbyhop6", "fragment6", "icmp6"}  # what may be more than it seems


class Gate:
    """Two workers' packet sockets behind one admission."""

    def __init__(self, line: RelayLine, network: int) -> None:
        self.admission = Admission(network)
        where = Interface("in0", line.relay.ifindex("in0"), 1500, is_up=True, has_ipv4=True)
        self.sockets = line.relay.call(open_ingress, where, 2, None, None, self.admission)
        self._injector = Injector(line.sender, "eth0")
        self._relay = line.relay

    def passing(self, frames: dict[str, bytes]) -> set[str]:
        """Which of the frames come. One that is admitted, sent after them, shows that nothing else is on its way."""
        self.admission.admit([to(*SENTINEL)])
        sentinel = ethernet_ipv4_udp("203.0.113.10", SENTINEL[0], 4000, SENTINEL[1], b"|sentinel")
        self._injector.send(*frames.values(), sentinel)
        seen: set[str] = set()
        wait_s = 5.0
        while readable := select.select(self.sockets, [], [], wait_s)[0]:
            for sock in readable:
                name = sock.recv(3000).rpartition(b"|")[2].decode()
                assert name not in seen, f"{name} came twice"
                seen.add(name)
            if "sentinel" in seen:
                wait_s = 0.0  # what was sent before it is there
        assert "sentinel" in seen
        return seen - {"sentinel"}

    def close(self) -> None:
        self.admission.close()
        self._injector.close()
        for sock in self.sockets:
            sock.close()


@pytest.fixture(params=[14, NETWORK], ids=["ethernet", "unknown"])
def gate(line: RelayLine, request: pytest.FixtureRequest) -> Iterator[Gate]:
    opened = Gate(line, request.param)
    yield opened
    opened.close()


def test_what_is_admitted_comes_and_nothing_else(gate: Gate) -> None:
    frames = offered()
    exact4 = {f"{GROUP}:5000", "options4", "options40", "priority"}
    cases: list[tuple[list[Destination], set[str]]] = [
        ([], set()),
        ([to(GROUP, 5000)], exact4),
        ([to(GROUP)], exact4 | {f"{GROUP}:5001"}),
        ([to(GROUP, protocol=ESP)], {"esp"}),
        ([to(GROUP, 5000, vlan=7)], {"vlan7"}),
        ([to("239.1.1.0", prefix=31)], exact4 | {f"{GROUP}:5001", "esp"}),
        ([to("239.1.1.2", 7, prefix=31)], {f"{OTHER_GROUP}:5000", f"{OTHER_GROUP}:5001"}),  # ports are not looked at
        ([to("0.0.0.0", prefix=0, vlan=8)], {"vlan8"}),
        ([to(GROUP6, 5000)], {f"[{GROUP6}]:5000"} | BESIDES6),
        ([to(GROUP6)], {f"[{GROUP6}]:5000", f"[{GROUP6}]:5001"} | BESIDES6),
        ([to(GROUP6, protocol=ESP)], {"esp6"} | BESIDES6),
        ([to(GROUP6, 5000, vlan=7)], {"vlan7 6"}),
        ([to("ff3e::1:2", prefix=127)], {f"[{OTHER_GROUP6}]:5000", f"[{OTHER_GROUP6}]:5001"}),
        ([to("ff00::", prefix=8)], {name for name, frame in frames.items() if frame[12:14] == b"\x86\xdd"}),
    ]
    for destinations, expected in cases:
        gate.admission.admit([*destinations, *destinations])
        assert gate.passing(frames) == expected, destinations
        gate.admission.refuse(destinations)
    every = [destination for destinations, _expected in cases for destination in destinations]
    gate.admission.admit(every)
    assert gate.passing(frames) == set().union(*(expected for _destinations, expected in cases))
    gate.admission.refuse(every)
    assert gate.passing(frames) == set()


def test_fragments_of_ipv4_are_looked_at_when_they_are_whole(gate: Gate) -> None:
    gate.admission.admit([to(GROUP, 5000)])
    fragments: dict[str, bytes] = {}
    for number, (group, port) in enumerate([(GROUP, 5000), (GROUP, 5001), (OTHER_GROUP, 5000)]):
        datagram = udp_segment("203.0.113.10", group, 4000, port, bytes(1600) + f"|{group}:{port}".encode())
        for at in (0, 800):
            fragments[f"{number} {at}"] = ethernet_ipv4(
                *("203.0.113.10", group, UDP, datagram[at : at + 800] if not at else datagram[at:]),
                identification=number + 1,
                more_fragments=not at,
                fragment_offset=at // 8,
            )
    assert gate.passing(fragments) == {f"{GROUP}:5000"}


def test_what_several_destinations_have_in_common_goes_with_the_last(gate: Gate) -> None:
    frames = {name: frame for name, frame in offered().items() if name in BESIDES6 or name.startswith("239.1.1.1")}
    ports = [to(GROUP6, 5000), to(GROUP6, 5001)]
    prefixes = [to("239.1.1.0", 5000, prefix=31), to("239.1.1.0", 5001, prefix=31)]
    gate.admission.admit([*ports, *prefixes])
    assert gate.passing(frames) == set(frames)
    gate.admission.refuse([ports[0], prefixes[0], to(GROUP6, 1)])  # the last was not admitted
    assert gate.passing(frames) == set(frames)
    gate.admission.refuse([*ports, *prefixes])
    assert gate.passing(frames) == set()


def test_a_successor_goes_on_with_it(gate: Gate) -> None:
    frames = {name: frame for name, frame in offered().items() if name.startswith("239.")}
    wanted = [to(GROUP, 5000), to("239.1.1.2", prefix=32)]
    gate.admission.admit(wanted)
    adopted = Admission.adopt(*(os.dup(fd) for fd in gate.admission.descriptors()))
    try:
        assert gate.passing(frames) == {f"{GROUP}:5000", f"{OTHER_GROUP}:5000", f"{OTHER_GROUP}:5001"}
        adopted.admit(wanted)
        adopted.refuse(wanted[1:])
        assert gate.passing(frames) == {f"{GROUP}:5000"}
    finally:
        adopted.close()


@pytest.mark.parametrize("gate", [14], indirect=True)
def test_too_many_are_refused_and_leave_nothing_behind(gate: Gate) -> None:
    base4, base6 = IPv4Address("239.200.0.0"), int(IPv6Address("ff3e::"))
    exact = [to(str(base4 + number), 1) for number in range(2 * RULES_MAX + 1)]
    prefixes = [to(str(IPv6Address(base6 + (number << 64))), prefix=64) for number in range(RULES_MAX + 1)]
    for destinations, full in ((exact, errno.E2BIG), ([to(GROUP, 5000), *prefixes], errno.ENOSPC)):
        with pytest.raises(OSError, match="bpf") as refused:
            gate.admission.admit(destinations)
        assert refused.value.errno == full
        assert gate.passing(offered()) == set()
        gate.admission.admit(destinations[:RULES_MAX])  # nothing was left of that
        gate.admission.refuse(destinations)
        assert gate.passing(offered()) == set()


def test_an_input_says_what_its_packets_are_for() -> None:
    group = IPv4Address("239.1.0.0")
    source = IPv4Address("192.0.2.7")
    assert destination_of(Input(group, 5000, "eth0", source=source)) == to("239.1.0.0", 5000)
    assert destination_of(Input(group, None, "eth0", prefix=16, vlan=5)) == to("239.1.0.0", prefix=16, vlan=5)
    esp = Input(IPv6Address(GROUP6), None, "eth0", protocol="esp")
    assert destination_of(esp) == to(GROUP6, protocol=ESP)


def test_without_it_all_that_a_rule_could_be_for_comes(line: RelayLine) -> None:
    """The filter of steering.py."""
    where = Interface("in0", line.relay.ifindex("in0"), 1500, is_up=True, has_ipv4=True, network=14)
    (sock,) = line.relay.call(open_ingress, where, 1)
    frames = offered()
    sock.settimeout(5)
    try:
        with Injector(line.sender, "eth0") as injector:
            injector.send(*frames.values())
        expected = [name for name in frames if name not in ("gre", "tcp", "arp")]
        assert [sock.recv(3000).rpartition(b"|")[2].decode() for _ in expected] == expected
        assert not select.select([sock], [], [], 0)[0]
    finally:
        sock.close()

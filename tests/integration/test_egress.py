"""net/egress.py against the kernel: the sockets of every way out, as they are used by a process without privileges.

relay out0 198.51.100.1, 2001:db8::1 ---> receiver eth0 198.51.100.2, 2001:db8::2
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from ipaddress import ip_address

import pytest

from lab.capture import Capture, inject
from lab.namespaces import Lab, Namespace, unsupported
from lab.topology import RelayLine, relay_line
from mcrelay.errors import SystemRefusal
from mcrelay.net.egress import open_egress
from mcrelay.net.interfaces import Interface
from mcrelay.ways import Way
from tests.engines.bench import speak_ipv6
from tests.engines.packets import Datagram, carried, ethernet

STRANGER4, STRANGER6 = "192.0.2.77", "2001:db8:77::7"  # addresses of nobody here

# Drops its privileges, then sends one datagram by each way to each destination; prints why one did not leave, and
# whether it could open such a socket itself. Arguments: way and descriptor, and so on.
WORKER = """
import json, socket, sys
from ipaddress import ip_address
from mcrelay.engines.exits import Exit
from mcrelay.engines.parsing import Packet
from mcrelay.entries import Leg, LegFlag, mapped
from mcrelay.errors import SystemRefusal
from mcrelay.net.egress import open_egress
from mcrelay.net.interfaces import Interface
from mcrelay.process import drop_privileges
from mcrelay.ways import Link, Way

name, index, mac, *sends = json.loads(sys.argv[1])
exits = [Exit(Way(way), socket.socket(fileno=fd), 1500, Link(mac=bytes.fromhex(mac))) for way, fd, _s, _d in sends]
drop_privileges(65534, 65534)
failures = []
for way_out, (way, _fd, source, destination) in zip(exits, sends, strict=True):
    given = mapped(ip_address(source))
    packet = Packet(given, mapped(ip_address(destination)), 4000, 5000, 17, 8, 46, memoryview(b"hello"))
    leg = Leg(packet.destination, 6000, 0, 9, 0, way=Way(way), flags=LegFlag.KEEP_DSCP, source=given, source_port=99)
    failures.append(way_out.send(leg, packet, packet.payload))
refusals = set()
for way in (Way.FRAME, Way.RAW4, Way.RAW6):
    try:
        open_egress(Interface(name, index, 1500, True, True), way, 1)
    except SystemRefusal as refusal:
        refusals.add(refusal.hint)
print(json.dumps([failures, sorted(refusals)]))
"""


@pytest.fixture(scope="module")
def line() -> Iterator[RelayLine]:
    if reason := unsupported():
        pytest.skip(reason)
    with Lab() as lab:
        built = relay_line(lab, offloads=False)
        speak_ipv6(built)
        yield built


def interface(namespace: Namespace, name: str) -> Interface:
    return Interface(name, namespace.ifindex(name), 1500, is_up=True, has_ipv4=True)


SENDS = [
    (Way.UDP4, STRANGER4, "239.2.2.2"),
    (Way.UDP4, STRANGER4, "198.51.100.2"),
    (Way.UDP4, STRANGER4, "198.51.100.255"),
    (Way.UDP4, STRANGER4, "255.255.255.255"),
    (Way.UDP6, STRANGER6, "ff3e::202"),
    (Way.UDP6, STRANGER6, "ff02::202"),
    (Way.UDP6, STRANGER6, "2001:db8::2"),
    (Way.LOOP4, STRANGER4, "239.2.2.2"),
    (Way.LOOP6, STRANGER6, "ff3e::202"),
    (Way.FRAME, STRANGER4, "239.2.2.2"),
    (Way.FRAME, STRANGER4, "255.255.255.255"),
    (Way.FRAME, STRANGER6, "ff3e::202"),
    (Way.RAW4, STRANGER4, "198.51.100.2"),
    (Way.RAW4, STRANGER4, "198.51.100.255"),
    (Way.RAW6, STRANGER6, "2001:db8::2"),
]


def test_a_process_without_privileges_sends_by_every_way(line: RelayLine) -> None:
    where = interface(line.relay, "out0")
    sockets = {way: line.relay.call(open_egress, where, way, 1)[0] for way in Way}
    mac = line.relay.mac("out0").replace(":", "")
    sends = [(way, sockets[way].fileno(), source, to) for way, source, to in SENDS]
    with Capture(line.receiver, "eth0", only=lambda f: not f.outgoing and carried(f.data) is not None) as capture:
        printed = subprocess.run(
            [sys.executable, "-c", WORKER, json.dumps([where.name, where.index, mac, *sends])],
            pass_fds=[sock.fileno() for sock in sockets.values()],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert printed.returncode == 0, printed.stderr
        failures, remedies = json.loads(printed.stdout)
        assert dict(zip(map(str, SENDS), failures, strict=True)) == dict.fromkeys(map(str, SENDS))
        # It could not have opened one of them itself.
        assert remedies == ["run mcrelay as root or with CAP_NET_RAW and CAP_NET_ADMIN"]
        capture.wait_for(lambda _frame: len(capture.frames) == len(SENDS), message="not all arrived")
    for frame, (_way, source, destination) in zip(capture.frames, SENDS, strict=True):
        packet = frame.data[14:]
        at, end = (12, 20) if packet[0] >> 4 == 4 else (8, 40)
        assert packet[at:end] == ip_address(source).packed + ip_address(destination).packed
    for sock in sockets.values():
        sock.close()


@pytest.mark.parametrize("way", Way)
def test_an_egress_socket_receives_nothing(line: RelayLine, way: Way) -> None:
    """Not even what is sent to its very port, or what every packet socket and raw socket would get."""
    (sock,) = line.relay.call(open_egress, interface(line.relay, "out0"), way, 1)
    is_ipv6 = sock.family == socket.AF_INET6
    here, there = ("2001:db8::1", "2001:db8::2") if is_ipv6 else ("198.51.100.1", "198.51.100.2")
    port = 7000
    if sock.type == socket.SOCK_DGRAM:
        sock.sendto(b"out", (there, 7000))
        port = sock.getsockname()[1]
    witness = line.relay.socket(socket.AF_INET6 if is_ipv6 else socket.AF_INET, socket.SOCK_DGRAM)
    witness.bind((here, 7001))
    witness.settimeout(5)
    mac = line.relay.mac("out0")
    for to in (port, 7001):
        inject(line.receiver, "eth0", ethernet(Datagram(there, here, 7000, to, b"back").packet, destination_mac=mac))
    assert witness.recv(100) == b"back"  # and what came before it is there, too
    sock.setblocking(False)
    with pytest.raises(BlockingIOError):
        sock.recv(100)
    sock.close()
    witness.close()


@pytest.mark.parametrize("way", Way)
def test_an_interface_that_is_not_there_is_refused(line: RelayLine, way: Way) -> None:
    gone = Interface("gone0", 9999, 1500, is_up=True, has_ipv4=True)
    with pytest.raises(SystemRefusal, match="cannot send on gone0: ") as refusal:
        line.relay.call(open_egress, gone, way, 2)
    assert refusal.value.hint == "see 'ip link show gone0'"


def test_each_worker_gets_one(line: RelayLine) -> None:
    sockets = line.relay.call(open_egress, interface(line.relay, "out0"), Way.FRAME, 3)
    assert len({sock.fileno() for sock in sockets}) == 3
    for sock in sockets:
        sock.close()

"""net/absorbers.py against the kernel: a host that relays what comes to its own address does not refuse it."""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import pytest

from lab.capture import Capture, inject
from lab.frames import ethernet_ipv4
from lab.namespaces import Lab, unsupported, wait_until
from mcrelay.net.absorbers import Absorbers, Place, place_of
from mcrelay.rules import Address
from mcrelay.ruletext import parse_input

HOST4, LATER4 = IPv4Address("192.0.2.1"), IPv4Address("192.0.2.77")
HOST6, LATER6 = IPv6Address("2001:db8:1::1"), IPv6Address("2001:db8:1::77")


class Pair:
    """A sender, a host, and one cable."""

    def __init__(self, lab: Lab) -> None:
        self.host, self.sender = lab.namespace("host", ipv6=True), lab.namespace("sender", ipv6=True)
        lab.veth(self.sender, "eth0", self.host, "in0", address_a="192.0.2.9/24", address_b=f"{HOST4}/24")
        self.sender.ip("address", "add", "2001:db8:1::9/64", "dev", "eth0")
        self.host.ip("address", "add", f"{HOST6}/64", "dev", "in0")
        # As many refusals as we ask for.
        for setting in ("net.ipv4.icmp_ratelimit", "net.ipv6.icmp.ratelimit"):
            self.host.sysctl(setting, 0)
        self.link_local = next(
            IPv6Address(text.split("/")[0]) for text in self.host.addresses["in0"] if text.startswith("fe80")
        )

    def is_refused(self, address: Address, port: int) -> bool:
        """Whether the host answers that nobody is there. It has looked at the datagram when one sent after it, to
        a port that is refused for certain, has its answer."""
        with self._connected(address, port) as asked, self._connected(address, 9) as certain:
            asked.send(b"?")
            wait_until(lambda: self._fails(certain), 5, "no refusal from a port that nobody has")
            return self._has_failed(asked)

    def _connected(self, address: Address, port: int) -> socket.socket:
        sock = self.sender.socket(socket.AF_INET if address.version == 4 else socket.AF_INET6, socket.SOCK_DGRAM)
        sock.setblocking(False)
        if address.version == 4:
            sock.connect((str(address), port))
        else:
            sock.connect((str(address), port, 0, self.sender.ifindex("eth0") if address.is_link_local else 0))
        return sock

    def _fails(self, sock: socket.socket) -> bool:
        try:
            sock.send(b"!")
        except ConnectionRefusedError:
            return True
        return self._has_failed(sock)

    def _has_failed(self, sock: socket.socket) -> bool:
        return sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNREFUSED

    def program(self, port: int) -> socket.socket:
        """A program on the host that receives there, and asks for nothing special."""
        sock = self.host.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            sock.bind((str(HOST4), port))
        except BaseException:
            sock.close()
            raise
        return sock


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    if reason := unsupported():
        pytest.skip(reason)
    with Lab() as lab:
        yield Pair(lab)


@pytest.fixture
def absorbers(pair: Pair) -> Iterator[Absorbers]:
    opened = Absorbers()
    yield opened
    opened.close()


def take(pair: Pair, absorbers: Absorbers, address: Address, port: int, interface: str = "") -> None:
    pair.host.call(absorbers.take, Place(address, port, interface))


def give_up(absorbers: Absorbers, address: Address, port: int, interface: str = "") -> None:
    absorbers.give_up(Place(address, port, interface))
    absorbers.sweep()


@pytest.mark.parametrize("address", [HOST4, HOST6])
def test_the_host_refuses_nothing_as_long_as_a_rule_has_the_input(
    pair: Pair, absorbers: Absorbers, address: Address
) -> None:
    assert pair.is_refused(address, 5000)
    take(pair, absorbers, address, 5000)
    take(pair, absorbers, address, 5000)
    assert not pair.is_refused(address, 5000)
    assert pair.is_refused(address, 5001)
    give_up(absorbers, address, 5000)
    assert not pair.is_refused(address, 5000)  # a rule is left
    give_up(absorbers, address, 5000)
    assert pair.is_refused(address, 5000)


def test_nothing_of_it_is_kept(pair: Pair, absorbers: Absorbers) -> None:
    """What would be kept would take memory."""
    take(pair, absorbers, HOST4, 5000)
    for _ in range(20):
        assert not pair.is_refused(HOST4, 5000)
    lines = pair.host.call(Path("/proc/thread-self/net/udp").read_text).split("\n")[1:]
    (ours,) = (line.split() for line in lines if line and line.split()[1].endswith(f":{5000:04X}"))
    assert ours[4] == "00000000:00000000"  # queues


@pytest.mark.parametrize("address", [LATER4, LATER6])
def test_the_address_may_come_later(pair: Pair, absorbers: Absorbers, address: Address) -> None:
    take(pair, absorbers, address, 5000)
    assert not absorbers.is_missing
    length = 24 if address.version == 4 else 64
    pair.host.ip("address", "add", f"{address}/{length}", "dev", "in0")
    try:
        assert not pair.is_refused(address, 5000)
    finally:
        pair.host.ip("address", "del", f"{address}/{length}", "dev", "in0")


def test_an_address_of_link_local_scope_is_an_interface_s(pair: Pair, absorbers: Absorbers) -> None:
    assert pair.is_refused(pair.link_local, 5000)
    take(pair, absorbers, pair.link_local, 5000, "in0")
    assert not pair.is_refused(pair.link_local, 5000)
    give_up(absorbers, pair.link_local, 5000, "in0")
    assert pair.is_refused(pair.link_local, 5000)


@pytest.mark.parametrize("option", [None, socket.SO_REUSEADDR, socket.SO_REUSEPORT])
def test_a_program_keeps_its_datagrams(
    pair: Pair, absorbers: Absorbers, caplog: pytest.LogCaptureFixture, option: int | None
) -> None:
    """Of one that was first all still arrive; one that comes later is told, and does not lose some without a word."""
    caplog.set_level(logging.INFO)
    program = pair.host.socket(socket.AF_INET, socket.SOCK_DGRAM)
    if option is not None:
        program.setsockopt(socket.SOL_SOCKET, option, 1)
    program.bind((str(HOST4), 5000))
    program.settimeout(5)
    take(pair, absorbers, HOST4, 5000)
    assert absorbers.is_missing
    assert "a program of this host receives at 192.0.2.1 port 5000, too" in caplog.text
    with program:
        for _ in range(20):
            assert not pair.is_refused(HOST4, 5000)
            assert program.recv(10) == b"?"
        pair.host.call(absorbers.retry)
        assert absorbers.is_missing
        assert len(caplog.records) == 1
    assert pair.is_refused(HOST4, 5000)
    pair.host.call(absorbers.retry)
    assert not absorbers.is_missing
    assert not pair.is_refused(HOST4, 5000)
    with pytest.raises(OSError, match="in use"):
        pair.program(5000)
    give_up(absorbers, HOST4, 5000)
    pair.program(5000).close()


def test_a_successor_goes_on_with_the_same_socket(pair: Pair, absorbers: Absorbers) -> None:
    take(pair, absorbers, HOST4, 5000)
    successor = Absorbers()
    for place, sock in absorbers.sockets():
        successor.adopt(place, sock.dup())
    take(pair, successor, HOST4, 5000)
    absorbers.close()
    assert not successor.is_missing
    assert not pair.is_refused(HOST4, 5000)
    successor.close()
    assert pair.is_refused(HOST4, 5000)


def test_what_was_missing_is_forgotten_with_its_rule(pair: Pair, absorbers: Absorbers) -> None:
    with pair.program(5000):
        take(pair, absorbers, HOST4, 5000)
        give_up(absorbers, HOST4, 5000)
        assert not absorbers.is_missing
    pair.host.call(absorbers.retry)
    assert pair.is_refused(HOST4, 5000)


def test_who_takes_it_again_at_once_never_lets_it_go(pair: Pair, absorbers: Absorbers) -> None:
    take(pair, absorbers, HOST4, 5000)
    ((_place, before),) = absorbers.sockets()
    absorbers.give_up(Place(HOST4, 5000))
    take(pair, absorbers, HOST4, 5000)
    absorbers.sweep()
    assert [sock for _place, sock in absorbers.sockets()] == [before]


def test_esp_is_taken_too(pair: Pair, absorbers: Absorbers) -> None:
    """By ICMP, protocol unreachable, if nobody takes it."""

    def is_refused() -> bool:
        with Capture(pair.sender, "eth0") as capture:
            inject(
                pair.sender,
                "eth0",
                ethernet_ipv4("192.0.2.9", str(HOST4), 50, bytes(40), destination_mac=pair.host.mac("in0")),
            )
            assert pair.is_refused(HOST4, 9)  # behind it
            return bool(capture.matching(lambda f: f.data[23] == 1 and f.data[34:36] == bytes((3, 2))))

    assert is_refused()
    take(pair, absorbers, HOST4, 0)
    assert not is_refused()


def test_an_interface_that_is_made_again_is_another_one(pair: Pair, absorbers: Absorbers) -> None:
    take(pair, absorbers, pair.link_local, 5000, "in9")
    assert absorbers.is_missing  # there is none
    pair.host.ip("link", "set", "in0", "down")
    pair.host.ip("link", "set", "in0", "name", "in9", "up")
    try:
        pair.host.call(absorbers.retry)
        assert not absorbers.is_missing
    finally:
        pair.host.ip("link", "set", "in9", "down")
        pair.host.ip("link", "set", "in9", "name", "in0", "up")
    pair.host.call(absorbers.retry)
    assert absorbers.is_missing


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("192.0.2.1:5000%in0", Place(HOST4, 5000)),
        ("192.0.2.1:esp%in0", Place(HOST4, 0)),
        ("[fe80::1]:5000%in0", Place(IPv6Address("fe80::1"), 5000, "in0")),
        ("239.1.1.1:5000%in0", None),
        ("[ff05::1]:5000%in0", None),
        ("255.255.255.255:5000%in0", None),
        ("239.1.1.1:*%in0", None),
    ],
)
def test_which_inputs_need_one(text: str, expected: Place | None) -> None:
    assert place_of(parse_input(text), "in0") == expected

"""Ordinary UDP sockets as an ingress (rootless mode), of every engine that can have one."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator

import pytest

from mcrelay.limits import PORTS_MAX
from mcrelay.net import plain
from mcrelay.net.interfaces import Interface
from tests.engines.bench import ENGINES, IN0, Bench, Kind


@pytest.fixture(params=["recv", "reference"])
def kind(request: pytest.FixtureRequest) -> Kind:
    return ENGINES[request.param]


@pytest.fixture
def sock() -> Iterator[socket.socket]:
    with plain.open_port(Interface("lo", socket.if_nametoindex("lo"), 65536, is_up=True, has_ipv4=True), 50999) as sock:
        yield sock


def test_sockets_come_and_go(bench: Bench, sock: socket.socket) -> None:
    engine = bench.start_bare()
    fd = sock.fileno()
    assert bench.answer(engine.add_socket(IN0, 1, fd)) == errno.ENOENT
    assert bench.answer(engine.remove_socket(IN0, 1)) == errno.ENOENT
    assert bench.answer(engine.attach_datagrams(IN0)) == 0
    assert bench.answer(engine.attach_datagrams(IN0)) == errno.EEXIST
    for _ in range(2):
        assert bench.answer(engine.add_socket(IN0, 1, fd)) == 0
        assert bench.answer(engine.add_socket(IN0, 1, fd)) == errno.EEXIST
        assert bench.answer(engine.remove_socket(IN0, 1)) == 0
        assert bench.answer(engine.remove_socket(IN0, 1)) == errno.ENOENT
    assert bench.answer(engine.detach_ingress(IN0)) == 0
    assert bench.answer(engine.detach_ingress(IN0)) == errno.ENOENT
    assert bench.answer(engine.add_socket(IN0, 1, fd)) == errno.ENOENT


def test_there_are_no_more_than_so_many(bench: Bench, sock: socket.socket) -> None:
    engine = bench.start_bare()
    assert bench.answer(engine.attach_datagrams(IN0)) == 0
    fds = [sock.fileno()]
    try:
        while len(fds) <= PORTS_MAX:
            fds.append(socket.dup(sock.fileno()))
        for number in range(PORTS_MAX):
            assert bench.answer(engine.add_socket(IN0, number, fds[number])) == 0
        assert bench.answer(engine.add_socket(IN0, PORTS_MAX, fds[PORTS_MAX])) == errno.ENFILE
        assert bench.answer(engine.remove_socket(IN0, 7)) == 0
        assert bench.answer(engine.add_socket(IN0, PORTS_MAX, fds[7])) == 0
        assert bench.answer(engine.detach_ingress(IN0)) == 0
    finally:
        for fd in fds[1:]:
            socket.close(fd)

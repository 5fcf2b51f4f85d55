"""Scrape listener: from bind to close, and over to the next daemon."""

from __future__ import annotations

import asyncio
import os
import socket

import pytest

from mcrelay import acceptor
from mcrelay.endpoint import Endpoint
from mcrelay.errors import Error
from mcrelay.messages import InheritMetrics, Message, Scraper
from mcrelay.scrape_listener import ScrapeListener, unlisten
from tests.unit.test_channel import until


def free_endpoint(family: int = socket.AF_INET) -> Endpoint:
    with socket.socket(family) as sock:
        sock.bind(("127.0.0.1" if family == socket.AF_INET else "::1", 0))
        address, port = sock.getsockname()[:2]
        return address, port


def connect(endpoint: Endpoint) -> socket.socket:
    return socket.create_connection(endpoint, timeout=10)


class Taken:
    """What a listener delivers."""

    def __init__(self) -> None:
        self.peers: list[str] = []
        self.sockets: list[socket.socket] = []

    def deliver(self, scraper: Message, descriptor: int) -> None:
        assert isinstance(scraper, Scraper)
        self.peers.append(scraper.address)
        self.sockets.append(socket.socket(fileno=descriptor))

    def close(self) -> None:
        for sock in self.sockets:
            sock.close()


def peer_text(sock: socket.socket) -> str:
    address, port = sock.getsockname()[:2]
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_whoever_connects_is_delivered_or_waits(family: int) -> None:
    async def test() -> None:
        endpoint = free_endpoint(family)
        listener, taken = ScrapeListener(endpoint), Taken()
        early = connect(endpoint)
        listener.open(taken.deliver)
        await until(lambda: taken.peers)
        listener.shut()
        late = connect(endpoint)
        await asyncio.sleep(0.05)
        assert taken.peers == [peer_text(early)]
        listener.open(taken.deliver)
        await until(lambda: taken.peers == [peer_text(early), peer_text(late)])
        listener.close()
        with pytest.raises(ConnectionRefusedError):
            connect(endpoint)
        taken.close()
        early.close()
        late.close()

    asyncio.run(test())


def test_a_flood_is_taken_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """It rests after each full turn, and can be shut then, too."""

    async def test() -> None:
        endpoint = free_endpoint()
        listener, taken = ScrapeListener(endpoint), Taken()
        crowd = [connect(endpoint) for _ in range(2 * acceptor.ACCEPTS_PER_TURN + 1)]
        listener.open(taken.deliver)
        await until(lambda: taken.peers)
        assert len(taken.peers) == acceptor.ACCEPTS_PER_TURN
        listener.shut()
        await asyncio.sleep(0.1)
        assert len(taken.peers) == acceptor.ACCEPTS_PER_TURN
        listener.open(taken.deliver)
        await until(lambda: len(taken.peers) == len(crowd))
        listener.close()
        taken.close()
        for sock in crowd:
            sock.close()

    asyncio.run(test())


def test_a_successor_goes_on_with_the_socket() -> None:
    async def test() -> None:
        endpoint = free_endpoint()
        first, taken = ScrapeListener(endpoint), Taken()
        ((message, descriptors),) = first.will()
        assert message == InheritMetrics(address=endpoint[0], port=endpoint[1])
        assert message.descriptors() == len(descriptors) == 1
        assert isinstance(message, InheritMetrics)
        second = ScrapeListener(endpoint, (message, os.dup(descriptors[0])))
        first.close()
        client = connect(endpoint)
        second.open(taken.deliver)
        await until(lambda: taken.peers)
        second.close()
        taken.close()
        client.close()

    asyncio.run(test())


@pytest.mark.parametrize("wanted", [True, False])
def test_one_that_wants_another_address_or_none_closes_what_it_inherits(wanted: bool) -> None:
    endpoint = free_endpoint()
    other = free_endpoint() if wanted else None
    first = ScrapeListener(endpoint)
    ((message, descriptors),) = first.will()
    assert isinstance(message, InheritMetrics)
    second = ScrapeListener(other, (message, os.dup(descriptors[0])))
    first.close()
    with pytest.raises(ConnectionRefusedError):
        connect(endpoint)
    assert [str(each) for each, _fds in second.will()] == [str(each) for each, _fds in second.will() if other]
    if other:
        connect(other).close()
    second.close()


def test_without_an_address_it_does_nothing() -> None:
    listener = ScrapeListener(None)
    listener.open(lambda _scraper, _descriptor: None)
    listener.shut()
    assert list(listener.will()) == []
    listener.close()


def test_a_port_in_use_is_refused_in_one_line() -> None:
    endpoint = free_endpoint()
    first = ScrapeListener(endpoint)
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(Error) as refusal:
        ScrapeListener(endpoint)
    assert refusal.value.exit_code == 73
    assert f"127.0.0.1:{endpoint[1]}: Address already in use; 'ss -ltnp' shows" in str(refusal.value)
    assert len(os.listdir("/proc/self/fd")) == descriptors
    first.close()


@pytest.mark.parametrize("address", ["192.0.2.1", "2001:db8::1"])
def test_an_address_that_is_not_here_yet_is_waited_for(address: str, caplog: pytest.LogCaptureFixture) -> None:
    """A relay that its host boots with relays before a DHCP server has answered."""
    listener = ScrapeListener((address, 9478))
    assert f"{address}]:9478" in caplog.text.replace(f"{address}:", f"{address}]:")
    assert "which is no address of this host yet" in caplog.text
    listener.close()


@pytest.mark.parametrize("address", ["fe80::1%nowhere", "239.1.1.1", "255.255.255.255", "0.1.2.3", "ff05::1"])
def test_an_address_that_cannot_come_is_refused_in_one_line(address: str) -> None:
    with pytest.raises(Error) as refusal:
        ScrapeListener((address, 9478))
    assert f"{address}]:9478" in str(refusal.value).replace(f"{address}:", f"{address}]:")
    assert refusal.value.hint


def test_what_a_service_manager_keeps_can_be_made_to_listen_no_more() -> None:
    """Its port is free then, although somebody else has the socket yet."""
    endpoint = free_endpoint()
    first = ScrapeListener(endpoint)
    ((_message, (descriptor,)),) = first.will()
    unlisten(descriptor)
    ScrapeListener(endpoint).close()
    first.close()
    before = os.listdir("/proc/self/fd")
    with open("/dev/null") as other:
        unlisten(other.fileno())
    with socket.socketpair()[0] as pair, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
        unlisten(pair.fileno())
        unlisten(datagrams.fileno())
    assert os.listdir("/proc/self/fd") == before

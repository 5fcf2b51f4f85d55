"""Scrapers on a real event loop: what is asked for and answered, and what strangers may cost.

    a raw socket -- any bytes --> Scrapers -- path, what it accepts --> a page

Limits on time are shortened here. Nothing is asserted on how long something takes.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Final

import pytest

from mcrelay import scrapers as limits
from mcrelay.errors import Busy
from mcrelay.limits import SCRAPERS_MAX
from mcrelay.messages import Scraper
from mcrelay.scrapers import HEAD_MAX, Answer, Scrapers
from tests.unit.test_channel import run, until

DEADLINE_S: Final = 10.0
GET: Final = b"GET /metrics HTTP/1.1\r\nHost: relay\r\n\r\n"


class House:
    """Scrapers with some pages, and what they were asked for."""

    def __init__(self) -> None:
        self.accepted: list[str] = []
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.body = b"mcrelay_clients 1\n"
        self.tasks: set[asyncio.Task[None]] = set()
        self.scrapers = Scrapers({"/metrics": self.metrics, "/busy": self.busy, "/broken": self.broken}, self.keep)

    def keep(self, task: asyncio.Task[None]) -> None:
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def metrics(self, accept: str) -> Answer:
        self.accepted.append(accept)
        await self.may_answer.wait()
        return Answer(200, "text/plain", self.body)

    async def busy(self, accept: str) -> Answer:
        raise Busy("the rules change all the time", "ask again")

    async def broken(self, accept: str) -> Answer:
        raise ValueError("a bug")

    def connect(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self.scrapers.accept(Scraper(address="192.0.2.1:4242"), theirs.detach())
        return ours

    async def ask(self, request: bytes) -> bytes:
        with self.connect() as sock:
            await asyncio.get_running_loop().sock_sendall(sock, request)
            return await received(sock)

    async def rest(self) -> None:
        await until(lambda: not self.tasks)


async def received(sock: socket.socket) -> bytes:
    """All until the end; the other side closes, or lingers for us to."""
    loop, data = asyncio.get_running_loop(), b""
    async with asyncio.timeout(DEADLINE_S):
        while piece := await loop.sock_recv(sock, 65536):
            data += piece
            head, _, body = data.partition(b"\r\n\r\n")
            if b"Content-Length: %d\r\n" % len(body) in head or b"Content-Length: 0" in head:
                return data
    return data


def status(answer: bytes) -> int:
    assert answer.startswith(b"HTTP/1.1 ")
    return int(answer[9:12])


def test_a_page_is_answered() -> None:
    async def test() -> None:
        house = House()
        answer = await house.ask(GET.replace(b"\r\n\r\n", b"\r\nAccept: text/plain\r\nAccept: */*\r\n\r\n"))
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b"Content-Type: text/plain\r\n" in head
        assert b"Connection: close" in head
        assert body == house.body
        assert house.accepted == ["text/plain,*/*"]
        await house.rest()

    run(test())


@pytest.mark.parametrize(
    ("request_head", "code", "words"),
    [
        (b"GET /metrics?format=x HTTP/1.1\r\nHost: a\r\n\r\n", 200, b"mcrelay_clients"),
        (b"GET /metrics HTTP/1.0\r\n\r\n", 200, b"mcrelay_clients"),
        (b"GET /metrics HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nbody", 200, b"mcrelay_clients"),
        (b"GET http://relay:9478/metrics HTTP/1.1\r\nHost: a\r\n\r\n", 200, b"mcrelay_clients"),
        (b"GET HTTP://[::1]/metrics?a=http://b/ HTTP/1.1\r\nHost: a\r\n\r\n", 200, b"mcrelay_clients"),
        (b"GET http://relay HTTP/1.1\r\nHost: a\r\n\r\n", 404, b"there are"),
        (b"GET http:///metrics HTTP/1.1\r\nHost: a\r\n\r\n", 404, b"there are"),  # of no host
        (b"GET /http://relay/metrics HTTP/1.1\r\nHost: a\r\n\r\n", 404, b"there are"),
        (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", 404, b"there are /metrics and /busy"),
        (b"GET /metrics/../etc/passwd HTTP/1.1\r\nHost: a\r\n\r\n", 404, b"there are"),
        (b"GET /m%65trics HTTP/1.1\r\nHost: a\r\n\r\n", 404, b"there are"),
        (b"POST /metrics HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n", 405, b"Allow: GET, HEAD"),
        (b"DELETE /metrics HTTP/1.1\r\nHost: a\r\n\r\n", 405, b"use GET"),
        (b"GET /busy HTTP/1.1\r\nHost: a\r\n\r\n", 503, b"the rules change all the time; ask again"),
        (b"GET /metrics HTTP/1.1\r\n\r\n", 400, b"not an HTTP request"),  # no Host
        (b"GET /metrics HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400, b"not an HTTP request"),
        (b"GET /metrics\r\n\r\n", 400, b"not an HTTP request: illegal request line\n"),
        (b"GET /metrics HTTP/1.1\r\nHost: a\r\nno\x1b[31m\r\n\r\n", 400, b"illegal header line\n"),
        (b"GET /" + b"x" * 200 + b"\r\n\r\n", 400, b"illegal request line\n"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 404, b"there are"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200), 400, b"not an HTTP request"),  # TLS
        (b"\xff" * 100 + b"\r\n\r\n", 400, b"not an HTTP request"),
        (b"\r\n\r\nGET", 400, b"not an HTTP request"),
        (b"GET /metrics HTTP/1.1\r\nHost: a\r\nX: " + b"x" * HEAD_MAX + b"\r\n\r\n", 431, b"at most 8192 bytes"),
        (b"GET /" + b"x" * 7 * HEAD_MAX, 431, b"at most 8192 bytes"),
        (b"x" * 50_000, 431, b"at most 8192 bytes"),
        (b"GET /metrics HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n", 501, b"not an HTTP request"),
    ],
)
def test_each_request_has_its_answer(request_head: bytes, code: int, words: bytes) -> None:
    async def test() -> None:
        house = House()
        answer = await house.ask(request_head)
        assert status(answer) == code
        assert words in answer
        assert b"bytearray" not in answer
        assert len(answer) < 1000
        assert status(await house.ask(GET)) == 200  # others notice nothing
        await house.rest()

    run(test())


def test_a_bug_of_ours_is_logged_and_told_without_its_details(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        house = House()
        answer = await house.ask(b"GET /broken HTTP/1.1\r\nHost: a\r\n\r\n")
        assert status(answer) == 500
        assert b"a bug" not in answer
        await house.rest()

    run(test())
    assert "a bug" in caplog.text


def test_head_has_no_body() -> None:
    async def test() -> None:
        house = House()
        with house.connect() as sock:
            await asyncio.get_running_loop().sock_sendall(sock, GET.replace(b"GET", b"HEAD"))
            sock.shutdown(socket.SHUT_WR)
            answer = await received(sock)
        assert status(answer) == 200
        assert b"Content-Length: %d\r\n" % len(house.body) in answer
        assert answer.endswith(b"\r\n\r\n")
        await house.rest()

    run(test())


def test_a_request_may_come_byte_by_byte_and_one_is_answered() -> None:
    """What is behind it is not: a connection is for one."""

    async def test() -> None:
        house = House()
        with house.connect() as sock:
            loop = asyncio.get_running_loop()
            for byte in GET:
                await loop.sock_sendall(sock, bytes([byte]))
                await asyncio.sleep(0)
            assert status(await received(sock)) == 200
        pipelined = await house.ask(GET * 50)
        assert pipelined.count(b"HTTP/1.1 200") == 1
        assert len(house.accepted) == 2
        await house.rest()

    run(test())


@pytest.mark.parametrize("begun", [b"", b"G", GET[:-2]])
def test_who_does_not_finish_a_request_is_closed(begun: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "REQUEST_S", 0.05)

    async def test() -> None:
        house = House()
        with house.connect() as sock:
            await asyncio.get_running_loop().sock_sendall(sock, begun)
            assert await received(sock) == b""
        await house.rest()
        house.connect().close()  # or goes away
        await house.rest()
        assert house.accepted == []

    run(test())


def test_who_does_not_read_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "RESPONSE_S", 0.05)

    async def test() -> None:
        house = House()
        house.body = bytes(10_000_000)
        with house.connect() as sock:
            await asyncio.get_running_loop().sock_sendall(sock, GET)
            await until(lambda: house.accepted)
            await house.rest()

    run(test())


def test_who_does_not_close_is_closed_and_read_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LINGER_S", 0.05)

    async def test() -> None:
        house = House()
        with house.connect() as sock:
            await asyncio.get_running_loop().sock_sendall(sock, GET)
            assert status(await received(sock)) == 200
            await house.rest()
        with house.connect() as sock:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                while True:
                    await asyncio.get_running_loop().sock_sendall(sock, GET + bytes(65536))
            await house.rest()

    run(test())


def test_where_there_are_too_many_the_oldest_goes() -> None:
    async def test() -> None:
        house = House()
        crowd = [house.connect() for _ in range(SCRAPERS_MAX)]
        assert len(house.tasks) == SCRAPERS_MAX
        for n in range(5):
            assert status(await house.ask(GET)) == 200
            assert await received(crowd[n]) == b""
        for sock in crowd:
            sock.close()
        await house.rest()

    run(test())


def test_a_scraper_that_goes_away_keeps_nobody_waiting() -> None:
    async def test() -> None:
        house = House()
        house.may_answer.clear()
        for _ in range(3):
            with house.connect() as sock:
                await asyncio.get_running_loop().sock_sendall(sock, GET)
        await until(lambda: len(house.accepted) == 3)
        house.may_answer.set()
        assert status(await house.ask(GET)) == 200
        await house.rest()

    run(test())

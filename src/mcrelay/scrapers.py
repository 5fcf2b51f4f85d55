"""Scrapers: HTTP connections of those who read metrics, and what each of them may cost.

Owns the connections, their time and their number. Knows nothing of what stands on a page: whoever makes a Scrapers
gives the pages, which are asked for by GET or HEAD. h11 knows HTTP; there is one request to a connection, since what is
behind it would only keep a place.

The socket was accepted by the supervisor and has no option that we would have to set. Everything that comes is a
stranger's: a head that is too long, too slow or none costs its connection, and a line of the log only for who debugs.
Where there are too many connections, the oldest goes: a scraper needs its own for milliseconds.
"""

from __future__ import annotations

import asyncio
import logging
import re
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from http import HTTPStatus
from typing import Final

import h11

from mcrelay.errors import Error
from mcrelay.limits import SCRAPERS_MAX
from mcrelay.messages import Scraper

log = logging.getLogger(__name__)

HEAD_MAX: Final = 8 * 1024  # bytes of a request
REQUEST_S: Final = 5.0  # for it to come
RESPONSE_S: Final = 5.0  # for the answer to be taken
LINGER_S: Final = 1.0  # for the other side to close first: what we have not read would take the answer with it
LINGER_MAX: Final = 64 * 1024  # bytes that are thrown away meanwhile
READ_SIZE: Final = 4 * 1024
ABSOLUTE: Final = re.compile(rb"\Ahttp://[^/?#]+", re.IGNORECASE)  # what stands before a path in the absolute form
TEXT: Final = "text/plain; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    content_type: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


Page = Callable[[str], Awaitable[Answer]]  # given what the request accepts


class Refusal(Exception):
    """What is answered instead of a page."""

    def __init__(self, status: int, text: str, **headers: str) -> None:
        super().__init__(text)
        self.answer = Answer(status, TEXT, f"{text}\n".encode(), headers)


class _Socket(socket.socket):
    """Of a scraper. asyncio shows it in debug mode, for which a socket asks the kernel what the sandbox forbids."""

    __repr__ = object.__repr__


class Scrapers:
    """All of them. `pages` by path; `keep` holds a task until it is done."""

    def __init__(self, pages: Mapping[str, Page], keep: Callable[[asyncio.Task[None]], None]) -> None:
        self._pages = pages
        self._keep = keep
        self._connections: dict[asyncio.Task[None], None] = {}  # in their order

    def accept(self, peer: Scraper, descriptor: int) -> None:
        """Serve it."""
        if len(self._connections) >= SCRAPERS_MAX:
            oldest = next(iter(self._connections))
            del self._connections[oldest]
            oldest.cancel()
        sock = _Socket(fileno=descriptor)
        sock.setblocking(False)
        task = asyncio.get_running_loop().create_task(self._serve(sock, peer))
        task.add_done_callback(lambda done: sock.close())  # should it be cancelled before it has begun
        task.add_done_callback(lambda done: self._connections.pop(done, None))
        self._connections[task] = None
        self._keep(task)

    async def _serve(self, sock: socket.socket, peer: Scraper) -> None:
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_MAX)
        with_body = True
        try:
            try:
                async with asyncio.timeout(REQUEST_S):
                    request = await _receive(sock, connection)
                if request is None:
                    return
                with_body = request.method != b"HEAD"
                answer = await self._answer(request)
            except Refusal as refusal:
                answer = refusal.answer
            async with asyncio.timeout(RESPONSE_S):
                await _send(sock, connection, answer, with_body=with_body)
            await _linger(sock)
        except OSError as error:  # time is up, too
            log.debug("scraper %s: %s", peer.address, error.strerror or type(error).__name__)

    async def _answer(self, request: h11.Request) -> Answer:
        page = self._page(request)
        accept = b",".join(value for name, value in request.headers if name == b"accept")
        try:
            return await page(accept.decode("latin-1"))
        except Error as error:
            raise Refusal(503, str(error)) from None
        except Exception:
            log.exception("cannot answer a scraper")
            raise Refusal(500, "an error inside the daemon; its log says more") from None

    def _page(self, request: h11.Request) -> Page:
        # Whoever takes us for a proxy asks for a whole URL (RFC 9112, 3.2.2): which host it names does not matter.
        path = ABSOLUTE.sub(b"", request.target).partition(b"?")[0].decode("ascii", "replace")
        page = self._pages.get(path)
        if page is None:
            raise Refusal(404, f"there are {' and '.join(self._pages)}")
        if request.method not in (b"GET", b"HEAD"):
            raise Refusal(405, "use GET", Allow="GET, HEAD")
        return page


async def _receive(sock: socket.socket, connection: h11.Connection) -> h11.Request | None:
    """The request's head; None if it ends before. Refusal if it is none, or too long."""
    loop = asyncio.get_running_loop()
    room = HEAD_MAX + 1
    try:
        while True:
            event = connection.next_event()
            if isinstance(event, h11.Request):
                return event
            if event is not h11.NEED_DATA:
                return None
            data = await loop.sock_recv(sock, room)
            room -= len(data)
            connection.receive_data(data)
    except h11.RemoteProtocolError as error:
        if not room:
            raise Refusal(431, f"a request has at most {HEAD_MAX} bytes") from None
        why = str(error).partition(": bytearray(")[0]  # what it quotes, its sender knows
        raise Refusal(error.error_status_hint, f"not an HTTP request: {why}") from None


async def _send(sock: socket.socket, connection: h11.Connection, answer: Answer, *, with_body: bool) -> None:
    headers = {
        "Content-Type": answer.content_type,
        "Content-Length": str(len(answer.body)),
        "Date": formatdate(usegmt=True),
        "Cache-Control": "no-store",
        "Connection": "close",
        **answer.headers,
    }
    reason = HTTPStatus(answer.status).phrase
    head = connection.send(h11.Response(status_code=answer.status, headers=list(headers.items()), reason=reason))
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(sock, head or b"")
    if with_body:
        await loop.sock_sendall(sock, answer.body)


async def _linger(sock: socket.socket) -> None:
    """Until the other side closes, but not for long."""
    loop = asyncio.get_running_loop()
    room = LINGER_MAX
    async with asyncio.timeout(LINGER_S):
        while room > 0 and (data := await loop.sock_recv(sock, READ_SIZE)):
            room -= len(data)

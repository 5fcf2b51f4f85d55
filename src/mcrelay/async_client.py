"""The API for asyncio: the calls of Client, as coroutines.

    async with AsyncClient() as relay:
        await relay.add("239.1.1.1:5000%eth0", ["239.2.2.2:6000%eth1"], name="feed-a")
        async for tapped in relay.tap("feed-a", count=10):
            print(tapped.packets)

Owns one connection for all calls, of however many tasks: the answers find their calls by ids, and no more requests are
under way at once than the daemon takes. A call that is cancelled or given up disturbs no other. Each stream has a
connection of its own, so that one that is not read holds up nobody. If the connection is lost, it goes on as Client
does: a call that only reads asks again, one that changes something fails, and the next call connects anew.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from types import TracebackType
from typing import Self

from mcrelay import calls
from mcrelay.api import (
    Added,
    Changed,
    EventKind,
    Happened,
    LogLevels,
    Paused,
    Removed,
    Restarted,
    RuleFacts,
    Rules,
    Stats,
    Status,
    Tapped,
    Upgraded,
    Version,
)
from mcrelay.conversation import (
    AGAIN_FOR_S,
    AGAIN_S,
    READ_SIZE,
    TIMEOUT_S,
    Absent,
    Conversation,
    Dialogue,
    Item,
    Lost,
    Question,
    Result,
    Stream,
    closed,
    id_of,
    lost,
    no_connection,
    seconds,
    unanswered,
)
from mcrelay.errors import Error, Unavailable
from mcrelay.handshake import greet
from mcrelay.limits import REQUESTS_MAX, TAP_BYTES_MAX
from mcrelay.messages import Message, ProcessFacts
from mcrelay.places import chosen_socket


class AsyncClient:
    """Connects on entry, or with the first call; the errors and parameters are Client's, and what a call means is said
    there. Belongs to one event loop."""

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        timeout_s: float = TIMEOUT_S,
        any_version: bool = False,
    ) -> None:
        self._path = chosen_socket(path)
        self._timeout_s = seconds("timeout_s", timeout_s)
        self._any_version = any_version
        self._is_closed = False
        self._was_connected = False
        self._connecting = asyncio.Lock()
        self._exchange: _Exchange | None = None
        self._streams: set[_Connection] = set()

    async def close(self) -> None:
        """Calls under way fail, and streams end."""
        self._is_closed = True
        if self._exchange is not None:
            await self._exchange.close()
        for connection in self._streams:
            connection.close()

    async def __aenter__(self) -> Self:
        await self._connected()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # Calls.

    async def ping(self) -> None:
        await self._run(calls.ping())

    async def version(self) -> Version:
        return await self._run(calls.version())

    async def status(self) -> Status:
        return await self._run(calls.status())

    async def add(self, input: str, outputs: Sequence[str], name: str | None = None) -> Added:
        return await self._run(calls.add(input, outputs, name))

    async def remove(self, rule: str) -> Removed:
        return await self._run(calls.remove(rule))

    async def pause(self, rule: str, output: str | None = None) -> Paused:
        return await self._run(calls.pause(rule, output, paused=True))

    async def resume(self, rule: str, output: str | None = None) -> Paused:
        return await self._run(calls.pause(rule, output, paused=False))

    async def change(
        self,
        add: Sequence[tuple[str, Sequence[str], str | None]] = (),
        remove: Sequence[str] = (),
        *,
        expect: int | None = None,
    ) -> Changed:
        return await self._run(calls.change(add, remove, expect))

    async def listing(self) -> Rules:
        return await self._run(calls.listing())

    async def rules(self) -> tuple[RuleFacts, ...]:
        return await self._run(calls.rules())

    async def stats(self) -> Stats:
        return await self._run(calls.stats())

    async def workers(self) -> tuple[ProcessFacts, ...]:
        return await self._run(calls.workers())

    async def log_levels(self) -> LogLevels:
        return await self._run(calls.log_levels())

    async def set_log_levels(self, level: str | None = None, components: Mapping[str, str] | None = None) -> LogLevels:
        return await self._run(calls.set_log_levels(level, components or {}))

    async def restart_worker(self, index: int) -> Restarted:
        return await self._run(calls.restart_worker(index))

    async def upgrade(self) -> Upgraded:
        return await self._run(calls.upgrade())

    def tap(
        self,
        rule: str,
        *,
        count: int | None = None,
        snap_length: int = TAP_BYTES_MAX,
        patience_s: float | None = None,
    ) -> AsyncGenerator[Tapped, None]:
        """It begins with the iteration, and ends with it at the latest."""
        return self._follow(calls.tap(rule, count, snap_length, patience_s))

    def events(
        self, kinds: Sequence[EventKind] = (), *, patience_s: float | None = None
    ) -> AsyncGenerator[Happened, None]:
        """It begins with the iteration, and ends with it at the latest."""
        return self._follow(calls.events(kinds, patience_s))

    # Their way.

    async def _run(self, dialogue: Dialogue[Result]) -> Result:
        return await _drive(dialogue, self._ask)

    async def _ask(self, question: Question) -> Message:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + AGAIN_FOR_S
        while True:
            exchange = await self._connected()
            try:
                async with asyncio.timeout(question.patience_s or self._timeout_s):
                    return await exchange.ask(question)
            except TimeoutError:
                raise unanswered(self._path) from None
            except Lost:  # which may have been to a daemon that was about to go
                if not question.reads or self._is_closed or loop.time() > deadline:
                    raise

    async def _follow(self, stream: Stream[Item]) -> AsyncGenerator[Item, None]:
        """The items of a stream, which has a connection of its own."""
        connection = await self._connect(Lost)
        self._streams.add(connection)
        last: Item | None = None
        try:
            await _drive(stream.open(), lambda question: connection.ask_alone(question, self._timeout_s))
            while True:
                try:
                    async with asyncio.timeout(stream.patience_s):
                        message = await connection.receive()
                except TimeoutError:
                    if stream.silence is not None:
                        yield stream.silence(last)
                    continue
                last = stream.take(message)
                if last is None:
                    return
                yield last
        finally:
            connection.close()
            self._streams.discard(connection)

    async def _connected(self) -> _Exchange:
        """The connection of all calls: if there is none, or no more, another."""
        async with self._connecting:
            if self._exchange is None or self._exchange.over is not None:
                again = (Lost, Absent) if self._was_connected else (Lost,)
                self._exchange = _Exchange(await self._connect(*again))
                self._was_connected = True
            return self._exchange

    async def _connect(self, *again: type[Unavailable]) -> _Connection:
        """As soon as there is somebody, for a while where it fails by one of these."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + AGAIN_FOR_S
        while True:
            if self._is_closed:
                raise closed()
            try:
                return await self._greet(await _Connection.open(self._path, self._timeout_s))
            except again:
                if loop.time() > deadline:
                    raise
            await asyncio.sleep(AGAIN_S)

    async def _greet(self, connection: _Connection) -> _Connection:
        if not self._any_version:
            try:
                await _drive(greet(self._path), lambda question: connection.ask_alone(question, self._timeout_s))
            except BaseException:
                connection.close()
                raise
        return connection


class _Connection:
    """One, of which somebody reads what comes."""

    def __init__(
        self, path: str, sock: socket.socket, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.path = path
        self._conversation = Conversation(path)
        self._sock = sock  # the transport's
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, path: str, timeout_s: float) -> Self:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)
        full: OSError | None = None
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    try:
                        sock.connect(path)
                        break
                    except BlockingIOError as error:  # a full backlog: there is no event for room in it (unix(7))
                        full = error
                        await asyncio.sleep(AGAIN_S)
                reader, writer = await asyncio.open_unix_connection(sock=sock)
        except TimeoutError:
            sock.close()
            raise no_connection(path, full) if full else unanswered(path) from None
        except OSError as error:
            sock.close()
            raise no_connection(path, error) from None
        except BaseException:
            sock.close()
            raise
        return cls(path, sock, reader, writer)

    def close(self) -> None:
        self._writer.transport.abort()

    def send(self, question: Question) -> int:
        """Under which id; never a part of it only, whatever becomes of the caller."""
        request_id, frames = self._conversation.say(question)
        if not self._writer.transport.get_write_buffer_size():
            try:
                frames = frames[self._sock.send(frames) :]
            except BlockingIOError:
                pass
            except OSError:
                # The transport would close and forget what the daemon said before it did: receive() has both.
                frames = b""
        if frames:
            self._writer.write(frames)
        return request_id

    async def receive(self) -> Message:
        """The next message of any kind. Lost or ProtocolError if there is no more. What has come of a message is kept
        when this is cancelled."""
        while (message := self._conversation.hear()) is None:
            try:
                data = await self._reader.read(READ_SIZE)
            except OSError as error:
                raise lost(self.path, error) from None
            if not data:
                raise lost(self.path)
            self._conversation.feed(data)
        return message

    async def ask_alone(self, question: Question, patience_s: float) -> Message:
        """The answer, where nobody else asks."""
        try:
            async with asyncio.timeout(patience_s):
                request_id = self.send(question)
                while True:
                    reply = await self.receive()
                    if id_of(reply) in (request_id, None):
                        return reply
        except TimeoutError:
            raise unanswered(self.path) from None


class _Exchange:
    """Owner of a connection with many questions under way, of many tasks."""

    def __init__(self, connection: _Connection) -> None:
        self.over: Error | None = None  # why it is
        self._connection = connection
        self._asked: dict[int, asyncio.Future[Message]] = {}  # cancelled ones, too: their answers come yet
        self._room = asyncio.Semaphore(REQUESTS_MAX)
        self._reading = asyncio.get_running_loop().create_task(self._read())

    async def close(self) -> None:
        self._reading.cancel()
        await asyncio.wait({self._reading})
        self._end(closed())  # if it had not even begun

    async def ask(self, question: Question) -> Message:
        """The answer, a Failure too. The error by which the connection ended."""
        await self._room.acquire()
        if self.over is not None:
            self._room.release()  # for the next who waits
            raise _again(self.over)
        try:
            request_id = self._connection.send(question)
        except BaseException:
            self._room.release()
            raise
        future: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._asked[request_id] = future
        return await future

    async def _read(self) -> None:
        over: Error = closed()
        try:
            while True:
                message = await self._connection.receive()
                request_id = id_of(message)
                if request_id is None:  # it is about the connection, and so about all calls
                    for future in self._asked.values():
                        if not future.done():
                            future.set_result(message)
                    over = lost(self._connection.path)
                    return
                if request_id in self._asked:
                    self._room.release()
                    future = self._asked.pop(request_id)
                    if not future.done():
                        future.set_result(message)
        except Error as error:
            over = error
        finally:
            self._end(over)

    def _end(self, over: Error) -> None:
        if self.over is not None:
            return
        self.over = over
        self._connection.close()
        for future in self._asked.values():
            if not future.done():
                future.set_exception(_again(over))
        self._asked.clear()
        self._room.release()


def _again(error: Error) -> Error:
    """The same error for one more to be told, with a traceback of its own."""
    return type(error)(error.message, error.hint, code=error.code)


async def _drive(dialogue: Dialogue[Result], ask: Callable[[Question], Awaitable[Message]]) -> Result:
    """What it returns, each of its questions asked."""
    try:
        question = next(dialogue)
        while True:
            question = dialogue.send(await ask(question))
    except StopIteration as end:
        result: Result = end.value
        return result

"""AsyncClient against daemons that are none, on real sockets: whatever they do, each call gets its answer or one error.

    AsyncClient -- a Unix socket -- a coroutine that serves

Limits on time are short here. Nothing is asserted on how long something takes.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
import os
import socket
import tempfile
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mcrelay import async_client
from mcrelay.api import (
    Add,
    Change,
    Failure,
    GetVersion,
    Hello,
    Ping,
    Pong,
    Remove,
    RuleFacts,
    StartTap,
    TapEnded,
    Tapped,
    TapStarted,
    Version,
)
from mcrelay.client import AsyncClient, Client
from mcrelay.codec import Codec, encode
from mcrelay.conversation import Question
from mcrelay.errors import Busy, Error, NotPermitted, ProtocolError, RuleError, Unavailable, UsageError
from mcrelay.frames import FRAME_MAX, HEADER, FrameReader, Malformed
from mcrelay.handshake import welcome
from mcrelay.limits import REQUESTS_MAX
from mcrelay.messages import Message

DEADLINE_S = 20.0
SHORT_S = 0.5  # in which a loaded machine answers, where something is answered
FACTS = RuleFacts("0" * 12, "feed", "x", ("y",), state="active", problems=())


@pytest.fixture
def path() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="mcrelay-") as directory:
        yield f"{directory}/control.sock"


class Side:
    """The daemon's end of a connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    def send(self, *messages: Message) -> None:
        self.send_bytes(b"".join(map(encode, messages)))

    def send_bytes(self, data: bytes) -> None:
        self._writer.write(data)

    async def requests(self) -> AsyncIterator[Message]:
        """What the client asks, once it has said hello, until it goes."""
        reader = FrameReader()
        codec = Codec("client", "client", "control")
        while data := await self._reader.read(65536):
            for frame in reader.feed(data):
                assert not isinstance(frame, Malformed)
                request = codec.decode(frame)
                if isinstance(request, Hello):
                    self.send(welcome(request, is_first=True))
                else:
                    yield request

    async def next(self) -> Message:
        return await anext(self.requests())


Serve = Callable[[Side], Awaitable[None]]
Test = Callable[[], Coroutine[Any, Any, None]]


def run(path: str, serve: Serve, test: Test) -> None:
    """The test, beside a daemon on a socket at `path`. Neither may fail, and of the client nothing may be left: no
    callback that failed, no task, no descriptor."""
    failures: list[Any] = []
    served: set[asyncio.Task[Any]] = set()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        served.add(task)
        try:
            await serve(Side(reader, writer))
        except (ConnectionError, StopAsyncIteration):
            pass  # the client has gone
        except Exception as error:
            failures.append(error)
            raise
        finally:
            writer.close()

    async def both() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: failures.append(context))
        server = await asyncio.start_unix_server(accept, path)
        async with asyncio.timeout(DEADLINE_S):
            await test()
            server.close()
            if served:
                await asyncio.wait(served)
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    asyncio.run(both())
    gc.collect()  # a future whose exception nobody has asked for says so now
    assert failures == []
    assert len(os.listdir("/proc/self/fd")) == before


async def silent(side: Side) -> None:
    async for _request in side.requests():
        pass


async def answering(side: Side) -> None:
    async for request in side.requests():
        match request:
            case Ping():
                side.send(Pong(id=request.id))
            case GetVersion():
                side.send(Version(id=request.id, version=str(request.id), protocol=2))
            case Add() | Remove() | Change():
                side.send(Failure(id=request.id, code="bad_rule", message="no such rule", hint="list them"))


# --- the two clients --------------------------------------------------------------------------------------------------


def test_both_clients_have_the_same_calls() -> None:
    def calls_of(client: type) -> dict[str, list[tuple[str, object, object]]]:
        return {
            name: [(p.name, p.kind, p.default) for p in inspect.signature(method).parameters.values()]
            for name, method in inspect.getmembers(client, inspect.isfunction)
            if not name.startswith("_") or name == "__init__"
        }

    assert calls_of(AsyncClient) == calls_of(Client)
    assert len(calls_of(Client)) > 12
    # What is no coroutine is a stream.
    for name, method in inspect.getmembers(AsyncClient, inspect.isfunction):
        if name in calls_of(Client) and name != "__init__" and not inspect.iscoroutinefunction(method):
            assert inspect.signature(method).return_annotation.startswith("AsyncGenerator"), name


def test_the_package_has_types() -> None:
    """PEP 561: without that file, a program that is checked takes everything of ours for Any."""
    assert (Path(async_client.__file__).parent / "py.typed").is_file()


# --- many calls on one connection -------------------------------------------------------------------------------------


def test_answers_in_any_order_find_their_calls(path: str) -> None:
    asked: list[int] = []

    async def backwards(side: Side) -> None:
        async for request in side.requests():
            assert isinstance(request, GetVersion)
            asked.append(request.id)
            if len(asked) == 20:
                for request_id in reversed(asked):
                    side.send(Version(id=request_id, version=str(request_id), protocol=2))

    async def test() -> None:
        async with AsyncClient(path) as relay:
            versions = await asyncio.gather(*(relay.version() for _ in range(20)))
        assert [int(one.version) for one in versions] == [one.id for one in versions]
        assert sorted(one.id for one in versions) == sorted(asked)

    run(path, backwards, test)


def test_no_more_is_asked_at_once_than_a_daemon_takes(path: str) -> None:
    most: list[int] = []

    async def serve(side: Side) -> None:
        waiting: list[int] = []
        later = asyncio.Event()

        async def answer() -> None:
            while True:
                await later.wait()
                await asyncio.sleep(0.02)  # whatever would be asked meanwhile has been
                most.append(len(waiting))
                side.send(*(Pong(id=request_id) for request_id in waiting))
                waiting.clear()
                later.clear()

        answers = asyncio.get_running_loop().create_task(answer())
        async for request in side.requests():
            assert isinstance(request, Ping)
            waiting.append(request.id)
            later.set()
        answers.cancel()
        await asyncio.wait({answers})

    async def test() -> None:
        async with AsyncClient(path) as relay:
            await asyncio.gather(*(relay.ping() for _ in range(5 * REQUESTS_MAX)))
        assert max(most) <= REQUESTS_MAX
        assert sum(most) == 5 * REQUESTS_MAX

    run(path, serve, test)


def test_a_call_that_is_cancelled_disturbs_no_other(path: str) -> None:
    async def test() -> None:
        async with AsyncClient(path) as relay:
            for _ in range(3):  # more than there is room for, if cancelled ones kept theirs
                tasks = [asyncio.ensure_future(relay.version()) for _ in range(REQUESTS_MAX)]
                await asyncio.sleep(0)
                await asyncio.sleep(0)
                for task in tasks[::2]:
                    task.cancel()
                results = await asyncio.gather(*tasks, return_exceptions=True)
                for result in results[::2]:
                    assert isinstance(result, asyncio.CancelledError)
                for result in results[1::2]:
                    assert isinstance(result, Version)
                    assert result.version == str(result.id)

    run(path, answering, test)


def test_a_refusal_is_of_its_call_alone(path: str) -> None:
    async def test() -> None:
        async with AsyncClient(path) as relay:
            results = await asyncio.gather(
                relay.ping(), relay.remove("x"), relay.add("x", ["y" * FRAME_MAX]), relay.ping(), return_exceptions=True
            )
        assert [type(result) for result in results] == [type(None), RuleError, UsageError, type(None)]

    run(path, answering, test)


def test_a_long_request_goes_whole(path: str) -> None:
    """Of more than the kernel's buffers hold, begun while another is not sent yet, and cancelled in the middle."""
    long = [(f"239.1.{n // 250}.{n % 250}:5000%eth0", ["239.2.2.2:6000%eth1"] * 20, None) for n in range(4000)]

    async def late(side: Side) -> None:
        await asyncio.sleep(SHORT_S)
        await answering(side)

    async def test() -> None:
        async with AsyncClient(path) as relay:
            first = asyncio.ensure_future(relay.change(long))
            second = asyncio.ensure_future(relay.change(long))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            first.cancel()
            await relay.ping()
            with pytest.raises(RuleError):
                await second

    run(path, late, test)


# --- daemons that do the wrong thing ---------------------------------------------------------------------------------


def test_a_silent_daemon_is_given_up_and_late_answers_are_nobodys(path: str) -> None:
    async def late(side: Side) -> None:
        first = await side.next()
        second = await side.next()
        assert isinstance(first, GetVersion)
        assert isinstance(second, GetVersion)
        side.send(Version(id=first.id, version="late", protocol=2))
        side.send(Version(id=second.id, version="in time", protocol=2))
        await silent(side)

    async def test() -> None:
        async with AsyncClient(path, timeout_s=SHORT_S) as relay:
            with pytest.raises(Unavailable, match="does not answer"):
                await relay.version()
            assert (await relay.version()).version == "in time"

    run(path, late, test)


@pytest.mark.parametrize("greets", [False, True])
def test_a_daemon_that_never_says_anything(path: str, greets: bool) -> None:
    async def mute(side: Side) -> None:
        if greets:
            await silent(side)
        else:
            await side._reader.read()

    async def test() -> None:
        relay = AsyncClient(path, timeout_s=SHORT_S)
        calls = (relay.ping() for _ in range(2))
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(result, Unavailable) and "not answer" in str(result) for result in results), results
        await relay.close()

    run(path, mute, test)


def test_a_trickle_is_no_answer(path: str) -> None:
    async def trickling(side: Side) -> None:
        async for request in side.requests():
            assert isinstance(request, Ping)
            for byte in encode(Pong(id=request.id)):
                await asyncio.sleep(SHORT_S / 4)
                side.send_bytes(bytes([byte]))

    async def test() -> None:
        async with AsyncClient(path, timeout_s=SHORT_S) as relay:
            with pytest.raises(Unavailable, match="does not answer"):
                await relay.ping()
        await asyncio.to_thread(sync)

    def sync() -> None:
        with Client(path, timeout_s=SHORT_S) as relay, pytest.raises(Unavailable, match="does not answer"):
            relay.ping()

    run(path, trickling, test)


WRONG: dict[str, tuple[bytes, type[Error], str]] = {
    "garbage": (HEADER.pack(7) + b"garbage", ProtocolError, "cannot be read"),
    "another protocol": (b"HTTP/1.1 400 Bad Request\r\n\r\n", ProtocolError, "cannot be read"),
    "too large a frame": (HEADER.pack(FRAME_MAX + 1), ProtocolError, "at most"),
    "an empty frame": (HEADER.pack(0), ProtocolError, "cannot be read"),
    "a request": (encode(Ping(id=1)), ProtocolError, "cannot be read"),
    "half a frame": (encode(Pong(id=1))[:-1], Unavailable, "closed the connection"),
    "an end": (b"", Unavailable, "closed the connection"),
    "a word to everybody": (
        encode(Failure(id=None, code="busy", message="much is held", hint="read")),
        Busy,
        "much is held",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_connection_gone_wrong_fails_the_calls_on_it_and_no_other(path: str, what: str) -> None:
    data, kind, words = WRONG[what]
    connections: list[Side] = []

    async def once_wrong(side: Side) -> None:
        connections.append(side)
        if len(connections) > 1:
            return await answering(side)
        async for request in side.requests():
            if isinstance(request, Add) and request.name == "last":
                side.send_bytes(data)
                return None
        return None

    async def test() -> None:
        async with AsyncClient(path) as relay:
            adding = [relay.add("x", ["y"], name) for name in ("first", "second", "last")]
            results = await asyncio.gather(*adding, return_exceptions=True)
            for result in results:
                assert type(result) in (kind, *kind.__subclasses__()), results
                assert words in str(result)
            assert len({id(result) for result in results}) == len(results)
            # What changes something has failed, and is not tried again; what comes next connects anew.
            assert len(connections) == 1
            with pytest.raises(RuleError):
                await relay.add("x", ["y"])
            assert len(connections) == 2

    run(path, once_wrong, test)


def test_what_only_reads_is_asked_again(path: str) -> None:
    connections: list[Side] = []

    async def fickle(side: Side) -> None:
        connections.append(side)
        if len(connections) < 4:
            await side.next()
        else:
            await answering(side)

    async def test() -> None:
        async with AsyncClient(path) as relay:
            await asyncio.gather(*(relay.ping() for _ in range(REQUESTS_MAX + 10)))
        assert len(connections) == 4

    run(path, fickle, test)


def test_who_is_refused_before_anything_is_said_is_told_why(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although what is said to a closed connection breaks it."""
    closed = threading.Event()

    def refuse(listening: socket.socket) -> None:
        client, _address = listening.accept()
        client.sendall(encode(Failure(id=None, code="not_permitted", message="user 7 may not", hint="become root")))
        client.close()
        closed.set()

    send = async_client._Connection.send

    def send_too_late(connection: async_client._Connection, question: Question) -> int:
        assert closed.wait(DEADLINE_S)
        return send(connection, question)

    monkeypatch.setattr(async_client._Connection, "send", send_too_late)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        thread = threading.Thread(target=refuse, args=[listening])
        thread.start()
        with pytest.raises(NotPermitted, match="user 7 may not"):
            asyncio.run(AsyncClient(path).ping())
        thread.join()


def test_a_word_about_the_connection_is_its_last(path: str) -> None:
    """Even where the daemon does not close it at once."""
    connections: list[Side] = []

    async def leaving(side: Side) -> None:
        connections.append(side)
        if len(connections) % 2 == 0:
            return await answering(side)
        await side.next()
        side.send(Failure(id=None, code="busy", message="much is held", hint="read"))
        return await silent(side)

    async def test() -> None:
        async with AsyncClient(path) as relay:
            for kind in (Busy, RuleError):
                with pytest.raises(kind):
                    await relay.remove("x")
        await asyncio.to_thread(sync)

    def sync() -> None:
        with Client(path, timeout_s=1) as relay:
            for kind in (Busy, RuleError):
                with pytest.raises(kind):
                    relay.remove("x")

    run(path, leaving, test)


def test_an_older_daemon_is_not_spoken_to_but_to_be_replaced(path: str) -> None:
    asked: list[Message] = []

    async def older(side: Side) -> None:
        reader = FrameReader()
        codec = Codec("client", "client", "control")
        while data := await side._reader.read(65536):
            for frame in reader.feed(data):
                assert not isinstance(frame, Malformed)
                request = codec.decode(frame)
                if isinstance(request, Hello):
                    message = "malformed request: Invalid value 'hello' - at `$.type`"
                    side.send(Failure(id=None, code="protocol", message=message, hint="a request is one of: ping"))
                else:
                    assert isinstance(request, GetVersion)
                    asked.append(request)
                    side.send(Version(id=request.id, version="0.0.1", protocol=1))

    async def test() -> None:
        for call in (AsyncClient(path).ping, AsyncClient(path).version):
            with pytest.raises(ProtocolError, match="older than this client"):
                await call()
        assert asked == []
        async with AsyncClient(path, any_version=True) as relay:
            assert (await relay.version()).protocol == 1
        await asyncio.to_thread(sync)

    def sync() -> None:
        with pytest.raises(ProtocolError, match="older than this client") as refusal:
            Client(path)
        assert refusal.value.exit_code == 76
        with Client(path, any_version=True) as relay:
            assert relay.version().version == "0.0.1"

    run(path, older, test)


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"path": b"/x"}, "b'/x' is no path of a socket; give a text"),
        ({"path": 3}, "3 is no path of a socket"),
        ({"path": ""}, "'' is no path of a socket"),
        ({"timeout_s": "x"}, "timeout_s: 'x' is no time; give seconds, above 0"),
        ({"timeout_s": -1}, "timeout_s: -1 is no time"),
        ({"timeout_s": True}, "timeout_s: True is no time"),
        ({"timeout_s": float("inf")}, "timeout_s: inf is no time"),
    ],
)
def test_a_client_says_what_cannot_be_meant(
    kind: Callable[..., object], arguments: dict[str, object], says: str
) -> None:
    with pytest.raises(UsageError) as refused:
        kind(**arguments)
    assert str(refused.value).startswith(says)


def test_a_client_is_one_threads_at_a_time(path: str) -> None:
    asked = threading.Event()

    async def slow(side: Side) -> None:
        async for request in side.requests():
            assert isinstance(request, Ping)
            asked.set()
            await asyncio.sleep(SHORT_S)
            side.send(Pong(id=request.id))

    def both() -> None:
        with Client(path) as relay, ThreadPoolExecutor(1) as thread:
            first = thread.submit(relay.ping)
            assert asked.wait(DEADLINE_S)
            with pytest.raises(UsageError, match="another thread is using this client; give each"):
                relay.ping()
            first.result(DEADLINE_S)
            relay.ping()

    async def test() -> None:
        await asyncio.to_thread(both)

    run(path, slow, test)


def test_a_path_may_be_a_path(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=f"no mcrelay daemon at {tmp_path}/none"):
        Client(tmp_path / "none")


def test_nobody_is_there(tmp_path: Path) -> None:
    async def test() -> None:
        for call in (AsyncClient(str(tmp_path / "none")).ping, AsyncClient(str(tmp_path)).ping):
            with pytest.raises(Unavailable, match="no mcrelay daemon at"):
                await call()

    asyncio.run(test())


def test_a_full_backlog_is_busy(path: str) -> None:
    async def test() -> None:
        with pytest.raises(Busy, match="does not take clients"):
            await AsyncClient(path, timeout_s=SHORT_S).ping()

    with socket.socket(socket.AF_UNIX) as listening, contextlib.ExitStack() as waiting:
        listening.bind(path)
        listening.listen(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                client = waiting.enter_context(socket.socket(socket.AF_UNIX))
                client.setblocking(False)
                client.connect(path)
        asyncio.run(test())


# --- the end ---------------------------------------------------------------------------------------------------------


def test_a_client_that_is_closed_has_no_calls_left(path: str) -> None:
    async def test() -> None:
        relay = AsyncClient(path)
        async with relay:
            under_way = [asyncio.ensure_future(relay.ping()) for _ in range(2 * REQUESTS_MAX)]
            await asyncio.sleep(SHORT_S)
        results = await asyncio.gather(*under_way, return_exceptions=True)
        assert all(isinstance(result, UsageError) for result in results), results
        with pytest.raises(UsageError, match="closed"):
            await relay.ping()
        await asyncio.to_thread(sync)

    def sync() -> None:
        with Client(path) as relay:
            pass
        with pytest.raises(UsageError, match="closed"):
            relay.ping()

    run(path, silent, test)


# --- streams ---------------------------------------------------------------------------------------------------------


def item(request: StartTap, lost: int) -> Tapped:
    return Tapped(id=request.id, packets=(), lost=lost)


async def showing(side: Side) -> None:
    """Items without end where no count is given, half of each sent at a time."""
    async for request in side.requests():
        assert isinstance(request, StartTap)
        side.send(TapStarted(id=request.id, rule=FACTS, workers=1))
        for lost in range(request.count or 1000):
            data = encode(item(request, lost + 1))
            side.send_bytes(data[:11])
            await asyncio.sleep(0)
            side.send_bytes(data[11:])
        side.send(TapEnded(id=request.id))


def test_a_stream_is_iterated_to_its_end(path: str) -> None:
    async def test() -> None:
        async with AsyncClient(path) as relay:
            assert [tapped.lost async for tapped in relay.tap("feed", count=5)] == [1, 2, 3, 4, 5]
        await asyncio.to_thread(sync)

    def sync() -> None:
        with Client(path) as relay:
            assert [tapped.lost for tapped in relay.tap("feed", count=5)] == [1, 2, 3, 4, 5]
            assert [tapped.lost for tapped in relay.tap("feed", count=2)] == [1, 2]

    run(path, showing, test)


def test_a_stream_that_is_left_takes_its_connection_along(path: str) -> None:
    async def test() -> None:
        async with AsyncClient(path) as relay:
            async for tapped in relay.tap("feed"):
                if tapped.lost == 3:
                    break
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert relay._streams == set()
            kept = relay.tap("feed")
            await anext(kept)
        with pytest.raises(Unavailable):  # it ends with its client
            [tapped async for tapped in kept]

    run(path, showing, test)


@pytest.mark.parametrize("is_patient", [False, True])
def test_silence_is_an_item_for_who_is_impatient(path: str, is_patient: bool) -> None:
    async def slow(side: Side) -> None:
        request = await side.next()
        assert isinstance(request, StartTap)
        side.send(TapStarted(id=request.id, rule=FACTS, workers=1), item(request, 7))
        data = encode(item(request, 8))
        side.send_bytes(data[:11])
        await asyncio.sleep(4 * SHORT_S)
        side.send_bytes(data[11:])
        side.send(TapEnded(id=request.id))
        await silent(side)

    patience_s = None if is_patient else SHORT_S

    def check(lost: list[int]) -> None:
        assert (lost[0], lost[-1]) == (7, 8)
        assert set(lost[1:-1]) == (set() if is_patient else {7})

    async def test() -> None:
        async with AsyncClient(path) as relay:
            check([tapped.lost async for tapped in relay.tap("feed", patience_s=patience_s)])
        await asyncio.to_thread(sync)

    def sync() -> None:
        with Client(path) as relay:
            check([tapped.lost for tapped in relay.tap("feed", patience_s=patience_s)])

    run(path, slow, test)


def test_a_stream_that_ends_otherwise_says_why(path: str) -> None:
    endings: list[bytes] = []

    async def ending(side: Side) -> None:
        request = await side.next()
        assert isinstance(request, StartTap)
        side.send(TapStarted(id=request.id, rule=FACTS, workers=1), item(request, 1))
        side.send_bytes(endings[0].replace(b"999", str(request.id).encode()))

    gone = Failure(id=999, code="bad_rule", message="the rule has been removed", hint="")
    gone_bytes = HEADER.pack(len(encode(gone)) - HEADER.size - 2) + encode(gone)[HEADER.size :]

    async def test() -> None:
        for data, kind in ((gone_bytes, RuleError), (b"", Unavailable), (HEADER.pack(1) + b"?", ProtocolError)):
            endings[:] = [data]
            async with AsyncClient(path) as relay:
                items = relay.tap("feed")
                assert (await anext(items)).lost == 1
                with pytest.raises(kind):
                    await anext(items)
                with pytest.raises(StopAsyncIteration):
                    await anext(items)
            await asyncio.to_thread(sync, kind)

    def sync(kind: type[Error]) -> None:
        with Client(path) as relay:
            items = relay.tap("feed")
            assert next(items).lost == 1
            with pytest.raises(kind):
                next(items)

    run(path, ending, test)

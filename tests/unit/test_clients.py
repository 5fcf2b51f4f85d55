"""Clients of the control plane on a real event loop: what each may cost, and what it is told when that is too much.

    a raw socket -- any bytes --> Connection -- whole requests --> serve

Limits on time are shortened here. Nothing is asserted on how long something takes.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import resource
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, Final

import pytest

from mcrelay import clients as limits
from mcrelay.api import (
    Change,
    Changed,
    GetVersion,
    Ping,
    Pong,
    RuleText,
    StartTap,
    Subscribe,
    TapEnded,
    Tapped,
    TappedPacket,
    Version,
)
from mcrelay.clients import Clients, Connection
from mcrelay.codec import encode
from mcrelay.errors import RuleError
from mcrelay.frames import FRAME_MAX, HEADER
from mcrelay.messages import Client, Message
from tests.unit.test_channel import turn, until

USER: Final = 4711
DEADLINE_S = 10.0
PACKET = TappedPacket(
    time_ns=1,
    worker=0,
    interface="eth0",
    vlan=0,
    length=200_000,
    datagrams=1,
    outputs=1,
    copies=1,
    verdict="forwarded",
    dropped=(),
    data=bytes(200_000),
)
RULE = RuleText(input="239.1.1.1:5000%eth0", outputs=("239.2.2.2:6000%eth1",))


class Side:
    """A client's socket, and the answers that came."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._data = b""

    def send(self, data: bytes) -> None:
        assert self.sock.send(data) == len(data)

    async def answer(self) -> dict[str, Any]:
        async with asyncio.timeout(DEADLINE_S):
            while len(self._data) < 4 or len(self._data) < 4 + HEADER.unpack_from(self._data)[0]:
                part = await asyncio.get_running_loop().sock_recv(self.sock, 1 << 16)
                assert part, "closed without an answer"
                self._data += part
        (length,) = HEADER.unpack_from(self._data)
        body, self._data = self._data[4 : 4 + length], self._data[4 + length :]
        answer: dict[str, Any] = json.loads(body)
        return answer

    async def is_closed(self) -> bool:
        """Once it is, and nothing more has come."""
        async with asyncio.timeout(DEADLINE_S):
            try:
                return not self._data and await asyncio.get_running_loop().sock_recv(self.sock, 1) == b""
            except ConnectionResetError:  # with something of ours unread
                return True

    def is_open(self) -> bool:
        try:
            return self.sock.recv(1, socket.MSG_PEEK) != b""
        except BlockingIOError:
            return True


class Desk:
    """Clients of a service that answers at once, but for what `gate` holds up."""

    def __init__(self) -> None:
        self.served: list[Message] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.clients = Clients(self._serve, self._watch, self._keep)
        self._sides: list[Side] = []

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, message: Message) -> Message:
        self.served.append(message)
        await self.gate.wait()
        match message:
            case Ping():
                return Pong(id=message.id)
            case Change():
                added, removed = len(message.add), len(message.remove)
                return Changed(id=message.id, generation=1, added=added, removed=removed, workers=1)
            case GetVersion():  # stands for any long answer
                return Version(id=message.id, version="x" * 1_000_000, protocol=1)
        raise RuleError("no such rule")

    async def _watch(self, message: StartTap | Subscribe, connection: Connection) -> Message:
        """Shows packets of a mebibyte together, more than the kernel's buffers hold, until nobody watches."""
        self.served.append(message)
        for _ in range(4):
            connection.reply(Tapped(id=message.id, packets=(PACKET,), lost=0))
        await connection.gone
        return TapEnded(id=message.id)

    def connect(self, uid: int = USER) -> Side:
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        self.clients.accept(Client(pid=1, uid=uid, gid=uid), ours.detach())
        self._sides.append(Side(theirs))
        return self._sides[-1]

    async def close(self) -> None:
        self.gate.set()
        self.clients.close()
        for side in self._sides:
            side.sock.close()
        await until(lambda: not self._tasks)


@contextlib.asynccontextmanager
async def desk() -> AsyncIterator[Desk]:
    made = Desk()
    try:
        yield made
    finally:
        await made.close()


def run(test: Callable[[Desk], Coroutine[Any, Any, None]]) -> None:
    """The test, in which no callback of the loop may fail and after which no descriptor or task may be left."""

    async def watched() -> None:
        failures: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: failures.append(context))
        async with desk() as made:
            await test(made)
        await turn()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert failures == []

    gc.collect()  # what other tests have left is not ours
    before = len(os.listdir("/proc/self/fd"))
    asyncio.run(watched())
    assert len(os.listdir("/proc/self/fd")) == before


def change(request_id: int, *, complete: bool, count: int = 1) -> bytes:
    return encode(Change(id=request_id, add=(RULE,) * count, remove=(), complete=complete))


# --- how long --------------------------------------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SWEEP_S", 0.02)
    monkeypatch.setattr(limits, "UNFINISHED_S", 0.1)


UNFINISHED: dict[str, tuple[bytes, str]] = {
    "a byte": (b"\0", "a frame"),
    "a header": (HEADER.pack(100), "a frame"),
    "all but a byte": (encode(Ping(id=1))[:-1], "a frame"),
    "more than a frame may be": (HEADER.pack(2**32 - 1) + b"x", "a frame"),
    "a change": (change(7, complete=False), "change 7"),
    "a frame behind whole ones": (encode(Ping(id=1)) * 3 + b"\0\0", "a frame"),
}


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("kind", UNFINISHED)
def test_what_was_begun_and_not_finished_is_told_and_closed(kind: str) -> None:
    begun, what = UNFINISHED[kind]

    async def test(desk: Desk) -> None:
        slow, idle = desk.connect(), desk.connect()
        slow.send(begun)
        answer = await slow.answer()
        while answer["type"] == "pong" or "announced" in answer["message"]:
            answer = await slow.answer()
        assert (answer["type"], answer["code"]) == ("failure", "protocol")
        assert answer["message"].startswith(f"{what} was begun and not completed")
        assert answer["hint"]
        assert await slow.is_closed()
        assert idle.is_open()
        idle.send(encode(Ping(id=3)))
        assert await idle.answer() == {"type": "pong", "id": 3}

    run(test)


@pytest.mark.usefixtures("impatient")
def test_who_goes_on_is_not_closed() -> None:
    """Always inside a frame when looked at, but of each the rest comes."""

    async def test(desk: Desk) -> None:
        side = desk.connect()
        frame = encode(Ping(id=1))
        side.send(frame[:9])
        for _ in range(20):
            await asyncio.sleep(limits.UNFINISHED_S / 4)
            side.send(frame[9:] + frame[:9])
            assert (await side.answer())["type"] == "pong"
        assert side.is_open()

    run(test)


@pytest.mark.usefixtures("impatient")
def test_a_trickle_is_not_progress() -> None:
    async def test(desk: Desk) -> None:
        side = desk.connect()
        side.send(HEADER.pack(1000))
        with contextlib.suppress(BrokenPipeError):
            for _ in range(1000):
                side.send(b" ")
                await asyncio.sleep(limits.SWEEP_S / 4)
            pytest.fail("it was never closed")

    run(test)


@pytest.mark.usefixtures("impatient")
def test_who_does_not_read_is_closed_before_the_queue_is_full() -> None:
    async def test(desk: Desk) -> None:
        side = desk.connect()
        side.send(encode(GetVersion(id=1)) * 3)  # 3 MB of answers: beyond the kernel's buffers, below QUEUE_MAX
        await until(lambda: len(desk.served) == 3)
        held = desk.clients._connections
        assert sum(connection.held for connection in held) > 1_000_000
        await until(lambda: not held)

    run(test)


@pytest.mark.usefixtures("impatient")
def test_who_watches_packets_may_be_slow_and_that_is_all(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(desk: Desk) -> None:
        side = desk.connect()
        side.send(encode(StartTap(id=1, rule="feed")))
        await until(lambda: desk.served)
        (connection,) = desk.clients._connections
        assert 0 < connection.held < limits.WATCHER_HELD_MAX
        await asyncio.sleep(3 * limits.UNFINISHED_S)
        assert not connection.gone.done()
        side.send(encode(GetVersion(id=2)))  # now it holds up an answer, too
        await until(lambda: connection.held > limits.WATCHER_HELD_MAX)
        await connection.gone

    run(test)


def test_who_goes_away_watches_no_more() -> None:
    async def test(desk: Desk) -> None:
        side = desk.connect()
        side.send(encode(StartTap(id=1, rule="feed")))
        assert (await side.answer())["type"] == "tapped"
        side.sock.close()
        await until(lambda: not desk._tasks)

    run(test)


@pytest.mark.usefixtures("impatient")
def test_a_request_under_way_is_not_the_clients_delay() -> None:
    async def test(desk: Desk) -> None:
        desk.gate.clear()
        side = desk.connect()
        side.send(change(7, complete=False) + change(7, complete=True))
        await until(lambda: desk.served)
        await asyncio.sleep(3 * limits.UNFINISHED_S)
        desk.gate.set()
        assert (await side.answer())["added"] == 2
        assert side.is_open()

    run(test)


@pytest.mark.usefixtures("impatient")
def test_a_loop_that_was_held_up_blames_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(desk: Desk) -> None:
        side = desk.connect()
        frame = encode(Ping(id=1))
        side.send(frame[:9])
        await turn()
        loop = asyncio.get_running_loop()
        ahead = loop.time
        monkeypatch.setattr(loop, "time", lambda: ahead() + 100)
        await asyncio.sleep(0)
        side.send(frame[9:])
        assert (await side.answer())["type"] == "pong"
        assert side.is_open()

    run(test)


# --- how many --------------------------------------------------------------------------------------------------------


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CLIENTS_MAX", 12)
    monkeypatch.setattr(limits, "CLIENTS_RESERVED", 3)
    monkeypatch.setattr(limits, "CLIENTS_OF_USER_MAX", 6)


@pytest.mark.usefixtures("few")
def test_a_user_cannot_lock_out_others_and_all_of_them_not_root() -> None:
    async def test(desk: Desk) -> None:
        first = [desk.connect(1001) for _ in range(6)]
        refused = desk.connect(1001)
        answer = await refused.answer()
        assert (answer["code"], answer["id"]) == ("busy", None)
        assert "user 1001 has 6 clients" in answer["message"]
        assert await refused.is_closed()
        others = [desk.connect(1002) for _ in range(3)]
        refused = desk.connect(1003)
        assert "9 clients are connected" in (await refused.answer())["message"]
        assert await refused.is_closed()
        roots = [desk.connect(0) for _ in range(2)] + [desk.connect(os.geteuid())]
        refused = desk.connect(0)
        assert "12 clients are connected" in (await refused.answer())["message"]
        for side in (*first, *others, *roots):
            side.send(encode(Ping(id=5)))
            assert await side.answer() == {"type": "pong", "id": 5}
        # Room that is given back is there.
        for side in (first[0], roots[0], roots[1]):
            side.sock.close()
        await until(lambda: len(desk.clients._connections) == 9)
        assert await refused.is_closed()
        assert "9 clients" in (await desk.connect(1001).answer())["message"]
        others[0].sock.close()
        await until(lambda: len(desk.clients._connections) == 8)
        again = desk.connect(1001)
        again.send(encode(Ping(id=6)))
        assert await again.answer() == {"type": "pong", "id": 6}

    run(test)


def test_a_process_with_few_descriptors_takes_few_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    few = limits.DESCRIPTORS_OURS + limits.CLIENTS_RESERVED + 1, 0
    monkeypatch.setattr(resource, "getrlimit", lambda which: few)

    async def test(desk: Desk) -> None:
        side, refused = desk.connect(), desk.connect()
        assert (await refused.answer())["code"] == "busy"
        assert side.is_open()

    run(test)


# --- how much --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("impatient")
def test_the_greediest_is_closed_first_and_root_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "HELD_MAX", 2_000_000)
    monkeypatch.setattr(limits, "UNFINISHED_S", DEADLINE_S)

    async def test(desk: Desk) -> None:
        loop = asyncio.get_running_loop()
        root, large, small = desk.connect(0), desk.connect(), desk.connect()
        begun = HEADER.pack(FRAME_MAX)
        await loop.sock_sendall(small.sock, begun + bytes(300_000))
        await loop.sock_sendall(root.sock, begun + bytes(1_000_000))
        with contextlib.suppress(BrokenPipeError):  # it may be closed in the middle of that
            await loop.sock_sendall(large.sock, begun + bytes(900_000))
        answer = await large.answer()
        assert (answer["code"], answer["hint"][:4]) == ("busy", "read")
        assert await large.is_closed()
        assert root.is_open()
        assert small.is_open()

    run(test)


@pytest.mark.usefixtures("impatient")
def test_changes_under_way_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "HELD_MAX", 1_000_000)

    async def test(desk: Desk) -> None:
        desk.gate.clear()
        side = desk.connect()
        side.send(change(1, complete=True, count=1000))
        await until(lambda: desk.served)
        assert side.is_open()
        side.sock.setblocking(False)
        with contextlib.suppress(BrokenPipeError):
            for request_id in range(2, 8):
                await asyncio.get_running_loop().sock_sendall(side.sock, change(request_id, complete=True, count=1000))
        assert (await side.answer())["code"] == "busy"
        assert await side.is_closed()

    run(test)

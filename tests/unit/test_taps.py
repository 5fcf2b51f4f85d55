"""Taps of the control plane: from the workers' sockets to a client that may be slow, and to their end.

writer (a worker) --socketpair--> Tap --reply()--> Watcher (a client)
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from mcrelay import taps
from mcrelay.api import StartTap, Tapped, TappedPacket
from mcrelay.errors import Busy, RuleError
from mcrelay.messages import Message
from mcrelay.tap import Record
from mcrelay.taps import Tap
from tests.unit.test_channel import turn, until

BIG = 60_000


class Client:
    """Holds what it is told to."""

    def __init__(self) -> None:
        self.gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.held = 0
        self.is_privileged = False
        self.messages: list[Tapped] = []

    def reply(self, message: Message) -> None:
        assert isinstance(message, Tapped)
        self.messages.append(message)

    @property
    def packets(self) -> list[TappedPacket]:
        return [packet for message in self.messages for packet in message.packets]


class Rig:
    def __init__(self, count: int | None = None, workers: int = 2) -> None:
        pairs = [
            socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK) for _ in range(workers)
        ]
        self.writers = [writer for _reader, writer in pairs]
        self.client = Client()
        self.tap = Tap(
            StartTap(id=7, rule="feed", count=count),
            3,
            range(workers),
            [reader for reader, _writer in pairs],
            {0: "in0"},
            {5: "239.2.2.2:6000%out0"},
        )
        self.running = asyncio.get_running_loop().create_task(self.tap.run(self.client))

    def write(self, worker: int, time_ns: int, data: bytes = b"data", lost: int = 0) -> None:
        self.writers[worker].send(Record(time_ns, len(data), 0, 1, copies=1, lost=lost).pack() + data)

    def close(self) -> None:
        for writer in self.writers:
            writer.close()


def run(test: Callable[[Rig], Coroutine[Any, Any, None]], count: int | None = None) -> None:
    async def watched() -> None:
        rig = Rig(count)
        await turn()
        await test(rig)
        if not rig.running.done():
            rig.client.gone.set_result(None)
            await rig.running
        for writer in rig.writers:
            if writer.fileno() >= 0:
                with contextlib.suppress(ConnectionResetError):  # with something unread
                    assert writer.recv(1) == b"", "the reader is left open"
        rig.close()

    before = len(os.listdir("/proc/self/fd"))
    asyncio.run(watched())
    assert len(os.listdir("/proc/self/fd")) <= before  # others may have left something, which goes when it goes


def test_packets_of_all_workers_come_with_what_is_known() -> None:
    async def test(rig: Rig) -> None:
        rig.write(0, 1)
        rig.write(1, 2, b"other", lost=3)
        rig.write(0, 3, lost=2)
        await until(lambda: len(rig.client.packets) == 3)
        assert {message.id for message in rig.client.messages} == {7}
        assert sorted((p.time_ns, p.worker, p.interface, p.data) for p in rig.client.packets) == [
            (1, 0, "in0", b"data"),
            (2, 1, "in0", b"other"),
            (3, 0, "in0", b"data"),
        ]
        assert rig.client.messages[-1].lost == 5

    run(test)


def test_it_ends_with_the_number_that_was_asked_for() -> None:
    async def test(rig: Rig) -> None:
        for number in range(9):
            rig.write(number % 2, number)
        await rig.running
        assert len(rig.client.packets) == 5

    run(test, count=5)


def test_it_ends_with_its_client() -> None:
    async def test(rig: Rig) -> None:
        rig.client.gone.set_result(None)
        await rig.running

    run(test)


def test_it_ends_with_a_worker_once_its_packets_are_read() -> None:
    async def test(rig: Rig) -> None:
        rig.write(1, 1)
        rig.writers[1].close()
        with pytest.raises(Busy, match="worker 1, which forwards by this rule, has been replaced"):
            await rig.running
        assert len(rig.client.packets) == 1

    run(test)


def test_it_ends_with_what_is_no_record() -> None:
    async def test(rig: Rig) -> None:
        rig.writers[0].send(b"garbage")
        with pytest.raises(Busy):
            await rig.running

    run(test)


def test_it_ends_for_a_reason() -> None:
    async def test(rig: Rig) -> None:
        rig.tap.end(RuleError("the rule has been removed"))
        rig.tap.end(RuleError("and again"))
        with pytest.raises(RuleError, match="has been removed"):
            await rig.running

    run(test)


def test_a_client_that_does_not_read_is_not_read_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taps, "PAUSE_S", 0.001)

    async def test(rig: Rig) -> None:
        rig.client.held = taps.HELD_MAX + 1
        rig.write(0, 1)
        await until(lambda: len(rig.client.packets) == 1)  # one that it could not know of
        rig.write(0, 2)
        rig.write(1, 3)
        await asyncio.sleep(0.02)
        assert len(rig.client.packets) == 1
        rig.client.held = 0
        await until(lambda: len(rig.client.packets) == 3)

    run(test)


def test_a_message_has_a_bound() -> None:
    async def test(rig: Rig) -> None:
        for number in range(3):
            rig.write(0, number, bytes(BIG))
        for number in range(100):
            rig.write(1, number)
        await until(lambda: len(rig.client.packets) == 103)
        for message in rig.client.messages:
            assert len(message.packets) <= taps.PACKETS_PER_TURN
            assert sum(len(packet.data) for packet in message.packets) < taps.BYTES_PER_TURN + BIG

    run(test)

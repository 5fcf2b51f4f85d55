"""Taps of clients: packets of a rule on their way from the workers to whoever watches.

Owns the sockets that the workers show packets by, while a client watches; whoever makes a Tap has asked for them.
Records are read a few at a time, so that other clients have their turns, and not at all while the client does not read:
then the sockets fill up, and the workers count what they cannot show. Nobody waits: not a worker for us, not we for a
client.

A tap ends when it has shown what was asked for, when its client is gone, when its rule is, or with a worker.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping, Sequence
from typing import Final, Protocol

from mcrelay.api import StartTap, Tapped, TappedPacket
from mcrelay.errors import Busy, Error
from mcrelay.limits import TAP_BYTES_MAX
from mcrelay.messages import Message
from mcrelay.tap import RECORD_BYTES, read_record, tapped_packet

PACKETS_PER_TURN: Final = 64  # of one worker, in one message
BYTES_PER_TURN: Final = 256 * 1024  # of packets, and one packet more; base64 and all else together fit a frame
HELD_MAX: Final = 256 * 1024  # bytes that wait for the client to read, beyond which we do not read either
PAUSE_S: Final = 0.02  # before we look whether it has


class Watcher(Protocol):
    """A client that watches."""

    gone: asyncio.Future[None]

    @property
    def is_privileged(self) -> bool: ...

    @property
    def held(self) -> int:
        """Bytes that wait for it to read, and more that it makes us hold."""
        ...

    def reply(self, message: Message) -> None: ...


class Tap:
    """One, and owner of its `sockets`, one for each of `workers`. `interfaces` are names by slot, `outputs` texts by
    counter."""

    def __init__(
        self,
        request: StartTap,
        rule_counter: int,
        workers: Sequence[int],
        sockets: Sequence[socket.socket],
        interfaces: Mapping[int, str],
        outputs: Mapping[int, str],
    ) -> None:
        self.rule_counter = rule_counter
        self._id = request.id
        self._left = request.count
        self._sockets = dict(zip(workers, sockets, strict=True))
        self._interfaces = interfaces
        self._outputs = outputs
        self._lost = dict.fromkeys(workers, 0)
        self._loop = asyncio.get_running_loop()
        self._over: asyncio.Future[None] = self._loop.create_future()
        self._pause: asyncio.TimerHandle | None = None

    def end(self, why: Error | None = None) -> None:
        if not self._over.done():
            if why:
                self._over.set_exception(why)
            else:
                self._over.set_result(None)

    async def run(self, watcher: Watcher) -> None:
        """Until it ends: Error if not because everything has been shown, or nobody watches."""
        try:
            self._watch(watcher)
            await asyncio.wait({self._over, watcher.gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if self._pause:
                self._pause.cancel()
            for sock in self._sockets.values():
                self._loop.remove_reader(sock.fileno())
                sock.close()
            self.end()
        self._over.result()

    def _watch(self, watcher: Watcher) -> None:
        self._pause = None
        if watcher.held > HELD_MAX:
            self._pause = self._loop.call_later(PAUSE_S, self._watch, watcher)
            return
        for worker, sock in self._sockets.items():
            # Not the socket itself: a loop that debugs prints what it calls, and a socket asks who is at its other end.
            self._loop.add_reader(sock.fileno(), self._readable, worker, watcher)

    def _readable(self, worker: int, watcher: Watcher) -> None:
        if self._over.done() or self._pause:
            return
        packets = self._read(worker, self._sockets[worker])
        if packets:
            watcher.reply(Tapped(id=self._id, packets=packets, lost=sum(self._lost.values())))
        if self._left == 0:
            self.end()
        elif watcher.held > HELD_MAX:
            for other in self._sockets.values():
                self._loop.remove_reader(other.fileno())
            self._watch(watcher)

    def _read(self, worker: int, sock: socket.socket) -> tuple[TappedPacket, ...]:
        packets: list[TappedPacket] = []
        size = 0
        while len(packets) < PACKETS_PER_TURN and size < BYTES_PER_TURN and self._left != 0:
            try:
                received = sock.recv(RECORD_BYTES + TAP_BYTES_MAX)
                record, data = read_record(received)
            except BlockingIOError:
                break
            except (OSError, ValueError):  # nothing: it has closed its end, which it does when it ends
                self.end(Busy(f"worker {worker}, which forwards by this rule, has been replaced", "start it again"))
                break
            self._lost[worker] = record.lost
            packets.append(tapped_packet(record, data, worker, self._interfaces, self._outputs))
            size += len(data)
            if self._left is not None:
                self._left -= 1
        return tuple(packets)

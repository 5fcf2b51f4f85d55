"""Handover: a daemon's place, its sockets and its rules, given to a successor while traffic flows.

Owns the process and the channel between the two, and the order of things. The old daemon starts the program anew and
tells it, over a socket pair, all that outlives a process: the clients' socket, the counter pages, each socket and
membership, and the rules. The new one starts its workers and gives them everything but the packet sockets; until then
the old one forwards. Then the old workers finish what they have in hand and leave the packet sockets, the new ones get
them, and what came meanwhile waits there. The new daemon says that it forwards, and the old one exits. If the new one
does not come so far, it is ended, and the old workers get back what was never given away: both daemons hold descriptors
of the same sockets.

The program is the file that runs already, as it is on disk by then: clients may ask for an upgrade, not say to what.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from mcrelay import __version__, counters, process
from mcrelay.channel import Channel
from mcrelay.codec import Codec, encode
from mcrelay.errors import Busy, Error, SystemRefusal, UsageError
from mcrelay.frames import Malformed
from mcrelay.messages import (
    LONG_TEXT_MAX,
    Failed,
    Inherit,
    InheritAbsorber,
    InheritInterface,
    InheritMemberships,
    InheritMetrics,
    InheritPort,
    InheritRules,
    Message,
    Prepared,
    Proceed,
    RuleRecord,
    TookOver,
)
from mcrelay.spare import start_by

log = logging.getLogger(__name__)

PREPARE_S: Final = 20.0  # for the new daemon to start, on a loaded machine
TAKE_OVER_S: Final = 5.0
READ_SIZE: Final = 64 * 1024

Will = Iterable[tuple[Message, Sequence[int]]]  # messages and their descriptors, which stay the testator's


@dataclass
class Heritage:
    """What a predecessor gave: descriptors are whoever's who takes them."""

    first: Inherit
    descriptors: list[int]  # the clients' socket, and each data plane's counter page
    metrics: tuple[InheritMetrics, int] | None = None
    interfaces: list[tuple[InheritInterface, list[int]]] = field(default_factory=list)
    memberships: list[tuple[InheritMemberships, int]] = field(default_factory=list)
    ports: list[tuple[InheritPort, int]] = field(default_factory=list)  # of rootless mode
    absorbers: list[tuple[InheritAbsorber, int]] = field(default_factory=list)
    rules: list[RuleRecord] = field(default_factory=list)

    def check_fit(self, workers: int, *, rootless: bool) -> None:
        """UsageError if a daemon with as many data plane workers cannot go on with it."""
        first = self.first
        if first.network not in (None, process.network_namespace()):
            raise UsageError("they are of another network namespace", "restart it instead")
        if first.rootless != rootless:
            raise UsageError("one of the two daemons is rootless, the other is not", "restart it instead")
        if first.workers != workers:
            raise UsageError(
                f"the old daemon has {first.workers} data plane workers, this one has {workers}", "restart it instead"
            )
        if (first.counters_version, first.counters_size) != (counters.VERSION, counters.PAGE_SIZE):
            raise UsageError(f"version {first.version} counts in another way", "restart it instead")

    def take(self, message: Message, descriptors: list[int]) -> bool:
        """One more part of it; whether it was the last. Error if it is none."""
        match message:
            case InheritMetrics():
                self.metrics = message, descriptors[0]
            case InheritInterface():
                self.interfaces.append((message, descriptors))
            case InheritMemberships():
                self.memberships.append((message, descriptors[0]))
            case InheritPort():
                self.ports.append((message, descriptors[0]))
            case InheritAbsorber():
                self.absorbers.append((message, descriptors[0]))
            case InheritRules():
                self.rules.extend(message.rules)
                return message.complete
            case _:
                raise Error(f"the old daemon said {type(message).__name__} at a wrong time", code="protocol")
        return False


class Successor:
    """The new daemon, as the old one sees it. SystemRefusal if it cannot be started."""

    def __init__(self) -> None:
        self._started = start_by(process.spawn_successor)
        self._loop = asyncio.get_running_loop()
        self._said: asyncio.Queue[Message] = asyncio.Queue()
        self._channel = Channel(
            "handover_sock",
            self._started.sock,
            Codec("handover_sock", "successor", "supervisor"),
            lambda message, _descriptors: self._said.put_nowait(message),
            lambda reason: self._said.put_nowait(
                Failed(
                    code="system",
                    message="it ended before it was ready",
                    hint="its messages say why; the old one goes on",
                )
            ),
        )

    async def prepare(self, will: Will) -> None:
        """Tell it everything, and wait until its workers could take over. Error if they cannot."""
        async with self._deadline("did not become ready", PREPARE_S):
            for message, descriptors in will:
                self._channel.send(message, descriptors)
                await asyncio.sleep(0)
            await self._expect(Prepared)

    async def proceed(self) -> int:
        """Nobody else reads the packet sockets any more: wait until it forwards. Its pid, or Error."""
        async with self._deadline("does not take over", TAKE_OVER_S):
            self._channel.send(Proceed())
            await self._expect(TookOver)
        return self._started.pid

    @contextlib.asynccontextmanager
    async def _deadline(self, what: str, seconds: float) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(seconds):
                yield
        except TimeoutError:
            raise SystemRefusal(f"the new daemon {what} within {seconds:.0f} s", "its messages say more") from None
        except ConnectionError:
            raise SystemRefusal("the new daemon ended before it was ready", "the old one goes on") from None

    async def _expect(self, kind: type[Message]) -> None:
        message = await self._said.get()
        if isinstance(message, Failed):
            raise Error(f"the new daemon: {message.message}", message.hint, code=message.code)
        if not isinstance(message, kind):
            raise Error(f"the new daemon said {type(message).__name__}", "is it another version?", code="protocol")

    def leave(self) -> None:
        """It lives on without us."""
        self._channel.close()
        os.close(self._started.pidfd)

    def end(self) -> None:
        """It is not to be."""
        self._channel.close()
        self._started.end()


def refuse(error: Error) -> None:
    """Tell the daemon that started this one, if one did, why it cannot even begin."""
    descriptor = process.predecessor_fd()
    if descriptor is None:
        return
    with socket.socket(fileno=descriptor) as sock, contextlib.suppress(OSError):
        sock.settimeout(PREPARE_S)
        sock.sendall(
            encode(Failed(code=error.code, message=error.message[:LONG_TEXT_MAX], hint=error.hint[:LONG_TEXT_MAX]))
        )
        while sock.recv(READ_SIZE):  # what it tells meanwhile would take our word with it if it stayed unread
            pass


class Predecessor:
    """The old daemon, as the new one sees it."""

    def __init__(self, descriptor: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._heritage: Heritage | None = None
        self._complete: asyncio.Future[Heritage] = self._loop.create_future()
        self._left: asyncio.Future[None] = self._loop.create_future()
        self._gone: asyncio.Future[None] = self._loop.create_future()
        os.set_inheritable(descriptor, False)
        self._channel = Channel(
            "handover_sock",
            socket.socket(fileno=descriptor),
            Codec("handover_sock", "supervisor", "successor"),
            self._received,
            self._closed,
            on_malformed=self._malformed,
        )

    async def inherit(self, workers: int, *, rootless: bool) -> Heritage:
        """All of it. Error if it cannot be ours."""
        try:
            async with asyncio.timeout(PREPARE_S):
                heritage = await asyncio.shield(self._complete)
        except TimeoutError:
            raise SystemRefusal("the old daemon did not say what to take over", "start again") from None
        heritage.check_fit(workers, rootless=rootless)
        log.info("taking over from version %s, we are %s", heritage.first.version, __version__)
        return heritage

    def _received(self, message: Message, descriptors: list[int]) -> None:
        if isinstance(message, Proceed):
            if not self._left.done():
                self._left.set_result(None)
        elif self._heritage is None and isinstance(message, Inherit):
            self._heritage = Heritage(message, descriptors)
        elif self._heritage is None or self._complete.done():
            self._fail(f"the old daemon said {type(message).__name__} at a wrong time")
        else:
            try:
                if self._heritage.take(message, descriptors):
                    self._complete.set_result(self._heritage)
            except Error as error:
                self._fail(error.message)

    def _malformed(self, error: Malformed) -> None:
        self._fail(f"cannot read what the old daemon gives: {error.why}")

    def _fail(self, why: str) -> None:
        if not self._complete.done():
            self._complete.set_exception(Error(why, "restart it instead", code="protocol"))

    def _closed(self, reason: str) -> None:
        """It died. If it had said everything, its workers died with it, and everything is ours."""
        self._fail("the old daemon went away")
        if not self._gone.done():
            self._gone.set_result(None)
        if not self._left.done():
            self._left.set_result(None)

    async def wait_until_left(self, stopping: asyncio.Event) -> None:
        """Say that we could go on, and wait until nobody else does. Busy if we are told to stop before."""
        self._tell(Prepared())
        stop = self._loop.create_task(stopping.wait())
        either: set[asyncio.Future[Any]] = {stop, self._left}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if not self._left.done():
            raise Busy("told to stop before the old daemon had left", "it goes on")

    async def took_over(self) -> bool:
        """Say that we forward; whether it has gone by then, for good."""
        self._tell(TookOver())
        await asyncio.wait({self._gone}, timeout=TAKE_OVER_S)
        return self._gone.done()

    def refuse(self, error: Error) -> None:
        """We cannot take over."""
        self._tell(Failed(code=error.code, message=error.message, hint=error.hint))

    def _tell(self, message: Message) -> None:
        with contextlib.suppress(Error, ConnectionError):  # it died: nobody has to know
            self._channel.send(message)

"""Children: one worker process as the supervisor sees it.

Owns the process (its pidfd), the supervisor's ends of its channels, the commands that wait for an acknowledgement, and
the back-off between two lives. Knows nothing of rules or sockets that it passes on, and decides nothing but when the
next life may begin.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import signal
import socket
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, Literal

from mcrelay import process
from mcrelay.channel import Channel, close_descriptors
from mcrelay.codec import Codec
from mcrelay.errors import Busy, error_of
from mcrelay.frames import Malformed
from mcrelay.messages import Acknowledge, ChannelName, Failed, Message, Probe, ProcessFacts, Ready, Shutdown, Start
from mcrelay.spare import Started, start

log = logging.getLogger(__name__)

DEATHS_FORGIVEN: Final = 5  # after so many, or fewer, the next life begins at once
FORGIVEN_AFTER_S: Final = 2.0  # of life: one death
BACKOFF_FIRST_S: Final = 0.1
BACKOFF_MAX_S: Final = 30.0
START_S: Final = 15.0  # until a life says that it is ready, on a loaded machine
EXIT_GRACE_S: Final = 0.5  # for a worker whose channel is closed to be gone
MALFORMED_MAX: Final = 64  # frames of one life on one channel: a worker that has gone mad is ended
ACKNOWLEDGE_S: Final = 1.0  # after which a worker is taken for stuck

MODULES: Final = {"control": "mcrelay.control", "data": "mcrelay.dataplane"}


class Child:
    """A worker through all its lives. `on_message` gets what it asks on request_sock, `on_ready` is called when it has
    said that it works, `on_exit` when a life has ended, with the seconds until the next may begin."""

    def __init__(
        self,
        role: Literal["control", "data"],
        index: int,
        arguments: Sequence[str],
        *,
        prefer: bool = False,
        on_ready: Callable[[Child], None],
        on_message: Callable[[Child, Message], None],
        on_exit: Callable[[Child, float], None],
    ) -> None:
        self.role = role
        self.index = index
        self.name = "control" if role == "control" else f"data/{index}"
        self.state: Literal["starting", "ready", "waiting"] = "waiting"
        self.pid: int | None = None
        self.engine: str | None = None
        self.restarts = 0
        self.is_leaving = False  # on request, which is no failure
        self.failure: Failed | None = None
        self._arguments = arguments
        self._prefer = prefer
        self._on_ready = on_ready
        self._on_message = on_message
        self._on_exit = on_exit
        self._pidfd = -1
        self._channels: dict[ChannelName, Channel] = {}
        self._malformed = 0  # of former lives
        self._waiting: dict[int, asyncio.Future[Acknowledge]] = {}
        self._last_ticket = 0
        self._started = 0.0
        self._deaths = 0.0  # that are not forgiven
        self._gone = asyncio.Event()
        self._gone.set()
        self._loop = asyncio.get_running_loop()

    # Life.

    def start(self, message: Start, descriptors: Sequence[int], spare: Started | None = None) -> None:
        """Begin a life, in the process of a spare if there is one. `descriptors` go with Start behind the child's own
        channels, and are the child's afterwards."""
        self.state = "starting"
        self.failure = None
        self.is_leaving = False
        self._started = self._loop.time()
        names: tuple[ChannelName, ...] = ("request_sock", "command_sock") if self.role == "data" else ("request_sock",)
        pairs: list[tuple[socket.socket, socket.socket]] = []
        try:
            pairs.extend(socket.socketpair() for _ in names)
            started = spare or start(MODULES[self.role], self._arguments, prefer=self._prefer)
        except BaseException:
            close_descriptors(descriptors)
            for one, other in pairs:
                one.close()
                other.close()
            if spare:
                spare.end()
            raise
        self.pid, self._pidfd = started.pid, started.pidfd
        self._gone.clear()
        self._loop.add_reader(self._pidfd, self._exited)
        self._open_channel("supervisor_sock", started.sock)
        passed = []
        for name, (own, theirs) in zip(names, pairs, strict=True):
            self._open_channel(name, own)
            passed.append(theirs.detach())
        self._loop.call_later(START_S, self._kill_if_starting, self.restarts)
        self.tell("supervisor_sock", message, [*passed, *descriptors], give=True)

    def _open_channel(self, name: ChannelName, sock: socket.socket) -> None:
        self._channels[name] = Channel(
            f"{name} of {self.name}",
            sock,
            Codec(name, self.role, "supervisor"),
            self._received,
            self._channel_closed,
            on_malformed=functools.partial(self._count_malformed, name),
        )

    def _channel_closed(self, reason: str) -> None:
        # A worker that lost a channel cannot be steered any more. Mostly it is exiting, which is why: let it.
        self._loop.call_later(EXIT_GRACE_S, self.kill_life, self.restarts)

    def _kill_if_starting(self, life: int) -> None:
        if life == self.restarts and self.state == "starting":
            log.error("%s did not start within %.0f s: restarting it", self.name, START_S)
            self.kill()

    def kill_life(self, life: int) -> None:
        """End that life, if it is not over: its successor may be there already, and has done nothing wrong."""
        if life == self.restarts:
            self.kill()

    def _count_malformed(self, channel: ChannelName, error: Malformed) -> None:
        if self._channels[channel].malformed >= MALFORMED_MAX:
            log.error("%s sent %d malformed frames: restarting it", self.name, MALFORMED_MAX)
            self._channels[channel].close()
            self.kill()

    def _exited(self) -> None:
        info = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG)
        if info is None:
            return
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        lived_s = self._loop.time() - self._started
        self._malformed = self.frames_malformed
        for channel in self._channels.values():
            channel.close()
        self._channels.clear()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(Busy(f"{self.name} died while it was asked", "try again"))
        self._waiting.clear()
        how = (
            f"exited with {info.si_status}"
            if info.si_code == os.CLD_EXITED
            else "was ended by a forbidden system call, which it has named if it could"
            if info.si_status == signal.SIGSYS
            else f"was ended by signal {info.si_status} ({signal.strsignal(info.si_status) or 'unknown'})"
        )
        level = logging.INFO if self.is_leaving else logging.WARNING
        log.log(level, "%s (pid %s) %s after %.1f s", self.name, self.pid, how, lived_s)
        self.state = "waiting"
        self.pid = None
        self.engine = None
        self.restarts += 1
        self._gone.set()
        self._on_exit(self, 0.0 if self.is_leaving else self._delay_s(lived_s))

    def _delay_s(self, lived_s: float) -> float:
        """How long to wait before the next life. Now and then a worker may die; one that keeps dying is not helped by
        haste."""
        self._deaths = max(0.0, self._deaths - lived_s / FORGIVEN_AFTER_S) + 1
        beyond = self._deaths - DEATHS_FORGIVEN
        return float(min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2 ** (min(beyond, 20) - 1))) if beyond > 0 else 0.0

    def kill(self) -> None:
        """End this life now."""
        if not self._gone.is_set():
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def shut_down(self, deadline_s: float) -> None:
        """Ask the worker to finish and exit; end it if it does not in time."""
        self.is_leaving = True
        channel = self._channels.get("command_sock" if self.role == "data" else "supervisor_sock")
        if channel and channel.is_open:
            try:
                channel.send(Shutdown())
            except (Busy, ConnectionError):
                self.kill()
        try:
            async with asyncio.timeout(deadline_s):
                await self._gone.wait()
        except TimeoutError:
            log.warning("%s does not exit: killing it", self.name)
            self.kill()
            await self._gone.wait()

    # Messages.

    def _received(self, message: Message, descriptors: list[int]) -> None:
        match message:
            case Ready():
                self.engine = message.engine
                self._on_ready(self)
            case Failed():
                self.failure = message
                log.error("%s cannot work here: %s; %s", self.name, message.message, message.hint)
            case Acknowledge():
                future = self._waiting.pop(message.ticket, None)
                if future is None or future.done():
                    log.warning("%s acknowledges %d, which nobody waits for", self.name, message.ticket)
                elif message.error is None:
                    future.set_result(message)
                elif self.role == "data":
                    future.set_exception(Busy(f"{self.name} cannot do it: {message.error}", "try again"))
                else:
                    future.set_exception(error_of(message.code, message.error, message.hint))
            case _:
                self._on_message(self, message)

    def tell(
        self, channel: ChannelName, message: Message, descriptors: Sequence[int] = (), *, give: bool = False
    ) -> None:
        """Send without an answer. A worker that is gone, or reads too slowly, is not waited for: it will be told again
        in its next life."""
        opened = self._channels.get(channel)
        if opened is None:
            if give:
                close_descriptors(descriptors)
            return
        try:
            opened.send(message, descriptors, give=give)
        except (Busy, ConnectionError) as error:
            if not self.is_leaving:
                log.warning("%s cannot be told anything: %s: restarting it", self.name, error)
                self.kill()

    def ticket(self) -> int:
        """A number for the next command."""
        self._last_ticket += 1
        return self._last_ticket

    async def command(
        self, ticket: int, *parts: tuple[Message, Sequence[int]], patience_s: float = 0.0, give: bool = False
    ) -> Acknowledge:
        """Send a command, which may take several messages, and wait until the worker acknowledges its ticket. The
        Error of a refusal, which a data plane's is Busy; Busy if it dies. A worker that does not answer in time is
        ended, and its next life starts right. Descriptors are borrowed, or with `give` closed in any case."""
        channel = self._channels.get("command_sock" if self.role == "data" else "request_sock")
        unsent = deque(parts)
        future: asyncio.Future[Acknowledge] = self._loop.create_future()
        try:
            if channel is None:
                raise ConnectionError
            if not isinstance(parts[0][0], Probe):
                log.debug("%s is told %s", self.name, type(parts[0][0]).__name__)
            self._waiting[ticket] = future
            while unsent:
                channel.send(*unsent.popleft(), give=give)
            async with asyncio.timeout(ACKNOWLEDGE_S + patience_s):
                return await future
        except TimeoutError:
            log.error("%s did not answer within %.1f s: restarting it", self.name, ACKNOWLEDGE_S + patience_s)
            self.kill()
            raise Busy(f"{self.name} does not answer", "it is being restarted; try again") from None
        except ConnectionError:
            raise Busy(f"{self.name} is being restarted", "try again") from None
        finally:
            self._waiting.pop(ticket, None)
            if give:
                for _message, descriptors in unsent:
                    close_descriptors(descriptors)

    async def take_from(self, command: Callable[..., Message]) -> None:
        """Have the worker use something no more; `command` makes the message with a ticket. One that does not is ended,
        and its next life will not know the thing."""
        ticket, life = self.ticket(), self.restarts
        try:
            await self.command(ticket, (command(ticket=ticket), ()))
        except Busy as error:
            log.warning("a worker cannot be made to let go of something: %s", error)
            self.kill_life(life)

    @property
    def frames_malformed(self) -> int:
        return self._malformed + sum(channel.malformed for channel in self._channels.values())

    def facts(self) -> ProcessFacts:
        status = None
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                status = process.status_of(self.pid)
        return ProcessFacts(
            role=self.role,
            index=self.index,
            state=self.state,
            pid=self.pid,
            uid=status.uid if status else None,
            capabilities=status.capabilities if status else None,
            cores=status.cores if status else None,
            restarts=self.restarts,
            engine=self.engine,
            frames_malformed=self.frames_malformed,
        )

"""The API for Python programs: what the command line does, as calls (docs/client.md).

    with Client() as relay:
        rule = relay.add("239.1.1.1:5000%eth0", ["239.2.2.2:6000%eth1,ttl=8"], name="feed-a")
        print(relay.stats().workers)
        relay.remove(rule.rule.id)

Every call waits for its answer and raises mcrelay.errors.Error with the daemon's reason if it was refused. Owns one
connection, is used by one thread at a time; AsyncClient is for asyncio. If the connection is lost, as when the daemon's
control plane is replaced or the daemon upgraded, a call that only reads connects anew and asks again; one that changes
something fails, since it may have been done, and the next call connects anew.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

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
from mcrelay.errors import Unavailable, UsageError
from mcrelay.handshake import greet
from mcrelay.limits import TAP_BYTES_MAX
from mcrelay.messages import Message, ProcessFacts
from mcrelay.places import SYSTEM_SOCKET, chosen_socket

if TYPE_CHECKING:
    from mcrelay.async_client import AsyncClient

__all__ = ["DEFAULT_SOCKET", "TIMEOUT_S", "AsyncClient", "Client"]

DEFAULT_SOCKET: Final = SYSTEM_SOCKET


def __getattr__(name: str) -> Any:
    """AsyncClient, once somebody asks for it: asyncio would double the time that a command takes to start."""
    if name == "AsyncClient":
        from mcrelay.async_client import AsyncClient

        return AsyncClient
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class Client:
    """Connects at once. Unavailable if no daemon listens at `path` or it does not answer within `timeout_s`,
    NotPermitted if the caller may not connect, ProtocolError if the daemon is of a version that does not understand
    this one. Without `path` it is the daemon that the command line would speak to.

    `any_version` leaves the handshake out: version() and upgrade() are the same with daemons of all versions."""

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
        self._streams: set[_Connection] = set()
        self._in_use = threading.Lock()  # never waited for
        self._connection: _Connection | None = self._connect(Lost)

    def close(self) -> None:
        """Streams end with it."""
        self._is_closed = True
        self._drop()
        for connection in self._streams:
            connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Calls.

    def ping(self) -> None:
        """Have an answer of the daemon."""
        self._run(calls.ping())

    def version(self) -> Version:
        return self._run(calls.version())

    def status(self) -> Status:
        """The daemon as a whole."""
        return self._run(calls.status())

    def add(self, input: str, outputs: Sequence[str], name: str | None = None) -> Added:
        """Add a rule; when it returns, all workers concerned forward by it. RuleError if it cannot be."""
        return self._run(calls.add(input, outputs, name))

    def remove(self, rule: str) -> Removed:
        """Remove a rule by name or id; when it returns, nothing is forwarded by it any more. RuleError if there is
        none."""
        return self._run(calls.remove(rule))

    def pause(self, rule: str, output: str | None = None) -> Paused:
        """Have an output of a rule (its text, its ADDRESS:PORT%INTERFACE, or its number, counted from 1), or all of
        them, send nothing until resume(); when it returns, nothing leaves by it."""
        return self._run(calls.pause(rule, output, paused=True))

    def resume(self, rule: str, output: str | None = None) -> Paused:
        """Have it send again."""
        return self._run(calls.pause(rule, output, paused=False))

    def change(
        self,
        add: Sequence[tuple[str, Sequence[str], str | None]] = (),
        remove: Sequence[str] = (),
        *,
        expect: int | None = None,
    ) -> Changed:
        """Add rules, as (input, outputs, name), and remove others, by name or id: all of it in one step, or nothing.
        When it returns, all workers forward by the new rules. With `expect`, the generation of a listing, it is refused
        (Conflict) if anybody has changed the rules since."""
        return self._run(calls.change(add, remove, expect))

    def listing(self) -> Rules:
        """All rules, and the interfaces that they use."""
        return self._run(calls.listing())

    def rules(self) -> tuple[RuleFacts, ...]:
        return self._run(calls.rules())

    def stats(self) -> Stats:
        """Counters of all workers and rules."""
        return self._run(calls.stats())

    def workers(self) -> tuple[ProcessFacts, ...]:
        """All processes of the daemon."""
        return self._run(calls.workers())

    def log_levels(self) -> LogLevels:
        """From which level on the daemon logs, by component."""
        return self._run(calls.log_levels())

    def set_log_levels(self, level: str | None = None, components: Mapping[str, str] | None = None) -> LogLevels:
        """Have all components log from `level` on, those in `components` from theirs on, which "default" takes away
        again; when it returns, all of the daemon's processes do. Error if there is no such level or component."""
        return self._run(calls.set_log_levels(level, components or {}))

    def restart_worker(self, index: int) -> Restarted:
        """Put another process in a data plane's place; when it returns, that one forwards. Nothing is lost."""
        return self._run(calls.restart_worker(index))

    def upgrade(self) -> Upgraded:
        """Have the program, as it is installed now, take the place of the running daemon; when it returns, the new one
        forwards. Nothing is lost. This connection ends with the old one."""
        return self._run(calls.upgrade())

    def tap(
        self,
        rule: str,
        *,
        count: int | None = None,
        snap_length: int = TAP_BYTES_MAX,
        patience_s: float | None = None,
    ) -> Iterator[Tapped]:
        """Watch the next packets of a rule, `count` of them or without end, no more than `snap_length` bytes of each.
        An item has several packets where they come fast, and says how many were lost so far because they came too
        fast; with `patience_s`, it has none when nothing came for so long. Error when the tap ends otherwise: RuleError
        with its rule, Busy with a worker, Unavailable with the daemon."""
        return self._open(calls.tap(rule, count, snap_length, patience_s))

    def events(self, kinds: Sequence[EventKind] = (), *, patience_s: float | None = None) -> Iterator[Happened]:
        """What happens from now on, of these kinds or of all (api.EVENT_KINDS). With `patience_s`, an item has no
        events when nothing happened for so long. Unavailable when the daemon ends."""
        return self._open(calls.events(kinds, patience_s))

    # Their way.

    def _run(self, dialogue: Dialogue[Result]) -> Result:
        with self._alone():
            return _drive(dialogue, self._ask)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._in_use.acquire(blocking=False):
            raise UsageError("another thread is using this client", "give each thread a client of its own")
        try:
            yield
        finally:
            self._in_use.release()

    def _ask(self, question: Question) -> Message:
        if self._is_closed:
            raise closed()
        deadline = time.monotonic() + AGAIN_FOR_S
        while True:
            if self._connection is None:
                self._connection = self._connect(Lost, Absent)
            try:
                reply = self._connection.ask(question, self._timeout_s)
            except Lost:  # which may have been to a daemon that was about to go
                self._drop()
                if not question.reads or time.monotonic() > deadline:
                    raise
            except BaseException:
                self._drop()  # half a frame may be under way, or an answer
                raise
            else:
                if id_of(reply) is None:
                    self._drop()
                return reply

    def _open(self, stream: Stream[Item]) -> Iterator[Item]:
        """The items of a stream, which has the connection from now on; other calls connect anew."""
        with self._alone():
            _drive(stream.open(), self._ask)
            connection, self._connection = self._connection, None
        assert connection is not None
        self._streams.add(connection)
        return self._follow(connection, stream)

    def _follow(self, connection: _Connection, stream: Stream[Item]) -> Iterator[Item]:
        last: Item | None = None
        try:
            while True:
                try:
                    message = connection.receive(stream.patience_s)
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

    def _connect(self, *again: type[Unavailable]) -> _Connection:
        """As soon as there is somebody, for a while where it fails by one of these."""
        deadline = time.monotonic() + AGAIN_FOR_S
        while True:
            try:
                return self._greet(_Connection(self._path, self._timeout_s))
            except again:
                if time.monotonic() > deadline:
                    raise
            time.sleep(AGAIN_S)

    def _greet(self, connection: _Connection) -> _Connection:
        if not self._any_version:
            try:
                _drive(greet(self._path), lambda question: connection.ask(question, self._timeout_s))
            except BaseException:
                connection.close()
                raise
        return connection

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class _Connection:
    """One, with one question under way at a time."""

    def __init__(self, path: str, timeout_s: float) -> None:
        self._path = path
        self._conversation = Conversation(path)
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # A full backlog makes a non-blocking connect fail at once; this one waits, but not for ever.
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", int(timeout_s) + 1, 0))
        try:
            self._sock.connect(path)
        except OSError as error:
            self._sock.close()
            raise no_connection(path, error) from None

    def close(self) -> None:
        self._sock.close()

    def ask(self, question: Question, patience_s: float) -> Message:
        """The answer, a Failure too. Unavailable if there is none, ProtocolError if it cannot be read."""
        request_id, frames = self._conversation.say(question)
        deadline = time.monotonic() + (question.patience_s or patience_s)
        try:
            self._sock.settimeout(_left(deadline))
            with contextlib.suppress(BrokenPipeError):  # the daemon may have said why before it closed
                self._sock.sendall(frames)
            while True:
                reply = self.receive(_left(deadline))
                if id_of(reply) in (request_id, None):
                    return reply
        except TimeoutError:
            raise unanswered(self._path) from None
        except OSError as error:
            raise lost(self._path, error) from None

    def receive(self, patience_s: float | None) -> Message:
        """The next message of any kind. TimeoutError if none has come whole for so long; what has come of it is
        kept."""
        deadline = None if patience_s is None else time.monotonic() + patience_s
        while (message := self._conversation.hear()) is None:
            try:
                self._sock.settimeout(_left(deadline))
                data = self._sock.recv(READ_SIZE)
            except TimeoutError:
                raise
            except OSError as error:
                raise lost(self._path, error) from None
            if not data:
                raise lost(self._path)
            self._conversation.feed(data)
        return message


def _left(deadline: float | None) -> float | None:
    """Seconds until it. TimeoutError if it has passed."""
    if deadline is None:
        return None
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _drive(dialogue: Dialogue[Result], ask: Callable[[Question], Message]) -> Result:
    """What it returns, each of its questions asked."""
    try:
        question = next(dialogue)
        while True:
            question = dialogue.send(ask(question))
    except StopIteration as end:
        result: Result = end.value
        return result

"""The API for Python programs: what the command line does, as calls.

    with Client() as relay:
        rule = relay.add("239.1.1.1:5000%eth0", ["239.2.2.2:6000%eth1,ttl=8"], name="feed-a")
        print(relay.stats().workers)
        relay.remove(rule.rule.id)

Every call waits for its answer and raises mcrelay.errors.Error with the daemon's reason if it was refused. Owns one
connection, is used by one thread at a time. If the connection is lost, as when the daemon's control plane is replaced
or the daemon upgraded, a call that only reads connects anew and asks again; one that changes something fails, since it
may have been done, and the next call connects anew.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Final, Self, TypeVar

from mcrelay.api import (
    Add,
    Added,
    Change,
    Changed,
    Failure,
    GetStats,
    GetStatus,
    GetVersion,
    GetWorkers,
    ListRules,
    Pause,
    Paused,
    Ping,
    Pong,
    Remove,
    Removed,
    Restarted,
    RestartWorker,
    RuleFacts,
    Rules,
    RuleStats,
    RuleText,
    StartTap,
    Stats,
    Status,
    TapEnded,
    Tapped,
    TapStarted,
    Upgrade,
    Upgraded,
    Version,
    Workers,
)
from mcrelay.codec import Codec, encode, in_frames
from mcrelay.errors import Busy, Error, NotPermitted, Unavailable
from mcrelay.frames import FrameReader, Malformed
from mcrelay.limits import TAP_BYTES_MAX
from mcrelay.messages import Message, ProcessFacts
from mcrelay.places import SYSTEM_SOCKET, find_socket

DEFAULT_SOCKET: Final = SYSTEM_SOCKET
TIMEOUT_S: Final = 15.0
UPGRADE_S: Final = 35.0  # for the new daemon to start and take over, or not
NAMES_PER_FRAME: Final = 8000  # of 64 characters
READ_SIZE: Final = 64 * 1024
AGAIN_FOR_S: Final = 5.0  # how long there may be nobody after a connection was lost
AGAIN_S: Final = 0.05
READING: Final = (Ping, GetVersion, GetStatus, ListRules, GetStats, GetWorkers)

Reply = TypeVar("Reply", bound=Message)


class Client:
    """Connects at once. Unavailable if no daemon listens at `path`, NotPermitted if the caller may not connect. Without
    `path` it is the daemon that the command line would speak to."""

    def __init__(self, path: str | None = None, *, timeout_s: float = TIMEOUT_S) -> None:
        self._path = path or find_socket()
        self._timeout_s = timeout_s
        self._last_id = 0
        self._connect()

    def _connect(self) -> None:
        path, timeout_s = self._path, self._timeout_s
        self._is_lost = False
        self._codec = Codec("client", "control", "client")
        self._reader = FrameReader()
        self._frames: list[bytes | Malformed] = []
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # A full backlog makes a non-blocking connect fail at once; this one waits, but not for ever.
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", int(timeout_s) + 1, 0))
        try:
            self._sock.connect(path)
            self._sock.settimeout(timeout_s)
        except BlockingIOError:
            self._sock.close()
            raise Busy(f"the daemon at {path} does not take clients", "try again; its log says more") from None
        except PermissionError:
            self._sock.close()
            raise NotPermitted(
                f"not permitted to use {path}",
                "become root or a member of the socket's group ('ls -l' shows it)",
            ) from None
        except OSError as error:
            self._sock.close()
            raise Unavailable(
                f"no mcrelay daemon at {path} ({error.strerror or error})", "start one: mcrelay run"
            ) from None

    def close(self) -> None:
        self._sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Calls.

    def ping(self) -> None:
        self._ask(Ping(id=self._next_id()), Pong)

    def version(self) -> Version:
        return self._ask(GetVersion(id=self._next_id()), Version)

    def status(self) -> Status:
        return self._ask(GetStatus(id=self._next_id()), Status)

    def add(self, input: str, outputs: Sequence[str], name: str | None = None) -> Added:
        """Add a rule; when it returns, all workers concerned forward by it."""
        return self._ask(Add(id=self._next_id(), input=input, outputs=tuple(outputs), name=name), Added)

    def remove(self, rule: str) -> Removed:
        """Remove a rule by name or id; when it returns, nothing is forwarded by it any more."""
        return self._ask(Remove(id=self._next_id(), rule=rule), Removed)

    def pause(self, rule: str, output: str | None = None) -> Paused:
        """Have an output of a rule (its text, its ADDRESS:PORT%INTERFACE, or its number, counted from 1), or all of
        them, send nothing until resume(); when it returns, nothing leaves by it."""
        return self._ask(Pause(id=self._next_id(), rule=rule, output=output, paused=True), Paused)

    def resume(self, rule: str, output: str | None = None) -> Paused:
        """Have it send again."""
        return self._ask(Pause(id=self._next_id(), rule=rule, output=output, paused=False), Paused)

    def change(
        self,
        add: Sequence[tuple[str, Sequence[str], str | None]] = (),
        remove: Sequence[str] = (),
        *,
        expect: int | None = None,
    ) -> Changed:
        """Add rules, as (input, outputs, name), and remove others, by name or id: all of it in one step, or nothing.
        When it returns, all workers forward by the new rules. With `expect`, the generation of a listing, it is refused
        (Error with code "conflict") if anybody has changed the rules since."""
        request_id = self._next_id()
        texts = [RuleText(input=input, outputs=tuple(outputs), name=name) for input, outputs, name in add]
        pieces = [
            Change(id=request_id, add=(), remove=tuple(remove[at : at + NAMES_PER_FRAME]), complete=False)
            for at in range(0, len(remove), NAMES_PER_FRAME)
        ]
        pieces += [
            Change(id=request_id, add=piece, remove=(), complete=last, expect=expect)
            for piece, last in in_frames(texts)
        ]
        return self._ask(pieces, Changed)

    def listing(self) -> Rules:
        """All rules, and the interfaces that they use."""
        found: list[RuleFacts] = []
        while True:
            after = found[-1].id if found else None
            reply = self._ask(ListRules(id=self._next_id(), after=after), Rules)
            found += reply.rules
            if not reply.more:
                return Rules(
                    id=reply.id,
                    generation=reply.generation,
                    rules=tuple(found),
                    interfaces=reply.interfaces,
                    more=False,
                )

    def rules(self) -> tuple[RuleFacts, ...]:
        return self.listing().rules

    def stats(self) -> Stats:
        """Counters of all workers and rules."""
        rules: list[RuleStats] = []
        while True:
            after = rules[-1].id if rules else None
            reply = self._ask(GetStats(id=self._next_id(), after=after), Stats)
            rules += reply.rules
            if not reply.more:
                return Stats(
                    id=reply.id,
                    generation=reply.generation,
                    workers=reply.workers,
                    rules=tuple(rules),
                    more=False,
                    frames_malformed=reply.frames_malformed,
                )

    def workers(self) -> tuple[ProcessFacts, ...]:
        return self._ask(GetWorkers(id=self._next_id()), Workers).processes

    def restart_worker(self, index: int) -> Restarted:
        """Put another process in a data plane's place; when it returns, that one forwards. Nothing is lost."""
        return self._ask(RestartWorker(id=self._next_id(), index=index), Restarted)

    def upgrade(self) -> Upgraded:
        """Have the program, as it is installed now, take the place of the running daemon; when it returns, the new one
        forwards. Nothing is lost. This connection ends with the old one."""
        self._sock.settimeout(UPGRADE_S)
        return self._ask(Upgrade(id=self._next_id()), Upgraded)

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
        fast; with `patience_s`, it has none when nothing came for so long. The connection is the tap's until the
        iteration ends; the next call connects anew. Error when the tap ends otherwise: with its rule, with a worker,
        with the daemon."""
        started = self._ask(StartTap(id=self._next_id(), rule=rule, count=count, snap_length=snap_length), TapStarted)
        return self._watch(started, patience_s)

    def _watch(self, started: TapStarted, patience_s: float | None) -> Iterator[Tapped]:
        lost = 0
        self._sock.settimeout(patience_s)
        try:
            while True:
                try:
                    message = self._receive()
                except TimeoutError:
                    yield Tapped(id=started.id, packets=(), lost=lost)
                    continue
                except OSError as error:
                    raise Unavailable(f"lost the daemon at {self._path}: {error.strerror}", "try again") from None
                match message:
                    case Tapped():
                        lost = message.lost
                        yield message
                    case TapEnded():
                        return
                    case Failure():
                        raise Error(message.message, message.hint, code=message.code)
        finally:
            self._is_lost = True  # more of it may be under way
            self.close()

    # The wire.

    def _next_id(self) -> int:
        self._last_id += 1
        return self._last_id

    def _ask(self, request: Message | Sequence[Message], expect: type[Reply]) -> Reply:
        if self._is_lost:
            self._connect_again()
        deadline = time.monotonic() + AGAIN_FOR_S
        while True:
            try:
                return self._ask_once(request, expect)
            except Unavailable:
                if not self._is_lost or not isinstance(request, READING) or time.monotonic() > deadline:
                    raise
            self._connect_again()  # which may be to one that is about to go, too

    def _connect_again(self) -> None:
        """As soon as there is somebody, for a while."""
        deadline = time.monotonic() + AGAIN_FOR_S
        self._sock.close()
        while True:
            try:
                self._connect()
                return
            except Unavailable:
                if time.monotonic() > deadline:
                    raise
            time.sleep(AGAIN_S)

    def _ask_once(self, request: Message | Sequence[Message], expect: type[Reply]) -> Reply:
        request_id = self._last_id
        try:
            frame = b"".join(map(encode, [request] if isinstance(request, Message) else request))
        except UnicodeEncodeError as error:
            raise Error(f"{error.object!r} is not UTF-8 text", "check how it was typed", code="usage") from None
        except ValueError as error:
            raise Error(str(error), "use fewer or shorter outputs", code="usage") from None
        try:
            with contextlib.suppress(BrokenPipeError):  # the daemon may have said why before it closed
                self._sock.sendall(frame)
            reply = self._receive()
            while getattr(reply, "id", None) not in (request_id, None):
                reply = self._receive()  # an answer that came too late for its request
        except TimeoutError:
            self.close()  # half a frame may be under way
            raise Unavailable(f"the daemon at {self._path} does not answer", "its log says more") from None
        except OSError as error:
            self._is_lost = True
            raise Unavailable(f"lost the daemon at {self._path}: {error.strerror}", "try again") from None
        if isinstance(reply, Failure):
            raise Error(reply.message, reply.hint, code=reply.code)
        if not isinstance(reply, expect):
            raise Error(f"the daemon answered with {type(reply).__name__}", "is it the same version?", code="protocol")
        return reply

    def _receive(self) -> Message:
        while not self._frames:
            data = self._sock.recv(READ_SIZE)
            if not data:
                self._is_lost = True
                raise Unavailable(f"the daemon at {self._path} closed the connection", "try again")
            self._frames.extend(self._reader.feed(data))
        frame = self._frames.pop(0)
        try:
            if isinstance(frame, Malformed):
                raise frame
            return self._codec.decode(frame)
        except Malformed as error:
            raise Error(
                f"the daemon's answer cannot be read: {error.why}", "is it the same version?", code="protocol"
            ) from None

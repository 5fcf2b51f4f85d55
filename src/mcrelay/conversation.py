"""A client's conversation with the daemon, without a connection: what is asked, what an answer is, what goes wrong.

Owns what the clients of all kinds share. A call (calls.py) is a Dialogue: a generator that yields questions, is sent
the daemon's answers and returns its result. A Conversation gives each question its id and makes frames of it, and
messages of bytes that come in whatever pieces. A Stream is a question after whose answer more comes unasked. Whoever
has a connection (client.py, async_client.py) carries bytes, keeps time, and decides whether to connect again.
"""

from __future__ import annotations

import reprlib
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeAlias, TypeVar

import msgspec

from mcrelay.api import Failure
from mcrelay.codec import Codec, encode
from mcrelay.errors import Busy, Error, NotPermitted, ProtocolError, Unavailable, UsageError, error_of
from mcrelay.frames import HEADER, FrameReader, Malformed
from mcrelay.messages import Message

TIMEOUT_S: Final = 15.0  # for an answer, if the caller does not say otherwise
READ_SIZE: Final = 64 * 1024
AGAIN_FOR_S: Final = 5.0  # how long there may be nobody after a connection was lost
AGAIN_S: Final = 0.05  # between two attempts
SECONDS_MAX: Final = 366 * 86400
ID: Final = 0  # of a request until its conversation gives it another

Reply = TypeVar("Reply", bound=Message)
Item = TypeVar("Item", bound=Message)
Result = TypeVar("Result")


# --- what is asked ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Question:
    """A request, in one message or several, that has one answer."""

    messages: tuple[Message, ...]
    reads: bool = False  # changes nothing, so that it may be asked again if the connection was lost
    patience_s: float | None = None  # for the answer, instead of the client's own


# What a call is: it is sent the answer to each question, a Failure too, and raises the Error of one.
Dialogue: TypeAlias = Generator[Question, Message, Result]


def ask(
    request: Message | tuple[Message, ...], expect: type[Reply], *, reads: bool = False, patience_s: float | None = None
) -> Dialogue[Reply]:
    """One question, and its answer. The Error of a Failure; ProtocolError if it is no answer to that."""
    messages = request if isinstance(request, tuple) else (request,)
    reply = yield Question(messages, reads, patience_s)
    return settle(reply, expect)


def settle(reply: Message, expect: type[Reply]) -> Reply:
    """The reply, if it is what was expected."""
    if isinstance(reply, Failure):
        raise error_of(reply.code, reply.message, reply.hint)
    if not isinstance(reply, expect):
        raise ProtocolError(f"the daemon answered with {type(reply).__name__}", "is it the same version?")
    return reply


@dataclass(frozen=True, slots=True)
class Stream(Generic[Item]):
    """A request after whose answer messages come without being asked for, until the connection ends: it takes a
    connection of its own."""

    request: Message
    started: type[Message]  # the answer
    item: type[Item]  # what comes then
    ended: type[Message] | None = None  # what says that no more comes
    silence: Callable[[Item | None], Item] | None = None  # stands, after the last one, for nothing having come
    patience_s: float | None = None  # until nothing has come

    def open(self) -> Dialogue[Message]:
        return ask(self.request, self.started)

    def take(self, message: Message) -> Item | None:
        """The next item, or None at the end. The Error by which it ended otherwise."""
        if self.ended is not None and isinstance(message, self.ended):
            return None
        return settle(message, self.item)


# --- the wire ---------------------------------------------------------------------------------------------------------


class Conversation:
    """What is said on one connection to the daemon at `path`."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._codec = Codec("client", "control", "client")
        self._reader = FrameReader()
        self._heard: deque[bytes | Malformed] = deque()
        self._last_id = -1

    def say(self, question: Question) -> tuple[int, bytes]:
        """The id of a question, and its frames. UsageError if it cannot be sent."""
        request_id = self._last_id + 1
        try:
            frames = [encode(msgspec.structs.replace(message, id=request_id)) for message in question.messages]
            for message, frame in zip(question.messages, frames, strict=True):  # its author's types may be wrong
                msgspec.json.decode(frame[HEADER.size :], type=type(message))
        except (msgspec.ValidationError, TypeError) as error:
            asked = type(question.messages[0]).__name__
            raise UsageError(f"{asked} cannot be asked: {error}", "see docs/client.md") from None
        except UnicodeEncodeError as error:
            raise UsageError(f"{error.object!r} is not UTF-8 text", "check how it was typed") from None
        except ValueError as error:
            raise UsageError(str(error), "use fewer or shorter outputs") from None
        self._last_id = request_id
        return request_id, b"".join(frames)

    def feed(self, data: bytes) -> None:
        """Bytes that came."""
        self._heard.extend(self._reader.feed(data))

    def hear(self) -> Message | None:
        """The next message in them, None if there is no whole one. ProtocolError if it cannot be read; what comes after
        that is not to be relied on."""
        if not self._heard:
            return None
        frame = self._heard.popleft()
        try:
            if isinstance(frame, Malformed):
                raise frame
            return self._codec.decode(frame)
        except Malformed as error:
            raise ProtocolError(
                f"the answer of the daemon at {self._path} cannot be read: {error.why}", "is it the same version?"
            ) from None


def id_of(message: Message) -> int | None:
    """Of the question that a message from the daemon belongs to; None: it is about the connection, which ends."""
    request_id: Any = getattr(message, "id", None)
    return request_id if isinstance(request_id, int) else None


# --- what goes wrong with a connection --------------------------------------------------------------------------------


def seconds(what: str, value: float) -> float:
    """UsageError unless that is a time to wait."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= SECONDS_MAX:
        raise UsageError(f"{what}: {reprlib.repr(value)} is no time", "give seconds, above 0 and up to a year")
    return value


class Absent(Unavailable):
    """Nobody listens."""


class Lost(Unavailable):
    """There was a connection, and it ended."""


def no_connection(path: str, error: OSError) -> Error:
    """Why there is no connection to `path`, of the error that connect(2) gave."""
    if isinstance(error, BlockingIOError):  # a backlog that is full
        return Busy(f"the daemon at {path} does not take clients", "try again; its log says more")
    if isinstance(error, PermissionError):
        hint = "become root or a member of the socket's group ('ls -l' shows it)"
        return NotPermitted(f"not permitted to use {path}", hint)
    return Absent(f"no mcrelay daemon at {path} ({error.strerror or error})", "start one: mcrelay run")


def lost(path: str, error: OSError | None = None) -> Lost:
    """Without `error`, the other side closed it."""
    if error is None:
        return Lost(f"the daemon at {path} closed the connection", "try again")
    return Lost(f"lost the daemon at {path}: {error.strerror or error}", "try again")


def unanswered(path: str) -> Unavailable:
    return Unavailable(f"the daemon at {path} does not answer", "its log says more")


def closed() -> UsageError:
    return UsageError("this client has been closed", "make another one")

"""Clients: their connections to the control plane, and what each of them may cost.

Owns the connections, the pieces of changes until those are whole, and every limit on a client: how many may be
connected, how much they may make us hold, how long they may leave undone what they have begun. Knows nothing of what a
request means: whoever makes a Clients serves them.

A client is closed for what it does to others, never for being idle: one that has nothing unfinished may stay for ever.
It costs two sockets' buffers, which the kernel allocates when they are used, and some 4 KiB here.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import socket
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Final

from mcrelay.api import Change, Failure, Hello, RuleText, StartTap, Subscribe
from mcrelay.channel import Channel
from mcrelay.codec import Codec
from mcrelay.errors import Busy, Error, ProtocolError, RuleError
from mcrelay.frames import Malformed
from mcrelay.handshake import welcome
from mcrelay.limits import CLIENTS_MAX, REQUESTS_MAX, RULES_MAX
from mcrelay.messages import LONG_TEXT_MAX, Client, Message

log = logging.getLogger(__name__)

CLIENTS_RESERVED: Final = 64  # of which for the privileged: nobody else can lock them out
CLIENTS_OF_USER_MAX: Final = 1024  # of one user who is not privileged: nobody locks the other users out alone
DESCRIPTORS_OURS: Final = (
    256  # that are not clients': channels, pages (closed once mapped), what arrives with a message
)
MALFORMED_MAX: Final = 16  # of one client, before it is sent away
CHANGE_MAX: Final = 8 * 1024 * 1024  # bytes of one change, all its pieces together: 60,000 outputs
TEXT_OVERHEAD: Final = 64  # bytes of memory of a text besides its characters
# To complete a frame or a change once begun, and to take an answer: over a local socket a matter of milliseconds.
UNFINISHED_S: Final = 5.0
HELD_MAX: Final = 128 * 1024 * 1024  # bytes of what all clients have not finished or not read
SWEEP_S: Final = 1.0
# Who watches packets and does not read loses packets, and may be slow for as long as that is all: somebody reads them.
WATCHER_HELD_MAX: Final = 1024 * 1024  # bytes

Serve = Callable[[Message], Coroutine[None, None, Message]]
Watch = Callable[[StartTap | Subscribe, "Connection"], Coroutine[None, None, Message]]


class Connection:
    """One client."""

    def __init__(self, clients: Clients, sock: socket.socket, peer: Client) -> None:
        self.peer = peer
        self._clients = clients
        self._is_new = True  # nothing has come that could be read
        self._requests = 0
        self._taps = 0  # of the requests
        self._serving = 0  # bytes of changes under way
        self._incoming: tuple[list[RuleText], list[str]] = [], []  # of an unfinished Change
        self._incoming_id: int | None = None
        self._incoming_size = 0  # bytes
        self._incoming_since = 0.0
        self._refused: set[int] = set()  # changes whose last piece has not come
        self._loop = asyncio.get_running_loop()
        self.gone: asyncio.Future[None] = self._loop.create_future()
        self.channel = Channel(
            f"client {peer.pid} of user {peer.uid}",
            sock,
            Codec("client", "client", "control"),
            self._received,
            self._closed,
            on_malformed=self._malformed,
        )

    @property
    def held(self) -> int:
        """Bytes that it makes us hold."""
        return self.channel.held + self._incoming_size + self._serving

    @property
    def is_privileged(self) -> bool:
        return _is_privileged(self.peer)

    def reply(self, message: Message) -> None:
        try:
            self.channel.send(message)
        except Busy:
            log.warning("%s does not read: closed", self.channel.name)
            self.close()
        except ConnectionError:
            pass  # it went away before it had its answer

    def close(self) -> None:
        self.channel.close()
        self._clients.forget(self)

    def turn_away(self, error: Error, request_id: int | None = None) -> None:
        """Say why, if it reads, and close."""
        log.warning("%s is turned away: %s", self.channel.name, error.message)
        self.reply(Failure(id=request_id, code=error.code, message=error.message, hint=error.hint))
        self.close()

    def close_if_overdue(self, now: float) -> None:
        """Close it if it has left something undone for too long."""
        limit_s, hint = f"within {UNFINISHED_S:.0f} s", "send a request, and all pieces of a change, at once"
        watches = self._taps > 0 and self.channel.held < WATCHER_HELD_MAX
        if self.channel.unsent_since < now - UNFINISHED_S and not watches:
            log.warning("%s has not read its answers %s: closed", self.channel.name, limit_s)
            self.close()
        elif self.channel.unfinished_since < now - UNFINISHED_S:
            self.turn_away(Error(f"a frame was begun and not completed {limit_s}", hint, code="protocol"))
        elif self._incoming_id is not None and self._incoming_since < now - UNFINISHED_S:
            error = Error(f"change {self._incoming_id} was begun and not completed {limit_s}", hint, code="protocol")
            self.turn_away(error, self._incoming_id)

    def _closed(self, reason: str) -> None:
        self._clients.forget(self)

    def _malformed(self, error: Malformed) -> None:
        self._clients.frames_malformed += 1
        if self._incoming_id is not None:
            # It may have been a piece of that: what is left is not what was meant.
            self._refused.add(self._incoming_id)
            self._forget_incoming()
        hint = f"a request is one of: {', '.join(_tags())}; see docs/protocol.md"
        self.reply(Failure(id=None, code="protocol", message=f"malformed request: {error.why}", hint=hint))
        if self.channel.malformed >= MALFORMED_MAX:
            log.warning("%s sent %d malformed frames: closed", self.channel.name, MALFORMED_MAX)
            self.close()

    def _received(self, message: Message, descriptors: list[int]) -> None:
        is_first, self._is_new = self._is_new, False
        log.debug("%s asks: %s", self.channel.name, type(message).__name__)
        if isinstance(message, Hello):
            self._greet(message, is_first=is_first)
            return
        size = 0
        if isinstance(message, Change):
            if not self._collect(message):
                return
            add, remove = self._incoming
            message = Change(id=message.id, add=tuple(add), remove=tuple(remove), complete=True, expect=message.expect)
            size = self._incoming_size
            self._forget_incoming()
        if self._requests >= REQUESTS_MAX:
            self.reply(_failure(message, Busy(f"{REQUESTS_MAX} requests are under way", "wait for their answers")))
        else:
            self._requests += 1
            self._serving += size
            self._clients.keep(self._loop.create_task(self._serve(message, size)))

    def _greet(self, hello: Hello, *, is_first: bool) -> None:
        """Who speaks another protocol is sent away; a word too late does no harm."""
        try:
            self.reply(welcome(hello, is_first=is_first))
        except ProtocolError as error:
            if is_first:
                self.turn_away(error, hello.id)
            else:
                self.reply(_failure(hello, error))

    def _forget_incoming(self) -> None:
        self._incoming, self._incoming_id, self._incoming_size = ([], []), None, 0

    def _collect(self, piece: Change) -> bool:
        """Put a piece of a change to those before it; whether it is complete. One change of a client at a time. Of one
        that is refused, the pieces that still come are not the beginning of another."""
        if piece.id in self._refused:
            if piece.complete:
                self._refused.discard(piece.id)
            return False
        if self._incoming_id not in (None, piece.id):
            hint = "finish it first, or open another connection"
            self._refuse(piece, Busy(f"change {self._incoming_id} is not complete", hint))
            return False
        if self._incoming_id is None:
            self._incoming_id, self._incoming_since = piece.id, self._loop.time()
        self._incoming_size += _size(piece)
        add, remove = self._incoming
        too_many = max(len(add) + len(piece.add), len(remove) + len(piece.remove)) > RULES_MAX
        if too_many or self._incoming_size > CHANGE_MAX:
            self._forget_incoming()
            limits = f"at most {RULES_MAX} rules of {CHANGE_MAX // 2**20} MiB are possible"
            self._refuse(piece, RuleError("the change is too long", limits))
            return False
        add.extend(piece.add)
        remove.extend(piece.remove)
        return piece.complete

    def _refuse(self, piece: Change, error: Error) -> None:
        self.reply(_failure(piece, error))
        if not piece.complete:
            self._refused.add(piece.id)
        if len(self._refused) > REQUESTS_MAX:
            log.warning("%s has begun %d changes that were refused: closed", self.channel.name, len(self._refused))
            self.close()

    async def _serve(self, message: Message, size: int) -> None:
        try:
            if isinstance(message, StartTap | Subscribe):
                self._taps += isinstance(message, StartTap)
                self.reply(await self._clients.watch(message, self))
            else:
                self.reply(await self._clients.serve(message))
        except Error as error:
            self.reply(_failure(message, error))
        except Exception:
            log.exception("cannot serve %s", type(message).__name__)
            self.reply(_failure(message, Error("an error inside the daemon", "its log says more")))
        finally:
            self._requests -= 1
            self._taps -= isinstance(message, StartTap)
            self._serving -= size


def _size(piece: Change) -> int:
    texts = (len(text.input) + sum(map(len, text.outputs)) + len(text.name or "") for text in piece.add)
    count = sum(2 + len(text.outputs) for text in piece.add) + len(piece.remove)
    return sum(texts) + sum(map(len, piece.remove)) + count * TEXT_OVERHEAD


def _tags() -> list[str]:
    return [str(t.__struct_config__.tag) for t in Codec("client", "client", "control").permitted]


def _failure(request: Message, error: Error) -> Failure:
    request_id = getattr(request, "id", None)
    return Failure(
        id=request_id, code=error.code, message=error.message[:LONG_TEXT_MAX], hint=error.hint[:LONG_TEXT_MAX]
    )


class Clients:
    """All of them. `serve` gives the reply to a whole request, or an Error; `watch` does when what is
    watched has ended, and sends the connection what there is to see meanwhile; `keep` holds a task until it is done."""

    def __init__(self, serve: Serve, watch: Watch, keep: Callable[[asyncio.Task[None]], None]) -> None:
        self.serve = serve
        self.watch = watch
        self.keep = keep
        self.frames_malformed = 0
        self._connections: set[Connection] = set()
        self._of_user: Counter[int] = Counter()
        self._sweeping: asyncio.Task[None] | None = None
        # Where a process may have few descriptors, a client more would be one whose descriptor does not arrive.
        descriptors, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._clients_max = min(CLIENTS_MAX, descriptors - DESCRIPTORS_OURS)

    def __len__(self) -> int:
        """How many are connected."""
        return len(self._connections)

    def accept(self, peer: Client, descriptor: int) -> None:
        """Serve it, or tell it why not."""
        refusal = self._refusal(peer)
        connection = Connection(self, socket.socket(fileno=descriptor), peer)
        self._connections.add(connection)
        self._of_user[peer.uid] += 1
        log.debug("%s is connected", connection.channel.name)
        if refusal:
            connection.turn_away(refusal)
        elif self._sweeping is None:
            self._sweeping = asyncio.get_running_loop().create_task(self._sweep())

    def _refusal(self, peer: Client) -> Error | None:
        """Why one more cannot be taken."""
        total = len(self._connections)
        if not _is_privileged(peer):
            if self._of_user[peer.uid] >= CLIENTS_OF_USER_MAX:
                message = f"user {peer.uid} has {CLIENTS_OF_USER_MAX} clients connected"
                return Busy(message, "close some, or try again later")
            total += CLIENTS_RESERVED
        if total >= self._clients_max:
            return Busy(f"{len(self._connections)} clients are connected", "close some, or try again later")
        return None

    def forget(self, connection: Connection) -> None:
        if connection not in self._connections:
            return
        self._connections.discard(connection)
        connection.gone.set_result(None)
        log.debug("%s is gone", connection.channel.name)
        uid = connection.peer.uid
        self._of_user[uid] -= 1
        if not self._of_user[uid]:
            del self._of_user[uid]
        if not self._connections and self._sweeping:
            self._sweeping.cancel()
            self._sweeping = None

    def close(self) -> None:
        for connection in list(self._connections):
            connection.close()

    async def _sweep(self) -> None:
        """While there are clients, look for those that hold up what they have begun, or make us hold too much."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + SWEEP_S
            await asyncio.sleep(SWEEP_S)
            now = loop.time()
            if now - due > SWEEP_S:
                continue  # it was us who were slow
            for connection in list(self._connections):
                connection.close_if_overdue(now)
            self._close_greedy()

    def _close_greedy(self) -> None:
        """While clients hold more than they may together, close the one that holds most; the privileged last."""
        held = {connection: connection.held for connection in self._connections}
        excess = sum(held.values()) - HELD_MAX
        for connection in sorted(held, key=lambda c: (c.is_privileged, -held[c])):
            if excess <= 0:
                break
            excess -= held[connection]
            hint = "read the answers, and send what was begun"
            connection.turn_away(Busy(f"{HELD_MAX // 2**20} MiB are held for all clients, most for this one", hint))


def _is_privileged(peer: Client) -> bool:
    """Root, and whom the workers run as."""
    return peer.uid in (0, os.geteuid())

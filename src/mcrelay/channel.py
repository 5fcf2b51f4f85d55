"""Channel: messages and descriptors over one end of a stream socket, on an asyncio loop.

Owns the socket, what is queued to be sent, and descriptors between their arrival and their delivery. Knows nothing of
what messages mean. Nothing here waits: what cannot be sent is queued up to a bound, beyond which send() raises Busy.

Kernel facts (unix(7)): descriptors are attached to the first byte of a sendmsg(2); a recvmsg(2) stops after the bytes
that carried some. A receiver that offers too little room for descriptors loses them (MSG_CTRUNC), so we always offer
room for the kernel's limit, and close what no message accounts for.

Every descriptor has one owner: send() only borrows, unless told to `give`, and then the channel closes it, sent or not;
a receiver gets them in the callback and owns them from then on.
"""

from __future__ import annotations

import array
import asyncio
import logging
import math
import os
import socket
import stat
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from mcrelay.codec import Codec, encode
from mcrelay.errors import Busy
from mcrelay.frames import FrameReader, Malformed
from mcrelay.messages import Message

log = logging.getLogger(__name__)

SCM_MAX_FD: Final = 253  # descriptors per message, a constant of the kernel (net/scm.h)
QUEUE_MAX: Final = 20 * 1024 * 1024  # bytes waiting to be sent: as many rules as there can be
READ_SIZE: Final = 64 * 1024
WRITES_PER_TURN: Final = 16  # frames, before other work gets its turn


class Channel:
    """`deliver(message, descriptors)` is called for each message, `closed(reason)` once when the other side is gone or
    the channel broke. `malformed` counts what was not a permitted message; each is logged and skipped.

    How long the other side keeps us waiting is for the owner to judge. In the loop's time, infinity if it does not:
    `unfinished_since` is when it began the frame that has not come whole, `unsent_since` when what is to be sent next
    became the next."""

    def __init__(
        self,
        name: str,
        sock: socket.socket,
        codec: Codec,
        deliver: Callable[[Message, list[int]], None],
        closed: Callable[[str], None],
        *,
        on_malformed: Callable[[Malformed], None] | None = None,
    ) -> None:
        self.name = name
        self.malformed = 0
        self._sock = sock
        self._codec = codec
        self._deliver = deliver
        self._closed = closed
        self._on_malformed = on_malformed
        self._reader = FrameReader()
        self._received: deque[int] = deque()
        self._queue: deque[tuple[bytes, Sequence[int], bool]] = deque()
        self._queued = 0
        self._open = True
        self.unfinished_since = math.inf
        self.unsent_since = math.inf
        self._loop = asyncio.get_running_loop()
        sock.setblocking(False)
        self._loop.add_reader(sock.fileno(), self._readable)

    @property
    def is_open(self) -> bool:
        return self._open

    # Sending.

    def send(self, message: Message, descriptors: Sequence[int] = (), *, give: bool = False) -> None:
        """Queue a message. Busy if the other side does not read; ConnectionError if the channel is closed."""
        try:
            if len(descriptors) != message.descriptors():
                raise ValueError(f"{type(message).__name__} goes with {message.descriptors()} descriptors")
            if not self._open:
                raise ConnectionError(f"{self.name} is closed")
            frame = encode(message)
            if self._queued + len(frame) > QUEUE_MAX:
                raise Busy(f"{self.name} is full: the other side does not read", "try again")
        except BaseException:
            if give:
                close_descriptors(descriptors)
            raise
        self._queue.append((frame, descriptors, give))
        self._queued += len(frame)
        if len(self._queue) == 1:
            self.unsent_since = self._loop.time()
            self._writable()
            if self._queue:
                self._loop.add_writer(self._sock.fileno(), self._writable)

    @property
    def held(self) -> int:
        """Bytes in memory: what came of an unfinished frame, and what waits to be sent."""
        return self._reader.held + self._queued

    @property
    def drained(self) -> bool:
        """Everything queued is in the kernel's hands."""
        return not self._queue

    def _writable(self) -> None:
        for _ in range(WRITES_PER_TURN):
            if not self._queue:
                break
            frame, descriptors, given = self._queue[0]
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
            try:
                sent = self._sock.sendmsg([frame], rights, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return
            except OSError as error:
                self._break(f"cannot send: {error.strerror}")
                return
            # The descriptors went with the first byte.
            if given:
                close_descriptors(descriptors)
            self._queued -= sent
            if sent < len(frame):
                self._queue[0] = (frame[sent:], (), False)
                return
            self._queue.popleft()
            self.unsent_since = self._loop.time() if self._queue else math.inf
        if not self._queue and self._open:
            self._loop.remove_writer(self._sock.fileno())

    # Receiving.

    def _readable(self) -> None:
        try:
            data, control, _flags, _address = self._sock.recvmsg(
                READ_SIZE, socket.CMSG_SPACE(4 * SCM_MAX_FD), socket.MSG_CMSG_CLOEXEC
            )
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._break(f"cannot receive: {error.strerror}")
            return
        arrived = array.array("i")
        for level, kind, payload in control:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                arrived.frombytes(payload[: len(payload) - len(payload) % arrived.itemsize])
        if not data:
            if not self._reader.between_frames:
                self._note(Malformed("frame", "the stream ended inside a frame"))
            self._break("the other side closed it")
            return
        frames: list[bytes | Malformed | None] = list(self._reader.feed(data))
        if self._reader.between_frames:
            self.unfinished_since = math.inf
        elif frames or self.unfinished_since == math.inf:
            self.unfinished_since = self._loop.time()
        if self._reader.unfinished or not frames:
            frames.append(None)
        # What arrived came with the last frame that these bytes begin.
        *earlier, last = frames
        for frame in earlier:
            self._take(frame)
            if not self._open:
                close_descriptors(arrived)
                return
        self._received.extend(arrived)
        self._take(last)

    def _take(self, frame: bytes | Malformed | None) -> None:
        """One frame, None if it is not complete, with the descriptors beside it; those that are not a message's are
        closed."""
        if frame is None:
            room = SCM_MAX_FD if self._codec.takes_descriptors and not self._reader.skipping else 0
            if len(self._received) <= room:
                return  # its message may account for them
        elif isinstance(frame, Malformed):
            self._note(frame)
            self._close_received()
            return
        elif not self._frame(frame):
            self._close_received()
            return
        if self._received:
            self._note(Malformed("descriptors", f"{len(self._received)} came that no message accounts for"))
            self._close_received()

    def _frame(self, body: bytes) -> bool:
        try:
            message = self._codec.decode(body)
            wanted, came = message.descriptors(), len(self._received)
            if came < wanted:
                raise Malformed("descriptors", f"{type(message).__name__} goes with {wanted}, {came} came")
        except Malformed as error:
            self._note(error)
            return False
        self._deliver(message, [self._received.popleft() for _ in range(wanted)])
        return True

    def _note(self, error: Malformed) -> None:
        self.malformed += 1
        log.warning("malformed frame on %s, stage %s: %s", self.name, error.stage, error.why)
        if self._on_malformed:
            self._on_malformed(error)

    # Ending.

    def close(self) -> None:
        """Close without calling back. What was queued is lost."""
        if not self._open:
            return
        self._open = False
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        self._sock.close()
        for _frame, descriptors, given in self._queue:
            if given:
                close_descriptors(descriptors)
        self._queue.clear()
        self._close_received()

    def _break(self, reason: str) -> None:
        if not self._open:
            return
        self.close()
        self._closed(reason)

    def _close_received(self) -> None:
        for descriptor in self._received:
            # A socket that lingers would make close(2) wait for its peer, as long as its sender chose.
            if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                sock = socket.socket(fileno=descriptor)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes(8))
                sock.detach()
        close_descriptors(self._received)
        self._received.clear()


def close_descriptors(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)

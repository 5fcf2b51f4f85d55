"""Frames: how messages lie in a stream of bytes: a 4-byte big-endian length, and as many bytes of one message.

Owns the bound on a frame's length and the way on after one that breaks it. Knows nothing of what a message says.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

FRAME_MAX: Final = 1024 * 1024  # bytes of a message
WHY_MAX: Final = 300  # characters: one line of a log
HEADER: Final = struct.Struct(">I")


class Malformed(Exception):
    """Bytes that are not a permitted message. `stage` says where that showed: frame, decode, descriptors. `why` may
    quote them, and is short and printable whatever they are: it goes to the log and to whoever sent them."""

    def __init__(self, stage: str, why: str) -> None:
        if not why.isprintable():
            why = repr(why)[1:-1]
        if len(why) > WHY_MAX:
            why = why[: WHY_MAX - 3] + "..."
        super().__init__(f"{stage}: {why}")
        self.stage = stage
        self.why = why


class FrameReader:
    """Bytes of a stream in, frames out. A frame that announces more than FRAME_MAX is reported once and skipped, so
    that the stream goes on after it."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._skip = 0

    @property
    def between_frames(self) -> bool:
        """Nothing of a frame has come yet, as far as is known."""
        return not self._buffer and not self._skip

    @property
    def unfinished(self) -> bool:
        """A part of a frame is there that will be delivered."""
        return bool(self._buffer)

    @property
    def held(self) -> int:
        """Bytes of it."""
        return len(self._buffer)

    @property
    def skipping(self) -> bool:
        """Inside a frame that is too long."""
        return self._skip > 0

    def feed(self, data: bytes) -> Iterator[bytes | Malformed]:
        if self._skip:
            skipped = min(self._skip, len(data))
            self._skip -= skipped
            data = data[skipped:]
        self._buffer += data
        while len(self._buffer) >= HEADER.size:
            (length,) = HEADER.unpack_from(self._buffer)
            if length > FRAME_MAX:
                have = len(self._buffer) - HEADER.size
                self._skip = max(0, length - have)
                del self._buffer[: HEADER.size + min(have, length)]
                yield Malformed("frame", f"{length} bytes announced, at most {FRAME_MAX} are possible")
                continue
            if len(self._buffer) < HEADER.size + length:
                return
            body = bytes(memoryview(self._buffer)[HEADER.size : HEADER.size + length])
            del self._buffer[: HEADER.size + length]
            yield body

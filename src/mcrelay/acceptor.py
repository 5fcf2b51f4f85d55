"""Acceptor: the loop around accept(2) of a listening socket, which somebody else owns.

Never reads a byte of what it accepts.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import Any, Final

log = logging.getLogger(__name__)

ACCEPTS_PER_TURN: Final = 16
ACCEPT_AGAIN_S: Final = 1.0

Take = Callable[[socket.socket, Any], None]  # the connection, which is the callee's, and its peer's address


class Acceptor:
    """`whom` it accepts, for the log. With `rest_s` it rests so long after each turn in which as many came as it takes
    in one: so that a flood costs no more than that."""

    def __init__(self, sock: socket.socket, whom: str, *, rest_s: float = 0.0) -> None:
        self._sock = sock
        self._whom = whom
        self._rest_s = rest_s
        self._take: Take | None = None
        self._resting: asyncio.TimerHandle | None = None

    def open(self, take: Take) -> None:
        """Accept from now on. Until then, and after shut(), whoever connects waits in the backlog."""
        if self._take is None:
            self._take = take
            self._begin()

    def shut(self) -> None:
        if self._take is None:
            return
        self._take = None
        if self._resting:
            self._resting.cancel()
            self._resting = None
        else:
            asyncio.get_running_loop().remove_reader(self._sock.fileno())

    def _begin(self) -> None:
        self._resting = None
        asyncio.get_running_loop().add_reader(self._sock.fileno(), self._accept)

    def _rest(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._sock.fileno())
        self._resting = loop.call_later(seconds, self._begin)

    def _accept(self) -> None:
        for _ in range(ACCEPTS_PER_TURN):
            if self._take is None:
                return  # whoever took the last one has shut us
            try:
                client, address = self._sock.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                # Out of descriptors, say: whoever connects stays in the backlog, and we do not spin over it.
                log.warning(
                    "cannot accept a %s: %s; trying again in %.0f s", self._whom, error.strerror, ACCEPT_AGAIN_S
                )
                self._rest(ACCEPT_AGAIN_S)
                return
            self._take(client, address)
        if self._rest_s and self._take:
            self._rest(self._rest_s)

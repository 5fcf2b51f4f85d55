"""The spare: a data plane process that has imported everything, dropped everything, and waits for its first message.

To start an interpreter and import takes longer than a ring holds packets at high rates; a spare takes a dead worker's
place at once. It belongs to no worker until it is taken: it has no descriptor but its end of FD 3, and knows nothing.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from mcrelay import process
from mcrelay.errors import SystemRefusal
from mcrelay.messages import ProcessFacts

log = logging.getLogger(__name__)

AGAIN_S: Final = 5.0  # after a spare has died, or could not be started


@dataclass(frozen=True, slots=True)
class Started:
    """A process that waits for its first message: whoever has this closes the descriptor and the socket."""

    pid: int
    pidfd: int
    sock: socket.socket  # our end of its FD 3

    def end(self) -> None:
        """End it, and close what is here of it."""
        signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        self.bury()

    def bury(self) -> None:
        """The same for one that has ended."""
        os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED)
        os.close(self.pidfd)
        self.sock.close()


def start(module: str, arguments: Sequence[str], *, prefer: bool) -> Started:
    """Start a worker's process, preferred to others on its core or not. SystemRefusal or OSError if that cannot be."""

    def spawn(end: socket.socket) -> int:
        pid = process.spawn(module, arguments, end)
        if prefer:
            process.prioritise(pid)
        return pid

    return start_by(spawn)


def start_by(spawn: Callable[[socket.socket], int]) -> Started:
    """Start a process by `spawn`, which gives it this end of a socket pair and returns its pid. What `spawn` raises, or
    OSError."""
    own, theirs = socket.socketpair()
    try:
        pid = spawn(theirs)
    except BaseException:
        own.close()
        raise
    finally:
        theirs.close()
    try:
        return Started(pid, os.pidfd_open(pid), own)
    except BaseException:
        own.close()
        os.kill(pid, signal.SIGKILL)  # ours, and not reaped: nobody else can have this pid
        os.waitpid(pid, 0)
        raise


class Spare:
    """At most one process, of this module with these arguments."""

    def __init__(self, module: str, arguments: Sequence[str], *, prefer: bool) -> None:
        self._module = module
        self._prefer = prefer
        self._arguments = arguments
        self._waiting: Started | None = None
        self._closed = False
        self._loop = asyncio.get_running_loop()

    def prepare(self) -> None:
        """Have one. Best effort: without a spare, a worker's restart takes longer."""
        if self._waiting or self._closed:
            return
        try:
            self._waiting = start(self._module, self._arguments, prefer=self._prefer)
        except (SystemRefusal, OSError) as error:
            log.warning("no spare worker: %s", error)
            self._loop.call_later(AGAIN_S, self.prepare)
            return
        self._loop.add_reader(self._waiting.pidfd, self._exited)

    def take(self) -> Started | None:
        """The spare, which is the caller's now, if there is one that lives."""
        taken, self._waiting = self._waiting, None
        if taken is None:
            return None
        self._loop.remove_reader(taken.pidfd)
        if os.waitid(os.P_PIDFD, taken.pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            self._bury(taken)
            return None
        return taken

    def _exited(self) -> None:
        gone, self._waiting = self._waiting, None
        assert gone is not None
        self._loop.remove_reader(gone.pidfd)
        self._bury(gone)
        if not self._closed:
            self._loop.call_later(AGAIN_S, self.prepare)

    def _bury(self, gone: Started) -> None:
        log.warning("the spare worker (pid %s) is gone", gone.pid)
        gone.bury()

    def close(self) -> None:
        """End it, and prepare no other."""
        self._closed = True
        taken = self.take()
        if taken:
            taken.end()

    def facts(self) -> ProcessFacts | None:
        if self._waiting is None:
            return None
        try:
            status = process.status_of(self._waiting.pid)
        except ProcessLookupError:
            return None
        return ProcessFacts(
            role="spare",
            index=0,
            # It imports before it drops its privileges.
            state="starting" if int(status.capabilities, 16) else "ready",
            pid=self._waiting.pid,
            uid=status.uid,
            capabilities=status.capabilities,
            cores=status.cores,
            restarts=0,
        )

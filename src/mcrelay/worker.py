"""The shell of a worker process: from exec to its first message, and to its end.

Owns FD 3 and the order of things: the code is imported, privileges are dropped, the sandbox is entered, and only then a
byte is read; when Start is served, the sandbox is sealed. What a worker does with its messages is its own module's
business.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from collections.abc import Callable, Sequence
from typing import Final, Literal, Protocol

from mcrelay import __version__, logs, process, sandbox
from mcrelay.channel import Channel
from mcrelay.codec import Codec
from mcrelay.errors import EXIT_CODES
from mcrelay.messages import Message, Start
from mcrelay.settings import LogFormat

log = logging.getLogger(__name__)

SLOW_CALLBACK_S: Final = 2.0  # what --debug reports as blocking an event loop; wall time, on a machine that may be busy


class Worker(Protocol):
    """What a role's module provides. It is made when Start has come, and owns the descriptors that came with it."""

    def from_supervisor(self, message: Message, descriptors: list[int]) -> None:
        """A later message on FD 3."""
        ...


class Life:
    """How a worker's life ends: exactly one reason, an exit code."""

    def __init__(self) -> None:
        self._over: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def end(self, code: int = 0) -> None:
        if not self._over.done():
            self._over.set_result(code)

    async def wait(self) -> int:
        return await self._over


def watch_loop(*, debug: bool) -> None:
    """Log by the running loop, and with `debug` let asyncio report whatever blocks it."""
    loop = asyncio.get_running_loop()
    loop.set_debug(debug)
    loop.slow_callback_duration = SLOW_CALLBACK_S
    logs.follow(loop)


BY_HAND: Final = "this is a part of mcrelay and not to be started by hand; see 'mcrelay run --help'"


def identity(arguments: Sequence[str]) -> tuple[int, int, LogFormat]:
    """Whom a worker's command line tells it to become, and how to log until Start says more: UID GID FORMAT. Exits if
    it says something else."""
    try:
        uid, gid, log_format = arguments
        return int(uid), int(gid), logs.checked_format(log_format)
    except ValueError:
        logs.begin("supervisor", "text")
        log.error(BY_HAND)
        sys.exit(EXIT_CODES["usage"])


def main(
    role: Literal["control", "data"],
    make: Callable[[Start, list[int], Life], Worker],
    uid: int,
    gid: int,
    log_format: LogFormat,
) -> None:
    """Run a worker and exit with its code."""
    logs.begin(role, log_format)
    try:
        process.drop_privileges(uid, gid)
    except OSError as error:
        log.error("cannot drop privileges: %s", error)
        sys.exit(EXIT_CODES["not_permitted"])
    code = asyncio.run(_live(role, make))
    logging.shutdown()
    # Threads of the engine and maps that are still referred to need no orderly end: the kernel takes them.
    os._exit(code)


async def _live(role: Literal["control", "data"], make: Callable[[Start, list[int], Life], Worker]) -> int:
    logs.follow(asyncio.get_running_loop())
    life = Life()
    worker: Worker | None = None

    def deliver(message: Message, descriptors: list[int]) -> None:
        nonlocal worker
        if isinstance(message, Start):
            if worker is not None or message.role != role or message.version != __version__:
                log.error("a second Start, or one for role %s of version %s", message.role, message.version)
                life.end(EXIT_CODES["protocol"])
                return
            name = f"{role}/{message.index}" if role == "data" else role
            logs.begin(name, message.logs.format, message.logs.levels)
            watch_loop(debug=message.logs.watch)
            log.debug("in the sandbox; %s", confined)
            worker = make(message, descriptors, life)
            sandbox.seal(role)
        elif worker is None:
            log.error("%s before Start", type(message).__name__)
            life.end(EXIT_CODES["protocol"])
        else:
            worker.from_supervisor(message, descriptors)

    confined = sandbox.enter(role)
    try:
        sock = socket.socket(fileno=process.WORKER_FD)
    except OSError:
        log.error(BY_HAND)
        return EXIT_CODES["usage"]
    os.set_inheritable(process.WORKER_FD, False)
    channel = Channel(
        "supervisor_sock",
        sock,
        Codec("supervisor_sock", "supervisor", role),
        deliver,
        lambda reason: life.end(),  # the supervisor is gone
    )
    code = await life.wait()
    channel.close()
    return code

"""The store: sockets and counters that outlive a daemon which is stopped to be started again.

Owns the way of a daemon's will through the service manager, which keeps descriptors across a restart: the messages
that a successor would get (handover.py) go to a file beside the clients' socket, and each of their descriptors to the
service manager, under a name that says which it is. What arrives while no daemon runs waits in the rings.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from socket import socket as Socket
from typing import Final

from mcrelay import notify
from mcrelay.codec import Codec, encode
from mcrelay.errors import Error, SystemRefusal
from mcrelay.frames import FrameReader, Malformed
from mcrelay.handover import Heritage, Will
from mcrelay.messages import Inherit, Message
from mcrelay.scrape_listener import unlisten
from mcrelay.state import read_trusted, write_whole

log = logging.getLogger(__name__)

PREFIX: Final = "mcrelay"


def _path(socket: str) -> Path:
    return Path(f"{socket}.sockets")


def _name(message: int, descriptor: int) -> str:
    """Of a descriptor: that of a message, both counted from 0."""
    return f"{PREFIX}-{message}-{descriptor}"


def keep(socket: str, will: Will) -> bool:
    """Leave it to the next daemon on this clients' socket. False, and the log says why, if that is not possible."""
    parts = list(will)
    wanted, possible = sum(len(descriptors) for _message, descriptors in parts), notify.store_size()
    if wanted > possible:
        log.warning("sockets are not kept: there are %d, FileDescriptorStoreMax=%d", wanted, possible)
        return False
    try:
        write_whole(_path(socket), b"".join(encode(message) for message, _descriptors in parts))
        for number, (_message, descriptors) in enumerate(parts):
            for which, descriptor in enumerate(descriptors):
                notify.store(_name(number, which), descriptor)
    except OSError as error:
        log.warning("sockets are not kept: %s", error.strerror or error)
        return False
    log.info("%d sockets are kept for the next start", wanted)
    return True


def take(socket: str, workers: int, *, wanted: bool, rootless: bool) -> Heritage | None:
    """What the last daemon left, if it left anything, this one can go on with it, and it is wanted; the log says why if
    it does not."""
    kept = {name: fd for name, fd in notify.stored().items() if name.startswith(f"{PREFIX}-")}
    if not kept:
        return None
    for name in kept:
        notify.forget(name)
    try:
        heritage = _assemble(_path(socket), kept)
        heritage.check_fit(workers, rootless=rootless)
        if not wanted:
            raise Error("--no-restore")
    except (Error, Malformed) as error:
        log.warning("cannot go on with the sockets that were kept: %s", error)
        _discard(socket, kept)
        return None
    finally:
        with contextlib.suppress(OSError):
            _path(socket).unlink()
    log.info("going on with %d sockets of the last daemon", len(kept))
    return heritage


def _discard(path: str, kept: dict[str, int]) -> None:
    """Close them. The service manager may still have those that somebody connects to for a moment: they must not keep
    us from making others."""
    for name, descriptor in kept.items():
        if name == _name(0, 0):
            with contextlib.suppress(OSError), Socket(fileno=os.dup(descriptor)) as sock:
                if sock.getsockname() == path:
                    os.unlink(path)
        with contextlib.suppress(OSError):
            unlisten(descriptor)
        with contextlib.suppress(OSError):
            os.close(descriptor)


def _assemble(path: Path, kept: dict[str, int]) -> Heritage:
    """Error or Malformed if something is missing, or too much."""
    heritage: Heritage | None = None
    complete = False
    left = dict(kept)
    for number, message in enumerate(_messages(path)):
        try:
            descriptors = [left.pop(_name(number, which)) for which in range(message.descriptors())]
        except KeyError as missing:
            raise Error(f"{missing} is not among them") from None
        if heritage is None and isinstance(message, Inherit):
            heritage = Heritage(message, descriptors)
        elif heritage is None or complete:
            raise Error(f"{type(message).__name__} at a wrong place")
        else:
            complete = heritage.take(message, descriptors)
    if heritage is None or not complete or left:
        raise Error("they are not all that there were")
    return heritage


def _messages(path: Path) -> Iterator[Message]:
    content = read_trusted(path)
    if content is None:
        raise SystemRefusal(f"there is no {path}")
    codec = Codec("handover_sock", "supervisor", "successor")
    for frame in FrameReader().feed(content):
        if isinstance(frame, Malformed):
            raise frame
        yield codec.decode(frame)

"""Listener: the one socket on the file system, where clients connect.

Owns its path from bind to unlink, and decides who may speak to the control plane. Never reads a byte from a client.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import logging
import os
import socket
import stat
import struct
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from mcrelay.acceptor import Acceptor
from mcrelay.api import Failure
from mcrelay.codec import encode
from mcrelay.endpoint import check_socket_path
from mcrelay.errors import Error, NotPermitted
from mcrelay.process import group_id

log = logging.getLogger(__name__)

SO_PEERGROUPS: Final = 59
NGROUPS_MAX: Final = 65536
GROUP: Final = "mcrelay"
BACKLOG: Final = 1024  # clients that wait while the control plane is replaced
LOCK_S: Final = 3.0
CREDENTIALS: Final = struct.Struct("=iII")  # struct ucred: pid, uid, gid


class Listener:
    """Binds `path`, mode 0660, group mcrelay if there is one. Error with its code if that cannot be. Or goes on with
    the socket `inherited`, which is bound there already. A `private` one is for this user alone."""

    def __init__(self, path: str, inherited: int | None = None, *, private: bool = False) -> None:
        self.path = path
        check_socket_path(path)
        gid = None if private else group_id(GROUP)
        self._private = private
        self._gid = os.getegid() if gid is None else gid
        self._remedy = (
            "become root, or whoever runs the daemon" if gid is None else f"become root or a member of group {GROUP}"
        )
        if inherited is not None and not os.path.exists(path):  # somebody removed it
            os.close(inherited)
            inherited = None
        self._sock = self._bind() if inherited is None else socket.socket(fileno=inherited)
        self._inode = os.stat(path).st_ino
        self._acceptor = Acceptor(self._sock, "client")

    def _bind(self) -> socket.socket:
        directory = Path(self.path).parent
        try:
            directory.mkdir(mode=0o755, parents=True, exist_ok=True)
            lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise Error(
                f"cannot use {directory} for the socket: {error.strerror}",
                "choose another: --socket PATH",
                code="cannot_create",
            ) from None
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        mask = os.umask(0o177 if self._private else 0o117)  # 0600 or 0660 from the first moment
        try:
            # Two daemons that start at once must not both find the path unused.
            _lock(lock)
            self._remove_stale()
            sock.bind(self.path)
            with ExitStack() as undo:
                undo.callback(os.unlink, self.path)
                os.chown(self.path, -1, self._gid, follow_symlinks=False)
                sock.listen(BACKLOG)
                undo.pop_all()
        except OSError as error:
            sock.close()
            raise Error(
                f"cannot create socket {self.path}: {error.strerror}",
                "choose another: --socket PATH",
                code="cannot_create",
            ) from None
        except BaseException:
            sock.close()
            raise
        finally:
            os.umask(mask)
            os.close(lock)
        sock.setblocking(False)
        return sock

    def _remove_stale(self) -> None:
        """Remove a socket that nobody listens on. Error if somebody does, or if it is something else."""
        try:
            mode = os.stat(self.path).st_mode
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(mode):
            raise Error(
                f"{self.path} exists and is not a socket",
                "move it away or choose another: --socket PATH",
                code="cannot_create",
            )
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            try:
                probe.connect(self.path)
            except ConnectionRefusedError:
                os.unlink(self.path)
                return
            except BlockingIOError:
                pass  # somebody listens, with a full backlog
        raise Error(
            f"another mcrelay already listens on {self.path}",
            "stop it, or choose another: --socket PATH",
            code="cannot_create",
        )

    def open(self, deliver: Callable[[int, int, int, int], None]) -> None:
        """Accept, and call deliver(descriptor, pid, uid, gid) for each permitted client; the callee owns it.
        Until then, and after shut(), clients wait in the backlog."""
        self._acceptor.open(lambda client, _address: self._take(client, deliver))

    def shut(self) -> None:
        self._acceptor.shut()

    def fileno(self) -> int:
        return self._sock.fileno()

    def leave(self) -> None:
        """Somebody else goes on with the socket."""
        self.shut()
        self._sock.close()

    def close(self) -> None:
        self.shut()
        # Unlinked while we still listen: until then a successor is refused, from then on the path is its own. What
        # somebody else has put there stays; our inode's number is not given out again before the socket is closed.
        try:
            if os.stat(self.path).st_ino == self._inode:
                os.unlink(self.path)
        except FileNotFoundError:
            pass
        except PermissionError:
            # In somebody else's directory, where root itself may not write by then. It is known as stale.
            log.warning("cannot remove %s: permission denied", self.path)
        self._sock.close()

    def _take(self, client: socket.socket, deliver: Callable[[int, int, int, int], None]) -> None:
        try:
            pid, uid, gid = self._check(client)
        except NotPermitted as error:
            log.warning("a client is refused: %s", error)
            refusal = Failure(id=None, code=error.code, message=error.message, hint=error.hint)
            client.setblocking(False)
            with contextlib.suppress(OSError):
                client.send(encode(refusal))
            client.close()
            return
        deliver(client.detach(), pid, uid, gid)

    def _check(self, client: socket.socket) -> tuple[int, int, int]:
        """Who is there, as of its connect(2) (SO_PEERCRED, unix(7)). The socket's mode keeps others out already; this
        holds even where the file's mode was changed."""
        pid, uid, gid = CREDENTIALS.unpack(client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size))
        if uid in (0, os.geteuid()):
            return pid, uid, gid
        if not self._private and (gid == self._gid or self._gid in _groups(client)):
            return pid, uid, gid
        raise NotPermitted(
            f"user {uid} (process {pid}) may not use {self.path}",
            self._remedy,
        )


def _lock(descriptor: int) -> None:
    """Take the lock, but do not wait for ever: anybody who may read the directory may hold it."""
    deadline = time.monotonic() + LOCK_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise OSError(errno.EBUSY, "somebody holds a lock on its directory ('fuser -v' shows who)") from None
            time.sleep(0.02)


def _groups(client: socket.socket) -> tuple[int, ...]:
    """Supplementary groups of the peer. Not by socket.getsockopt, which has room for 256 of them."""
    room = (ctypes.c_uint32 * NGROUPS_MAX)()
    size = ctypes.c_uint32(ctypes.sizeof(room))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.getsockopt(client.fileno(), socket.SOL_SOCKET, SO_PEERGROUPS, room, ctypes.byref(size)) != 0:
        raise OSError(ctypes.get_errno(), "SO_PEERGROUPS")
    return tuple(room[: size.value // ctypes.sizeof(ctypes.c_uint32)])

"""Places: where a daemon's socket is, for the daemon and for its clients.

The daemon of the system has a fixed place. One that a user runs without privilege has a place of that user's: in
$XDG_RUNTIME_DIR, which the session made for nobody else, or else in a directory of /tmp, which anybody could have made
first. So that one counts only if it is the user's and nobody else may write to it.
"""

from __future__ import annotations

import os
import reprlib
import stat
from typing import Final

from mcrelay.errors import Error, UsageError

SYSTEM_SOCKET: Final = "/run/mcrelay/control.sock"
VARIABLE: Final = "MCRELAY_SOCKET"


def user_socket() -> str:
    """Where this user's rootless daemon listens, if it was not told otherwise."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if runtime.startswith("/") and _is_ours(runtime):
        return f"{runtime}/mcrelay/control.sock"
    return f"/tmp/mcrelay-{os.geteuid()}/control.sock"


def make_user_directory(path: str) -> None:
    """Make the directory of a user's socket. Error if it is somebody else's."""
    directory = os.path.dirname(path)
    try:
        os.mkdir(directory, 0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise Error(
            f"cannot make {directory} for the socket: {error.strerror}",
            "choose another: --socket PATH",
            code="cannot_create",
        ) from None
    if not _is_ours(directory):
        raise Error(f"{directory} is not ours alone to write to", "choose another: --socket PATH", code="cannot_create")


def find_socket() -> str:
    """Where clients look if they are not told: the system's daemon, or else this user's."""
    if path := os.environ.get(VARIABLE):
        return path
    if not os.path.exists(SYSTEM_SOCKET):
        path = user_socket()
        if os.path.exists(path) and _is_ours(os.path.dirname(path)):
            return path
    return SYSTEM_SOCKET


def chosen_socket(path: str | os.PathLike[str] | None) -> str:
    """Of a program that may have said where. UsageError if that is no path."""
    if path is None:
        return find_socket()
    try:
        text = os.fspath(path)
    except TypeError:
        text = None
    if not isinstance(text, str) or not text:
        raise UsageError(f"{reprlib.repr(path)} is no path of a socket", "give a text, or a pathlib.Path")
    return text


def _is_ours(directory: str) -> bool:
    try:
        facts = os.lstat(directory)
    except OSError:
        return False
    return stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.geteuid() and not facts.st_mode & 0o022

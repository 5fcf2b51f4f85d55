"""The files of a configuration: found, opened, read.

Owns which files belong together, and whether they are to be trusted. What is in them is config.py's. The supervisor
opens them and hands the descriptors on: it does not read them once it runs.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from mcrelay.config import Configuration, read
from mcrelay.errors import BadConfig
from mcrelay.limits import FILES_MAX

SYSTEM_FILE: Final = "/etc/mcrelay/mcrelay.toml"
DROP_INS: Final = "conf.d"
STANDARD_INPUT: Final = ("-", "/dev/stdin")
SIZE_MAX: Final = 8 * 1024 * 1024  # bytes of one


class FileError(BadConfig):
    """A file that cannot be had."""


def names(path: str) -> list[str]:
    """The file and its drop-ins, in their order; standard input has none. FileError if they cannot be had, or are too
    many."""
    if path in STANDARD_INPUT:
        return [path]
    directory = Path(path).parent / DROP_INS
    try:
        drop_ins = sorted(str(entry) for entry in directory.iterdir() if _is_drop_in(entry.name))
    except FileNotFoundError:
        drop_ins = []
    except OSError as error:
        if not os.path.lexists(directory):  # the file is no more there
            return [path]
        raise FileError(f"cannot read {directory}: {error.strerror}", "check its owner and mode") from None
    for name in (path, *drop_ins):
        try:
            name.encode()
        except UnicodeEncodeError:
            raise FileError(f"the name {name!r} is not UTF-8", "rename the file") from None
    if len(drop_ins) >= FILES_MAX:
        raise FileError(f"{directory} has {len(drop_ins)} files", f"at most {FILES_MAX - 1} are possible")
    return [path, *drop_ins]


def is_drop_in(path: str, main: str) -> bool:
    """Whether `path` is, or would be, a drop-in of the file `main`."""
    directory = os.path.join(os.path.dirname(os.path.realpath(main)), DROP_INS)
    return os.path.dirname(os.path.realpath(path)) == os.path.realpath(directory) and _is_drop_in(
        os.path.basename(path)
    )


def _is_drop_in(name: str) -> bool:
    return name.endswith(".toml") and not name.startswith(".")


def open_files(path: str) -> list[tuple[str, int]]:
    """For a daemon: names and descriptors, which are the caller's. FileError if one is not to be had, or if others than
    root could have written what root's daemon is to do."""
    opened: list[tuple[str, int]] = []
    try:
        for name in names(path):
            opened.append((name, _open(name)))
            _check_trust(*opened[-1])
    except BaseException:
        for _name, descriptor in opened:
            os.close(descriptor)
        raise
    return opened


def _open(name: str) -> int:
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise FileError(f"cannot read {name}: {error.strerror}", "check its name, owner and mode") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FileError(f"{name} is not a file", "give the name of a TOML file")
    return descriptor


def _standard_input() -> int:
    try:
        return os.dup(0)
    except OSError as error:
        raise FileError(f"cannot read standard input: {error.strerror}", "give the name of a file") from None


def _check_trust(name: str, descriptor: int, of_main: os.stat_result | None = None) -> None:
    """FileError, for root, if others than root could have written the file; of a drop-in that root did not name, others
    than whoever owns the main file, either."""
    facts = os.fstat(descriptor)
    owners, groups = ({0, of_main.st_uid}, {0, of_main.st_gid}) if of_main else ({0}, {0})
    of_others = stat.S_IWOTH if facts.st_gid in groups else stat.S_IWOTH | stat.S_IWGRP
    if os.geteuid() == 0 and (facts.st_uid not in owners or facts.st_mode & of_others):
        who = "root and whoever owns the file that it belongs to" if of_main else "root"
        raise FileError(f"{name} could be written by others than {who}", f"chown root {name}; chmod go-w {name}")


def read_opened(opened: Sequence[tuple[str, int]]) -> list[tuple[str, bytes]]:
    """What they hold, by name; the descriptors stay the caller's. FileError if one cannot be read or is too long."""
    return [(name, _content(name, descriptor)) for name, descriptor in opened]


def _content(name: str, descriptor: int) -> bytes:
    pieces: list[bytes] = []
    size = 0
    while size <= SIZE_MAX:
        try:
            piece = os.read(descriptor, 1024 * 1024)
        except OSError as error:
            raise FileError(f"cannot read {name}: {error.strerror}", "check the file") from None
        if not piece:
            return b"".join(pieces)
        pieces.append(piece)
        size += len(piece)
    raise FileError(f"{name} is longer than {SIZE_MAX // 2**20} MiB", "spread it over several files in conf.d")


def load(path: str, *, alone: bool = True) -> Configuration:
    """For a daemon: what the file and its drop-ins say, with no command line or `alone`. FileError, or ConfigError with
    all that is wrong."""
    opened = open_files(path)
    try:
        return read(read_opened(opened), alone=alone)
    finally:
        for _name, descriptor in opened:
            os.close(descriptor)


def read_files(path: str, *, new: bool = False) -> list[tuple[str, bytes]]:
    """For a command: names and contents. FileError if one is not to be had; with `new`, a main file that is not there
    is empty. For root, drop-ins have to be root's or of whoever owns the main file."""
    found = []
    of_main: os.stat_result | None = None  # if it is there
    for name in names(path):
        if new and name == path and not os.path.exists(path):
            found.append((name, b""))
            continue
        descriptor = _standard_input() if name in STANDARD_INPUT else _open(name)
        try:
            if name == path:
                of_main = os.fstat(descriptor)
            else:
                _check_trust(name, descriptor, of_main)
            found.append((name, _content(name, descriptor)))
        finally:
            os.close(descriptor)
    return found

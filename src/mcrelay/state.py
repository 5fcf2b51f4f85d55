"""The state file: the rules that are active, for the daemon that runs next.

Owns a file beside the clients' socket, as long-lived as the runtime directory: rules survive the end of a daemon,
whatever ended it, and not a reboot. It is written before a change is acknowledged, whole, under another name first, so
that it is there in its old or its new form at any moment. Changes that come while it is written are written together.

It is read by a privileged process, so nobody else may be able to write it: not other users, and not the workers.
"""

from __future__ import annotations

import asyncio
import logging
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from mcrelay.active import ActiveRules
from mcrelay.errors import Error, SystemRefusal
from mcrelay.limits import RULES_MAX
from mcrelay.messages import Id, RuleRecord

log = logging.getLogger(__name__)

FORMAT: Final = 1
SIZE_MAX: Final = 64 * 1024 * 1024  # bytes; as many rules and outputs as there can be need less than 20 MiB


class Saved(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: int
    generation: Id
    rules: tuple[RuleRecord, ...]


class StateFile:
    """Of the daemon with this clients' socket."""

    def __init__(self, socket: str) -> None:
        self.path = Path(f"{socket}.state")
        self._latest: tuple[int, Sequence[RuleRecord]] = -1, ()  # generation and what it consists of
        self._saved = -1  # generation
        self._writing = asyncio.Lock()

    def note(self, generation: int, records: Sequence[RuleRecord]) -> None:
        """This is what there is to be saved from now on."""
        self._latest = generation, records

    async def save(self, generation: int) -> None:
        """Return when this generation, or a later one, is in the file. Best effort: without it the rules are lost with
        the daemon, which the log says."""
        async with self._writing:
            if self._saved >= generation or self._latest[0] < 0:
                return
            current, records = self._latest
            content = msgspec.json.encode(Saved(FORMAT, current, tuple(records)))
            try:
                await asyncio.to_thread(write_whole, self.path, content)
            except OSError as error:
                log.warning("the rules will not survive this daemon: cannot write %s: %s", self.path, error.strerror)
            else:
                self._saved = current

    def set_aside(self) -> None:
        """Keep what the last daemon left under another name: it is not used, and will be overwritten."""
        aside = self.path.with_name(f"{self.path.name}.old")
        try:
            self.path.rename(aside)
        except FileNotFoundError:
            pass
        except OSError as error:
            log.warning("cannot keep %s as %s: %s", self.path, aside, error.strerror)
        else:
            log.info("the former rules are kept in %s", aside)

    async def restore(self, active: ActiveRules) -> bool:
        """Take up the rules of the last daemon: all of them, or those that can be. False if there were none."""
        try:
            saved = self.load()
        except SystemRefusal as error:
            log.error("cannot restore the rules: %s", error)
            self.set_aside()
            return False
        if not saved or not saved.rules:
            return False
        active.generation = saved.generation
        try:
            await active.apply(list(saved.rules), [])
        except Error:
            for record in saved.rules:
                try:
                    await active.apply([record], [])
                except Error as error:
                    log.error("cannot restore rule %s: %s", record.name or record.input, error)
        log.info(
            "restored %d of %d rules from %s; --no-restore starts without them",
            len(active),
            len(saved.rules),
            self.path,
        )
        return True

    def load(self) -> Saved | None:
        """What the last daemon left; None if there was none. SystemRefusal if it is not to be trusted or to be read."""
        content = read_trusted(self.path)
        if content is None:
            return None
        try:
            saved = msgspec.json.decode(content, type=Saved)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise _refusal(self.path, str(error)) from None
        if saved.format != FORMAT or len(saved.rules) > RULES_MAX:
            raise _refusal(self.path, "another version wrote it")
        return saved


def write_whole(path: Path, content: bytes) -> None:
    """Have the file hold this, or, with an OSError, what it held. Nobody else may read it."""
    unfinished = path.with_name(path.name + ".new")
    unfinished.unlink(missing_ok=True)
    fd = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as file:
        file.write(content)
    unfinished.rename(path)


def read_trusted(path: Path) -> bytes | None:
    """What a file of ours holds, None if there is none. SystemRefusal if it is not to be had, or not to be trusted."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _refusal(path, error.strerror or "cannot be opened") from None
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        os.close(fd)
        raise _refusal(path, "somebody else could have written it")
    with open(fd, "rb") as file:
        content = file.read(SIZE_MAX + 1)
    if len(content) > SIZE_MAX:
        raise _refusal(path, "it is too long")
    return content


def _refusal(path: Path, why: str) -> SystemRefusal:
    return SystemRefusal(f"cannot use {path}: {why}", "starting without it")

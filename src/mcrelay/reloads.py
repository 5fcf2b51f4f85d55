"""Reloads: the configuration file, read again while the daemon runs.

Owns when that happens, and who is told how it went. The supervisor opens the files, since others may not; the control
plane reads them and asks for what follows from them, as it does for a client (control.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable
from typing import Final

from msgspec.structs import replace

from mcrelay import host
from mcrelay.children import Child
from mcrelay.config_files import open_files
from mcrelay.errors import Busy, Error
from mcrelay.messages import Configure, FileState, Occasion
from mcrelay.options import Options
from mcrelay.report import Report
from mcrelay.settings import Settings

log = logging.getLogger(__name__)

CONFIGURE_S: Final = 60.0  # to read and apply files of thousands of rules
START_S: Final = 600.0  # the same where each of them cannot be, which is found out by halves
TRIES: Final = 5
AGAIN_S: Final = 1.0


class Reloads:
    """Of the daemon's file, if it has one; `settings` are those of it that are in force. `generation` is that of the
    rules that run, `inherited` how the file stood for a predecessor."""

    def __init__(
        self,
        options: Options,
        control: Child,
        report: Report,
        generation: Callable[[], int],
        inherited: FileState | None = None,
    ) -> None:
        self.settings = options.settings
        self._config = options.config
        self._chosen = options.chosen
        self._control = control
        self._report = report
        self._generation = generation
        self._turn = asyncio.Lock()
        self.state = None if options.config is None else inherited or FileState(in_force=True, since_s=time.time())
        self._due = 0  # reloads that were asked for, and are not over
        self._successor: int | None = None

    async def begin(self) -> None:
        """Have the rules of the file, as far as they can be. Error if the file is wrong."""
        if self._config is not None:
            await self._configure(self._config, "start")

    def note(self) -> bool:
        """Somebody has asked for a reload: it is due until reload() is over. False if it is left to a successor."""
        if self._successor is not None:
            self._pass_on(self._successor)
            return False
        self._due += 1
        return True

    def leave_to(self, successor: int) -> None:
        """The daemon with this pid goes on: what is due, and who asks yet, is its business."""
        self._successor = successor
        if self._due:
            self._pass_on(successor)

    def _pass_on(self, successor: int) -> None:
        log.info("the reload is left to the new daemon")
        with contextlib.suppress(ProcessLookupError):
            os.kill(successor, signal.SIGHUP)

    async def reload(self) -> None:
        """Have the rules that the file has now, or go on as before and say why. After note()."""
        try:
            if self._config is None:
                log.warning("SIGHUP: there is no file to read again; start with --config FILE")
            else:
                await self._reload(self._config)
        finally:
            self._due -= 1

    async def _reload(self, config: str) -> None:
        with self._report.reloading():
            for attempt in range(TRIES):
                try:
                    await self._configure(config, "reload")
                except Error as error:
                    if error.code == Busy.code and attempt < TRIES - 1:
                        await asyncio.sleep(AGAIN_S)  # the control plane is being restarted, or others change rules
                        continue
                    if self._successor is None:
                        log.error("the configuration stays as it is: %s", error)
                    if self.state:
                        self.state = replace(self.state, in_force=False)
                else:
                    self.state = FileState(in_force=True, since_s=time.time())
                return

    async def _configure(self, config: str, occasion: Occasion) -> None:
        async with self._turn:
            opened = await asyncio.to_thread(open_files, config)
            ticket = self._control.ticket()
            message = Configure(
                ticket=ticket,
                generation=self._generation(),
                files=tuple(name for name, _fd in opened),
                occasion=occasion,
            )
            descriptors = [descriptor for _name, descriptor in opened]
            patience_s = START_S if occasion == "start" else CONFIGURE_S
            done = await self._control.command(ticket, (message, descriptors), patience_s=patience_s, give=True)
            self.settings = done.settings or self.settings
            if occasion == "reload" and done.wanted:
                await asyncio.to_thread(self._warn, done.wanted)  # it may ask a server for users

    def _warn(self, wanted: Settings) -> None:
        """Of what the next start will be refused for here, by the same command line."""
        for _paths, error in host.refusals(replace(wanted, daemon=replace(wanted.daemon, **self._chosen))):
            log.warning("a restart will be refused: %s", error)

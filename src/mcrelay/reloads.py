"""Reloads: the configuration file, read again while the daemon runs.

Owns when that happens, and who is told how it went. The supervisor opens the files, since others may not; the control
plane reads them and asks for what follows from them, as it does for a client (control.py).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from mcrelay import host
from mcrelay.children import Child
from mcrelay.config_files import open_files
from mcrelay.errors import Busy, Error
from mcrelay.messages import Configure, Occasion
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
    rules that run."""

    def __init__(self, options: Options, control: Child, report: Report, generation: Callable[[], int]) -> None:
        self.settings = options.settings
        self._config = options.config
        self._control = control
        self._report = report
        self._generation = generation
        self._turn = asyncio.Lock()

    async def begin(self) -> None:
        """Have the rules of the file, as far as they can be. Error if the file is wrong."""
        if self._config is not None:
            await self._configure(self._config, "start")

    async def reload(self) -> None:
        """Have the rules that the file has now, or go on as before and say why."""
        if self._config is None:
            log.warning("SIGHUP: there is no file to read again; start with --config FILE")
            return
        with self._report.reloading():
            for attempt in range(TRIES):
                try:
                    await self._configure(self._config, "reload")
                except Error as error:
                    if error.code == Busy.code and attempt < TRIES - 1:
                        await asyncio.sleep(AGAIN_S)  # the control plane is being restarted, or others change rules
                        continue
                    log.error("the configuration stays as it is: %s", error)
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
                self._warn(done.wanted)

    def _warn(self, wanted: Settings) -> None:
        """Of what the next start will be refused for here, and this one was not: a command line may have said other."""
        before = {str(error) for _paths, error in host.refusals(self.settings)}
        for _paths, error in host.refusals(wanted):
            if str(error) not in before:
                log.warning("a restart will be refused: %s", error)

"""Reloads: the configuration file, read again while the daemon runs.

Owns when that happens, and who is told how it went. The supervisor opens the files, since others may not; the control
plane reads them and asks for what follows from them, as it does for a client (control.py).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from mcrelay.children import Child
from mcrelay.config_files import open_files
from mcrelay.errors import Error
from mcrelay.messages import Configure, Occasion
from mcrelay.report import Report

log = logging.getLogger(__name__)

CONFIGURE_S: Final = 60.0  # to read and apply files of thousands of rules, some of which cannot be


class Reloads:
    """Of the file `config`, if there is one. `generation` is that of the rules that run."""

    def __init__(self, config: str | None, control: Child, report: Report, generation: Callable[[], int]) -> None:
        self._config = config
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
            try:
                await self._configure(self._config, "reload")
            except Error as error:
                log.error("the configuration stays as it is: %s", error)

    async def inform(self) -> None:
        """A new control plane does not know what the file has come to say."""
        if self._config is not None:
            try:
                await self._configure(self._config, "successor")
            except Error as error:
                log.warning("the control plane goes on with the settings of the start: %s", error)

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
            await self._control.command(ticket, (message, descriptors), patience_s=CONFIGURE_S, give=True)

"""Verbosity: the levels from which on all processes log, now and in their next lives.

Owns the levels in force, and who knows them. A worker begins with what Start says; what changes later it is told, and
acknowledges. Belongs to the supervisor.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Final

from msgspec.structs import replace

from mcrelay import logs
from mcrelay.children import Child
from mcrelay.errors import Error
from mcrelay.levels import changed
from mcrelay.messages import ChangeLevels, Levels, LevelsChanged, LogSettings, SetLevels

log = logging.getLogger(__name__)

PATIENCE_S: Final = 4.0  # beyond an acknowledgement's: a worker may be busy with thousands of rules


class Verbosity:
    """`settings` are in force here already."""

    def __init__(self, settings: LogSettings, children: Sequence[Child]) -> None:
        self._settings = settings
        self._children = children
        self._told: dict[str, Levels] = {}  # by a child's name

    @property
    def levels(self) -> Levels:
        return self._settings.levels

    def settings_for(self, child: Child) -> LogSettings:
        """For Start."""
        self._told[child.name] = self.levels
        return self._settings

    async def introduce(self, child: Child) -> bool:
        """Tell it what has changed since its Start. False if its life ends over it."""
        while self._told[child.name] != self.levels:
            if not await self._tell(child):
                return False
        return True

    async def serve(self, asker: Child, request: ChangeLevels) -> None:
        """Have all processes follow a change, and answer. One that starts will, before it counts as ready."""
        life = asker.restarts
        self._settings = replace(self._settings, levels=changed(self.levels, request.level, request.components))
        logs.set_levels(self.levels)
        await asyncio.gather(*(self._tell(child) for child in self._children if child.state == "ready"))
        if asker.restarts == life:
            asker.tell("request_sock", LevelsChanged(id=request.id, levels=self.levels))

    async def _tell(self, child: Child) -> bool:
        """Whether it has acknowledged. If not, it is ended: its next life starts with the levels in force."""
        ticket, life, levels = child.ticket(), child.restarts, self.levels
        try:
            await child.command(ticket, (SetLevels(ticket=ticket, levels=levels), ()), patience_s=PATIENCE_S)
        except Error as error:
            log.warning("a worker does not follow a change of log levels: %s", error)
            child.kill_life(life)
            return False
        if child.restarts == life:
            self._told[child.name] = levels
        return True

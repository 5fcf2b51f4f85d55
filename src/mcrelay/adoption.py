"""Adoption: how what a configuration file says becomes what runs.

Owns the order of it, and what of a file is in force already: rules first, all in one change that touches only what
differs, then the settings that can change while the daemon runs; of others is said that they wait for a restart. Has
the rules changed by whoever made it (control.py), and knows no channel.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from msgspec.structs import replace

from mcrelay import levels
from mcrelay.config import Configuration
from mcrelay.declared import difference
from mcrelay.errors import Busy, Error
from mcrelay.flowtable import FlowTable
from mcrelay.levels import Change
from mcrelay.rules import Rule
from mcrelay.settings import EventsSection, Settings

log = logging.getLogger(__name__)


class Running(Protocol):
    """What runs, and the ways to change it; each returns when that is done, or raises the Error that kept it back."""

    @property
    def table(self) -> FlowTable: ...

    async def apply(self, add: Sequence[Rule], remove: Sequence[Rule], expect: int | None = None) -> object: ...

    async def on_these_rules(self, attempt: Callable[[int], Awaitable[None]]) -> None: ...

    async def change_levels(self, change: Change) -> object: ...


class Adoption:
    """`started`: what of the file is in force already. `on_events` gets those settings when they are read."""

    def __init__(
        self, file: str | None, started: Settings, running: Running, on_events: Callable[[EventsSection], None]
    ) -> None:
        self._file = file
        self._started = started
        self._running = running
        self._on_events = on_events
        self._log = started.log  # in force, but for what 'mcrelay log' has changed since
        self._events = started.events

    @property
    def settings(self) -> Settings:
        """In force."""
        log_of_file = replace(self._log, format=self._started.log.format)
        return replace(self._started, log=log_of_file, events=self._events)

    async def adopt(self, configuration: Configuration, *, piecemeal: bool) -> None:
        """All of it or, if the rules cannot be had, nothing and their Error; `piecemeal` without those that cannot, so
        that one rule does not keep a daemon from starting."""
        try:
            await self._declare(configuration.rules)
        except Error as error:
            if not piecemeal or error.code == Busy.code:
                raise
            await self._declare_what_can_be(configuration.rules)
        settings = configuration.settings
        self._take_events(settings.events)
        try:
            await self._set_levels(settings)
        except Error as error:
            log.warning("the levels of the log stay as they were: %s", error)
        if waiting := settings.changes_at_start(self._started):
            log.warning("changed in the file, and in force after a restart: %s", ", ".join(waiting))

    def _take_events(self, settings: EventsSection) -> None:
        self._events = settings
        self._on_events(settings)

    async def _declare(self, wanted: Sequence[Rule]) -> None:
        """Have these rules and no others."""

        async def attempt(generation: int) -> None:
            change = difference(self._running.table.rules, wanted)
            if change:
                await self._running.apply(change.adds, change.removes, generation)
            log.info("the rules are those of %s: %s", self._file, change.summary())

        await self._running.on_these_rules(attempt)

    async def _declare_what_can_be(self, wanted: Sequence[Rule]) -> None:
        change = difference(self._running.table.rules, wanted)
        if change.removes:
            await self._running.apply((), change.removes)
        left = [change.adds]
        while left:
            some = left.pop()
            half = len(some) // 2
            try:
                await self._running.apply(some, ())
            except Error as error:
                if error.code == Busy.code:
                    raise
                if half:
                    left += [some[half:], some[:half]]  # in their order
                else:
                    log.error("rule %s of the configuration cannot be: %s", some[0].label, error)

    async def _set_levels(self, settings: Settings) -> None:
        """What 'mcrelay log' has changed stays if the file's part of it does."""
        before = self._log
        if (before.level, before.levels) != (settings.log.level, settings.log.levels):
            gone = dict.fromkeys(before.levels.keys() - settings.log.levels.keys(), levels.DEFAULT)
            await self._running.change_levels(levels.checked(settings.log.level, gone | settings.log.levels))
        self._log = settings.log

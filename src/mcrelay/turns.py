"""Turns: long loops that let the event loop serve others in between."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Final, TypeVar

STEPS_PER_TURN: Final = 100  # each some tens of microseconds: some milliseconds a turn

Item = TypeVar("Item")


async def in_turns(items: Iterable[Item]) -> AsyncIterator[Item]:
    """The items; now and then the event loop gets its turn."""
    for number, item in enumerate(items, 1):
        yield item
        if number % STEPS_PER_TURN == 0:
            await asyncio.sleep(0)

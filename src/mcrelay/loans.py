"""Loans: the descriptors of interfaces' sockets, as the data planes have them.

Owns who is told of which, and that each takes or gives back what it is told. The sockets are attachments.py's, and stay
open here whatever becomes of a worker.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Sequence
from typing import Final

from mcrelay.children import Child
from mcrelay.messages import AttachInterface, DetachInterface, Ring
from mcrelay.net.attachments import Attachment, Attachments
from mcrelay.ports import PortLinks
from mcrelay.ways import Direction

WRITTEN: Final[tuple[Direction, ...]] = ("frame", "raw4", "raw6")  # ways out for which workers write headers


class Loans:
    """To `data`, the data planes, of what `attachments` has. Busy, of all of this, if a worker does not acknowledge."""

    def __init__(self, data: Sequence[Child], attachments: Attachments) -> None:
        self._data = data
        self._attachments = attachments
        self.ports = PortLinks(attachments, self.ready_workers)

    def ready_workers(self) -> list[Child]:
        """The data planes to tell; the others will be told everything when they come up."""
        return [child for child in self._data if child.state == "ready"]

    async def give_all(self, child: Child, *, ingress: bool) -> None:
        """Give a worker's new life all that is open for sending, or for receiving."""
        for attachment in self._attachments:
            for direction in attachment.sockets:
                if (direction == "ingress") == ingress:
                    await self._give(child, attachment, direction)

    async def give_everywhere(self, attachment: Attachment, direction: Direction) -> None:
        await asyncio.gather(*(self._give(child, attachment, direction) for child in self.ready_workers()))

    async def take_back(self, attachment: Attachment, direction: Direction) -> None:
        """Have every worker finish what it has in hand of it, and use it no more."""
        command = functools.partial(DetachInterface, slot=attachment.slot, direction=direction)
        await asyncio.gather(*(child.take_from(command) for child in self.ready_workers()))

    async def _give(self, child: Child, attachment: Attachment, direction: Direction) -> None:
        ticket = child.ticket()
        plain = direction == "ingress" and self._attachments.ports is not None
        ring = attachment.ring if direction == "ingress" else None
        message = AttachInterface(
            ticket=ticket,
            slot=attachment.slot,
            name=attachment.name,
            mtu=attachment.opened[direction].mtu,
            direction=direction,
            ring=Ring(ring.block_size, ring.blocks, ring.frame_size) if ring else None,
            loopback=attachment.opened[direction].is_loopback,
            plain=plain,
            link=attachment.opened[direction].link().packed.hex() if direction in WRITTEN else None,
        )
        await child.command(ticket, (message, [s[child.index].fileno() for s in [attachment.sockets[direction]] if s]))
        if plain:
            await self.ports.attach_all(child, attachment)

"""Own addresses: what workers know of the addresses of this host.

What comes from one of them is our own, come back (docs/ARCHITECTURE.md, Loops). Owns which of them workers were told;
links.py, whose turns this happens in, says when to look.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from mcrelay.children import Child
from mcrelay.errors import Busy
from mcrelay.limits import ADDRESSES_MAX
from mcrelay.messages import SetOwnAddresses
from mcrelay.net.interfaces import Interfaces

log = logging.getLogger(__name__)


class OwnAddresses:
    """`workers`: the data planes to tell; others are told by introduce() when they come up."""

    def __init__(self, interfaces: Interfaces, workers: Callable[[], Sequence[Child]]) -> None:
        self._interfaces = interfaces
        self._workers = workers
        self.texts: tuple[str, ...] = ()  # as the workers know them

    def read(self) -> bool:
        """Whether they are others now than they were."""
        own = sorted(set().union(*self._interfaces.addresses().values()))
        if len(own) > ADDRESSES_MAX:
            log.warning("this host has %d addresses: what comes back from some is not told apart", len(own))
        before, self.texts = self.texts, tuple(own[:ADDRESSES_MAX])
        return self.texts != before

    async def tell(self) -> None:
        """Have the workers know them, if they are others now."""
        if not self.read():
            return
        for child in self._workers():
            try:
                await self.introduce(child)
            except Busy as error:
                log.warning("a worker does not know the addresses of this host: %s", error)  # its next life will know

    async def introduce(self, child: Child) -> None:
        ticket = child.ticket()
        await child.command(ticket, (SetOwnAddresses(ticket=ticket, addresses=self.texts), ()))

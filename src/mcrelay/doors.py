"""Doors: where others come in, clients by the socket on the file system and scrapers by TCP.

Owns both listening sockets for a daemon's life. They open and shut together: while there is a control plane, which gets
every connection, and nobody else has the place of this daemon.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from mcrelay.handover import Heritage
from mcrelay.listener import Listener
from mcrelay.messages import Client, Message
from mcrelay.options import Options
from mcrelay.scrape_listener import ScrapeListener


class Doors:
    """`deliver(message, descriptor)` tells the control plane of a connection, which is its own then. Error if a socket
    cannot be."""

    def __init__(self, options: Options, heritage: Heritage | None, deliver: Callable[[Message, int], None]) -> None:
        # First, since it leaves nothing behind if the other cannot be.
        self._scrapers = ScrapeListener(options.metrics, heritage.metrics if heritage else None)
        inherited = heritage.descriptors[0] if heritage else None
        self._clients = Listener(options.socket, inherited, private=options.rootless)
        self._deliver = deliver

    def open(self) -> None:
        """Until then, and after shut(), whoever connects waits."""
        self._clients.open(self._pass_client)
        self._scrapers.open(self._deliver)

    def _pass_client(self, descriptor: int, pid: int, uid: int, gid: int) -> None:
        self._deliver(Client(pid=pid, uid=uid, gid=gid), descriptor)

    def shut(self) -> None:
        self._clients.shut()
        self._scrapers.shut()

    def fileno(self) -> int:
        """The clients' socket."""
        return self._clients.fileno()

    def will(self) -> Iterator[tuple[Message, list[int]]]:
        """What else a successor needs."""
        yield from self._scrapers.will()

    def leave(self) -> None:
        """Somebody else goes on with the sockets."""
        self._clients.leave()
        self._scrapers.close()

    def close(self) -> None:
        self._clients.close()
        self._scrapers.close()

"""Absorbers: sockets on the unicast inputs of rules, so that this host does not refuse what it relays.

A packet to an address of this host goes up its stack, too, after the packet socket has seen it. Where no socket wants
it, the host answers with ICMP, port or protocol unreachable, and senders stop or complain. So for each such input there
is a socket that takes the packets and drops them: a UDP socket on the port, or a raw one for ESP. Owns those sockets,
and how many rules need each. Knows nothing of rules or workers.

If a program on this host has the port already, nothing is needed, as long as it has it: `retry` takes the place of one
that has gone. The sockets do not share their port (SO_REUSEADDR, SO_REUSEPORT): with them the datagrams of a program
that came first would end here. A program that comes later is told that the port is in use, not left without its
datagrams.

Kernel facts: with IP_FREEBIND, and IPV6_FREEBIND, a socket can be bound to an address that the host does not have yet;
one of link-local scope is bound to an interface, too. What a filter drops counts among the host's errors on input
(InErrors of /proc/net/snmp), and is not answered.
"""

from __future__ import annotations

import errno
import logging
import socket
from collections import Counter
from collections.abc import Iterator
from typing import Final, NamedTuple

from mcrelay.net.filters import receive_nothing
from mcrelay.rules import BROADCAST, Address, Input, is_group

log = logging.getLogger(__name__)

IP_FREEBIND: Final = 15  # linux/in.h
IPV6_FREEBIND: Final = 78  # linux/in6.h
ESP: Final = 50


class Place(NamedTuple):
    """What an absorber is on. `port` 0 is ESP, `interface` given where the address is of link-local scope."""

    address: Address
    port: int
    interface: str = ""

    def __str__(self) -> str:
        return f"{self.address} port {self.port}" if self.port else f"{self.address} (ESP)"


def place_of(given: Input, interface: str) -> Place | None:
    """Where a rule's input needs one, if it does: for unicast."""
    if is_group(given.address) or given.address == BROADCAST or given.prefix is not None:
        return None
    if given.port is None and given.protocol != "esp":
        return None
    is_local = given.address.version == 6 and given.address.is_link_local
    return Place(given.address, given.port or 0, interface if is_local else "")


class Absorbers:
    def __init__(self) -> None:
        self._uses: Counter[Place] = Counter()
        self._sockets: dict[Place, tuple[socket.socket, int]] = {}  # and the interface's index
        self._missing: dict[Place, int] = {}  # errno

    def take(self, place: Place) -> None:
        """One more rule has this input. Whatever the kernel says, the rule works, so that is logged and no more."""
        self._uses[place] += 1
        if place not in self._sockets:
            self._open(place)

    def give_up(self, place: Place) -> None:
        """One rule less has it; sweep() closes what nobody needs, unless somebody took it again."""
        self._uses[place] -= 1

    def sweep(self) -> None:
        for place in [place for place, uses in self._uses.items() if uses <= 0]:
            del self._uses[place]
            self._missing.pop(place, None)
            self._close(place)

    def retry(self) -> None:
        """Take what could not be taken before, or is bound to an interface that is another one by now. Cheap if there
        is nothing to do."""
        for place, (_sock, index) in list(self._sockets.items()):
            if place.interface and index != _index(place.interface):
                self._close(place)
                self._missing[place] = errno.ENODEV
        for place in list(self._missing):
            self._open(place)

    @property
    def is_missing(self) -> bool:
        """Some could not be taken."""
        return bool(self._missing)

    def sockets(self) -> Iterator[tuple[Place, socket.socket]]:
        """For a successor; they stay ours."""
        return ((place, sock) for place, (sock, _index) in self._sockets.items())

    def adopt(self, place: Place, sock: socket.socket) -> None:
        """One of a predecessor's, before its rules take it."""
        self._sockets[place] = sock, _index(place.interface)

    def _open(self, place: Place) -> None:
        try:
            self._sockets[place] = _absorber(place)
        except OSError as error:
            reason = error.errno or 0
            if reason != self._missing.get(place):
                if reason == errno.EADDRINUSE:
                    log.info("a program of this host receives at %s, too", place)
                else:
                    log.warning("this host refuses by ICMP what comes to %s: cannot bind (%s)", place, error.strerror)
            self._missing[place] = reason
        else:
            self._missing.pop(place, None)

    def _close(self, place: Place) -> None:
        if opened := self._sockets.pop(place, None):
            opened[0].close()

    def close(self) -> None:
        for place in list(self._sockets):
            self._close(place)
        self._uses.clear()
        self._missing.clear()


def _index(interface: str) -> int:
    """0 if there is none."""
    try:
        return socket.if_nametoindex(interface) if interface else 0
    except OSError:
        return 0


def _absorber(place: Place) -> tuple[socket.socket, int]:
    index = _index(place.interface)
    if place.interface and not index:
        raise OSError(errno.ENODEV, f"there is no interface {place.interface!r}")
    family = socket.AF_INET if place.address.version == 4 else socket.AF_INET6
    sock = socket.socket(family, socket.SOCK_DGRAM) if place.port else socket.socket(family, socket.SOCK_RAW, ESP)
    try:
        receive_nothing(sock)
        if family == socket.AF_INET:
            sock.setsockopt(socket.IPPROTO_IP, IP_FREEBIND, 1)
            sock.bind((str(place.address), place.port))
        else:
            if place.port:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)
            sock.bind((str(place.address), place.port, 0, index))
    except BaseException:
        sock.close()
        raise
    return sock, index

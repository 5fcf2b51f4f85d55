"""Absorbers: sockets on the unicast inputs of rules, so that this host does not refuse what it relays.

A datagram to an address of this host goes up its stack, too, after the packet socket has seen it. Where no socket has
the port, the host answers with ICMP port unreachable, and senders stop or complain. So for each such input there is a
UDP socket that takes the datagrams and drops them. Owns those sockets, and how many rules need each. Knows nothing of
rules or workers.

If a program on this host has the port already, nothing is needed, as long as it has it: `retry` takes the place of one
that has gone, or of the daemon before this one. The sockets do not share their port (SO_REUSEADDR, SO_REUSEPORT):
with them the datagrams of a program that came first would end here. A program that comes later is told that the port
is in use, not left without its datagrams.

Kernel facts: with IP_FREEBIND, and IPV6_FREEBIND, a socket can be bound to an address that the host does not have yet.
What a filter drops counts among the host's errors on input (InErrors of /proc/net/snmp), and is not answered.
"""

from __future__ import annotations

import errno
import logging
import socket
from collections import Counter
from typing import Final

from mcrelay.net.filters import receive_nothing
from mcrelay.rules import Address

log = logging.getLogger(__name__)

IP_FREEBIND: Final = 15  # linux/in.h
IPV6_FREEBIND: Final = 78  # linux/in6.h

Place = tuple[Address, int, int]  # address, port; interface index where the address is of link-local scope, or 0


class Absorbers:
    def __init__(self) -> None:
        self._uses: Counter[Place] = Counter()
        self._sockets: dict[Place, socket.socket] = {}
        self._missing: dict[Place, int] = {}  # errno

    def take(self, address: Address, port: int, index: int = 0) -> None:
        """One more rule has this input. `index` is that of the input's interface: it counts where the same address may
        be on several. Whatever the kernel says, the rule works, so that is logged and no more."""
        place = _place(address, port, index)
        self._uses[place] += 1
        if self._uses[place] == 1:
            self._open(place)

    def give_up(self, address: Address, port: int, index: int = 0) -> None:
        """One rule less has it."""
        place = _place(address, port, index)
        self._uses[place] -= 1
        if self._uses[place] > 0:
            return
        del self._uses[place]
        self._missing.pop(place, None)
        if sock := self._sockets.pop(place, None):
            sock.close()

    def retry(self) -> None:
        """Take what could not be taken before. Cheap, if nothing is missing."""
        for place in list(self._missing):
            self._open(place)

    def missing(self) -> dict[tuple[Address, int], str]:
        """Where there is none, and why: most often since a program of this host receives there itself."""
        return {(address, port): errno.errorcode[reason] for (address, port, _index), reason in self._missing.items()}

    def _open(self, place: Place) -> None:
        try:
            self._sockets[place] = _absorber(place)
        except OSError as error:
            address, port, _index = place
            reason = error.errno or 0
            if reason != self._missing.get(place):
                if reason == errno.EADDRINUSE:
                    log.info("a program of this host receives at %s port %d, too", address, port)
                else:
                    log.warning(
                        "this host answers what comes to %s port %d with ICMP port unreachable: cannot bind to it (%s)",
                        *(address, port, error.strerror),
                    )
            self._missing[place] = reason
        else:
            self._missing.pop(place, None)

    def close(self) -> None:
        for sock in self._sockets.values():
            sock.close()
        self._sockets.clear()
        self._uses.clear()
        self._missing.clear()


def _place(address: Address, port: int, index: int) -> Place:
    return address, port, index if address.version == 6 and address.is_link_local else 0


def _absorber(place: Place) -> socket.socket:
    address, port, index = place
    sock = socket.socket(socket.AF_INET if address.version == 4 else socket.AF_INET6, socket.SOCK_DGRAM)
    try:
        receive_nothing(sock)
        if address.version == 4:
            sock.setsockopt(socket.IPPROTO_IP, IP_FREEBIND, 1)
            sock.bind((str(address), port))
        else:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)
            sock.bind((str(address), port, 0, index))
    except BaseException:
        sock.close()
        raise
    return sock

"""Scrape listener: the TCP socket where whoever reads the metrics connects.

Owns it from bind to close; it stays with the supervisor when the control plane dies, and goes to the next daemon as the
clients' socket does, so nobody who connects is refused meanwhile. Never reads a byte: who asks for what is the control
plane's business (scrapers.py).
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import stat
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from typing import Any, Final

from mcrelay.acceptor import Acceptor
from mcrelay.endpoint import Endpoint, endpoint_text
from mcrelay.errors import Error
from mcrelay.messages import InheritMetrics, Message, Scraper
from mcrelay.net.absorbers import IP_FREEBIND, IPV6_FREEBIND

log = logging.getLogger(__name__)

BACKLOG: Final = 128  # scrapers that wait while the control plane is replaced
REST_S: Final = 0.05  # between two turns of a flood: 320 connections a second at most

REMEDIES: Final = {
    errno.EADDRINUSE: "'ss -ltnp' shows who uses it; choose another port",
    errno.EACCES: "ports below 1024 need CAP_NET_BIND_SERVICE; choose another port",
}


class ScrapeListener:
    """Binds `endpoint`, or goes on with the socket `inherited` if that is bound there. Error if that cannot be. Without
    an endpoint it listens nowhere, and does nothing."""

    def __init__(self, endpoint: Endpoint | None, inherited: tuple[InheritMetrics, int] | None = None) -> None:
        self._endpoint = endpoint
        sock = None
        if inherited:
            first, descriptor = inherited
            if (first.address, first.port) == endpoint:
                sock = socket.socket(fileno=descriptor)
            else:
                os.close(descriptor)
        if sock is None and endpoint:
            sock = _bind(endpoint)
        self._sock = sock
        self._is_announced = False
        self._acceptor = Acceptor(sock, "scraper", rest_s=REST_S) if sock else None

    def open(self, deliver: Callable[[Message, int], None]) -> None:
        """Accept, and call deliver(who it is, descriptor) for each; the callee owns the latter."""

        def take(scraper: socket.socket, address: Any) -> None:
            deliver(Scraper(address=endpoint_text(address[:2])), scraper.detach())

        if self._acceptor and self._endpoint:
            self._acceptor.open(take)
            if not self._is_announced:
                self._is_announced = True
                log.info("metrics are served at http://%s/metrics", endpoint_text(self._endpoint))

    def shut(self) -> None:
        """Whoever connects waits, up to the backlog."""
        if self._acceptor:
            self._acceptor.shut()

    def will(self) -> Iterator[tuple[Message, list[int]]]:
        """What a successor needs to go on with it."""
        if self._sock and self._endpoint:
            address, port = self._endpoint
            yield InheritMetrics(address=address, port=port), [self._sock.fileno()]

    def close(self) -> None:
        """Others who have the socket may go on."""
        self.shut()
        if self._sock:
            self._sock.close()


def _is_a_hosts(text: str) -> bool:
    """Whether a host could have this address, or it is all that one has."""
    address = ip_address(text)
    never = address.is_multicast or (address.version == 4 and (address.is_reserved or int(address) >> 24 == 0))
    return address.is_unspecified or not never


def _bind_before_it_is_there(sock: socket.socket, address: Any) -> None:
    """ip(7), IP_FREEBIND: takes no privilege."""
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IP, IP_FREEBIND, 1)
    sock.bind(address)


def _bind(endpoint: Endpoint) -> socket.socket:
    text = endpoint_text(endpoint)
    sock = None
    try:
        if not _is_a_hosts(endpoint[0]):
            raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
        # Numbers alone: asks nobody. It knows what number an interface has that a link-local address names.
        family, kind, protocol, _name, address = socket.getaddrinfo(
            *endpoint, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
        )[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # behind connections that are about to be forgotten
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # of those that it accepts: an answer is a whole
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)  # [::] is all addresses
        try:
            sock.bind(address)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
            # It may come yet, as by DHCP behind a boot; a relay does not wait for it.
            _bind_before_it_is_there(sock, address)
            log.warning("metrics are to be served at %s, which is no address of this host yet", text)
        sock.listen(BACKLOG)
    except OSError as error:
        if sock:
            sock.close()
        raise Error(
            f"cannot serve metrics at {text}: {error.strerror or error}",
            REMEDIES.get(error.errno or 0, "choose another address: --metrics ADDRESS:PORT"),
            code="cannot_create",
        ) from None
    sock.setblocking(False)
    return sock


def unlisten(descriptor: int) -> None:
    """If this is a listening TCP socket, have it listen no more, whoever else has it: its port is free for another."""
    if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
        return
    with socket.socket(fileno=os.dup(descriptor)) as sock:
        if sock.family != socket.AF_UNIX and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            sock.shutdown(socket.SHUT_RDWR)

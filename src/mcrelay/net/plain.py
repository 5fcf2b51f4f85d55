"""Plain sockets: the ordinary UDP sockets by which packets come in in rootless mode.

Owns one for each interface, address family and port that rules name, from opening to closing. Needs no privilege.
Knows nothing of workers.

Kernel facts:
- A socket is given to one interface by SO_BINDTODEVICE, which takes no privilege as long as it is the first time (Linux
  5.7).
- A datagram to a group that this host is a member of is delivered to each socket that is bound to its port and to no
  address, whoever has joined, as long as IP_MULTICAST_ALL is on, which it is by default (ip(7)). So the memberships may
  be other sockets', 20 each (net/memberships.py), and one socket here takes thousands of groups. What comes for groups
  that another program has joined, no rule takes.
- SO_REUSEADDR lets another program of this host have the same port, if it says so, too: each gets a copy of what is
  sent to groups. Of what is sent to this host's own addresses only one gets it: the one that is bound to the interface.
- SO_RCVBUF does not go beyond net.core.rmem_max.
- With UDP_GRO what a device merged comes as it is, with the length of each datagram (Linux 5.0; udp(7)).
"""

from __future__ import annotations

import errno
import logging
import socket
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final

from mcrelay.errors import RuleError, SystemRefusal
from mcrelay.limits import PORTS_MAX
from mcrelay.net.interfaces import Interface
from mcrelay.rootless import reverse_path_remark
from mcrelay.rules import Rule

log = logging.getLogger(__name__)

# Constants that the socket module lacks (linux/in.h, linux/udp.h).
IP_PKTINFO: Final = 8
IP_RECVTTL: Final = 12
UDP_GRO: Final = 104

RECEIVE_BUFFER: Final = 8 * 1024 * 1024  # bytes, which the kernel doubles
IPV6: Final = 1 << 16  # in a port's number

Number = int  # of a port and its family: the port, and IPV6
_NETWORK: Final = Path("/proc/sys/net")
_TOO_MANY: Final = f"rules may have no more than {PORTS_MAX} ports, those of all interfaces together"
_FEWER: Final = "each is a socket with --rootless; use fewer ports, or run mcrelay as root"


def number_of(rule: Rule) -> Number:
    """The port by which the rule's packets come in."""
    assert rule.input.port is not None  # rootless.check_rule
    return rule.input.port | (IPV6 if rule.input.address.version == 6 else 0)


def first_unprivileged_port() -> int:
    return _setting("ipv4/ip_unprivileged_port_start", 1024)


def receive_buffer_max() -> int:
    return _setting("core/rmem_max", RECEIVE_BUFFER)


def reverse_path_filter(interface: str) -> int:
    """Which check of sources is in force there: the stricter one of the interface's and the system's, as numbers go."""
    return max(_setting(f"ipv4/conf/{name}/rp_filter", 0) for name in ("all", interface))


def _setting(name: str, otherwise: int) -> int:
    try:
        return int((_NETWORK / name).read_text())
    except (OSError, ValueError):
        return otherwise


def open_port(interface: Interface, number: Number) -> socket.socket:
    """A socket that gets what comes in by the interface for this port. SystemRefusal if that cannot be."""
    port, ipv6 = number % IPV6, number >= IPV6
    with ExitStack() as stack:
        try:
            sock = stack.enter_context(socket.socket(socket.AF_INET6 if ipv6 else socket.AF_INET, socket.SOCK_DGRAM))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.name.encode())
            if ipv6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVHOPLIMIT, 1)
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVTCLASS, 1)
            else:
                sock.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
                sock.setsockopt(socket.IPPROTO_IP, IP_RECVTTL, 1)
                sock.setsockopt(socket.IPPROTO_IP, socket.IP_RECVTOS, 1)
            sock.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)
            sock.bind(("::" if ipv6 else "0.0.0.0", port))
        except OSError as error:
            raise SystemRefusal(
                f"cannot receive port {port} on {interface.name}: {error.strerror}", _remedy(error, port)
            ) from None
        stack.pop_all()
        return sock


def _remedy(error: OSError, port: int) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return f"a program has the port for itself ('ss -ulpn sport = :{port}' shows it); run mcrelay as root"
        case errno.EACCES:
            return f"sysctl -w net.ipv4.ip_unprivileged_port_start={port}, or run mcrelay as root"
        case errno.EMFILE | errno.ENFILE:
            return "raise the limit of open files (ulimit -n)"
        case errno.EPERM:
            return "SO_BINDTODEVICE takes Linux 5.7 or root"
        case _:
            return "see 'ip link' and the kernel's log (dmesg)"


class Ports:
    """The ports that rules need on each interface, by its name, and the sockets of those that are open."""

    def __init__(self) -> None:
        self._uses: Counter[tuple[str, Number]] = Counter()  # by active rules
        self._open: dict[str, dict[Number, socket.socket]] = {}  # of open interfaces

    # Uses.

    def keep(self, names: Iterable[str], number: Number) -> None:
        """One more active rule needs it on these interfaces."""
        self._uses.update((name, number) for name in names)

    def release(self, names: Iterable[str], number: Number) -> None:
        for name in names:
            self._uses[name, number] -= 1
            if not self._uses[name, number]:
                del self._uses[name, number]

    def check(self, more: Iterable[tuple[str, Number]]) -> None:
        """RuleError if active rules with these ports, by interface, would need too many."""
        if len(self._uses.keys() | set(more)) > PORTS_MAX:
            raise RuleError(_TOO_MANY, _FEWER)

    def wanted(self, name: str) -> list[Number]:
        """What active rules need on an interface."""
        return [number for other, number in self._uses if other == name]

    def unused(self, name: str) -> list[Number]:
        """Those of an interface that are open and that no active rule needs."""
        return [number for number in self._open.get(name, ()) if not self._uses[name, number]]

    # Sockets.

    def open_interface(self, interface: Interface) -> None:
        """Open what active rules need there, as far as the kernel lets us: the rest is not open."""
        self._open[interface.name] = {}
        if remark := reverse_path_remark(interface.name, reverse_path_filter(interface.name)):
            log.warning("rootless interface: %s", remark)
        for number in self.wanted(interface.name):
            with suppress(SystemRefusal):
                self.open(interface, number)

    def is_open(self, name: str, number: Number) -> bool:
        return number in self._open.get(name, ())

    def open(self, interface: Interface, number: Number) -> socket.socket:
        """One more of an interface that is open. SystemRefusal if the kernel will not, or if there are too many:
        check() has let no more pass, but a pattern may have come to match more interfaces since."""
        if sum(map(len, self._open.values())) == PORTS_MAX:
            raise SystemRefusal(f"cannot receive port {number % IPV6} on {interface.name}: {_TOO_MANY}", _FEWER)
        ports = self._open[interface.name]
        ports[number] = open_port(interface, number)
        return ports[number]

    def sockets(self, name: str) -> dict[Number, socket.socket]:
        return dict(self._open.get(name, {}))

    def adopt(self, name: str, sockets: Iterable[tuple[Number, socket.socket]]) -> None:
        """An interface's sockets that somebody else has opened; more of them may follow."""
        self._open.setdefault(name, {}).update(sockets)

    def close(self, name: str, number: Number) -> None:
        self._open[name].pop(number).close()

    def close_interface(self, name: str) -> None:
        for sock in self._open.pop(name, {}).values():
            sock.close()

    def close_all(self) -> None:
        for name in list(self._open):
            self.close_interface(name)

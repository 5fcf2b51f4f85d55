"""The contract of an engine, the packet's way through one worker.

An engine runs on a thread of its own (`run`) and is commanded from the event loop's thread (everything else). A command
is handed over, never waited for: it returns a ticket, and when `answer_fd` becomes readable, `answers()` has the
tickets that are through, each with 0 or an errno. Commands take effect between two packets, in order of their tickets
(a detach may answer later than its successors, when the last packet is done); a command that replaces something has
put it out of use when it answers.

Descriptors are borrowed: the caller closes them, after the answer to the command that puts them out of use. Rules name
interfaces by slot, a small number that the supervisor gives out.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Protocol

from mcrelay.entries import Entry
from mcrelay.limits import RingGeometry
from mcrelay.ways import Link, Way


class Engine(Protocol):
    name: ClassVar[str]

    @property
    def answer_fd(self) -> int:
        """Readable when answers() has something."""
        ...

    def run(self) -> None:
        """Forward until stopped; returns when every packet taken from a socket is dealt with. OSError if the kernel
        ends it early."""
        ...

    # Commands. BlockingIOError: too many are waiting; OSError or OverflowError: wrong arguments. Nothing has happened.

    def attach_ingress(
        self, interface: int, fd: int, mtu: int, ring: RingGeometry | None = None, *, loopback: bool = False
    ) -> int:
        """Receive from the packet socket `fd` what is addressed to this interface's rules: from its ring if it has one,
        else by receives of up to `mtu` bytes. On a `loopback` device local programs send from own addresses, too.
        Answers EEXIST if there is one already."""
        ...

    def attach_datagrams(self, interface: int, *, loopback: bool = False) -> int:
        """Receive from ordinary UDP sockets instead, which are added one by one. Answers EEXIST if there is an ingress
        already."""
        ...

    def add_socket(self, interface: int, number: int, fd: int) -> int:
        """Receive from the UDP socket `fd`, too, what is addressed to the port that it is bound to; the socket tells
        the rest (net/plain.py). Answers EEXIST if the number is in use, ENFILE if there are PORTS_MAX already, ENOENT
        if the interface has no such ingress."""
        ...

    def remove_socket(self, interface: int, number: int) -> int:
        """Answers ENOENT if there is none of this number."""
        ...

    def detach_ingress(self, interface: int) -> int:
        """Answers ENOENT if there is none."""
        ...

    def attach_egress(self, interface: int, way: Way, fd: int, mtu: int, link: Link) -> int:
        """Send this interface's outputs of this way through the socket `fd`, instead of the one before. What exceeds
        `mtu` with its headers is left to the kernel to fragment, or fragmented here where we write the IP header."""
        ...

    def detach_egress(self, interface: int, way: Way) -> int:
        """Answers ENOENT if there is none."""
        ...

    def set_rules(self, entries: Iterable[Entry]) -> int:
        """Forward by these and no others."""
        ...

    def set_own_addresses(self, addresses: Iterable[bytes]) -> int:
        """These are the addresses of this host, 16 bytes each, ADDRESSES_MAX at most, and no others: packets that come
        from one of them are our own come back, and are dropped."""
        ...

    def open_tap(self, rule: int, fd: int, count: int, snap: int) -> int:
        """Show the next `count` packets of the rule counted at `rule` by the socket `fd`, as native/tap.h says, no more
        than `snap` bytes of each. Answers EBUSY if as many are open as there can be, EINVAL for a wrong number."""
        ...

    def close_tap(self, fd: int) -> int:
        """Answers ENOENT if there is none."""
        ...

    def probe(self) -> int:
        """Do nothing; the answer shows that the engine's thread works."""
        ...

    def stop(self) -> int: ...

    def answers(self) -> list[tuple[int, int]]:
        """(ticket, errno or 0), each once."""
        ...

    def close(self) -> None:
        """Release everything but the borrowed descriptors. After run() has returned."""
        ...

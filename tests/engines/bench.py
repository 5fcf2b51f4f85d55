"""A bench for engines: each runs on its own thread over real sockets in namespaces of the lab.

    +--------+      +-------------------------+      +----------+
    | sender +------+ in0   engine       out0 +------+ receiver |
    |        |      |   in this process  out1 +------+ receiver1|
    +--------+      +-------------------------+      +----------+

Interface slots of the engine: 0 is in0, 1 is out0, 2 is out1. The egress interfaces also speak IPv6, see speak_ipv6().
"""

from __future__ import annotations

import functools
import mmap
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any, Final

from lab.namespaces import Namespace, wait_until
from lab.topology import RelayLine
from mcrelay import counters
from mcrelay.engines.base import Engine
from mcrelay.engines.reference import ReferenceEngine
from mcrelay.engines.uring import UringEngine
from mcrelay.entries import Entry, Leg, mapped
from mcrelay.limits import RING_MEMORY_DEFAULT, ring_geometry
from mcrelay.net.egress import open_egress
from mcrelay.net.interfaces import Interface
from mcrelay.net.sockets import open_ingress
from mcrelay.ways import Link, Way

IN0: Final = 0
OUT0: Final = 1
OUT1: Final = 2


@dataclass(frozen=True)
class Kind:
    """An engine, and how its packets come in."""

    make: Callable[[memoryview], Engine]
    ring: bool = False
    whole: bool = True  # takes frames that are longer than the MTU
    sleeps: bool = True


ENGINES: Final = {
    "ring": Kind(UringEngine, ring=True),
    "recv": Kind(UringEngine, whole=False),
    "reference": Kind(ReferenceEngine),
}
# The first of them, in no hurry and in a great one.
PACED: Final = {
    "gathering": Kind(functools.partial(UringEngine, latency_budget_us=2000), ring=True),
    "busy": Kind(functools.partial(UringEngine, busy_poll=True), ring=True, sleeps=False),
}
SOCKET_BUFFER: Final = 64 * 1024 * 1024
SO_RCVBUFFORCE: Final = 33
IP_RECVTTL: Final = 12


def entry(group: str, port: int, legs: Iterable[Leg], *, counter: int = 0, **more: Any) -> Entry:
    """`more`: fields of Entry; an id that tells groups and ports apart, unless one is given."""
    more.setdefault("id", hash((group, port)) % 2**64)
    return Entry(mapped(ip_address(group)), port, IN0, counter, tuple(legs), **more)


def leg(address: str, port: int, egress: int, *, ttl: int = 0, counter: int = 0, **more: Any) -> Leg:
    """`more`: fields of Leg."""
    return Leg(mapped(ip_address(address)), port, egress, ttl, counter, **more)


def speak_ipv6(line: RelayLine) -> None:
    """Give the relay's egress interfaces addresses of IPv6, and let it know the hosts behind them, so that nobody has
    to ask for one:

        out0 fe80::1, 2001:db8:0::1/64, to 2001:db8:0::2    out1 fe80::1, 2001:db8:1::1/64, to 2001:db8:1::2
    """
    for number, egress in enumerate(line.egresses):
        relay, name, host = line.relay, egress.interface, egress.receiver.mac(egress.receiver_interface)
        relay.sysctl(f"net.ipv6.conf.{name}.addr_gen_mode", 1)  # no addresses that nobody asked for
        relay.sysctl(f"net.ipv6.conf.{name}.disable_ipv6", 0)
        for address in ("fe80::1/64", f"2001:db8:{number}::1/64"):
            relay.ip("address", "replace", address, "dev", name, "nodad")
        for address in (f"2001:db8:{number}::2", "fe80::2", egress.receiver_address):
            relay.ip("neighbour", "replace", address, "lladdr", host, "dev", name, "nud", "permanent")


class Bench:
    """One engine over one topology. Sockets are the bench's, as they are the supervisor's in the daemon, so that one
    engine may follow another on them."""

    def __init__(
        self,
        line: RelayLine,
        kind: Kind,
        *,
        mtu: int = 1500,
        ring_memory: int = RING_MEMORY_DEFAULT,
        ways: Iterable[Way] = (Way.UDP4,),
    ) -> None:
        self.kind = kind
        self.line = line
        self.mtu = mtu
        self._map = mmap.mmap(-1, counters.PAGE_SIZE)
        self.page = counters.Page(memoryview(self._map))
        self.page.initialise()
        relay = line.relay
        self.ring = ring_geometry(mtu, ring_memory) if kind.ring else None
        self.ingress = relay.call(open_ingress, _interface(relay, line.ingress_interface, mtu), 1, self.ring)[0]
        self.egress: dict[tuple[int, Way], socket.socket] = {}
        for slot, egress in enumerate(line.egresses, OUT0):
            for way in ways:
                interface = _interface(relay, egress.interface, mtu)
                (self.egress[slot, way],) = relay.call(open_egress, interface, way, 1)
        self.engine: Engine | None = None
        self._thread: threading.Thread | None = None
        self._answered: dict[int, int] = {}
        self.failure: BaseException | None = None

    def start(self, *, loopback: bool = False) -> Engine:
        """A new engine, attached to everything."""
        engine = self.start_bare()
        for slot, way in self.egress:
            assert self.answer(self.attach_egress(slot, way)) == 0
        assert self.answer(self.attach_ingress(loopback=loopback)) == 0
        return engine

    def attach_ingress(self, *, loopback: bool = False) -> int:
        assert self.engine is not None
        return self.engine.attach_ingress(IN0, self.ingress.fileno(), self.mtu, self.ring, loopback=loopback)

    def attach_egress(self, slot: int, way: Way = Way.UDP4, mtu: int | None = None) -> int:
        assert self.engine is not None
        return self.engine.attach_egress(slot, way, self.egress[slot, way].fileno(), mtu or self.mtu, self.link(slot))

    def link(self, slot: int) -> Link:
        """Of an egress interface."""
        egress = self.line.egresses[slot - OUT0]
        return Link(
            source4=mapped(IPv4Address(egress.address)),
            source6_link=mapped(IPv6Address("fe80::1")),
            source6=mapped(IPv6Address(f"2001:db8:{slot - OUT0}::1")),
            mac=_mac(self.line.relay, egress.interface),
        )

    def start_bare(self) -> Engine:
        self.engine = self.kind.make(memoryview(self._map))
        self._answered.clear()
        self._thread = threading.Thread(target=self._run, args=(self.engine,), daemon=True)
        self._thread.start()
        return self.engine

    @property
    def thread_id(self) -> int:
        assert self._thread is not None
        assert self._thread.native_id is not None
        return self._thread.native_id

    def _run(self, engine: Engine) -> None:
        try:
            engine.run()
        except BaseException as error:
            self.failure = error

    def answer(self, ticket: int, deadline_s: float = 5.0) -> int:
        """Wait for the answer to one command, as the worker's event loop does."""
        assert self.engine is not None
        deadline = time.monotonic() + deadline_s
        while ticket not in self._answered:
            left = deadline - time.monotonic()
            assert left > 0, f"no answer to command {ticket}; the engine's thread said {self.failure!r}"
            select.select([self.engine.answer_fd], [], [], left)
            self._answered.update(self.engine.answers())
        return self._answered.pop(ticket)

    def rules(self, *entries: Entry) -> None:
        assert self.engine is not None
        assert self.answer(self.engine.set_rules(entries)) == 0

    def stop(self) -> None:
        """Stop and close the engine; its sockets stay. Every slot must be back by then."""
        if self.engine is None:
            return
        self.answer(self.engine.stop())
        assert self._thread is not None
        self._thread.join(5)
        assert not self._thread.is_alive()
        assert self.failure is None, self.failure
        totals = self.page.totals()
        assert totals["pool_free"] == totals["pool_slots"]
        self.engine.close()
        self.engine = None

    def close(self) -> None:
        self.stop()
        self.check_sums()
        for sock in (self.ingress, *self.egress.values()):
            sock.close()

    # What was counted.

    def check_sums(self) -> None:
        totals = self.page.totals()
        assert totals["received"] == totals["forwarded"] + sum(self.page.dropped().values())

    def wait_received(self, packets: int, deadline_s: float = 20.0) -> None:
        """Until so many packets were received and dealt with."""

        def dealt_with() -> bool:
            totals = self.page.totals()
            done = totals["forwarded"] + sum(self.page.dropped().values())
            return totals["received"] >= packets and done == totals["received"]

        wait_until(dealt_with, deadline_s, f"{packets} packets were not received: {self.page.totals()}")


def _interface(namespace: Namespace, name: str, mtu: int) -> Interface:
    return Interface(name, namespace.ifindex(name), mtu, is_up=True, has_ipv4=True)


@functools.cache
def _mac(namespace: Namespace, name: str) -> bytes:
    return bytes.fromhex(namespace.mac(name).replace(":", ""))


class Receiver:
    """A UDP socket in a receiver's namespace, member of a group if the address is one."""

    def __init__(self, namespace: Namespace, address: str, port: int) -> None:
        self.sock = namespace.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, SOCKET_BUFFER)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.sock.setsockopt(socket.IPPROTO_IP, IP_RECVTTL, 1)
        self.sock.bind((address, port))
        if IPv4Address(address).is_multicast:
            request = struct.pack("=4s4si", IPv4Address(address).packed, b"", namespace.ifindex("eth0"))
            self.sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, request)

    def take(self, count: int, deadline_s: float = 20.0) -> list[bytes]:
        """Exactly so many payloads, in order of their arrival."""
        return [payload for payload, _ttl in self.take_with_ttl(count, deadline_s)]

    def take_with_ttl(self, count: int, deadline_s: float = 20.0) -> list[tuple[bytes, int]]:
        taken: list[tuple[bytes, int]] = []
        deadline = time.monotonic() + deadline_s
        while len(taken) < count:
            self.sock.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                payload, control, _flags, _address = self.sock.recvmsg(65536, socket.CMSG_SPACE(4))
            except TimeoutError:
                raise AssertionError(f"{len(taken)} of {count} datagrams arrived") from None
            ttl = next((struct.unpack("=i", d[:4])[0] for _l, kind, d in control if kind == socket.IP_TTL), -1)
            taken.append((payload, ttl))
        return taken

    def poll(self) -> bytes | None:
        """A payload that is there."""
        self.sock.setblocking(False)
        try:
            return self.sock.recv(65536)
        except BlockingIOError:
            return None

    def is_empty(self) -> bool:
        return self.poll() is None


class Sender:
    """A UDP socket in the sender's namespace."""

    def __init__(self, namespace: Namespace, *, ttl: int = 8) -> None:
        self.sock = namespace.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, ttl)

    def send(self, payloads: Iterable[bytes], group: str = "239.1.1.1", port: int = 5000) -> None:
        for payload in payloads:
            self.sock.sendto(payload, (group, port))

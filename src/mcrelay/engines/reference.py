"""Engine `reference`: pure Python, one packet at a time, recvmsg and sendmsg. Slow and obvious.

It is the oracle of the differential tests, and what forwards where the C core or io_uring is missing. It counts as the
C core does; where the two differ, one is wrong. What a packet is, says parsing.py; which entry takes it, lookup.py;
what a copy looks like and how it leaves, exits.py. Here are the commands, the turns, and the counting.
"""

from __future__ import annotations

import errno
import os
import selectors
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import ClassVar, Final

from mcrelay.counters import (
    BATCHES,
    COPIES,
    COPIES_BYTES,
    FORWARDED,
    POOL_FREE,
    POOL_SLOTS,
    REASON,
    RECEIVED,
    RECEIVED_BYTES,
    SENDS,
    Page,
)
from mcrelay.engines.datagrams import Port
from mcrelay.engines.exits import PACKET_VNET_HDR, Exit, destination_of
from mcrelay.engines.headers import ip_length
from mcrelay.engines.lookup import Table
from mcrelay.engines.loops import Loops, Verdict
from mcrelay.engines.parsing import AUXDATA, SOL_PACKET, Drop, Fragmented, Frame, Packet, parse, unwrap
from mcrelay.engines.rates import Rates
from mcrelay.engines.reassembly import Reassembler
from mcrelay.engines.taps import Taps
from mcrelay.entries import UDP, Entry, Leg, LegFlag
from mcrelay.limits import ADDRESSES_MAX, PORTS_MAX, RingGeometry
from mcrelay.ways import Link, Way

PACKET_STATISTICS: Final = 6  # linux/if_packet.h
STATISTICS: Final = struct.Struct("=II")  # struct tpacket_stats: packets, drops
ROOM: Final = 128 + 40 + 65535  # headers before the packet, and the longest one
DATAGRAMS_MAX: Final = 128  # merged into one frame (UDP_MAX_SEGMENTS)

COMMANDS_MAX: Final = 64
PACKETS_PER_TURN: Final = 64  # of one interface, before the others and the commands get their turn
STATISTICS_S: Final = 0.1


Parse = Callable[[int, Frame], Packet | None]  # of an interface slot; None for a fragment that completes no packet


@dataclass(slots=True)
class Ingress:
    interface: int
    fd: int
    sock: socket.socket
    virtio: bool  # frames begin with a struct virtio_net_hdr
    loopback: bool  # local programs send on it from addresses of this host
    statistics: bool = True

    def receive(self, parse: Parse) -> tuple[Packet | None, int]:
        """The next packet and its VLAN, or Drop; OSError if there is none."""
        data, control, _flags, address = self.sock.recvmsg(ROOM, socket.CMSG_SPACE(AUXDATA.size), socket.MSG_DONTWAIT)
        frame = unwrap(memoryview(data), control, address, virtio=self.virtio)
        packet = parse(self.interface, frame)
        if packet and frame.segment and frame.segment < len(packet.payload):
            packet = replace(packet, segment=frame.segment)
        return packet, frame.vlan

    def overruns(self) -> int:
        """Packets that the kernel dropped since this was asked last."""
        if not self.statistics:
            return 0
        try:
            _packets, drops = STATISTICS.unpack(self.sock.getsockopt(SOL_PACKET, PACKET_STATISTICS, STATISTICS.size))
        except OSError:
            self.statistics = False
            return 0
        return int(drops)


@dataclass(slots=True)
class PortIngress:
    """The same of one of an interface's ordinary UDP sockets."""

    interface: int
    fd: int
    port: Port
    loopback: bool

    def receive(self, _parse: Parse) -> tuple[Packet | None, int]:
        datagram = self.port.receive()
        if datagram is None:
            raise Drop("truncated")
        packet = Packet(
            source=datagram.source,
            destination=datagram.destination,
            source_port=datagram.source_port,
            port=datagram.port,
            protocol=UDP,
            ttl=datagram.ttl,
            dscp=datagram.tos >> 2,
            payload=datagram.payload,
            segment=datagram.segment,
        )
        return packet, 0

    def overruns(self) -> int:
        return self.port.new_drops()


class ReferenceEngine:
    name: ClassVar[str] = "reference"

    def __init__(self, page: memoryview) -> None:
        self._page = Page(page)
        self._command_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._answer_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._commands: deque[tuple[int, Callable[[], int]]] = deque()
        self._answers: deque[tuple[int, int]] = deque()
        self._last_ticket = 0
        self._outstanding = 0
        # The engine's thread.
        self._selector = selectors.DefaultSelector()
        self._ingress: dict[int, Ingress] = {}
        self._ports: dict[int, tuple[bool, dict[int, PortIngress]]] = {}  # of an interface: loopback, by number
        self._exits: dict[tuple[int, Way], Exit] = {}
        self._table = Table()
        self._own: frozenset[bytes] = frozenset()
        self._loops = Loops()
        self._rates = Rates()
        self._reassembler = Reassembler()
        self._taps = Taps()
        self._now_ns = 0  # of this turn
        self._stopping = False

    # The command side.

    @property
    def answer_fd(self) -> int:
        return self._answer_fd

    def attach_ingress(
        self, interface: int, fd: int, mtu: int, ring: RingGeometry | None = None, *, loopback: bool = False
    ) -> int:
        if ring is not None:
            raise OSError(errno.EOPNOTSUPP, "engine reference reads no ring")
        return self._submit(lambda: self._do_attach_ingress(interface, fd, loopback=loopback))

    def attach_datagrams(self, interface: int, *, loopback: bool = False) -> int:
        return self._submit(lambda: self._do_attach_datagrams(interface, loopback=loopback))

    def add_socket(self, interface: int, number: int, fd: int) -> int:
        return self._submit(lambda: self._do_add_socket(interface, number, fd))

    def remove_socket(self, interface: int, number: int) -> int:
        return self._submit(lambda: self._do_remove_socket(interface, number))

    def detach_ingress(self, interface: int) -> int:
        return self._submit(lambda: self._do_detach_ingress(interface))

    def attach_egress(self, interface: int, way: Way, fd: int, mtu: int, link: Link) -> int:
        return self._submit(lambda: self._do_attach_egress(interface, way, fd, mtu, link))

    def detach_egress(self, interface: int, way: Way) -> int:
        return self._submit(lambda: self._do_detach_egress(interface, way))

    def set_rules(self, entries: Iterable[Entry]) -> int:
        table = Table(entries)
        return self._submit(lambda: self._do_set_rules(table))

    def set_own_addresses(self, addresses: Iterable[bytes]) -> int:
        own = frozenset(addresses)
        if len(own) > ADDRESSES_MAX or any(len(address) != 16 for address in own):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return self._submit(lambda: self._do_set_own_addresses(own))

    def open_tap(self, rule: int, fd: int, count: int, snap: int) -> int:
        return self._submit(lambda: self._taps.open(rule, fd, count, snap))

    def close_tap(self, fd: int) -> int:
        return self._submit(lambda: self._taps.close(fd))

    def probe(self) -> int:
        return self._submit(lambda: 0)

    def stop(self) -> int:
        return self._submit(self._do_stop)

    def answers(self) -> list[tuple[int, int]]:
        try:
            os.eventfd_read(self._answer_fd)
        except BlockingIOError:
            return []
        taken = []
        while self._answers:
            taken.append(self._answers.popleft())
        self._outstanding -= len(taken)
        return taken

    def close(self) -> None:
        if self._command_fd < 0:
            return
        for ingress in self._ingress.values():
            ingress.sock.detach()
        for _loopback, ports in self._ports.values():
            for port in ports.values():
                port.port.sock.detach()
        for way_out in self._exits.values():
            way_out.sock.detach()
        self._taps.close_all()
        self._selector.close()
        os.close(self._command_fd)
        os.close(self._answer_fd)
        self._command_fd = self._answer_fd = -1
        self._page.release()

    def _submit(self, action: Callable[[], int]) -> int:
        if self._outstanding == COMMANDS_MAX:
            raise BlockingIOError(errno.EBUSY, "too many commands are waiting for the engine")
        self._outstanding += 1
        self._last_ticket += 1
        self._commands.append((self._last_ticket, action))
        os.eventfd_write(self._command_fd, 1)
        return self._last_ticket

    # The engine's thread.

    def run(self) -> None:
        self._selector.register(self._command_fd, selectors.EVENT_READ, None)
        timeout: float | None = None
        while not self._stopping:
            ready = self._selector.select(timeout)
            self._now_ns = time.monotonic_ns()
            came = False
            for key, _events in ready:
                if key.data is None:
                    self._execute_commands()
                elif key.fd in self._selector.get_map():  # not taken out just now
                    came |= self._receive(key.data)
            self._page.count(BATCHES, came)
            for ingress in self._all_ingress():
                self._count_overruns(ingress)
            self._count_lost(self._reassembler.expire(self._now_ns))
            timeout = STATISTICS_S if ready or self._reassembler.waits else None

    def _execute_commands(self) -> None:
        try:
            os.eventfd_read(self._command_fd)
        except BlockingIOError:
            return
        while self._commands:
            ticket, action = self._commands.popleft()
            self._answers.append((ticket, action()))
            os.eventfd_write(self._answer_fd, 1)

    def _all_ingress(self) -> list[Ingress | PortIngress]:
        return [*self._ingress.values(), *(port for _, ports in self._ports.values() for port in ports.values())]

    def _do_attach_datagrams(self, interface: int, *, loopback: bool) -> int:
        if interface in self._ingress or interface in self._ports:
            return errno.EEXIST
        self._ports[interface] = loopback, {}
        self._count_pool()
        return 0

    def _do_add_socket(self, interface: int, number: int, fd: int) -> int:
        if interface not in self._ports:
            return errno.ENOENT
        loopback, ports = self._ports[interface]
        if number in ports or len(ports) == PORTS_MAX:
            return errno.EEXIST if number in ports else errno.ENFILE
        ports[number] = PortIngress(interface, fd, Port(socket.socket(fileno=fd)), loopback)
        self._selector.register(fd, selectors.EVENT_READ, ports[number])
        return 0

    def _do_remove_socket(self, interface: int, number: int) -> int:
        _, ports = self._ports.get(interface, (False, {}))
        ingress = ports.pop(number, None)
        if ingress is None:
            return errno.ENOENT
        self._count_overruns(ingress)
        self._selector.unregister(ingress.fd)
        ingress.port.sock.detach()
        return 0

    def _do_attach_ingress(self, interface: int, fd: int, *, loopback: bool) -> int:
        if interface in self._ingress or interface in self._ports:
            return errno.EEXIST
        sock = socket.socket(fileno=fd)
        ingress = Ingress(interface, fd, sock, bool(sock.getsockopt(SOL_PACKET, PACKET_VNET_HDR)), loopback)
        self._ingress[interface] = ingress
        self._selector.register(fd, selectors.EVENT_READ, ingress)
        self._count_pool()
        return 0

    def _do_detach_ingress(self, interface: int) -> int:
        if interface in self._ports:
            for number in list(self._ports[interface][1]):
                self._do_remove_socket(interface, number)
            del self._ports[interface]
            self._count_pool()
            return 0
        ingress = self._ingress.pop(interface, None)
        if ingress is None:
            return errno.ENOENT
        self._count_overruns(ingress)
        self._count_lost(self._reassembler.forget(interface))
        self._selector.unregister(ingress.fd)
        ingress.sock.detach()
        self._count_pool()
        return 0

    def _do_attach_egress(self, interface: int, way: Way, fd: int, mtu: int, link: Link) -> int:
        self._do_detach_egress(interface, way)
        self._exits[interface, way] = Exit(way, socket.socket(fileno=fd), mtu, link)
        return 0

    def _do_detach_egress(self, interface: int, way: Way) -> int:
        way_out = self._exits.pop((interface, way), None)
        if way_out is None:
            return errno.ENOENT
        way_out.sock.detach()
        return 0

    def _do_set_rules(self, table: Table) -> int:
        self._table = table
        return 0

    def _do_set_own_addresses(self, own: frozenset[bytes]) -> int:
        self._own = own
        return 0

    def _do_stop(self) -> int:
        self._stopping = True
        for interface in [*self._ingress, *self._ports]:
            self._do_detach_ingress(interface)
        return 0

    def _count_pool(self) -> None:
        # One packet at a time: a slot per interface, free whenever anybody looks.
        slots = len(self._ingress) + len(self._ports)
        self._page.set(POOL_SLOTS, slots)
        self._page.set(POOL_FREE, slots)

    def _count_overruns(self, ingress: Ingress | PortIngress) -> None:
        drops = ingress.overruns()
        if drops:
            self._page.count(RECEIVED, drops)
            self._page.count_dropped(REASON["ingress_overrun"], drops)
            self._page.count_interface(ingress.interface, "overruns", drops)

    def _count_lost(self, fragments: int) -> None:
        """Those that no packet came of; the others are counted as the packet that they became."""
        self._page.count(RECEIVED, fragments)
        self._page.count_dropped(REASON["fragment"], fragments)

    def _parse(self, interface: int, frame: Frame) -> Packet | None:
        """None for a fragment with which no packet is complete."""
        try:
            return parse(frame.data, checksum_vouched=frame.vouched)
        except Fragmented as found:
            fragment = found.fragment
        whole, lost = self._reassembler.add(fragment, interface, frame.vlan, self._now_ns)
        self._count_lost(lost)
        return None if whole is None else parse(memoryview(whole), checksum_vouched=False)

    def _receive(self, ingress: Ingress | PortIngress) -> bool:
        """Whether anything came."""
        for number in range(PACKETS_PER_TURN):
            packet, vlan, failure = None, 0, ""
            try:
                packet, vlan = ingress.receive(self._parse)
            except OSError:
                return number > 0  # nothing more, or the interface went down: select again
            except Drop as drop:
                failure = drop.args[0]
            self._page.count_interface(ingress.interface, "frames")
            if packet and len(packet.datagrams) > DATAGRAMS_MAX:
                self._page.count_interface(ingress.interface, "merged")
                failure = "merged"
            if failure:
                self._page.count(RECEIVED)
                self._page.count_dropped(REASON[failure])
                continue
            if packet is None:
                continue  # a fragment of one that is not complete
            datagrams = packet.datagrams
            self._page.count(RECEIVED, len(datagrams))
            self._page.count(RECEIVED_BYTES, len(packet.payload))
            entry = self._table.find(packet, ingress.interface, vlan)
            if entry is None:
                self._page.count_dropped(REASON["vlan_tagged" if vlan else "no_rule"], len(datagrams))
                continue
            self._taps.take(entry.counter, len(entry.legs), ingress.interface, packet, vlan)
            if self._admit(ingress, entry, packet, len(datagrams)):
                self._forward(entry, packet)
        return True

    def _admit(self, ingress: Ingress | PortIngress, entry: Entry, packet: Packet, count: int) -> bool:
        """Whether a packet that matched a rule is to be forwarded at all; what is not counts for the rule in a word of
        its own."""
        if packet.source in self._own and not ingress.loopback:
            self._page.count_dropped(REASON["own"], count)
            self._page.count_loop(entry.counter, own=count)
            self._taps.settle(REASON["own"])
            return False
        watch = self._loops.watch(entry.counter, entry.id)
        verdict = watch.judge(packet.payload, packet.source, self._now_ns)
        if verdict is Verdict.NONE:
            return True
        if verdict is Verdict.ACQUITTED:
            self._page.end_suspension(entry.counter, watch.suspended_until_ns)
            return True
        if verdict is Verdict.FOUND:
            self._page.suspend_rule(entry.counter, watch.suspended_until_ns)
        self._page.count_dropped(REASON["loop"], count)
        self._page.count_loop(entry.counter, looped=count)
        self._taps.settle(REASON["loop"])
        return False

    def _forward(self, entry: Entry, packet: Packet) -> None:
        """Datagrams that came merged count as forwarded or not together, like in the C core."""
        count = len(packet.datagrams)
        self._page.count_rule(entry.counter, packets=count, size=len(packet.payload))
        copies = 0
        reasons = []
        for leg in entry.legs:
            refusal, way_out = self._way_out(entry, leg, packet)
            for payload in packet.datagrams:
                failure = refusal if way_out is None else way_out.send(leg, packet, payload)
                if failure is None:
                    copies += 1
                    self._page.count_output(leg.counter, len(payload))
                    self._page.count(COPIES_BYTES, len(payload))
                else:
                    reasons.append(REASON[failure])
                    self._page.count_output_dropped(leg.counter, reasons[-1])
                    self._taps.drop(leg.counter, reasons[-1])
        if copies:
            self._page.count(COPIES, copies)
            self._page.count(SENDS, copies)
            self._page.count(FORWARDED, count)
            self._page.count_rule(entry.counter, forwarded=count)
        else:
            self._page.count_dropped(min(reasons), count)
            self._page.count_rule(entry.counter, dropped=count)
        self._taps.settle(0 if copies else min(reasons))

    def _way_out(self, entry: Entry, leg: Leg, packet: Packet) -> tuple[str | None, Exit | None]:
        """The leg's, or the reason why the packet does not leave by it."""
        if leg.flags & LegFlag.PAUSED:
            return "paused", None
        if leg.flags & LegFlag.SPLIT_HORIZON:
            return "split_horizon", None
        way_out = self._exits.get((leg.egress, leg.way))
        if way_out is None:
            return "egress_unreachable", None
        if refusal := way_out.refusal(leg, packet):
            return refusal, None
        destination = destination_of(leg, packet)
        lengths = [ip_length(destination, packet.protocol, len(payload)) for payload in packet.datagrams]
        if not self._rates.permits(entry.id, leg, lengths, self._now_ns):
            return "egress_limited", None
        return None, way_out

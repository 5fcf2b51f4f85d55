"""Engine `reference`: pure Python, one packet at a time, recvmsg and sendmsg. Slow and obvious.

It is the oracle of the differential tests, and what forwards where the C core or io_uring is missing. It counts as the
C core does; where the two differ, one is wrong. The parser states the checks of native/packet.c in their order.
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
from mcrelay.engines.loops import Loops, Verdict
from mcrelay.limits import ADDRESSES_MAX, RingGeometry
from mcrelay.rules import Entry, Leg

# linux/if_packet.h
PACKET_OTHERHOST: Final = 3
PACKET_STATISTICS: Final = 6
PACKET_AUXDATA: Final = 8
PACKET_VNET_HDR: Final = 15
SOL_PACKET: Final = 263
TP_STATUS_CSUMNOTREADY: Final = 1 << 3
TP_STATUS_VLAN_VALID: Final = 1 << 4
TP_STATUS_CSUM_VALID: Final = 1 << 7
AUXDATA: Final = struct.Struct("=IIIHHHH")  # struct tpacket_auxdata: status first, network header's offset fifth
VIRTIO: Final = struct.Struct("=BBHHHH")  # struct virtio_net_hdr: kind second, segment size fourth
VIRTIO_NET_HDR_GSO_UDP_L4: Final = 5
ROOM: Final = 128 + 65535  # headers before the packet, and the longest one
DATAGRAMS_MAX: Final = 128  # merged into one frame (UDP_MAX_SEGMENTS)
STATISTICS: Final = struct.Struct("=II")  # struct tpacket_stats: packets, drops

COMMANDS_MAX: Final = 64
PACKETS_PER_TURN: Final = 64  # of one interface, before the others and the commands get their turn
STATISTICS_S: Final = 0.1

SEND_ERRORS: Final = {
    errno.EAGAIN: "egress_full",
    errno.ENOBUFS: "egress_full",
    errno.ENOMEM: "egress_full",
    errno.ENETUNREACH: "egress_unreachable",
    errno.EHOSTUNREACH: "egress_unreachable",
    errno.ENETDOWN: "egress_unreachable",
    errno.EHOSTDOWN: "egress_unreachable",
    errno.EADDRNOTAVAIL: "egress_unreachable",
    errno.ENODEV: "egress_unreachable",
    errno.ENXIO: "egress_unreachable",
    errno.EPERM: "egress_refused",
    errno.EACCES: "egress_refused",
}


@dataclass(frozen=True, slots=True)
class Packet:
    source: bytes  # 16 bytes, like all addresses
    destination: bytes
    port: int
    ttl: int
    payload: memoryview
    segment: int = 0  # length of each of several datagrams in the payload but the last; 0: it is one

    @property
    def datagrams(self) -> list[memoryview]:
        if not self.segment:
            return [self.payload]
        return [self.payload[at : at + self.segment] for at in range(0, len(self.payload), self.segment)]


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame from its network header on, and what the kernel said of it."""

    data: memoryview
    segment: int = 0
    vouched: bool = False  # for the checksum


class Drop(Exception):
    """The packet is not forwarded; the argument is the reason's name."""


def parse(data: memoryview, *, checksum_vouched: bool) -> Packet:
    """An IPv4 UDP packet (RFC 791, RFC 768) from its network header on, or Drop."""
    if len(data) < 20:
        raise Drop("truncated")
    if data[0] >> 4 != 4:
        raise Drop("not_ipv4")
    header_length = (data[0] & 15) * 4
    total_length = int.from_bytes(data[2:4], "big")
    if header_length < 20 or total_length < header_length:
        raise Drop("bad_ip_header")
    if total_length > len(data):
        raise Drop("truncated")
    if _checksum(data[:header_length]) != 0xFFFF:
        raise Drop("bad_ip_checksum")
    if int.from_bytes(data[6:8], "big") & 0x3FFF:
        raise Drop("fragment")
    if data[9] != socket.IPPROTO_UDP:
        raise Drop("not_udp")
    udp = data[header_length:total_length]
    if len(udp) < 8:
        raise Drop("truncated")
    _source_port, port, udp_length, checksum = struct.unpack_from("!HHHH", udp)
    if not 8 <= udp_length <= len(udp):
        raise Drop("bad_udp_length")
    udp = udp[:udp_length]
    if checksum and not checksum_vouched:
        pseudo_header = bytes(data[12:20]) + struct.pack("!BBH", 0, socket.IPPROTO_UDP, udp_length)
        if _checksum(pseudo_header + bytes(udp)) != 0xFFFF:
            raise Drop("bad_udp_checksum")
    prefix = b"\0" * 10 + b"\xff\xff"
    return Packet(prefix + bytes(data[12:16]), prefix + bytes(data[16:20]), port, data[8], udp[8:])


def _open(data: memoryview, control: list[tuple[int, int, bytes]], address: object, *, virtio: bool) -> Frame:
    """What recvmsg gave, taken apart; Drop for what is not ours to forward."""
    segment = status = network = 0
    if virtio:
        _flags, kind, _header_length, size, _start, _offset = VIRTIO.unpack_from(data)
        segment = size if kind == VIRTIO_NET_HDR_GSO_UDP_L4 else 0
        data = data[VIRTIO.size :]
    for level, message, payload in control:
        if level == SOL_PACKET and message == PACKET_AUXDATA and len(payload) >= AUXDATA.size:
            status, _length, _captured, _link, network, _tag, _tag_protocol = AUXDATA.unpack_from(payload)
    if status & TP_STATUS_VLAN_VALID:
        raise Drop("vlan_tagged")
    if isinstance(address, tuple) and len(address) >= 3 and address[2] == PACKET_OTHERHOST:
        raise Drop("other_host")
    return Frame(data[network:], segment, bool(status & (TP_STATUS_CSUM_VALID | TP_STATUS_CSUMNOTREADY)))


def _checksum(data: memoryview | bytes) -> int:
    """The ones' complement sum of RFC 1071, 0xffff where it includes a right checksum."""
    padded = bytes(data) + b"\0" * (len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(padded) // 2}H", padded))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


@dataclass(slots=True)
class Ingress:
    interface: int
    fd: int
    sock: socket.socket
    virtio: bool  # frames begin with a struct virtio_net_hdr
    loopback: bool  # local programs send on it from addresses of this host
    statistics: bool = True


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
        self._egress: dict[int, socket.socket] = {}
        self._rules: dict[tuple[bytes, int, int], Entry] = {}
        self._own: frozenset[bytes] = frozenset()
        self._loops = Loops()
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

    def detach_ingress(self, interface: int) -> int:
        return self._submit(lambda: self._do_detach_ingress(interface))

    def attach_egress(self, interface: int, fd: int, mtu: int) -> int:
        return self._submit(lambda: self._do_attach_egress(interface, fd))

    def detach_egress(self, interface: int) -> int:
        return self._submit(lambda: self._do_detach_egress(interface))

    def set_rules(self, entries: Iterable[Entry]) -> int:
        rules = {(entry.group, entry.port, entry.ingress): entry for entry in entries}
        return self._submit(lambda: self._do_set_rules(rules))

    def set_own_addresses(self, addresses: Iterable[bytes]) -> int:
        own = frozenset(addresses)
        if len(own) > ADDRESSES_MAX or any(len(address) != 16 for address in own):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return self._submit(lambda: self._do_set_own_addresses(own))

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
        for sock in self._egress.values():
            sock.detach()
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
            self._page.count(BATCHES)
            for key, _events in ready:
                if key.data is None:
                    self._execute_commands()
                elif key.data.interface in self._ingress:
                    self._receive(key.data)
            for ingress in self._ingress.values():
                self._count_overruns(ingress)
            timeout = STATISTICS_S if ready else None

    def _execute_commands(self) -> None:
        try:
            os.eventfd_read(self._command_fd)
        except BlockingIOError:
            return
        while self._commands:
            ticket, action = self._commands.popleft()
            self._answers.append((ticket, action()))
            os.eventfd_write(self._answer_fd, 1)

    def _do_attach_ingress(self, interface: int, fd: int, *, loopback: bool) -> int:
        if interface in self._ingress:
            return errno.EEXIST
        sock = socket.socket(fileno=fd)
        ingress = Ingress(interface, fd, sock, bool(sock.getsockopt(SOL_PACKET, PACKET_VNET_HDR)), loopback)
        self._ingress[interface] = ingress
        self._selector.register(fd, selectors.EVENT_READ, ingress)
        self._count_pool()
        return 0

    def _do_detach_ingress(self, interface: int) -> int:
        ingress = self._ingress.pop(interface, None)
        if ingress is None:
            return errno.ENOENT
        self._count_overruns(ingress)
        self._selector.unregister(ingress.fd)
        ingress.sock.detach()
        self._count_pool()
        return 0

    def _do_attach_egress(self, interface: int, fd: int) -> int:
        self._do_detach_egress(interface)
        self._egress[interface] = socket.socket(fileno=fd)
        return 0

    def _do_detach_egress(self, interface: int) -> int:
        sock = self._egress.pop(interface, None)
        if sock is None:
            return errno.ENOENT
        sock.detach()
        return 0

    def _do_set_rules(self, rules: dict[tuple[bytes, int, int], Entry]) -> int:
        self._rules = rules
        return 0

    def _do_set_own_addresses(self, own: frozenset[bytes]) -> int:
        self._own = own
        return 0

    def _do_stop(self) -> int:
        self._stopping = True
        for interface in list(self._ingress):
            self._do_detach_ingress(interface)
        return 0

    def _count_pool(self) -> None:
        # One packet at a time: a slot per interface, free whenever anybody looks.
        self._page.set(POOL_SLOTS, len(self._ingress))
        self._page.set(POOL_FREE, len(self._ingress))

    def _count_overruns(self, ingress: Ingress) -> None:
        if not ingress.statistics:
            return
        try:
            _packets, drops = STATISTICS.unpack(ingress.sock.getsockopt(SOL_PACKET, PACKET_STATISTICS, STATISTICS.size))
        except OSError:
            ingress.statistics = False
            return
        if drops:
            self._page.count(RECEIVED, drops)
            self._page.count_dropped(REASON["ingress_overrun"], drops)
            self._page.count_interface(ingress.interface, "overruns", drops)

    def _receive(self, ingress: Ingress) -> None:
        for _ in range(PACKETS_PER_TURN):
            try:
                data, control, _flags, address = ingress.sock.recvmsg(
                    ROOM, socket.CMSG_SPACE(AUXDATA.size), socket.MSG_DONTWAIT
                )
            except OSError:
                return  # nothing there, or the interface went down: select again
            self._page.count(RECEIVED)
            self._page.count_interface(ingress.interface, "frames")
            try:
                frame = _open(memoryview(data), control, address, virtio=ingress.virtio)
                packet = parse(frame.data, checksum_vouched=frame.vouched)
                if frame.segment and frame.segment < len(packet.payload):
                    packet = replace(packet, segment=frame.segment)
                datagrams = packet.datagrams
                if len(datagrams) > DATAGRAMS_MAX:
                    self._page.count_interface(ingress.interface, "merged")
                    raise Drop("merged")
                self._page.count(RECEIVED, len(datagrams) - 1)
                self._page.count(RECEIVED_BYTES, len(packet.payload))
                entry = self._rules.get((packet.destination, packet.port, ingress.interface))
            except Drop as drop:
                self._page.count_dropped(REASON[drop.args[0]])
                continue
            if entry is None:
                self._page.count_dropped(REASON["no_rule"], len(datagrams))
            elif self._admit(ingress, entry, packet, len(datagrams)):
                self._forward(entry, packet, datagrams)

    def _admit(self, ingress: Ingress, entry: Entry, packet: Packet, count: int) -> bool:
        """Whether a packet that matched a rule is to be forwarded at all; what is not counts for the rule in a word of
        its own."""
        if packet.source in self._own and not ingress.loopback:
            self._page.count_dropped(REASON["own"], count)
            self._page.count_loop(entry.counter, own=count)
            return False
        watch = self._loops.watch(entry.counter, (entry.group, entry.port, entry.ingress))
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
        return False

    def _forward(self, entry: Entry, packet: Packet, datagrams: list[memoryview]) -> None:
        """Datagrams that came merged count as forwarded or not together, like in the C core."""
        count = len(datagrams)
        self._page.count_rule(entry.counter, packets=count, size=len(packet.payload))
        copies = 0
        reasons = []
        for leg in entry.legs:
            for payload in datagrams:
                failure = self._send(leg, payload, packet.ttl)
                if failure is None:
                    copies += 1
                    self._page.count_output(leg.counter, len(payload))
                    self._page.count(COPIES_BYTES, len(payload))
                else:
                    reasons.append(REASON[failure])
                    self._page.count_output_dropped(leg.counter, reasons[-1])
        if copies:
            self._page.count(COPIES, copies)
            self._page.count(SENDS, copies)
            self._page.count(FORWARDED, count)
            self._page.count_rule(entry.counter, forwarded=count)
        else:
            self._page.count_dropped(min(reasons), count)
            self._page.count_rule(entry.counter, dropped=count)

    def _send(self, leg: Leg, payload: memoryview, came_with_ttl: int) -> str | None:
        """The reason if the copy did not leave."""
        sock = self._egress.get(leg.egress)
        if sock is None:
            return "egress_unreachable"
        ttl = leg.ttl or max(1, came_with_ttl - 1)
        try:
            sock.sendmsg(
                [payload],
                [(socket.IPPROTO_IP, socket.IP_TTL, struct.pack("=i", ttl))],
                socket.MSG_DONTWAIT,
                (socket.inet_ntoa(leg.address[12:]), leg.port),
            )
        except OSError as error:
            return SEND_ERRORS.get(error.errno or 0, "egress_error")
        return None

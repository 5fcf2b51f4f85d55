"""Taps of engine `reference`: native/tap.c in plain Python, for an engine that has one packet in hand at a time.

Owns what is known of the open taps and of the packet in hand; the sockets are borrowed. See native/tap.h.
"""

from __future__ import annotations

import errno
import socket
import time
from dataclasses import dataclass

from mcrelay.engines.headers import Headers
from mcrelay.engines.parsing import Packet
from mcrelay.limits import RULES_MAX, TAP_BYTES_MAX, TAPS_MAX
from mcrelay.tap import Record

FULL = (errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM, errno.EMSGSIZE)


@dataclass(slots=True)
class Tap:
    sock: socket.socket
    rule: int  # counter
    left: int  # records
    snap: int  # bytes of a packet
    lost: int = 0


class Taps:
    def __init__(self) -> None:
        self._taps: dict[int, Tap] = {}  # by descriptor
        self._record: Record | None = None  # of the packet in hand
        self._data = memoryview(b"")
        self._watching: list[Tap] = []

    def open(self, rule: int, fd: int, count: int, snap: int) -> int:
        if fd < 0 or fd in self._taps or not 0 <= rule < RULES_MAX or count < 1 or snap > TAP_BYTES_MAX:
            return errno.EINVAL
        if len(self._taps) == TAPS_MAX:
            return errno.EBUSY
        self._taps[fd] = Tap(socket.socket(fileno=fd), rule, count, snap)
        return 0

    def close(self, fd: int) -> int:
        tap = self._taps.pop(fd, None)
        if tap is None:
            return errno.ENOENT
        tap.sock.detach()
        return 0

    def close_all(self) -> None:
        for fd in list(self._taps):
            self.close(fd)

    def take(self, rule: int, outputs: int, interface: int, packet: Packet, vlan: int) -> None:
        """A packet matched a rule."""
        self._watching = [tap for tap in self._taps.values() if tap.rule == rule and tap.left]
        if not self._watching:
            return
        self._data = _whole(packet)
        self._record = Record(time.time_ns(), len(self._data), interface, outputs, len(packet.datagrams), vlan)

    def drop(self, output: int, reason: int) -> None:
        """A copy of one of its datagrams did not leave by an output."""
        if self._record is None:
            return
        self._record.copies -= 1
        if all(known != output for known, _reason in self._record.dropped):
            self._record.dropped.append((output, reason))

    def settle(self, reason: int) -> None:
        """All is done; 0 if a copy left."""
        record, self._record = self._record, None
        if record is None:
            return
        record.reason = reason
        record.copies = 0 if reason else record.copies + record.datagrams * record.outputs
        for tap in self._watching:
            record.lost = tap.lost
            try:
                tap.sock.sendmsg([record.pack(), self._data[: tap.snap]], [], socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
                tap.left -= 1
            except OSError as error:
                if error.errno in FULL:
                    tap.lost += 1
                else:
                    tap.left = 0  # nobody is there


def _whole(packet: Packet) -> memoryview:
    """From the IP header on, without padding behind it; where there are no headers any more, as they must have been."""
    data = packet.whole
    if data is None:
        headers = Headers(
            packet.source,
            packet.destination,
            packet.source_port,
            packet.port,
            packet.protocol,
            packet.ttl,
            packet.dscp,
            identification=0,
        )
        (written,) = headers.packets(packet.payload, mtu=TAP_BYTES_MAX)
        return memoryview(written)
    length = int.from_bytes(data[2:4], "big") if data[0] >> 4 == 4 else 40 + int.from_bytes(data[4:6], "big")
    return data[:length]

"""What a test datagram looks like, and the account of those that arrived: bytes and times in, a report out.

    0       4       8               16              24                      size
    +-------+-------+---------------+---------------+-----------------------+
    | magic | flow  | sequence      | sent_ns       | padding               |
    +-------+-------+---------------+---------------+-----------------------+

All numbers are big-endian. Sequences count from 0 in each flow. `sent_ns` is CLOCK_MONOTONIC, which all
network namespaces of a machine share, so one-way latency needs no clock synchronisation.

The padding is a window into one fixed pseudo-random pattern, shifted by `(flow + sequence) % 61`. The
receiver compares it in place with a single memcmp. A flipped bit in flow or sequence changes the sum by a
power of two, which 61, an odd prime, never divides: the shift changes too and the damage is seen. So every
byte is covered at the price of one modulo per datagram, but for the timestamp, whose damage is noticed only
when the latency becomes absurd.

The account is exact and its memory bounded: one bit per sequence for duplicates, buckets for latencies. It
must cost about a microsecond per datagram, since it runs in the receiver's loop.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import asdict, dataclass
from typing import Any

MAGIC = 0x6D637231  # "mcr1"
HEADER = struct.Struct("!IIQQ")  # magic, flow, sequence, sent_ns
STAMP = struct.Struct("!IQQ")  # the part that changes from datagram to datagram
STAMP_OFFSET = 4

SIZE_MIN = HEADER.size  # 24
SIZE_MAX = 65507  # 65535 less the IPv4 and UDP headers

SHIFTS = 61
PATTERN = memoryview(hashlib.shake_256(b"mcrelay test traffic").digest(SIZE_MAX + SHIFTS))

FLOWS_MAX = 1000  # a socket each, and 1024 open files is the usual limit
SEQUENCES_MAX = 1 << 30  # per flow; 128 MiB of bits, three hours at 100,000 datagrams/s
LEAP_MAX = 1 << 24  # no outage is this long: such a sequence is damage that escaped the padding check
BITS_STEP = 1 << 12  # bytes by which the duplicate bits grow

# Latency: buckets of 1.024 us up to 67 ms, then of 1.05 ms up to 69 s. Beyond that the stamp was damaged.
FINE_SHIFT = 10
COARSE_SHIFT = 20
BUCKETS = 1 << 16
FINE_LIMIT_NS = BUCKETS << FINE_SHIFT
COARSE_LIMIT_NS = BUCKETS << COARSE_SHIFT


def padding(shift: int, size: int) -> memoryview:
    """The bytes after the header of a datagram of `size` bytes; `shift` is `(flow + sequence) % SHIFTS`."""
    return PATTERN[shift : shift + size - HEADER.size]


def payload(flow: int, sequence: int, size: int, sent_ns: int) -> bytes:
    """One whole datagram, for tests; the sender's loop stamps prepared buffers instead."""
    return HEADER.pack(MAGIC, flow, sequence, sent_ns) + padding((flow + sequence) % SHIFTS, size)


@dataclass(frozen=True, kw_only=True)
class ReceiveReport:
    """What became of the datagrams. `received + lost == expected` unless more arrived than were expected."""

    received: int  # distinct and intact; everything below is on top of it, `reordered` is part of it
    expected: int  # over all flows
    lost: int
    reordered: int  # arrived after one with a higher sequence (RFC 4737, section 3)
    duplicated: int  # further intact copies
    corrupted: int  # ours, but not as sent
    foreign: int  # without our magic
    overrun: int  # dropped by the kernel as our own socket was full: our fault, not the network's
    flows: int
    seconds: float  # from the first arrival to the last
    rate: float  # received per second
    latency_p50_us: float | None
    latency_p99_us: float | None
    latency_max_us: float | None
    ended: str  # why: "count", "idle", "deadline" or "stopped"

    @property
    def clean(self) -> bool:
        """Everything arrived, once, intact and in order, and something did."""
        faults = self.lost + self.reordered + self.duplicated + self.corrupted + self.foreign
        return self.received > 0 and faults == 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class FlowAccount:
    """Of one flow: which sequences were seen."""

    __slots__ = ("next_sequence", "seen")

    def __init__(self) -> None:
        self.next_sequence = 0  # one more than the highest seen
        self.seen = bytearray(BITS_STEP)  # one bit per sequence


class Account:
    """The account of all arrivals at one receiver."""

    def __init__(self) -> None:
        self.received = 0
        self.reordered = 0
        self.duplicated = 0
        self.corrupted = 0
        self.foreign = 0
        self.first_ns: int | None = None  # arrival of the first datagram with our magic
        self.last_ns = 0
        self.latency_max_ns = 0
        self._flows: dict[int, FlowAccount] = {}
        self._fine = [0] * BUCKETS
        self._coarse = [0] * BUCKETS

    def record(self, buffer: bytearray, length: int, now_ns: int) -> None:
        """Account for one datagram: the first `length` bytes of `buffer`, which arrived at `now_ns`."""
        if length < SIZE_MIN:
            self.foreign += 1
            return
        magic, flow, sequence, sent_ns = HEADER.unpack_from(buffer)
        if magic != MAGIC:
            self.foreign += 1
            return
        if self.first_ns is None:
            self.first_ns = now_ns
        self.last_ns = now_ns

        shift = (flow + sequence) % SHIFTS
        if not buffer.startswith(PATTERN[shift : shift + length - SIZE_MIN], SIZE_MIN, length):
            self.corrupted += 1
            return
        latency_ns = now_ns - sent_ns
        if not 0 <= latency_ns < COARSE_LIMIT_NS:
            self.corrupted += 1
            return
        account = self._flows.get(flow)
        if account is None:
            if len(self._flows) == FLOWS_MAX or sequence >= LEAP_MAX:
                self.corrupted += 1
                return
            account = self._flows[flow] = FlowAccount()

        position = sequence >> 3
        bit = 1 << (sequence & 7)
        if sequence >= account.next_sequence:
            if sequence - account.next_sequence >= LEAP_MAX or sequence >= SEQUENCES_MAX:
                self.corrupted += 1
                return
            account.next_sequence = sequence + 1
            missing = position + 1 - len(account.seen)
            if missing > 0:
                account.seen.extend(bytes(missing + BITS_STEP))
        elif account.seen[position] & bit:
            self.duplicated += 1
            return
        else:
            self.reordered += 1
        account.seen[position] |= bit
        self.received += 1

        if latency_ns < FINE_LIMIT_NS:
            self._fine[latency_ns >> FINE_SHIFT] += 1
        else:
            self._coarse[latency_ns >> COARSE_SHIFT] += 1
        if latency_ns > self.latency_max_ns:
            self.latency_max_ns = latency_ns

    def latency_us(self, fraction: float) -> float | None:
        """The latency that `fraction` of the datagrams did not exceed, as the middle of its bucket."""
        if self.received == 0:
            return None
        rank = max(1, round(fraction * self.received))
        for buckets, shift in ((self._fine, FINE_SHIFT), (self._coarse, COARSE_SHIFT)):
            for index, count in enumerate(buckets):
                rank -= count
                if rank <= 0:
                    return (index + 0.5) * (1 << shift) / 1e3
        raise AssertionError("every received datagram is in a bucket")

    def report(self, *, expected: int | None = None, overrun: int = 0, ended: str = "stopped") -> ReceiveReport:
        """Sum up. Without `expected`, what came before the highest sequence of each flow was expected."""
        if expected is None:
            expected = sum(account.next_sequence for account in self._flows.values())
        seconds = (self.last_ns - self.first_ns) / 1e9 if self.first_ns is not None else 0.0
        return ReceiveReport(
            received=self.received,
            expected=expected,
            lost=max(0, expected - self.received),
            reordered=self.reordered,
            duplicated=self.duplicated,
            corrupted=self.corrupted,
            foreign=self.foreign,
            overrun=overrun,
            flows=len(self._flows),
            seconds=round(seconds, 6),
            # n arrivals span n - 1 intervals.
            rate=round((self.received - 1) / seconds, 1) if seconds > 0 else 0.0,
            latency_p50_us=self.latency_us(0.50),
            latency_p99_us=self.latency_us(0.99),
            latency_max_us=self.latency_max_ns / 1e3 if self.received else None,
            ended=ended,
        )

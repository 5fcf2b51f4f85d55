"""What a datagram of `mcrelay send` looks like, said once more, independently of the C core: docs/traffic.md in code.

For tests that make their own datagrams, good ones and bad ones, and for those that look at what was sent.
"""

from __future__ import annotations

import itertools
import struct
import time

MAGIC = 0x6D637231  # "mcr1"
HEADER = struct.Struct("!IIQQ")  # magic, flow, sequence, sent_ns
RTP = struct.Struct("!BBHII")
SHIFTS = 61
SIZE_MAX = 65507


def _pattern() -> bytes:
    states = itertools.accumulate(
        range(SIZE_MAX + SHIFTS), lambda state, _: (state * 1664525 + 1013904223) % 2**32, initial=MAGIC
    )
    return bytes(state >> 24 for state in itertools.islice(states, 1, None))


PATTERN = _pattern()


def padding(flow: int, sequence: int, sent_ns: int, length: int) -> bytes:
    """The bytes after the header."""
    shift = (flow + sequence + sent_ns) % SHIFTS
    return PATTERN[shift : shift + length]


def payload(flow: int, sequence: int, size: int, sent_ns: int | None = None, *, rtp: bool = False) -> bytes:
    """One whole datagram of `size` bytes, by default sent now."""
    sent_ns = time.time_ns() if sent_ns is None else sent_ns
    before = rtp_header(sequence, sent_ns * 9 // 100_000, flow) if rtp else b""
    body = HEADER.pack(MAGIC, flow, sequence, sent_ns)
    return before + body + padding(flow, sequence, sent_ns, size - len(before) - len(body))


def rtp_header(sequence: int, timestamp: int, ssrc: int, payload_type: int = 96) -> bytes:
    return RTP.pack(0x80, payload_type, sequence % 2**16, timestamp % 2**32, ssrc)


def parse(datagram: bytes) -> tuple[int, int, int]:
    """Flow, sequence and sent_ns of an intact datagram; ValueError for any other."""
    magic, flow, sequence, sent_ns = HEADER.unpack_from(datagram)
    if datagram != payload(flow, sequence, len(datagram), sent_ns) or magic != MAGIC:
        raise ValueError(f"damaged: flow {flow}, sequence {sequence}")
    return flow, sequence, sent_ns

"""Limits: the bounds that more than one module relies on, and why each has its size.

Those that the C core has, too, stand in native/counters.h and native/table.h under the same meaning; a test compares
them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

RULES_MAX: Final = 16384  # counters per worker: 10,000 rules and room for those being replaced
OUTPUTS_MAX: Final = 65536  # likewise, with several outputs to a rule
FILES_MAX: Final = 128  # of one configuration; their descriptors fit one message
RULE_OUTPUTS_MAX: Final = 1024  # of one rule; its text still fits one frame
INTERFACES_MAX: Final = 64  # in use at once; a worker's receive slots are a few MiB for each
ADDRESSES_MAX: Final = 4096  # of this host, that a worker knows; their texts fit one frame
PORTS_MAX: Final = 1024  # in rootless mode, of all interfaces together, a socket each; a worker's descriptors
WORKERS_MAX: Final = 64  # one per core; the control plane gets a counter page of each in one message
REQUESTS_MAX: Final = 32  # of one client, under way at once
CLIENTS_MAX: Final = 2048  # connected at once: 1,000 that watch, and as many that come and go; 8 MiB when idle
SCRAPERS_MAX: Final = 64  # at once; one that asks for metrics takes milliseconds

TAPS_MAX: Final = 4  # open at once in one worker: each costs a send for each of its packets
TAP_BYTES_MAX: Final = 65575  # of a tapped packet: the longest IPv6 packet but for jumbograms
TAP_BYTES_DEFAULT: Final = 128  # headers and the beginning of the payload

LATENCY_BUDGET_US_MAX: Final = 10_000  # beyond that a ring of the usual size overflows at a million packets/s
LATENCY_BUDGET_US_DEFAULT: Final = 50  # docs/benchmarks.md has the measurement

MTU_MAX: Final = 65536  # the loopback's; what is longer cannot be one IPv4 packet

# The ring of a packet socket (struct tpacket_req). A block is a piece of contiguous kernel memory, and no frame crosses
# from one to the next.
RING_BLOCK_SIZE: Final = 256 * 1024
# Before the packet stand TPACKET_V2's header, the link-layer address and Ethernet's header, together aligned to 16
# bytes; RING_RESERVE bytes, so that the packet is aligned, too; and the virtio header (packet(7)). A longer link-layer
# header only makes the kernel hand over the longest packets another way (native/whole.h).
RING_RESERVE: Final = 6
RING_HEAD: Final = 80 + RING_RESERVE + 10
RING_ALIGNMENT: Final = 64  # a frame's header is alone in its cache line
RING_MEMORY_DEFAULT: Final = 16 * 1024 * 1024  # per worker and interface: 100 ms of 100,000 packets/s of 1500 bytes


@dataclass(frozen=True, slots=True)
class RingGeometry:
    """How a ring is laid out, in bytes."""

    block_size: int
    blocks: int
    frame_size: int


def ring_geometry(mtu: int, memory: int = RING_MEMORY_DEFAULT) -> RingGeometry:
    """A ring of about `memory` bytes, one block at least, for packets of up to `mtu` bytes."""
    frame_size = -(-(RING_HEAD + mtu) // RING_ALIGNMENT) * RING_ALIGNMENT
    return RingGeometry(RING_BLOCK_SIZE, max(1, memory // RING_BLOCK_SIZE), frame_size)

"""Ways out: the kinds of socket by which a copy can leave an interface, and what an engine must know of the interface.

An output has one way, which its text decides:

    udp4, udp6      a UDP socket: the kernel chooses the source port, and the source address unless one is set
    loop4, loop6    the same, and receivers on this host hear it, too (IP_MULTICAST_LOOP is a socket's, not a packet's)
    frame           a packet socket, for which we write all headers: multicast and broadcast whose source address or
                    port are given or kept, and ESP; runs of datagrams leave as one frame, which the kernel cuts apart
                    (PACKET_VNET_HDR, Linux 6.2; before, one by one)
    raw4, raw6      a raw socket, for which we write the IP header: the same for unicast, which the kernel routes

Pure. native/ways.h states the same numbers and layout, and a test compares them.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Final, Literal

Direction = Literal["ingress", "udp4", "udp6", "loop4", "loop6", "frame", "raw4", "raw6"]


class Way(enum.IntEnum):
    UDP4 = 0
    UDP6 = 1
    LOOP4 = 2
    LOOP6 = 3
    FRAME = 4
    RAW4 = 5
    RAW6 = 6

    @property
    def direction(self) -> Direction:
        return _DIRECTIONS[self]


_DIRECTIONS: Final[dict[Way, Direction]] = {
    Way.UDP4: "udp4",
    Way.UDP6: "udp6",
    Way.LOOP4: "loop4",
    Way.LOOP6: "loop6",
    Way.FRAME: "frame",
    Way.RAW4: "raw4",
    Way.RAW6: "raw6",
}
WAYS: Final = {direction: way for way, direction in _DIRECTIONS.items()}
DIRECTIONS: Final[tuple[Direction, ...]] = (*WAYS, "ingress")  # egress first: what comes in needs it

ANY: Final = bytes(16)  # no address
LINK_RECORD: Final = struct.Struct("=16s16s16s6sBx")  # struct egress_link of native/ways.h


@dataclass(frozen=True, slots=True)
class Link:
    """What the ways `frame`, `raw4` and `raw6` write into headers: addresses of the interface, 16 bytes each (IPv4
    mapped), ANY where it has none; IPv6 has one of link-local scope, and one of a wider."""

    source4: bytes = ANY
    source6_link: bytes = ANY
    source6: bytes = ANY
    mac: bytes = bytes(6)
    header: int = 14  # bytes of the link-layer header: Ethernet's, or 0 where there is none

    @property
    def packed(self) -> bytes:
        return LINK_RECORD.pack(self.source4, self.source6_link, self.source6, self.mac, self.header)

    @classmethod
    def unpack(cls, packed: bytes) -> Link:
        """struct.error if it is not one."""
        return cls(*LINK_RECORD.unpack(packed))

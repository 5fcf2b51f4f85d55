"""pcapng: captured packets as a file that Wireshark, tshark and tcpdump read (draft-ietf-opsawg-pcapng).

Bytes out of values, nothing else: whoever writes them has the file. A file is one section: its header, a description of
each interface when the first packet of it comes, and the packets. Packets begin with their IP header (LINKTYPE_RAW),
times are in nanoseconds, and what a packet's comment says is up to the caller. Every block is complete in itself, so a
file that ends behind any of them is one.

Little-endian, whatever the machine; readers go by the byte-order magic.
"""

from __future__ import annotations

import struct
from typing import Final

SECTION_HEADER: Final = 0x0A0D0D0A
INTERFACE_DESCRIPTION: Final = 1
ENHANCED_PACKET: Final = 6
BYTE_ORDER_MAGIC: Final = 0x1A2B3C4D
LINKTYPE_RAW: Final = 101  # begins with an IPv4 or IPv6 header

# Options: of every block, of a section header, of an interface description, of a packet.
OPT_END: Final = 0
OPT_COMMENT: Final = 1
SHB_USERAPPL: Final = 4
IF_NAME: Final = 2
IF_TSRESOL: Final = 9
EPB_FLAGS: Final = 2
EPB_DROPCOUNT: Final = 4
NANOSECONDS: Final = 9  # the negative power of 10
INBOUND: Final = 1


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)


def _option(code: int, value: bytes) -> bytes:
    return struct.pack("<HH", code, len(value)) + _padded(value)


def _text(text: str) -> bytes:
    """UTF-8, not longer than an option can be, nor cut inside a character."""
    return text.encode(errors="replace")[:0xFFFF].decode(errors="ignore").encode()


def _block(kind: int, body: bytes, *options: bytes) -> bytes:
    content = _padded(body) + (b"".join(options) + _option(OPT_END, b"") if options else b"")
    length = struct.pack("<I", 12 + len(content))
    return struct.pack("<I", kind) + length + content + length


class Writer:
    """Makes one file's blocks, in the order in which they have to be written."""

    def __init__(self, program: str, snap_length: int) -> None:
        """`snap_length`: no more bytes of a packet are captured; 0 for no limit."""
        self._program = program
        self._snap_length = snap_length
        self._interfaces: dict[str, int] = {}

    def begin(self) -> bytes:
        body = struct.pack("<IHHq", BYTE_ORDER_MAGIC, 1, 0, -1)  # version 1.0; the section's length is not known
        return _block(SECTION_HEADER, body, _option(SHB_USERAPPL, _text(self._program)))

    def packet(
        self, interface: str, time_ns: int, data: bytes, length: int, comment: str = "", *, lost: int = 0
    ) -> bytes:
        """A packet of `length` bytes, of which `data` were captured; before it, `lost` ones were not. What describes
        its interface comes first, if it has to."""
        described = b""
        if interface not in self._interfaces:
            self._interfaces[interface] = len(self._interfaces)
            described = self._interface(interface)
        body = struct.pack(
            "<IIIII",
            *(self._interfaces[interface], time_ns >> 32, time_ns & 0xFFFFFFFF, len(data), length),
        )
        options = [_option(OPT_COMMENT, _text(comment))] if comment else []
        options.append(_option(EPB_FLAGS, struct.pack("<I", INBOUND)))
        if lost:
            options.append(_option(EPB_DROPCOUNT, struct.pack("<Q", lost)))
        return described + _block(ENHANCED_PACKET, body + _padded(data), *options)

    def _interface(self, name: str) -> bytes:
        body = struct.pack("<HHI", LINKTYPE_RAW, 0, self._snap_length)
        return _block(
            INTERFACE_DESCRIPTION,
            body,
            _option(IF_NAME, _text(name)),
            _option(IF_TSRESOL, bytes([NANOSECONDS])),
        )

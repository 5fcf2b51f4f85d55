"""The watch: what really comes in on this host's interfaces during some seconds, for a diagnosis.

Opens packet sockets with the rights of whoever types the command (CAP_NET_RAW) and says what to do where those do not
suffice. Changes nothing, but that it joins the group meanwhile where nobody on this host has: what no member asked for
need not come.

Kernel facts:
- A packet socket that is bound to no interface sees all of them; a frame on a port of a bridge or below a VLAN is seen
  there, and again on the device above.
- The tag of a VLAN is taken off before packet sockets see the frame, and is in PACKET_AUXDATA (packet(7)).
- A program returns how many bytes of a frame to keep. SKF_AD_PROTOCOL has its EtherType, SKF_NET_OFF its network header
  (linux/filter.h).
"""

from __future__ import annotations

import ctypes
import select
import socket
import struct
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Final

from mcrelay.facts import Arrival, Sightings
from mcrelay.rules import Address, Input, bits
from mcrelay.sightings import Frame, take
from mcrelay.steering import JEQ_K, LD_B_ABS, LD_W_ABS, NETWORK, RET_K, Instruction

# Constants that the socket module lacks (asm-generic/socket.h, linux/if_packet.h, linux/if_ether.h, linux/in.h).
SO_ATTACH_FILTER: Final = 26
PACKET_STATISTICS: Final = 6
PACKET_AUXDATA: Final = 8
PACKET_IGNORE_OUTGOING: Final = 23
SOL_PACKET: Final = 263
ETH_P_ALL: Final = 0x0003
ETH_P_IP: Final = 0x0800
ETH_P_IPV6: Final = 0x86DD
TP_STATUS_CSUMNOTREADY: Final = 1 << 3
TP_STATUS_VLAN_VALID: Final = 1 << 4
AUXDATA: Final = struct.Struct("=IIIHHHH")  # struct tpacket_auxdata
MCAST_JOIN_GROUP: Final = 42
MCAST_JOIN_SOURCE_GROUP: Final = 46

JGE_K: Final = 0x35  # classic BPF: jump if the accumulator is not less
ALU_AND_K: Final = 0x54
PROTOCOL: Final = 0xFFFFF000  # SKF_AD_OFF + SKF_AD_PROTOCOL
WHOLE: Final = 0xFFFFFFFF
GLIMPSE: Final = 256  # bytes: headers, with options

FRAMES_MAX: Final = 20_000  # that one socket is read for: some tenths of a second of Python
READ_AT_ONCE: Final = 64
FRAME_BYTES: Final = 65536 + 64
RECEIVE_BUFFER: Final = 8 << 20
ARRIVALS: Final[dict[int, Arrival]] = {0: "host", 1: "broadcast", 2: "multicast", 3: "other host"}


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))  # struct sock_fprog


def watch(given: Input, seconds: float, join_on: Sequence[str], source: Address | None = None) -> Sightings:
    """What comes in for `given`, on any interface, and what other multicast there is. The group is joined on the
    interfaces `join_on` meanwhile."""
    with ExitStack() as stack:
        seen = Sightings(seconds)
        seen.joined = tuple(_join(stack, given.address, source, join_on))
        try:
            wanted = stack.enter_context(_open(_destination_filter(given)))
            others = stack.enter_context(_open(_multicast_filter()))
        except PermissionError:
            seen.problem = "to look at frames takes CAP_NET_RAW"
            time.sleep(seconds)  # counters move meanwhile
            return seen
        except OSError as error:
            seen.problem = f"frames cannot be looked at: {error.strerror}"
            time.sleep(seconds)
            return seen
        _read(seen, given, wanted, others)
        return seen


def _read(seen: Sightings, given: Input, wanted: socket.socket, others: socket.socket) -> None:
    deadline = time.monotonic() + seen.seconds
    left = {wanted: FRAMES_MAX, others: FRAMES_MAX}
    while (timeout := deadline - time.monotonic()) > 0:
        readable, _, _ = select.select([sock for sock, number in left.items() if number], [], [], timeout)
        for sock in readable:
            for _ in range(min(READ_AT_ONCE, left[sock])):
                frame = _receive(sock)
                if frame is None:
                    break
                left[sock] -= 1
                if sock is wanted or not _is_to(given, frame):
                    take(seen, frame)
    came, _dropped = struct.unpack("=II", wanted.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))
    seen.looked_at = FRAMES_MAX - left[wanted]
    seen.missed = max(0, came - seen.looked_at)


def _receive(sock: socket.socket) -> Frame | None:
    try:
        data, ancillary, _flags, address = sock.recvmsg(FRAME_BYTES, socket.CMSG_SPACE(AUXDATA.size))
    except BlockingIOError:
        return None
    except OSError:  # an interface went down
        return None
    network, vlan, status = 14, None, 0
    for level, kind, value in ancillary:
        if (level, kind) == (SOL_PACKET, PACKET_AUXDATA):
            status, _length, _snapped, mac_at, network_at, tag, _kind = AUXDATA.unpack(value[: AUXDATA.size])
            network = network_at - mac_at
            vlan = tag & 0xFFF if status & TP_STATUS_VLAN_VALID else None
    interface, _protocol, arrival = address[:3]
    return Frame(data, network, interface, ARRIVALS.get(arrival, "host"), vlan, not status & TP_STATUS_CSUMNOTREADY)


def _is_to(given: Input, frame: Frame) -> bool:
    """Whether the other socket has it, too."""
    at, size = (16, 4) if given.address.version == 4 else (24, 16)
    destination = frame.data[frame.network + at : frame.network + at + size]
    if len(destination) < size or frame.data[frame.network] >> 4 != given.address.version:
        return False
    behind = bits(given.address) - (bits(given.address) if given.prefix is None else given.prefix)
    return int.from_bytes(destination, "big") >> behind == int(given.address) >> behind


def _open(program: Iterable[Instruction]) -> socket.socket:
    """A packet socket on all interfaces, of which only what the program takes is to be read."""
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    try:
        instructions = list(program)
        code = b"".join(struct.pack("=HBBI", *instruction) for instruction in instructions)
        buffer = ctypes.create_string_buffer(code, len(code))
        sock.setsockopt(
            socket.SOL_SOCKET, SO_ATTACH_FILTER, bytes(_Program(len(instructions), ctypes.addressof(buffer)))
        )
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
        sock.setsockopt(SOL_PACKET, PACKET_AUXDATA, 1)
        sock.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
        sock.setblocking(False)
        for _ in range(FRAMES_MAX):  # what came before the program was there
            if _receive(sock) is None:
                break
        sock.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8)  # which starts them anew
    except BaseException:
        sock.close()
        raise
    return sock


def _destination_filter(given: Input) -> Iterable[Instruction]:
    """All bytes of what is sent to the address or prefix."""
    version = given.address.version
    packed = given.address.packed
    prefix = bits(given.address) if given.prefix is None else given.prefix
    mask = ((1 << prefix) - 1 << bits(given.address) - prefix).to_bytes(len(packed), "big")
    at = NETWORK + (16 if version == 4 else 24)
    words = []
    for offset in range(0, len(packed), 4):
        of_mask = int.from_bytes(mask[offset : offset + 4], "big")
        if of_mask:
            words.append((at + offset, of_mask, int.from_bytes(packed[offset : offset + 4], "big") & of_mask))
    # Each word takes three instructions; a jump to the end, which drops, is over those behind it and the acceptance.
    yield LD_W_ABS, 0, 0, PROTOCOL
    yield JEQ_K, 0, 3 * len(words) + 1, ETH_P_IP if version == 4 else ETH_P_IPV6
    for number, (offset, of_mask, value) in enumerate(words):
        yield LD_W_ABS, 0, 0, offset
        yield ALU_AND_K, 0, 0, of_mask
        yield JEQ_K, 0, 3 * (len(words) - number - 1) + 1, value
    yield RET_K, 0, 0, WHOLE
    yield RET_K, 0, 0, 0


def _multicast_filter() -> Iterable[Instruction]:
    """The beginning of all IPv4 and IPv6 multicast, of which IGMP and MLD queries are."""
    yield LD_W_ABS, 0, 0, PROTOCOL
    yield JEQ_K, 0, 2, ETH_P_IP
    yield LD_B_ABS, 0, 0, NETWORK + 16
    yield JGE_K, 3, 4, 224
    yield JEQ_K, 0, 3, ETH_P_IPV6
    yield LD_B_ABS, 0, 0, NETWORK + 24
    yield JEQ_K, 0, 1, 255
    yield RET_K, 0, 0, GLIMPSE
    yield RET_K, 0, 0, 0


def _join(stack: ExitStack, group: Address, source: Address | None, interfaces: Iterable[str]) -> Iterable[str]:
    """Be a member on these interfaces until the stack ends; those of them where that was possible."""
    if not group.is_multicast:
        return
    family, level = (
        (socket.AF_INET, socket.IPPROTO_IP) if group.version == 4 else (socket.AF_INET6, socket.IPPROTO_IPV6)
    )
    for interface in interfaces:
        try:
            sock = stack.enter_context(socket.socket(family, socket.SOCK_DGRAM))
            request = struct.pack("=I4x", socket.if_nametoindex(interface))
            request += _storage(group)
            if source is None:
                sock.setsockopt(level, MCAST_JOIN_GROUP, request)  # struct group_req
            else:
                sock.setsockopt(level, MCAST_JOIN_SOURCE_GROUP, request + _storage(source))  # struct group_source_req
        except OSError:
            continue
        yield interface


def _storage(address: Address) -> bytes:
    """struct sockaddr_storage"""
    if address.version == 4:
        return struct.pack("=HH4s", socket.AF_INET, 0, address.packed).ljust(128, b"\0")
    return struct.pack("=HHI16sI", socket.AF_INET6, 0, 0, address.packed, 0).ljust(128, b"\0")

"""Filters: classic BPF programs, given to sockets.

Owns how a program (steering.py has them) reaches the kernel, and what to say of a refusal that has to do with an
interface. Knows nothing of what the sockets are for.

Kernel facts: a program is copied when it is set (SO_ATTACH_FILTER, PACKET_FANOUT_DATA), and its memory counts against
net.core.optmem_max of its socket.
"""

from __future__ import annotations

import ctypes
import errno
import socket
import struct
from collections.abc import Sequence
from typing import Final

from mcrelay.net.interfaces import Interface
from mcrelay.steering import Instruction, drop_filter

SO_ATTACH_FILTER: Final = 26  # asm-generic/socket.h


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))  # struct sock_fprog


def set_program(sock: socket.socket, level: int, option: int, program: Sequence[Instruction]) -> None:
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    description = _Program(len(program), ctypes.addressof(buffer))
    sock.setsockopt(level, option, bytes(description))


def set_filter(sock: socket.socket, program: Sequence[Instruction]) -> None:
    """What the program accepts is all that the socket receives from now on."""
    set_program(sock, socket.SOL_SOCKET, SO_ATTACH_FILTER, program)


def receive_nothing(sock: socket.socket) -> None:
    set_filter(sock, drop_filter())


def remedy(error: OSError, interface: Interface) -> str:
    """What to do about a refusal."""
    if error.errno in (errno.EPERM, errno.EACCES):
        return "run mcrelay as root or with CAP_NET_RAW and CAP_NET_ADMIN"
    if error.errno in (errno.ENODEV, errno.ENXIO, errno.ENETDOWN):
        return f"see 'ip link show {interface.name}'"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "raise the limit of open files (ulimit -n)"
    return "see the kernel's log (dmesg)"

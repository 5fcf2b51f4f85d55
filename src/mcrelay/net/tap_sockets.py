"""Tap sockets: pairs by which a data plane shows packets to the control plane (native/tap.h).

Kernel facts (unix(7)): SOCK_SEQPACKET keeps records apart, and tells each end when the other is closed. What is under
way counts against the writer's buffer, each record with some hundred bytes of the kernel's own.
"""

from __future__ import annotations

import socket
from typing import Final

SO_SNDBUFFORCE: Final = 32  # asm-generic/socket.h
BUFFER: Final = 2 * 1024 * 1024  # bytes, which the kernel doubles: some 1500 short packets


def open_tap() -> tuple[socket.socket, socket.socket]:
    """(where records are read, where they are written), both non-blocking."""
    reader, writer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    try:
        writer.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, BUFFER)
    except PermissionError:  # rootless: as much as net.core.wmem_max allows
        writer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
    return reader, writer

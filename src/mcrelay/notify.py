"""Notify: what the service manager is told, and the descriptors that it keeps.

Speaks sd_notify(3), one datagram a message, to the socket that systemd names in the environment; without one there is
nobody to tell. Knows nothing of what a descriptor is for.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Sequence
from typing import Final

TOLD_S: Final = 2.0  # a service manager that does not read may hold us up for so long
LISTEN_FIRST: Final = 3  # the first descriptor that systemd passes (sd_listen_fds(3))


def notify(text: str, descriptors: Sequence[int] = (), *, patience_s: float = TOLD_S) -> bool:
    """Tell it; whether there was somebody. OSError if that failed. Descriptors stay the caller's."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(patience_s)
        sock.connect("\0" + address[1:] if address.startswith("@") else address)
        socket.send_fds(sock, [text.encode()], list(descriptors))
    return True


def may_change_process() -> bool:
    """Whether another process may take the place of this one: not if this is a service of systemd's that may not say so
    (NotifyAccess=), since systemd ends what is left of a service whose main process ends."""
    return os.environ.get("SYSTEMD_EXEC_PID") != str(os.getpid()) or "NOTIFY_SOCKET" in os.environ


def store_size() -> int:
    """How many descriptors the service manager keeps for us (FileDescriptorStoreMax=): 0 if none. systemd says so from
    version 254 on; before that the unit has to (Environment=FDSTORE=512)."""
    with contextlib.suppress(ValueError):
        if os.environ.get("NOTIFY_SOCKET"):
            return int(os.environ.get("FDSTORE", "0"))
    return 0


def store(name: str, descriptor: int) -> None:
    """Have it kept, to be passed to the next start under this name. OSError if it cannot be said."""
    notify(f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0", [descriptor])


def forget(name: str) -> None:
    """Have it kept no more."""
    with contextlib.suppress(OSError):
        notify(f"FDSTOREREMOVE=1\nFDNAME={name}")


def stored() -> dict[str, int]:
    """What was kept, by name; each descriptor is the caller's. Empties the part of the environment that says so, so
    that no other program takes it for its own (sd_listen_fds(3))."""
    pid, count, names = (os.environ.pop(key, "") for key in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"))
    if pid != str(os.getpid()) or not count.isdigit():
        return {}
    found: dict[str, int] = {}
    for offset, name in zip(range(int(count)), names.split(":"), strict=False):
        os.set_inheritable(LISTEN_FIRST + offset, False)
        found[name] = LISTEN_FIRST + offset
    return found

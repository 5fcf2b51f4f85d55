"""Landlock: no path, no TCP port, no stranger's process for the rest of a process's life (landlock(7)).

Owns the ruleset: it handles every right that the kernel knows of, as far as this list goes, and grants none. What is
open stays usable. Linux has it since 5.13 if it is switched on; each version (ABI) of it knows more rights, and refuses
those that it does not know.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable
from typing import Final

# linux/landlock.h; the system calls have the same numbers on every architecture.
CREATE_RULESET: Final = 444
RESTRICT_SELF: Final = 446
CREATE_RULESET_VERSION: Final = 1

# How many rights on files there are since which ABI: 13 in the first, then REFER, TRUNCATE, IOCTL_DEV.
FILE_RIGHTS: Final = {1: 13, 2: 14, 3: 15, 5: 16}
TCP_SINCE: Final = 4
TCP_RIGHTS: Final = 0b11  # bind, connect
SCOPES_SINCE: Final = 6
SCOPES: Final = 0b11  # abstract Unix sockets, signals


def rights(abi: int) -> bytes:
    """struct landlock_ruleset_attr with all that this ABI can take away; what it does not know is zero, as it wants."""
    files = max(count for since, count in FILE_RIGHTS.items() if since <= abi)
    return struct.pack(
        "=QQQ",
        (1 << files) - 1,
        TCP_RIGHTS if abi >= TCP_SINCE else 0,
        SCOPES if abi >= SCOPES_SINCE else 0,
    )


def restrict(system_call: Callable[..., int]) -> int:
    """Put this process under it, for good. Returns the kernel's ABI. OSError if the kernel has no Landlock or refuses;
    no_new_privs has to be set."""
    abi = system_call(CREATE_RULESET, None, 0, CREATE_RULESET_VERSION)
    attributes = rights(abi)
    ruleset = system_call(CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    try:
        system_call(RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)
    return abi

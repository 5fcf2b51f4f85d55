"""The sandbox: what a worker may ask of the kernel, role by role, from its first message to its end.

Owns the lists of system calls with the reason for each, the resource limits, and the order in which a worker gives
things up. docs/sandbox.md shows the same lists; a test compares them. seccomp.py and landlock.py know the kernel's
side. Privileges are gone before (process.py).

enter() comes when the code is imported and before the first byte is read; seal() when the worker has served Start, and
takes what only its beginning needed: the ring, the threads. Above all io_uring_setup: what is submitted to a ring does
not pass seccomp, so the engine restricts its own ring to what it submits (native/engine.c), and there is no other.

Three answers to what is not listed. What Python and the C library do by habit and without need, looking for a file,
fails with EACCES: a traceback without its source lines is still one. What is newer than our list does not exist
(ENOSYS). The rest is what only an attacker does: the process says which call it was and ends (native/forbidden.h).

A kernel or a container that refuses any of this is no reason not to forward: it is logged.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import resource
import signal
import socket
import time
import traceback
from collections.abc import Mapping
from types import MappingProxyType, ModuleType
from typing import Final, Literal

from mcrelay import landlock, logs, process, seccomp
from mcrelay.channel import SCM_MAX_FD
from mcrelay.limits import CLIENTS_MAX, INTERFACES_MAX, PORTS_MAX, SCRAPERS_MAX, TAPS_MAX, WORKERS_MAX
from mcrelay.seccomp import ALLOW, KILL, Call, Null, OneOf, Without
from mcrelay.ways import DIRECTIONS

_forbidden: ModuleType | None
try:
    from mcrelay import _forbidden
except ImportError:
    _forbidden = None  # the package was not built

log = logging.getLogger(__name__)

Role = Literal["control", "data"]

MACHINE: Final = os.uname().machine
PROT_EXEC: Final = 4
AT_EMPTY_PATH: Final = 0x1000
FIONBIO: Final = 0x5421
FIOCLEX: Final = 0x5451
SIOCGIFNAME: Final = 0x8910
PR_SET_NAME: Final = 15
THREAD: Final = 0x3D0F00  # the flags of clone(2) in pthread_create, always the same
# linux/io_uring.h: restrictions, enabling, buffer rings made and dissolved
RING_OPERATIONS: Final = (11, 12, 22, 23)

_SIGNALS: Final = tuple(n for n in range(1, 65) if n != signal.SIGSYS)
SELF: Final = -1  # stands for the process's own pid in a list

_EVENTS: Final = {
    "epoll_ctl": Call(),
    "epoll_wait": Call(),
    "epoll_pwait": Call(),  # what epoll_wait(3) is on aarch64
}
_CHANNELS: Final = {
    "recvmsg": Call(),
    "sendmsg": Call(),
    "recvfrom": Call(),
    "sendto": Call((Null(4),)),  # on connected sockets, to no address
    "read": Call(),
    "write": Call(),
    "writev": Call(),  # the C library's own complaints
    "close": Call(),
    "getsockname": Call(),
    "getsockopt": Call(),
    "setsockopt": Call((OneOf(1, (socket.SOL_SOCKET,)), OneOf(2, (socket.SO_LINGER,)))),  # channel.py
    "ioctl": Call((OneOf(1, (FIONBIO, FIOCLEX)),)),
    "fcntl": Call((OneOf(1, (fcntl.F_DUPFD_CLOEXEC, fcntl.F_GETFD, fcntl.F_SETFD, fcntl.F_GETFL, fcntl.F_SETFL)),)),
    "fstat": Call(),
}
_MEMORY: Final = {
    "brk": Call(),
    "mmap": Call((Without(2, PROT_EXEC),)),
    "munmap": Call(),
    "mprotect": Call((Without(2, PROT_EXEC),)),
    "mremap": Call(),
    "madvise": Call(),
}
_RUNNING: Final = {
    "futex": Call(),
    "sched_yield": Call(),
    "clock_gettime": Call(),  # these three where the kernel's page with the time is of no use
    "gettimeofday": Call(),
    "time": Call(),
    "getpid": Call(),
    "gettid": Call(),
    "geteuid": Call(),
    "getrandom": Call(),
    "rt_sigprocmask": Call(),
    "rt_sigreturn": Call(),
    "restart_syscall": Call(),
    "rt_sigaction": Call((OneOf(0, _SIGNALS),), otherwise=KILL),
    "tgkill": Call((OneOf(0, (SELF,)),)),  # abort(3)
    "prlimit64": Call((OneOf(0, (0,)),)),  # its own, which it can only lower
    "poll": Call(),  # the last words
    "ppoll": Call(),
    "exit": Call(),
    "exit_group": Call(),
}
# By habit: paths, which lead nowhere.
_HABITS: Final = {
    name: Call(action=seccomp.refuse(errno.EACCES))
    for name in (
        *("open", "openat", "openat2", "stat", "lstat", "statx", "access", "faccessat", "faccessat2"),
        *("readlink", "readlinkat", "getcwd"),
    )
} | {"newfstatat": Call((OneOf(3, (AT_EMPTY_PATH,)),), otherwise=seccomp.refuse(errno.EACCES))}  # fstat(3)
_ENGINE: Final = {
    "io_uring_enter": Call(),
    "io_uring_register": Call((OneOf(1, RING_OPERATIONS),)),
    # Of engine reference: Python names the interface of a packet's address.
    "ioctl": Call((OneOf(1, (FIONBIO, FIOCLEX, SIOCGIFNAME)),)),
}
# Until Start is served: make an engine, pin it to its core, start its thread.
_ENGINE_START: Final = {
    "io_uring_setup": Call(),
    "eventfd2": Call(),
    "epoll_create1": Call(),  # of engine reference
    "sched_setaffinity": Call((OneOf(0, (0,)),)),
    "uname": Call(),  # to say why there is no io_uring
    "clone": Call((OneOf(0, (THREAD,)),)),
    # Its flags are behind a pointer. The C library takes clone instead.
    "clone3": Call(action=seccomp.refuse(errno.ENOSYS)),
    "set_robust_list": Call(),
    "rseq": Call(),
    "sched_getaffinity": Call(),
    "seccomp": Call((OneOf(0, (seccomp.SET_MODE_FILTER,)),)),  # seal
    "prctl": Call((OneOf(0, (PR_SET_NAME,)),)),  # Python names its threads, since 3.14
}

_ALWAYS: Final = _EVENTS | _CHANNELS | _MEMORY | _RUNNING | _HABITS
CALLS: Final[Mapping[Role, Mapping[str, Call]]] = MappingProxyType(
    {"control": _ALWAYS, "data": _ALWAYS | _ENGINE | _ENGINE_START}
)
BEGINNING: Final[Mapping[Role, frozenset[str]]] = MappingProxyType(
    {"control": frozenset(), "data": frozenset(_ENGINE_START)}
)

# Descriptors. Streams, FD 3, the channels, asyncio's three, the engine's, and some to spare; those that a channel may
# hold of messages on their way; and what the role is for.
OWN: Final = 32
ARRIVING: Final = 4 * SCM_MAX_FD
DESCRIPTORS: Final[Mapping[Role, int]] = MappingProxyType(
    {
        # One more of each: a client is told that it is too many, a scraper takes another's place.
        "control": OWN + ARRIVING + CLIENTS_MAX + 1 + SCRAPERS_MAX + 1 + TAPS_MAX * WORKERS_MAX,
        "data": OWN + ARRIVING + len(DIRECTIONS) * INTERFACES_MAX + PORTS_MAX + TAPS_MAX,  # ports: of rootless mode
    }
)


def enter(role: Role) -> str:
    """Give up what the role never needs. Returns what people may want to know of the kernel's part in it."""
    _warm_up()
    _limit(role)
    try:
        known = f"Landlock, ABI {landlock.restrict(process.system_call)}"
    except OSError as error:
        known = f"no Landlock: {error.strerror}"
    _filter(role)
    return known


def seal(role: Role) -> None:
    """Give up what only the beginning needed: no other ring, no other thread from now on."""
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    numbers = _numbers()
    if numbers is None or not BEGINNING[role]:
        return
    gone = {numbers[name]: Call(action=seccomp.TRAP) for name in BEGINNING[role] if name in numbers}
    _install(seccomp.program(gone, machine=MACHINE, default=ALLOW), numbers)


def _warm_up() -> None:
    """Have read what is read once and only when it is needed: the time zone, and what it takes to print a traceback."""
    time.localtime()
    try:
        raise RuntimeError
    except RuntimeError:
        traceback.format_exc()


def _limit(role: Role) -> None:
    """Lower what may be lowered, hard limits too. Not RLIMIT_FSIZE: standard error may be a file. Not RLIMIT_AS: rings
    are mapped by the GiB where somebody wants it."""
    limits = {
        resource.RLIMIT_CORE: 0,  # a core file has what clients sent
        resource.RLIMIT_NOFILE: DESCRIPTORS[role],
    }
    if role == "control":
        # The kernel counts rings of io_uring as locked memory, those of all workers together as their user's.
        limits[resource.RLIMIT_MEMLOCK] = 0
    for limit, most in limits.items():
        _soft, hard = resource.getrlimit(limit)
        least = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(limit, (least, least))


def _numbers() -> Mapping[str, int] | None:
    """The numbers of system calls here; None where there is no list."""
    if _forbidden is None or MACHINE not in seccomp.ARCHITECTURES:
        return None
    numbers: Mapping[str, int] = _forbidden.NUMBERS
    return numbers


def _filter(role: Role) -> None:
    numbers = _numbers()
    if _forbidden is None or numbers is None:
        log.warning("no system call is forbidden: there is no list for %s, or no native module", MACHINE)
        return
    _forbidden.install(*logs.around("sandbox", process=role))
    # What a list names and this architecture lacks, it does without.
    calls = {numbers[name]: _own(call) for name, call in CALLS[role].items() if name in numbers}
    _install(
        seccomp.program(calls, machine=MACHINE, default=seccomp.TRAP, unknown_above=max(numbers.values())),
        numbers,
    )


def _own(call: Call) -> Call:
    """With the process's own pid where SELF stands."""
    conditions = tuple(
        OneOf(c.argument, (os.getpid(),)) if isinstance(c, OneOf) and c.values == (SELF,) else c
        for c in call.conditions
    )
    return Call(conditions, call.action, call.otherwise)


def _install(text: bytes, numbers: Mapping[str, int]) -> None:
    try:
        seccomp.install(text, process.system_call, numbers["seccomp"])
    except OSError as error:
        log.warning("no system call is forbidden: seccomp: %s", error.strerror)

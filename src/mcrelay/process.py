"""Processes: start a worker, make it harmless, see what the kernel says of it.

Owns the way from the supervisor's exec to a process without privileges, and what of its own the supervisor keeps. What
else uses privilege is about sockets and in net/; tests/unit/test_style.py has the list. Knows nothing of what workers
do.

A worker is a fresh exec of the interpreter with three standard streams and FD 3, nothing else. It imports its code
first and then drops everything, because the code may lie where an unprivileged user cannot read (a clone in root's
home), and before it reads the first byte from FD 3.

Kernel facts: changing the uid clears the parent-death signal (prctl(2)), so it is set last. It fires when the *thread*
that started the process ends, so workers are started from the main thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import grp
import os
import pwd
import resource
import signal
import socket
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from mcrelay.errors import NotPermitted, SystemRefusal, UsageError

WORKER_FD: Final = 3
SUCCESSOR: Final = "MCRELAY_HANDOVER"  # in the environment: the number of that descriptor
DATA_PRIORITY: Final = -15  # nice value; 29 times the share of an ordinary process

# linux/capability.h
CAP_DAC_READ_SEARCH: Final = 2
CAP_KILL: Final = 5
CAP_SETGID: Final = 6
CAP_SETUID: Final = 7
CAP_SETPCAP: Final = 8
CAP_NET_BIND_SERVICE: Final = 10
CAP_NET_ADMIN: Final = 12
CAP_NET_RAW: Final = 13
CAP_SYS_NICE: Final = 23
CAP_BPF: Final = 39
CAPABILITY_VERSION_3: Final = 0x20080522

# What the supervisor keeps once it has started, of what it has. Whom it starts later begins with the same.
SUPERVISOR_CAPABILITIES: Final = {
    CAP_NET_RAW: "packet sockets, and sockets bound to an interface",
    CAP_NET_ADMIN: "their buffers beyond the system's limit",
    CAP_NET_BIND_SERVICE: "ports below 1024 that unicast rules take packets at",
    CAP_BPF: "the filter in front of packet sockets",
    CAP_SYS_NICE: "data planes that are preferred on their cores",
    CAP_KILL: "to end workers, which are somebody else",
    CAP_SETUID: "workers become somebody else",
    CAP_SETGID: "and lose their groups",
    CAP_SETPCAP: "and give up what they could regain",
    CAP_DAC_READ_SEARCH: "the code may lie in somebody's home, and workers read it before they become somebody else",
}

# linux/prctl.h
PR_SET_PDEATHSIG: Final = 1
PR_SET_DUMPABLE: Final = 4
PR_CAPBSET_DROP: Final = 24
PR_SET_NO_NEW_PRIVS: Final = 38
PR_CAP_AMBIENT: Final = 47
PR_CAP_AMBIENT_CLEAR_ALL: Final = 4

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


@dataclass(frozen=True, slots=True)
class Identity:
    """Who workers run as."""

    uid: int
    gid: int
    name: str


def identity(user: str | None, what: str = "--user", *, own: bool = False) -> Identity:
    """The workers' identity: `user` (a name), by default mcrelay if there is such a user, else nobody. A supervisor
    that is not root, or is to use no privilege (`own`), can only give them its own. UsageError, about `what`."""
    if own or os.geteuid() != 0:
        try:
            name = pwd.getpwuid(os.geteuid()).pw_name
        except KeyError:
            name = str(os.geteuid())  # as in a container
        if user not in (None, name):
            raise UsageError(f"{what} {user}: only root can run workers as somebody else", "leave it out")
        return Identity(os.geteuid(), os.getegid(), name)
    return find_user(user, what)


def find_user(user: str | None, what: str = "--user") -> Identity:
    """Of that name, or else mcrelay or nobody. UsageError, about `what`, if there is none, or if it is root."""
    for name in (user,) if user is not None else ("mcrelay", "nobody"):
        try:
            entry = pwd.getpwnam(name)
        except (KeyError, ValueError):  # as with a NUL in it
            continue
        if entry.pw_uid == 0:
            raise UsageError(f"{what} {name}: workers do not run as root", "name an unprivileged user")
        return Identity(entry.pw_uid, entry.pw_gid, name)
    shown = "nobody" if user is None else user if user.isprintable() and user else repr(user)
    raise UsageError(f"{what} {shown}: there is no such user", "'getent passwd' lists the users")


def network_namespace() -> str:
    """Which one this process is in. No other has the same while it, or a socket of it, is there."""
    facts = os.stat("/proc/self/ns/net")
    return f"{facts.st_dev}:{facts.st_ino}"


def group_id(name: str) -> int | None:
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        return None


def check_privileges() -> None:
    """NotPermitted unless this process may open packet sockets, force their buffers, and make workers harmless."""
    capabilities = int(status_of(os.getpid()).capabilities, 16)
    needed = {"CAP_NET_RAW": CAP_NET_RAW, "CAP_NET_ADMIN": CAP_NET_ADMIN}
    if os.geteuid() == 0:  # workers become somebody else
        needed |= {"CAP_SETUID": CAP_SETUID, "CAP_SETGID": CAP_SETGID, "CAP_SETPCAP": CAP_SETPCAP}
    missing = [name for name, bit in needed.items() if not capabilities >> bit & 1]
    if missing:
        raise NotPermitted(f"mcrelay run lacks {' and '.join(missing)}", "run it as root or with sudo")


def open_standard_streams() -> None:
    """Those that whoever started us has closed lead nowhere: else what is opened next would get their numbers, and what
    is meant for people would go there."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free; workers', too


def raise_descriptor_limit() -> None:
    """As many descriptors as this process may have: sockets come per worker and interface."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def keep_needed_capabilities(*, none: bool = False) -> None:
    """Give up what the supervisor does not need any more, and the way to regain it: of each set what is on the list
    stays if it was there, or nothing if `none` is needed. A supervisor that is not root has less, and cannot touch the
    bounding set."""
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    needed = 0 if none else sum(1 << capability for capability in SUPERVISOR_CAPABILITIES)
    effective, permitted, inheritable = _capabilities()
    if effective >> CAP_SETPCAP & 1:
        _drop_bounding_set(keep=needed)
    _set_capabilities(effective & needed, permitted & needed, inheritable & needed)


def spawn(module: str, arguments: Sequence[str], end: socket.socket) -> int:
    """Start `python -m module arguments` with `end` as its FD 3. Returns the pid. `end` stays the caller's."""
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        # Everything but what is duplicated here closes at exec: Python opens descriptors so (PEP 446).
        return os.posix_spawn(
            sys.executable,
            [sys.executable, "-I", "-m", module, *arguments],
            {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"},
            file_actions=[
                (os.POSIX_SPAWN_DUP2, null, 0),
                (os.POSIX_SPAWN_DUP2, end.fileno(), WORKER_FD),
            ],
            # Ctrl-C reaches the whole terminal's group, and SIGTERM all that a service manager has started for the
            # daemon: only the supervisor acts on them, and its workers finish what they have in hand.
            setpgroup=0,
            setsigmask=(signal.SIGTERM,),
            # Whatever we ignore, or whoever started us: a shell's background jobs ignore SIGINT and SIGQUIT.
            setsigdef=signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP},
        )
    except OSError as error:
        raise SystemRefusal(f"cannot start a worker: {error.strerror}", "see 'ulimit -u' and free memory") from None
    finally:
        os.close(null)


def spawn_successor(end: socket.socket) -> int:
    """Start this program anew, as it was started, with `end` as its FD 3. Returns the pid."""
    try:
        return os.posix_spawn(
            sys.executable,
            # -P: not from the directory that it happens to be in.
            [sys.executable, "-P", "-m", "mcrelay", *sys.argv[1:]],
            {**os.environ, SUCCESSOR: str(WORKER_FD)},
            file_actions=[(os.POSIX_SPAWN_DUP2, end.fileno(), WORKER_FD)],
            setsigmask=(),
            setsigdef=signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP},
        )
    except OSError as error:
        raise SystemRefusal(
            f"cannot start the new daemon: {error.strerror}", "see 'ulimit -u' and free memory"
        ) from None


def predecessor_fd() -> int | None:
    """The descriptor of the channel to the daemon that started this one to take its place, if one did."""
    descriptor = os.environ.pop(SUCCESSOR, None)
    return int(descriptor) if descriptor else None


def prioritise(pid: int) -> None:
    """Have a data plane's process preferred to others on its core, where we may (CAP_SYS_NICE): most of all to the
    kernel's ksoftirqd, which fills rings under load and would leave no time to read them. Before it has threads."""
    with contextlib.suppress(PermissionError, ProcessLookupError):
        os.setpriority(os.PRIO_PROCESS, pid, DATA_PRIORITY)


# --- in the worker ---------------------------------------------------------------------------------------------------


def drop_privileges(uid: int, gid: int) -> None:
    """Become `uid`:`gid` without groups, capabilities or a way back, and die with the parent. OSError if any of it
    fails: the worker must not go on then."""
    if os.geteuid() != uid:
        os.setgroups([])
        _drop_bounding_set(keep=0)
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    _prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    _set_capabilities(0, 0, 0)
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    _prctl(PR_SET_DUMPABLE, 0)  # others that run as the same user cannot look into it
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def name_process(name: str) -> None:
    """What ps and top show for the main thread (15 bytes)."""
    with contextlib.suppress(PermissionError), open("/proc/self/comm", "w") as file:  # of one that has become another
        file.write(name)


# --- what the kernel says -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Status:
    uid: int
    capabilities: str  # effective, 16 hexadecimal digits
    cores: str  # "0-1,3"


def status_of(pid: int) -> Status:
    """From /proc/PID/status (proc(5)). ProcessLookupError if there is no such process."""
    try:
        with open(f"/proc/{pid}/status") as file:
            fields = dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
    except FileNotFoundError:
        raise ProcessLookupError(pid) from None
    return Status(int(fields["Uid"].split()[1]), fields["CapEff"].strip(), fields["Cpus_allowed_list"].strip())


# --- system calls ---------------------------------------------------------------------------------------------------


def system_call(number: int, *arguments: object) -> int:
    """One that has no wrapper in the C library that is always there. OSError if it fails."""
    result = int(_libc.syscall(ctypes.c_long(number), *arguments))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


# capset and capget.
_CAPSET: Final = {"x86_64": 126, "aarch64": 91, "riscv64": 91}.get(os.uname().machine, 91)
_CAPGET: Final = _CAPSET - 1
_CAPABILITY_HEADER: Final = struct.pack("=Ii", CAPABILITY_VERSION_3, 0)
_CAPABILITY_SETS: Final = struct.Struct("=6I")  # effective, permitted, inheritable; low words first, then high ones


def _capabilities() -> tuple[int, int, int]:
    """Effective, permitted, inheritable."""
    buffer = ctypes.create_string_buffer(_CAPABILITY_SETS.size)
    system_call(_CAPGET, _CAPABILITY_HEADER, buffer)
    words = _CAPABILITY_SETS.unpack(buffer.raw)
    effective, permitted, inheritable = (low | high << 32 for low, high in zip(words[:3], words[3:], strict=True))
    return effective, permitted, inheritable


def _set_capabilities(*sets: int) -> None:
    words = [word >> shift & 0xFFFFFFFF for shift in (0, 32) for word in sets]
    system_call(_CAPSET, _CAPABILITY_HEADER, _CAPABILITY_SETS.pack(*words))


def _drop_bounding_set(*, keep: int) -> None:
    with open("/proc/sys/kernel/cap_last_cap") as file:
        last = int(file.read())
    for capability in range(last + 1):
        if not keep >> capability & 1:
            _prctl(PR_CAPBSET_DROP, capability)


def _prctl(option: int, argument: int) -> None:
    if _libc.prctl(option, ctypes.c_ulong(argument), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl {option}")

"""seccomp: from a list of permitted system calls to a filter in the kernel (seccomp(2)).

Owns the classic BPF program and its installation. Knows nothing of who may call what: sandbox.py has the lists.

Kernel facts: a filter sees the architecture, the number and the six arguments as values; what a pointer points to it
cannot see. An argument of type int reaches the kernel as the low half of its register, so that is what is compared.
Filters add up: of the answers of several, the strictest counts. The kernel remembers which numbers are permitted
whatever their arguments, so those cost nothing. SECCOMP_RET_TRAP sends SIGSYS, which cannot be escaped: where it is
blocked or ignored, the kernel ends the process itself.
"""

from __future__ import annotations

import ctypes
import errno
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

# linux/seccomp.h
SET_MODE_FILTER: Final = 1
FLAG_TSYNC: Final = 1 << 0  # every thread of the process
KILL: Final = 0x80000000  # the process, by SIGSYS
TRAP: Final = 0x00030000  # SIGSYS to the thread, whose handler names the call
ALLOW: Final = 0x7FFF0000
_ERRNO: Final = 0x00050000

# linux/audit.h, by os.uname().machine
ARCHITECTURES: Final = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
X32: Final = 0x40000000  # set in the numbers of x86_64's other ABI

# linux/bpf_common.h, and struct seccomp_data: number, architecture, instruction pointer, arguments
LOAD, EQUAL, GREATER, ANY_BIT, RETURN = 0x20, 0x15, 0x25, 0x45, 0x06
NUMBER_AT, ARCHITECTURE_AT, ARGUMENTS_AT = 0, 4, 16

_INSTRUCTION: Final = struct.Struct("=HBBI")  # struct sock_filter: code, jump if true, jump if false, operand


def refuse(error: int) -> int:
    """The action: let the call fail with this errno."""
    return _ERRNO | error


@dataclass(frozen=True, slots=True)
class OneOf:
    """An argument has one of these values."""

    argument: int
    values: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Without:
    """An argument has none of these bits."""

    argument: int
    bits: int


@dataclass(frozen=True, slots=True)
class Null:
    """An argument is a null pointer."""

    argument: int


Condition = OneOf | Without | Null


@dataclass(frozen=True, slots=True)
class Call:
    """How a system call is answered: by `action` if all conditions hold, else by `otherwise`."""

    conditions: tuple[Condition, ...] = ()
    action: int = ALLOW
    otherwise: int = TRAP


Instruction = tuple[int, int, int, int]


def _word(argument: int, half: int = 0) -> Instruction:
    """Load half an argument, the low one first: both architectures are little-endian."""
    return (LOAD, 0, 0, ARGUMENTS_AT + 8 * argument + 4 * half)


def _check(condition: Condition, otherwise: int) -> list[Instruction]:
    """Go on behind it if the condition holds, else return `otherwise`."""
    refusal = (RETURN, 0, 0, otherwise)
    match condition:
        case OneOf(argument, values):
            left = range(len(values), 0, -1)
            tests = [(EQUAL, n, 0, value) for n, value in zip(left, values, strict=True)]
            return [_word(argument), *tests, refusal]
        case Without(argument, bits):
            return [_word(argument), (ANY_BIT, 0, 1, bits), refusal]
        case Null(argument):
            return [_word(argument), (EQUAL, 0, 2, 0), _word(argument, 1), (EQUAL, 1, 0, 0), refusal]


def program(calls: Mapping[int, Call], *, machine: str, default: int, unknown_above: int | None = None) -> bytes:
    """The filter: `calls` by number, every other number gets `default`. Numbers above `unknown_above` do not exist
    (ENOSYS): a C library that is newer than this list tries them, and goes on by other means."""
    text: list[Instruction] = [
        (LOAD, 0, 0, ARCHITECTURE_AT),
        (EQUAL, 1, 0, ARCHITECTURES[machine]),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER_AT),
        (ANY_BIT, 0, 1, X32),
        (RETURN, 0, 0, KILL),
    ]
    if unknown_above is not None:
        text += [(GREATER, 0, 1, unknown_above), (RETURN, 0, 0, refuse(errno.ENOSYS))]
    for number, call in sorted(calls.items()):
        checks = [step for condition in call.conditions for step in _check(condition, call.otherwise)]
        body = [*checks, (RETURN, 0, 0, call.action)]
        text += [(EQUAL, 0, len(body), number), *body]
    text.append((RETURN, 0, 0, default))
    return b"".join(_INSTRUCTION.pack(*instruction) for instruction in text)


class _Program(ctypes.Structure):  # struct sock_fprog
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


def install(text: bytes, system_call: Callable[..., int], number: int) -> None:
    """Put this process under the filter, for good. OSError if the kernel refuses; no_new_privs has to be set."""
    buffer = ctypes.create_string_buffer(text, len(text))
    description = _Program(len(text) // _INSTRUCTION.size, ctypes.addressof(buffer))
    thread = system_call(number, SET_MODE_FILTER, FLAG_TSYNC, ctypes.byref(description))
    if thread:  # which one could not follow
        raise OSError(0, f"thread {thread} is under another filter")

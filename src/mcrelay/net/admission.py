"""Admission: which packets of an interface are copied to the workers at all.

Owns, for one ingress interface, a set of destinations in kernel memory and the socket filter that looks packets up in
it. Every packet socket of the interface shares the two, so a change of rules is one system call, however many workers
there are. A packet for nobody costs no worker anything. Knows nothing of rules or workers: the supervisor says which
destinations are wanted.

The set is a BPF hash map and the filter an eBPF program of 20 instructions (bpf(2)); a classic filter has no maps, and
grows with the rules. Without the right to load one (CAP_BPF, or CAP_SYS_ADMIN), the sockets take all UDP instead, and
the engine finds out itself what is for nobody.

Kernel facts: a map lives as long as a descriptor or a program that uses it, a program as long as a socket has it. Loads
relative to the beginning of the packet (non-negative offsets) also reach what lies in fragments of its buffer; those
relative to the network header (SKF_NET_OFF) do not, and a failed load drops the packet.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from collections.abc import Iterable
from ipaddress import IPv4Address
from typing import Final

from mcrelay.limits import RULES_MAX

SO_ATTACH_BPF: Final = 50  # asm-generic/socket.h

# linux/bpf.h
BPF_MAP_CREATE: Final = 0
BPF_PROG_LOAD: Final = 5
BPF_MAP_UPDATE_BATCH: Final = 26
BPF_MAP_DELETE_BATCH: Final = 27
BPF_MAP_TYPE_HASH: Final = 1
BPF_PROG_TYPE_SOCKET_FILTER: Final = 1
BPF_F_NO_PREALLOC: Final = 1
BPF_PSEUDO_MAP_FD: Final = 1
BPF_FUNC_MAP_LOOKUP_ELEM: Final = 1
ATTRIBUTE_SIZE: Final = 128  # of union bpf_attr, as much as we need of it

KEY: Final = struct.Struct("=II")  # IPv4 destination address and UDP destination port, as numbers
PRESENT: Final = b"\x01\0\0\0"
BATCH: Final = struct.Struct("=QQQQIIQQ")  # keys third, values fourth, count fifth, the map sixth

Destination = tuple[IPv4Address, int]  # and UDP port

_libc = ctypes.CDLL(None, use_errno=True)
# bpf has no wrapper in the C library.
_BPF: Final = {"x86_64": 321, "aarch64": 280, "riscv64": 280}.get(os.uname().machine, 280)

# Operations (linux/bpf.h, linux/bpf_common.h): class | size or source | mode or operation.
LD_B_ABS, LD_W_ABS, LD_H_IND, LD_IMM64 = 0x30, 0x20, 0x48, 0x18
STX_W, MOV, MOV_IMM, MOV32_IMM, AND_IMM, LSH_IMM, ADD_IMM = 0x63, 0xBF, 0xB7, 0xB4, 0x57, 0x67, 0x07
JEQ_IMM, JNE_IMM, CALL, EXIT = 0x15, 0x55, 0x85, 0x95
R0, R1, R2, R6, R7, STACK = 0, 1, 2, 6, 7, 10
UDP: Final = 17


def _program(network: int, map_fd: int) -> bytes:
    """Accept all bytes of an IPv4 UDP packet whose destination is in the map, and nothing else. `network`: offset of
    the network header from where a socket filter sees the packet. LD_ABS and LD_IND want the context in R6, give their
    result in R0 as a number, and end the program with 0 if the packet is too short."""
    code: list[tuple[int, int, int, int, int]] = [  # operation, destination, source, offset, immediate
        (MOV, R6, R1, 0, 0),
        (LD_B_ABS, 0, 0, 0, network + 9),
        (JNE_IMM, R0, 0, 16, UDP),  # to the end that refuses
        (LD_B_ABS, 0, 0, 0, network),
        (AND_IMM, R0, 0, 0, 15),
        (LSH_IMM, R0, 0, 0, 2),  # the length of the IPv4 header
        (MOV, R7, R0, 0, 0),
        (LD_H_IND, 0, R7, 0, network + 2),
        (STX_W, STACK, R0, -4, 0),
        (LD_W_ABS, 0, 0, 0, network + 16),
        (STX_W, STACK, R0, -8, 0),
        (LD_IMM64, R1, BPF_PSEUDO_MAP_FD, 0, map_fd),
        (0, 0, 0, 0, 0),  # the second half of that
        (MOV, R2, STACK, 0, 0),
        (ADD_IMM, R2, 0, 0, -KEY.size),
        (CALL, 0, 0, 0, BPF_FUNC_MAP_LOOKUP_ELEM),
        (JEQ_IMM, R0, 0, 2, 0),
        (MOV32_IMM, R0, 0, 0, -1),
        (EXIT, 0, 0, 0, 0),
        (MOV_IMM, R0, 0, 0, 0),
        (EXIT, 0, 0, 0, 0),
    ]
    return b"".join(
        struct.pack("=BBhI", operation, source << 4 | destination, offset, immediate & 0xFFFFFFFF)
        for operation, destination, source, offset, immediate in code
    )


class BatchFailed(OSError):
    """A batch was done in part: `done` of it."""

    def __init__(self, error: OSError, done: int) -> None:
        super().__init__(error.errno, error.strerror)
        self.done = done


class Admission:
    """For packet sockets of one interface; admits nothing at first. OSError if this process may load no program, or
    this kernel takes none."""

    def __init__(self, network: int) -> None:
        """`network`: see net/interfaces.py."""
        self._map = _bpf(
            BPF_MAP_CREATE,
            _attribute(struct.pack("=IIIII", BPF_MAP_TYPE_HASH, KEY.size, len(PRESENT), RULES_MAX, BPF_F_NO_PREALLOC)),
        )
        self._admitted: set[Destination] = set()
        try:
            code = ctypes.create_string_buffer(_program(network, self._map))
            license = ctypes.create_string_buffer(b"Apache-2.0")
            self._program = _bpf(
                BPF_PROG_LOAD,
                _attribute(
                    struct.pack(
                        "=IIQQ",
                        BPF_PROG_TYPE_SOCKET_FILTER,
                        (len(code) - 1) // 8,
                        ctypes.addressof(code),
                        ctypes.addressof(license),
                    )
                ),
            )
        except BaseException:
            os.close(self._map)
            raise

    @classmethod
    def adopt(cls, map_fd: int, program_fd: int) -> Admission:
        """One that another process made; what that has admitted has to be admitted again before it can be refused."""
        adopted = cls.__new__(cls)
        adopted._map, adopted._program, adopted._admitted = map_fd, program_fd, set()
        return adopted

    def descriptors(self) -> list[int]:
        """To adopt it by; they stay ours."""
        return [self._map, self._program]

    def attach(self, sock: socket.socket) -> None:
        """Make it the socket's filter, in place of the one before."""
        sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_BPF, self._program)

    def admit(self, destinations: Iterable[Destination]) -> None:
        """From now on; some may be admitted already. OSError if there are too many: nothing has changed then."""
        new = [destination for destination in dict.fromkeys(destinations) if destination not in self._admitted]
        try:
            done = self._batch(BPF_MAP_UPDATE_BATCH, new)
        except BatchFailed as failure:
            self._batch(BPF_MAP_DELETE_BATCH, new[: failure.done])
            raise
        assert done == len(new)
        self._admitted.update(new)

    def refuse(self, destinations: Iterable[Destination]) -> None:
        """From now on; they need not be admitted."""
        old = [destination for destination in dict.fromkeys(destinations) if destination in self._admitted]
        self._batch(BPF_MAP_DELETE_BATCH, old)
        self._admitted.difference_update(old)

    def _batch(self, command: int, destinations: list[Destination]) -> int:
        """One system call for all of them, which may be thousands. How many it was for; BatchFailed."""
        if not destinations:
            return 0
        keys = b"".join(KEY.pack(int(group), port) for group, port in destinations)
        key_buffer = ctypes.create_string_buffer(keys, len(keys))
        values = ctypes.create_string_buffer(PRESENT * len(destinations))
        value_address = ctypes.addressof(values) if command == BPF_MAP_UPDATE_BATCH else 0
        attribute = _attribute(
            BATCH.pack(0, 0, ctypes.addressof(key_buffer), value_address, len(destinations), self._map, 0, 0)
        )
        try:
            _bpf(command, attribute)
        except OSError as error:
            raise BatchFailed(error, BATCH.unpack_from(attribute)[4]) from None
        return len(destinations)

    def close(self) -> None:
        """Sockets that have the filter keep it, as it is."""
        os.close(self._program)
        os.close(self._map)


def _attribute(fields: bytes) -> ctypes.Array[ctypes.c_char]:
    return ctypes.create_string_buffer(fields, ATTRIBUTE_SIZE)


def _bpf(command: int, attribute: ctypes.Array[ctypes.c_char]) -> int:
    """bpf(2): a descriptor, which is closed on exec, or 0. The kernel may write into the attribute."""
    result: int = _libc.syscall(ctypes.c_long(_BPF), command, attribute, ATTRIBUTE_SIZE)
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"bpf: {os.strerror(error)}")
    return result

"""Admission: which packets of an interface are copied to the workers at all.

Owns, for one ingress interface, a set of destinations in kernel memory and the socket filter that looks packets up in
it. Every packet socket of the interface shares the two, so a change of rules is a system call or two, however many
workers there are. A packet for nobody costs no worker anything. Knows nothing of workers, and of rules no more than
what their packets are for: the supervisor says which destinations are wanted. Sources are not looked at, nor ports
where the destination is a prefix, so some of what is admitted has no rule after all; what has one is admitted.

The set is two BPF maps, a hash table of whole addresses and a trie of prefixes, and the filter an eBPF program
(bpf(2)); a classic filter has no maps, and grows with the rules. A packet is looked up with its port, then without,
then in the trie. IPv6 packets may have other headers before UDP or ESP, and fragments do not say what they are of:
those are admitted by their address alone, and are the engine's matter.

Without the right to load a program (CAP_BPF, or CAP_SYS_ADMIN), the sockets take all UDP, ESP and IPv6 instead, and
the engine finds out itself what is for nobody.

Kernel facts: a map lives as long as a descriptor or a program that uses it, a program as long as a socket has it. Loads
relative to the beginning of the packet (non-negative offsets) also reach what lies in fragments of its buffer; those
relative to the network header (SKF_NET_OFF) do not, and a failed load drops the packet. VLAN 0 is no VLAN: the tag then
is about priority alone, and the packet untagged. Words on a program's stack have to be aligned. Tries take batches
since Linux 5.13.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Final, NamedTuple

from mcrelay.entries import EXACT, PROTOCOLS, mapped
from mcrelay.limits import RULES_MAX
from mcrelay.rules import Input, bits
from mcrelay.steering import ESP, ETHERTYPE_IPV4, ETHERTYPE_IPV6, OUTGOING, UDP

SO_ATTACH_BPF: Final = 50  # asm-generic/socket.h

# linux/bpf.h
BPF_MAP_CREATE: Final = 0
BPF_PROG_LOAD: Final = 5
BPF_MAP_UPDATE_BATCH: Final = 26
BPF_MAP_DELETE_BATCH: Final = 27
BPF_MAP_TYPE_HASH: Final = 1
BPF_MAP_TYPE_LPM_TRIE: Final = 11
BPF_PROG_TYPE_SOCKET_FILTER: Final = 1
BPF_F_NO_PREALLOC: Final = 1
BPF_PSEUDO_MAP_FD: Final = 1
BPF_FUNC_MAP_LOOKUP_ELEM: Final = 1
ATTRIBUTE_SIZE: Final = 128  # of union bpf_attr, as much as we need of it
PKT_TYPE, PROTOCOL, VLAN_PRESENT, VLAN_TCI = 4, 16, 20, 24  # in struct __sk_buff

# Key of the hash table: address, port, VLAN and kind, as numbers, which is what the program's loads give.
KEY: Final = struct.Struct("=4IHHI")
TO_PORT, TO_ANY_PORT, TO_ESP = 0, 1, 2  # kinds
TO_OTHER: Final = 3  # kind: of IPv6, what has neither UDP nor ESP next to the IPv6 header
# Key of the trie, which compares bits as they stand in the packet: how many count; VLAN and address.
PREFIX_KEY: Final = struct.Struct("=IH2x16s")
BEFORE_ADDRESS: Final = 32  # bits
PRESENT: Final = b"\x01\0\0\0"
BATCH: Final = struct.Struct("=QQQQIIQQ")  # keys third, values fourth, count fifth, the map sixth

IPV4: Final = bytes(10) + b"\xff\xff"  # what a mapped address begins with

_libc = ctypes.CDLL(None, use_errno=True)
# bpf has no wrapper in the C library.
_BPF: Final = {"x86_64": 321, "aarch64": 280, "riscv64": 280}.get(os.uname().machine, 280)


class Destination(NamedTuple):
    """What packets are for: an address as Entry.group is one, or a prefix of one. `port` 0 is any, and that of ESP,
    which has none; `vlan` 0 is untagged."""

    address: bytes
    prefix: int = EXACT
    port: int = 0
    vlan: int = 0
    protocol: int = UDP


def destination_of(given: Input) -> Destination:
    prefix = EXACT if given.prefix is None else EXACT - bits(given.address) + given.prefix
    return Destination(mapped(given.address), prefix, given.port or 0, given.vlan or 0, PROTOCOLS[given.protocol])


# --- the program ------------------------------------------------------------------------------------------------------

# Operations (linux/bpf.h, linux/bpf_common.h): class | size or source | mode or operation.
LD_B_ABS, LD_H_ABS, LD_W_ABS, LD_H_IND, LD_IMM64 = 0x30, 0x28, 0x20, 0x48, 0x18
LDX_W, STX_H, STX_W, ST_H_IMM, ST_W_IMM, TO_BE = 0x61, 0x6B, 0x63, 0x6A, 0x62, 0xDC
MOV, MOV_IMM, MOV32_IMM, AND_IMM, LSH_IMM, ADD_IMM = 0xBF, 0xB7, 0xB4, 0x57, 0x67, 0x07
GO, JEQ_IMM, JNE_IMM, CALL, EXIT = 0x05, 0x15, 0x55, 0x85, 0x95
R0, R1, R2, R6, R7, R8, R9, STACK = 0, 1, 2, 6, 7, 8, 9, 10

# On the stack.
AT_KEY: Final = -KEY.size
AT_PORT, AT_VLAN, AT_KIND = AT_KEY + 16, AT_KEY + 18, AT_KEY + 20
AT_PREFIX_KEY: Final = AT_KEY - PREFIX_KEY.size

# Operation, destination, source, offset or the label to jump to, immediate; or a label.
Step = tuple[int, int, int, int | str, int] | str


def _program(network: int, hash_fd: int, trie_fd: int) -> bytes:
    """Accept all bytes of a packet whose destination is in one of the maps, and nothing else. `network`: offset of
    the network header from where a socket filter sees the packet. LD_ABS and LD_IND want the context in R6, give their
    result in R0 as a number, spoil R1 to R5, and end the program with 0 if the packet is too short."""
    steps: list[Step] = [
        (MOV, R6, R1, 0, 0),
        (LDX_W, R0, R6, PKT_TYPE, 0),
        (JEQ_IMM, R0, 0, "refuse", OUTGOING),
        (LDX_W, R9, R6, VLAN_PRESENT, 0),
        (JEQ_IMM, R9, 0, "untagged", 0),
        (LDX_W, R9, R6, VLAN_TCI, 0),
        (AND_IMM, R9, 0, 0, 0xFFF),
        "untagged",
        (STX_H, STACK, R9, AT_VLAN, 0),
        (ST_W_IMM, STACK, 0, AT_KIND, TO_PORT),
        (LDX_W, R0, R6, PROTOCOL, 0),
        (JEQ_IMM, R0, 0, "ipv6", socket.htons(ETHERTYPE_IPV6)),
        (JNE_IMM, R0, 0, "refuse", socket.htons(ETHERTYPE_IPV4)),
        (ST_W_IMM, STACK, 0, AT_KEY, 0),
        (ST_W_IMM, STACK, 0, AT_KEY + 4, 0),
        (ST_W_IMM, STACK, 0, AT_KEY + 8, 0xFFFF),
        (LD_W_ABS, 0, 0, 0, network + 16),
        (STX_W, STACK, R0, AT_KEY + 12, 0),
        (LD_B_ABS, 0, 0, 0, network + 9),
        (MOV, R8, R0, 0, 0),  # the protocol
        (JEQ_IMM, R8, 0, "esp", ESP),
        (JNE_IMM, R8, 0, "refuse", UDP),
        (LD_B_ABS, 0, 0, 0, network),
        (AND_IMM, R0, 0, 0, 15),
        (LSH_IMM, R0, 0, 0, 2),  # the length of the IPv4 header
        (MOV, R7, R0, 0, 0),
        (LD_H_IND, 0, R7, 0, network + 2),
        "port in R0",
        (STX_H, STACK, R0, AT_PORT, 0),
        *_lookup(hash_fd, AT_KEY),
        (JNE_IMM, R0, 0, "accept", 0),
        (JNE_IMM, R8, 0, "prefix", UDP),
        (ST_H_IMM, STACK, 0, AT_PORT, 0),
        (ST_W_IMM, STACK, 0, AT_KIND, TO_ANY_PORT),
        *_lookup(hash_fd, AT_KEY),
        (JNE_IMM, R0, 0, "accept", 0),
        "prefix",
        (ST_W_IMM, STACK, 0, AT_PREFIX_KEY, BEFORE_ADDRESS + EXACT),
        (ST_W_IMM, STACK, 0, AT_PREFIX_KEY + 4, 0),
        (STX_H, STACK, R9, AT_PREFIX_KEY + 4, 0),
        *(
            step
            for word in range(4)
            for step in (
                (LDX_W, R0, STACK, AT_KEY + 4 * word, 0),
                (TO_BE, R0, 0, 0, 32),
                (STX_W, STACK, R0, AT_PREFIX_KEY + 8 + 4 * word, 0),
            )
        ),
        *_lookup(trie_fd, AT_PREFIX_KEY),
        (JEQ_IMM, R0, 0, "refuse", 0),
        "accept",
        (MOV32_IMM, R0, 0, 0, -1),
        (EXIT, 0, 0, 0, 0),
        "ipv6",
        *(
            step
            for word in range(4)
            for step in (
                (LD_W_ABS, 0, 0, 0, network + 24 + 4 * word),
                (STX_W, STACK, R0, AT_KEY + 4 * word, 0),
            )
        ),
        (LD_B_ABS, 0, 0, 0, network + 6),
        (MOV, R8, R0, 0, 0),  # the protocol, if nothing is between
        (JEQ_IMM, R8, 0, "esp", ESP),
        (JNE_IMM, R8, 0, "other", UDP),
        (LD_H_ABS, 0, 0, 0, network + 40 + 2),
        (GO, 0, 0, "port in R0", 0),
        "other",
        (ST_W_IMM, STACK, 0, AT_KIND, TO_OTHER),
        (MOV_IMM, R0, 0, 0, 0),
        (GO, 0, 0, "port in R0", 0),
        "esp",
        (ST_W_IMM, STACK, 0, AT_KIND, TO_ESP),
        (MOV_IMM, R0, 0, 0, 0),
        (GO, 0, 0, "port in R0", 0),
        "refuse",
        (MOV_IMM, R0, 0, 0, 0),
        (EXIT, 0, 0, 0, 0),
    ]
    return _assembled(steps)


def _lookup(map_fd: int, key: int) -> list[Step]:
    """R0 becomes 0 if the map has no such key, of this place on the stack."""
    return [
        (LD_IMM64, R1, BPF_PSEUDO_MAP_FD, 0, map_fd),
        (0, 0, 0, 0, 0),  # the second half of that
        (MOV, R2, STACK, 0, 0),
        (ADD_IMM, R2, 0, 0, key),
        (CALL, 0, 0, 0, BPF_FUNC_MAP_LOOKUP_ELEM),
    ]


def _assembled(steps: list[Step]) -> bytes:
    labels: dict[str, int] = {}
    code: list[tuple[int, int, int, int | str, int]] = []
    for step in steps:
        if isinstance(step, str):
            labels[step] = len(code)
        else:
            code.append(step)
    return b"".join(
        struct.pack(
            "=BBhI",
            operation,
            source << 4 | destination,
            labels[offset] - at - 1 if isinstance(offset, str) else offset,
            immediate & 0xFFFFFFFF,
        )
        for at, (operation, destination, source, offset, immediate) in enumerate(code)
    )


# --- the maps ---------------------------------------------------------------------------------------------------------


class Map:
    """A set of keys in kernel memory. Owns its descriptor."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    @classmethod
    def create(cls, kind: int, key_size: int, entries: int) -> Map:
        fields = struct.pack("=IIIII", kind, key_size, len(PRESENT), entries, BPF_F_NO_PREALLOC)
        return cls(_bpf(BPF_MAP_CREATE, _attribute(fields)))

    def insert(self, keys: list[bytes]) -> None:
        """OSError if there are too many: nothing has changed then."""
        try:
            self._batch(BPF_MAP_UPDATE_BATCH, keys)
        except BatchFailed as failure:
            self._batch(BPF_MAP_DELETE_BATCH, keys[: failure.done])
            raise

    def delete(self, keys: list[bytes]) -> None:
        """Of what is there."""
        self._batch(BPF_MAP_DELETE_BATCH, keys)

    def _batch(self, command: int, keys: list[bytes]) -> None:
        """One system call for all of them, which may be thousands. BatchFailed."""
        if not keys:
            return
        packed = b"".join(keys)
        key_buffer = ctypes.create_string_buffer(packed, len(packed))
        values = ctypes.create_string_buffer(PRESENT * len(keys))
        value_address = ctypes.addressof(values) if command == BPF_MAP_UPDATE_BATCH else 0
        attribute = _attribute(BATCH.pack(0, 0, ctypes.addressof(key_buffer), value_address, len(keys), self.fd, 0, 0))
        try:
            _bpf(command, attribute)
        except OSError as error:
            raise BatchFailed(error, BATCH.unpack_from(attribute)[4]) from None

    def close(self) -> None:
        os.close(self.fd)


class BatchFailed(OSError):
    """A batch was done in part: `done` of it."""

    def __init__(self, error: OSError, done: int) -> None:
        super().__init__(error.errno, error.strerror)
        self.done = done


class Admission:
    """For packet sockets of one interface; admits nothing at first. OSError if this process may load no program, or
    this kernel takes none. What is admitted is a set: who has several rules for one destination counts them."""

    def __init__(self, network: int) -> None:
        """`network`: see net/interfaces.py."""
        with ExitStack() as stack:
            # Beside an exact destination of IPv6 stands one of the kind TO_OTHER.
            exact = Map.create(BPF_MAP_TYPE_HASH, KEY.size, 2 * RULES_MAX)
            stack.callback(exact.close)
            prefixes = Map.create(BPF_MAP_TYPE_LPM_TRIE, PREFIX_KEY.size, RULES_MAX)
            stack.callback(prefixes.close)
            self._take(exact, prefixes, _load(_program(network, exact.fd, prefixes.fd)))
            stack.pop_all()

    @classmethod
    def adopt(cls, exact_fd: int, prefixes_fd: int, program_fd: int) -> Admission:
        """One that another process made; what that has admitted has to be admitted again before it can be refused."""
        adopted = cls.__new__(cls)
        adopted._take(Map(exact_fd), Map(prefixes_fd), program_fd)
        return adopted

    def _take(self, exact: Map, prefixes: Map, program: int) -> None:
        self._exact, self._prefixes, self._program = exact, prefixes, program
        self._admitted: set[Destination] = set()
        self._uses: Counter[Entry] = Counter()  # how many of those want an entry

    def descriptors(self) -> list[int]:
        """To adopt it by; they stay ours."""
        return [self._exact.fd, self._prefixes.fd, self._program]

    def attach(self, sock: socket.socket) -> None:
        """Make it the socket's filter, in place of the one before."""
        sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_BPF, self._program)

    def admit(self, destinations: Iterable[Destination]) -> None:
        """From now on; some may be admitted already. OSError if there are too many: nothing has changed then."""
        new = dict.fromkeys(destinations).keys() - self._admitted
        wanted = Counter(entry for destination in new for entry in self._entries(destination))
        exact, prefixes = self._parted(entry for entry in wanted if not self._uses[entry])
        self._exact.insert(exact)
        try:
            self._prefixes.insert(prefixes)
        except OSError:
            self._exact.delete(exact)
            raise
        self._uses.update(wanted)
        self._admitted |= new

    def refuse(self, destinations: Iterable[Destination]) -> None:
        """From now on; they need not be admitted."""
        old = self._admitted & set(destinations)
        unwanted = Counter(entry for destination in old for entry in self._entries(destination))
        exact, prefixes = self._parted(entry for entry, uses in unwanted.items() if self._uses[entry] == uses)
        self._exact.delete(exact)
        self._prefixes.delete(prefixes)
        self._uses.subtract(unwanted)
        for entry in (*((self._exact, key) for key in exact), *((self._prefixes, key) for key in prefixes)):
            del self._uses[entry]
        self._admitted -= old

    def _entries(self, destination: Destination) -> Iterator[Entry]:
        """What the maps have for it."""
        address, prefix, port, vlan, protocol = destination
        if prefix != EXACT:
            yield self._prefixes, PREFIX_KEY.pack(BEFORE_ADDRESS + prefix, vlan, address)
            return
        words = struct.unpack(">4I", address)
        yield self._exact, KEY.pack(*words, port, vlan, TO_ESP if protocol == ESP else TO_PORT if port else TO_ANY_PORT)
        if not address.startswith(IPV4):
            yield self._exact, KEY.pack(*words, 0, vlan, TO_OTHER)

    def _parted(self, entries: Iterable[Entry]) -> tuple[list[bytes], list[bytes]]:
        """Keys of either map."""
        exact: list[bytes] = []
        prefixes: list[bytes] = []
        for where, key in entries:
            (exact if where is self._exact else prefixes).append(key)
        return exact, prefixes

    def close(self) -> None:
        """Sockets that have the filter keep it, as it is."""
        os.close(self._program)
        self._prefixes.close()
        self._exact.close()


Entry = tuple[Map, bytes]  # a map, and a key of it


def _load(program: bytes) -> int:
    code = ctypes.create_string_buffer(program, len(program))
    license = ctypes.create_string_buffer(b"Apache-2.0")
    fields = struct.pack(
        "=IIQQ", BPF_PROG_TYPE_SOCKET_FILTER, len(code) // 8, ctypes.addressof(code), ctypes.addressof(license)
    )
    return _bpf(BPF_PROG_LOAD, _attribute(fields))


def _attribute(fields: bytes) -> ctypes.Array[ctypes.c_char]:
    return ctypes.create_string_buffer(fields, ATTRIBUTE_SIZE)


def _bpf(command: int, attribute: ctypes.Array[ctypes.c_char]) -> int:
    """bpf(2): a descriptor, which is closed on exec, or 0. The kernel may write into the attribute."""
    result: int = _libc.syscall(ctypes.c_long(_BPF), command, attribute, ATTRIBUTE_SIZE)
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"bpf: {os.strerror(error)}")
    return result

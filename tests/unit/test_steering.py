"""Steering: the classic BPF programs mean what the functions beside them say.

They are run twice: by a small interpreter of the instructions that they use, and by the kernel, attached as filters to
a datagram socket. What the filter asks about a packet beside its bytes, only a packet socket has answers to:
tests/integration/test_sockets.py.
"""

from __future__ import annotations

import ctypes
import socket
import struct
from collections.abc import Iterator

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mcrelay.steering import (
    ALU_ADD_X,
    ALU_MUL_K,
    ALU_RSH_K,
    ALU_XOR_X,
    ESP,
    ETHERTYPE_IPV4,
    ETHERTYPE_IPV6,
    JEQ_K,
    JMP_K,
    LD_B_ABS,
    LD_H_IND,
    LD_W_ABS,
    LDX_B_MSH,
    OUTGOING,
    PACKET_TYPE,
    PROTOCOL,
    RET_A,
    RET_K,
    TAX,
    UDP,
    Instruction,
    drop_filter,
    steer,
    steer_address,
    steering_program,
    udp_filter,
)

SO_ATTACH_FILTER = 26
WORD = 0xFFFFFFFF


def run(program: list[Instruction], packet: bytes, protocol: int = 0, packet_type: int = 0) -> int:
    """What the kernel makes of a program: 32-bit registers, and 0 for a load beyond the packet."""
    beside = {PROTOCOL: protocol, PACKET_TYPE: packet_type}
    a = x = 0
    at = 0
    loads = {LD_W_ABS: (0, ">I"), LD_B_ABS: (0, ">B"), LD_H_IND: (1, ">H")}
    while True:
        code, if_true, if_false, k = program[at]
        at += 1
        if code == LD_W_ABS and k in beside:
            a = beside[k]
        elif code in loads:
            indexed, form = loads[code]
            offset = k + (x if indexed else 0)
            if offset + struct.calcsize(form) > len(packet):
                return 0
            (a,) = struct.unpack_from(form, packet, offset)
        elif code == LDX_B_MSH:
            if k >= len(packet):
                return 0
            x = 4 * (packet[k] & 15)
        elif code == ALU_ADD_X:
            a = (a + x) & WORD
        elif code == ALU_MUL_K:
            a = (a * k) & WORD
        elif code == ALU_RSH_K:
            a >>= k
        elif code == ALU_XOR_X:
            a ^= x
        elif code == TAX:
            x = a
        elif code == JMP_K:
            at += k
        elif code == JEQ_K:
            at += if_true if a == k else if_false
        elif code == RET_A:
            return a
        elif code == RET_K:
            return k
        else:
            raise AssertionError(f"instruction {code:#x}")


def ipv4(destination: int, port: int, options: bytes = b"", protocol: int = UDP, payload: bytes = b"") -> bytes:
    """A packet from its network header on, with `options` of a multiple of 4 bytes."""
    udp = struct.pack(">HHHH", 4000, port, 8 + len(payload), 0) + payload
    header = struct.pack(
        ">BBHHHBBHII",
        0x40 | (20 + len(options)) // 4,
        0,
        20 + len(options) + len(udp),
        0,
        0,
        16,
        protocol,
        0,
        0xC0000201,
        destination,
    )
    return header + options + udp


def ipv6(destination: bytes, next_header: int = UDP, payload: bytes = b"") -> bytes:
    """A packet from its network header on."""
    return struct.pack(">IHBB16s16s", 6 << 28, len(payload), next_header, 16, bytes(16), destination) + payload


destinations = st.integers(0, WORD)
ipv6_destinations = st.binary(min_size=16, max_size=16)
port_numbers = st.integers(0, 65535)
header_options = st.integers(0, 10).flatmap(lambda words: st.binary(min_size=4 * words, max_size=4 * words))
payloads = st.binary(max_size=40)
some_ipv4 = st.builds(ipv4, destinations, port_numbers, header_options, st.integers(0, 255), payloads)


class Filter:
    """The kernel's answer to whether a program accepts a packet."""

    def __init__(self, program: list[Instruction]) -> None:
        self._sender, self._receiver = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._receiver.setblocking(False)
        self.attach(program)

    def attach(self, program: list[Instruction]) -> None:
        code = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
        buffer = ctypes.create_string_buffer(code, len(code))
        self._receiver.setsockopt(
            socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("@HP", len(program), ctypes.addressof(buffer))
        )

    def accepts(self, packet: bytes) -> bool:
        """Whether it accepts all of it. A datagram between local sockets is there when send() returns, or never."""
        self._sender.send(packet)
        try:
            return self._receiver.recv(65536) == packet
        except BlockingIOError:
            return False

    def close(self) -> None:
        self._sender.close()
        self._receiver.close()


@pytest.fixture(scope="module")
def kernel() -> Iterator[Filter]:
    opened = Filter(drop_filter())
    yield opened
    opened.close()


def asked(value: int) -> list[Instruction]:
    """The steering program, made to accept exactly the packets that it maps to `value`."""
    program = steering_program()
    assert program[-1] == (RET_A, 0, 0, 0)
    return [*program[:-1], (JEQ_K, 0, 1, value), (RET_K, 0, 0, WORD), (RET_K, 0, 0, 0)]


@given(destinations, port_numbers, header_options, payloads)
@example(0, 0, b"", b"")
@example(WORD, 65535, b"", b"")
def test_the_program_computes_steer(destination: int, port: int, options: bytes, payload: bytes) -> None:
    assert run(steering_program(), ipv4(destination, port, options, payload=payload)) == steer(destination, port)


@given(destinations, port_numbers, header_options, payloads)
def test_the_kernel_computes_steer(kernel: Filter, destination: int, port: int, options: bytes, payload: bytes) -> None:
    packet = ipv4(destination, port, options, payload=payload)
    value = steer(destination, port)
    kernel.attach(asked(value))
    assert kernel.accepts(packet)
    kernel.attach(asked(value ^ 1))
    assert not kernel.accepts(packet)


@given(ipv6_destinations, st.integers(0, 255), payloads)
@example(bytes(16), UDP, b"")
@example(b"\xff" * 16, UDP, b"")
def test_ipv6_is_steered_by_its_destination_alone(
    kernel: Filter, destination: bytes, next_header: int, payload: bytes
) -> None:
    """Whatever it carries: of a fragmented datagram, only the first fragment has ports."""
    packet = ipv6(destination, next_header, payload)
    value = steer_address(destination)
    assert run(steering_program(), packet) == value
    kernel.attach(asked(value))
    assert kernel.accepts(packet)
    kernel.attach(asked(value ^ 1))
    assert not kernel.accepts(packet)


@given(destinations, port_numbers, header_options, payloads)
def test_nothing_but_the_destination_steers(destination: int, port: int, options: bytes, payload: bytes) -> None:
    """A flow keeps its worker whatever else its packets say."""
    packet = bytearray(ipv4(destination, port, options, payload=payload))
    value = run(steering_program(), bytes(packet))
    for at in range(len(packet)):
        if at and at not in range(16, 20) and at not in range(22 + len(options), 24 + len(options)):
            packet[at] ^= 0xFF
    assert run(steering_program(), bytes(packet)) == value


@given(st.binary(max_size=80))
def test_the_program_gives_a_word_for_any_bytes(packet: bytes) -> None:
    """A packet too short to have a destination goes to worker 0, which counts it."""
    assert 0 <= run(steering_program(), packet) <= WORD
    assert len(packet) >= 20 or run(steering_program(), packet) == 0


def accepted(packet: bytes, ethertype: int, packet_type: int = 0) -> bool:
    """What udp_filter says."""
    length = run(udp_filter(0), packet, ethertype, packet_type)
    assert length in (0, WORD)
    return bool(length)


@pytest.mark.parametrize("options", [b"", bytes(40)])
def test_the_filter_accepts_of_ipv4_exactly_udp_and_esp(options: bytes) -> None:
    packets = {protocol: ipv4(0xEF010101, 5000, options, protocol=protocol) for protocol in range(256)}
    passing = [protocol for protocol, packet in packets.items() if accepted(packet, ETHERTYPE_IPV4)]
    assert passing == [UDP, ESP]


@given(st.binary(max_size=80), st.sampled_from([0x0806, 0x8100, 0x88CC, 4]))
def test_the_filter_accepts_all_of_ipv6_and_nothing_that_is_not_ip(packet: bytes, ethertype: int) -> None:
    assert accepted(packet, ETHERTYPE_IPV6)
    assert not accepted(packet, ethertype)


@given(some_ipv4)
def test_the_filter_looks_at_the_protocol_alone(packet: bytes) -> None:
    assert accepted(packet, ETHERTYPE_IPV4) == (packet[9] in (UDP, ESP))
    assert not accepted(packet, ETHERTYPE_IPV4, OUTGOING)


@given(st.binary(min_size=1, max_size=30))
def test_the_filter_refuses_what_is_too_short_for_a_protocol(packet: bytes) -> None:
    assert accepted(packet, ETHERTYPE_IPV4) == (len(packet) > 9 and packet[9] in (UDP, ESP))


@given(some_ipv4)
def test_the_other_filter_accepts_nothing(kernel: Filter, packet: bytes) -> None:
    kernel.attach(drop_filter())
    assert not kernel.accepts(packet)
    assert run(drop_filter(), packet) == 0

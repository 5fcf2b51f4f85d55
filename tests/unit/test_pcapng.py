"""The writer of pcapng files: its bytes, read by a reader of our own. In tests/e2e/test_tap.py tshark reads them."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from mcrelay.pcapng import Writer


class Block(NamedTuple):
    kind: int
    body: bytes  # with its options


def blocks(data: bytes) -> Iterator[Block]:
    """Every block of a file, that has to be whole."""
    at = 0
    while at < len(data):
        kind, length = struct.unpack_from("<II", data, at)
        assert length % 4 == 0
        assert length >= 12
        assert struct.unpack_from("<I", data, at + length - 4) == (length,)
        yield Block(kind, data[at + 8 : at + length - 4])
        at += length
    assert at == len(data)


def options(data: bytes) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    at = 0
    while True:
        code, length = struct.unpack_from("<HH", data, at)
        at += 4
        if code == 0:
            assert length == 0
            assert at == len(data)
            return found
        assert code not in found
        found[code] = data[at : at + length]
        padding = -length % 4
        assert data[at + length : at + length + padding] == bytes(padding)
        at += length + padding


def test_a_section_and_an_interface_and_a_packet() -> None:
    writer = Writer("mcrelay 1.2", 100)
    (header,) = blocks(writer.begin())
    assert header.kind == 0x0A0D0D0A
    assert struct.unpack_from("<IHHq", header.body) == (0x1A2B3C4D, 1, 0, -1)
    assert options(header.body[16:]) == {4: b"mcrelay 1.2"}
    interface, packet = blocks(writer.packet("eth0", 0x123456789ABCDEF0, b"five!", 1500, "why\nnot?", lost=3))
    assert interface.kind == 1
    assert struct.unpack_from("<HHI", interface.body) == (101, 0, 100)
    assert options(interface.body[8:]) == {2: b"eth0", 9: b"\x09"}
    assert packet.kind == 6
    assert struct.unpack_from("<IIIII", packet.body) == (0, 0x12345678, 0x9ABCDEF0, 5, 1500)
    assert packet.body[20:28] == b"five!\0\0\0"
    assert options(packet.body[28:]) == {1: b"why\nnot?", 2: b"\1\0\0\0", 4: b"\3" + bytes(7)}


def test_an_interface_is_described_once() -> None:
    writer = Writer("", 0)
    kinds = [[b.kind for b in blocks(writer.packet(name, 0, b"", 0))] for name in ("a", "a", "b", "a", "b")]
    assert kinds == [[1, 6], [6], [1, 6], [6], [6]]
    (last,) = blocks(writer.packet("b", 0, b"", 0))
    assert struct.unpack_from("<I", last.body) == (1,)


@pytest.mark.parametrize("size", range(9))
def test_bytes_and_texts_of_any_length_are_padded(size: int) -> None:
    _interface, packet = blocks(Writer("x" * size, 0).packet("e" * size, 1, b"x" * size, size, "c" * size))
    assert packet.body[20 : 20 + size] == b"x" * size
    assert options(packet.body[20 + size + -size % 4 :]).get(1, b"") == b"c" * size


def test_a_text_is_cut_between_two_characters() -> None:
    _interface, packet = blocks(Writer("", 0).packet("e", 1, b"", 0, "é" * 40_000))
    text = options(packet.body[20:])[1]
    assert len(text) == 0xFFFE
    assert text.decode() == "é" * 32_767
    assert list(blocks(Writer("", 0).packet("\ud800", 1, b"", 0)))

"""Tapped packets: the layout that the C core writes, and the words for packets that anybody may have made."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcrelay import limits
from mcrelay.api import OutputDrop, TappedPacket
from mcrelay.counters import DROP_REASONS, REASON
from mcrelay.engines import _native as native
from mcrelay.tap import (
    DROPS_MAX,
    RECORD_BYTES,
    Record,
    packet_facts,
    packet_line,
    payload_lines,
    read_headers,
    read_record,
    tapped_packet,
    verdict_text,
)

UDP_HEADER = struct.pack("!HHHH", 40000, 5000, 8 + 5, 0)
IPV4 = bytes.fromhex("45b8 0021 0000 4000 0811 0000 cb00710a ef010101")
IPV6 = bytes.fromhex("6b80 0000 000d 11 09") + bytes.fromhex("20010db8" + "0" * 23 + "1" + "ff3e" + "0" * 24 + "8001")
HOP_BY_HOP = bytes.fromhex("11 00 0000 00000000")  # then UDP


def packet(data: bytes = IPV4 + UDP_HEADER + b"hello", **facts: object) -> TappedPacket:
    known: dict[str, object] = {
        "time_ns": 1,
        "worker": 0,
        "interface": "eth0",
        "vlan": 0,
        "length": len(data),
        "datagrams": 1,
        "outputs": 2,
        "copies": 2,
        "verdict": "forwarded",
        "dropped": (),
        "data": data,
    }
    return TappedPacket(**(known | facts))  # type: ignore[arg-type] # of many types


def test_the_layout_and_the_limits_are_those_of_the_core() -> None:
    assert RECORD_BYTES == native.TAP_RECORD_SIZE
    assert native.TAP_DROPS == DROPS_MAX
    assert native.TAP_BYTES == limits.TAP_BYTES_MAX
    assert native.TAPS == limits.TAPS_MAX


def test_a_record_reads_as_it_was_written() -> None:
    record = Record(2**63, 1500, 3, 2, 4, 7, 6, REASON["egress_full"], 9, [(65535, 14), (1, 15)])
    assert read_record(record.pack() + b"bytes") == (record, b"bytes")
    record.dropped = [(n, 14) for n in range(DROPS_MAX + 3)]
    assert read_record(record.pack())[0].dropped == record.dropped[:DROPS_MAX]
    with pytest.raises(ValueError, match="no record"):
        read_record(record.pack()[:-1])
    with pytest.raises(ValueError, match="no record"):
        read_record(b"")


def test_numbers_become_names() -> None:
    record = Record(5, 33, 1, 2, copies=1, dropped=[(40, REASON["egress_full"]), (41, 200)], reason=0)
    shown = tapped_packet(record, b"x", 3, {1: "eth1"}, {40: "239.2.2.2:6000%eth2"})
    assert (shown.interface, shown.worker, shown.verdict, shown.data) == ("eth1", 3, "forwarded", b"x")
    assert shown.dropped == (
        OutputDrop(output="239.2.2.2:6000%eth2", reason="egress_full"),
        OutputDrop(output="counter 41", reason="reason 200"),
    )
    record.reason, record.interface = REASON["own"], 9
    shown = tapped_packet(record, b"", 0, {}, {})
    assert (shown.interface, shown.verdict) == ("slot 9", "own")
    for number, name in enumerate(DROP_REASONS[1:], 1):
        record.reason = number
        assert tapped_packet(record, b"", 0, {}, {}).verdict == name


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (IPV4 + UDP_HEADER + b"hello", "eth0 203.0.113.10:40000 > 239.1.1.1:5000 ttl 8 length 33"),
        (IPV6 + UDP_HEADER + b"hello", "eth0 [2001:db8::1]:40000 > [ff3e::8001]:5000 ttl 9 length 53"),
        (
            IPV6[:6] + b"\0" + IPV6[7:] + HOP_BY_HOP + UDP_HEADER,
            "eth0 [2001:db8::1]:40000 > [ff3e::8001]:5000 ttl 9 length 56",
        ),
        (IPV4[:9] + b"\x32" + IPV4[10:] + b"spi.", "eth0 203.0.113.10 > 239.1.1.1 ESP ttl 8 length 24"),
        (IPV4[:9] + b"\x84" + IPV4[10:], "eth0 203.0.113.10 > 239.1.1.1 protocol 132 ttl 8 length 20"),
        (IPV4 + UDP_HEADER[:7], "eth0 203.0.113.10 > 239.1.1.1 ttl 8 length 27"),
        (IPV4[:19], "eth0 length 19"),
        (b"", "eth0 length 0"),
        (b"\x1b[2J" * 20, "eth0 length 80"),
    ],
)
def test_a_packet_is_a_line(data: bytes, line: str) -> None:
    assert packet_line(packet(data)) == f"{line}: forwarded to 2 of 2 outputs"


def test_a_line_says_what_is_not_usual() -> None:
    assert " vlan 7 length" in packet_line(packet(vlan=7))
    assert " length 33 datagrams 4: forwarded to 2 of 2 outputs" in packet_line(packet(datagrams=4, copies=8))


FULL = OutputDrop(output="239.2.2.2:6000%eth1", reason="egress_full")
GONE = OutputDrop(output="10.9.0.7:6000%eth2", reason="egress_unreachable")


@pytest.mark.parametrize(
    ("facts", "text"),
    [
        ({}, "forwarded to 2 of 2 outputs"),
        ({"outputs": 1, "copies": 1}, "forwarded to 1 of 1 output"),
        ({"copies": 1, "dropped": (FULL,)}, "forwarded to 1 of 2 outputs (239.2.2.2:6000%eth1: egress_full)"),
        (
            {"datagrams": 40, "copies": 55, "dropped": (FULL,)},
            "55 of 80 copies forwarded (239.2.2.2:6000%eth1: egress_full)",
        ),
        ({"copies": 0, "verdict": "own"}, "dropped: own"),
        ({"outputs": 1, "copies": 0, "verdict": "egress_full", "dropped": (FULL,)}, "dropped: egress_full"),
        (
            {"copies": 0, "verdict": "egress_full", "dropped": (FULL, GONE)},
            "dropped: egress_full (239.2.2.2:6000%eth1: egress_full, 10.9.0.7:6000%eth2: egress_unreachable)",
        ),
    ],
)
def test_what_became_of_it_is_a_phrase(facts: dict[str, object], text: str) -> None:
    assert verdict_text(packet(b"", **facts)) == text


def test_programs_get_the_same() -> None:
    assert packet_facts(packet(dropped=(FULL,))) == {
        "time_ns": 1,
        "worker": 0,
        "interface": "eth0",
        "source": "203.0.113.10",
        "source_port": 40000,
        "destination": "239.1.1.1",
        "destination_port": 5000,
        "protocol": 17,
        "ttl": 8,
        "dscp": 46,
        "vlan": 0,
        "length": 33,
        "datagrams": 1,
        "verdict": "forwarded",
        "outputs": 2,
        "copies": 2,
        "dropped": [{"output": "239.2.2.2:6000%eth1", "reason": "egress_full"}],
        "data": (IPV4 + UDP_HEADER + b"hello").hex(),
    }
    assert packet_facts(packet(IPV6 + UDP_HEADER))["dscp"] == 46


def test_a_payload_is_shown_in_rows() -> None:
    rows = list(payload_lines(IPV4 + UDP_HEADER + b"\x1b[2Jhello, world\r\n" + bytes(3)))
    assert rows == [
        "    0000  1b 5b 32 4a 68 65 6c 6c 6f 2c 20 77 6f 72 6c 64  .[2Jhello, world",
        "    0010  0d 0a 00 00 00                                   .....",
    ]
    assert list(payload_lines(b"")) == []


@given(st.binary(max_size=120), st.sampled_from([b"", IPV4, IPV6, IPV6[:6] + b"\0"]))
def test_nothing_that_comes_breaks_a_line(data: bytes, beginning: bytes) -> None:
    data = beginning + data
    read_headers(data)
    for line in (packet_line(packet(data)), *payload_lines(data)):
        assert line.isprintable()
        assert line.isascii()
    packet_facts(packet(data))

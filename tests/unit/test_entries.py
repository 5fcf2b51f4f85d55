"""entries.py: rules in numbers, and that the native table takes them."""

from __future__ import annotations

import errno
import struct
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcrelay.entries import (
    ESP,
    EXACT,
    OUTPUT_RECORD,
    RULE_RECORD,
    UDP,
    Entry,
    Leg,
    LegFlag,
    RateUnit,
    compile_rule,
    distinct,
    mapped,
)
from mcrelay.limits import OUTPUTS_MAX, RULE_OUTPUTS_MAX, RULES_MAX
from mcrelay.rules import Rule
from mcrelay.ruletext import parse_rule
from mcrelay.ways import ANY, LINK_RECORD, Link, Way
from tests.unit.rule_strategies import rules

INPUT = "239.1.1.1:5000%eth0"
OUTPUT = "239.2.2.2:6000%eth1"
SLOTS = {"eth0": 3, "eth1": 4, "eth2": 5}


def compile_one(rule: Rule, open: dict[str, int] | None = None, workers: int = 1) -> Entry:
    (entry,) = compile_rule(rule, SLOTS, 7, range(8, 8 + len(rule.outputs)), workers=workers, open=open)
    return entry


def leg_of(output: str, input: str = INPUT) -> Leg:
    return compile_one(parse_rule(input, [output])).legs[0]


def test_an_entry_is_the_rule_in_numbers() -> None:
    rule = parse_rule(INPUT, [OUTPUT, "10.9.0.7:7000%eth2,ttl=8"], "feed-a")
    entry = compile_one(rule)
    assert entry == Entry(
        group=bytes.fromhex("00000000000000000000ffffef010101"),
        port=5000,
        ingress=3,
        counter=7,
        legs=(
            Leg(bytes.fromhex("00000000000000000000ffffef020202"), 6000, 4, 0, 8),
            Leg(bytes.fromhex("00000000000000000000ffff0a090007"), 7000, 5, 8, 9),
        ),
        id=int(rule.id, 16),
    )
    keep_dscp = LegFlag.KEEP_DSCP
    assert entry.packed == b"".join(
        [
            entry.group + ANY + struct.pack("=QHHHHBBxxI", int(rule.id, 16), 5000, 3, 2, 0, EXACT, UDP, 7),
            entry.legs[0].address
            + ANY
            + struct.pack("=QIHHHBBBBBB8x", 0, 8, 6000, 0, 4, Way.UDP4, EXACT, 0, 0, keep_dscp, 0),
            entry.legs[1].address
            + ANY
            + struct.pack("=QIHHHBBBBBB8x", 0, 9, 7000, 0, 5, Way.UDP4, EXACT, 8, 0, keep_dscp, 0),
        ]
    )


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("=:=%eth1", {"address": mapped(IPv4Address("239.1.1.1")), "port": 5000, "prefix": EXACT}),
        ("=:7%eth1", {"address": mapped(IPv4Address("239.1.1.1")), "port": 7, "prefix": EXACT}),
        ("239.2.2.2:=%eth1", {"port": 5000, "prefix": EXACT}),
        ("=:=%eth1,ttl=keep", {"ttl": 0, "flags": LegFlag.KEEP_DSCP | LegFlag.KEEP_TTL}),
        ("=:=%eth1,dscp=46", {"dscp": 46, "flags": LegFlag(0)}),
        ("=:=%eth1,dscp=0", {"dscp": 0, "flags": LegFlag(0)}),
        ("=:=%eth1,source=10.0.0.9", {"source": mapped(IPv4Address("10.0.0.9")), "way": Way.UDP4}),
        (
            "=:=%eth1,source=keep",
            {"way": Way.FRAME, "flags": LegFlag.KEEP_DSCP | LegFlag.KEEP_SOURCE | LegFlag.KEEP_SOURCE_PORT},
        ),
        (
            "=:=%eth1,source=keep,sport=9",
            {"source_port": 9, "flags": LegFlag.KEEP_DSCP | LegFlag.KEEP_SOURCE},
        ),
        ("=:=%eth1,sport=keep", {"way": Way.FRAME, "flags": LegFlag.KEEP_DSCP | LegFlag.KEEP_SOURCE_PORT}),
        ("=:=%eth1,paused", {"flags": LegFlag.KEEP_DSCP | LegFlag.PAUSED}),
        ("=:=%eth1,rate=10Mbit", {"rate": 10**7, "rate_unit": RateUnit.BITS}),
        ("=:=%eth1,rate=7pps", {"rate": 7, "rate_unit": RateUnit.PACKETS}),
    ],
)
def test_a_leg_says_what_the_output_says(output: str, expected: dict[str, object]) -> None:
    leg = leg_of(output)
    assert {key: getattr(leg, key) for key in expected} == expected


def test_a_prefix_is_counted_in_128_bits() -> None:
    entry = compile_one(parse_rule("239.1.0.0/16:*%eth0", ["239.2.0.0/16:=%eth1"]))
    assert (entry.prefix, entry.port, entry.legs[0].prefix) == (112, 0, 112)
    entry = compile_one(parse_rule("[ff05::]/16:5%eth0", ["[ff08::]/16:=%eth1"]))
    assert (entry.prefix, entry.port, entry.legs[0].prefix) == (16, 5, 16)


@pytest.mark.parametrize(
    ("input", "expected"),
    [
        (INPUT, (5000, EXACT)),  # known beforehand, and the engine need not look
        ("239.1.1.1:*%eth0", (0, EXACT)),
        ("239.1.0.0/16:5000%eth0", (5000, 0)),
        ("239.1.0.0/16:*%eth0", (0, 0)),
    ],
)
@pytest.mark.parametrize("option", ["", ",ttl=keep"])
def test_what_is_left_to_the_packet_is_what_the_input_does_not_say(
    input: str, option: str, expected: tuple[int, int]
) -> None:
    leg = leg_of(f"=:=%eth1{option}", input)
    assert (leg.port, leg.prefix) == expected


def test_an_entry_has_source_vlan_and_protocol() -> None:
    entry = compile_one(parse_rule("10.1.1.9@232.1.1.1:esp%eth0,vlan=5", ["=:esp%eth1"]))
    assert (entry.source, entry.vlan, entry.protocol) == (mapped(IPv4Address("10.1.1.9")), 5, ESP)


def test_a_pattern_has_an_entry_for_each_open_interface_that_it_matches() -> None:
    rule = parse_rule("239.1.1.1:5000%eth+", ["=:=%eth1"])
    entries = compile_rule(rule, SLOTS, 0, [0], open={"eth0": 3, "eth1": 4, "wlan0": 6})
    assert {entry.ingress: bool(entry.legs[0].flags & LegFlag.SPLIT_HORIZON) for entry in entries} == {
        3: False,
        4: True,  # it would go back where it came from
    }
    assert compile_rule(rule, SLOTS, 0, [0]) == ()


def test_a_name_comes_before_a_pattern_and_a_longer_pattern_before_a_shorter_one() -> None:
    made = [parse_rule(f"239.1.1.1:5000%{name}", ["10.0.0.1:5%eth2"]) for name in ("e+", "eth+", "eth0")]
    compiled = [(rule, compile_rule(rule, SLOTS, 0, [0], open={"eth0": 3, "eth1": 4, "em1": 6})) for rule in made]
    for order in (compiled, compiled[::-1]):
        owners = {entry.ingress: entry.id for entry in distinct(order)}
        assert owners == {3: int(made[2].id, 16), 4: int(made[1].id, 16), 6: int(made[0].id, 16)}


def test_workers_that_share_a_rule_share_its_rate() -> None:
    shared = compile_one(parse_rule("239.1.0.0/16:*%eth0", ["=:=%eth1,rate=10pps"]), workers=3)
    alone = compile_one(parse_rule(INPUT, ["=:=%eth1,rate=10pps"]), workers=3)
    assert (shared.legs[0].rate, alone.legs[0].rate) == (4, 10)


def test_addresses_are_128_bits_wide() -> None:
    assert mapped(IPv4Address("239.1.2.3")) == IPv6Address("::ffff:239.1.2.3").packed
    assert mapped(IPv6Address("ff3e::1")) == IPv6Address("ff3e::1").packed


def test_a_link_is_read_as_it_is_packed() -> None:
    link = Link(mapped(IPv4Address("10.0.0.1")), bytes(15) + b"\1", bytes(15) + b"\2", b"\1\2\3\4\5\6", 0)
    assert Link.unpack(link.packed) == link
    assert Link.unpack(Link().packed) == Link()


def test_an_entry_needs_every_interface_and_every_counter() -> None:
    rule = parse_rule(INPUT, [OUTPUT])
    with pytest.raises(KeyError, match="eth1"):
        compile_rule(rule, {"eth0": 0}, 0, [0])
    with pytest.raises(KeyError, match="eth0"):
        compile_rule(rule, {"eth1": 0}, 0, [0])
    for output_counters in ([], [0, 1]):
        with pytest.raises(ValueError, match="zip"):
            compile_rule(rule, {"eth0": 0, "eth1": 1}, 0, output_counters)


# --- the native table ------------------------------------------------------------------------------------------------


def packed(entries: list[Entry]) -> bytes:
    return b"".join(entry.packed for entry in entries)


def compiled(rule: Rule, counter: int = 0) -> list[Entry]:
    names = sorted({output.interface for output in rule.outputs} | {rule.input.interface})
    slots = {name: number for number, name in enumerate(names)}
    counters = range(len(rule.outputs))
    return list(compile_rule(rule, slots, counter, counters, workers=2, open={rule.input.interface[:3]: 9}))


GOOD = compile_one(parse_rule(INPUT, [OUTPUT]))


def test_both_sides_mean_the_same_by_the_same_numbers(native: ModuleType) -> None:
    assert {way.name: way.value for way in Way} == native.WAY_NUMBERS
    assert {flag.name: flag.value for flag in LegFlag} == native.LEG_FLAGS
    assert {unit.name: unit.value for unit in RateUnit} == native.RATE_UNITS
    assert (RULE_RECORD.size, OUTPUT_RECORD.size) == (native.RULE_RECORD_SIZE, native.OUTPUT_RECORD_SIZE)
    assert LINK_RECORD.size == native.LINK_SIZE


def check_not_a_description(native: ModuleType, description: bytes) -> None:
    with pytest.raises(OSError, match="Invalid argument") as refusal:
        native.rules_in(description)
    assert refusal.value.errno == errno.EINVAL


@given(rules())
def test_the_native_table_takes_what_is_compiled(native: ModuleType, rule: Rule) -> None:
    entries = compiled(rule)
    assert native.rules_in(packed(entries)) == len(entries)


@given(rules(), st.data())
def test_the_native_table_refuses_a_truncated_description(native: ModuleType, rule: Rule, data: st.DataObject) -> None:
    description = packed(compiled(rule))
    if description:
        check_not_a_description(native, description[: data.draw(st.integers(1, len(description) - 1))])


def test_the_native_table_refuses_an_input_twice(native: ModuleType) -> None:
    check_not_a_description(native, packed([GOOD, replace(GOOD, counter=9)]))
    others = [
        replace(GOOD, port=5001),
        replace(GOOD, port=0),
        replace(GOOD, ingress=9),
        replace(GOOD, vlan=5),
        replace(GOOD, source=mapped(IPv4Address("10.0.0.1"))),
        replace(GOOD, prefix=112, group=mapped(IPv4Address("239.1.0.0"))),
    ]
    assert native.rules_in(packed([GOOD, *others])) == 1 + len(others)


@pytest.mark.parametrize(
    "spoilt",
    [
        {"legs": ()},
        {"ingress": 64},
        {"ingress": 65535},
        {"counter": RULES_MAX},
        {"counter": 2**32 - 1},
        {"prefix": 129},
        {"prefix": 112},  # bits behind it
        {"vlan": 4096},
        {"protocol": 6},
        {"protocol": ESP},  # with a port
    ],
)
def test_the_native_table_refuses_a_rule_out_of_range(native: ModuleType, spoilt: dict[str, object]) -> None:
    check_not_a_description(native, replace(GOOD, **spoilt).packed)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "spoilt",
    [
        {"egress": 64},
        {"egress": 65535},
        {"counter": OUTPUTS_MAX},
        {"counter": 2**32 - 1},
        {"way": 7},
        {"way": Way.UDP6},  # of an IPv4 address
        {"prefix": 129},
        {"dscp": 64},
        {"rate_unit": 3},
        {"rate": 1},  # of no unit
        {"flags": 64},
    ],
)
def test_the_native_table_refuses_an_output_out_of_range(native: ModuleType, spoilt: dict[str, int]) -> None:
    bad = replace(GOOD.legs[0], **spoilt)  # type: ignore[arg-type]
    check_not_a_description(native, replace(GOOD, legs=(GOOD.legs[0], bad)).packed)


def test_the_native_table_takes_as_many_outputs_as_a_rule_may_have(native: ModuleType) -> None:
    legs = tuple(replace(GOOD.legs[0], counter=n) for n in range(RULE_OUTPUTS_MAX + 1))
    assert native.rules_in(replace(GOOD, legs=legs[:-1]).packed) == 1
    check_not_a_description(native, replace(GOOD, legs=legs).packed)


def test_the_native_table_refuses_a_count_of_outputs_that_is_not_there(native: ModuleType) -> None:
    rule = RULE_RECORD.pack(GOOD.group, ANY, 0, 5000, 0, 2, 0, EXACT, UDP, 0)
    first, second = (replace(GOOD.legs[0], counter=n).packed for n in (1, 2))
    assert len(first) == OUTPUT_RECORD.size
    assert native.rules_in(rule + first + second) == 1
    check_not_a_description(native, rule)
    check_not_a_description(native, rule + first)
    check_not_a_description(native, rule + first + second + b"\0")
    check_not_a_description(native, rule + first + first)  # counted in one place


def test_the_native_table_takes_as_many_rules_as_there_are_counters(native: ModuleType) -> None:
    many = [replace(GOOD, group=mapped(IPv4Address(0xEF000000 + n)), counter=n) for n in range(RULES_MAX)]
    assert native.rules_in(packed(many)) == RULES_MAX
    check_not_a_description(native, packed([*many, replace(GOOD, port=5001)]))

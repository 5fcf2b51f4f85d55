"""Rules: the text form and its refusals, ids, owners, the set, and the compiled entry that the native table reads."""

from __future__ import annotations

import errno
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address
from types import ModuleType

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mcrelay.errors import RuleError
from mcrelay.limits import OUTPUTS_MAX, RULE_OUTPUTS_MAX, RULES_MAX
from mcrelay.rules import (
    OUTPUT_RECORD,
    RULE_RECORD,
    Entry,
    Input,
    Leg,
    Output,
    Rule,
    RuleSet,
    check_name,
    compile_rule,
    mapped,
    parse_input,
    parse_output,
    parse_rule,
)

INPUT = "239.1.1.1:5000%eth0"
OUTPUT = "239.2.2.2:6000%eth1"

# --- what may be written ---------------------------------------------------------------------------------------------

ports = st.integers(1, 65535)
groups = st.integers(0xE0000000, 0xEFFFFFFF).map(IPv4Address)
# What the kernel takes for an interface's name, less what the text form itself uses.
interfaces = (
    st.text(st.characters(exclude_categories=("Cc", "Cs", "Z"), exclude_characters="/:%,@"), min_size=1, max_size=15)
    .filter(lambda name: len(name.encode()) <= 15)
    .filter(lambda name: name not in (".", ".."))
)
inputs = st.builds(Input, groups, ports, interfaces)
outputs = st.builds(
    Output, st.integers(1, 0xFFFFFFFE).map(IPv4Address), ports, interfaces, st.none() | st.integers(1, 255)
)


@given(inputs)
def test_an_input_reads_as_it_is_written(value: Input) -> None:
    assert parse_input(str(value)) == value


@given(outputs)
def test_an_output_reads_as_it_is_written(value: Output) -> None:
    assert parse_output(str(value)) == value


@given(inputs, st.lists(outputs, min_size=1, max_size=5, unique_by=lambda o: (o.address, o.port, o.interface)))
def test_a_rule_reads_as_it_is_written(value: Input, legs: list[Output]) -> None:
    legs = [leg for leg in legs if (leg.address, leg.port, leg.interface) != (value.group, value.port, value.interface)]
    if legs:
        rule = parse_rule(str(value), map(str, legs))
        assert rule == Rule(value, tuple(legs))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("224.0.0.0:1%a", Input(IPv4Address("224.0.0.0"), 1, "a")),
        ("239.255.255.255:65535%eth0.100-abcdefg", None),  # 16 characters
        ("239.255.255.255:65535%eth0.100-abcdef", Input(IPv4Address("239.255.255.255"), 65535, "eth0.100-abcdef")),
        ("239.1.1.1:5000%veth@if2", None),  # '@' is what ip(8) prints, not part of the name
        ("239.1.1.1:5000%...", Input(IPv4Address("239.1.1.1"), 5000, "...")),
    ],
)
def test_inputs_at_the_edge(text: str, expected: Input | None) -> None:
    if expected is None:
        with pytest.raises(RuleError):
            parse_input(text)
    else:
        assert parse_input(text) == expected


valid_texts = inputs.map(str) | outputs.map(str)


@st.composite
def spoilt_texts(draw: st.DrawFn) -> str:
    """A valid text with one character more, less or changed, or any text at all."""
    text: str = draw(valid_texts | st.text(max_size=40))
    at = draw(st.integers(0, len(text)))
    inserted: str = draw(
        st.sampled_from(["", *"%:,=@/[]+-*._ 09a\n\0", "\u0661", "\u00e9", "\udcff", "::", ",ttl=", "ttl"])
    )
    return text[:at] + inserted + text[at + draw(st.integers(0, 1)) :]


@given(spoilt_texts(), st.sampled_from([parse_input, parse_output]))
@example("", parse_input)
@example("%", parse_output)
@example(",", parse_output)
def test_any_text_is_read_in_its_canonical_form_or_refused_by_its_text(
    text: str, parse: Callable[[str], Input | Output]
) -> None:
    try:
        value = parse(text)
    except RuleError as error:
        refusal = error
    else:
        assert parse(str(value)) == value
        return
    assert repr(text) in refusal.message
    assert refusal.hint
    assert "\n" not in str(refusal)


# --- what is refused, and how ----------------------------------------------------------------------------------------

# (text, what is said of it, what is said to be right)
REFUSED_ADDRESSES = [
    ("example.org:5000%eth0", "'example.org' is not an IP address", "for example 239.1.1.1"),
    ("239.1.1.x:5000%eth0", "'239.1.1.x' is not an IP address", "for example 239.1.1.1"),
    ("239.1.1:5000%eth0", "'239.1.1' is not an IP address", "for example 239.1.1.1"),
    ("239.1.1.1.1:5000%eth0", "'239.1.1.1.1' is not an IP address", "for example 239.1.1.1"),
    ("239.1.1.256:5000%eth0", "'239.1.1.256' is not an IP address", "for example 239.1.1.1"),
    ("239.001.1.1:5000%eth0", "'239.001.1.1' is not an IP address", "for example 239.1.1.1"),
    ("239.1.1.01:5000%eth0", "'239.1.1.01' is not an IP address", "for example 239.1.1.1"),
    ("0xef010101:5000%eth0", "'0xef010101' is not an IP address", "for example 239.1.1.1"),
    ("4009754625:5000%eth0", "'4009754625' is not an IP address", "for example 239.1.1.1"),
    ("239.1.1.\u0661:5000%eth0", "'239.1.1.\u0661' is not an IP address", "for example 239.1.1.1"),
    (" 239.1.1.1:5000%eth0", "' 239.1.1.1' is not an IP address", "for example 239.1.1.1"),
    ("239.1.1.1 :5000%eth0", "'239.1.1.1 ' is not an IP address", "for example 239.1.1.1"),
    (":5000%eth0", "'' is not an IP address", "for example 239.1.1.1"),
    ("[]:5000%eth0", "'[]' is not an IP address", "for example 239.1.1.1"),
    ("[[239.1.1.1]:5000%eth0", "'[[239.1.1.1]' is not an IP address", "for example 239.1.1.1"),
    ("[ff3e::1]:5000%eth0", "IPv6 is not supported yet", "use IPv4"),
    ("[ff3e::1]%eth0", "IPv6 is not supported yet", "use IPv4"),
    ("ff3e::1:5000%eth0", "IPv6 is not supported yet", "use IPv4"),
    ("ff3e::1%eth0", "IPv6 is not supported yet", "use IPv4"),
    ("[fe80::1%eth0]:5000%eth1", "IPv6 is not supported yet", "use IPv4"),
    ("[::ffff:239.1.1.1]:5000%eth0", "IPv6 is not supported yet", "use IPv4"),
]
REFUSED_PORTS = [
    (f"239.1.1.1:{port}%eth0", f"port {port!r} is not possible", "a number from 1 to 65535")
    for port in ("0", "65536", "-1", "+5", "0x10", "5e3", "5.0", "5_000", " 5000", "\u0661\u0662", "", "5000000", "a")
]
REFUSED_INTERFACES = [
    ("239.1.1.1:5000", "names no interface", "%INTERFACE"),
    ("239.1.1.1:5000$eth0", "names no interface", "%INTERFACE"),
    ("", "names no interface", "%INTERFACE"),
    ("239.1.1.1:5000%", "'' is not an interface name", "ip -brief link"),
    ("239.1.1.1:5000%abcdefghijklmnop", "'abcdefghijklmnop' is not an interface name", "ip -brief link"),
    # 15 characters, but the kernel counts bytes.
    ("239.1.1.1:5000%abcdefghijklmn\u00e9", "'abcdefghijklmn\u00e9' is not an interface name", "ip -brief link"),
    ("239.1.1.1:5000%eth/0", "'eth/0' is not an interface name", "ip -brief link"),
    ("239.1.1.1:5000%eth:0", "'eth:0' is not an interface name", "ip -brief link"),
    ("239.1.1.1:5000%eth 0", "'eth 0' is not an interface name", "ip -brief link"),
    ("239.1.1.1:5000%eth0\n", "'eth0\\n' is not an interface name", "ip -brief link"),
    ("239.1.1.1:5000%eth\0", "'eth\\x00' is not an interface name", "ip -brief link"),
    # As a command line in another encoding is read; no process can be told of it in JSON.
    ("239.1.1.1:5000%eth\udcff", "'eth\\udcff' is not an interface name", "ip -brief link"),
    ("239.1.1.1:5000%.", "'.' is not an interface name", "ip -brief link"),
    ("239.1.1.1:5000%..", "'..' is not an interface name", "ip -brief link"),
    ("239.1.1.1%eth0", "has no port", ":PORT"),
    ("239.1.1.1;5000%eth0", "has no port", ":PORT"),
    ("%eth0", "has no port", ":PORT"),
]
REFUSED_EITHER = [*REFUSED_ADDRESSES, *REFUSED_PORTS, *REFUSED_INTERFACES]
REFUSED_INPUTS = [
    ("10.1.1.1:5000%eth0", "10.1.1.1 is not a multicast group", "a group in 224.0.0.0/4"),
    ("223.255.255.255:5000%eth0", "223.255.255.255 is not a multicast group", "a group in 224.0.0.0/4"),
    ("240.0.0.0:5000%eth0", "240.0.0.0 is not a multicast group", "a group in 224.0.0.0/4"),
    ("255.255.255.255:5000%eth0", "255.255.255.255 is not a multicast group", "a group in 224.0.0.0/4"),
    ("0.0.0.0:5000%eth0", "0.0.0.0 is not a multicast group", "a group in 224.0.0.0/4"),
    ("10.1.1.1@239.1.1.1:5000%eth0", "a source is not supported yet", "leave out '10.1.1.1@'"),
    ("nobody@239.1.1.1:5000%eth0", "'nobody' is not an IP address", "for example 239.1.1.1"),
    ("@239.1.1.1:5000%eth0", "'' is not an IP address", "for example 239.1.1.1"),
    ("239.1.1.0/24:5000%eth0", "a group prefix is not supported yet", "one group per rule"),
    ("239.1.1.0/32:5000%eth0", "a group prefix is not supported yet", "one group per rule"),
    ("239.1.1.0/33:5000%eth0", "prefix '/33' is not possible", "/0 to /32"),
    ("239.1.1.0/-1:5000%eth0", "prefix '/-1' is not possible", "/0 to /32"),
    ("239.1.1.0/:5000%eth0", "prefix '/' is not possible", "/0 to /32"),
    ("239.1.1.1:*%eth0", "any port is not supported yet", "one port per rule"),
]
REFUSED_OUTPUTS = [
    ("0.0.0.0:5000%eth0", "cannot send to 0.0.0.0", "a group or a host's unicast address"),
    ("255.255.255.255:5000%eth0", "cannot send to 255.255.255.255", "a group or a host's unicast address"),
    ("239.1.1.0/24:5000%eth0", "an output has no prefix", "ADDRESS:PORT%INTERFACE"),
    ("239.1.1.1:*%eth0", "port '*' is not possible", "a number from 1 to 65535"),
    ("10.1.1.1@239.1.1.1:5000%eth0", "'10.1.1.1@239.1.1.1' is not an IP address", "for example 239.1.1.1"),
    *(
        (f"{OUTPUT},ttl={ttl}", f"ttl {ttl!r} is not possible", "a number from 1 to 255")
        for ttl in ("0", "256", "abc", "", "-1", "+1", " 1", "1.0", "\u0661", "1=2")
    ),
    (f"{OUTPUT},ttl=1,ttl=2", "ttl is given twice", "give it once"),
    (f"{OUTPUT},tos=4", "unknown option 'tos=4'", "ttl=N"),
    (f"{OUTPUT},TTL=4", "unknown option 'TTL=4'", "ttl=N"),
    (f"{OUTPUT},ttl", "unknown option 'ttl'", "ttl=N"),
    (f"{OUTPUT},", "unknown option ''", "ttl=N"),
    (f"{OUTPUT}, ttl=4", "unknown option ' ttl=4'", "ttl=N"),
]


def check_refusal(error: RuleError, text: str, reason: str, correction: str) -> None:
    assert repr(text) in error.message
    assert reason in error.message
    assert correction in error.hint
    assert error.code == "bad_rule"
    assert error.exit_code == 65


@pytest.mark.parametrize(("text", "reason", "correction"), [*REFUSED_EITHER, *REFUSED_INPUTS])
def test_an_input_is_refused(text: str, reason: str, correction: str) -> None:
    with pytest.raises(RuleError) as refusal:
        parse_input(text)
    check_refusal(refusal.value, text, reason, correction)


@pytest.mark.parametrize(("text", "reason", "correction"), [*REFUSED_EITHER, *REFUSED_OUTPUTS])
def test_an_output_is_refused(text: str, reason: str, correction: str) -> None:
    with pytest.raises(RuleError) as refusal:
        parse_output(text)
    check_refusal(refusal.value, text, reason, correction)


@pytest.mark.parametrize("parse", [parse_input, parse_output])
def test_two_ports_are_not_taken_for_ipv6(parse: Callable[[str], object]) -> None:
    with pytest.raises(RuleError) as refusal:
        parse("239.1.1.1:5000:6000%eth0")
    assert "IPv6" not in refusal.value.message


@pytest.mark.parametrize(
    ("input", "outputs", "name", "offending", "reason", "correction"),
    [
        (INPUT, [], None, INPUT, "has no output", "give at least one"),
        (INPUT, [INPUT], None, INPUT, "where the input comes from", "another group, port or interface"),
        (INPUT, [OUTPUT, f"{INPUT},ttl=3"], None, f"{INPUT},ttl=3", "would feed itself", "another group"),
        (INPUT, [OUTPUT, OUTPUT], None, OUTPUT, "is given twice", "once"),
        (INPUT, [OUTPUT, f"{OUTPUT},ttl=3"], None, f"{OUTPUT},ttl=3", "is given twice", "once"),
        (INPUT, ["10.0.0.1:6000%eth1", "nonsense"], None, "nonsense", "names no interface", "%INTERFACE"),
        ("nonsense", [OUTPUT], None, "nonsense", "names no interface", "%INTERFACE"),
        (
            INPUT,
            [f"10.0.{n // 256}.{n % 256}:6000%eth1" for n in range(RULE_OUTPUTS_MAX + 1)],
            None,
            INPUT,
            f"has {RULE_OUTPUTS_MAX + 1} outputs",
            f"at most {RULE_OUTPUTS_MAX}",
        ),
        (INPUT, [OUTPUT], "a b", "a b", "is not possible", "letters, digits"),
    ],
)
def test_a_rule_is_refused(
    input: str, outputs: list[str], name: str | None, offending: str, reason: str, correction: str
) -> None:
    with pytest.raises(RuleError) as refusal:
        parse_rule(input, outputs, name)
    check_refusal(refusal.value, offending, reason, correction)


def test_a_rule_may_have_as_many_outputs_as_an_engine_takes() -> None:
    texts = [f"10.0.{n // 256}.{n % 256}:6000%eth1" for n in range(1, RULE_OUTPUTS_MAX + 1)]
    assert len(parse_rule(INPUT, texts).outputs) == RULE_OUTPUTS_MAX


def test_the_same_group_may_go_on_to_another_port_or_interface() -> None:
    rule = parse_rule(INPUT, ["239.1.1.1:5001%eth0", "239.1.1.1:5000%eth1", "239.1.1.2:5000%eth0"])
    assert len(rule.outputs) == 3


@pytest.mark.parametrize(
    "name", ["a", "0", "feed-a", "Feed.A_1", "x" * 64, "0123456789a", "0123456789ABC", "g23456789abc"]
)
def test_a_name_is_possible(name: str) -> None:
    check_name(name)
    assert parse_rule(INPUT, [OUTPUT], name).label == name


@pytest.mark.parametrize(
    ("name", "reason", "correction"),
    [
        ("", "name is empty", "leave the name out"),
        *(
            (name, f"name {name!r} is not possible", "starting with a letter or digit")
            for name in ("-a", ".a", "_a", "a b", " a", "a\n", "a/b", "a%b", "\u00e4", "\u0661", "x" * 65)
        ),
        ("0123456789ab", "looks like a rule's id", "another"),
        ("ffffffffffff", "looks like a rule's id", "another"),
    ],
)
def test_a_name_is_refused(name: str, reason: str, correction: str) -> None:
    with pytest.raises(RuleError) as refusal:
        parse_rule(INPUT, [OUTPUT], name)
    assert reason in refusal.value.message
    if correction != "another":
        assert correction in refusal.value.hint
    assert refusal.value.hint


# --- id and owners ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("input", "rule_id"),
    [("239.1.1.1:5000%eth0", "2cddfa0cacfa"), ("224.0.0.1:1%ens3.100", "9981566964e2")],
)
def test_an_id_is_the_same_on_every_machine_and_in_every_release(input: str, rule_id: str) -> None:
    assert parse_rule(input, [OUTPUT]).id == rule_id


@given(inputs, outputs, outputs, st.none() | st.from_regex(r"[g-z][a-z]{0,9}", fullmatch=True))
def test_an_id_depends_on_the_input_alone(value: Input, first: Output, second: Output, name: str | None) -> None:
    assert Rule(value, (first,)).id == Rule(value, (second, first), name).id


@given(st.lists(inputs, min_size=2, max_size=30, unique=True))
def test_different_inputs_have_different_ids(values: list[Input]) -> None:
    assert len({Rule(value, ()).id for value in values}) == len(values)


@given(inputs, outputs, st.integers(1, 64))
def test_one_worker_owns_an_exact_rule(value: Input, output: Output, workers: int) -> None:
    (owner,) = Rule(value, (output,)).owners(workers)
    assert 0 <= owner < workers


@pytest.mark.parametrize("spread", [{"prefix": 24}, {"port": None}])
def test_every_worker_owns_a_rule_without_a_single_destination(spread: dict[str, int | None]) -> None:
    value = replace(parse_input(INPUT), **spread)  # type: ignore[arg-type]
    assert Rule(value, ()).owners(5) == (0, 1, 2, 3, 4)


SEQUENCES: dict[str, Callable[[int], Input]] = {
    "groups": lambda n: Input(IPv4Address(0xEF010000 + n), 5000, "eth0"),
    "ports": lambda n: Input(IPv4Address("239.1.1.1"), 5000 + n, "eth0"),
    "groups and ports": lambda n: Input(IPv4Address(0xEF010000 + n), 5000 + n, "eth0"),
    "every 256th group": lambda n: Input(IPv4Address(0xEF000000 + n * 256), 5000, "eth0"),
    "every second port": lambda n: Input(IPv4Address("239.1.1.1"), 5000 + 2 * n, "eth0"),
}


@pytest.mark.parametrize("workers", [2, 3, 8])
@pytest.mark.parametrize("numbered", SEQUENCES)
def test_rules_numbered_as_people_do_spread_over_workers(numbered: str, workers: int) -> None:
    count = 10_000
    shares = Counter(Rule(SEQUENCES[numbered](n), ()).owners(workers)[0] for n in range(count))
    assert set(shares) == set(range(workers))
    assert min(shares.values()) >= count / workers / 2


# --- the set ---------------------------------------------------------------------------------------------------------


def test_a_set_finds_a_rule_by_name_and_by_id() -> None:
    rules = RuleSet()
    named = parse_rule(INPUT, [OUTPUT], "feed-a")
    nameless = parse_rule("239.1.1.2:5000%eth0", [OUTPUT])
    rules.add(named)
    rules.add(nameless)
    assert rules.find("feed-a") is rules.find(named.id) is named
    assert rules.find(nameless.id) is nameless
    assert nameless.label == nameless.id
    assert list(rules) == [named, nameless]
    with pytest.raises(RuleError, match="no rule is called 'feed-b'") as refusal:
        rules.find("feed-b")
    assert "mcrelay list" in refusal.value.hint


@pytest.mark.parametrize("label", [None, "feed-a"])
def test_a_set_has_one_rule_for_an_input(label: str | None) -> None:
    rules = RuleSet()
    first = parse_rule(INPUT, [OUTPUT], label)
    rules.add(first)
    with pytest.raises(RuleError) as refusal:
        rules.add(parse_rule(INPUT, ["10.0.0.1:7000%eth2"], "other"))
    assert f"input '{INPUT}' already belongs to rule {first.label}" in refusal.value.message
    assert f"mcrelay remove {first.label}" in refusal.value.hint
    assert list(rules) == [first]
    with pytest.raises(RuleError, match="other"):
        rules.find("other")


def test_a_set_has_one_rule_of_a_name() -> None:
    rules = RuleSet()
    first = parse_rule(INPUT, [OUTPUT], "feed-a")
    rules.add(first)
    second = parse_rule("239.1.1.2:5000%eth0", [OUTPUT], "feed-a")
    with pytest.raises(RuleError, match=f"name 'feed-a' already belongs to the rule for '{INPUT}'") as refusal:
        rules.check_addable(second)
    assert "another name" in refusal.value.hint
    assert second.id not in rules


@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(0, 4), st.none() | st.integers(0, 3)),
        max_size=40,
    )
)
def test_a_set_keeps_ids_and_names_unique_through_any_changes(changes: list[tuple[bool, int, int | None]]) -> None:
    rules = RuleSet()
    model: dict[str, Rule] = {}
    for adds, number, name in changes:
        rule = parse_rule(f"239.1.1.{number}:5000%eth0", [OUTPUT], None if name is None else f"name-{name}")
        if adds:
            taken = rule.id in model or (
                rule.name is not None and rule.name in {other.name for other in model.values()}
            )
            try:
                rules.add(rule)
            except RuleError:
                assert taken
            else:
                assert not taken
                model[rule.id] = rule
        elif rule.id in model:
            assert rules.remove(rule.id) is model.pop(rule.id)
        else:
            with pytest.raises(KeyError):
                rules.remove(rule.id)
        assert list(rules) == list(model.values())
        assert len(rules) == len(model)
        for known in model.values():
            assert known.id in rules
            assert rules.find(known.id) is known
            assert known.name is None or rules.find(known.name) is known


# --- the entry -------------------------------------------------------------------------------------------------------


def test_an_entry_is_the_rule_in_numbers() -> None:
    rule = parse_rule(INPUT, [OUTPUT, "10.9.0.7:7000%eth2,ttl=8"], "feed-a")
    entry = compile_rule(rule, {"eth0": 3, "eth1": 4, "eth2": 5}, 7, [8, 9])
    assert entry == Entry(
        group=bytes.fromhex("00000000000000000000ffffef010101"),
        port=5000,
        ingress=3,
        counter=7,
        legs=(
            Leg(bytes.fromhex("00000000000000000000ffffef020202"), 6000, 4, 0, 8),
            Leg(bytes.fromhex("00000000000000000000ffff0a090007"), 7000, 5, 8, 9),
        ),
    )
    assert entry.packed == b"".join(
        [
            entry.group + struct.pack("=HHHHII", 5000, 3, 2, 0, 7, 0),
            entry.legs[0].address + struct.pack("=HHB3xII", 6000, 4, 0, 8, 0),
            entry.legs[1].address + struct.pack("=HHB3xII", 7000, 5, 8, 9, 0),
        ]
    )


def test_addresses_are_128_bits_wide() -> None:
    assert mapped(IPv4Address("239.1.2.3")) == IPv6Address("::ffff:239.1.2.3").packed
    assert mapped(IPv6Address("ff3e::1")) == IPv6Address("ff3e::1").packed


def test_an_entry_needs_every_interface_and_every_counter() -> None:
    rule = parse_rule(INPUT, [OUTPUT])
    with pytest.raises(KeyError, match="eth1"):
        compile_rule(rule, {"eth0": 0}, 0, [0])
    with pytest.raises(KeyError, match="eth0"):
        compile_rule(rule, {"eth1": 0}, 0, [0])
    for output_counters in ([], [0, 1]):
        with pytest.raises(ValueError, match="zip"):
            compile_rule(rule, {"eth0": 0, "eth1": 1}, 0, output_counters)
    with pytest.raises(RuleError, match="any port"):
        compile_rule(replace(rule, input=replace(rule.input, port=None)), {"eth0": 0, "eth1": 1}, 0, [0])


slots = st.integers(0, 63)
legs = st.builds(
    Leg,
    st.binary(min_size=16, max_size=16),
    ports,
    slots,
    st.integers(0, 255),
    st.integers(0, OUTPUTS_MAX - 1),
)
entries = st.builds(
    Entry,
    st.binary(min_size=16, max_size=16),
    ports,
    slots,
    st.integers(0, RULES_MAX - 1),
    st.lists(legs, min_size=1, max_size=4).map(tuple),
)
unique_entries = st.lists(entries, max_size=20, unique_by=lambda entry: (entry.group, entry.port, entry.ingress))


def packed(rules: list[Entry]) -> bytes:
    return b"".join(entry.packed for entry in rules)


def check_not_a_description(native: ModuleType, description: bytes) -> None:
    with pytest.raises(OSError, match="Invalid argument") as refusal:
        native.rules_in(description)
    assert refusal.value.errno == errno.EINVAL


@given(unique_entries)
def test_the_native_table_takes_what_is_packed(native: ModuleType, rules: list[Entry]) -> None:
    assert native.rules_in(packed(rules)) == len(rules)


@given(unique_entries.filter(bool), st.data())
def test_the_native_table_refuses_a_truncated_description(
    native: ModuleType, rules: list[Entry], data: st.DataObject
) -> None:
    description = packed(rules)
    whole = {len(packed(rules[:n])) for n in range(len(rules) + 1)}
    length = data.draw(st.integers(0, len(description)).filter(lambda n: n not in whole))
    check_not_a_description(native, description[:length])


@given(unique_entries.filter(bool), st.data())
def test_the_native_table_refuses_an_input_twice(native: ModuleType, rules: list[Entry], data: st.DataObject) -> None:
    twin = replace(data.draw(entries), **{f: getattr(rules[0], f) for f in ("group", "port", "ingress")})
    check_not_a_description(native, packed([*rules, twin]))


@pytest.mark.parametrize(
    "spoilt",
    [
        {"legs": ()},
        {"ingress": 64},
        {"ingress": 65535},
        {"counter": RULES_MAX},
        {"counter": 2**32 - 1},
    ],
)
def test_the_native_table_refuses_a_rule_out_of_range(native: ModuleType, spoilt: dict[str, object]) -> None:
    good = Entry(b"\xff" * 16, 5000, 63, RULES_MAX - 1, (Leg(bytes(16), 6000, 1, 0, 0),))
    assert native.rules_in(good.packed) == 1
    check_not_a_description(native, replace(good, **spoilt).packed)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "spoilt", [{"egress": 64}, {"egress": 65535}, {"counter": OUTPUTS_MAX}, {"counter": 2**32 - 1}]
)
def test_the_native_table_refuses_an_output_out_of_range(native: ModuleType, spoilt: dict[str, int]) -> None:
    good = Leg(bytes(16), 6000, 63, 255, OUTPUTS_MAX - 1)
    entry = Entry(b"\xff" * 16, 5000, 0, 0, (good, good))
    assert native.rules_in(entry.packed) == 1
    check_not_a_description(native, replace(entry, legs=(good, replace(good, **spoilt))).packed)  # type: ignore[arg-type]


def test_the_native_table_takes_as_many_outputs_as_a_rule_may_have(native: ModuleType) -> None:
    leg = Leg(bytes(16), 6000, 0, 0, 0)
    entry = Entry(bytes(16), 5000, 0, 0, (leg,) * RULE_OUTPUTS_MAX)
    assert native.rules_in(entry.packed) == 1
    check_not_a_description(native, replace(entry, legs=(leg,) * (RULE_OUTPUTS_MAX + 1)).packed)


def test_the_native_table_refuses_a_count_of_outputs_that_is_not_there(native: ModuleType) -> None:
    rule = RULE_RECORD.pack(bytes(16), 5000, 0, 2, 0, 0, 0)
    output = OUTPUT_RECORD.pack(bytes(16), 6000, 0, 0, 0, 0)
    assert native.rules_in(rule + 2 * output) == 1
    check_not_a_description(native, rule)
    check_not_a_description(native, rule + output)
    check_not_a_description(native, rule + 2 * output + b"\0")


def test_the_native_table_takes_as_many_rules_as_there_are_counters(native: ModuleType) -> None:
    leg = (Leg(bytes(16), 6000, 0, 0, 0),)
    rules = [Entry(n.to_bytes(16, "big"), 5000, 0, n, leg) for n in range(RULES_MAX)]
    assert native.rules_in(packed(rules)) == RULES_MAX
    check_not_a_description(native, packed([*rules, Entry(bytes(16), 5001, 0, 0, leg)]))

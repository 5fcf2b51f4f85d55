"""rules.py: ids, owners, ways, which rule takes what, and the set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from ipaddress import IPv4Address, ip_address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcrelay.errors import RuleError
from mcrelay.rules import Input, Membership, Output, Rule, RuleSet, Target, takes
from mcrelay.ruletext import parse_input, parse_rule
from mcrelay.ways import Way
from tests.unit.rule_strategies import groups4, inputs, interfaces, outputs, ports

INPUT = "239.1.1.1:5000%eth0"
OUTPUT = "239.2.2.2:6000%eth1"

# --- id and owners ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("input", "rule_id"),
    [("239.1.1.1:5000%eth0", "2cddfa0cacfa"), ("224.0.0.1:1%ens3.100", "9981566964e2")],
)
def test_an_id_is_the_same_on_every_machine_and_in_every_release(input: str, rule_id: str) -> None:
    assert parse_rule(input, [OUTPUT]).id == rule_id


@given(inputs(), outputs(), outputs(), st.none() | st.from_regex(r"[g-z][a-z]{0,9}", fullmatch=True))
def test_an_id_depends_on_the_input_alone(value: Input, first: Output, second: Output, name: str | None) -> None:
    assert Rule(value, (first,)).id == Rule(value, (second, first), name).id


@given(st.lists(inputs(), min_size=2, max_size=30, unique=True))
def test_different_inputs_have_different_ids(values: list[Input]) -> None:
    assert len({Rule(value, ()).id for value in values}) == len(values)


@given(st.builds(Input, groups4, ports, interfaces), outputs(), st.integers(1, 64))
def test_one_worker_owns_an_exact_rule(value: Input, output: Output, workers: int) -> None:
    (owner,) = Rule(value, (output,)).owners(workers)
    assert 0 <= owner < workers


@pytest.mark.parametrize("text", ["239.1.1.0/24:5%e", "239.1.1.1:*%e", "239.1.1.1:esp%e", "[ff05::]/16:5%e"])
def test_every_worker_owns_a_rule_without_a_single_destination(text: str) -> None:
    assert Rule(parse_input(text), ()).owners(5) == (0, 1, 2, 3, 4)


def test_one_worker_owns_all_that_goes_to_an_ipv6_address() -> None:
    """Fragments have no ports."""
    owners = {Rule(parse_input(f"[ff05::1]:{port}%e"), ()).owners(5) for port in ("5", "6", "*", "esp")}
    assert len(owners) == 1
    assert len(owners.pop()) == 1


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


# --- what goes where -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("input", "output", "way"),
    [
        (INPUT, OUTPUT, Way.UDP4),
        (INPUT, "10.0.0.1:5%e", Way.UDP4),
        (INPUT, "[ff05::1]:5%e", Way.UDP6),
        (INPUT, "=:=%e", Way.UDP4),
        ("[ff05::1]:5%e", "=:=%f", Way.UDP6),
        (INPUT, "=:=%e,source=10.0.0.9", Way.UDP4),
        (INPUT, "=:=%e,loop", Way.LOOP4),
        ("[ff05::1]:5%e", "=:=%f,loop", Way.LOOP6),
        (INPUT, "=:=%e,source=keep", Way.FRAME),
        (INPUT, "=:=%e,sport=5353", Way.FRAME),
        (INPUT, "255.255.255.255:=%e,source=keep", Way.FRAME),
        (INPUT, "10.0.0.1:5%e,source=keep", Way.RAW4),
        (INPUT, "[2001:db8::1]:5%e,sport=keep", Way.RAW6),
        ("239.1.1.1:esp%e", "=:esp%f", Way.FRAME),
        ("239.1.1.1:esp%e", "10.0.0.1:esp%f", Way.RAW4),
    ],
)
def test_an_output_has_one_way(input: str, output: str, way: Way) -> None:
    rule = parse_rule(input, [output])
    assert rule.way(rule.outputs[0]) is way


@pytest.mark.parametrize(
    ("input", "target", "takes"),
    [
        ("239.1.1.1:5%e", ("239.1.1.1", 32, 5, "e"), True),
        ("239.1.1.1:5%e", ("239.1.1.1", 32, 6, "e"), False),
        ("239.1.1.1:5%e", ("239.1.1.1", 32, 5, "f"), False),
        ("239.1.1.1:5%e", ("239.1.0.0", 16, None, "e"), True),
        ("239.1.0.0/16:5%e", ("239.1.1.1", 32, 5, "e"), True),
        ("239.1.0.0/16:*%e+", ("239.1.1.1", 32, 5, "eth7"), True),
        ("239.1.0.0/16:*%e+", ("239.2.1.1", 32, 5, "eth7"), False),
        ("239.1.0.0/16:*%e", ("239.0.0.0", 8, 5, "e"), True),
        ("239.1.1.1:5%e,vlan=7", ("239.1.1.1", 32, 5, "e"), False),
        ("10.0.0.1@239.1.1.1:5%e", ("239.1.1.1", 32, 5, "e"), True),
        ("10.0.0.1@239.1.1.1:5%e", ("239.1.1.1", 32, 5, "e", "10.0.0.2"), False),
        ("239.1.1.1:5%e,vlan=7", ("239.1.1.1", 32, 5, "e", "10.0.0.1", "udp", 7), True),
        ("239.1.1.1:5%e", ("239.1.1.1", 32, 5, "e", "10.0.0.1", "udp", 7), False),
        ("239.1.1.1:esp%e", ("239.1.1.1", 32, None, "e", "10.0.0.1", "esp"), True),
        ("239.1.1.1:*%e", ("239.1.1.1", 32, None, "e", "10.0.0.1", "esp"), False),
        ("239.1.1.1:esp%e", ("239.1.1.1", 32, 5, "e"), False),
        ("[ff05::1]:5%e", ("ff05::1", 128, 5, "e"), True),
        ("[ff05::1]:5%e", ("239.1.1.1", 32, 5, "e"), False),
    ],
)
def test_what_is_fed_by_what(input: str, target: tuple[Any, ...], takes: bool) -> None:
    address, prefix, port, interface, *rest = target
    source = ip_address(rest[0]) if rest else None
    given = Target(ip_address(address), prefix, port, interface, source, *rest[1:])
    rule = parse_rule(input, ["10.9.9.9:esp%z" if ":esp%" in input else "10.9.9.9:6000%z"])
    assert list(RuleSet.of([rule]).fed_by(given)) == ([rule] if takes else [])


few = st.integers(0, 3)
some_inputs = st.builds(
    lambda host, length, port, interface: parse_input(
        f"239.0.0.{host >> (32 - length) << (32 - length)}{'' if length == 32 else f'/{length}'}:{port}%{interface}"
    ),
    few,
    st.sampled_from([24, 30, 31, 32, 32]),
    st.sampled_from([1, 2, "*"]),
    st.sampled_from(["e", "e+", "f"]),
)


@given(st.lists(some_inputs, max_size=20, unique=True), st.sets(few), some_inputs)
def test_a_set_knows_all_that_a_target_feeds(values: list[Input], gone: set[int], sent: Input) -> None:
    """However it looks them up, and whatever was removed before."""
    made = [Rule(value, ()) for value in values]
    rules = RuleSet.of(made)
    for n, rule in enumerate(made):
        if n % 4 in gone:
            rules.remove(rule.id)
    target = Target(sent.address, 32 if sent.prefix is None else sent.prefix, sent.port, "e")
    found = list(rules.fed_by(target))
    assert len(found) == len({rule.id for rule in found})
    assert {rule.id for rule in found} == {rule.id for rule in rules if takes(rule.input, target)}


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("239.1.1.1:5%e", ["239.1.1.1"]),
        ("10.0.0.1@232.1.1.1:5%e", ["10.0.0.1@232.1.1.1"]),
        ("239.1.1.0/30:*%e", ["239.1.1.0", "239.1.1.1", "239.1.1.2", "239.1.1.3"]),
        ("239.1.0.0/16:*%e", []),
        ("[ff05::4]/127:5%e", ["ff05::4", "ff05::5"]),
        ("10.0.0.1:5%e", []),
        ("255.255.255.255:5%e", []),
    ],
)
def test_what_is_joined(text: str, groups: list[str]) -> None:
    joined = list(parse_input(text).memberships("eth9"))
    assert [membership.text for membership in joined] == groups
    assert all(isinstance(membership, Membership) and membership.interface == "eth9" for membership in joined)


def test_outputs_are_paused_one_by_one_or_all() -> None:
    rule = parse_rule(INPUT, [OUTPUT, "10.0.0.1:5%e,ttl=3", "=:=%f"])

    def paused(which: str | None) -> list[bool]:
        return [output.paused for output in rule.with_paused(which, paused=True).outputs]

    assert paused(None) == [True, True, True]
    assert paused("2") == paused("10.0.0.1:5%e") == paused("10.0.0.1:5%e,ttl=3") == [False, True, False]
    assert rule.with_paused(None, paused=True).with_paused(None, paused=False) == rule
    assert rule.with_paused("1", paused=True).id == rule.id
    for nothing in ("0", "4", "", "10.0.0.2:5%e"):
        with pytest.raises(RuleError, match="has no output") as refusal:
            rule.with_paused(nothing, paused=True)
        assert "10.0.0.1:5%e" in refusal.value.hint


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

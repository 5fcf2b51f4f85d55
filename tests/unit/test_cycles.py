"""cycles.py: which rule sets feed themselves, and what is said of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcrelay.cycles import Heard, check_no_cycle
from mcrelay.errors import RuleError
from mcrelay.rules import Rule, RuleSet, Target
from mcrelay.ruletext import parse_rule


def rules(*texts: str) -> list[Rule]:
    """From 'NAME INPUT OUTPUT...'."""
    return [parse_rule(text.split()[1], text.split()[2:], text.split()[0]) for text in texts]


def check(made: list[Rule], heard: Heard) -> None:
    """Add one after the other, as clients do."""
    there = RuleSet()
    for rule in made:
        there.add(rule)
        check_no_cycle([rule], there.fed_by, heard)


def check_at_once(made: list[Rule], heard: Heard) -> None:
    check_no_cycle(made, RuleSet.of(made).fed_by, heard)


CYCLES: dict[str, tuple[list[str], Heard, str]] = {
    "two rules that translate": (
        ["a 239.1.1.1:5000%eth0 239.2.2.2:6000%eth1", "b 239.2.2.2:6000%eth1 239.1.1.1:5000%eth0"],
        {},
        "rule b closes a cycle: 239.2.2.2:6000%eth1 -> 239.1.1.1:5000%eth0 (rule b),"
        " 239.1.1.1:5000%eth0 -> 239.2.2.2:6000%eth1 (rule a)",
    ),
    "one of two outputs": (
        ["a 239.1.1.1:1%e 10.0.0.1:1%f 239.1.1.2:1%e", "b 239.1.1.2:1%e 10.0.0.2:1%f 239.1.1.1:1%e"],
        {},
        "239.1.1.1:1%e (rule b)",
    ),
    "three rules, one of which keeps the address": (
        ["a 239.1.1.1:1%e 239.1.1.1:1%f", "b 239.1.1.1:1%f 239.1.1.2:1%g", "c 239.1.1.2:1%g 239.1.1.1:1%e"],
        {},
        "rule c closes a cycle",
    ),
    "both ends of a veth pair": (
        ["a 239.1.1.1:1%v0 239.1.1.1:1%v1"],
        {"v0": ["v1"], "v1": ["v0"]},
        "%v1, heard at v0 (rule a)",
    ),
    "the loopback": (
        ["a 239.1.1.1:1%lo 239.1.1.1:1%eth0", "b 239.1.1.1:1%eth0 239.1.1.1:1%lo"],
        {"lo": ["lo"]},
        "rule b closes a cycle",
    ),
    "by way of a veth pair": (
        ["a 239.1.1.1:1%e 239.1.1.1:1%v0", "b 239.1.1.1:1%v1 239.1.1.1:1%e"],
        {"v0": ["v1"], "v1": ["v0"]},
        "rule b closes a cycle",
    ),
    "an output that follows the input": (
        ["a 239.1.1.1:1%e =:=%f,source=keep", "b 239.1.1.1:1%f 239.1.1.2:1%e", "c 239.1.1.2:1%e 239.1.1.1:=%e"],
        {},
        "rule c closes a cycle",
    ),
    "by way of a prefix": (
        ["a 239.1.1.1:1%e 239.2.1.1:1%f", "b 239.2.0.0/16:*%f 239.1.1.1:1%e"],
        {},
        "rule b closes a cycle",
    ),
    "from prefix to prefix": (
        ["a 239.1.0.0/16:*%e 239.2.0.0/16:=%f", "b 239.2.0.0/16:*%f 239.1.0.0/16:=%e"],
        {},
        "rule b closes a cycle",
    ),
    "by way of a pattern": (
        ["a 239.1.1.1:1%e 239.1.1.2:1%eth7", "b 239.1.1.2:1%eth+ 239.1.1.1:1%e"],
        {},
        "rule b closes a cycle",
    ),
    "IPv6 and back": (
        ["a 239.1.1.1:1%e [ff05::1]:1%f", "b [ff05::1]:1%f 239.1.1.1:1%e"],
        {},
        "rule b closes a cycle: [ff05::1]:1%f -> 239.1.1.1:1%e (rule b)",
    ),
    "a long one": (
        [f"r{n} 239.1.1.{n}:1%e 239.1.1.{(n + 1) % 20}:1%e" for n in range(20)],
        {},
        "12 more",
    ),
}


@pytest.mark.parametrize(("texts", "heard", "words"), CYCLES.values(), ids=CYCLES)
def test_a_cycle_is_refused_and_spelled_out(texts: list[str], heard: Heard, words: str) -> None:
    made = rules(*texts)
    check(made[:-1], heard)
    with pytest.raises(RuleError) as refusal:
        check(made, heard)
    assert words in refusal.value.message
    assert refusal.value.hint
    with pytest.raises(RuleError, match="closes a cycle"):
        check_at_once(made, heard)
    # Whichever of them comes last.
    for turn in range(1, len(made)):
        with pytest.raises(RuleError, match="closes a cycle"):
            check(made[turn:] + made[:turn], heard)


@pytest.mark.parametrize(
    "texts",
    [
        ["a 224.0.0.251:5353%e 224.0.0.251:5353%f", "b 224.0.0.251:5353%f 224.0.0.251:5353%e"],
        [
            "a 224.0.0.251:5353%e 224.0.0.251:5353%f 224.0.0.251:5353%g",
            "b 224.0.0.251:5353%f 224.0.0.251:5353%e 224.0.0.251:5353%g",
            "c 224.0.0.251:5353%g 224.0.0.251:5353%e 224.0.0.251:5353%f",
        ],
        ["a 239.1.1.1:1%e 239.1.1.2:1%e", "b 239.1.1.2:1%e 239.1.1.3:1%e"],
        ["a 239.1.1.1:1%e 239.1.1.2:1%f", "b 239.1.1.2:2%f 239.1.1.1:1%e"],
        ["a 239.1.1.1:1%e 239.1.1.2:1%f", "b 239.1.1.2:1%g 239.1.1.1:1%e"],
        ["a 239.1.0.0/16:*%e =:=%f", "b 239.1.0.0/16:*%f =:=%e"],
        ["a 239.1.1.1:1%eth+ =:=%eth0 =:=%eth1"],
        ["a 239.1.1.1:1%e 239.1.1.2:1%f,source=10.0.0.1", "b 10.0.0.2@239.1.1.2:1%f 239.1.1.1:1%e"],
        ["a 239.1.1.1:1%e 239.1.1.2:1%f", "b 239.1.1.2:1%f,vlan=7 239.1.1.1:1%e"],
    ],
    ids=[
        "both ways",
        "between three segments",
        "a chain",
        "another port",
        "another interface",
        "a prefix both ways",
        "a pattern and its interfaces",
        "another source",
        "another VLAN",
    ],
)
def test_what_is_no_cycle_is_taken(texts: list[str]) -> None:
    check(rules(*texts), {"v0": ["v1"]})
    check_at_once(rules(*texts), {"v0": ["v1"]})


def chain(length: int) -> list[Rule]:
    groups = [f"239.{n >> 16}.{n >> 8 & 255}.{n & 255}:1%e" for n in range(length + 1)]
    return [parse_rule(groups[n], [groups[n + 1]]) for n in range(length)]


def test_a_long_chain_is_looked_at_once() -> None:
    """In any order; and closed, it is found."""
    made = chain(10_000)
    looked_at = 0

    def find(target: Target) -> Iterator[Rule]:
        nonlocal looked_at
        looked_at += 1
        return there.fed_by(target)

    there = RuleSet.of(made)
    check_no_cycle(made[::-1], find, {})
    check_no_cycle(made, find, {})
    assert looked_at < 100_000
    closing = parse_rule("239.0.39.16:1%e", ["239.0.0.0:1%e"])
    there.add(closing)
    with pytest.raises(RuleError, match="9993 more"):
        check_no_cycle([*made, closing], find, {})


links = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.booleans()), max_size=12)


@given(links)
def test_it_finds_what_trying_all_ways_finds(edges: list[tuple[int, int, bool]]) -> None:
    """Six rules for the groups 0 to 5; an edge goes to one, by an interface where that makes a cycle one or not."""
    outputs: dict[int, list[str]] = {n: ["10.0.0.1:1%z"] for n in range(6)}
    for source, target, counts in edges:
        # Of the same group by another interface: counts only where the ends hear each other.
        text = f"239.1.1.1:1%{'v' if counts else 'w'}{target}"
        if source != target and text not in outputs[source]:
            outputs[source].append(text)
    made = [parse_rule(f"239.1.1.1:1%w{n}", outputs[n]) for n in range(6)]
    heard = {f"v{n}": [f"w{n}"] for n in range(6)}
    wanted = any(counts and source != target and reaches(target, source, edges) for source, target, counts in edges)
    try:
        check_at_once(made, heard)
        found = False
    except RuleError:
        found = True
    assert found == wanted


def reaches(start: int, end: int, edges: list[tuple[int, int, bool]]) -> bool:
    seen, left = {start}, [start]
    while left:
        at = left.pop()
        for source, target, _counts in edges:
            if source == at and target not in seen:
                seen.add(target)
                left.append(target)
    return end in seen

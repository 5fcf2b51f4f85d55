"""cycles.py: which rule sets feed themselves, and what is said of them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from ipaddress import IPv4Address
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcrelay.cycles import Cycle, Heard, check_no_cycle, look_for_cycle
from mcrelay.errors import RuleError
from mcrelay.rules import Rule, RuleSet, Target
from mcrelay.ruletext import parse_rule


def by(ends: Mapping[str, Iterable[str]]) -> Heard:
    """What is sent by an interface is heard at those."""
    return lambda target: [target._replace(interface=end) for end in ends.get(target.interface, ())]


NOTHING: Final = by({})


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


def at_home(target: Target) -> list[Target]:
    return [target._replace(interface="lo")] if target.address == IPv4Address("192.0.2.1") else []


def tagged(target: Target) -> list[Target]:
    return [target._replace(interface="v1", vlan=7)] if target.interface == "v0.7" else []


CYCLES: dict[str, tuple[list[str], Heard, str]] = {
    "two rules that translate": (
        ["a 239.1.1.1:5000%eth0 239.2.2.2:6000%eth1", "b 239.2.2.2:6000%eth1 239.1.1.1:5000%eth0"],
        NOTHING,
        "rule b closes a cycle: 239.2.2.2:6000%eth1 -> 239.1.1.1:5000%eth0 (rule b),"
        " 239.1.1.1:5000%eth0 -> 239.2.2.2:6000%eth1 (rule a)",
    ),
    "one of two outputs": (
        ["a 239.1.1.1:1%e 10.0.0.1:1%f 239.1.1.2:1%e", "b 239.1.1.2:1%e 10.0.0.2:1%f 239.1.1.1:1%e"],
        NOTHING,
        "239.1.1.1:1%e (rule b)",
    ),
    "three rules, one of which keeps the address": (
        ["a 239.1.1.1:1%e 239.1.1.1:1%f", "b 239.1.1.1:1%f 239.1.1.2:1%g", "c 239.1.1.2:1%g 239.1.1.1:1%e"],
        NOTHING,
        "rule c closes a cycle",
    ),
    "both ends of a veth pair": (
        ["a 239.1.1.1:1%v0 239.1.1.1:1%v1"],
        by({"v0": ["v1"], "v1": ["v0"]}),
        "%v1, heard at v0 (rule a)",
    ),
    "the loopback": (
        ["a 239.1.1.1:1%lo 239.1.1.1:1%eth0", "b 239.1.1.1:1%eth0 239.1.1.1:1%lo"],
        by({"lo": ["lo"]}),
        "rule b closes a cycle",
    ),
    "by way of a veth pair": (
        ["a 239.1.1.1:1%e 239.1.1.1:1%v0", "b 239.1.1.1:1%v1 239.1.1.1:1%e"],
        by({"v0": ["v1"], "v1": ["v0"]}),
        "rule b closes a cycle",
    ),
    "an output that follows the input": (
        ["a 239.1.1.1:1%e =:=%f,source=keep", "b 239.1.1.1:1%f 239.1.1.2:1%e", "c 239.1.1.2:1%e 239.1.1.1:=%e"],
        NOTHING,
        "rule c closes a cycle",
    ),
    "by way of a prefix": (
        ["a 239.1.1.1:1%e 239.2.1.1:1%f", "b 239.2.0.0/16:*%f 239.1.1.1:1%e"],
        NOTHING,
        "rule b closes a cycle",
    ),
    "from prefix to prefix": (
        ["a 239.1.0.0/16:*%e 239.2.0.0/16:=%f", "b 239.2.0.0/16:*%f 239.1.0.0/16:=%e"],
        NOTHING,
        "rule b closes a cycle",
    ),
    "by way of a pattern": (
        ["a 239.1.1.1:1%e 239.1.1.2:1%eth7", "b 239.1.1.2:1%eth+ 239.1.1.1:1%e"],
        NOTHING,
        "rule b closes a cycle",
    ),
    "IPv6 and back": (
        ["a 239.1.1.1:1%e [ff05::1]:1%f", "b [ff05::1]:1%f 239.1.1.1:1%e"],
        NOTHING,
        "rule b closes a cycle: [ff05::1]:1%f -> 239.1.1.1:1%e (rule b)",
    ),
    "the same ESP": (
        ["a 239.1.1.1:esp%e 239.1.1.2:esp%f", "b 239.1.1.2:esp%f =:esp%e", "c 239.1.1.2:esp%e 239.1.1.1:esp%e"],
        NOTHING,
        "rule c closes a cycle",
    ),
    "an address of this host": (
        ["a 192.0.2.1:1%lo =:=%eth0"],
        at_home,
        "192.0.2.1:1%lo -> =:=%eth0, heard at lo (rule a)",
    ),
    "a VLAN device and the tag": (
        ["a 239.1.1.1:1%v1,vlan=7 =:=%v0.7"],
        tagged,
        "=:=%v0.7, heard at v1 (rule a)",
    ),
    "a long one": (
        [f"r{n} 239.1.1.{n}:1%e 239.1.1.{(n + 1) % 20}:1%e" for n in range(20)],
        NOTHING,
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
        ["a 239.1.1.1:1%e,vlan=7 239.1.1.1:1%e"],
        ["a 239.1.1.1:esp%e 239.1.1.2:esp%f", "b 239.1.1.2:*%f 239.1.1.1:1%e"],
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
        "a tag taken off",
        "another protocol",
    ],
)
def test_what_is_no_cycle_is_taken(texts: list[str]) -> None:
    check(rules(*texts), by({"v0": ["v1"]}))
    check_at_once(rules(*texts), by({"v0": ["v1"]}))


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
    check_no_cycle(made[::-1], find, NOTHING)
    check_no_cycle(made, find, NOTHING)
    assert looked_at < 100_000
    closing = parse_rule("239.0.39.16:1%e", ["239.0.0.0:1%e"])
    there.add(closing)
    with pytest.raises(RuleError, match="9993 more"):
        check_no_cycle([*made, closing], find, NOTHING)


@pytest.mark.parametrize(
    ("input", "output"),
    [
        ("239.0.{}.{}:1%e", "239.200.2.2:1%f"),
        ("239.0.{}.{}:*%e", "239.200.2.2:1%f"),
        ("239.0.{}.{}:*%e", "239.200.2.2:=%f"),
        ("239.{}.{}.0/24:*%e", "239.200.2.0/24:=%f"),
        ("239.{}.{}.0/24:*%e", "239.200.2.2:1%f"),
    ],
)
def test_thousands_of_rules_of_any_kind_are_looked_at_fast(input: str, output: str) -> None:
    """None is compared with each other one: that would be a hundred million comparisons."""
    made = [parse_rule(input.format(n // 250, n % 250), [output]) for n in range(10_000)]
    there = RuleSet.of(made)
    started = time.process_time()
    check_no_cycle(made, there.fed_by, NOTHING)
    assert time.process_time() - started < 5


def test_it_is_looked_for_in_small_steps() -> None:
    """Others have their turns in between, however many rules there are, outputs of one, and whom these feed."""
    fed = [parse_rule(f"10.0.{n // 250}.{n % 250 + 1}@239.1.1.2:1%f", ["239.9.9.9:1%z"]) for n in range(1000)]
    outputs = ["239.1.1.2:1%f", *(f"239.2.{n // 250}.{n % 250}:1%f" for n in range(500))]
    feeding = parse_rule("239.1.1.1:1%e", outputs)
    there = RuleSet.of([feeding, *fed])
    assert sum(1 for _step in look_for_cycle([feeding], there.fed_by, NOTHING)) >= 1500


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
    heard = by({f"v{n}": [f"w{n}"] for n in range(6)})
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


def test_the_one_to_blame_is_part_of_the_circle() -> None:
    """Of rules that relay both ways, which is none, and one that closes a circle with one of them."""
    texts = [
        ("239.1.1.1:5000%a", "=:=%b"),
        ("239.1.1.1:5000%b", "=:=%a"),
        ("239.1.1.1:5000%c", "239.1.1.1:5001%d"),
        ("239.1.1.1:5001%d", "239.1.1.1:5000%c"),
    ]
    made = [parse_rule(given, [output], f"r{number}") for number, (given, output) in enumerate(texts)]
    find = RuleSet.of(made).fed_by
    with pytest.raises(Cycle) as found:
        check_no_cycle(made, find, NOTHING)
    assert found.value.rule.name in ("r2", "r3")
    assert f"rule {found.value.rule.name} closes" in found.value.message
    with_another = [*made[:2], parse_rule("239.1.1.1:5000%c", ["239.1.1.1:5000%b", "239.9.9.9:5000%b"], "r2")]
    joined = [*with_another[:1], parse_rule("239.1.1.1:5000%b", ["=:=%a", "239.1.1.1:5000%c"], "r1"), with_another[2]]
    check_no_cycle(joined, RuleSet.of(joined).fed_by, NOTHING)  # address and port unchanged all the way


def test_a_paused_output_feeds_nobody() -> None:
    made = [
        parse_rule("239.1.1.1:5000%c", ["239.1.1.1:5001%d,paused"], "r2"),
        parse_rule("239.1.1.1:5001%d", ["239.1.1.1:5000%c"], "r3"),
    ]
    check_no_cycle(made, RuleSet.of(made).fed_by, NOTHING)

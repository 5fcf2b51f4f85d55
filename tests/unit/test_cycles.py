"""cycles.py: which rule sets feed themselves, and what is said of them."""

from __future__ import annotations

import pytest

from mcrelay.cycles import Heard, check_no_cycle
from mcrelay.errors import RuleError
from mcrelay.rules import Rule, RuleSet, parse_rule


def rules(*texts: str) -> list[Rule]:
    """From 'NAME INPUT OUTPUT...'."""
    return [parse_rule(text.split()[1], text.split()[2:], text.split()[0]) for text in texts]


def check(made: list[Rule], heard: Heard) -> None:
    """Add one after the other, as clients do."""
    there = RuleSet()
    for rule in made:
        there.add(rule)
        check_no_cycle(rule, there.fed_by, heard)


CYCLES: dict[str, tuple[list[str], Heard, str]] = {
    "two rules that translate": (
        ["a 239.1.1.1:5000%eth0 239.2.2.2:6000%eth1", "b 239.2.2.2:6000%eth1 239.1.1.1:5000%eth0"],
        {},
        "rule b closes a cycle: 239.2.2.2:6000%eth1 -> 239.1.1.1:5000%eth0 (rule b) -> 239.2.2.2:6000%eth1 (rule a)"
        " -> 239.2.2.2:6000%eth1",
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
    "both ends of a veth pair": (["a 239.1.1.1:1%v0 239.1.1.1:1%v1"], {"v0": ["v1"], "v1": ["v0"]}, "(rule a)"),
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
    ],
    ids=["both ways", "between three segments", "a chain", "another port", "another interface"],
)
def test_what_is_no_cycle_is_taken(texts: list[str]) -> None:
    check(rules(*texts), {"v0": ["v1"]})

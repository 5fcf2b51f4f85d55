"""patterns.py: rules and the interfaces that they stand for, as many as fit a worker's table."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from mcrelay.children import Child
from mcrelay.errors import Busy, RuleError
from mcrelay.limits import INTERFACES_MAX, OUTPUTS_MAX, RULES_MAX
from mcrelay.messages import Message, SetPatternInterfaces
from mcrelay.net.attachments import Attachments
from mcrelay.patterns import Load, Loads, PatternLinks
from mcrelay.rules import Rule
from mcrelay.ruletext import parse_rule


def rule(number: int, interface: str, outputs: int = 1) -> Rule:
    return parse_rule(f"239.1.{number // 250}.1:{number + 1}%{interface}", [f"=:{n + 1}%out0" for n in range(outputs)])


class Worker:
    """Remembers what it was told, and may refuse it."""

    def __init__(self) -> None:
        self.told: list[dict[str, int]] = []
        self.refuses = False

    def ticket(self) -> int:
        return 1

    async def command(self, ticket: int, part: tuple[Message, Any], patience_s: float = 0.0) -> None:
        assert isinstance(part[0], SetPatternInterfaces)
        if self.refuses:
            raise Busy("no")
        self.told.append(part[0].slots)


class Rig:
    def __init__(self) -> None:
        self.attachments = Attachments(1)
        self.workers = [Worker(), Worker()]
        self.patterns = PatternLinks(self.attachments, lambda: cast(list[Child], self.workers))

    def add(self, *rules: Rule) -> None:
        for one in rules:
            self.patterns.count(one)
            self.attachments.claim("out0")
            self.attachments.keep(one, () if one.input.is_pattern else {one.input.interface})

    def choose(self, *present: str) -> set[str]:
        """What patterns stand for from now on."""
        chosen = self.patterns.choose(present, lambda name: cast(None, self.attachments.claim(name)))
        for one, _names in self.attachments.patterns():
            self.attachments.release(one)
            self.attachments.keep(one, self.attachments.ingress_names(one, chosen))
        return chosen


def test_a_pattern_counts_for_each_interface_that_it_matches() -> None:
    loads = Loads()
    assert not loads.has_patterns
    loads.count(rule(1, "eth0", 3))
    assert not loads.has_patterns
    for one in (rule(2, "eth+", 2), rule(3, "eth+", 1), rule(4, "+", 1)):
        loads.count(one)
    assert loads.has_patterns
    assert loads.of("eth7") == Load(3, 4)
    assert loads.of("lan0") == Load(1, 1)
    assert loads.total([]) == Load(1, 3)
    assert loads.total(["eth0", "eth1", "lan0"]) == Load(1 + 3 + 3 + 1, 3 + 4 + 4 + 1)
    after = loads.changed([rule(5, "lan+", 5)], [rule(2, "eth+", 2), rule(3, "eth+", 1)])
    assert after.total(["eth0", "lan0"]) == Load(1 + 1 + 2, 3 + 1 + 6)
    assert loads.of("eth7") == Load(3, 4)


@pytest.mark.parametrize(
    ("count", "outputs", "names"),
    [(RULES_MAX // 64, 1, 64), (64, OUTPUTS_MAX // 64 // 64, 64)],
    ids=["entries", "outputs"],
)
def test_a_rule_that_does_not_fit_the_table_is_refused(count: int, outputs: int, names: int) -> None:
    rig = Rig()
    interfaces = [f"eth{n}" for n in range(names)]
    full = [rule(n, "eth+", outputs) for n in range(count)]
    rig.patterns.check(interfaces, full, [])
    for more in (rule(count, "eth+", 1), rule(count, "in0", 1)):
        with pytest.raises(RuleError, match="a pattern counts once for each interface"):
            rig.patterns.check(interfaces, [*full, more], [])
    rig.add(*full)
    with pytest.raises(RuleError):
        rig.patterns.check(interfaces, [rule(count, "eth+", outputs)], [])
    rig.patterns.check(interfaces, [rule(count, "eth+", outputs)], [full[0]])  # in its place
    rig.patterns.check(interfaces[1:], [rule(count, "in0", 1)], [])


def test_an_interface_without_room_is_left_out_and_those_before_it_stay(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig()
    rules = [rule(n, "eth+", 512) for n in range(OUTPUTS_MAX // 512 // 2)]  # room for two interfaces
    rig.add(*rules)
    assert rig.choose("eth5", "eth6", "lan0") == {"eth5", "eth6"}
    assert rig.choose("eth1", "eth5", "eth6") == {"eth5", "eth6"}  # a newcomer takes nobody's place
    assert rig.attachments.left_out == {"eth1"}
    assert "eth1" not in rig.attachments
    assert rig.attachments.ingress_names(rules[0], ["eth1", "eth5"]) == {"eth5"}
    rig.choose("eth1", "eth5", "eth6")
    assert [record.getMessage() for record in caplog.records] == [
        "interface eth1 is left out of the patterns that match it: all rules for all their interfaces would be more "
        "than a worker's table takes"
    ]
    assert rig.choose("eth1", "eth6") == {"eth1", "eth6"}
    assert rig.attachments.left_out == set()


def test_no_more_interfaces_are_chosen_than_there_are_slots(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig()
    rig.add(rule(1, "eth+"))
    chosen = rig.choose(*(f"eth{n:02}" for n in range(INTERFACES_MAX)))
    assert chosen == {f"eth{n:02}" for n in range(INTERFACES_MAX - 1)}  # one is out0's
    assert "a daemon serves no more interfaces" in caplog.text


def test_workers_are_told_what_changes_and_once_more_if_one_did_not_hear_it() -> None:
    async def test() -> None:
        rig = Rig()
        rig.add(rule(1, "eth+"))
        one, other = rig.workers
        await rig.patterns.tell(rig.choose("eth0"))
        await rig.patterns.tell(["eth0"])
        assert one.told == other.told == [{"eth0": 1}]
        other.refuses = True
        with pytest.raises(Busy):
            await rig.patterns.tell(rig.choose("eth0", "eth1"))
        other.refuses = False
        await rig.patterns.tell(["eth0"])
        await rig.patterns.tell(["eth0"])
        assert one.told == [{"eth0": 1}, {"eth0": 1, "eth1": 2}, {"eth0": 1}]
        assert other.told == [{"eth0": 1}, {"eth0": 1}]
        await rig.patterns.introduce(cast(Child, one))
        assert one.told[-1] == {"eth0": 1}

    asyncio.run(test())

"""Health: from facts to a judgement."""

from __future__ import annotations

from mcrelay.api import RuleFacts, RuleState
from mcrelay.health import NAMES_MAX, Health, judge
from mcrelay.messages import ProcessFacts


def process(role: str, index: int = 0, state: str = "ready") -> ProcessFacts:
    return ProcessFacts(role, index, state, 4711, 65534, "0", "0", 0)  # type: ignore[arg-type] # literals


def rule(name: str, state: RuleState = "active") -> RuleFacts:
    return RuleFacts("0123456789ab", name, "239.1.1.1:5000%eth0", (), state, ())


WORKING = (process("supervisor"), process("control"), process("data", 0), process("data", 1))


def test_all_works() -> None:
    assert judge(WORKING, ()) == Health("ok", ())
    assert judge(WORKING, [rule("a"), rule("b")]) == Health("ok", ())


def test_a_worker_that_is_not_ready_fails() -> None:
    health = judge((*WORKING[:3], process("data", 1, "waiting")), ())
    assert health == Health("failing", ("data/1 is not ready: waiting",))
    # A spare has nothing to do yet, and who asks the control plane has reached it.
    assert judge((*WORKING, process("spare", 0, "starting")), ()).status == "ok"


def test_a_supervisor_that_does_not_answer_fails() -> None:
    assert judge(None, [rule("a")]) == Health("failing", ("the supervisor does not answer",))
    assert judge(WORKING[:2], ()).status == "failing"


def test_rules_that_do_not_work_degrade() -> None:
    health = judge(WORKING, [rule("a", "pending"), rule("b"), rule("c", "suspended"), rule("d", "pending")])
    assert health == Health("degraded", ("1 rule is suspended: c", "2 rules are pending: a, d"))


def test_failing_outweighs_degraded_and_has_all_reasons() -> None:
    health = judge(None, [rule("a", "partial")])
    assert health == Health("failing", ("the supervisor does not answer", "1 rule is partial: a"))


def test_reasons_are_bounded() -> None:
    health = judge(WORKING, [rule(f"rule-{n}", "pending") for n in range(5000)])
    assert health.reasons[0].endswith(f"rule-{NAMES_MAX - 1} and {5000 - NAMES_MAX} more")

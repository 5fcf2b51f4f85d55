"""Health: whether the daemon does its work, from what is known of its processes and rules.

Pure. Who asks and how they are told is others' business (exposition.py, the command line).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, Literal

import msgspec

from mcrelay.api import RuleFacts
from mcrelay.messages import ProcessFacts

HealthStatus = Literal["ok", "degraded", "failing"]

NAMES_MAX: Final = 10  # of rules in one reason


class Health(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`degraded`: the daemon works, and some rules do not. `failing`: a part of the daemon does not work. `reasons` are
    for people, the weightiest first."""

    status: HealthStatus
    reasons: tuple[str, ...]


def judge(processes: Sequence[ProcessFacts] | None, rules: Iterable[RuleFacts]) -> Health:
    """`processes`: as the supervisor tells, None if it does not answer."""
    failures = _failures(processes)
    reasons = (*failures, *_degradations(rules))
    return Health(status="failing" if failures else "degraded" if reasons else "ok", reasons=reasons)


def _failures(processes: Sequence[ProcessFacts] | None) -> list[str]:
    if processes is None:
        return ["the supervisor does not answer"]
    workers = [process for process in processes if process.role == "data"]
    if not workers:
        return ["there is no data plane worker"]
    return [f"data/{worker.index} is not ready: {worker.state}" for worker in workers if worker.state != "ready"]


def _degradations(rules: Iterable[RuleFacts]) -> list[str]:
    of_state: dict[str, list[str]] = {"suspended": [], "pending": [], "partial": []}
    for rule in rules:
        if rule.state in of_state:
            of_state[rule.state].append(rule.name or rule.id)
    return [_reason(state, names) for state, names in of_state.items() if names]


def _reason(state: str, names: list[str]) -> str:
    listed = ", ".join(names[:NAMES_MAX])
    more = f" and {len(names) - NAMES_MAX} more" if len(names) > NAMES_MAX else ""
    number = "1 rule is" if len(names) == 1 else f"{len(names)} rules are"
    return f"{number} {state}: {listed}{more}"

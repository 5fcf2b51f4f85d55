"""Cores: those that data plane workers run on, one each, from the text that a person gives. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from mcrelay.errors import UsageError
from mcrelay.limits import WORKERS_MAX

CORE_MAX: Final = 4095
SHOWN_MAX: Final = 64  # characters of a text that is refused
EXAMPLE: Final = "write, for example, 0,2-3"


def parse_cores(text: str, what: str = "--cores") -> list[int]:
    """0,2-3 -> 0, 2, 3. UsageError, about `what`, if it is anything else."""
    shown = f"{what} {text[:SHOWN_MAX]!r}"
    chosen: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not _is_number(first) or (dash and not _is_number(last)):
            raise UsageError(f"{shown} is not a list of cores", EXAMPLE)
        begin, end = int(first), int(last or first)
        if end < begin or end > CORE_MAX:
            raise UsageError(f"{shown} is not a list of cores", EXAMPLE)
        chosen += range(begin, end + 1)
    if len(set(chosen)) != len(chosen):
        raise UsageError(f"{shown} names a core twice", "one worker per core")
    if len(chosen) > WORKERS_MAX:
        raise UsageError(f"{shown}: {len(chosen)} workers are too many", f"use at most {WORKERS_MAX}")
    return chosen


def choose_cores(
    available: Sequence[int], workers: int | None, cores: str | None, *, of_workers: str, of_cores: str
) -> tuple[int, ...]:
    """So many of those that there are, or these; all, if nothing is said. UsageError, about where either is said, if
    they do not go together or with this machine."""
    if cores is None:
        if workers is not None and not 1 <= workers <= len(available):
            raise UsageError(
                f"{of_workers} {workers}: there is one worker per core", f"use a number from 1 to {len(available)}"
            )
        return tuple(available[: workers or WORKERS_MAX])
    chosen = parse_cores(cores, of_cores)
    if unavailable := [core for core in chosen if core not in available]:
        raise UsageError(
            f"{of_cores} {cores}: core {unavailable[0]} is not there for us",
            f"use some of {','.join(map(str, available))}",
        )
    if workers is not None and workers != len(chosen):
        raise UsageError(
            f"{of_workers} {workers} and {of_cores} {cores} disagree",
            "there is one worker per core: give one of them",
        )
    return tuple(chosen)


def check_worker(number: str, workers: int) -> None:
    """UsageError if there is no worker of that number among so many."""
    if int(number) >= workers:
        raise UsageError(f"[worker.{number}]: there are workers 0 to {workers - 1}", "remove it, or have more workers")


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= len(str(CORE_MAX))

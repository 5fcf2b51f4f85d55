"""The highest rate without loss: a search over trials, which are the caller's business. Pure.

RFC 2544, section 26.1, and RFC 3918, section 4.3, leave the procedure open. This is a binary search with loss
verification (ETSI GS NFV-TST 009, section 12.3.3): a trial with loss is repeated, and counts only if it loses again,
since a machine that also runs other programs now and then loses a few datagrams at any rate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

REACHED: Final = 0.95  # of the rate asked for: less is the generator's limit
GROWTH: Final = 1.4  # from one lossless rate to the next, while no rate with loss is known
RATE_MIN: Final = 500.0  # what loses below that is taken for broken
TRIALS_MAX: Final = 40


@dataclass(frozen=True)
class Attempt:
    """What one trial came to."""

    asked: float  # datagrams/s
    offered: float  # what the generator did achieve
    lost: int

    @property
    def reached(self) -> bool:
        return self.offered >= REACHED * self.asked


@dataclass(frozen=True)
class Found:
    rate: float  # highest offered load without loss; 0: every one lost
    limit: str  # "loss", or "generator" if nothing was lost at all it could offer
    attempts: tuple[Attempt, ...]


def zero_loss_rate(
    trial: Callable[[float], Attempt], *, start: float, ceiling: float, resolution: float, verify: int = 1
) -> Found:
    """Search from `start`, up to `ceiling`, the most that the generator can offer, until two rates less than
    `resolution` (a fraction) apart are known, one without and one with loss."""
    attempts: list[Attempt] = []
    low, high = 0.0, 0.0  # the highest without loss, the lowest with; 0: none yet
    rate = min(start, ceiling)
    while len(attempts) < TRIALS_MAX:
        for _ in range(1 + verify):
            attempt = trial(rate)
            attempts.append(attempt)
            if not attempt.lost:
                break
        if attempt.lost:
            high = min(high or rate, rate, attempt.offered)
            if high <= RATE_MIN:
                return Found(0.0, "loss", tuple(attempts))
        else:
            low = max(low, attempt.offered)
            if not high and (not attempt.reached or low >= REACHED * ceiling):
                return Found(low, "generator", tuple(attempts))
            if not attempt.reached:  # it cannot offer what lies between
                return Found(low, "loss", tuple(attempts))
        if high and high - low <= resolution * high:
            break
        if not high:
            rate = min(low * GROWTH, ceiling)
        elif not low:
            rate = high / 2
        else:
            rate = (low + high) / 2
    return Found(low, "loss", tuple(attempts))

"""Rates of engine `reference`: which copies of an output may leave, so that it sends no more than it is allowed to.

A token bucket for each output that has a rate, kept as the time at which it will be full again, in the integers of
native/limit.h: so the two engines let the same copies pass at the same times. The bucket is full at first, and holds
what leaves in 10 ms, or some packets where that is less: traffic comes in bursts. A copy that is longer than a full
bucket passes when it is full. For an output that gets the counter of another, or another rate, it is full, too: what
was taken from it, another took.

Knows nothing of sockets or clocks: the caller says what time it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from mcrelay.entries import Leg, RateUnit

TICKS_PER_NS: Final = 64
TICKS_PER_S: Final = TICKS_PER_NS * 10**9
BURSTS_PER_S: Final = 100  # a burst is what leaves in 10 ms
BURST_PACKETS_MIN: Final = 16
BURST_BITS_MIN: Final = BURST_PACKETS_MIN * 1500 * 8


@dataclass(frozen=True, slots=True)
class Bucket:
    rule: int  # id of the rule that it is of, and the rate that it was charged at
    rate: int
    unit: RateUnit
    full_at: int  # in ticks


class Rates:
    """The buckets of all outputs, by their counters."""

    def __init__(self) -> None:
        self._buckets: dict[int, Bucket] = {}

    def permits(self, rule: int, leg: Leg, lengths: list[int], now_ns: int) -> bool:
        """Whether this output of the rule with this id may send IP packets of these lengths now, all of them or none;
        if so, they count."""
        if leg.rate_unit is RateUnit.NONE:
            return True
        now = now_ns * TICKS_PER_NS
        amount = sum(lengths) * 8 if leg.rate_unit is RateUnit.BITS else len(lengths)
        bucket = self._buckets.get(leg.counter)
        is_its_own = bucket and (bucket.rule, bucket.rate, bucket.unit) == (rule, leg.rate, leg.rate_unit)
        to_come = max(0, bucket.full_at - now) if bucket and is_its_own else 0  # until it is full
        if to_come and to_come + _ticks(leg, amount) > _burst_ticks(leg):
            return False
        self._buckets[leg.counter] = Bucket(rule, leg.rate, leg.rate_unit, now + to_come + _ticks(leg, amount))
        return True


def _ticks(leg: Leg, amount: int) -> int:
    """How long the rate takes for so much."""
    return amount * TICKS_PER_S // leg.rate


def _burst_ticks(leg: Leg) -> int:
    least = BURST_BITS_MIN if leg.rate_unit is RateUnit.BITS else BURST_PACKETS_MIN
    return max(_ticks(leg, least), TICKS_PER_S // BURSTS_PER_S)

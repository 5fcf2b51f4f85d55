"""Counters: a worker's shared page, as written and as read.

The layout is that of native/counters.h, which explains it; a test compares the two. `Page` is one worker's page over
any buffer of PAGE_SIZE bytes (a memory map of the memfd that the supervisor made). Reading is free for the writer.
Knows nothing of how the memory came here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

from mcrelay.limits import INTERFACES_MAX, OUTPUTS_MAX, RULES_MAX

DROP_REASONS: Final = (
    "none",
    "truncated",
    "oversize",
    "not_ip",
    "bad_ip_header",
    "bad_ip_checksum",
    "fragment",
    "not_udp",
    "bad_udp_length",
    "bad_udp_checksum",
    "other_host",
    "vlan_tagged",
    "no_rule",
    "ingress_overrun",
    "egress_full",
    "egress_unreachable",
    "egress_refused",
    "egress_error",
    "merged",
    "interrupted",
    "own",
    "loop",
    "bad_extension",
    "egress_limited",
    "paused",
    "split_horizon",
)
REASON: Final = {name: number for number, name in enumerate(DROP_REASONS)}
# Of one output, in order.
OUTPUT_REASONS: Final = (
    *DROP_REASONS[REASON["egress_full"] : REASON["egress_error"] + 1],
    *DROP_REASONS[REASON["egress_limited"] : REASON["split_horizon"] + 1],
    "interrupted",
)

MAGIC: Final = 0x6D6372656C617931
VERSION: Final = 3

# In 64-bit words.
RULE_WORDS: Final = 8
RULE_OWN: Final = 4  # where those of LoopFacts begin
OUTPUT_WORDS: Final = 16
INTERFACE_WORDS: Final = 4
INTERFACES_OFFSET: Final = 2048 // 8
RULES_OFFSET: Final = 4096 // 8
OUTPUTS_OFFSET: Final = RULES_OFFSET + RULES_MAX * RULE_WORDS
PAGE_SIZE: Final = 8 * (OUTPUTS_OFFSET + OUTPUTS_MAX * OUTPUT_WORDS)

FRAMES_MALFORMED: Final = 2
RECEIVED: Final = 8
RECEIVED_BYTES: Final = 9
FORWARDED: Final = 10
COPIES: Final = 11
COPIES_BYTES: Final = 12
POOL_EXHAUSTED: Final = 13
POOL_SLOTS: Final = 14
POOL_FREE: Final = 15
BATCHES: Final = 16
SENDS: Final = 17
SEGMENTS_REFUSED: Final = 18
DROPPED: Final = 24

TOTALS: Final = {
    "received": RECEIVED,
    "received_bytes": RECEIVED_BYTES,
    "forwarded": FORWARDED,
    "copies": COPIES,
    "copies_bytes": COPIES_BYTES,
    "pool_exhausted": POOL_EXHAUSTED,
    "pool_slots": POOL_SLOTS,
    "pool_free": POOL_FREE,
    "batches": BATCHES,
    "sends": SENDS,
    "segments_refused": SEGMENTS_REFUSED,
    "frames_malformed": FRAMES_MALFORMED,
}


# Of one interface slot, in order.
INTERFACE_COUNTERS: Final = ("frames", "overruns", "merged", "segments_refused")


class LoopFacts(NamedTuple):
    """Of one rule: packets that matched it but were not to be forwarded, and when it did not forward at all."""

    own: int  # that came from an address of this host
    looped: int  # while it was suspended
    suspensions: int
    suspended_until_ns: int  # CLOCK_MONOTONIC, of the last time; 0: never, or the worker has died since


class Page:
    """One worker's counters over `buffer`, which stays the caller's. A writer needs a writable buffer."""

    def __init__(self, buffer: memoryview) -> None:
        self._words = buffer.cast("B").cast("Q")
        if len(self._words) * 8 < PAGE_SIZE:
            raise ValueError(f"a counter page has {PAGE_SIZE} bytes, this one {len(self._words) * 8}")

    def release(self) -> None:
        self._words.release()

    # Reading.

    def totals(self) -> dict[str, int]:
        return {name: self._words[word] for name, word in TOTALS.items()}

    def dropped(self) -> dict[str, int]:
        """Packets by drop reason, those that occurred."""
        return {
            name: packets
            for number, name in enumerate(DROP_REASONS)
            if number and (packets := self._words[DROPPED + number])
        }

    def rule(self, index: int) -> tuple[int, int, int, int]:
        """(packets, bytes, forwarded, dropped)"""
        packets, size, forwarded, dropped = self._words[self._rule(index) : self._rule(index) + RULE_OWN]
        return packets, size, forwarded, dropped

    def loop(self, index: int) -> LoopFacts:
        return LoopFacts(*self._words[self._rule(index) + RULE_OWN : self._rule(index) + RULE_WORDS])

    def output(self, index: int) -> tuple[int, int, dict[str, int]]:
        """(packets, bytes, drops by reason, those that occurred)"""
        at = self._output(index)
        drops = self._words[at + 2 : at + 2 + len(OUTPUT_REASONS)]
        return (
            self._words[at],
            self._words[at + 1],
            {name: n for name, n in zip(OUTPUT_REASONS, drops, strict=True) if n},
        )

    def interface(self, slot: int) -> dict[str, int]:
        at = self._interface(slot)
        return dict(zip(INTERFACE_COUNTERS, self._words[at : at + INTERFACE_WORDS], strict=True))

    # Writing: one process, and of its threads one per word.

    def initialise(self) -> None:
        """Mark a fresh page; one that a predecessor has counted in goes on."""
        if self._words[0] != MAGIC:
            self._words[0] = MAGIC
            self._words[1] = VERSION

    def count(self, word: int, n: int = 1) -> None:
        self._words[word] += n

    def set(self, word: int, value: int) -> None:
        self._words[word] = value

    def count_dropped(self, reason: int, n: int = 1) -> None:
        self._words[DROPPED + reason] += n

    def count_rule(self, index: int, *, packets: int = 0, size: int = 0, forwarded: int = 0, dropped: int = 0) -> None:
        at = self._rule(index)
        self._words[at] += packets
        self._words[at + 1] += size
        self._words[at + 2] += forwarded
        self._words[at + 3] += dropped

    def count_loop(self, index: int, *, own: int = 0, looped: int = 0) -> None:
        at = self._rule(index) + RULE_OWN
        self._words[at] += own
        self._words[at + 1] += looped

    def suspend_rule(self, index: int, until_ns: int) -> None:
        at = self._rule(index) + RULE_OWN
        self._words[at + 3] = until_ns
        self._words[at + 2] += 1

    def end_suspension(self, index: int, at_ns: int) -> None:
        self._words[self._rule(index) + RULE_OWN + 3] = at_ns

    def count_output(self, index: int, size: int) -> None:
        at = self._output(index)
        self._words[at] += 1
        self._words[at + 1] += size

    def count_output_dropped(self, index: int, reason: int) -> None:
        self._words[self._output(index) + 2 + OUTPUT_REASONS.index(DROP_REASONS[reason])] += 1

    def count_interface(self, slot: int, name: str, n: int = 1) -> None:
        self._words[self._interface(slot) + INTERFACE_COUNTERS.index(name)] += n

    def clear_interface(self, slot: int) -> None:
        """Zero the counters of an interface slot that no engine uses (any more)."""
        for word in range(INTERFACE_WORDS):
            self._words[self._interface(slot) + word] = 0

    def in_hand(self) -> int:
        """Packets that were received, and of which nothing has become yet. Not below 0, whatever a worker wrote that
        went mad."""
        totals = self.totals()
        return max(0, totals["received"] - totals["forwarded"] - sum(self.dropped().values()))

    def settle(self, rules: Iterable[tuple[int, Iterable[int]]]) -> int:
        """Count what a dead worker had in hand as interrupted, for each rule and its outputs (by index). Returns how
        many packets that were."""
        in_hand = self.in_hand()
        self.count_dropped(REASON["interrupted"], in_hand)
        for rule, outputs in rules:
            packets, _size, forwarded, dropped = self.rule(rule)
            self.count_rule(rule, dropped=max(0, packets - forwarded - dropped))
            self._words[self._rule(rule) + RULE_OWN + 3] = 0  # its successor knows of no suspension
            for output in outputs:
                copies, _bytes, drops = self.output(output)
                at = self._output(output) + 2 + OUTPUT_REASONS.index("interrupted")
                self._words[at] += max(0, packets - copies - sum(drops.values()))
        return in_hand

    def clear(self, rules: Iterable[int], outputs: Iterable[int]) -> None:
        """Zero the counters of rules and outputs that no engine uses (any more)."""
        for index in rules:
            for word in range(RULE_WORDS):
                self._words[self._rule(index) + word] = 0
        for index in outputs:
            for word in range(OUTPUT_WORDS):
                self._words[self._output(index) + word] = 0

    def _interface(self, slot: int) -> int:
        if not 0 <= slot < INTERFACES_MAX:
            raise IndexError(f"interface slot {slot}")
        return INTERFACES_OFFSET + slot * INTERFACE_WORDS

    def _rule(self, index: int) -> int:
        if not 0 <= index < RULES_MAX:
            raise IndexError(f"rule counter {index}")
        return RULES_OFFSET + index * RULE_WORDS

    def _output(self, index: int) -> int:
        if not 0 <= index < OUTPUTS_MAX:
            raise IndexError(f"output counter {index}")
        return OUTPUTS_OFFSET + index * OUTPUT_WORDS

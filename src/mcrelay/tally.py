"""Tally: what the workers have counted, summed up.

Owns the control plane's view of the counter pages, which it can only read. Knows nothing of who asks.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Sequence

from mcrelay import counters
from mcrelay.api import InterfaceFacts, OutputStats, RuleStats, WorkerStats
from mcrelay.messages import InterfaceRecord, RuleRecord
from mcrelay.rules import Rule


def map_pages(descriptors: Iterable[int]) -> list[counters.Page]:
    """The pages behind these descriptors, which are closed."""
    return [_map_page(descriptor) for descriptor in descriptors]


def _map_page(descriptor: int) -> counters.Page:
    page = mmap.mmap(descriptor, counters.PAGE_SIZE, prot=mmap.PROT_READ)
    os.close(descriptor)
    return counters.Page(memoryview(page))


class Tally:
    """Over all workers, of which each has a page."""

    def __init__(self, pages: Sequence[counters.Page]) -> None:
        self._pages = pages

    def workers(self) -> tuple[WorkerStats, ...]:
        """One by one."""
        return tuple(
            WorkerStats(index=index, dropped=page.dropped(), **page.totals()) for index, page in enumerate(self._pages)
        )

    def loop(self, record: RuleRecord) -> counters.LoopFacts:
        of_workers = [page.loop(record.counter) for page in self._pages]
        return counters.LoopFacts(
            own=sum(facts.own for facts in of_workers),
            looped=sum(facts.looped for facts in of_workers),
            suspensions=sum(facts.suspensions for facts in of_workers),
            suspended_until_ns=max(facts.suspended_until_ns for facts in of_workers),
        )

    def interface(self, record: InterfaceRecord) -> InterfaceFacts:
        of_workers = [page.interface(record.slot) for page in self._pages]
        counted = {key: sum(counts[key] for counts in of_workers) for key in counters.INTERFACE_COUNTERS}
        return InterfaceFacts(
            name=record.name,
            problems=tuple(dict.fromkeys(record.problems.values())),
            segmentation=not counted["segments_refused"],
            **counted,
        )

    def rule(self, rule: Rule, record: RuleRecord) -> RuleStats:
        sums = [sum(values) for values in zip(*(page.rule(record.counter) for page in self._pages), strict=True)]
        packets, size, forwarded, dropped = sums
        loop = self.loop(record)
        return RuleStats(
            id=rule.id,
            name=rule.name,
            input=record.input,
            packets=packets,
            bytes=size,
            forwarded=forwarded,
            dropped=dropped,
            own=loop.own,
            looped=loop.looped,
            suspensions=loop.suspensions,
            outputs=tuple(
                self._output(text, counter)
                for text, counter in zip(record.outputs, record.output_counters, strict=True)
            ),
        )

    def _output(self, text: str, counter: int) -> OutputStats:
        packets = size = 0
        dropped: dict[str, int] = {}
        for page in self._pages:
            page_packets, page_bytes, page_dropped = page.output(counter)
            packets += page_packets
            size += page_bytes
            for reason, n in page_dropped.items():
                dropped[reason] = dropped.get(reason, 0) + n
        return OutputStats(output=text, packets=packets, bytes=size, dropped=dropped)

"""Types of the binding; native/generator.h, native/collector.h and native/analyser.h have the meaning."""

from array import array

SIZE_MAX: int
SIZE_HEADER: int
SIZE_RTP_HEADER: int
RECEIVE_FLOWS_MAX: int
SEGMENTS_MAX: int

class Generator:
    def __init__(
        self,
        fd: int,
        addresses: bytes,
        *,
        count: int,
        duration_ns: int,
        rate: float,
        flows: int,
        flow_id: int,
        size: int,
        segments: int,
        burst: int,
        rtp: bool,
    ) -> None: ...
    def run(self, slice_ns: int) -> bool: ...
    def totals(self) -> dict[str, int]: ...

class Collector:
    def __init__(self, fds: array[int], *, flows: int, rtp: bool) -> None: ...
    def run(self, slice_ns: int, wanted: int, drain: bool) -> bool: ...
    def totals(self) -> dict[str, int]: ...
    def latency_ns(self, fraction: float) -> int | None: ...
    def jitter_ns(self) -> float | None: ...

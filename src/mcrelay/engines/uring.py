"""Engine `uring`: the C core of native/, on io_uring.

Owns the two eventfds between the event loop and the engine's thread. run() leaves the GIL for as long as it runs.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import ClassVar

from mcrelay.engines import _native
from mcrelay.entries import Entry
from mcrelay.limits import RingGeometry
from mcrelay.ways import Link, Way


class UringEngine:
    """Over a writable counter page. OSError where the kernel has no io_uring for us."""

    name: ClassVar[str] = "uring"

    def __init__(
        self, page: memoryview, *, slots: int = 0, latency_budget_us: int = 0, busy_poll: bool = False
    ) -> None:
        """`slots`: receive slots per interface, a power of two; 0 chooses by the interface's MTU. The others: see
        struct engine_pace of native/engine.h."""
        self._slots = slots
        self._command_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._answer_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        try:
            self._native = _native.Engine(page, self._command_fd, self._answer_fd, latency_budget_us, busy_poll)
        except BaseException:
            os.close(self._command_fd)
            os.close(self._answer_fd)
            raise

    @property
    def answer_fd(self) -> int:
        return self._answer_fd

    def run(self) -> None:
        self._native.run()

    def attach_ingress(
        self, interface: int, fd: int, mtu: int, ring: RingGeometry | None = None, *, loopback: bool = False
    ) -> int:
        if ring is None:
            return self._native.attach_receive(interface, fd, loopback, mtu, self._slots)
        return self._native.attach_ring(interface, fd, loopback, ring.block_size, ring.blocks, ring.frame_size)

    def attach_datagrams(self, interface: int, *, loopback: bool = False) -> int:
        return self._native.attach_datagrams(interface, loopback, self._slots)

    def add_socket(self, interface: int, number: int, fd: int) -> int:
        return self._native.add_socket(interface, fd, number)

    def remove_socket(self, interface: int, number: int) -> int:
        return self._native.remove_socket(interface, number)

    def detach_ingress(self, interface: int) -> int:
        return self._native.detach_ingress(interface)

    def attach_egress(self, interface: int, way: Way, fd: int, mtu: int, link: Link) -> int:
        return self._native.attach_egress(interface, way, fd, mtu, link.packed)

    def detach_egress(self, interface: int, way: Way) -> int:
        return self._native.detach_egress(interface, way)

    def set_rules(self, entries: Iterable[Entry]) -> int:
        return self._native.set_rules(b"".join(entry.packed for entry in entries))

    def set_own_addresses(self, addresses: Iterable[bytes]) -> int:
        return self._native.set_own_addresses(b"".join(addresses))

    def open_tap(self, rule: int, fd: int, count: int, snap: int) -> int:
        return self._native.open_tap(rule, fd, count, snap)

    def close_tap(self, fd: int) -> int:
        return self._native.close_tap(fd)

    def probe(self) -> int:
        return self._native.probe()

    def stop(self) -> int:
        return self._native.stop()

    def answers(self) -> list[tuple[int, int]]:
        try:
            os.eventfd_read(self._answer_fd)
        except BlockingIOError:
            return []
        return self._native.answers()

    def close(self) -> None:
        if self._command_fd < 0:
            return
        self._native.close()
        os.close(self._command_fd)
        os.close(self._answer_fd)
        self._command_fd = self._answer_fd = -1

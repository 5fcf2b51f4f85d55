"""Fixtures of the end-to-end tests: the whole daemon between real networks.

Every daemon runs with --debug, where asyncio reports what blocks an event loop (worker.SLOW_CALLBACK_S). None may be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from lab.daemon import Daemon
from lab.namespaces import Lab, unsupported
from lab.topology import RelayLine, relay_line

StartDaemon = Callable[..., Daemon]


@pytest.fixture(scope="module")
def line() -> Iterator[RelayLine]:
    if reason := unsupported():
        pytest.skip(reason)
    with Lab() as lab:
        yield relay_line(lab, outputs=2, offloads=False)  # captures see datagrams, not runs of them


@pytest.fixture
def start(line: RelayLine) -> Iterator[StartDaemon]:
    """Start a daemon in the relay's namespace; it is stopped, and looked over, when the test ends."""
    with ExitStack() as stack:
        daemons: list[Daemon] = []

        def begin(*options: str, **keywords: object) -> Daemon:
            daemon = Daemon(line.relay, "--debug", *options, **keywords)  # type: ignore[arg-type] # passed through
            daemons.append(stack.enter_context(daemon))
            return daemon

        yield begin
    for daemon in daemons:
        slow = [line for line in daemon.log.split("\n") if "Executing" in line and "took" in line]
        assert not slow, "an event loop was blocked:\n" + "\n".join(slow)
        assert "Traceback" not in daemon.log, daemon.log


@pytest.fixture
def daemon(start: StartDaemon) -> Daemon:
    return start()

"""Fixtures of the engine tests; bench.py has the bench itself."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from lab.namespaces import Lab, unsupported, wait_until
from lab.topology import RelayLine, relay_line
from tests.engines.bench import ENGINES, PACED, Bench, Kind, speak_ipv6


@pytest.fixture(scope="session")
def line() -> Iterator[RelayLine]:
    if reason := unsupported():
        pytest.skip(reason)
    with Lab() as lab:
        built = relay_line(lab, outputs=2, offloads=False)  # captures see datagrams, not runs of them
        speak_ipv6(built)
        yield built


@pytest.fixture(params=ENGINES | PACED)
def kind(request: pytest.FixtureRequest) -> Kind:
    return (ENGINES | PACED)[request.param]


@pytest.fixture
def bench(line: RelayLine, kind: Kind, descriptors: None) -> Iterator[Bench]:
    opened = Bench(line, kind)
    yield opened
    opened.close()


@pytest.fixture(autouse=True)
def descriptors() -> Iterator[None]:
    """No test leaves a descriptor behind."""
    before = len(os.listdir("/proc/self/fd"))
    yield
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before, 5, "descriptors were left behind")

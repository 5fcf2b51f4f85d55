"""The long run, for a short time: lab/soak.py says what is done and what has to hold."""

from __future__ import annotations

import pytest

from lab.namespaces import unsupported
from lab.soak import soak

SECONDS = 6.0


def test_nothing_is_lost_and_nothing_grows() -> None:
    if reason := unsupported():
        pytest.skip(reason)
    run = soak(SECONDS, seed=1)
    print(run.table())
    assert run.failures == []
    assert run.faults.total() >= 2

"""Fixtures of the packages' tests: what `make deb` builds, from what is committed and what is not."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from lab.namespaces import Lab, unsupported
from lab.topology import RelayLine, relay_line

ROOT: Final = Path(__file__).resolve().parents[2]
BUILD_S: Final = 300


@pytest.fixture(scope="session")
def built() -> Path:
    """The directory with the wheel, the source distribution and the Debian package. Nothing is built if it is there and
    as new as its sources."""
    done = subprocess.run(["make", "-s", "deb"], cwd=ROOT, capture_output=True, text=True, timeout=BUILD_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return ROOT / "build/dist"


@pytest.fixture(scope="session")
def package(built: Path) -> Path:
    (package,) = built.glob("mcrelay_*.deb")
    return package


@pytest.fixture(scope="session")
def wheel(built: Path) -> Path:
    (wheel,) = built.glob("mcrelay-*.whl")
    return wheel


@pytest.fixture(scope="module")
def line() -> Iterator[RelayLine]:
    if reason := unsupported():
        pytest.skip(reason)
    with Lab() as lab:
        yield relay_line(lab)

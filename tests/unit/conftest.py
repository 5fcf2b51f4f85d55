"""What the unit tests share."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import settings

import mcrelay

SOURCES = Path(__file__).resolve().parents[2] / "src"

# The same examples in every run, fewer than usual; a slow machine is no failure.
settings.register_profile("deterministic", derandomize=True, deadline=None, database=None, max_examples=60)
settings.load_profile("deterministic")


@pytest.fixture(scope="session")
def native() -> ModuleType:
    """The native extension. It is in every installation, but not beside the sources."""
    from_sources = Path(str(mcrelay.__file__)).is_relative_to(SOURCES)
    if from_sources and importlib.util.find_spec("mcrelay.engines._native") is None:
        pytest.skip("mcrelay comes from its sources, which do not hold the built extension: install it to test that")
    return importlib.import_module("mcrelay.engines._native")

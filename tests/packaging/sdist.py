"""The source distribution builds a wheel. That takes as long as a build: only 'make packages-test' asks for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.unit.test_style import ROOT


def test_the_source_distribution_builds_a_wheel(tmp_path: Path) -> None:
    """In an environment of its own, as pip does it."""
    subprocess.run(["make", "-s", "wheel"], cwd=ROOT, check=True, timeout=300)
    (source,) = (ROOT / "build/dist").glob("mcrelay-*.tar.gz")
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path)
    subprocess.run([*pip, source], check=True, timeout=500)
    (wheel,) = tmp_path.glob("*.whl")
    assert "-abi3-" in wheel.name

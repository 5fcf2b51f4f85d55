"""The C core under AddressSanitizer and UndefinedBehaviorSanitizer: its own tests, and those of the engines."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.native.fuzz import CORPUS, TARGETS

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "sanitized"
BIN = Path(sys.executable).parent
MINUTES = 60


def run(*argv: str, timeout_s: float, **environment: str) -> None:
    done = subprocess.run(
        argv,
        cwd=ROOT,
        env={**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", **environment},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(argv)}:\n{done.stdout[-8000:]}\n{done.stderr[-8000:]}"


@pytest.fixture(scope="module")
def build() -> Path:
    """The core, its tests and the binding, built with sanitizers."""
    options = ("-Db_sanitize=address,undefined", "-Db_lundef=false", "-Ddebug=true", "-Doptimization=1", "-Dtests=true")
    if not (BUILD / "build.ninja").exists():
        run("meson", "setup", str(BUILD), *options, timeout_s=2 * MINUTES)
    run("meson", "compile", "-C", str(BUILD), timeout_s=5 * MINUTES)
    return BUILD


def test_the_core_by_itself(build: Path) -> None:
    run("meson", "test", "-C", str(build), "--print-errorlogs", timeout_s=5 * MINUTES)


@pytest.mark.parametrize("target", TARGETS)
def test_what_fuzzing_has_found(build: Path, target: str) -> None:
    """The corpus of the tree, each input as it is."""
    inputs = sorted(map(str, (CORPUS / target).iterdir()))
    assert inputs
    run(str(build / "tests" / "native" / target), "0", "1", *inputs, timeout_s=MINUTES)


def test_the_engines_with_a_sanitized_core(build: Path) -> None:
    (native,) = build.glob("_native*.so")
    runtime = subprocess.run(
        ["cc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    run(
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/engines"),
        # Not: no C at all, the same code with another clock, and ways in that matter to few of the tests.
        *("-k", "not reference and not gathering and not busy and not examples and not (recv and (hostile or merged))"),
        timeout_s=5 * MINUTES,
        MCRELAY_NATIVE=str(native),
        LD_PRELOAD=runtime,
        # The interpreter itself keeps memory to its end; leaks of the core are looked for in its own tests.
        ASAN_OPTIONS="detect_leaks=0:abort_on_error=1",
        UBSAN_OPTIONS="halt_on_error=1:print_stacktrace=1",
    )

"""The wheel: one for all Pythons, each of which runs it."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
import zipfile
from collections import Counter
from email.parser import HeaderParser
from pathlib import Path
from typing import Final

import pytest

from lab.daemon import Daemon
from lab.namespaces import Lab, unsupported

OLDEST: Final = (3, 11)
ALL: Final = os.environ.get("MCRELAY_PACKAGES") == "all"  # make packages-test
ROOT: Final = Path(__file__).resolve().parents[2]


@functools.cache
def interpreters() -> dict[str, Path]:
    """Each Python of this machine that mcrelay may run on, by version; the distribution's, and those in PATH and of
    pyenv."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    directories = [Path("/usr/bin"), *map(Path, os.environ["PATH"].split(":")), *pyenv.glob("versions/*/bin")]
    found: dict[str, Path] = {}
    for directory in directories:
        for path in sorted(directory.glob("python3*")):
            if not re.fullmatch(r"python3(\.\d+)?", path.name) or ".venv" in path.parts:
                continue
            asked = subprocess.run(
                [path, "-c", "import sys; print('%d.%d.%d' % sys.version_info[:3])"],
                capture_output=True,
                text=True,
                check=False,
            )
            version = asked.stdout.strip()  # none of a shim whose Python is not chosen
            if asked.returncode == 0 and tuple(map(int, version.split(".")[:2])) >= OLDEST:
                found.setdefault(version, path)
    return found


def chosen() -> list[str]:
    """All of them, or the oldest, the distribution's and the newest."""
    versions = sorted(interpreters(), key=lambda version: tuple(map(int, version.split("."))))
    if ALL:
        return versions
    few = {versions[0], versions[-1], *(v for v, path in interpreters().items() if path.parent == Path("/usr/bin"))}
    return [version for version in versions if version in few]


def test_its_name_says_stable_interface_and_c_library(wheel: Path) -> None:
    """The C library's age, by which pip and an index know where it runs, is what its modules ask for."""
    builder = f"cp{sys.version_info.major}{sys.version_info.minor}"
    named = re.fullmatch(rf"mcrelay-[^-]+-{builder}-abi3-(?:\w+\.)?manylinux_(\d+)_(\d+)_\w+\.whl", wheel.name)
    assert named, wheel.name
    with zipfile.ZipFile(wheel) as archive:
        modules = [archive.read(name) for name in archive.namelist() if name.endswith(".so")]
        (facts,) = (archive.read(name) for name in archive.namelist() if name.endswith(".dist-info/WHEEL"))
    assert len(modules) == 3
    asked = {(int(a), int(b)) for module in modules for a, b in re.findall(rb"GLIBC_(\d+)\.(\d+)", module)}
    assert max(asked) <= (int(named[1]), int(named[2]))
    tags = [line.partition(": ")[2] for line in facts.decode().splitlines() if line.startswith("Tag: ")]
    assert {tag.split("-")[2] for tag in tags} == set(wheel.name.removesuffix(".whl").split("-")[-1].split("."))


def test_it_names_no_dependency_twice(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (facts,) = (archive.read(name) for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    required = HeaderParser().parsestr(facts.decode()).get_all("Requires-Dist", [])
    assert required
    assert [text for text, count in Counter(required).items() if count > 1] == []


@pytest.mark.parametrize("version", chosen())
def test_a_fresh_environment_runs_it(version: str, wheel: Path, tmp_path: Path) -> None:
    if tuple(map(int, version.split(".")))[:2] < sys.version_info[:2]:
        pytest.skip(f"the wheel was built with {sys.version_info.major}.{sys.version_info.minor}")
    if reason := unsupported():
        pytest.skip(reason)
    environment = tmp_path / "environment"
    subprocess.run([interpreters()[version], "-m", "venv", "--without-pip", environment], check=True, timeout=60)
    pip = (sys.executable, "-m", "pip", "--python", environment / "bin/python", "install", "--quiet")
    subprocess.run([*pip, wheel], check=True, timeout=120)
    program = str(environment / "bin/mcrelay")
    helped = subprocess.run([program, "version", "--help"], capture_output=True, text=True, check=True)
    assert helped.stdout.startswith("Usage: mcrelay version")
    assert (environment / "share/man/man8/mcrelay.8").exists()
    with Lab() as lab, Daemon(lab.namespace("host"), "--rootless", program=(program,)) as daemon:
        asked = subprocess.run(
            [program, "ping", "--socket", daemon.socket], capture_output=True, text=True, check=False, timeout=30
        )
        assert asked.stdout.startswith("the daemon at"), asked.stderr

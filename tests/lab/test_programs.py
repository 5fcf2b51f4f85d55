"""Programs of the lab: apart from each other and the host, and gone with their Lab however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.namespaces import NETNS_DIRECTORY, Lab, Namespace, sweep, unsupported, wait_until
from lab.programs import CONFIGURATION, Program, missing

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(unsupported() is not None, reason=unsupported() or "")


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    with Lab() as lab:
        yield lab.namespace("programs")


def test_what_is_missing_is_named() -> None:
    assert missing("sh") is None
    assert "no-such-program" in (missing("sh", "no-such-program") or "")


def test_each_has_a_run_of_its_own(namespace: Namespace) -> None:
    script = f"ls /run; cat {CONFIGURATION}; exec sleep 60"
    with (
        Program(namespace, "sh", "-c", script, configuration="first\n") as first,
        Program(namespace, "sh", "-c", script, configuration="second\n") as second,
    ):
        first.wait_for("first")
        second.wait_for("second")
        assert first.lines == ["program.conf", "first"]
        assert second.lines == ["program.conf", "second"]
        assert first.process.pid in namespace.pids()  # the program itself, not a shell around it
    assert not Path(CONFIGURATION).exists()
    assert namespace.pids() == []


def test_one_that_fails_is_not_waited_for(namespace: Namespace) -> None:
    program = Program(namespace, "sh", "-c", "echo what is wrong >&2; exit 3")
    with pytest.raises(RuntimeError, match=r"(?s)ended with 3.*what is wrong"):
        program.wait_for("ready")


def test_a_crash_leaves_nothing() -> None:
    script = (
        "import os, signal\nfrom lab.namespaces import Lab\nfrom lab.programs import Program\n"
        "namespace = Lab().namespace('crash')\n"
        "Program(namespace, 'sh', '-c', 'echo up; exec sleep 60').wait_for('up')\n"
        "print(namespace.name, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == -signal.SIGKILL, done.stderr
    name = done.stdout.strip()
    pids = [int(pid) for pid in subprocess.check_output(["ip", "netns", "pids", name], text=True).split()]
    assert pids
    assert name in sweep()
    assert not (NETNS_DIRECTORY / name).exists()
    wait_until(lambda: not any(alive(pid) for pid in pids), 5, "a program outlived its Lab")


def alive(pid: int) -> bool:
    """Not a zombie, which nobody here has to reap."""
    return os.path.exists(f"/proc/{pid}/exe")

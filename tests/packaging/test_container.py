"""The container: its file, and what its daemon has there, without an engine to run it.

A root that is read-only but for /run, and the capabilities that docs/service.md gives it, no others.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from lab.namespaces import Lab, unsupported
from lab.roots import Root

ROOT: Final = Path(__file__).resolve().parents[2]
CONTAINERFILE: Final = (ROOT / "packaging/Containerfile").read_text()
READ_ONLY: Final = 'mount -o remount,bind,ro / && ! touch /etc/probe 2>/dev/null && exec "$@"'


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", CONTAINERFILE, flags=re.MULTILINE).replace("\\\n", "")
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in text.splitlines() if line.strip()]


def capabilities() -> list[str]:
    return re.findall(r"--cap-add=([A-Z_]+)", (ROOT / "docs/service.md").read_text())


@pytest.fixture
def root(package: Path) -> Iterator[Root]:
    if reason := unsupported():
        pytest.skip(reason)
    with Lab() as lab, Root(lab.namespace("host")) as root:
        root.install(package)
        yield root


def test_the_file_copies_what_is_there_and_ends_harmless() -> None:
    found = instructions()
    for name, argument in found:
        if name == "COPY":
            *sources, _target = argument.split()
            assert all((ROOT / source).exists() for source in sources), argument
    last = dict(found)
    assert last["USER"] == "root:mcrelay"
    assert last["HEALTHCHECK"].endswith('CMD ["mcrelay", "health"]')
    assert last["ENTRYPOINT"] == '["mcrelay"]'


def test_it_is_given_what_the_unit_gives() -> None:
    unit = (ROOT / "packaging/systemd/mcrelay.service").read_text()
    bounding = re.findall(r"^CapabilityBoundingSet=(.*)$", unit, flags=re.MULTILINE)
    assert sorted(f"CAP_{name}" for name in capabilities()) == sorted(" ".join(bounding).split())


def test_it_runs_on_a_read_only_root_with_these_capabilities(root: Root) -> None:
    kept = ",".join(["-all", *(f"+{name.lower()}" for name in capabilities())])
    harmless = ("setpriv", "--regid", "mcrelay", "--clear-groups", "--inh-caps", "-all", "--bounding-set", kept)
    run = ("unshare", "--mount", "sh", "-c", READ_ONLY, "sh", *harmless, "mcrelay", "run")
    with root.daemon(*run) as daemon:
        root.run("ip", "link", "add", "in0", "type", "veth", "peer", "out0")
        for interface, address in (("in0", "192.0.2.1/24"), ("out0", "198.51.100.1/24")):
            root.run("ip", "address", "add", address, "dev", interface)
            root.run("ip", "link", "set", interface, "up")
        for source in ("192.0.2.1:500%in0", "239.1.1.1:5000%in0"):
            assert "active" in root.run("mcrelay", "add", source, "239.2.2.2:6000%out0").stdout
        assert root.run("stat", "--format=%U:%G %a", "/run/mcrelay/control.sock").stdout == "root:mcrelay 660\n"
        root.run("pkill", "--full", "mcrelay run")
        _, log = daemon.communicate(timeout=10)
    assert daemon.returncode == 0, log
    running = log.partition("exited with")[0]
    assert "ready:" in running
    assert not re.search("WARNING|ERROR", running), log

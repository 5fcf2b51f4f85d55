"""The Debian package in a clean root without a service manager, as in a container or a chroot.

sender: eth0 -- in0 :relay: out0 -- eth0 :receiver
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from lab.namespaces import wait_until
from lab.roots import Root
from lab.topology import RelayLine
from lab.traffic import ReceivePlan, SendPlan, run_sender, start_receiver

INPUT: Final = "239.1.1.1:5000"
OUTPUT: Final = "239.2.2.2:6000"
# What other packages remember of any package that was there, and the user, whose number must not be given away.
DISTRIBUTION: Final = re.compile(
    r"/var/(lib/dpkg|log|cache)/.*|/etc/\.pwd\.lock|/etc/(passwd|group|shadow|gshadow|subuid|subgid)-?"
)


@pytest.fixture
def root(line: RelayLine) -> Iterator[Root]:
    with Root(line.relay) as root:
        yield root


def test_it_is_installed_relays_and_is_purged(line: RelayLine, root: Root, package: Path) -> None:
    before = root.written()
    root.install(package)
    assert "/usr/bin/mcrelay" in root.written()
    owner = root.run("id", "--name", "--user", "mcrelay").stdout.strip()
    assert owner == "mcrelay"
    with root.daemon("mcrelay", "run") as daemon:
        added = root.run("mcrelay", "add", f"{INPUT}%{line.ingress_interface}", f"{OUTPUT}%out0", "--name", "feed")
        assert "active" in added.stdout
        receiver = start_receiver(line.receiver, ReceivePlan(OUTPUT, interface="eth0", idle_timeout_s=10))
        sent = run_sender(line.sender, SendPlan(INPUT, interface="eth0", rate=500, duration_s=0.2)).sent
        wait_until(
            lambda: f'"forwarded": {sent}' in root.run("mcrelay", "stats", "--json").stdout, 20, "not all is there"
        )
        assert receiver.stop().received == sent
        assert set(root.run("ps", "-o", "user=", "-C", "mcrelay-control").stdout.split()) <= {"mcrelay"}
        root.run("mcrelay", "upgrade")  # the successor is found, too
        assert daemon.wait(10) == 0
        assert "feed" in root.run("mcrelay", "list").stdout
        root.run("pkill", "--full", "mcrelay run")
        wait_until(
            lambda: root.run("pgrep", "--full", "--runstates", "R,S,D", "mcrelay", check=False).returncode == 1,
            10,
            "still running",
        )
    root.run("dpkg", "--purge", "mcrelay")
    # A directory of this machine's in which something was is in the overlay, too.
    left = {path for path in root.written() - before if not DISTRIBUTION.fullmatch(path) and not Path(path).is_dir()}
    assert left == set()
    assert root.run("sh", "-c", "ls -d /run/mcrelay* /etc/mcrelay /usr/lib/mcrelay", check=False).stdout == ""
    named = root.run("grep", "--recursive", "--files-with-matches", "mcrelay", "/etc", check=False).stdout.split()
    assert {path for path in named if not DISTRIBUTION.fullmatch(path)} == set()


def test_configuration_stays_until_it_is_purged(root: Root, package: Path) -> None:
    root.install(package)
    root.write("/etc/mcrelay/mcrelay.toml", "# mine\n")
    root.run("dpkg", "--remove", "mcrelay")
    assert root.run("cat", "/etc/mcrelay/mcrelay.toml").stdout == "# mine\n"
    assert root.run("ls", "/usr/lib/mcrelay", check=False).returncode == 2
    root.run("dpkg", "--purge", "mcrelay")
    assert root.run("ls", "/etc/mcrelay", check=False).returncode == 2


def test_what_is_in_it(package: Path) -> None:
    """Owners, modes, and that it depends on the Python that its compiled modules are for."""

    def dpkg_deb(*arguments: str) -> str:
        return subprocess.run(["dpkg-deb", *arguments], capture_output=True, text=True, check=True).stdout

    entries = [line.split(None, 5) for line in dpkg_deb("--contents", str(package)).splitlines()]
    programs = {"./usr/bin/mcrelay"}
    for mode, owner, *_, path in entries:
        assert owner == "root/root", path
        if mode[0] == "l":
            assert path == "./usr/lib/mcrelay/bin/python -> ../../../bin/python3"
        else:
            assert mode == ("drwxr-xr-x" if mode[0] == "d" else "-rwxr-xr-x" if path in programs else "-rw-r--r--"), (
                path
            )
    paths = {entry[5] for entry in entries}
    assert not {path for path in paths if "__pycache__" in path or path.endswith((".pyc", "direct_url.json"))}
    version = subprocess.run(
        ["/usr/bin/python3", "-c", "import sys; print('%d.%d' % sys.version_info[:2])"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    depends = dpkg_deb("--field", str(package), "Depends")
    assert f"python3 (>= {version}~), python3 (<< " in depends
    assert "libc6 (>= " in depends
    for expected in (
        "./etc/mcrelay/mcrelay.toml",
        "./etc/mcrelay/conf.d/",
        "./usr/lib/systemd/system/mcrelay.service",
        "./usr/lib/systemd/system/mcrelay@.service",
        "./usr/lib/systemd/system/mcrelay-hook.service",
        "./usr/share/bash-completion/completions/mcrelay",
        "./usr/share/zsh/vendor-completions/_mcrelay",
        "./usr/share/fish/vendor_completions.d/mcrelay.fish",
        "./usr/share/doc/mcrelay/copyright",
        "./usr/share/man/man8/mcrelay.8.gz",
    ):
        assert expected in paths
    assert dpkg_deb("--info", str(package), "conffiles").split() == ["/etc/mcrelay/mcrelay.toml"]

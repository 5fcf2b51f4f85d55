"""The Debian package in a clean root without a service manager, as in a container or a chroot.

sender: eth0 -- in0 :relay: out0 -- eth0 :receiver
"""

from __future__ import annotations

import itertools
import platform
import re
import subprocess
from collections.abc import Iterator
from email.parser import HeaderParser
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


def dpkg_deb(*arguments: str | Path) -> str:
    return subprocess.run(["dpkg-deb", *arguments], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def unpacked(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("unpacked")
    dpkg_deb("--extract", package, directory)
    return directory


def test_its_version_says_for_which_distribution_it_is(package: Path) -> None:
    release = platform.freedesktop_os_release()
    built_for = {"debian": "deb", "ubuntu": "ubuntu"}[release["ID"]] + release["VERSION_ID"]
    version = dpkg_deb("--field", package, "Version").strip()
    assert version.endswith(f"~{built_for}")
    assert package.name.split("_")[1] == version
    upstream = version.removesuffix(f"~{built_for}")
    order = [
        f"{upstream}~~rc1~{built_for}",
        version,
        f"{upstream}~{built_for}.1",
        upstream,
        f"{upstream}.1~{built_for}",
    ]
    for less, more in itertools.pairwise(order):
        subprocess.run(["dpkg", "--compare-versions", less, "lt", more], check=True)


def test_modules_are_stripped_and_can_be_identified(unpacked: Path) -> None:
    modules = sorted(unpacked.rglob("*.so"))
    assert len(modules) > 3
    for module in modules:
        facts = subprocess.run(
            ["readelf", "--wide", "--sections", "--notes", module], capture_output=True, text=True, check=True
        ).stdout
        assert ".symtab" not in facts, module
        assert ".debug" not in facts, module
        assert re.search(r"Build ID: [0-9a-f]{40}", facts), module


def test_the_copyright_file_has_all_that_is_bundled(unpacked: Path) -> None:
    """Each file is somebody's, and each licence is there, word for word."""
    text = (unpacked / "usr/share/doc/mcrelay/copyright").read_text()
    header, *stanzas = (HeaderParser().parsestr(paragraph) for paragraph in text.strip().split("\n\n"))
    assert header["Format"] == "https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/"
    for stanza in stanzas:
        assert stanza.keys() == ["Files", "Copyright", "License"]
        assert all(stanza.values())
        assert re.fullmatch(r"[\w.+-]+( (and|or) [\w.+-]+)*", stanza["License"].splitlines()[0]), stanza["License"]
    (packages,) = unpacked.glob("usr/lib/mcrelay/lib/python3*/site-packages")
    patterns = " ".join(stanza["Files"] for stanza in stanzas[1:]).split()
    for path in packages.iterdir():
        own = path.name == "mcrelay" or path.name.startswith("mcrelay-")
        pattern = f"{path.relative_to(unpacked)}{'/*' if path.is_dir() else ''}"
        assert patterns.count(pattern) == (not own), path
    words = " ".join(line.strip(" .") for line in text.splitlines()).split()
    carried = " ".join(words)
    licences = [path for path in packages.glob("*.dist-info/licenses/*") if "/mcrelay-" not in str(path)]
    assert len(licences) > 6
    for licence in licences:
        for line in licence.read_text().replace("\f", "").splitlines():
            assert " ".join(line.strip(" .").split()) in carried, (licence, line)
    for notice in ("Jens Axboe", "Michele Simionato", "liburing, under the MIT licence"):  # of what has no such file
        assert notice in text


def test_what_is_in_it(package: Path) -> None:
    """Owners, modes, and that it depends on the Python that its compiled modules are for."""

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

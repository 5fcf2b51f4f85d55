"""Rootless mode's refusals and remarks, and where its daemon and clients meet."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mcrelay import places, service
from mcrelay.cli import cli
from mcrelay.errors import Error, RuleError, UsageError
from mcrelay.limits import PORTS_MAX
from mcrelay.net.plain import Ports
from mcrelay.options import Options
from mcrelay.rootless import buffer_remark, check_rule, reverse_path_remark
from mcrelay.ruletext import parse_rule

OUTPUT = "239.2.2.2:6000%eth1"
CORES = sorted(os.sched_getaffinity(0))


# --- rules -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("port", "first"), [(1024, 1024), (65535, 1024), (1, 0), (80, 80)])
def test_a_rule_for_one_group_and_port_is_possible(port: int, first: int) -> None:
    check_rule(parse_rule(f"239.1.1.1:{port}%eth0", [OUTPUT]), first, ())


@pytest.mark.parametrize(
    ("input", "output"),
    [
        ("192.0.2.9@232.1.1.1:5000%eth0", OUTPUT),
        ("[ff3e::1]:5000%eth0", "[ff3e::2]:6000%eth1,ttl=keep,dscp=46,rate=1Mbit"),
        ("239.1.1.1:5000%eth+", "=:=%eth9,loop"),
        ("192.0.2.1:5000%eth0", "10.0.0.1:5000%eth1,source=192.0.2.1"),
    ],
)
def test_whatever_ordinary_sockets_can_do_is_possible(input: str, output: str) -> None:
    check_rule(parse_rule(input, [output]), 1024, {"192.0.2.1"})


REFUSED = [
    ("239.1.1.1:1023%eth0", OUTPUT, "ports below 1024", "ip_unprivileged_port_start=1023"),
    ("239.1.1.0/24:5000%eth0", OUTPUT, "no prefix of addresses", "name each one"),
    ("239.1.1.1:*%eth0", OUTPUT, "bound to one port", "name the port"),
    ("239.1.1.1:5000%eth0,vlan=7", OUTPUT, "no VLAN tag", "name a VLAN interface"),
    ("239.1.1.1:esp%eth0", "239.2.2.2:esp%eth1", "no ESP", "name a UDP port"),
    ("239.1.1.1:5000%eth0", "239.2.2.2:6000%eth1,source=keep", "another host's source", "leave out source=keep"),
    ("239.1.1.1:5000%eth0", "10.0.0.1:6000%eth1,sport=7", "a source port that is given", "leave out sport=7"),
    ("239.1.1.1:5000%eth0", "10.0.0.1:6000%eth1,sport=keep", "a source port that is given", "leave out sport=keep"),
    ("239.1.1.1:5000%eth0", "10.0.0.1:6000%eth1,source=192.0.2.2", "no address of this host", "ip -brief address"),
]


@pytest.mark.parametrize(("input", "output", "what", "remedy"), REFUSED)
def test_what_ordinary_sockets_cannot_do_is_refused(input: str, output: str, what: str, remedy: str) -> None:
    with pytest.raises(RuleError) as refusal:
        check_rule(parse_rule(input, [output]), 1024, {"192.0.2.1"})
    assert what in str(refusal.value)
    assert remedy in refusal.value.hint
    assert "run mcrelay as root" in refusal.value.hint
    assert "--rootless" in refusal.value.message


# --- remarks ---------------------------------------------------------------------------------------------------------


def test_small_buffers_are_remarked_on() -> None:
    assert buffer_remark(1000, 1000) is None
    remark = buffer_remark(8388608, 212992)
    assert remark is not None
    assert "212992 bytes" in remark
    assert "sysctl -w net.core.rmem_max=8388608" in remark


@pytest.mark.parametrize(("strictness", "words"), [(0, None), (1, "by this interface"), (2, "at all"), (3, None)])
def test_the_check_of_sources_is_remarked_on(strictness: int, words: str | None) -> None:
    remark = reverse_path_remark("eth0", strictness)
    if words is None:
        assert remark is None
    else:
        assert remark is not None
        assert words in remark
        assert f"net.ipv4.conf.eth0.rp_filter or .all is {strictness}" in remark


# --- the command line ------------------------------------------------------------------------------------------------


class Run:
    """What the daemon would be told."""

    def __init__(self) -> None:
        self.options: Options | None = None

    def __call__(self, options: Options) -> None:
        self.options = options


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    run = Run()
    monkeypatch.setattr(service, "run", run)
    monkeypatch.delenv("MCRELAY_SOCKET", raising=False)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    return run


@pytest.mark.parametrize(
    ("arguments", "cores"),
    [
        ([], CORES[:1]),
        (["--workers", "1"], CORES[:1]),
        (["--cores", f"{CORES[-1]}"], CORES[-1:]),
    ],
)
def test_there_is_one_worker(run: Run, arguments: list[str], cores: list[int]) -> None:
    cli.main(["run", "--rootless", *arguments], standalone_mode=False)
    assert run.options is not None
    assert run.options.rootless
    assert run.options.cores == tuple(cores)
    assert run.options.socket == f"/tmp/mcrelay-{os.geteuid()}/control.sock"


@pytest.mark.parametrize("arguments", [["--workers", "2"], ["--cores", "0,1"], ["--cores", "0-1"]])
def test_more_are_refused(run: Run, arguments: list[str]) -> None:
    with pytest.raises(UsageError, match="--rootless has one data plane worker"):
        cli.main(["run", "--rootless", *arguments], standalone_mode=False)
    assert not run.options


def test_rings_that_are_not_there_have_no_size(run: Run) -> None:
    with pytest.raises(UsageError, match="--ring-mib"):
        cli.main(["run", "--rootless", "--ring-mib", "16"], standalone_mode=False)
    assert not run.options


def test_the_system_s_daemon_is_not_rootless(run: Run) -> None:
    cli.main(["run"], standalone_mode=False)
    assert run.options is not None
    assert not run.options.rootless
    assert run.options.socket == places.SYSTEM_SOCKET


@pytest.mark.parametrize("mode", [[], ["--rootless"]])
def test_a_socket_that_is_given_is_taken(run: Run, mode: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    cli.main(["run", *mode, "--socket", "/a/b"], standalone_mode=False)
    assert run.options is not None
    assert run.options.socket == "/a/b"
    monkeypatch.setenv("MCRELAY_SOCKET", "/c/d")
    cli.main(["run", *mode], standalone_mode=False)
    assert run.options.socket == "/c/d"


# --- places ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A runtime directory of ours, and no daemon of the system."""
    runtime = tmp_path / "runtime"
    runtime.mkdir(0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    monkeypatch.delenv("MCRELAY_SOCKET", raising=False)
    monkeypatch.setattr(places, "SYSTEM_SOCKET", str(tmp_path / "system.sock"))
    return runtime


def test_the_user_s_daemon_is_found_if_the_system_has_none(runtime: Path, tmp_path: Path) -> None:
    system, user = tmp_path / "system.sock", runtime / "mcrelay" / "control.sock"
    assert places.user_socket() == str(user)
    assert places.find_socket() == str(system)  # nobody anywhere: that is the one to speak of
    places.make_user_directory(str(user))
    assert (runtime / "mcrelay").stat().st_mode & 0o777 == 0o700
    places.make_user_directory(str(user))  # it may be there already
    user.touch()
    assert places.find_socket() == str(user)
    system.touch()
    assert places.find_socket() == str(system)


def test_the_environment_comes_first(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MCRELAY_SOCKET", "/somewhere")
    assert places.find_socket() == "/somewhere"


@pytest.mark.parametrize("value", ["", "relative", "/nowhere-at-all"])
def test_a_runtime_directory_that_is_none_is_not_used(
    runtime: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", value)
    assert places.user_socket() == f"/tmp/mcrelay-{os.geteuid()}/control.sock"


def test_a_directory_that_others_may_write_to_is_not_trusted(runtime: Path) -> None:
    directory = runtime / "mcrelay"
    directory.mkdir()
    (directory / "control.sock").touch()
    directory.chmod(0o777)
    assert places.find_socket() == places.SYSTEM_SOCKET
    with pytest.raises(Error, match="is not ours alone to write to"):
        places.make_user_directory(str(directory / "control.sock"))
    directory.chmod(0o700)
    directory.rename(runtime / "elsewhere")
    directory.symlink_to(runtime / "elsewhere")  # nor one that somebody else may lead elsewhere
    with pytest.raises(Error, match="is not ours alone to write to"):
        places.make_user_directory(str(directory / "control.sock"))


def test_a_directory_that_cannot_be_made_is_an_error(runtime: Path) -> None:
    with pytest.raises(Error, match="cannot make") as refusal:
        places.make_user_directory(str(runtime / "a" / "b" / "control.sock"))
    assert refusal.value.code == "cannot_create"


def test_ports_are_counted_over_all_interfaces() -> None:
    """A worker has a descriptor for each, and no more than that (sandbox.py)."""
    ports = Ports()
    for port in range(1, 601):
        ports.keep(["eth0"], port)
    left = [("eth1", port) for port in range(1, PORTS_MAX - 600 + 1)]
    ports.check(left)
    ports.check([*left, ("eth0", 600)])  # which is there already
    with pytest.raises(RuleError, match=f"no more than {PORTS_MAX} ports, those of all interfaces together") as refusal:
        ports.check([*left, ("eth0", 601)])
    assert "use fewer ports" in refusal.value.hint
    ports.release(["eth0"], 600)
    ports.check([*left, ("eth0", 601)])


def test_the_engine_has_room_for_as_many_ports() -> None:
    header = (Path(__file__).parents[2] / "native" / "datagrams.h").read_text()
    assert f"DATAGRAM_SOCKETS_MAX = {PORTS_MAX} " in header

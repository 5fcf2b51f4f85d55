"""The style that tools can check, and who may import and use what (docs/ARCHITECTURE.md)."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "src"
PACKAGE = SOURCES / "mcrelay"
NATIVE = ROOT / "native"
MODULE_LINES_MAX = 600


def name_of(path: Path) -> str:
    """src/mcrelay/net/sockets.py -> mcrelay.net.sockets"""
    parts = path.relative_to(SOURCES).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(), str(path)) for name, path in MODULES.items()}


# --- tools -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["ruff", "check", "--output-format=concise", "."],
        ["ruff", "format", "--diff", "."],
        ["mypy"],  # strict, and which files: pyproject.toml
    ],
    ids=" ".join,
)
def test_a_tool_has_no_complaint(arguments: list[str]) -> None:
    result = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"


# --- who may import what ---------------------------------------------------------------------------------------------


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module that is imported anywhere in a module, inside functions too. Of `from a import b` both a and a.b,
    since b may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "an import relative to its module"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def reached(name: str) -> set[str]:
    """Everything that importing a module of ours imports, by way of other modules of ours."""
    found: set[str] = set()
    left = [name]
    while left:
        module = left.pop()
        for imported in imports(TREES[module]):
            if imported in TREES and imported not in found:
                left.append(imported)
            found.add(imported)
    return found


PURE = sorted(
    name
    for name in MODULES
    if name.removeprefix("mcrelay.")
    in (
        *("cells", "rates", "top", "top_tables", "top_details"),
        *("rules", "ruletext", "entries", "ways", "cycles", "messages", "api", "codec"),
        *("frames", "counters", "limits", "steering", "documents", "handshake", "conversation", "calls"),
        *("facts", "nearness", "sightings", "arrival", "departure", "explain", "doctor", "reasons"),
        *("engines.reassembly", "rootless", "tap", "pcapng"),
        *("settings", "config", "declared", "flows"),
        *("endpoint", "cores", "health", "metrics"),
    )
    or name.startswith("mcrelay.protocols")
)


def test_imports_are_found_wherever_they_stand() -> None:
    tree = ast.parse("import a.b\ndef f():\n    from c import d as e\n    import socket as s\n")
    assert set(imports(tree)) == {"a.b", "c", "c.d", "socket"}
    assert "socket" in reached("mcrelay.supervisor")  # by way of others
    assert len(PURE) >= 5


@pytest.mark.parametrize("name", PURE)
def test_a_pure_module_reaches_no_socket_loop_or_system(name: str) -> None:
    worldly = {"socket", "asyncio", "os", "_socket", "posix", "io", "pathlib", "subprocess", "time", "threading"}
    assert {module for module in reached(name) if module.split(".")[0] in worldly} == set()


@pytest.mark.parametrize("name", MODULES)
def test_the_program_does_not_import_what_tests_it(name: str) -> None:
    foreign = {"lab", "bench", "tests", "pytest", "hypothesis"}
    assert {module for module in imports(TREES[name]) if module.split(".")[0] in foreign} == set()


# --- who may use privilege -------------------------------------------------------------------------------------------

# Constants and calls that take privilege, or are about it. Words in text are not meant.
PRIVILEGED = re.compile(
    r"AF_PACKET|AF_NETLINK|SOCK_RAW|PACKET_FANOUT\w*|PACKET_RX_RING|PACKET_ADD_MEMBERSHIP|PACKET_IGNORE_OUTGOING"
    r"|SO_\w+FORCE|SO_ATTACH_\w+|SO_BINDTODEVICE|SO_MARK|SO_PRIORITY|SO_PEER\w+|IP_ADD_\w*MEMBERSHIP|MCAST_\w+|IP\w*_FREEBIND"
    r"|IP_TRANSPARENT|MRT_\w+"
    r"|_?set(re|res|e)?[ug]id|setgroups|initgroups|_?capset|_CAPSET|_CAPGET|_?prctl|PR_[A-Z]\w+|CAP_[A-Z]\w+|_?libc|CDLL"
    r"|unshare|setns|chroot|mount|ptrace|mlock(all)?|system_call"
)
MAY = {
    "mcrelay.net.sockets": re.compile(
        r"AF_PACKET|SOCK_RAW|PACKET_FANOUT\w*|PACKET_RX_RING|PACKET_IGNORE_OUTGOING|SO_\w+FORCE|_libc|CDLL"
    ),
    "mcrelay.net.egress": re.compile(r"AF_PACKET|SOCK_RAW|SO_\w+FORCE|SO_BINDTODEVICE|IP_TRANSPARENT"),
    "mcrelay.net.tap_sockets": re.compile(r"SO_SNDBUFFORCE"),
    "mcrelay.net.filters": re.compile(r"SO_ATTACH_FILTER"),
    "mcrelay.net.memberships": re.compile(r"MCAST_\w+"),
    "mcrelay.net.absorbers": re.compile(r"IP\w*_FREEBIND|SOCK_RAW"),
    # What takes no privilege: an address that the host may have later.
    "mcrelay.scrape_listener": re.compile(r"IP\w*_FREEBIND"),
    "mcrelay.net.admission": re.compile(r"SO_ATTACH_BPF|_libc|CDLL"),
    # Of whoever types `mcrelay receive` or `send`, where they have it: a large receive buffer, a unicast socket on one
    # interface; and memberships, which take none.
    "mcrelay.net.traffic_sockets": re.compile(r"SO_RCVBUFFORCE|SO_BINDTODEVICE|IP_ADD_MEMBERSHIP"),
    # Of whoever types `mcrelay explain`: to look at frames.
    "mcrelay.net.watch": re.compile(r"AF_PACKET|SOCK_RAW|PACKET_IGNORE_OUTGOING|SO_ATTACH_FILTER|MCAST_JOIN_\w+"),
    # What takes no privilege: the first binding to an interface (Linux 5.7).
    "mcrelay.net.plain": re.compile(r"SO_BINDTODEVICE"),
    "mcrelay.process": re.compile(
        r"set(res)?[ug]id|setgroups|_CAP[GS]ET|_?prctl|PR_\w+|CAP_\w+|_?libc|CDLL|system_call"
    ),
    # Less of it: filters, rulesets, and the name of a thread, which is permitted.
    "mcrelay.sandbox": re.compile(r"PR_SET_NAME|system_call"),
    "mcrelay.seccomp": re.compile(r"system_call"),
    "mcrelay.landlock": re.compile(r"system_call"),
    # Who is at the other end of a client's connection.
    "mcrelay.listener": re.compile(r"SO_PEER\w+|_?libc|CDLL"),
}


def identifiers(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.FunctionDef(name=name) | ast.arg(arg=name):
                yield name
            case ast.alias(name=name, asname=other):
                yield name.rpartition(".")[2]
                if other:
                    yield other


def test_identifiers_are_found_wherever_they_stand() -> None:
    tree = ast.parse("from socket import AF_PACKET as p\nimport os\nos.setresuid(1, 1, 1)\n'CAP_NET_RAW'\ncapset = 1\n")
    assert {name for name in identifiers(tree) if PRIVILEGED.fullmatch(name)} == {"AF_PACKET", "setresuid", "capset"}


@pytest.mark.parametrize("name", MODULES)
def test_privilege_is_used_in_its_places_alone(name: str) -> None:
    used = {word for word in identifiers(TREES[name]) if PRIVILEGED.fullmatch(word)}
    allowed = MAY.get(name)
    assert {word for word in used if not (allowed and allowed.fullmatch(word))} == set()


@pytest.mark.parametrize("name", MAY)
def test_a_place_that_may_use_privilege_does(name: str) -> None:
    assert any(MAY[name].fullmatch(word) for word in identifiers(TREES[name]))


# --- modules ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODULES)
def test_a_module_says_what_it_is_and_is_not_too_long(name: str) -> None:
    docstring = ast.get_docstring(TREES[name])
    assert docstring
    assert len(MODULES[name].read_text().splitlines()) <= MODULE_LINES_MAX


# --- the native core -------------------------------------------------------------------------------------------------

NATIVE_FILES = {path.name: path for path in sorted([*NATIVE.glob("*.c"), *NATIVE.glob("*.h")])}
PURE_NATIVE = ["pace.c", "pace.h", "packet.c", "packet.h", "table.c", "table.h", "pool.c", "pool.h", "counters.h"]
PURE_NATIVE += ["addresses.c", "addresses.h", "loops.c", "loops.h", "payload.h", "analyser.c", "analyser.h"]
PURE_NATIVE += ["checksum.h", "ways.h", "limit.c", "limit.h", "headers.c", "headers.h"]


def includes(name: str) -> set[str]:
    """What a file includes, by way of other files of ours too."""
    found: set[str] = set()
    left = [name]
    while left:
        text = NATIVE_FILES[left.pop()].read_text()
        for header in re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', text, re.MULTILINE):
            if header in NATIVE_FILES and header not in found:
                left.append(header)
            found.add(header)
    return found


@pytest.mark.parametrize("name", NATIVE_FILES)
def test_the_native_core_knows_nothing_of_python(name: str) -> None:
    assert {header for header in includes(name) if re.match(r"Python\.h|cpython/|pyconfig", header)} == set()


@pytest.mark.parametrize("name", PURE_NATIVE)
def test_a_pure_part_of_the_native_core_includes_nothing_of_the_system(name: str) -> None:
    """The C standard library's headers are all it needs, so that sanitizers and fuzzers run it alone."""
    standard = {"assert.h", "errno.h", "limits.h", "stdalign.h", "stdatomic.h", "stdbool.h", "stddef.h", "stdint.h"}
    standard |= {"inttypes.h", "stdio.h", "stdlib.h", "string.h"}
    assert includes(name) <= standard | set(PURE_NATIVE)


def test_includes_are_followed() -> None:
    assert "stdatomic.h" in includes("table.c")  # by way of packet.h and counters.h
    assert "sys/socket.h" in includes("receive.c")

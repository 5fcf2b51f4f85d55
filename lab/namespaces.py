"""Network namespaces, the veth pairs between them, and the processes that run inside.

A `Lab` owns everything it made: named namespaces, the links in them (a link dies with its namespace) and
the processes started through them. Leaving its `with` block ends the processes and deletes the namespaces,
whatever the reason for leaving. A process that was killed outright cannot do that, so every name carries
the pid of its owner, `mcr-<pid>-<label>-<n>`, and every Lab first sweeps away the namespaces whose owner is
gone.

Kernel facts relied on:

- The network namespace is an attribute of a thread, not of a process. A fresh thread that has called
  setns(2) can open a socket "over there"; the socket stays in that namespace when it is used from any other
  thread. The calling thread never moves, so there is nothing to restore and nothing to get wrong on an
  exception.
- /proc/sys/net is resolved against the namespace of the reading thread, so sysctls need no subprocess
  either.
- `ip netns exec` replaces itself by the program: the pid that Popen reports is the program's own.
- A new namespace copies the IPv4 settings of the initial one. The ones that decide whether a datagram is
  accepted (rp_filter, ip_forward) are therefore set explicitly: a lab must not depend on the host's
  configuration.
- A veth end transmits once both ends are up and the link watcher has run, asynchronously. The watcher takes
  its time, a whole second, for a device whose peer has the same interface index as itself, since it takes the
  two for one device; hence the indexes that no other link of this process has.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import ipaddress
import itertools
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

T = TypeVar("T")

NETNS_DIRECTORY = Path("/run/netns")
NAME_PREFIX = "mcr"
NAME_PATTERN = re.compile(rf"{NAME_PREFIX}-(\d+)-.+")

CLONE_NEWNET = 0x4000_0000  # <sched.h>
SIOCGIFFLAGS = 0x8913  # <linux/sockios.h>
IFF_RUNNING = 0x40  # <linux/if.h>

COMMAND_DEADLINE_S = 30.0
TERM_DEADLINE_S = 3.0  # between SIGTERM and SIGKILL
KILL_DEADLINE_S = 5.0  # a killed process is reaped within this, or something is badly wrong
LINK_DEADLINE_S = 15.0
POLL_INTERVAL_S = 0.01

_libc = ctypes.CDLL(None, use_errno=True)
_counter = itertools.count()
_ifindexes = itertools.count(101)
_names_in_use: set[str] = set()  # tells our namespaces from those of a dead process that had our pid


def unsupported() -> str | None:
    """Why labs cannot be built here, or None when they can: the reason a test prints when it skips."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "iproute2 (`ip`) is not installed"
    probe = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False)
    if probe.returncode != 0:
        return f"`ip netns` does not work here: {probe.stderr.strip()}"
    return None


def wait_until(predicate: Callable[[], T], deadline_s: float = 15.0, message: str = "condition not met") -> T:
    """Poll until `predicate` is true and return its value; TimeoutError with `message` after `deadline_s`. The last
    look is behind the deadline: that this process had no processor in between is no reason to fail."""
    deadline = time.monotonic() + deadline_s
    while True:
        is_late = time.monotonic() >= deadline
        value = predicate()
        if value:
            return value
        if is_late:
            raise TimeoutError(f"{message} (waited {deadline_s:g} s)")
        time.sleep(POLL_INTERVAL_S)


class Namespace:
    """One network namespace of a Lab. Made by `Lab.namespace`, gone when the Lab is left."""

    def __init__(self, lab: Lab, name: str, label: str) -> None:
        self.lab = lab
        self.name = name
        self.label = label

    def __repr__(self) -> str:
        return f"<Namespace {self.name}>"

    # --- processes ---

    def run(
        self, *argv: str, check: bool = True, timeout: float = COMMAND_DEADLINE_S, input: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a short command to its end, its output captured; with `check`, a failure shows its stderr."""
        return _run("ip", "netns", "exec", self.name, *argv, check=check, timeout=timeout, input=input)

    def popen(self, *argv: str, **options: Any) -> subprocess.Popen[str]:
        """Start a program, in text mode unless told otherwise; the Lab ends it when it is left."""
        options.setdefault("text", True)
        # Its own session: a Ctrl-C at the terminal reaches the Lab's owner only, which ends all in order.
        options.setdefault("start_new_session", True)
        command = ["ip", "netns", "exec", self.name, *argv]
        process: subprocess.Popen[str] = subprocess.Popen(command, **options)
        self.lab.adopt(process)
        return process

    # --- things done by a thread of this process ---

    def call(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Run `function` in a fresh thread inside the namespace; its result or exception is the caller's."""
        future: Future[T] = Future()

        def inside() -> None:
            try:
                descriptor = os.open(NETNS_DIRECTORY / self.name, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    if _libc.setns(descriptor, CLONE_NEWNET) != 0:
                        error = ctypes.get_errno()
                        raise OSError(error, f"setns: {os.strerror(error)}", self.name)
                finally:
                    os.close(descriptor)
                future.set_result(function(*args, **kwargs))
            except BaseException as exception:  # carried over to the caller's thread, never swallowed
                future.set_exception(exception)

        # A daemon thread: an interrupted caller must be able to exit although `function` still blocks.
        threading.Thread(target=inside, name=f"in-{self.name}", daemon=True).start()
        return future.result()

    def socket(self, family: int, type: int, proto: int = 0) -> socket.socket:
        """A socket that lives in this namespace and is usable from any thread."""
        return self.call(socket.socket, family, type, proto)

    def sysctl(self, key: str, value: object) -> None:
        """Set `net.…`; as with sysctl(8), with slashes when an interface name contains a dot."""
        path = Path("/proc/sys") / (key if "/" in key else key.replace(".", "/"))
        self.call(path.write_text, f"{value}\n")

    def ifindex(self, name: str) -> int:
        return self.call(socket.if_nametoindex, name)

    def running(self, name: str) -> bool:
        """Whether the interface is up and has a carrier, that is, whether it transmits."""

        def flags() -> int:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
                answer = fcntl.ioctl(any_socket, SIOCGIFFLAGS, struct.pack("16s24x", name.encode()))
            return int(struct.unpack_from("H", answer, 16)[0])

        return bool(self.call(flags) & IFF_RUNNING)

    # --- configuration through iproute2 and ethtool ---

    def ip(self, *args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """`ip -n <namespace> …`."""
        return _run("ip", "-n", self.name, *args, check=check)

    def ethtool(self, *args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.run("ethtool", *args, check=check)

    @property
    def addresses(self) -> dict[str, list[str]]:
        """Interface name -> its addresses in CIDR form, in the kernel's order."""
        links = json.loads(self.ip("-json", "address", "show").stdout)
        return {
            link["ifname"]: [f"{info['local']}/{info['prefixlen']}" for info in link["addr_info"]] for link in links
        }

    def mac(self, name: str) -> str:
        return str(json.loads(self.ip("-json", "link", "show", "dev", name).stdout)[0]["address"])

    def pids(self) -> list[int]:
        """The processes whose main thread is in this namespace."""
        return _pids_in(self.name)


class Lab:
    """Owner of namespaces and processes: `with Lab() as lab:`. A process may have several at a time."""

    def __init__(self, *, term_deadline_s: float = TERM_DEADLINE_S) -> None:
        self._term_deadline_s = term_deadline_s
        self.namespaces: list[Namespace] = []
        self._processes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Self:
        sweep()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def namespace(self, label: str, *, ipv6: bool = False) -> Namespace:
        """A new namespace with `lo` up and no reverse-path check.

        Without `ipv6` the protocol is off, so that captures hold no neighbour discovery or MLD that the test
        did not cause; with it, addresses are usable at once (no duplicate address detection) and routers are
        ignored.
        """
        name = f"{NAME_PREFIX}-{os.getpid()}-{label}-{next(_counter)}"
        namespace = Namespace(self, name, label)
        # Registered before it exists: an interrupt between the two lines leaves nothing behind.
        _names_in_use.add(name)
        self.namespaces.append(namespace)
        _run("ip", "netns", "add", name)
        settings = {"net.ipv4.ip_forward": 0}
        for scope in ("all", "default"):
            settings[f"net.ipv4.conf.{scope}.rp_filter"] = 0
            if Path("/proc/sys/net/ipv6").exists():
                settings[f"net.ipv6.conf.{scope}.disable_ipv6"] = 0 if ipv6 else 1
                settings[f"net.ipv6.conf.{scope}.accept_dad"] = 0
                settings[f"net.ipv6.conf.{scope}.accept_ra"] = 0
        for key, value in settings.items():
            namespace.sysctl(key, value)
        namespace.ip("link", "set", "lo", "up")
        return namespace

    def veth(
        self,
        a: Namespace,
        name_a: str,
        b: Namespace,
        name_b: str,
        *,
        address_a: str | None = None,
        address_b: str | None = None,
        mtu: int = 1500,
        offloads: bool = True,
    ) -> None:
        """A cable between two namespaces, up and transmitting on return.

        By default veth leaves checksums and UDP segments undone, as nobody on the same machine needs them: a
        capture then shows pending checksums and frames longer than the MTU. `offloads=False` makes both ends
        do the work, so that a capture shows what a wire would carry.
        """
        # One command makes both ends where they belong: they never sit in the host's own namespace.
        end_a, end_b = (
            ["name", name, "index", str(next(_ifindexes)), "mtu", str(mtu), "netns", namespace.name]
            for namespace, name in ((a, name_a), (b, name_b))
        )
        _run("ip", "link", "add", *end_a, "type", "veth", "peer", *end_b)
        for namespace, name, address in ((a, name_a, address_a), (b, name_b, address_b)):
            if address is not None:
                ipaddress.ip_interface(address)  # a clearer error than the kernel's for a mistyped address
                namespace.ip("address", "add", address, "dev", name)
            if not offloads:
                namespace.ethtool("-K", name, "tx", "off", "tso", "off", "gso", "off", "gro", "off")
                namespace.ethtool("-K", name, "tx-udp-segmentation", "off")
            namespace.ip("link", "set", name, "up")
        wait_until(
            lambda: a.running(name_a) and b.running(name_b),
            LINK_DEADLINE_S,
            f"no carrier between {a.label}/{name_a} and {b.label}/{name_b}",
        )

    def adopt(self, process: subprocess.Popen[str]) -> None:
        """Make the Lab responsible for ending `process`."""
        # Forget the ones that are done, so that a long demo does not collect thousands.
        self._processes = [known for known in self._processes if known.poll() is None]
        self._processes.append(process)

    def close(self) -> None:
        """End the processes, delete the namespaces; a failed step does not stop the next. Idempotent."""
        processes, self._processes = self._processes, []
        failures: list[Exception] = []
        try:
            end_processes(processes, self._term_deadline_s)
        except Exception as error:
            failures.append(error)
        for namespace in reversed(self.namespaces):
            try:
                _delete(namespace.name)
            except Exception as error:
                failures.append(error)
            else:
                _names_in_use.discard(namespace.name)
        self.namespaces = []
        # Last: a descendant that held the other end of a pipe, and a thread in a read on it, are gone by now.
        for process in processes:
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):  # input that nobody was left to read
                        pipe.close()
        if failures:
            raise ExceptionGroup("the lab could not be taken down", failures)


def end_processes(processes: list[subprocess.Popen[str]], term_deadline_s: float = TERM_DEADLINE_S) -> None:
    """SIGTERM to all, one common deadline, then SIGKILL; reaps them."""
    running = [process for process in processes if process.poll() is None]
    try:
        for process in running:
            process.terminate()
        deadline = time.monotonic() + term_deadline_s
        for process in running:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                break
    finally:  # also when the wait is interrupted
        for process in running:
            process.kill()  # does nothing to one that was reaped
        for process in running:
            process.wait(KILL_DEADLINE_S)


def sweep() -> list[str]:
    """Delete the namespaces of Labs whose process is gone, with what runs in them; returns the names."""
    swept = []
    for name in _netns_names():
        match = NAME_PATTERN.fullmatch(name)
        if match is None or name in _names_in_use:
            continue
        pid = int(match[1])
        # Pids come round again: a name with our own pid that we did not give belongs to a dead predecessor.
        if pid == os.getpid() or not _alive(pid):
            _delete(name)
            swept.append(name)
    return swept


def _run(
    *argv: str, check: bool = True, timeout: float = COMMAND_DEADLINE_S, input: str | None = None
) -> subprocess.CompletedProcess[str]:
    options: dict[str, Any] = {"stdin": subprocess.DEVNULL} if input is None else {"input": input}
    done = subprocess.run(argv, capture_output=True, text=True, timeout=timeout, check=False, **options)
    if check and done.returncode != 0:
        # CalledProcessError hides stderr, which is the one thing a failed test needs.
        said = done.stderr.strip() or done.stdout.strip()
        raise RuntimeError(f"`{' '.join(argv)}` exited with {done.returncode}: {said}")
    return done


def _netns_names() -> list[str]:
    try:
        return sorted(os.listdir(NETNS_DIRECTORY))
    except FileNotFoundError:
        return []


def _pids_in(name: str) -> list[int]:
    listing = _run("ip", "netns", "pids", name, check=False)
    return [int(word) for word in listing.stdout.split()]


def _delete(name: str) -> None:
    """End what still runs in it (a daemon's children, the orphans of a dead Lab), then remove its name."""
    for pid in _pids_in(name):
        if pid != os.getpid():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    done = _run("ip", "netns", "delete", name, check=False)
    # Another Lab may have swept it meanwhile, or it was never made: gone is gone.
    if done.returncode != 0 and (NETNS_DIRECTORY / name).exists():
        raise RuntimeError(f"cannot delete namespace {name}: {done.stderr.strip()}")


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"  # a zombie cleans up nothing any more

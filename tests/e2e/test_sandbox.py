"""What a worker cannot do any more, tried from inside, and read back from the kernel from outside.

Each attempt runs in a process of its own, which goes the way of a worker (drop_privileges, enter, and seal where it
matters) and then does one thing that no worker does.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import pwd
import re
import resource
import signal
import socket
import struct
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, get_args

import pytest

from lab.daemon import Daemon
from lab.namespaces import wait_until
from lab.plan import ReceivePlan, SendPlan
from lab.program import PROGRAM
from lab.topology import RelayLine
from lab.traffic import run_sender, start_receiver
from mcrelay import counters, landlock, logs, process, sandbox, seccomp
from mcrelay._forbidden import NUMBERS
from mcrelay.sandbox import Role
from tests.e2e.test_privileges import descriptors, status

ROLES: Final = get_args(Role)
NOBODY = pwd.getpwnam("nobody")
INPUT = "239.1.1.1:5000"
OUTPUT = "239.2.2.2:6000"
PAGE: Final = Path(__file__).resolve().parents[2] / "docs" / "sandbox.md"

needs_list = pytest.mark.skipif(platform.machine() not in seccomp.ARCHITECTURES, reason="no list for this architecture")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


# --- from inside ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class End:
    """How an attempt ended."""

    signal: int  # 0: the process lived
    error: int  # what the attempt failed with; 0: it did not
    said: str


def attempt(role: Role, deed: Callable[[], object], *, before: Callable[[], None] = lambda: None, seal: bool) -> End:
    """Do it in the sandbox, in a process of user nobody."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        error = 255  # no errno
        try:
            os.dup2(writing, 2)
            process.drop_privileges(NOBODY.pw_uid, NOBODY.pw_gid)
            before()
            sandbox.enter(role)
            if seal:
                sandbox.seal(role)
            try:
                deed()
                error = 0
            except OSError as failure:
                error = failure.errno or 254
        finally:
            os._exit(error)
    os.close(writing)
    with open(reading) as file:
        said = file.read()
    _pid, end = os.waitpid(pid, 0)
    return End(os.WTERMSIG(end), 0, said) if os.WIFSIGNALED(end) else End(0, os.WEXITSTATUS(end), said)


def call(name: str, *arguments: object) -> Callable[[], int]:
    """A system call with these arguments, whatever the C library makes of them."""
    return lambda: process.system_call(NUMBERS[name], *(_long(argument) for argument in arguments))


def _long(argument: object) -> object:
    return ctypes.c_long(argument) if isinstance(argument, int) else argument


def use(make: Callable[[], socket.socket], deed: Callable[[socket.socket], object]) -> Callable[[], object]:
    """A deed with a socket that the process had before. It is shared, and does not matter to anybody."""
    sock = make()
    return lambda: deed(sock)


def udp() -> socket.socket:
    return socket.socket(socket.AF_INET, socket.SOCK_DGRAM)


MEMORY = mmap.mmap(-1, mmap.PAGESIZE)
ADDRESS = ctypes.addressof(ctypes.c_char.from_buffer(MEMORY))
PARENT = os.getpid()

# What is tried, and the system call that ends the process, or the error with which it fails.
ATTEMPTS: dict[str, tuple[Callable[[], object], str | int]] = {
    # files
    "open a file": (lambda: os.open("/etc/passwd", os.O_RDONLY), errno.EACCES),
    "create a file": (lambda: os.open("/tmp/mcrelay-was-here", os.O_CREAT | os.O_WRONLY), errno.EACCES),
    "open by openat2": (call("openat2", -100, b"/etc/passwd", bytes(24), 24), errno.EACCES),
    "list a directory": (lambda: os.listdir("/"), errno.EACCES),
    "look at a path": (lambda: os.stat("/etc/passwd"), errno.EACCES),
    "remove a file": (lambda: os.unlink("/tmp/mcrelay-was-here"), "unlink"),
    "make a directory": (lambda: os.mkdir("/tmp/mcrelay-was-here"), "mkdir"),
    "make a link": (lambda: os.symlink("/etc/passwd", "/tmp/mcrelay-was-here"), "symlink"),
    "make a file in memory": (lambda: os.memfd_create("x"), "memfd_create"),
    "mount": (call("mount", b"none", b"/tmp", b"tmpfs", 0, None), "mount"),
    "change the root": (lambda: os.chroot("/"), "chroot"),
    # the network
    "an Internet socket": (lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM), "socket"),
    "a Unix socket": (lambda: socket.socket(socket.AF_UNIX), "socket"),
    "a packet socket": (lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW), "socket"),
    "a netlink socket": (lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW), "socket"),
    "a pair of sockets": (socket.socketpair, "socketpair"),
    "connect": (use(udp, lambda sock: sock.connect(("127.0.0.1", 9))), "connect"),
    "bind": (use(udp, lambda sock: sock.bind(("127.0.0.1", 0))), "bind"),
    "listen": (use(socket.socket, lambda sock: sock.listen()), "listen"),
    "accept": (use(socket.socket, lambda sock: sock.accept()), "accept4"),
    "send to an address": (use(udp, lambda sock: sock.sendto(b"x", ("127.0.0.1", 9))), "sendto"),
    "change a socket": (
        use(udp, lambda sock: sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)),
        "setsockopt",
    ),
    # processes
    "execute": (lambda: os.execv("/bin/true", ["true"]), "execve"),
    "execute by descriptor": (call("execveat", 0, b"", None, None, 0x1000), "execveat"),
    "fork": (call("clone", signal.SIGCHLD, 0, 0, 0, 0), "clone"),
    "a user namespace": (call("clone", 0x10000000 | signal.SIGCHLD, 0, 0, 0, 0), "clone"),
    "trace another process": (call("ptrace", 16, PARENT, 0, 0), "ptrace"),
    "kill another process": (lambda: os.kill(PARENT, signal.SIGKILL), "kill"),
    "kill itself by kill": (lambda: os.kill(os.getpid(), signal.SIGUSR2), "kill"),
    "kill another thread": (call("tgkill", PARENT, PARENT, signal.SIGKILL), "tgkill"),
    "refer to another process": (lambda: os.pidfd_open(PARENT), "pidfd_open"),
    "take a descriptor of another": (call("pidfd_getfd", 0, 0, 0), "pidfd_getfd"),
    "read another's memory": (call("process_vm_readv", PARENT, None, 0, None, 0, 0), "process_vm_readv"),
    "write another's memory": (call("process_vm_writev", PARENT, None, 0, None, 0, 0), "process_vm_writev"),
    "another's limits": (call("prlimit64", PARENT, resource.RLIMIT_NOFILE, None, None), "prlimit64"),
    "a namespace": (call("unshare", 0x10000000), "unshare"),
    "another's namespace": (call("setns", 0, 0), "setns"),
    # privilege
    "become root": (lambda: os.setuid(0), "setuid"),
    "become root for good": (lambda: os.setresuid(0, 0, 0), "setresuid"),
    "join a group": (lambda: os.setgroups([0]), "setgroups"),
    "take capabilities": (call("capset", bytes(8), bytes(24)), "capset"),
    "raise a limit": (
        call("prlimit64", 0, resource.RLIMIT_NOFILE, struct.pack("=QQ", 65536, 65536), None),
        errno.EPERM,
    ),
    "another personality": (call("personality", 0x0400000), "personality"),
    # code
    "memory to execute": (lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC), "mmap"),
    "make memory executable": (call("mprotect", ADDRESS, mmap.PAGESIZE, 4), "mprotect"),
    "the same with a key": (call("pkey_mprotect", ADDRESS, mmap.PAGESIZE, 4, -1), "pkey_mprotect"),
    # the kernel's wider parts
    "load a program": (call("bpf", 5, bytes(128), 128), "bpf"),
    "load a module": (call("init_module", bytes(16), 16, b""), "init_module"),
    "load a kernel": (call("kexec_load", 0, 0, None, 0), "kexec_load"),
    "performance events": (call("perf_event_open", bytes(128), 0, -1, -1, 0), "perf_event_open"),
    "keys": (call("keyctl", 0, -1, 0), "keyctl"),
    "handle page faults": (call("userfaultfd", 0), "userfaultfd"),
    "shared memory": (call("shmget", 0, 4096, 0o600), "shmget"),
    "type into a terminal": (call("ioctl", 0, 0x5412, b"x"), "ioctl"),
    "signals by descriptor": (call("fcntl", 0, 8, 0), "fcntl"),
    "what does not exist": (lambda: process.system_call(5000), errno.ENOSYS),
}


@needs_list
@needs_root
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("what", ATTEMPTS)
def test_what_no_worker_does_fails(role: Role, what: str) -> None:
    """From the first message on; of what a data plane needs to begin, nothing is among this."""
    deed, expected = ATTEMPTS[what]
    end = attempt(role, deed, seal=False)
    if isinstance(expected, int):
        assert (end.signal, errno.errorcode.get(end.error, end.error)) == (0, errno.errorcode[expected]), end
    else:
        assert end.signal == signal.SIGSYS, end
        assert f"mcrelay[{role}] CRITICAL forbidden system call {expected} " in end.said


def a_thread() -> None:
    threading.Thread(target=lambda: None).start()


BEGINNING: dict[str, tuple[Callable[[], object], str]] = {
    "a ring": (call("io_uring_setup", 1, bytes(120)), "io_uring_setup"),
    # Without a name: the C library blocks all signals meanwhile.
    "a thread": (a_thread, ""),
    "an eventfd": (lambda: os.eventfd(0), "eventfd2"),
    "another core": (lambda: os.sched_setaffinity(0, {0}), "sched_setaffinity"),
    "another filter": (call("seccomp", 1, 0, None), "seccomp"),
}


@needs_list
@needs_root
@pytest.mark.parametrize("what", BEGINNING)
def test_what_a_data_plane_needs_to_begin_it_cannot_do_later(what: str) -> None:
    deed, name = BEGINNING[what]
    for end in (attempt("control", deed, seal=False), attempt("data", deed, seal=True)):
        assert end.signal == signal.SIGSYS, end
        assert (f"forbidden system call {name} " in end.said) == bool(name)
    # Not refused by the filter; the ring's parameters are nonsense, and the filter's address.
    early = attempt("data", deed, seal=False)
    assert (early.signal, early.said) == (0, "")


def execute_with_sigsys_blocked() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGSYS])
    os.execv("/bin/true", ["true"])


SILENT: dict[str, Callable[[], object]] = {
    "what SIGSYS does": lambda: signal.signal(signal.SIGSYS, signal.SIG_IGN),
    "a blocked SIGSYS": execute_with_sigsys_blocked,
}
if platform.machine() == "x86_64":
    SILENT["the x32 ABI"] = lambda: process.system_call(seccomp.X32 | NUMBERS["getpid"])


@needs_list
@needs_root
@pytest.mark.parametrize("what", SILENT)
def test_whoever_silences_the_log_ends_all_the_same(what: str) -> None:
    end = attempt("control", SILENT[what], seal=False)
    assert end.signal == signal.SIGSYS, end


@needs_list
@needs_root
def test_every_thread_is_under_the_filter() -> None:
    """Also one that was there before, as a library may start one."""

    def before() -> None:
        begun = threading.Event()

        def late() -> None:
            begun.wait()
            os.kill(PARENT, 0)

        thread = threading.Thread(target=late)
        thread.start()
        before.release = begun.set  # type: ignore[attr-defined]
        before.thread = thread  # type: ignore[attr-defined]

    def deed() -> None:
        before.release()  # type: ignore[attr-defined]
        before.thread.join(5)  # type: ignore[attr-defined]

    end = attempt("data", deed, before=before, seal=True)
    assert end.signal == signal.SIGSYS
    assert "forbidden system call kill " in end.said


@needs_root
def test_landlock_denies_what_no_filter_would() -> None:
    try:
        abi = process.system_call(landlock.CREATE_RULESET, None, 0, landlock.CREATE_RULESET_VERSION)
    except OSError:
        pytest.skip("no Landlock here")
    with socket.create_server(("127.0.0.1", 0)) as server, tempfile.NamedTemporaryFile() as file:
        os.chmod(file.name, 0o666)
        attempts: list[tuple[int, Callable[[], object], int]] = [
            (1, lambda: os.open(file.name, os.O_RDONLY), errno.EACCES),
            (1, lambda: os.listdir("/"), errno.EACCES),
            (4, lambda: socket.create_connection(server.getsockname()), errno.EACCES),
            (6, lambda: os.kill(PARENT, 0), errno.EPERM),
        ]

        def enter_landlock_alone(deed: Callable[[], object]) -> int:
            pid = os.fork()
            if pid == 0:
                code = 255
                try:
                    process._prctl(process.PR_SET_NO_NEW_PRIVS, 1)
                    landlock.restrict(process.system_call)
                    try:
                        deed()
                        code = 0
                    except OSError as error:
                        code = error.errno or 254
                finally:
                    os._exit(code)
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

        for since, deed, expected in attempts:
            if abi >= since:
                assert enter_landlock_alone(deed) == expected, since


@needs_list
@needs_root
def test_a_kernel_that_refuses_filters_is_no_reason_not_to_work() -> None:
    def refuse() -> None:
        sys.stderr = os.fdopen(2, "w")
        logs.begin("control", "text")
        refusing = {NUMBERS["seccomp"]: seccomp.Call(action=seccomp.refuse(errno.EINVAL))}
        text = seccomp.program(refusing, machine=sandbox.MACHINE, default=seccomp.ALLOW)
        seccomp.install(text, process.system_call, NUMBERS["seccomp"])

    end = attempt("control", lambda: os.getppid(), before=refuse, seal=True)
    assert (end.signal, end.error) == (0, 0)
    assert "no system call is forbidden" in end.said


@needs_root
@pytest.mark.parametrize("role", ROLES)
def test_limits_are_low_and_hard(role: Role) -> None:
    def look() -> None:
        for limit, most in (
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_NPROC, 0),
            (resource.RLIMIT_NOFILE, sandbox.DESCRIPTORS[role]),
        ):
            assert resource.getrlimit(limit) == (most, most)

    assert attempt(role, look, seal=True).error == 0


@needs_root
def test_the_ring_takes_no_other_operation() -> None:
    """In force when it is enabled. That what the engine submits is permitted, all traffic shows."""
    uring = pytest.importorskip("mcrelay.engines.uring")
    engine = uring.UringEngine(memoryview(bytearray(counters.PAGE_SIZE)))
    try:
        rings = [fd for fd, link in descriptors(os.getpid()).items() if link == "anon_inode:[io_uring]"]
        register = call("io_uring_register", rings[-1], 4, ctypes.byref(ctypes.c_int(engine.answer_fd)), 1)
        process.system_call(NUMBERS["io_uring_register"], rings[-1], 12, None, 0)  # enable
        with pytest.raises(PermissionError):
            register()  # an eventfd
    finally:
        engine.close()


# --- from outside ---------------------------------------------------------------------------------------------------


def capabilities(names: set[str]) -> int:
    return sum(1 << int(getattr(process, name)) for name in names)


def table(heading: str) -> list[list[str]]:
    """The rows of the first table under a heading of the page."""
    section = PAGE.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def test_the_page_has_the_capabilities_of_the_code() -> None:
    shown = {row[0].strip("`"): row[1] for row in table("The supervisor")}
    assert {getattr(process, name): reason for name, reason in shown.items()} == process.SUPERVISOR_CAPABILITIES


def test_the_page_has_the_system_calls_of_the_code() -> None:
    shown: dict[str, dict[str, set[str]]] = {role: {"always": set(), "beginning": set()} for role in ROLES}
    for _reason, who, names, _arguments in table("System calls"):
        roles = ROLES if who == "both" else ("data",)
        for role in roles:
            shown[role]["beginning" if "until" in who else "always"] |= set(re.findall(r"\w+", names))
    for role in ROLES:
        assert shown[role]["beginning"] == sandbox.BEGINNING[role]
        assert shown[role]["always"] == set(sandbox.CALLS[role]) - sandbox.BEGINNING[role]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="others lack the older calls")
def test_every_listed_call_is_known() -> None:
    """A name that no architecture knows would permit nothing, silently."""
    assert {name for role in ROLES for name in sandbox.CALLS[role]} <= set(NUMBERS)


@needs_list
def test_the_kernel_says_of_each_process_what_the_page_does(daemon: Daemon) -> None:
    # One filter from the first byte on; a data plane that has begun has a second.
    filters = {"supervisor": 0, "control": 1, "spare": 1}
    wait_until(
        lambda: (
            "spare" in daemon.pids()
            and all(status(pid)["Seccomp_filters"] == str(filters.get(n, 2)) for n, pid in daemon.pids().items())
        ),
        10,
    )
    documented = capabilities({row[0].strip("`") for row in table("The supervisor")})
    pids = daemon.pids()
    assert set(pids) > {"supervisor", "control", "data/0", "spare"}
    for name, pid in pids.items():
        facts = status(pid)
        expected = documented if name == "supervisor" else 0
        assert facts["NoNewPrivs"] == "1", name
        assert facts["Seccomp"] == ("0" if name == "supervisor" else "2"), name
        for kind in ("CapPrm", "CapEff", "CapBnd"):
            assert int(facts[kind], 16) == expected, (name, kind)
        for kind in ("CapInh", "CapAmb"):
            assert int(facts[kind], 16) == 0, (name, kind)
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/status") as file:
                assert re.search(rf"^Seccomp_filters:\s+{filters.get(name, 2)}$", file.read(), re.MULTILINE), (
                    name,
                    thread,
                )


def changed(code: str) -> tuple[str, ...]:
    """What stands before `run` for workers that begin with this code."""
    return (
        sys.executable,
        "-c",
        "import os, sys\n"
        "spawn = os.posix_spawn\n"
        f"CODE = {code!r}\n"
        "def changed(path, arguments, environment, **keywords):\n"
        "    text = f'import os, sys, {arguments[3]} as module\\n{CODE}\\nmodule.main()'\n"
        "    return spawn(path, [path, '-I', '-c', text, *arguments[4:]], environment, **keywords)\n"
        "os.posix_spawn = changed\n"
        "sys.argv[0] = 'mcrelay'\n"
        "from mcrelay.cli import main; main()",
    )


@needs_list
def test_the_log_names_the_call_and_forwarding_goes_on(line: RelayLine) -> None:
    """A control plane that would execute something for statistics, as if it had been taken over."""
    program = changed(
        "if hasattr(module, 'ControlPlane'):\n"
        "    module.ControlPlane._stats = lambda *_: os.execv('/bin/true', ['true'])"
    )
    with Daemon(line.relay, program=program) as daemon:
        daemon.run("add", f"{INPUT}%in0", f"{OUTPUT}%out0", "--name", "feed")
        pid = daemon.pids()["control"]
        daemon.run("stats", check=False)
        daemon.wait_for_log("control is back")
        assert (
            f"mcrelay[control] CRITICAL forbidden system call execve (number {NUMBERS['execve']}): process {pid} ends"
            in (daemon.log)
        )
        assert f"control (pid {pid}) was ended by a forbidden system call" in daemon.log
        receiver = start_receiver(line.receiver, ReceivePlan(OUTPUT, interface="eth0", count=500, expect=500))
        run_sender(line.sender, SendPlan(INPUT, interface="eth0", rate=2000, count=500))
        assert receiver.result().lost == 0


def test_a_worker_that_fails_still_says_why(line: RelayLine) -> None:
    """What prints a traceback looks for files that it cannot have."""
    program = changed(
        "if hasattr(module, 'ControlPlane'):\n"
        "    def fail(*_): raise ZeroDivisionError('as the test wants it')\n"
        "    module.ControlPlane._stats = fail"
    )
    with Daemon(line.relay, program=program) as daemon:
        pid = daemon.pids()["control"]
        assert daemon.run("stats", check=False).returncode == 70
        daemon.wait_for_log("ZeroDivisionError: as the test wants it")
        assert "Traceback" in daemon.log
        assert daemon.pids()["control"] == pid


@needs_root
def test_a_supervisor_that_is_not_root_keeps_what_it_was_given(line: RelayLine) -> None:
    """dac_read_search: the interpreter may lie in root's home."""
    with tempfile.TemporaryDirectory(prefix="mcrelay-lab-") as directory:
        os.chown(directory, NOBODY.pw_uid, NOBODY.pw_gid)
        path = f"{directory}/control.sock"
        given = "+net_raw,+net_admin,+dac_read_search,+sys_time"
        program = (
            *("setpriv", "--reuid", "nobody", "--regid", str(NOBODY.pw_gid), "--clear-groups"),
            *("--inh-caps", given, "--ambient-caps", given, PROGRAM),
        )
        daemon = Daemon(line.relay, "--socket", path, program=program)
        daemon.socket = path  # the last one counts
        with daemon:
            daemon.run("add", f"{INPUT}%in0", f"{OUTPUT}%out0")
            receiver = start_receiver(line.receiver, ReceivePlan(OUTPUT, interface="eth0", count=100, expect=100))
            run_sender(line.sender, SendPlan(INPUT, interface="eth0", rate=1000, count=100))
            assert receiver.result().lost == 0
            kept = capabilities({"CAP_NET_RAW", "CAP_NET_ADMIN", "CAP_DAC_READ_SEARCH"})
            for name, pid in daemon.pids().items():
                facts = status(pid)
                for kind in ("CapPrm", "CapEff", "CapInh", "CapAmb"):
                    assert int(facts[kind], 16) == (kept if name == "supervisor" else 0), (name, kind)

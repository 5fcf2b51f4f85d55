"""A clean root: this machine's file system under an overlay, as a machine of its own to install on.

Owns the mounts, the processes and the control group of it; what is written there is in memory and gone at the end. Its
network is a namespace of the lab. With `boot`, its process 1 is systemd, with the services that a package enables and
none of this machine's: nothing of it reaches the devices, the clock or the kernel's settings that all share.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from lab.namespaces import Namespace, wait_until

PATH: Final = "/usr/sbin:/usr/bin:/sbin:/bin"
START_S: Final = 30.0
BOOT_S: Final = 90.0
COMMAND_S: Final = 60.0

# $1: where to mount, $2: the group in the hierarchy, $3...: process 1. In mount and process namespaces of its own.
BUILD: Final = """
set -eu
top=$1 group=$2
shift 2
mount -t tmpfs tmpfs "$top"
mkdir "$top/upper" "$top/work" "$top/root" "$top/groups"
mount -t cgroup2 cgroup2 "$top/groups"
mkdir "$top/groups/$group"
echo 0 >"$top/groups/$group/cgroup.procs"
mount -t overlay -o "lowerdir=/,upperdir=$top/upper,workdir=$top/work" overlay "$top/root"
cd "$top/root"
rm -rf etc/systemd/system/* etc/fstab etc/crypttab usr/sbin/policy-rc.d
mount -t proc proc proc
mount --bind proc/sys proc/sys
mount -o remount,bind,ro proc/sys
mount -t sysfs -o ro sysfs sys
mount -t tmpfs -o mode=755 tmpfs run
mount -t tmpfs -o mode=1777 tmpfs tmp
mount -t tmpfs -o mode=755 tmpfs dev
mkdir dev/pts dev/shm
mount -t tmpfs -o mode=1777 tmpfs dev/shm
mount -t devpts -o newinstance,ptmxmode=666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
for name in null zero full random urandom tty; do
    touch "dev/$name"
    mount --bind "/dev/$name" "dev/$name"
done
exec unshare --cgroup sh -ceu 'mount -t cgroup2 cgroup2 sys/fs/cgroup && exec "$@"' sh "$@"
"""
REMOVE_GROUP: Final = """
mount -t cgroup2 cgroup2 /mnt && find "/mnt/$1" -depth -type d -exec rmdir {} +
"""
# What systemd would do to the machine that it thinks it is on.
NOT_ITS_BUSINESS: Final = "-sys_module,-sys_time,-sys_rawio,-sys_boot,-mac_admin,-mac_override,-syslog"


class Root:
    """A context manager: commands can be run in it."""

    def __init__(self, namespace: Namespace, *, boot: bool = False) -> None:
        self._namespace = namespace
        self._boot = boot
        self._pid = 0  # of its process 1, as seen from here
        self._top = ""
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self._top = top = stack.enter_context(tempfile.TemporaryDirectory(prefix="mcrelay-root-"))
            group = f"mcrelay-root-{os.getpid()}-{id(self):x}"
            stack.callback(
                subprocess.run, ["unshare", "--mount", "sh", "-c", REMOVE_GROUP, "sh", group], check=True, timeout=10
            )
            # Process 1 of a root that is not booted only keeps it.
            init = ["/lib/systemd/systemd", "--unit=multi-user.target"] if self._boot else ["sleep", "infinity"]
            process = self._namespace.popen(
                *("unshare", "--mount", "--pid", "--fork", "--kill-child", "--uts", "--ipc"),
                *("sh", "-c", BUILD, "sh", top, group),
                *("env", "-i", "container=lab", f"PATH={PATH}", "setpriv", "--bounding-set", NOT_ITS_BUSINESS),
                *("--inh-caps", NOT_ITS_BUSINESS, "chroot", ".", *init),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
            stack.callback(process.wait, 10)
            stack.callback(self._end, process)

            def process_1() -> int:
                assert process.poll() is None, process.stderr and process.stderr.read()
                children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
                if not children:
                    return 0
                name = Path(f"/proc/{children[0]}/comm").read_text().strip()
                return int(children[0]) if name in ("systemd", "sleep") else 0

            self._pid = wait_until(process_1, START_S, "the root has no process 1")
            if self._boot:
                wait_until(
                    lambda: (
                        self.run("systemctl", "is-system-running", check=False).stdout.strip()
                        in ("running", "degraded")
                    ),
                    BOOT_S,
                    "systemd does not come up",
                )
            self._stack = stack.pop_all()
        return self

    def _end(self, process: subprocess.Popen[str]) -> None:
        if process.poll() is None:
            for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
                os.kill(int(child), signal.SIGKILL)  # process 1, and with it all others

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def written(self) -> set[str]:
        """What was written: files, links and directories that are not this machine's, or were changed. Not what was
        removed, nor what is in /run and /tmp."""
        there = ("nsenter", f"--target={self._pid}", "--mount")
        find = ("find", f"{self._top}/upper", "-mindepth", "1", "!", "-type", "c", "-printf", "/%P\\n")
        done = subprocess.run([*there, *find], capture_output=True, text=True, timeout=COMMAND_S, check=True)
        return set(done.stdout.splitlines())

    def command(self, *argv: str) -> list[str]:
        """What runs it in there, with the environment of a service manager."""
        enter = ("nsenter", f"--target={self._pid}", "--mount", "--pid", "--net", "--uts", "--ipc", "--cgroup")
        return [*enter, "--root", "--wd", "env", "-i", f"PATH={PATH}", "TERM=dumb", "LANG=C.UTF-8", *argv]

    def run(self, *argv: str, check: bool = True, input: bytes | None = None) -> subprocess.CompletedProcess[str]:
        ran = subprocess.run(self.command(*argv), capture_output=True, timeout=COMMAND_S, check=False, input=input)
        done = subprocess.CompletedProcess(argv, ran.returncode, ran.stdout.decode(), ran.stderr.decode())
        assert not check or done.returncode == 0, f"{' '.join(argv)}: {done.stdout}{done.stderr}"
        return done

    def install(self, package: Path) -> None:
        """A Debian package that depends on nothing else than what is there."""
        self.run("sh", "-c", "cat >/tmp/package.deb", input=package.read_bytes())
        self.run("dpkg", "--force-unsafe-io", "--install", "/tmp/package.deb")

    @contextlib.contextmanager
    def daemon(self, *argv: str) -> Iterator[subprocess.Popen[str]]:
        """mcrelay, run by `argv`; it answers inside the context, and is killed behind it."""
        process = subprocess.Popen(self.command(*argv), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            wait_until(
                lambda: process.poll() is not None or self.run("mcrelay", "ping", check=False).returncode == 0,
                START_S,
                "mcrelay does not answer",
            )
            yield process
        finally:
            # Its parent out here ends with it, and not the other way round.
            self.run("pkill", "--signal", "KILL", "--full", "mcrelay", check=False)
            process.communicate(timeout=START_S)

    def write(self, path: str, content: str) -> None:
        """A file in there, and the directories that it takes."""
        self.run("sh", "-c", 'mkdir -p "$(dirname "$1")" && cat >"$1"', "sh", path, input=content.encode())

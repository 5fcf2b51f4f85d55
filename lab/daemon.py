"""mcrelay itself in a namespace of the lab: started, spoken to, stopped.

Owns the daemon's process, its socket's directory and what it logs. The daemon is the installed program next to the
running interpreter, started as a user would; nothing of it is imported but the client.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from lab.namespaces import Namespace, wait_until
from lab.program import PROGRAM, run_program
from mcrelay.client import Client
from mcrelay.errors import Error

READY_S: Final = 30.0
STOP_S: Final = 20.0
MORE: Final = re.compile(r"(\d+) more of these were suppressed in")


class Daemon:
    """A context manager: the daemon is ready inside it and gone behind it."""

    def __init__(
        self,
        namespace: Namespace,
        *options: str,
        program: Sequence[str] = (PROGRAM,),
        directory: Path | None = None,
        pass_fds: Sequence[int] = (),
    ) -> None:
        """`program` is what stands before `run`, for tests that change something about it. `directory`, where the
        socket is to be, is the caller's."""
        self.namespace = namespace
        self._own = ExitStack()  # what goes with us
        path = directory or Path(self._own.enter_context(tempfile.TemporaryDirectory(prefix="mcrelay-lab-")))
        # A client may run as anybody: the socket's own mode decides.
        path.chmod(0o755)
        self.socket = str(path / "control.sock")
        self._lines: list[str] = []
        self._rest = b""  # of a line that is not complete
        self._is_read = False  # to its end
        self._reading = threading.Lock()
        self._stderr, theirs = os.pipe2(os.O_CLOEXEC)  # not Popen's, which a Lab closes
        os.set_blocking(self._stderr, False)
        try:
            self.process = namespace.popen(
                *(*program, "run", "--socket", self.socket, *options),
                stderr=theirs,
                stdout=subprocess.DEVNULL,
                pass_fds=pass_fds,
            )
        except BaseException:
            os.close(self._stderr)
            raise
        finally:
            os.close(theirs)
        self.pid = self.process.pid  # of the supervisor, which is another one's after an upgrade
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        """Keep the pipe empty, to its end."""
        poll = select.poll()
        poll.register(self._stderr, select.POLLIN)
        while not self._is_read:
            poll.poll()
            self._take()
        os.close(self._stderr)

    def _take(self) -> None:
        """All that is in the pipe now."""
        with self._reading, contextlib.suppress(BlockingIOError):
            while not self._is_read:
                data = os.read(self._stderr, 1 << 16)
                *lines, self._rest = (self._rest + data).split(b"\n")
                self._lines += [line.decode(errors="replace") for line in lines]
                self._is_read = not data

    def __enter__(self) -> Self:
        try:
            self.wait_for_log("ready:", deadline_s=READY_S)
        except BaseException:
            self.stop(check=False)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop(check=kind is None)

    @property
    def log(self) -> str:
        """All that it has written so far, whether or not the thread that reads has had its turn."""
        self._take()
        return "\n".join(self._lines)

    def wait_for_log(self, text: str, deadline_s: float = 20.0) -> None:
        wait_until(
            lambda: text in self.log or self.process.poll() is not None, deadline_s, f"the daemon did not log {text!r}"
        )
        if text not in self.log:
            self._reader.join(1)
        assert text in self.log, f"the daemon did not log {text!r}:\n{self.log}"

    def times_logged(self, text: str) -> int:
        """How often it was logged, with what was suppressed and has been told."""
        found = [MORE.search(line) for line in self.log.splitlines() if text in line]
        return sum(int(more[1]) if more else 1 for more in found)

    def client(self) -> Client:
        return Client(self.socket)

    def run(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """One command of the program, as a user types it (outside of the namespace: the socket is a file)."""
        done = run_program([*arguments, "--socket", self.socket], timeout=30)
        assert not check or done.returncode == 0, f"mcrelay {' '.join(arguments)}: {done.stderr}"
        return done

    def json(self, *arguments: str, check: bool = True) -> Any:
        return json.loads(self.run(*arguments, "--json", check=check).stdout)

    def pids(self) -> dict[str, int]:
        """Of the running workers and the supervisor, by name: control, data/0 and so on."""
        with self.client() as client:
            return {
                f"data/{p.index}" if p.role == "data" else p.role: p.pid for p in client.workers() if p.pid is not None
            }

    def upgrade(self) -> int:
        """`mcrelay upgrade`; the old process has gone on return. The new one's pid."""
        self.pid = int(self.json("upgrade")["pid"])
        assert self.process.wait(STOP_S) == 0, self.log
        return self.pid

    def _stop_successor(self) -> None:
        """The end of a process that is not our child, told to stop."""
        pidfd = os.pidfd_open(self.pid)
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGTERM)
            ended, _, _ = select.select([pidfd], [], [], STOP_S)
            if not ended:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                raise TimeoutError(f"the daemon {self.pid} did not stop")
        finally:
            os.close(pidfd)

    def stop(self, *, check: bool = True) -> None:
        """SIGTERM, as systemd does; the daemon must go, and with it everything it made."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            if self.pid != self.process.pid:
                self._stop_successor()
            code = self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGABRT)  # with --debug, it says where it is
            self._reader.join(2)
            self.process.kill()
            self.process.wait()
            self._reader.join(2)
            raise TimeoutError(f"the daemon did not stop:\n{self.log}") from None
        finally:
            self._reader.join(2)
            left = os.path.exists(self.socket)
            self._own.close()
        if check:
            assert code == 0, f"the daemon exited with {code}:\n{self.log}"
            assert not left, "the daemon left its socket behind"


def answers(path: str) -> bool:
    """Whether a daemon serves this socket."""
    try:
        with Client(path) as client:
            client.ping()
            return True
    except Error:
        return False


REST_S: Final = 0.1  # so long nothing moves, where every data plane sleeps
REST_AWAKE_S: Final = 1.0  # and where one does not, since it polls


def settled(client: Client, deadline_s: float = 15.0) -> dict[str, Any]:
    """Totals over all workers once nothing moves any more: every packet received is forwarded or dropped under a
    reason, and every receive slot is back. AssertionError or TimeoutError if that does not come about.

    That two readings are the same is not enough on a loaded machine, where a worker with packets in hand may wait for a
    processor for longer than lies between them. It is not asleep then."""
    totals: dict[str, Any] = {}
    since = [time.monotonic(), time.monotonic()]  # when it last moved, and when a worker was last seen awake

    def at_rest() -> bool:
        before = dict(totals)
        asleep = all(_is_asleep(process.pid) for process in client.workers() if process.role == "data")
        totals.clear()
        totals.update(sum_workers(client))
        now = time.monotonic()
        if totals != before or not _is_accounted_for(totals):
            since[:] = now, now
        if not asleep:
            since[1] = now
        return now - since[1] >= REST_S or now - since[0] >= REST_AWAKE_S

    try:
        wait_until(at_rest, deadline_s, "counters do not come to rest")
    except TimeoutError:
        assert _is_accounted_for(totals), totals
        raise
    return totals


def _is_accounted_for(totals: dict[str, Any]) -> bool:
    is_whole = totals["received"] == totals["forwarded"] + sum(totals["dropped"].values())
    return bool(is_whole and totals["pool_free"] == totals["pool_slots"])


def _is_asleep(pid: int | None) -> bool:
    """Whether none of its threads has, or waits for, a processor."""
    try:
        stats = [Path(entry.path, "stat").read_text() for entry in os.scandir(f"/proc/{pid}/task")]
    except (FileNotFoundError, ProcessLookupError):
        return False  # it has gone; its successor may be asleep
    return all(stat.rpartition(")")[2].split()[0] == "S" for stat in stats)


def sum_workers(client: Client) -> dict[str, Any]:
    workers = client.stats().workers
    totals: dict[str, Any] = {
        field: sum(getattr(worker, field) for worker in workers)
        for field in (
            "received",
            "received_bytes",
            "forwarded",
            "copies",
            "copies_bytes",
            "sends",
            "segments_refused",
            "pool_slots",
            "pool_free",
            "pool_exhausted",
            "frames_malformed",
        )
    }
    dropped: dict[str, int] = {}
    for worker in workers:
        for reason, packets in worker.dropped.items():
            dropped[reason] = dropped.get(reason, 0) + packets
    totals["dropped"] = dropped
    return totals

"""The program, run to its end as a user would, without the quarter of a second that its start takes.

Owns a process that has imported what every run imports first: each run is a fork of it, a process of its own with
descriptors, arguments, environment, directory and exit code of its own. The first run of a process starts it; it ends
with that process. What a run imports later, it imports itself.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

PROGRAM: Final = str(Path(sys.executable).with_name("mcrelay"))
NUMBER: Final = struct.Struct("=i")  # a pid, or a wait status
DESCRIPTORS_MAX: Final = 1024  # of the process that runs come from
REQUEST_MAX: Final = 256 * 1024  # bytes of arguments and environment


def run_program(
    arguments: Sequence[str], *, timeout: float, input: str = "", without: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """As subprocess.run() does, with the output captured and the environment of this moment but for some variables.
    TimeoutExpired if it does not end; it is killed then."""
    environment = {name: value for name, value in os.environ.items() if name not in without}
    request = json.dumps([[PROGRAM, *arguments], environment, os.getcwd()]).encode()
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8", newline="")) for _ in range(3)]
        files[0].write(input)
        files[0].seek(0)
        answer, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        stack.enter_context(answer)
        answer.settimeout(timeout)
        with theirs:
            socket.send_fds(_origin()[0], [request], [*(file.fileno() for file in files), theirs.fileno()])
        pid = 0
        try:
            (pid,) = NUMBER.unpack(answer.recv(NUMBER.size))
            (status,) = NUMBER.unpack(answer.recv(NUMBER.size))
        except TimeoutError:
            if pid:  # not reaped yet: that would have been told
                os.kill(pid, signal.SIGKILL)
            raise subprocess.TimeoutExpired([PROGRAM, *arguments], timeout) from None
        for file in files:
            file.seek(0)
        return subprocess.CompletedProcess(
            [PROGRAM, *arguments], os.waitstatus_to_exitcode(status), files[1].read(), files[2].read()
        )


@functools.cache
def _origin() -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """Where to ask for a run; the process is there for as long as the socket is."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, REQUEST_MAX)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-c", f"from lab import program; program.serve({theirs.fileno()})"],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            cwd=Path(__file__).parents[1],
        )
    return ours, process


def serve(descriptor: int) -> None:
    """Fork for each request, and tell its sender the pid and, later, the wait status; until there is no sender."""
    import mcrelay.cli  # noqa: F401 - so that no run has to

    requests = socket.socket(fileno=descriptor)
    running: dict[int, tuple[int, socket.socket]] = {}  # by pidfd
    events = select.poll()
    events.register(requests, select.POLLIN)
    while True:
        for ready, _event in events.poll():
            if ready in running:
                pid, answer = running.pop(ready)
                events.unregister(ready)
                os.close(ready)
                _pid, status = os.waitpid(pid, 0)
                _tell(answer, status)
                answer.close()
                continue
            request, descriptors, _flags, _address = socket.recv_fds(requests, REQUEST_MAX, 4)
            if not request:
                return
            pid = os.fork()
            if not pid:
                for answers in (answer for _pid, answer in running.values()):
                    answers.close()
                requests.close()
                _become(request, descriptors)
            answer = socket.socket(fileno=descriptors.pop())
            for descriptor in descriptors:
                os.close(descriptor)
            _tell(answer, pid)
            pidfd = os.pidfd_open(pid)
            running[pidfd] = pid, answer
            events.register(pidfd, select.POLLIN)


def _tell(answer: socket.socket, number: int) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # nobody waits any more
        answer.send(NUMBER.pack(number), socket.MSG_NOSIGNAL)


def _become(request: bytes, descriptors: Sequence[int]) -> None:
    """The program, from its first line on."""
    from mcrelay.cli import main

    try:
        for number, descriptor in enumerate(descriptors[:3]):
            os.dup2(descriptor, number)
        os.closerange(3, DESCRIPTORS_MAX)
        sys.argv, environment, directory = json.loads(request)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(directory)
        sys.exit(main())
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
    os._exit(code)

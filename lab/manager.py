"""A service manager in the lab: the part of systemd that matters to a daemon.

It takes notifications (sd_notify(3)), keeps descriptors, and passes them to the next start of the program.
"""

from __future__ import annotations

import array
import os
import socket
import sys
import threading
from pathlib import Path

from lab.program import PROGRAM


class Manager:
    """Listens until close(). `said` has every message so far, as its lines; `kept` the descriptors, by name."""

    def __init__(self, directory: Path) -> None:
        self.path = str(directory / "notify")
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind(self.path)
        self.kept: dict[str, int] = {}
        self.said: list[list[str]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while True:
            data, ancillary, _flags, _address = self._sock.recvmsg(4096, socket.CMSG_SPACE(4))
            if not data:
                return
            self.said.append(data.decode().splitlines())
            fields = dict(line.partition("=")[::2] for line in data.decode().splitlines())
            if "FDSTORE" in fields:
                ((_level, _type, passed),) = ancillary
                self.kept[fields["FDNAME"]] = array.array("i", passed)[0]
            if "FDSTOREREMOVE" in fields:
                os.close(self.kept.pop(fields["FDNAME"]))

    def program(self) -> tuple[str, ...]:
        """What starts the daemon with what is kept, from descriptor 3 on, however many programs are in between."""
        code = (
            "import os, sys; fds = [int(n) for n in sys.argv[1].split(',') if n]; copies = [os.dup(fd) for fd in fds]\n"
            "for n, fd in enumerate(copies): os.dup2(fd, 1000 + n)\n"
            "for n in range(len(fds)): os.dup2(1000 + n, 3 + n)\n"
            "os.closerange(3 + len(fds), 2000); os.environ['LISTEN_PID'] = str(os.getpid())\n"
            "os.environ['LISTEN_FDS'] = str(len(fds)); os.environ['LISTEN_FDNAMES'] = sys.argv[2]\n"
            "os.execv(sys.argv[3], sys.argv[3:])"
        )
        names, fds = list(self.kept), list(self.kept.values())
        for fd in fds:
            os.set_inheritable(fd, True)
        return (sys.executable, "-c", code, ",".join(map(str, fds)), ":".join(names), PROGRAM)

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"", self.path)
        self._reader.join(5)
        self._sock.close()
        for fd in self.kept.values():
            os.close(fd)

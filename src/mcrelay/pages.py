"""Pages: the memory of the data planes' counters, which outlives them.

counters.py knows what stands in it; here it is made, sealed and given away.
"""

from __future__ import annotations

import fcntl
import mmap
import os

from mcrelay import counters


class Page:
    """A worker's counter page: the memory, which outlives the worker, and our view of it."""

    def __init__(self, inherited: int | None = None) -> None:
        self.fd = self._make() if inherited is None else inherited
        self._map = mmap.mmap(self.fd, counters.PAGE_SIZE)
        self.counters = counters.Page(memoryview(self._map))

    @staticmethod
    def _make() -> int:
        fd = os.memfd_create("mcrelay-counters", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, counters.PAGE_SIZE)
        # A memfd is a file of mode 0777 that whoever holds a descriptor could open again for writing, through /proc.
        os.fchmod(fd, 0o400)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        return fd

    def writable(self) -> int:
        """A descriptor to give away."""
        return os.dup(self.fd)

    def readable(self) -> int:
        """A descriptor to give away that cannot be mapped for writing."""
        return os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)

"""What `mcrelay capture` leaves behind when it cannot go on."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mcrelay.cli_tap import _File
from mcrelay.errors import Error


def a_full_disk(fd: int, data: memoryview) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def a_break(fd: int, data: memoryview) -> int:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("end", "becomes"), [(a_full_disk, Error), (a_break, KeyboardInterrupt)])
def test_a_file_holds_whole_blocks_whatever_happens(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    end: Callable[[int, memoryview], int],
    becomes: type[BaseException],
) -> None:
    path = tmp_path / "capture"
    write = os.write
    parts = iter([5, 3])  # the last block goes in two parts, of which the first is not all

    def in_parts(fd: int, data: memoryview) -> int:
        try:
            return write(fd, data[: next(parts)])
        except StopIteration:
            return end(fd, data)

    with _File(str(path)) as file:
        file.write(b"first")
        file.write(b"second")
        monkeypatch.setattr(os, "write", in_parts)
        file.write(b"third")
        with pytest.raises(becomes):
            file.write(b"fourth")
        monkeypatch.undo()
        assert path.read_bytes() == b"firstsecondthird"

"""state.py: what is written is read again, and nothing else is."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from mcrelay import state as state_module
from mcrelay.errors import SystemRefusal
from mcrelay.messages import RuleRecord
from mcrelay.state import FORMAT, StateFile


def record(number: int) -> RuleRecord:
    return RuleRecord(f"239.1.1.{number}:5000%in0", ("239.2.2.2:6000%out0",), f"rule-{number}", number, (number,))


def content(**fields: Any) -> bytes:
    return json.dumps({"format": FORMAT, "generation": 5, "rules": [], **fields}).encode()


def written(tmp_path: Path, *generations: tuple[int, list[RuleRecord]]) -> StateFile:
    async def write() -> StateFile:
        state = StateFile(str(tmp_path / "control.sock"))
        for generation, records in generations:
            state.note(generation, records)
            await state.save(generation)
        return state

    return asyncio.run(write())


def test_what_was_saved_last_is_what_is_loaded(tmp_path: Path) -> None:
    state = written(tmp_path, (1, [record(1)]), (2, [record(1), record(2)]), (3, [record(2)]))
    loaded = state.load()
    assert loaded is not None
    assert (loaded.generation, loaded.rules) == (3, (record(2),))
    assert os.listdir(tmp_path) == ["control.sock.state"]
    assert state.path.stat().st_mode & 0o777 == 0o600


def test_changes_that_come_while_it_is_written_are_written_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes: list[bytes] = []
    monkeypatch.setattr(state_module, "write_whole", lambda path, content: writes.append(content))

    async def change() -> None:
        state = StateFile(str(tmp_path / "control.sock"))
        saves = []
        for generation in range(1, 51):
            state.note(generation, [record(generation)])
            saves.append(asyncio.create_task(state.save(generation)))
            if generation == 1:
                await asyncio.sleep(0)
        await asyncio.gather(*saves)

    asyncio.run(change())
    assert len(writes) == 2
    assert b'"generation":50' in writes[-1]


def test_without_a_file_there_is_nothing(tmp_path: Path) -> None:
    assert written(tmp_path).load() is None


def test_a_directory_that_cannot_be_written_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    written(tmp_path / "missing", (1, [record(1)]))
    assert "will not survive" in caplog.text


def keep(path: Path) -> None:
    """As it is."""


def link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/passwd")


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


STRANGE: Final[dict[str, tuple[bytes, Callable[[Path], object], str]]] = {
    "nothing in it": (b"", keep, "truncated"),
    "half of it": (content()[:-3], keep, "truncated"),
    "another format": (content(format=99), keep, "another version"),
    "an unknown field": (content(more=1), keep, "unknown field"),
    "deeply nested": (b'{"more":' + b"[" * 100_000, keep, "unknown field"),
    "not text": (b"\xff" * 100, keep, "malformed"),
    "somebody else's": (content(), lambda path: os.chown(path, 65534, -1), "somebody else"),
    "writable by all": (content(), lambda path: path.chmod(0o666), "somebody else"),
    "a link": (b"", link, "symbolic links"),
    "a pipe": (b"", pipe, "somebody else"),
    "a directory": (b"", directory, "somebody else"),
}


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give files away")
@pytest.mark.parametrize(("strange", "spoil", "words"), STRANGE.values(), ids=STRANGE)
def test_a_file_that_is_not_as_it_should_be_is_refused(
    tmp_path: Path, strange: bytes, spoil: Callable[[Path], object], words: str
) -> None:
    path = tmp_path / "control.sock.state"
    path.write_bytes(strange)
    path.chmod(0o600)
    spoil(path)
    held = len(os.listdir("/proc/self/fd"))
    with pytest.raises(SystemRefusal, match=words):
        written(tmp_path).load()
    assert len(os.listdir("/proc/self/fd")) == held

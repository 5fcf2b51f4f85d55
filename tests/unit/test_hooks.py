"""Programs that are run for events."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from lab.namespaces import wait_until
from mcrelay import hooks
from mcrelay.api import Event
from mcrelay.hooks import WAITING_MAX, Hook


def event(subject: str) -> Event:
    return Event(time_ns=1, kind="loss", subject=subject, text="much", values={})


def program(directory: Path, text: str) -> str:
    path = directory / "hook"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_each_event_has_its_run_in_order(tmp_path: Path) -> None:
    said: list[str] = []
    with Hook(program(tmp_path, f'cat > /dev/null; echo "$2 $MCRELAY_TEXT" >> {tmp_path}/runs'), said.append) as hook:
        for number in range(5):
            hook.tell(event(f"rule {number}; $(false)"))
    assert (tmp_path / "runs").read_text() == "".join(f"rule {number}; $(false) much\n" for number in range(5))
    assert said == []


def test_one_that_does_not_read_is_no_failure(tmp_path: Path) -> None:
    said: list[str] = []
    with Hook(program(tmp_path, "exec <&-"), said.append) as hook:
        hook.tell(event("x" * 100_000))
    assert said == []


@pytest.mark.parametrize(
    ("text", "deadline_s", "says"),
    [
        ("exit 4", 30.0, "failed for loss r: exit code 4"),
        ("exec sleep 60", 0.3, "did not end within 0 s: it was ended"),
    ],
)
def test_what_goes_wrong_is_said(tmp_path: Path, text: str, deadline_s: float, says: str) -> None:
    said: list[str] = []
    with Hook(program(tmp_path, text), said.append, deadline_s=deadline_s) as hook:
        hook.tell(event("r"))
    assert [says in line for line in said] == [True]


def test_a_program_that_is_gone_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    with Hook(str(tmp_path / "none"), said.append) as hook:
        hook.tell(event("r"))
    assert said == [f"cannot run {tmp_path}/none: No such file or directory"]


def test_what_no_program_can_be_given_is_said_and_the_next_is_run(tmp_path: Path) -> None:
    said: list[str] = []
    with Hook(program(tmp_path, f"touch {tmp_path}/run"), said.append) as hook:
        hook.tell(event("a\0b"))
        hook.tell(event("b"))
    assert len(said) == 1
    assert "embedded null byte" in said[0]
    assert (tmp_path / "run").exists()


def test_an_end_that_is_wanted_does_not_wait_for_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "LEFT_S", 0.1)
    said: list[str] = []
    text = f"touch {tmp_path}/begun; while [ ! -e {tmp_path}/go ]; do sleep 0.05; done; touch {tmp_path}/done"
    with contextlib.suppress(KeyboardInterrupt), Hook(program(tmp_path, text), said.append) as hook:
        for number in range(3):
            hook.tell(event(str(number)))
        wait_until((tmp_path / "begun").exists, 10)
        raise KeyboardInterrupt
    assert said == [
        f"{tmp_path}/hook: 2 events were dropped at the end",
        f"{tmp_path}/hook still runs, and is left alone",
    ]
    (tmp_path / "go").touch()
    wait_until((tmp_path / "done").exists, 10)


def test_a_program_that_is_too_slow_costs_events_and_that_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    with Hook(program(tmp_path, f"while [ ! -e {tmp_path}/go ]; do sleep 0.05; done"), said.append) as hook:
        for number in range(WAITING_MAX + 11):
            hook.tell(event(str(number)))
        assert "too slow" in said[0]
        (tmp_path / "go").touch()

        def is_through() -> bool:
            hook.tell(event("more"))
            return len(said) > 1

        wait_until(is_through, 20)
        assert "events were dropped" in said[1]

"""Tables and JSON as commands print them."""

from __future__ import annotations

import io
import sys

import pytest

from mcrelay.api import Restarted
from mcrelay.cli_print import count_of, print_json, print_table

ROWS = [["name", "state", "count", "why"], ["\u7db2", "ready", "5", "-"], ["evil\x1b[2J", "waiting", "1234", "a b"]]
PLAIN = """\
name        state  count  why
\u7db2          ready      5  -
evil?[2J  waiting   1234  a b
"""


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_table_is_plain_where_it_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(ROWS, state=1)
    assert capsys.readouterr().out == PLAIN


def test_a_table_on_a_terminal_is_the_same_text_with_emphasis(monkeypatch: pytest.MonkeyPatch) -> None:
    for no_colour in ("", "1"):
        screen = Screen()
        monkeypatch.setattr(sys, "stdout", screen)
        monkeypatch.setenv("NO_COLOR", no_colour)
        print_table(ROWS, state=1)
        shown = screen.getvalue()
        if no_colour:
            assert "\x1b" not in shown
        else:
            assert shown.startswith("\x1b[1mname")
            assert "\x1b[32mready\x1b[0m" in shown
            assert "\x1b[31mwaiting\x1b[0m" in shown
        for style in ("\x1b[1m", "\x1b[32m", "\x1b[31m", "\x1b[0m"):
            shown = shown.replace(style, "")
        assert shown == PLAIN


def test_json_has_what_was_asked_for_and_not_how(capsys: pytest.CaptureFixture[str]) -> None:
    print_json(Restarted(id=7, index=1, pid=77))
    assert capsys.readouterr().out == '{\n  "index": 1,\n  "pid": 77\n}\n'
    print_json({"rules": []}, indent=0)
    assert capsys.readouterr().out == '{"rules":[]}\n'


def test_things_are_counted_in_words() -> None:
    assert [count_of(n, "worker") for n in (0, 1, 2)] == ["0 workers", "1 worker", "2 workers"]

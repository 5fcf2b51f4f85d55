"""What commands print: JSON for programs, tables and lines for people.

On a terminal a table has a bold header and coloured states, unless NO_COLOR is set (no-color.org); elsewhere it is the
same text without. What others have named reaches a terminal only as printable characters.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any, Final

import click

from mcrelay import cells
from mcrelay.codec import json_text, to_json

ENVELOPE: Final = ("type", "id", "more")  # fields of a reply that belong to the connection
LINE_BREAK: Final = re.compile(r"\s*[\r\n]\s*")
# Of rules and of processes.
STATE_COLOURS: Final = {
    "active": "green",
    "ready": "green",
    "partial": "yellow",
    "starting": "yellow",
    "pending": "red",
    "suspended": "red",
    "waiting": "red",
}


def colours() -> bool | None:
    """What click.echo takes as `color`: no colours, or those of a terminal that has some."""
    return False if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" else None


def document_of(value: object) -> Any:
    """A reply, or part of one, as its command prints it as JSON."""
    document = to_json(value)
    if isinstance(document, dict):
        return {key: value for key, value in document.items() if key not in ENVELOPE}
    return document


def print_json(value: object, *, indent: int = 2) -> None:
    """One JSON document; indent 0 is one line."""
    click.echo(json_text(document_of(value), indent=indent))


def print_line(text: str, *, err: bool = False) -> None:
    """A line that may have styles."""
    click.echo(text, err=err, color=colours())


def complain(text: str) -> None:
    """An error or a remark: one line on standard error, whatever the texts in it are."""
    click.echo(f"mcrelay: {cells.printable(LINE_BREAK.sub(' ', text))}", err=True)


def print_table(rows: Sequence[Sequence[str]], *, state: int | None = None) -> None:
    """Columns as wide as their widest cell, below the header that the first row is; all but the first flush right, and
    the last flush left. `state` is the column that has states."""
    rows = [[cells.printable(cell) for cell in row] for row in rows]
    widths = [max(map(cells.width, column)) for column in zip(*rows, strict=True)]
    last = len(widths) - 1
    for number, row in enumerate(rows):
        shown = []
        for column, (cell, width) in enumerate(zip(row, widths, strict=True)):
            text = cells.fit(cell, width, right=0 < column < last)
            is_state = number > 0 and column == state
            shown.append(text.replace(cell, styled_state(cell)) if is_state else text)
        line = "  ".join(shown).rstrip()
        print_line(line if number else click.style(line, bold=True))


def styled_state(state: str) -> str:
    return click.style(state, fg=STATE_COLOURS[state]) if state in STATE_COLOURS else state


def count_of(n: int, noun: str) -> str:
    """1 worker, 2 workers."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"

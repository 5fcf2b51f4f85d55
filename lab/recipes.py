"""The commands that docs/recipes/ tells people to paste, so that tests run what people read.

A command is a line of a code block (indented by four spaces) that begins with its program; a line that ends in a
backslash goes on in the next one.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

ROOT: Final = Path(__file__).resolve().parents[1]
RECIPES: Final = ROOT / "docs" / "recipes"
COMMAND: Final = re.compile(r"^ {4,}(?:sudo )?(?:\.venv/bin/)?mcrelay +(.*)$", re.MULTILINE)


def commands(page: Path, verb: str) -> Iterator[list[str]]:
    """The arguments of `mcrelay VERB ...`, verb included, for each such line of a page. Those that show a form ("...")
    are left out."""
    text = re.sub(r" *\\\n *", " ", page.read_text())
    for match in COMMAND.finditer(text):
        arguments = shlex.split(match[1], comments=True)
        if arguments[:1] == [verb] and "..." not in match[1]:
            yield arguments


class Addition(NamedTuple):
    """What `mcrelay add` is given."""

    input: str
    outputs: list[str]
    name: str | None


def addition(arguments: list[str]) -> Addition:
    """Of `add INPUT OUTPUT... [--name NAME]`."""
    words = arguments[1:]
    name = None
    if "--name" in words:
        place = words.index("--name")
        name = words[place + 1]
        del words[place : place + 2]
    return Addition(words[0], words[1:], name)


def rules(page: str) -> list[Addition]:
    """What a recipe adds."""
    return [addition(arguments) for arguments in commands(RECIPES / f"{page}.md", "add")]


def removals(page: str) -> list[str]:
    """The names of the rules that a recipe removes."""
    return [name for _, name in commands(RECIPES / f"{page}.md", "remove")]

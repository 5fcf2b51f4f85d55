"""The commands that docs/recipes/ tells people to paste, so that tests run what people read.

A command is a line of a code block (indented by four spaces) that begins with its program; a line that ends in a
backslash goes on in the next one.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Final

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


def rules(page: str) -> list[list[str]]:
    """The `add` commands of a recipe."""
    return list(commands(RECIPES / f"{page}.md", "add"))


def removals(page: str) -> list[list[str]]:
    """The `remove` commands of a recipe."""
    return list(commands(RECIPES / f"{page}.md", "remove"))

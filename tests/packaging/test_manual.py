"""The manual pages: that they have everything, and are good roff."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import click
import pytest

from mcrelay.cli import cli

ROOT: Final = Path(__file__).resolve().parents[2]
PAGE: Final = ROOT / "man/mcrelay.8"
OF_MOST: Final = "Options of most commands"


def sections() -> dict[str, str]:
    """Of the manual page, by the first word of each heading, without roff's escapes."""
    text = PAGE.read_text().replace("\\-", "-")
    parts = re.split(r"^\.S[SH] (.*)$", text, flags=re.MULTILINE)[1:]
    return {
        (heading if heading == OF_MOST else heading.split()[0]): body
        for heading, body in zip(parts[::2], parts[1::2], strict=True)
    }


def mentioned(text: str) -> set[str]:
    """The options that are explained in a section: those in the line behind .TP."""
    tags = re.findall(r"^\.TP\n(.*)$", text, flags=re.MULTILINE)
    return {option for tag in tags for option in re.findall(r"(?<![\w-])--?[a-z][a-z-]*", tag)}


def missing(group: click.Group) -> Iterator[str]:
    """What the page does not have of the commands and their options."""
    found = sections()
    common = mentioned(found[OF_MOST])
    for name, command in group.commands.items():
        if command.hidden:
            continue
        if name not in found:
            yield name
            continue
        known = mentioned(found[name]) | common
        for parameter in command.params:
            if isinstance(parameter, click.Option) and not parameter.hidden:
                options = {*parameter.opts, *parameter.secondary_opts}
                yield from (f"{name} {option}" for option in sorted(options - known))


def test_the_page_has_each_command_and_option() -> None:
    assert list(missing(cli)) == []


def test_a_command_or_an_option_that_the_page_lacks_is_found() -> None:
    run = click.Command("run", params=[click.Option(["--config"]), click.Option(["--unheard-of"])])
    group = click.Group(commands={"run": run, "unheard": click.Command("unheard")})
    assert list(missing(group)) == ["run --unheard-of", "unheard"]


@pytest.mark.parametrize("page", sorted((ROOT / "man").iterdir()), ids=lambda page: page.name)
def test_a_page_is_good_roff(page: Path) -> None:
    done = subprocess.run(
        ["man", "--warnings", "--local-file", str(page)],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "MANWIDTH": "80", "MANROFFSEQ": "", "PAGER": "cat"},
    )
    assert done.stderr == ""
    for line in done.stdout.splitlines():
        assert "\\" not in line

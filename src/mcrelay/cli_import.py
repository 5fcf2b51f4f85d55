"""mcrelay import: another relay's configuration, as one of mcrelay's.

Owns where the text comes from, and what is said of what has no equivalent.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import click

from mcrelay import cli_complete
from mcrelay.cli_print import complain
from mcrelay.errors import EXIT_CODES, BadConfig, UsageError
from mcrelay.importers import FORMATS
from mcrelay.importers.imported import BadImport

if TYPE_CHECKING:
    _Choice = click.Choice[str]
else:  # before click 8.2 it cannot be subscripted
    _Choice = click.Choice

SIZE_MAX: Final = 4 * 1024 * 1024  # bytes

FORMAT_LINES: Final = "\n    ".join(f"{name:<20} {known.what}" for name, known in FORMATS.items())


class _Format(_Choice):
    """Its refusals take one line."""

    # Before click 8.2 it has no context.
    def get_missing_message(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return f"Write one of {', '.join(FORMATS)}"


@click.command(
    "import",
    help=f"""Print another relay's configuration as one of mcrelay's, and say what has no equivalent. It comes from FILE
    or, without one, from standard input; options may also stand behind '--'.

    \b
    FORMAT
    {FORMAT_LINES}

    \b
    Examples: mcrelay import smcroute /etc/smcroute.conf > mcrelay.toml
              mcrelay import multicast-relay -- --interfaces eth0 eth1 --noSSDP
    """,
)
@click.argument("format", metavar="FORMAT", type=_Format(list(FORMATS)))
@click.argument("words", nargs=-1, metavar="[FILE]", shell_complete=cli_complete.files)
@click.option("--strict", is_flag=True, help="Exit with 65 if something was not translated, or not exactly.")
def import_(format: str, words: tuple[str, ...], strict: bool) -> None:
    known = FORMATS[format]
    place = "options"
    try:
        if known.read_options and _are_options(words):
            imported = known.read_options(words)
        else:
            place, text = _text(words)
            imported = known.read(text)
    except BadImport as error:
        raise BadConfig(f"{place}: {error.message}", error.hint, code="bad_rule") from None
    for line in imported.toml():
        click.echo(line)
    for remark in imported.remarks:
        complain(f"{place}: {remark}")
    if not imported.has_rules:
        raise BadConfig(f"{place}: no rule came of it", f"it takes {known.needs}", code="bad_rule")
    if strict and imported.remarks:
        sys.exit(EXIT_CODES["bad_rule"])


def _are_options(words: Sequence[str]) -> bool:
    """Rather than the name of a file that has some."""
    return len(words) > 1 or any(word != "-" and word.startswith("-") for word in words)


def _text(words: Sequence[str]) -> tuple[str, str]:
    """What it is called, and what it says."""
    if len(words) > 1:
        raise UsageError(f"{len(words)} files are given", "import one at a time")
    name = words[0] if words else "-"
    try:
        with click.open_file(name, "rb") as file:
            content = file.read(SIZE_MAX + 1)
        if len(content) > SIZE_MAX:
            raise BadConfig(f"{name} is longer than {SIZE_MAX // 2**20} MiB", "give a configuration file")
        return name, content.decode()
    except UnicodeDecodeError:
        raise BadConfig(f"{name} is not UTF-8 text", "give a configuration file") from None
    except OSError as error:
        raise BadConfig(f"cannot read {name}: {error.strerror}", "check its name, owner and mode") from None

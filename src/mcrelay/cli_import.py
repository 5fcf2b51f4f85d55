"""mcrelay import: another relay's configuration, as one of mcrelay's.

Owns where the text comes from, and what is said of what has no equivalent.
"""

from __future__ import annotations

import shlex
import sys
from typing import Final

import click

from mcrelay import cli_complete
from mcrelay.cells import printable
from mcrelay.errors import EXIT_CODES, BadConfig, UsageError
from mcrelay.importers import FORMATS, Format

SIZE_MAX: Final = 4 * 1024 * 1024  # bytes

FORMAT_LINES: Final = "\n    ".join(f"{name:<20} {known.what}" for name, known in FORMATS.items())


class _Format(click.Choice[str]):
    """Its refusals take one line."""

    def get_missing_message(self, param: click.Parameter, ctx: click.Context | None) -> str:
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
    place, text = _text(known, words)
    try:
        imported = known.read(text)
    except BadConfig as error:
        raise BadConfig(printable(f"{place}: {error.message}"), error.hint, code="bad_rule") from None
    for line in imported.toml():
        click.echo(line)
    for remark in imported.remarks:
        click.echo(f"mcrelay: {printable(f'{place}: {remark}')}", err=True)
    if not imported.has_rules:
        raise BadConfig(printable(f"{place}: no rule came of it"), f"it takes {known.needs}", code="bad_rule")
    if strict and imported.remarks:
        sys.exit(EXIT_CODES["bad_rule"])


def _text(known: Format, words: tuple[str, ...]) -> tuple[str, str]:
    """What it is called, and what it says."""
    if known.is_options and (len(words) > 1 or (words and words[0] != "-" and words[0].startswith("-"))):
        return "options", shlex.join(words)
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

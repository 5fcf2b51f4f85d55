"""A group of commands whose names may be abbreviated.

An exact name goes first, else the one command that begins with what was typed. Listings and completions have the full
names alone, since an abbreviation is no command.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from mcrelay.errors import EXIT_CODES


class Commands(click.Group):
    """Abbreviations are for people: a script that uses one may break with the next command that is added."""

    def invoke(self, ctx: click.Context) -> Any:
        """Click ends with 1 where whoever reads the output is gone, which some commands say something else by."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left to be written
            sys.exit(EXIT_CODES["io"])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        typed = args[0]
        if self.get_command(ctx, typed) is None and not typed.startswith("-"):
            names = self.list_commands(ctx)
            begun = [name for name in names if typed and name.startswith(typed)]
            if len(begun) == 1:
                args = [*begun, *args[1:]]
            elif not ctx.resilient_parsing:  # a completion is no place for errors
                raise click.UsageError(_refusal(typed, begun, names), ctx)
        return super().resolve_command(ctx, args)


def _refusal(typed: str, begun: Sequence[str], names: Sequence[str]) -> str:
    """What else could have been meant."""
    if begun:
        return f"{typed!r} may be {', '.join(begun[:-1])} or {begun[-1]}"
    near = difflib.get_close_matches(typed, names, n=1)
    return f"No such command {typed!r}" + (f"; did you mean {near[0]!r}?" if near else ".")

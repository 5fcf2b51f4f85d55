"""mcrelay log, and what `mcrelay run` takes about its log."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import click

from mcrelay import cli_complete
from mcrelay.cli_options import json_option, socket_option
from mcrelay.cli_print import print_json
from mcrelay.client import Client
from mcrelay.documents import LevelsInForce
from mcrelay.levels import LEVELS, changed, checked, split
from mcrelay.messages import Levels, LogSettings
from mcrelay.settings import LogFormat, LogSection


def log_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """--log-level, --log-format and --debug."""
    for option in (
        click.option(
            "--debug", is_flag=True, help="Log from level debug on, and report whatever blocks an event loop."
        ),
        click.option(
            "--log-format",
            type=click.Choice(get_args(LogFormat)),
            show_default="auto",
            help="How log lines look; auto is journal where standard error is systemd's journal, else text.",
        ),
        click.option(
            "--log-level",
            "log_levels",
            multiple=True,
            metavar="LEVEL|COMPONENT=LEVEL",
            shell_complete=cli_complete.levels,
            help=f"Log from LEVEL on ({', '.join(LEVELS)}) [default: info], or a component from its own; repeatable. "
            "'mcrelay log' changes it later.",
        ),
    ):
        function = option(function)
    return function


def log_settings(file: LogSection, texts: tuple[str, ...], log_format: LogFormat | None, *, debug: bool) -> LogSettings:
    """What the file says and these options, which count more; or a UsageError."""
    levels = changed(Levels(level=file.level), *checked(None, file.levels))
    if debug:
        levels = changed(levels, "debug", {})
    return LogSettings(levels=changed(levels, *checked(*split(texts))), format=log_format or file.format, watch=debug)


@click.command()
@click.argument("levels", nargs=-1, metavar="[LEVEL|COMPONENT=LEVEL]...", shell_complete=cli_complete.levels)
@json_option
@socket_option
def log(levels: tuple[str, ...], as_json: bool, path: str) -> None:
    """Show from which level on the daemon logs, or change it: of all components that have no level of their own, or of
    one. Levels are debug, info, warning and error; COMPONENT=default takes a component's own level away. All processes
    have followed when the command returns, and those that start later do, until the daemon is stopped.

    \b
    Examples: mcrelay log
              mcrelay log links=debug clients=warning
              mcrelay log links=default
    """
    level, components = split(levels)
    with Client(path) as client:
        reply = client.set_log_levels(level, components) if levels else client.log_levels()
    if as_json:
        print_json(LevelsInForce(level=reply.level, components=reply.components, known=reply.known))
        return
    for component, own in reply.components.items():
        click.echo(f"{component:<16} {own}")
    others = ", ".join(name for name in reply.known if name not in reply.components)
    click.echo(f"{'all others' if reply.components else 'all':<16} {reply.level}   ({others})")

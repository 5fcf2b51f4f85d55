"""Options that commands of several modules have in common."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import click

from mcrelay import cli_complete
from mcrelay.places import SYSTEM_SOCKET, find_socket


class _AnyWhole(click.types.IntParamType):
    name = "whole number"


class Whole(click.IntRange):
    """A whole number of a range, and called that in errors."""

    name = "whole number"


class Number(click.FloatRange):
    """A number of a range, and called that in errors."""

    name = "number"


WHOLE: Final = _AnyWhole()  # whatever it is


def socket_option(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--socket",
        "path",
        default=find_socket,
        show_default=f"MCRELAY_SOCKET, or {SYSTEM_SOCKET}, or where this user's rootless daemon is",
        metavar="PATH",
        shell_complete=cli_complete.files,
        help="The daemon's socket.",
    )(function)


def json_option(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")(function)


def finite(_context: click.Context, _option: click.Parameter, value: float) -> float:
    """A range lets nan pass, which is neither less nor more than anything."""
    if not math.isfinite(value):
        raise click.BadParameter(f"{value} is no number of seconds")
    return value

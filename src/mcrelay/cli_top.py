"""The command `mcrelay top`: what a person types of it.

mcrelay.top has the screen and mcrelay.top_terminal the terminal. Both are imported when they are needed, so that other
commands start without them.
"""

from __future__ import annotations

import click

from mcrelay.cli_options import Number, finite, socket_option


@click.command()
@click.option(
    "--interval",
    "interval_s",
    type=Number(0.2, 60),
    callback=finite,
    default=1.0,
    show_default=True,
    metavar="S",
    help="Seconds from one reading of the counters to the next.",
)
@socket_option
def top(interval_s: float, path: str) -> None:
    """Watch rules, outputs, workers and interfaces on a terminal: rates, loss, drop reasons and what does not work,
    sorted and filtered by keys. h shows the keys, q quits.

    \b
    Example: mcrelay top
             mcrelay top --interval 5
    """
    from mcrelay import top_terminal

    top_terminal.check()
    top_terminal.show(path, interval_s)

"""mcrelay events: what happens, as it happens.

Owns the lines that it prints, and that it goes on when the daemon is replaced. subscriptions.py makes the events,
hooks.py runs a program for them.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import datetime
from typing import Final

import click

from mcrelay import cells, cli_complete
from mcrelay.api import EVENT_KINDS, Event, EventKind
from mcrelay.cli_options import Whole, json_option, socket_option
from mcrelay.cli_print import complain, print_json, print_line
from mcrelay.cli_tap import until_stopped
from mcrelay.client import Client
from mcrelay.errors import Unavailable, UsageError
from mcrelay.hooks import Hook

AGAIN_FOR_S: Final = 30.0  # how long a daemon that was lost may be away
AGAIN_S: Final = 0.2
LOOK_S: Final = 1.0  # without an event, after which the daemon is known to be there
COLOURS: Final = {
    "rule_suspended": "red",
    "interface_down": "red",
    "worker_down": "red",
    "flow_silent": "yellow",
    "flow_stopped": "yellow",
    "loss": "red",
    "rule_resumed": "green",
    "interface_up": "green",
    "worker_up": "green",
    "flow_started": "green",
    "loss_over": "green",
}


@click.command()
@click.option(
    "--only", "kinds", multiple=True, type=click.Choice(EVENT_KINDS), help="Of this kind; may be given several times."
)
@click.option("--count", type=Whole(1), metavar="N", help="End after N events.")
@click.option(
    "--run",
    "program",
    metavar="PROGRAM",
    help="Run a program for each: PROGRAM KIND SUBJECT, JSON on stdin.",
    shell_complete=cli_complete.files,
)
@json_option
@socket_option
def events(kinds: tuple[EventKind, ...], count: int | None, program: str | None, as_json: bool, path: str) -> None:
    """Show what happens, until Ctrl-C: rules, interfaces and workers that come and go, flows that start, fall silent
    and stop, loss. With --json, one JSON document per line. It goes on when the daemon is replaced or restarted.

    \b
    Examples: mcrelay events
              mcrelay events --only interface_down --only loss --run ./alert
    """
    if program is not None and shutil.which(program) is None:
        if os.path.isfile(program):
            if "/" not in program:
                raise UsageError(f"--run {program}: it is in no directory of PATH", f"write ./{program}")
            raise UsageError(f"--run {program}: you may not execute it", f"chmod +x {program}")
        raise UsageError(f"--run {program}: there is no such program", "give the path of an executable file")
    with until_stopped(), ExitStack() as stack:
        hook = stack.enter_context(Hook(program, complain)) if program else None
        for event in _follow(path, kinds, count):
            if as_json:
                print_json(event, indent=0)
            else:
                print_line(_line(event))
            if hook:
                hook.tell(event)


def _line(event: Event) -> str:
    at = datetime.fromtimestamp(event.time_ns / 1e9).astimezone()
    kind = click.style(f"{event.kind:<14}", fg=COLOURS.get(event.kind))
    return f"{at.isoformat(timespec='milliseconds')}  {kind}  {cells.printable(f'{event.subject}: {event.text}')}"


def _follow(path: str, kinds: tuple[EventKind, ...], count: int | None) -> Iterator[Event]:
    """Without end or `count` of them. Unavailable if there is no daemon, or none again."""
    lost_at: float | None = None
    seen = 0
    with Client(path) as client:
        while True:
            try:
                for happened in client.events(kinds, patience_s=LOOK_S):
                    if lost_at is not None:
                        complain("connected again; what happened meanwhile is not told")
                        lost_at = None
                    for event in happened.events:
                        yield event
                        seen += 1
                        if seen == count:
                            return
            except Unavailable:
                if lost_at is None:
                    lost_at = time.monotonic()
                elif time.monotonic() - lost_at > AGAIN_FOR_S:
                    raise
            time.sleep(AGAIN_S)

"""mcrelay health: whether the daemon does its work, for containers, load balancers and scripts.

health.py judges; here it is asked for, printed, and made an exit code.
"""

from __future__ import annotations

import sys
from typing import Final

import click

from mcrelay import cells
from mcrelay.cli_options import json_option, socket_option
from mcrelay.cli_print import print_json, print_line
from mcrelay.client import Client
from mcrelay.errors import EXIT_CODES, Busy, Unavailable
from mcrelay.health import Health, judge
from mcrelay.messages import ProcessFacts

COLOURS: Final = {"ok": "green", "degraded": "yellow", "failing": "red"}


@click.command()
@click.option("--strict", is_flag=True, help="Let rules that do not work (degraded) count as failing.")
@json_option
@socket_option
def health(strict: bool, as_json: bool, path: str) -> None:
    """Say whether the daemon works: ok; degraded, if some rules do not; failing, if a part of it does not. Exits
    with 0 unless it is failing or there is none (69). The same is at /health where 'run --metrics' serves.

    \b
    Example: mcrelay health || systemctl restart mcrelay
    """
    try:
        with Client(path) as client:
            found = _ask(client)
    except Unavailable as error:
        if as_json:
            print_json(Health(status="failing", reasons=(error.message,)))
        raise
    if as_json:
        print_json(found)
    else:
        print_line(click.style(found.status, fg=COLOURS[found.status]))
        for reason in found.reasons:
            print_line(f"  {cells.printable(reason)}")
    if found.status == "failing" or (strict and found.status != "ok"):
        sys.exit(EXIT_CODES["unavailable"])


def _ask(client: Client) -> Health:
    processes: tuple[ProcessFacts, ...] | None
    try:
        processes = client.workers()
    except Busy:
        processes = None  # the supervisor does not answer
    return judge(processes, client.rules())

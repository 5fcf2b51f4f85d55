"""The command `mcrelay stats`: counters, once or again and again with rates."""

from __future__ import annotations

import sys
import time
from typing import Final

import click

from mcrelay import rates
from mcrelay.api import RuleStats
from mcrelay.cells import human
from mcrelay.cli_options import json_option, socket_option
from mcrelay.cli_print import print_json, print_table
from mcrelay.client import Client
from mcrelay.rates import OutputRow, Rates, Reading, RuleRow, WorkerRow

WATCH_S: Final = 1.0


@click.command()
@click.option("--watch", is_flag=True, help="Go on, with rates, until Ctrl-C.")
@json_option
@socket_option
def stats(watch: bool, as_json: bool, path: str) -> None:
    """Show counters: of each worker, rule and output, and every reason for a drop. 'mcrelay top' shows them as a live
    view, to be sorted and filtered.

    With --watch and --json, one JSON document per line and second.

    \b
    Example: mcrelay stats --watch
    """
    with Client(path) as client:
        before, then = None, 0.0
        while True:
            reading, now = Reading(client.stats()), time.monotonic()
            if as_json:
                print_json(reading.stats, indent=0 if watch else 2)
            else:
                if before and sys.stdout.isatty():
                    click.clear()
                _print(rates.between(before, reading, now - then))
            if not watch:
                return
            before, then = reading, now
            time.sleep(WATCH_S)


def _print(shown: Rates) -> None:
    """A table of workers and one of rules and their outputs."""
    rows = [["worker", "received", "forwarded", "copies", "dropped", "because"]]
    rows += [_worker_row(worker) for worker in shown.workers]
    print_table(rows)
    click.echo()
    rows = [["rule", "packets", "bytes", "dropped", "because"]]
    for rule in shown.rules:
        packets, size = _counts(rule)
        rows.append([_title(rule.now), packets, size, str(rule.now.dropped), _besides(rule.now)])
        for output in rule.outputs:
            packets, size = _counts(output)
            dropped = output.now.dropped
            rows.append([f"  -> {output.now.output}", packets, size, str(sum(dropped.values())), _reasons(dropped)])
    print_table(rows)


def _title(rule: RuleStats) -> str:
    return f"{rule.name or rule.id}  {rule.input}"


def _worker_row(worker: WorkerRow) -> list[str]:
    counts = [
        _with_rate(getattr(worker.now, counter), worker.rate(counter), worker.seconds)
        for counter in ("received", "forwarded", "copies")
    ]
    dropped = worker.now.dropped
    return [str(worker.now.index), *counts, str(sum(dropped.values())), _reasons(dropped)]


def _counts(row: RuleRow | OutputRow) -> tuple[str, str]:
    """Packets and bytes."""
    size = human(row.now.bytes, "B")
    bits = human(8 * row.rate("bytes"), "bit/s")
    packets = _with_rate(row.now.packets, row.rate("packets"), row.seconds)
    return packets, f"{size} ({bits})" if row.seconds else size


def _with_rate(count: int, rate: float, seconds: float) -> str:
    return f"{count} ({human(rate)}/s)" if seconds else str(count)


def _besides(rule: RuleStats) -> str:
    """What matched the rule and is not among its packets."""
    counted = {"own": rule.own, "loop": rule.looped}
    return ", ".join(f"not counted here: {reason} {packets}" for reason, packets in counted.items() if packets)


def _reasons(dropped: dict[str, int]) -> str:
    return ", ".join(f"{reason} {packets}" for reason, packets in dropped.items()) or "-"

"""The commands `mcrelay send` and `mcrelay receive`: what a person types and sees of test traffic.

With --json, every event of mcrelay.traffic is one JSON line on standard output. Without, the report is a table there,
and on a terminal a line on standard error moves meanwhile. mcrelay.traffic is imported when it is needed, so that other
commands start without it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import click

from mcrelay.cli_options import WHOLE

Event = dict[str, Any]


def _common_options(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print JSON lines, for programs."),
        click.option(
            "--progress/--no-progress",
            default=None,
            help="Show rates every half second [default: on a terminal, and not with --json].",
        ),
        click.option("--core", type=WHOLE, metavar="N", help="Run on this core only."),
        click.option(
            "--rtp",
            is_flag=True,
            help="Test traffic with an RTP header (payload type 96, SSRC is the flow); to receive: any RTP stream.",
        ),
        click.option(
            "--flow-step",
            type=click.Choice(["port", "group"]),
            default="port",
            show_default=True,
            help="What counts up from flow to flow.",
        ),
        click.option("--flows", type=WHOLE, default=1, show_default=True, metavar="N", help="Number of flows."),
    ):
        function = option(function)
    return function


@click.command()
@click.argument("target")
@click.option(
    "--rate",
    type=float,
    default=1000.0,
    show_default=True,
    metavar="N",
    help="Datagrams a second, of all flows; 0 is as fast as possible.",
)
@click.option("--size", type=WHOLE, default=1000, show_default=True, metavar="N", help="Bytes of payload.")
@click.option("--count", type=WHOLE, metavar="N", help="End after so many datagrams [default: with Ctrl-C].")
@click.option("--duration", "duration_s", type=float, metavar="S", help="End after so many seconds.")
@click.option("--ttl", type=WHOLE, default=8, show_default=True, metavar="N", help="Time to live, or hop limit.")
@click.option("--source", metavar="ADDRESS", help="Send from this address of the host.")
@click.option(
    "--flow-id",
    type=WHOLE,
    default=0,
    show_default=True,
    metavar="N",
    help="Number of the first flow; senders to one receiver need different ones.",
)
@click.option(
    "--segments",
    type=WHOLE,
    metavar="N",
    help="Most datagrams in one send, cut apart by the kernel; 1 is plain sends [default: what fits, up to 64].",
)
@click.option(
    "--burst",
    type=WHOLE,
    default=1,
    show_default=True,
    metavar="N",
    help="Consecutive datagrams of each flow before the next flow's.",
)
@_common_options
def send(target: str, as_json: bool, progress: bool | None, core: int | None, **options: Any) -> None:
    """Send numbered and timed datagrams to TARGET, for 'mcrelay receive'. Needs no daemon.

    TARGET is ADDRESS:PORT[%INTERFACE], a group or a host; an IPv6 address stands in brackets. Flows take turns.

    \b
    Example: mcrelay send 239.1.1.1:5000%eth0 --rate 10000 --size 1316 --duration 10
    """
    from mcrelay import traffic

    plan = traffic.SendPlan(target, **options)
    if core is not None:
        traffic.pin(core)
    with traffic.stopped_by_signals() as stop:
        shown = _Events(as_json, progress, f"sending to {target}", _send_table)
        traffic.send(plan, shown.show, stop, progress=shown.progress)


@click.command()
@click.argument("target")
@click.option("--count", type=WHOLE, metavar="N", help="End after so many distinct datagrams [default: with Ctrl-C].")
@click.option(
    "--expect", type=WHOLE, metavar="N", help="How many were sent, for the loss [default: the count, or as seen]."
)
@click.option("--idle", "idle_s", type=float, metavar="S", help="End when nothing came for so long after the first.")
@click.option("--duration", "duration_s", type=float, metavar="S", help="End after so many seconds.")
@click.option(
    "--linger",
    "linger_s",
    type=float,
    default=0.0,
    metavar="S",
    help="Stay so long after the count, to see late duplicates.",
)
@_common_options
def receive(target: str, as_json: bool, progress: bool | None, core: int | None, **options: Any) -> None:
    """Receive what 'mcrelay send' sends, or with --rtp any RTP stream, and account for each datagram.

    TARGET is ADDRESS:PORT[%INTERFACE], a group or an address of this host; an IPv6 address stands in brackets. Reports
    loss, reordering, duplicates, corruption, rate, latency and jitter. Latency needs clocks that agree. Needs no
    daemon.

    \b
    Example: mcrelay receive 239.2.2.2:6000%eth1 --idle 2
    """
    from mcrelay import traffic

    plan = traffic.ReceivePlan(target, **options)
    if core is not None:
        traffic.pin(core)
    with traffic.stopped_by_signals() as stop:
        shown = _Events(as_json, progress, f"receiving from {target}", _receive_table)
        traffic.receive(plan, shown.show, stop, progress=shown.progress)


class _Events:
    """Shows events as they come, in the form that was asked for."""

    def __init__(self, as_json: bool, progress: bool | None, what: str, table: Callable[[Event], list[str]]) -> None:
        self._as_json = as_json
        self._what = what
        self._table = table
        self._on_terminal = sys.stderr.isatty()
        self._line = False  # whether a line is on the terminal that the next may overwrite
        self.progress = progress if progress is not None else self._on_terminal and not as_json

    def show(self, event: Event) -> None:
        if self._as_json:
            click.echo(json.dumps(event))
        elif event["event"] == "report":
            self._clear()
            click.echo("\n".join(self._table(event)))
        elif self.progress:
            text = f"{self._what}; Ctrl-C ends" if event["event"] == "ready" else _progress_line(event)
            self._clear()
            click.echo(text, err=True, nl=not self._on_terminal)
            self._line = self._on_terminal

    def _clear(self) -> None:
        if self._line:
            click.echo("\r\033[K", err=True, nl=False)
            self._line = False


def _progress_line(event: Event) -> str:
    rate = f"{event['rate']:,.0f}/s  {_bits(event['bits_per_second'])}"
    if "sent" in event:
        return f"sent {event['sent']:,}  {rate}"
    return f"received {event['received']:,}  {rate}  lost {event['lost']:,}  duplicated {event['duplicated']:,}"


def _send_table(report: Event) -> list[str]:
    lines = [
        f"sent         {report['sent']:,} in {report['seconds']:.3f} s ({report['ended']})",
        f"rate         {report['rate']:,.0f}/s  {_bits(report['bits_per_second'])}",
    ]
    if report["segments_refused"]:
        lines.append(f"segments     refused with {report['segments_refused']}: sent one by one")
    elif report["segments"] > 1:
        lines.append(f"segments     up to {report['segments']} in one send")
    if report["postponed_s"]:
        lines.append(f"postponed    {report['postponed_s']:.3f} s: the rate was not kept")
    if report["retried"]:
        lines.append(f"retried      {report['retried']:,}")
    return lines


def _receive_table(report: Event) -> list[str]:
    lost = f" ({100 * report['lost'] / report['expected']:.4g} %)" if report["lost"] else ""
    lines = [
        f"received     {report['received']:,} of {report['expected']:,} in {report['seconds']:.3f} s "
        f"({report['ended']})",
        f"rate         {report['rate']:,.0f}/s  {_bits(report['bits_per_second'])}",
        f"lost         {report['lost']:,}{lost}",
        f"reordered    {report['reordered']:,}",
        f"duplicated   {report['duplicated']:,}",
        f"corrupted    {report['corrupted']:,}",
    ]
    for name, remark in (
        ("foreign", "not test traffic"),
        ("late", "too old to tell from duplicates"),
        ("overrun", "dropped here, as this program did not keep up"),
        ("clock_skew", "with an impossible latency: the clocks differ"),
    ):
        if report[name]:
            lines.append(f"{name:<12} {report[name]:,} ({remark})")
    if report["latency_p50_us"] is not None:
        names = (("p50", "p50"), ("p90", "p90"), ("p99", "p99"), ("p99.9", "p999"), ("max", "max"))
        values = (f"{label} {report[f'latency_{name}_us']:,.1f}" for label, name in names)
        lines.append(f"latency, us  {'  '.join(values)}")
    if report["jitter_us"] is not None:
        lines.append(f"jitter, us   {report['jitter_us']:,.1f}")
    return lines


def _bits(per_second: float) -> str:
    for unit, size in (("Gbit/s", 1e9), ("Mbit/s", 1e6), ("kbit/s", 1e3)):
        if per_second >= size:
            return f"{per_second / size:.2f} {unit}"
    return f"{per_second:.0f} bit/s"

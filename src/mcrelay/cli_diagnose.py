"""The commands `mcrelay explain` and `mcrelay doctor`: what a person types and sees of a diagnosis.

Neither needs a daemon: that there is none is a finding. What gathers and judges is in mcrelay.inquiry, which is
imported when it is needed, so that other commands start without it.

Exit codes: 0 if all holds, 1 if something is wrong, and those of errors.py if the question itself is.
"""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

import click

from mcrelay import cli_complete
from mcrelay.cli_options import Number, finite, json_option, socket_option
from mcrelay.cli_print import complain, print_json, print_line

if TYPE_CHECKING:
    from mcrelay.api import RuleFacts
    from mcrelay.client import Client
    from mcrelay.facts import Diagnosis, Finding, Verdict

DEFAULT_SECONDS: Final = 3.0
WRONG: Final = 1  # the exit code
STEP_WIDTH: Final = 20
TO_MANY: Final = re.compile(r"=:|22[4-9]\.|23[0-9]\.|\[ff|255\.255\.255\.255:")  # outputs that need no route
LABELS: Final[dict[Verdict, str]] = {"ok": "ok", "bad": "BAD", "unknown": "?", "note": "note"}
COLOURS: Final[dict[Verdict, str]] = {"ok": "green", "bad": "red", "unknown": "yellow", "note": "cyan"}


def _options(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        socket_option,
        json_option,
        click.option(
            "--seconds",
            type=Number(0.1, 3600),
            callback=finite,
            default=DEFAULT_SECONDS,
            show_default=True,
            metavar="N",
            help="How long to look at traffic and counters.",
        ),
    ):
        function = option(function)
    return function


@click.command()
@click.argument("input", shell_complete=cli_complete.inputs)
@click.option("--from", "source", metavar="SOURCE", help="Only what this address sends.")
@_options
def explain(input: str, source: str | None, seconds: float, as_json: bool, path: str) -> None:
    """Walk the way of INPUT's packets, from the wire to each output, and say at each step what holds, what does not,
    and the command that mends it. INPUT may be one that no rule has: then it says which rules almost take it.

    With CAP_NET_RAW (sudo) it looks at what really comes in; without, at everything else. It changes nothing, but that
    it joins the group meanwhile if nobody on this host has. Exits with 0 if all holds and with 1 if something is wrong.

    \b
    Example: sudo mcrelay explain 239.1.1.1:5000%eth0
             sudo mcrelay explain 239.1.1.1:5000%eth0 --from 10.1.2.3 --seconds 10
    """
    from mcrelay import inquiry

    given = inquiry.parse(input, source)
    _announce(f"looking at {given} for {seconds:g} s", as_json)
    _show(inquiry.about(given, seconds, path), seconds, str(given), as_json=as_json)


@click.command()
@_options
def doctor(seconds: float, as_json: bool, path: str) -> None:
    """Examine this host and the daemon as a whole: kernel, privileges, workers, rules, what is dropped and why,
    interfaces and limits, each with the command that mends it. Exits with 0 if all holds and with 1 if something is
    wrong.

    \b
    Example: sudo mcrelay doctor
             mcrelay doctor --json
    """
    from mcrelay import inquiry

    _announce(f"looking at counters for {seconds:g} s", as_json)
    _show(inquiry.at_large(seconds, path), seconds, as_json=as_json)


def remark_on_routes(rule: RuleFacts, client: Client) -> None:
    """Say at once, of a rule that was added, what nobody would notice: copies to a host that has no route."""
    if all(TO_MANY.match(output) for output in rule.outputs):
        return
    from mcrelay import inquiry

    for finding in inquiry.of_routes(rule, client):
        mending = f"; {finding.remedy}" if finding.remedy else ""
        complain(f"note: {finding.step}: {finding.fact}{mending}")


# --- printing ---------------------------------------------------------------------------------------------------------


def _announce(text: str, as_json: bool) -> None:
    """On a terminal, what takes so long."""
    if not as_json and sys.stderr.isatty():
        click.echo(f"{text} ...", err=True)


def _show(findings: Sequence[Finding], seconds: float, given: str | None = None, *, as_json: bool) -> None:
    wrong = [finding for finding in findings if finding.verdict == "bad"]
    if as_json:
        document: Diagnosis = {"seconds": seconds, "holds": not wrong, "findings": list(findings)}
        print_json(document if given is None else {"input": given, **document})
    else:
        for line in _lines(findings):
            print_line(line)
        click.echo()
        print_line(_summary(findings))
    if wrong:
        sys.exit(WRONG)


def _lines(findings: Iterable[Finding]) -> Iterable[str]:
    width = max(60, shutil.get_terminal_size().columns) if sys.stdout.isatty() else 120
    margin = 6 + STEP_WIDTH
    for finding in findings:
        label = click.style(
            f"{LABELS[finding.verdict]:<6}", fg=COLOURS[finding.verdict], bold=finding.verdict == "bad" or None
        )
        first, *others = textwrap.wrap(finding.fact, width - margin, break_on_hyphens=False, break_long_words=False)
        yield f"{label}{finding.step:<{STEP_WIDTH}}{first}"
        for line in others:
            yield " " * margin + line
        if finding.remedy and finding.verdict != "ok":
            yield " " * margin + f"$ {finding.remedy}"  # in one piece, to be pasted


def _summary(findings: Sequence[Finding]) -> str:
    wrong = list(dict.fromkeys(finding.step for finding in findings if finding.verdict == "bad"))
    unknown = list(dict.fromkeys(finding.step for finding in findings if finding.verdict == "unknown"))
    if wrong:
        return f"wrong: {', '.join(wrong)}"
    return "nothing is wrong" + (f"; not known: {', '.join(unknown)}" if unknown else "")

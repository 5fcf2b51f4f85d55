"""Measure mcrelay beside other relays.

    python -m bench [--mode quick|full] [--relays a,b] [--only NAME,...] [--json FILE] [--chart FILE.svg]
                    [--markdown FILE] [--repeat N] [--steering relay|sender] [--before PROGRAM]

Progress is on standard error, the result on standard output. Ctrl-C ends it with what has been measured so far, and
leaves nothing behind.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from bench import chart, course, report
from bench.network import RELAY_CORE, STEERINGS
from bench.relays import RELAYS, McrelayBefore
from bench.samples import PROFILES, Profile, Results, environment
from lab.namespaces import unsupported

EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if reason := unsupported() or too_small():
        print(f"cannot measure here: {reason}", file=sys.stderr)
        return 1
    if options.chart and (reason := chart.missing()):
        print(f"no chart: {reason}", file=sys.stderr)
        options.chart = None
    profile: Profile = PROFILES[options.mode]
    if options.repeat:
        profile = replace(profile, repeat=options.repeat)
    names = options.relays or profile.relays
    if options.before:
        McrelayBefore.program = options.before
        names = [*names, McrelayBefore.name]
    chosen = {"mode": options.mode, "relays": list(names), "repeat": profile.repeat, "steering": options.steering}
    results = Results(environment({**chosen, "only": options.only}, course.busy_before()))
    progress = Progress()
    signal.signal(signal.SIGTERM, _interrupt)
    interrupted = False
    try:
        course.run(results, profile, names, options.only, options.steering, progress)
    except KeyboardInterrupt:
        interrupted = True
        results.skipped.append("interrupted: the rest")
    results.environment["seconds"] = round(time.monotonic() - progress.started, 1)
    print(report.text(results))
    if options.json:
        options.json.write_text(json.dumps(results.document(), indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(report.markdown(results))
    if options.chart:
        chart.draw(results, options.chart)
    return EXIT_INTERRUPTED if interrupted else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mode", choices=PROFILES, default="quick", help="how much to measure (default: %(default)s)")
    parser.add_argument("--relays", type=_listed(RELAYS), metavar="NAME,...", help=f"of {', '.join(RELAYS)}")
    parser.add_argument(
        *("--only", "--measurements"),
        dest="only",
        type=_listed(course.ONLY),
        default=[],
        metavar="NAME,...",
        help=f"of {', '.join(course.ONLY)}",
    )
    parser.add_argument("--repeat", type=int, metavar="N", help="repetitions (default: 2 quick, 3 full)")
    parser.add_argument(
        "--steering",
        choices=STEERINGS,
        default=STEERINGS[0],
        help="whose core does the relay's ingress work below its socket (default: %(default)s)",
    )
    parser.add_argument("--before", metavar="PROGRAM", help="another version's mcrelay, measured beside this one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="everything, for programs")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="the tables, for the documentation")
    parser.add_argument("--chart", type=Path, metavar="FILE.svg", help="loss and processor time against offered load")
    options = parser.parse_args(arguments)
    if options.repeat is not None and options.repeat < 1:
        parser.error("--repeat must be at least 1")
    return options


def too_small() -> str | None:
    import os

    if RELAY_CORE not in os.sched_getaffinity(0):
        return "the relay needs a core of its own: at least two"
    return None


class Progress:
    """Lines on standard error, with the time since the start."""

    def __init__(self) -> None:
        self.started = time.monotonic()

    def __call__(self, text: str) -> None:
        print(f"{time.monotonic() - self.started:7.1f} s  {text}", file=sys.stderr, flush=True)


def _listed(known: Any) -> Any:
    def split(text: str) -> list[str]:
        words = text.split(",")
        if unknown := [word for word in words if word not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
        return words

    return split


def _interrupt(_number: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())

"""The commands about the configuration file: check it, compare it with what runs, apply it, save to it.

Owns what they print and their exit codes. A file is applied in one transaction, which touches only what differs and is
refused if somebody changes the rules meanwhile; then it is tried again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Final

import click

from mcrelay import cli_complete, config_files, host
from mcrelay.cells import printable
from mcrelay.cli_options import json_option, socket_option
from mcrelay.cli_print import complain, count_of, print_json, print_line
from mcrelay.client import Client
from mcrelay.config import ConfigError, Configuration, Problem, read
from mcrelay.declared import Difference, difference
from mcrelay.documents import (
    AppliedFile,
    ChangedRule,
    CheckedFile,
    Comparison,
    FileComparison,
    RuleTexts,
    SavedFile,
    Waiting,
)
from mcrelay.errors import EXIT_CODES, Conflict, Error, UsageError
from mcrelay.rules import Rule
from mcrelay.ruletext import parse_rule
from mcrelay.settings import schema as make_schema

DIFFERS: Final = 1  # exit code of diff, as of diff(1)
TRIES: Final = 20  # against others who change rules

file_argument = click.argument("file", required=False, metavar="[FILE]", shell_complete=cli_complete.files)


def load(file: str, *, as_json: bool = False) -> Configuration:
    """Prints all that is wrong, if something is, and exits; what this host does not have is only remarked on. With
    `as_json` all of it is one document, also if nothing is wrong."""
    try:
        found = read(config_files.read_files(file))
    except ConfigError as error:
        if as_json:
            print_json(CheckedFile(problems=error.problems, remarks=()))
        for problem in error.problems:
            complain(str(problem))
        sys.exit(EXIT_CODES["config"])
    except config_files.FileError as error:
        if as_json:
            problem = Problem(file, None, error.message, error.hint)
            print_json(CheckedFile(problems=(problem,), remarks=()))
        raise
    remarks = _remarks(found)
    if as_json:
        print_json(CheckedFile(problems=(), remarks=remarks))
    else:
        for remark in remarks:
            complain(f"note: {remark}")
    return found


def _remarks(found: Configuration) -> tuple[Problem, ...]:
    refusals = (found.problem(paths, error) for paths, error in host.refusals(found.settings))
    return tuple(problem for problem in refusals if problem)


@click.command()
@file_argument
@json_option
def check(file: str | None, as_json: bool) -> None:
    """Check a configuration file and its conf.d/*.toml, by default /etc/mcrelay/mcrelay.toml; - is standard input.
    Needs no daemon, and tells everything that is wrong; exits with 78 if something is. A user or core that this host
    does not have is a note: the file may be for another.

    \b
    Examples: mcrelay check ./mcrelay.toml
              mcrelay import smcroute /etc/smcroute.conf | mcrelay check -
    """
    file = file or config_files.SYSTEM_FILE
    found = load(file, as_json=as_json)
    if not as_json:
        names = printable(", ".join(document.name for document in found.documents))
        print_line(f"{names}: fine, {count_of(len(found.rules), 'rule')}")


@click.command()
def schema() -> None:
    """Print the JSON Schema of the configuration file, for editors and other programs.

    \b
    Example: mcrelay schema > mcrelay.schema.json
    """
    print_json(make_schema())


@click.command()
@file_argument
@json_option
@socket_option
def diff(file: str | None, as_json: bool, path: str) -> None:
    """Compare what runs (-) with what FILE says (+), by default the daemon's own. Exits with 0 if they are the same, 1
    if they differ, be it in settings that wait for a reload or a restart.

    \b
    Example: mcrelay diff && echo all of it is in force
    """
    with Client(path) as client:
        wanted, waiting = _wanted(client, file)
        _generation, change = _difference(client, wanted)
    if as_json:
        print_json(FileComparison(**_comparison(change), **waiting))
    else:
        _print(change.lines())
        _print_waiting(waiting)
    sys.exit(DIFFERS if change or any(waiting.values()) else 0)


@click.command()
@file_argument
@click.option("--dry-run", is_flag=True, help="Only show what would change.")
@json_option
@socket_option
def apply(file: str | None, dry_run: bool, as_json: bool, path: str) -> None:
    """Have the rules that FILE says, by default the daemon's own file, and no others: in one step, or not at all. Rules
    that are the same are not touched.

    \b
    Example: mcrelay apply --dry-run /etc/mcrelay/mcrelay.toml
    """
    with Client(path) as client:
        wanted, waiting = _wanted(client, file)
        change = _difference(client, wanted)[1] if dry_run else _apply(client, wanted)
    if as_json:
        print_json(AppliedFile(**_comparison(change), **waiting, applied=not dry_run))
        return
    if dry_run:
        _print(change.lines())
    print_line(change.summary() if not dry_run else f"would be: {change.summary()}")
    _print_waiting(waiting)


@click.command()
@file_argument
@json_option
@socket_option
def save(file: str | None, as_json: bool, path: str) -> None:
    """Write the rules that run into FILE, by default the daemon's own file, so that it says what runs. Comments and all
    that is the same stay as they are; so do settings.

    \b
    Example: mcrelay add 239.1.1.1:5000%eth0 239.2.2.2:6000%eth1 && mcrelay save
    """
    from mcrelay import config_text  # what it imports takes long

    with Client(path) as client:
        own = client.status().config
        file = file or _own_file(client)
        if own is not None and config_files.is_drop_in(file, own):
            what = f"{file} belongs to {own}: with all rules in it, that would have them twice"
            raise UsageError(what, "'mcrelay save' writes each rule into the file that has it")
        running = _rules(client)[1]
    change = config_text.save(file, running)
    if as_json:
        print_json(SavedFile(**_comparison(change), file=file))
    else:
        print_line(f"{file}: {change.summary()}")


def _own_file(client: Client) -> str:
    config = client.status().config
    if config is None:
        raise UsageError("the daemon was started without a configuration file", "give the name of one")
    return config


def _wanted(client: Client, file: str | None) -> tuple[tuple[Rule, ...], Waiting]:
    """The rules of the file, and the settings of it that only a reload or a restart would bring into force."""
    status = client.status()
    found = load(file or _own_file(client))
    return found.rules, Waiting(
        reload=found.settings.changes_at_reload(status.settings),
        restart=found.settings.changes_at_start(status.settings),
    )


def _rules(client: Client) -> tuple[int, list[Rule]]:
    listing = client.listing()
    return listing.generation, [parse_rule(rule.input, rule.outputs, rule.name) for rule in listing.rules]


def _difference(client: Client, wanted: Iterable[Rule]) -> tuple[int, Difference]:
    generation, running = _rules(client)
    return generation, difference(running, wanted)


def _apply(client: Client, wanted: tuple[Rule, ...]) -> Difference:
    for _ in range(TRIES):
        generation, change = _difference(client, wanted)
        try:
            if change:
                client.change(
                    [(str(rule.input), tuple(map(str, rule.outputs)), rule.name) for rule in change.adds],
                    [rule.id for rule in change.removes],
                    expect=generation,
                )
        except Error as error:
            if error.code != Conflict.code:
                raise
        else:
            return change
    raise Conflict("others change the rules all the time", "try again")


def _comparison(change: Difference) -> Comparison:
    return Comparison(
        added=list(map(_texts, change.added)),
        removed=list(map(_texts, change.removed)),
        changed=[ChangedRule(before=_texts(before), after=_texts(after)) for before, after in change.changed],
    )


def _texts(rule: Rule) -> RuleTexts:
    return RuleTexts(name=rule.name, input=str(rule.input), outputs=list(map(str, rule.outputs)))


def _print(lines: Iterable[str]) -> None:
    """Red what goes, green what comes."""
    marks = {"-": "red", "+": "green"}
    for line in lines:
        print_line(click.style(line, fg=marks.get(line[0])))


def _print_waiting(waiting: Waiting) -> None:
    for when, keys in (("reload", waiting["reload"]), ("restart", waiting["restart"])):
        if keys:
            print_line(f"only after a {when}: {', '.join(keys)}", err=True)

"""The command line: arguments in, a request, its reply printed.

Owns what a person types and sees, and exit codes. Every reading command has --json, whose output is for programs: one
JSON document with the fields of mcrelay.messages. Errors are one line on standard error: what is wrong; what to do.
"""

from __future__ import annotations

import os
import sys
import time
from typing import NoReturn

import click

from mcrelay import (
    __version__,
    cells,
    cli_complete,
    cli_config,
    cli_diagnose,
    cli_events,
    cli_health,
    cli_import,
    cli_log,
    cli_run,
    cli_stats,
    cli_tap,
    cli_top,
    cli_traffic,
)
from mcrelay.api import Paused, RuleFacts
from mcrelay.cli_group import Commands
from mcrelay.cli_options import Whole
from mcrelay.cli_options import json_option as _json_option
from mcrelay.cli_options import socket_option as _socket_option
from mcrelay.cli_print import complain, count_of, print_json, print_line, print_table, styled_state
from mcrelay.client import Client
from mcrelay.documents import Answered, Listing, Processes, Versions
from mcrelay.errors import EXIT_CODES, Error, Unavailable
from mcrelay.messages import ProcessFacts


def main() -> NoReturn:
    """The entry point of the program."""
    if "_MCRELAY_COMPLETE" in os.environ:  # a shell asks
        from mcrelay import cli_bash

        cli_bash.take_place()
    try:
        cli.main(standalone_mode=False)
    except Error as error:
        complain(str(error))
        sys.exit(error.exit_code)
    except click.ClickException as error:
        command = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "mcrelay"
        text = error.format_message().rstrip(".")
        complain(f"{text} '{command} --help' shows all" if text.endswith("?") else f"{text}; see '{command} --help'")
        sys.exit(EXIT_CODES["usage"])
    except OSError as error:  # of printing: everything else has become an Error
        complain(f"cannot write the output: {error.strerror}")
        sys.exit(EXIT_CODES["io"])
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    sys.exit(0)


@click.group(
    cls=Commands,
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, message="mcrelay %(version)s")
def cli() -> None:
    """Relay multicast (and send it on as unicast) between networks that ordinary multicast routing cannot connect.

    \b
    mcrelay run                                                    start the daemon
    mcrelay add 239.1.1.1:5000%eth0 239.2.2.2:6000%eth1,ttl=8      from eth0 to eth1, another group and port
    mcrelay stats --watch                                          see it flow

    A command may be abbreviated where that is unambiguous: mcrelay li is mcrelay list.
    """


cli.add_command(cli_run.run)
cli.add_command(cli_config.check)
cli.add_command(cli_config.diff)
cli.add_command(cli_config.apply)
cli.add_command(cli_config.save)
cli.add_command(cli_config.schema)
cli.add_command(cli_import.import_)
cli.add_command(cli_stats.stats)
cli.add_command(cli_events.events)
cli.add_command(cli_top.top)
cli.add_command(cli_traffic.send)
cli.add_command(cli_traffic.receive)
cli.add_command(cli_diagnose.explain)
cli.add_command(cli_diagnose.doctor)
cli.add_command(cli_tap.trace)
cli.add_command(cli_tap.capture)
cli.add_command(cli_health.health)
cli.add_command(cli_log.log)


@cli.command()
@click.argument("input")
@click.argument("outputs", nargs=-1, required=True)
@click.option("--name", metavar="NAME", help="What to call the rule.")
@_json_option
@_socket_option
def add(input: str, outputs: tuple[str, ...], name: str | None, as_json: bool, path: str) -> None:
    """Relay from INPUT to each of OUTPUTS, from now on. A rule that names an interface which is not there waits for it,
    and 'mcrelay list' says so. IPv6 addresses stand in brackets: [ff05::1]:5000%eth0

    \b
    INPUT     [SOURCE@]ADDRESS[/PREFIX]:PORT%INTERFACE[,vlan=N]
      239.1.1.1:5000%eth0             one group and port
      10.1.1.9@232.1.1.1:5000%eth0    of one source (source-specific multicast)
      239.1.0.0/16:*%eth0             any group of a prefix, any port
      10.1.1.2:5000%eth0              unicast to this host; or a broadcast address
      239.1.1.1:5000%eth+             each interface whose name begins with eth
      239.1.1.1:esp%eth0              ESP (IPsec), as it is
    OUTPUTS   ADDRESS:PORT%INTERFACE[,OPTION...]
      239.2.2.2:6000%eth1,ttl=8       another group and port; 10.9.0.7:6000%eth2 is unicast
      =:=%eth1                        the packet's own destination and port
      239.2.0.0/16:=%eth1             a prefix mapped onto one of the same length
    OPTIONS
      ttl=N|keep      default: one less than it came with, never below 1
      dscp=N|NAME     default: as it came
      source=ADDRESS|keep  sport=N|keep   default: the kernel's choice; keep: the packet's
      rate=10Mbit|5000pps  at most; beyond that: dropped, as egress_limited
      loop            receivers on this host hear it, too
      paused          sends nothing until 'mcrelay resume'
    Example: mcrelay add 239.1.1.1:5000%eth0 239.2.2.2:6000%eth1,ttl=8 --name feed-a
    """
    with Client(path) as client:
        added = client.add(input, outputs, name)
        if as_json:
            print_json(added)
            return
        state = _state(added.rule) or f"active on {count_of(added.workers, 'worker')}"
        click.echo(f"{added.rule.name or added.rule.id}: {state}")
        cli_diagnose.remark_on_routes(added.rule, client)


@cli.command()
@click.argument("rule", metavar="NAME|ID", shell_complete=cli_complete.rules)
@_json_option
@_socket_option
def remove(rule: str, as_json: bool, path: str) -> None:
    """Relay by a rule no more.

    \b
    Example: mcrelay remove feed-a
    """
    with Client(path) as client:
        removed = client.remove(rule)
    if as_json:
        print_json(removed)
    else:
        click.echo(f"{removed.rule.name or removed.rule.id}: removed")


def _print_paused(paused: Paused, word: str, *, as_json: bool) -> None:
    if as_json:
        print_json(paused)
    else:
        click.echo(f"{paused.rule.name or paused.rule.id}: {word}")


@cli.command()
@click.argument("rule", metavar="NAME|ID", shell_complete=cli_complete.rules)
@click.argument("output", required=False, shell_complete=cli_complete.outputs)
@_json_option
@_socket_option
def pause(rule: str, output: str | None, as_json: bool, path: str) -> None:
    """Have a rule's OUTPUT send nothing, or all of its outputs; counters and memberships stay. OUTPUT is its
    ADDRESS:PORT%INTERFACE, or its number, counted from 1.

    \b
    Example: mcrelay pause feed-a 239.2.2.2:6000%eth1
    """
    with Client(path) as client:
        _print_paused(client.pause(rule, output), "paused", as_json=as_json)


@cli.command()
@click.argument("rule", metavar="NAME|ID", shell_complete=cli_complete.rules)
@click.argument("output", required=False, shell_complete=cli_complete.outputs)
@_json_option
@_socket_option
def resume(rule: str, output: str | None, as_json: bool, path: str) -> None:
    """Have a rule's OUTPUT send again, or all of its outputs.

    \b
    Example: mcrelay resume feed-a
    """
    with Client(path) as client:
        _print_paused(client.resume(rule, output), "resumed", as_json=as_json)


@cli.command("list")
@_json_option
@_socket_option
def list_rules(as_json: bool, path: str) -> None:
    """Show the rules.

    \b
    Example: mcrelay list --json
    """
    with Client(path) as client:
        reply = client.listing()
    if as_json:
        print_json(Listing(generation=reply.generation, rules=reply.rules, interfaces=reply.interfaces))
        return
    for rule in reply.rules:
        print_line(_rule_line(rule))
    for interface in reply.interfaces:
        if not interface.segmentation:
            click.echo(f"{cells.printable(interface.name)} takes no segments: datagrams leave it one by one", err=True)
    if not reply.rules:
        click.echo("no rules; 'mcrelay add --help' shows how to add one", err=True)


def _rule_line(rule: RuleFacts) -> str:
    outputs = " ".join(rule.outputs)
    text = cells.printable(f"{rule.id}  {rule.name or '-':<16} {rule.input} -> {outputs}")
    return f"{text}  [{styled_state(rule.state)}: {_problems(rule)}]" if rule.problems else text


def _state(rule: RuleFacts) -> str:
    """What keeps a rule from working, if anything does."""
    return f"{rule.state}: {_problems(rule)}" if rule.problems else ""


def _problems(rule: RuleFacts) -> str:
    return cells.printable("; ".join(rule.problems))


@cli.command()
@_json_option
@_socket_option
def workers(as_json: bool, path: str) -> None:
    """Show the daemon's processes: who they run as, what they may do, on which core, as the kernel says.

    \b
    Example: mcrelay workers
    """
    with Client(path) as client:
        processes = client.workers()
    if as_json:
        print_json(Processes(processes=processes))
        return
    rows = [["process", "pid", "state", "uid", "capabilities", "cores", "engine", "restarts"]]
    rows += [_process_row(process) for process in processes]
    print_table(rows, state=2)


def _process_row(process: ProcessFacts) -> list[str]:
    name = f"data/{process.index}" if process.role == "data" else process.role
    fields = [process.pid, process.state, process.uid, process.capabilities, process.cores, process.engine]
    return [name, *("-" if field is None else str(field) for field in fields), str(process.restarts)]


@cli.command("restart-worker")
@click.argument("index", type=Whole(0), metavar="N")
@_json_option
@_socket_option
def restart_worker(index: int, as_json: bool, path: str) -> None:
    """Put another process in the place of data plane worker N. Nothing is lost: it finishes what it has in hand, and
    what comes meanwhile waits for its successor.

    \b
    Example: mcrelay restart-worker 0
    """
    with Client(path) as client:
        restarted = client.restart_worker(index)
    if as_json:
        print_json(restarted)
    else:
        click.echo(f"data/{restarted.index}: replaced, its process is {restarted.pid}")


@cli.command()
@_json_option
@_socket_option
def upgrade(as_json: bool, path: str) -> None:
    """Have the program, as it is installed now, take the place of the running daemon. Nothing is lost: sockets, rules
    and counters go on. If the new one does not become ready, the old one carries on. SIGUSR2 does the same. The new one
    is another process: whoever ran the old one in the foreground sees that end.

    \b
    Example: mcrelay upgrade
    """
    with Client(path, any_version=True) as client:
        upgraded = client.upgrade()
    if as_json:
        print_json(upgraded)
    else:
        click.echo(f"upgraded: the daemon is process {upgraded.pid} now")


@cli.command()
@_json_option
@_socket_option
def ping(as_json: bool, path: str) -> None:
    """Ask whether the daemon answers.

    \b
    Example: mcrelay ping
    """
    started = time.monotonic()
    with Client(path) as client:
        client.ping()
    took_ms = (time.monotonic() - started) * 1000
    if as_json:
        print_json(Answered(socket=path, took_ms=round(took_ms, 3)))
    else:
        click.echo(f"the daemon at {path} answers ({took_ms:.1f} ms)")


@cli.command()
@_json_option
@_socket_option
def version(as_json: bool, path: str) -> None:
    """Show the version of this program and of the running daemon; exits with 69 if there is none.

    \b
    Example: mcrelay version
    """
    try:
        with Client(path, any_version=True) as client:
            reply = client.version()
    except Unavailable:
        if as_json:
            print_json(Versions(client=__version__, daemon=None, protocol=None))
        else:
            click.echo(f"mcrelay {__version__}")
        raise
    if as_json:
        print_json(Versions(client=__version__, daemon=reply.version, protocol=reply.protocol))
    else:
        click.echo(f"mcrelay {__version__}; the daemon is {reply.version}, protocol {reply.protocol}")

"""mcrelay run: what the daemon is started with.

Owns the options, and which of them and of the configuration file's settings counts. service.py does the rest.
"""

from __future__ import annotations

import os
from collections.abc import Container
from typing import Any, Final

import click
import msgspec

from mcrelay import cli_complete, cli_log, host
from mcrelay.cli_options import WHOLE, Whole
from mcrelay.config import Configuration
from mcrelay.cores import check_worker
from mcrelay.endpoint import parse_endpoint
from mcrelay.errors import Error
from mcrelay.limits import (
    LATENCY_BUDGET_US_DEFAULT,
    LATENCY_BUDGET_US_MAX,
    RING_MEMORY_DEFAULT,
    RULES_MAX,
)
from mcrelay.messages import LogSettings
from mcrelay.options import Options
from mcrelay.places import SYSTEM_SOCKET, VARIABLE, user_socket
from mcrelay.process import identity
from mcrelay.rootless import check_cores, no_ring
from mcrelay.settings import METRICS_RULES_DEFAULT, RING_MIB_MAX, DaemonSection, LogFormat

# Options by the names that the file has for them; those that are not given have no value.
SWITCHES: Final = ("rootless", "busy_poll")


@click.command()
@click.option(
    "--config",
    metavar="FILE",
    help="Settings and rules; /etc/mcrelay/mcrelay.toml is where a service has it.",
    shell_complete=cli_complete.files,
)
@click.option(
    "--socket",
    envvar=VARIABLE,
    show_default=f"{SYSTEM_SOCKET}, rootless in $XDG_RUNTIME_DIR/mcrelay or /tmp/mcrelay-UID",
    metavar="PATH",
    shell_complete=cli_complete.files,
    help="The daemon's socket.",
)
@click.option(
    "--rootless",
    is_flag=True,
    help="Use no privilege: ordinary UDP sockets, which get only what this host's kernel accepts.",
)
@click.option("--workers", type=WHOLE, metavar="N", help="Data plane workers, one per core [default: all cores].")
@click.option("--cores", metavar="LIST", help="The cores for them, for example 0,2-3.")
@click.option("--user", metavar="NAME", help="Who workers run as [default: mcrelay if it exists, else nobody].")
@click.option(
    "--engine",
    type=click.Choice(["auto", "uring", "reference"]),
    show_default="auto",
    help="What moves the packets; auto is uring, or reference with a warning where uring cannot run.",
)
@click.option(
    "--ingress",
    type=click.Choice(["ring", "recv"]),
    show_default="ring",
    help="How packets come in: from a ring shared with the kernel, or by io_uring receives.",
)
@click.option(
    "--ring-mib",
    type=Whole(1, RING_MIB_MAX),
    show_default=str(RING_MEMORY_DEFAULT // 2**20),
    metavar="N",
    help="MiB of kernel memory for each ring: one per worker and ingress interface.",
)
@click.option(
    "--latency-budget-us",
    type=Whole(0, LATENCY_BUDGET_US_MAX),
    show_default=str(LATENCY_BUDGET_US_DEFAULT),
    metavar="N",
    help="How long a packet may wait for others at high rates, which then cost less together; 0: none waits.",
)
@click.option("--busy-poll", is_flag=True, help="Never sleep: a whole core per worker for the lowest latency.")
@click.option(
    "--metrics",
    metavar="ADDRESS:PORT",
    help="Serve /metrics (Prometheus) and /health there, by HTTP, to whoever can connect.",
)
@click.option(
    "--metrics-rules",
    type=Whole(0, RULES_MAX),
    show_default=str(METRICS_RULES_DEFAULT),
    metavar="N",
    help="Rules that have metrics of their own; those of the others are summed up.",
)
@click.option(
    "--no-restore",
    is_flag=True,
    help="Start without the rules that the last daemon on this socket had; they are kept in SOCKET.state.old.",
)
@cli_log.log_options
def run(
    config: str | None,
    no_restore: bool,
    log_levels: tuple[str, ...],
    log_format: LogFormat | None,
    debug: bool,
    **given: Any,
) -> None:
    """Run the daemon in the foreground, until SIGTERM or Ctrl-C. Needs root, or CAP_NET_RAW and CAP_NET_ADMIN.

    With --config it has the rules of that file, and of conf.d/*.toml beside it, and no others; SIGHUP reads them again.
    An option that is given here counts more than the file's setting of that name.

    With --rootless it needs nothing and can do less: one worker; inputs of one address and port from 1024 on; no
    packets whose source this host has no route back to, where net.ipv4.conf.*.rp_filter is set; none that the firewall
    drops; no outputs that keep a source or set its port. docs/rootless.md has the whole of it.

    \b
    Examples: sudo mcrelay run --cores 2-3
              sudo mcrelay run --config /etc/mcrelay/mcrelay.toml
              sudo mcrelay run --metrics 127.0.0.1:9478
              mcrelay run --rootless
    """
    from mcrelay import config_files, handover, service

    alone = given["workers"] is None and given["cores"] is None

    def options() -> Options:  # what the files hold is not needed for as long as the daemon lives
        loaded = Configuration() if config is None else config_files.load(config, alone=alone)
        logs = cli_log.log_settings(loaded.settings.log, log_levels, log_format, debug=debug)
        return make_options(loaded, config, given, logs, restore=False if no_restore else None)

    try:
        chosen = options()
    except Error as error:
        handover.refuse(error)
        raise
    service.run(chosen)


def make_options(
    loaded: Configuration, config: str | None, given: dict[str, Any], logs: LogSettings, *, restore: bool | None
) -> Options:
    """`given` are the command line's, by the names of the file's settings; those that are not given are None or, of
    switches, False. UsageError if they, or they and the file, do not go together or with this machine; ConfigError
    where that is the file's."""
    settings = loaded.settings
    chosen = {
        key: value for key, value in given.items() if value is not None and not (key in SWITCHES and value is False)
    }
    listen = chosen.pop("metrics", settings.metrics.listen)
    metrics_rules = chosen.pop("metrics_rules", settings.metrics.rules_max)
    if {"workers", "cores"} & chosen.keys():  # either says what the other would
        chosen = {"workers": None, "cores": None, **chosen}
    daemon = msgspec.structs.replace(settings.daemon, **chosen)
    if restore is not None:
        daemon = msgspec.structs.replace(daemon, restore=restore)
    of_cores = [] if "cores" in chosen else host.CORES  # else the command line says how many there are
    with loaded.answers_for(*of_cores):
        if daemon.rootless:
            check_cores(daemon.workers, daemon.cores)
        cores = host.cores_of(daemon, *(_said(key, chosen)[0] for key in ("workers", "cores")))
    for number in settings.worker:
        with loaded.answers_for(("worker", number)):
            check_worker(number, len(cores))
    if daemon.rootless and (daemon.ring_mib != DaemonSection().ring_mib or "ring_mib" in chosen):
        what, paths = _said("ring_mib", chosen)
        with loaded.answers_for(*paths):
            raise no_ring(what)
    if daemon.rootless or os.geteuid() == 0:  # else the want of privilege comes first
        what, paths = _said("user", chosen)
        with loaded.answers_for(*paths):
            identity(daemon.user, what, own=daemon.rootless)
    return Options(
        socket=daemon.socket if daemon.socket is not None else user_socket() if daemon.rootless else SYSTEM_SOCKET,
        cores=cores,
        user=daemon.user,
        engine=daemon.engine,
        ingress=daemon.ingress,
        ring_memory=daemon.ring_mib * 2**20,
        latency_budget_us=daemon.latency_budget_us,
        busy_poll=daemon.busy_poll,
        logs=logs,
        restore=daemon.restore,
        rootless=daemon.rootless,
        metrics=None if listen is None else parse_endpoint(listen),
        metrics_rules=metrics_rules,
        config=None if config is None else os.path.abspath(config),
        settings=settings,
        chosen=chosen,
    )


def _said(key: str, chosen: Container[str]) -> tuple[str, list[tuple[str, str]]]:
    """What a setting of the daemon is called where it was said, and where that is in the file if it is there."""
    return (f"--{key.replace('_', '-')}", []) if key in chosen else (f"daemon.{key}", [("daemon", key)])

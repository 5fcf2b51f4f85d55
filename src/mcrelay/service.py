"""mcrelay run: from options to a running supervisor.

Checks what can be checked before anything is opened, and runs the supervisor's event loop.
"""

from __future__ import annotations

import asyncio
import dataclasses
import faulthandler
import logging
import signal
import sys

import msgspec

from mcrelay import logs, places, process, store
from mcrelay import rootless as mode
from mcrelay.errors import Error
from mcrelay.handover import Predecessor
from mcrelay.levels import changed
from mcrelay.messages import Levels
from mcrelay.net import plain
from mcrelay.options import Options
from mcrelay.settings import LogSection
from mcrelay.supervisor import Supervisor
from mcrelay.worker import watch_loop

log = logging.getLogger(__name__)


def run(options: Options) -> None:
    """Until the daemon is told to stop. Error if it cannot work here, where the log is for people."""
    process.open_standard_streams()
    log_settings = msgspec.structs.replace(options.logs, format=logs.resolved(options.logs.format))
    options = dataclasses.replace(options, logs=log_settings)
    process.name_process("mcrelay")  # also where Python was started with it, as a successor is
    logs.begin("supervisor", log_settings.format, log_settings.levels)
    for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):  # before there is anything to do for them
        signal.signal(number, signal.SIG_IGN)
    try:
        if options.rootless:
            _begin_rootless(options.socket)
        else:
            process.check_privileges()
        process.raise_descriptor_limit()
        asyncio.run(_supervise(options))
    except Error as error:
        if log_settings.format == "text":
            raise
        log.critical("cannot run: %s", error, extra={"code": error.code})
        sys.exit(error.exit_code)


def _begin_rootless(socket: str) -> None:
    """Say what is not to be had, and make the socket's directory if it is the one that clients look into."""
    if socket == places.user_socket():
        places.make_user_directory(socket)
    log.info("%s", mode.REMARK)
    if remark := mode.buffer_remark(plain.RECEIVE_BUFFER, plain.receive_buffer_max()):
        log.warning("rootless buffers: %s", remark)


async def _supervise(options: Options) -> None:
    watch_loop(debug=options.logs.watch)
    if options.logs.watch:
        faulthandler.enable()  # SIGABRT shows where it is; workers may not
    descriptor = process.predecessor_fd()
    predecessor = Predecessor(descriptor) if descriptor is not None else None
    try:
        workers = len(options.cores)
        heritage = (
            await predecessor.inherit(workers, rootless=options.rootless)
            if predecessor
            else store.take(options.socket, workers, wanted=options.restore, rootless=options.rootless)
        )
        if predecessor and heritage and heritage.first.levels and not _has_other_levels(options, heritage.first.log):
            options = _with_levels(options, heritage.first.levels)
        supervisor = Supervisor(options, predecessor, heritage)
        process.keep_needed_capabilities(none=options.rootless)  # the socket is there, wherever its user wanted it
        await supervisor.run()
    except Error as error:
        if predecessor:
            predecessor.refuse(error)
        raise
    finally:
        logs.end()  # the error that ends it comes last


def _has_other_levels(options: Options, before: LogSection | None) -> bool:
    """The file says otherwise than it did when it was read last."""
    now = options.settings.log
    return before is not None and (before.level, before.levels) != (now.level, now.levels)


def _with_levels(options: Options, inherited: Levels) -> Options:
    """Log on from the levels of the daemon whose place this one takes: somebody may have changed them."""
    levels = changed(Levels(), inherited.level, inherited.components)
    logs.set_levels(levels)
    return dataclasses.replace(options, logs=msgspec.structs.replace(options.logs, levels=levels))

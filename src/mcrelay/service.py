"""mcrelay run: from options to a running supervisor.

Checks what can be checked before anything is opened, and runs the supervisor's event loop.
"""

from __future__ import annotations

import asyncio
import signal
from typing import Literal, cast

from mcrelay import process, store
from mcrelay.errors import Error
from mcrelay.handover import Predecessor
from mcrelay.supervisor import Options, Supervisor
from mcrelay.worker import configure_logging, watch_loop

IngressName = Literal["ring", "recv"]
EngineName = Literal["auto", "uring", "reference"]


def run(
    *,
    socket: str,
    cores: tuple[int, ...],
    user: str | None,
    engine: str,
    ingress: str,
    ring_memory: int,
    latency_budget_us: int,
    busy_poll: bool,
    debug: bool,
    restore: bool,
) -> None:
    """Until the daemon is told to stop. Error if it cannot work here."""
    configure_logging("mcrelay", debug=debug)
    for number in (signal.SIGUSR1, signal.SIGUSR2):  # before there is anything to do for them
        signal.signal(number, signal.SIG_IGN)
    process.check_privileges()
    process.raise_descriptor_limit()
    # click has checked the names.
    options = Options(
        socket=socket,
        cores=cores,
        user=user,
        engine=cast(EngineName, engine),
        ingress=cast(IngressName, ingress),
        ring_memory=ring_memory,
        latency_budget_us=latency_budget_us,
        busy_poll=busy_poll,
        debug=debug,
        restore=restore,
    )
    asyncio.run(_supervise(options))


async def _supervise(options: Options) -> None:
    watch_loop(debug=options.debug)
    descriptor = process.predecessor_fd()
    predecessor = Predecessor(descriptor) if descriptor is not None else None
    try:
        workers = len(options.cores)
        heritage = (
            await predecessor.inherit(workers)
            if predecessor
            else store.take(options.socket, workers, wanted=options.restore)
        )
        supervisor = Supervisor(options, predecessor, heritage)
        process.keep_needed_capabilities()  # the socket is there, wherever its user wanted it
        await supervisor.run()
    except Error as error:
        if predecessor:
            predecessor.refuse(error)
        raise

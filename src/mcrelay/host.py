"""This host: the user and the cores that settings name, which it may not have.

A file may be meant for another host, so reading it finds nothing of this; `mcrelay run` refuses it, and whoever else
reads the file says it. Knows which settings these are, and no file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Final

from mcrelay.cores import check_worker, choose_cores
from mcrelay.errors import UsageError
from mcrelay.process import find_user, identity
from mcrelay.settings import DaemonSection, Settings

CORES: Final = (("daemon", "workers"), ("daemon", "cores"))  # settings that say on which cores workers are
USER: Final = (("daemon", "user"),)


def cores_of(
    daemon: DaemonSection, of_workers: str = "daemon.workers", of_cores: str = "daemon.cores"
) -> tuple[int, ...]:
    """Those that workers run on, one each. UsageError, about where either is said, if they are not there for us."""
    workers = 1 if daemon.rootless and daemon.cores is None else daemon.workers
    available = sorted(os.sched_getaffinity(0))
    return choose_cores(available, workers, daemon.cores, of_workers=of_workers, of_cores=of_cores)


def refusals(settings: Settings) -> Iterator[tuple[Sequence[tuple[str, ...]], UsageError]]:
    """What of a file without problems `mcrelay run` would refuse here: at which settings, and why."""
    daemon = settings.daemon
    try:
        cores = cores_of(daemon)
    except UsageError as error:
        yield CORES, error
    else:
        for number in settings.worker:
            try:
                check_worker(number, len(cores))
            except UsageError as error:
                yield [("worker", number)], error
    if daemon.user is not None:
        try:
            if daemon.rootless:  # they run as whoever starts it
                identity(daemon.user, "daemon.user", own=True)
            else:
                find_user(daemon.user, "daemon.user")
        except UsageError as error:
            yield USER, error

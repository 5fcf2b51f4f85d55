"""A new daemon that cannot take the old one's place, in whatever way it fails: the old one carries on.

sender: eth0 -- in0 :relay: out0 -- eth0 :receiver
                           out1 -- eth0 :receiver1
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Final

import pytest

from lab.topology import RelayLine
from lab.traffic import ReceivePlan, SendPlan, start_receiver, start_sender
from mcrelay import process

from .conftest import StartDaemon

INPUT: Final = "239.1.1.1:5000"
OUTPUT: Final = "239.2.2.2:6000"
SILENT: Final = "import asyncio, mcrelay.handover as h; h.Predecessor.took_over = lambda self: asyncio.sleep(0)"
STRANGE: Final = "from mcrelay.codec import PERMITTED; PERMITTED['handover_sock', 'supervisor', 'successor'] = ()"
WORKERLESS: Final = (
    "import mcrelay.children as c, mcrelay.supervisor as s; c.MODULES['data'] = 'mcrelay.nothing'; s.READY_S = 0.5"
)
BROKEN: Final = {
    "does not start": "os._exit(1)",
    "stops half-way": "os.kill(os.getpid(), 19)",
    "cannot read what it gets": STRANGE,
    "has another number of workers": "os.sched_setaffinity(0, {0})",
    "has no workers": WORKERLESS,
    "forwards and does not say so": SILENT,
}
WHY: Final = {
    "does not start": "ended before it was ready",
    "stops half-way": "did not become ready within",
    "cannot read what it gets": "cannot read what the old daemon gives",
    "has another number of workers": "data plane workers",
    "has no workers": "did not start within",
    "forwards and does not say so": "does not take over within",
}


@pytest.mark.parametrize("how", BROKEN)
def test_the_old_daemon_carries_on_if_the_new_one_fails(
    start: StartDaemon, line: RelayLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """The new program finds a sitecustomize that breaks it."""
    if how == "has another number of workers" and len(os.sched_getaffinity(0)) < 2:
        pytest.skip("there is one core")
    code = f"import os\nif {process.SUCCESSOR!r} in os.environ:\n    {BROKEN[how]}\n"
    (tmp_path / "sitecustomize.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    # Who has to come to a certain point before it fails has time for that.
    prepare_s = 4.0 if how == "stops half-way" else 20.0
    daemon = start(program=(sys.executable, "-c", IMPATIENT.format(prepare_s=prepare_s)))
    daemon.run("add", f"{INPUT}%in0", f"{OUTPUT}%out0", "--name", "feed")
    pids = daemon.pids()
    receiver = start_receiver(line.receiver, ReceivePlan(OUTPUT, interface="eth0", idle_timeout_s=3))
    sender = start_sender(line.sender, SendPlan(INPUT, interface="eth0", rate=2000, duration_s=60))
    done = daemon.run("upgrade", check=False)
    assert done.returncode != 0
    assert WHY[how] in done.stderr
    assert "no upgrade" in daemon.log
    assert daemon.pids().items() >= {name: pid for name, pid in pids.items() if name != "spare"}.items()
    sent = sender.stop().sent
    assert (receiver.result().received, daemon.process.poll()) == (sent, None)
    daemon.run("remove", "feed")  # changes go on, too


# Does not wait for as long.
IMPATIENT: Final = (
    "import sys; from mcrelay import cli, handover as h; h.PREPARE_S = {prepare_s}; h.TAKE_OVER_S = 1.0; "
    "sys.argv[0] = 'mcrelay'; cli.main()"
)

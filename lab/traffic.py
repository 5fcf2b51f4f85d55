"""Sequence-numbered UDP traffic in namespaces: `mcrelay send` and `mcrelay receive` as processes, and their reports.

receiver = start_receiver(b, ReceivePlan("239.1.1.1:5000", interface="eth0", count=1000))
run_sender(a, SendPlan("239.1.1.1:5000", interface="eth0", rate=10_000, count=1000))
assert receiver.result().clean
"""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import threading
from typing import Any, Final, Generic, TypeVar

from lab.namespaces import Namespace
from lab.plan import Plan, ReceivePlan, SendPlan, arguments
from lab.program import PROGRAM
from mcrelay.traffic import ReceiveReport, SendReport

__all__ = [
    "ReceivePlan",
    "ReceiveReport",
    "ReceiverProcess",
    "SendPlan",
    "SendReport",
    "SenderProcess",
    "run_sender",
    "start_receiver",
    "start_sender",
]

START_DEADLINE_S: Final = 30.0

R = TypeVar("R", SendReport, ReceiveReport)


class TrafficProcess(Generic[R]):
    """A sender or receiver running in a namespace, ready on return. The Lab ends it at the latest."""

    def __init__(self, namespace: Namespace, plan: Plan, report_type: type[R]) -> None:
        self.plan = plan
        self._report_type: type[R] = report_type
        self._events: queue.Queue[dict[str, Any]] = queue.Queue()
        self._last_progress: dict[str, Any] = {}
        self._said: list[str] = []  # whatever is not an event: a warning, a traceback
        self.process: subprocess.Popen[str] = namespace.popen(
            *(PROGRAM, *arguments(plan), "--json"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        # A thread keeps the pipe empty whether or not anybody asks for progress.
        threading.Thread(target=self._read, name=f"traffic-{self.process.pid}", daemon=True).start()
        self._next_event("ready", START_DEADLINE_S)

    def __str__(self) -> str:
        return " ".join(arguments(self.plan))

    def _read(self) -> None:
        assert self.process.stdout is not None
        # ValueError: the Lab was left meanwhile and has closed the pipe.
        with contextlib.suppress(ValueError), self.process.stdout as lines:
            for line in lines:
                if not line.startswith("{"):
                    self._said.append(line)
                    continue
                event = json.loads(line)
                if event["event"] == "progress":
                    self._last_progress = event
                else:
                    self._events.put(event)
        self._events.put({"event": "end"})

    def _next_event(self, kind: str, deadline_s: float) -> dict[str, Any]:
        try:
            event = self._events.get(timeout=deadline_s)
        except queue.Empty:
            raise TimeoutError(f"no {kind} from `{self}` within {deadline_s:g} s") from None
        if event.pop("event") != kind:
            self.process.wait(START_DEADLINE_S)
            said = "".join(self._said).strip()
            raise RuntimeError(f"`{self}` ended with {self.process.returncode} before {kind}: {said}")
        return event

    @property
    def progress(self) -> dict[str, Any]:
        """The last progress line, empty before the first; needs `progress=True` in the plan."""
        return self._last_progress

    def result(self, deadline_s: float = 60.0) -> R:
        """Wait for the end and return the report; may be asked for once."""
        report: R = self._report_type(**self._next_event("report", deadline_s))
        self.process.wait(START_DEADLINE_S)
        return report

    def stop(self, deadline_s: float = 10.0) -> R:
        """End it now and return the report so far."""
        if self.process.poll() is None:
            self.process.terminate()
        return self.result(deadline_s)


class ReceiverProcess(TrafficProcess[ReceiveReport]):
    def __init__(self, namespace: Namespace, plan: ReceivePlan) -> None:
        super().__init__(namespace, plan, ReceiveReport)


class SenderProcess(TrafficProcess[SendReport]):
    def __init__(self, namespace: Namespace, plan: SendPlan) -> None:
        super().__init__(namespace, plan, SendReport)


def start_receiver(namespace: Namespace, plan: ReceivePlan) -> ReceiverProcess:
    """Start a receiver; on return its sockets are bound and joined, nothing sent from now on is missed."""
    return ReceiverProcess(namespace, plan)


def start_sender(namespace: Namespace, plan: SendPlan) -> SenderProcess:
    return SenderProcess(namespace, plan)


def run_sender(namespace: Namespace, plan: SendPlan, deadline_s: float = 60.0) -> SendReport:
    """Send and wait until it is done."""
    return start_sender(namespace, plan).result(deadline_s)

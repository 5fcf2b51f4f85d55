"""Sequence-numbered UDP traffic: a paced sender and an accounting receiver, both also as processes.

    python -m lab.traffic send 239.1.1.1:5000 --interface eth0 --rate 100000 --count 1000000 --size 1000
    python -m lab.traffic receive 239.1.1.1:5000 --interface eth0 --count 1000000

Both print JSON lines: `ready` once the sockets are open (the receiver's are then bound and joined),
`progress` on request, and `report` at the end, also when ended by SIGINT or SIGTERM. `send` and `receive`
do the same in the calling thread; `start_sender`, `run_sender` and `start_receiver` run the program in a
namespace and give the reports back.

What keeps a Python loop at several 100,000 datagrams/s: connected sockets, buffers prepared with their
padding so that a send only stamps 20 bytes, one blocking system call per datagram, clocks and flags looked
at once per burst.

Kernel facts relied on:

- `settimeout` makes Python poll(2) before each receive. SO_RCVTIMEO on a blocking socket gives the same
  deadline within the one system call.
- A multicast socket receives what *any* socket of the host joined, unless IP_MULTICAST_ALL is off.
- igmp_max_memberships (20) is per socket: one socket per flow stays below it for any number of groups.
- A refused unicast datagram is reported on the *next* send, which then is not done.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import queue
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from lab.plan import Plan, ReceivePlan, SendPlan, Target, arguments, plan_from
from lab.sequence import HEADER, MAGIC, SHIFTS, SIZE_MIN, STAMP, STAMP_OFFSET, Account, ReceiveReport, padding

if TYPE_CHECKING:
    from lab.namespaces import Namespace

__all__ = [
    "ReceivePlan",
    "ReceiveReport",
    "ReceiverProcess",
    "SendPlan",
    "SendReport",
    "SenderProcess",
    "receive",
    "run_sender",
    "send",
    "start_receiver",
    "start_sender",
]

# Not in the socket module of Python 3.11: <linux/in.h>, <linux/in6.h>, <asm-generic/socket.h>.
IP_MULTICAST_ALL = 49
IPV6_MULTICAST_ALL = 29
SO_RCVBUFFORCE = 33
SO_MEMINFO = 55
SK_MEMINFO_DROPS = 8  # index into the 32-bit words of SO_MEMINFO

RECEIVE_BUFFER_SIZE = 64 << 20  # doubled by the kernel: 0.5 s at 100,000 datagrams/s of 1000 bytes
STOP_INTERVAL_S = 0.05  # how late a stop, an idle timeout or a deadline may be noticed
STOP_INTERVAL_NS = int(STOP_INTERVAL_S * 1e9)
QUEUED_MAX = 200_000  # more datagrams than the receive buffer holds
QUEUED_DEADLINE_NS = 1_000_000_000
BATCH_MAX = 64  # receives between two looks at the clock; small, so that no flow waits long for another
BURST_MAX = 4096  # sends between two looks at the clock, however high the rate
CATCH_UP_MAX_S = 0.02  # what a delayed sender makes up for; more would measure the burst, not the rate
SEND_ATTEMPTS_MAX = 1000
PROGRESS_INTERVAL_S = 0.5
START_DEADLINE_S = 10.0
SOURCE_DIRECTORY = Path(__file__).resolve().parent.parent

Stop = Callable[[], bool]
Emit = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class SendReport:
    sent: int
    seconds: float
    rate: float
    retried: int  # sends repeated after ENOBUFS or the refusal of an earlier one; all are in `sent`


def _never() -> bool:
    return False


def _silent(_event: dict[str, Any]) -> None:
    pass


# --- sending ---


def send(plan: SendPlan, *, stop: Stop = _never, emit: Emit = _silent) -> SendReport:
    """Send according to `plan` from the calling thread's namespace."""
    sockets: list[socket.socket] = []
    try:
        for target in plan.targets:
            sockets.append(_sending_socket(target, plan))
        emit({"event": "ready", "target": plan.target, "flows": plan.flows})
        return _send_paced(plan, sockets, stop, emit)
    finally:
        for opened in sockets:
            opened.close()


def _sending_socket(target: Target, plan: SendPlan) -> socket.socket:
    opened = socket.socket(target.family, socket.SOCK_DGRAM)
    try:
        ipv6 = target.family == socket.AF_INET6
        index = socket.if_nametoindex(plan.interface) if plan.interface else 0
        if target.address.is_multicast and ipv6:
            opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, index)
            opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, plan.ttl)
            opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_LOOP, 0)
        elif target.address.is_multicast:
            local = socket.inet_aton(plan.interface_address or "0.0.0.0")
            request = struct.pack("=4s4si", bytes(4), local, index)  # struct ip_mreqn
            opened.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, request)
            opened.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, plan.ttl)
            opened.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 0)
        else:
            if plan.interface:
                opened.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, plan.interface.encode())
            if ipv6:
                opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, plan.ttl)
            else:
                opened.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, plan.ttl)
        if plan.interface_address:
            opened.bind((plan.interface_address, 0))
        opened.connect(target.socket_address)
    except BaseException:
        opened.close()
        raise
    return opened


def _send_paced(plan: SendPlan, sockets: list[socket.socket], stop: Stop, emit: Emit) -> SendReport:
    # One buffer for each shift of the padding, shared by all flows: send copies before it returns.
    buffers = [bytearray(plan.size) for _ in range(SHIFTS)]
    for shift, buffer in enumerate(buffers):
        HEADER.pack_into(buffer, 0, MAGIC, 0, 0, 0)
        buffer[SIZE_MIN:] = padding(shift, plan.size)

    clock, stamp, flow_id, flows = time.monotonic_ns, STAMP.pack_into, plan.flow_id, plan.flows
    sends = [opened.send for opened in sockets]
    total = plan.count if plan.count is not None else sys.maxsize
    interval_ns = 1e9 / plan.rate if plan.rate else 0.0
    burst_max = min(max(1, int(plan.rate * CATCH_UP_MAX_S)), BURST_MAX) if plan.rate else BURST_MAX
    burst_interval_ns = int(plan.burst_interval_s * 1e9)

    index = retried = 0
    start = progress_at = clock()
    end = start + int(plan.duration_s * 1e9) if plan.duration_s is not None else sys.maxsize
    origin = float(start)  # when datagram 0 would have been due; moves when the sender fell too far behind
    while index < total and not stop():
        now = clock()
        if now >= end:
            break
        if plan.progress and now >= progress_at:
            emit({"event": "progress", "sent": index})
            progress_at = now + int(PROGRESS_INTERVAL_S * 1e9)
        if plan.rate:
            due = int((now - origin) / interval_ns) + 1 - index
            if due > burst_max:
                origin += (due - burst_max) * interval_ns
                due = burst_max
        else:
            due = burst_max
        for position in range(index, min(index + due, total)):
            sequence, flow = divmod(position, flows)
            identity = flow_id + flow
            buffer = buffers[(identity + sequence) % SHIFTS]
            stamp(buffer, STAMP_OFFSET, identity, sequence, clock())
            try:
                sends[flow](buffer)
            except OSError as error:
                retried += _send_again(sends[flow], buffer, error)
        index = min(index + max(due, 0), total)
        if plan.rate and index < total:
            wake = min(max(origin + index * interval_ns, now + burst_interval_ns), end)
            pause_s = (wake - clock()) / 1e9
            if pause_s > 0:
                time.sleep(min(pause_s, STOP_INTERVAL_S))
    seconds = (clock() - start) / 1e9
    return SendReport(
        sent=index,
        seconds=round(seconds, 6),
        rate=round(index / seconds, 1) if seconds else 0.0,
        retried=retried,
    )


def _send_again(send_buffer: Callable[[bytearray], int], buffer: bytearray, error: OSError) -> int:
    """Repeat a failed send until it succeeds; the number of repetitions."""
    for attempt in range(1, SEND_ATTEMPTS_MAX + 1):
        if error.errno == errno.ENOBUFS:
            time.sleep(0.0002)  # the queue of the interface is full and drains on its own
        elif error.errno != errno.ECONNREFUSED:
            raise error
        try:
            send_buffer(buffer)
        except OSError as again:
            error = again
        else:
            return attempt
    raise error


# --- receiving ---


def receive(plan: ReceivePlan, *, stop: Stop = _never, emit: Emit = _silent) -> ReceiveReport:
    """Receive according to `plan` in the calling thread's namespace; `ready` means nothing can be missed."""
    sockets: list[socket.socket] = []
    try:
        for target in plan.targets:
            sockets.append(_receiving_socket(target, plan.interface))
        size = sockets[0].getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
        emit({"event": "ready", "target": plan.target, "flows": plan.flows, "receive_buffer": size})
        account = Account()
        ended = _receive_until_done(plan, sockets, account, stop, emit)
        expected = plan.expect if plan.expect is not None else plan.count
        overrun = sum(_dropped(opened) for opened in sockets)
        return account.report(expected=expected, overrun=overrun, ended=ended)
    finally:
        for opened in sockets:
            opened.close()


def _receiving_socket(target: Target, interface: str | None) -> socket.socket:
    opened = socket.socket(target.family, socket.SOCK_DGRAM)
    try:
        try:
            opened.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER_SIZE)
        except PermissionError:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_SIZE)
        index = socket.if_nametoindex(interface) if interface else 0
        if target.address.is_multicast:
            # Several receivers of one group may share a namespace; each gets its copy.
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        elif interface:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode())
        # Binding to the group itself keeps other groups on the same port out.
        if target.family == socket.AF_INET:
            opened.bind(target.socket_address)
        else:
            opened.bind((*target.socket_address, 0, index if target.address.is_link_local else 0))
        if target.address.is_multicast and target.family == socket.AF_INET:
            opened.setsockopt(socket.IPPROTO_IP, IP_MULTICAST_ALL, 0)
            request = struct.pack("=4s4si", target.address.packed, bytes(4), index)  # struct ip_mreqn
            opened.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, request)
        elif target.address.is_multicast:
            opened.setsockopt(socket.IPPROTO_IPV6, IPV6_MULTICAST_ALL, 0)
            request = struct.pack("=16si", target.address.packed, index)  # struct ipv6_mreq
            opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, request)
    except BaseException:
        opened.close()
        raise
    return opened


def _dropped(opened: socket.socket) -> int:
    words = opened.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, 64)
    return int(struct.unpack_from("=I", words, 4 * SK_MEMINFO_DROPS)[0])


def _receive_until_done(
    plan: ReceivePlan, sockets: list[socket.socket], account: Account, stop: Stop, emit: Emit
) -> str:
    clock = time.monotonic_ns
    buffer = bytearray(1 << 16)
    epoll = None
    if len(sockets) == 1:
        timeout = struct.pack("@ll", 0, int(STOP_INTERVAL_S * 1e6))  # struct timeval
        sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)
    else:
        epoll = select.epoll()
    try:
        by_descriptor = {opened.fileno(): opened for opened in sockets}
        if epoll is not None:
            for opened in sockets:
                opened.setblocking(False)
                epoll.register(opened, select.EPOLLIN)
        start = progress_at = clock()
        deadline, reason = start + int(plan.deadline_s * 1e9), "deadline"
        idle_ns = int(plan.idle_timeout_s * 1e9)
        counted = False
        while True:
            wanted = BATCH_MAX
            if plan.count is not None and not counted:
                # Never ask for more than is missing, or the last batch would wait for what will not come.
                wanted = min(BATCH_MAX, plan.count - account.received)
                if wanted <= 0:
                    counted, reason, wanted = True, "count", BATCH_MAX
                    deadline = min(deadline, clock() + int(plan.linger_s * 1e9))
            now = clock()
            if now >= deadline:
                return reason
            if stop():
                # What has already arrived belongs into the account, however far behind this loop is.
                for opened in sockets:
                    opened.setblocking(False)
                    _drain(opened, buffer, account, QUEUED_MAX, clock() + QUEUED_DEADLINE_NS)
                return "stopped"
            if account.first_ns is not None and not counted and now - account.last_ns >= idle_ns:
                return "idle"
            if plan.progress and now >= progress_at:
                emit({"event": "progress", "received": account.received, "duplicated": account.duplicated})
                progress_at = now + int(PROGRESS_INTERVAL_S * 1e9)
            if epoll is None:
                _drain(sockets[0], buffer, account, wanted, now + STOP_INTERVAL_NS)
            else:
                for descriptor, _events in epoll.poll(STOP_INTERVAL_S):
                    _drain(by_descriptor[descriptor], buffer, account, wanted, now + STOP_INTERVAL_NS)
    finally:
        if epoll is not None:
            epoll.close()


def _drain(opened: socket.socket, buffer: bytearray, account: Account, wanted: int, until_ns: int) -> None:
    """Account for up to `wanted` datagrams, until some time or until the socket's own timeout passes."""
    receive_into, record, clock = opened.recv_into, account.record, time.monotonic_ns
    with contextlib.suppress(BlockingIOError):
        for _ in range(wanted):
            length = receive_into(buffer)
            now = clock()
            record(buffer, length, now)
            if now >= until_ns:
                break


# --- in processes of their own ---

R = TypeVar("R", SendReport, ReceiveReport)


class TrafficProcess(Generic[R]):
    """A sender or receiver running in a namespace, ready on return. The Lab ends it at the latest."""

    def __init__(self, namespace: Namespace, plan: Plan, report_type: type[R]) -> None:
        self.plan = plan
        self._report_type: type[R] = report_type
        self._events: queue.Queue[dict[str, Any]] = queue.Queue()
        self._last_progress: dict[str, Any] = {}
        self._said: list[str] = []  # whatever is not an event: a warning, a traceback
        python_path = os.pathsep.join(filter(None, [str(SOURCE_DIRECTORY), os.environ.get("PYTHONPATH")]))
        self.process: subprocess.Popen[str] = namespace.popen(
            *(sys.executable, "-m", "lab.traffic", *arguments(plan)),
            cwd=SOURCE_DIRECTORY,
            env={**os.environ, "PYTHONPATH": python_path},
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


# --- as a program ---


def main(argv: list[str] | None = None) -> int:
    plan = plan_from(sys.argv[1:] if argv is None else argv)
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda _number, _frame: stopped.set())
    if plan.core is not None:
        os.sched_setaffinity(0, {plan.core})

    def emit(event: dict[str, Any]) -> None:
        print(json.dumps(event), flush=True)

    try:
        if isinstance(plan, SendPlan):
            report = asdict(send(plan, stop=stopped.is_set, emit=emit))
        else:
            report = asdict(receive(plan, stop=stopped.is_set, emit=emit))
    except OSError as error:
        print(f"lab.traffic: {plan.target}: {error}", file=sys.stderr)
        return 1
    emit({"event": "report", **report})
    return 0


if __name__ == "__main__":
    sys.exit(main())

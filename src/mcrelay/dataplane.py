"""The data plane worker: from commands to an engine's table.

Owns the engine and its thread, the descriptors it was handed, and the compiled rules. The event loop runs on the main
thread and serves command_sock; the engine's thread forwards. A command is decoded and compiled here, handed to the
engine, and acknowledged on request_sock when the engine has answered. Decides nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import logging
import mmap
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from ipaddress import ip_address
from typing import Final, NamedTuple

from mcrelay import counters, logs, worker
from mcrelay.channel import Channel
from mcrelay.codec import Codec
from mcrelay.engines.base import Engine
from mcrelay.entries import Entry, compile_rule, distinct, mapped
from mcrelay.errors import EXIT_CODES, Busy, Error, SystemRefusal
from mcrelay.frames import Malformed
from mcrelay.limits import TAPS_MAX, RingGeometry
from mcrelay.messages import (
    Acknowledge,
    AddRule,
    AttachInterface,
    AttachPort,
    DetachInterface,
    DetachPort,
    Failed,
    Message,
    OpenTap,
    Probe,
    Ready,
    RemoveRule,
    RuleRecord,
    SetLevels,
    SetOwnAddresses,
    SetPatternInterfaces,
    Shutdown,
    Start,
    SyncRules,
)
from mcrelay.process import name_process
from mcrelay.rules import Rule
from mcrelay.ruletext import parse_rule
from mcrelay.ways import WAYS, Direction, Link
from mcrelay.worker import Life

log = logging.getLogger("mcrelay.dataplane")  # we may be __main__

NOTICE_S: Final = 5.0  # between two looks at what people should know of interfaces
LOOP_NOTICE_S: Final = 0.5  # at suspended rules: half as long as the shortest suspension

# What an interface's counter means to a person.
NOTICES: Final = {
    "merged": "%(name)s: dropped %(more)d frames that hold several datagrams each; switch off what merges them: "
    "ethtool -K %(name)s rx-udp-gro-forwarding off rx-gro-list off, or on a sender's end of a veth pair "
    "ethtool -K INTERFACE tx-udp-segmentation off; or use --ingress ring, which takes them apart",
    "segments_refused": "%(name)s: does not take segments (UDP_SEGMENT), so datagrams leave it one by one, which costs "
    "more; see 'ethtool -k %(name)s', and whether each destination's path takes packets of its MTU",
}

SUSPENDED: Final = (
    "rule %(label)s (%(input)s): suspended for %(seconds)d s, since another relay sends its output back: the same "
    "payload came round again and again; change an output's group or port, here or there, so that it is not the other "
    "relay's input"
)

KERNEL_MIN: Final = (6, 1)  # IORING_SETUP_DEFER_TASKRUN, multishot recvmsg (6.0), buffer rings (5.19)


def make_engine(start: Start, page: memoryview) -> Engine:
    """The engine that was asked for; `auto` is uring, or reference with a warning where uring cannot run.
    SystemRefusal if uring was asked for by name."""
    reason = ""
    kind = start.engine
    if kind != "reference":
        try:
            from mcrelay.engines.uring import UringEngine

            return UringEngine(page, latency_budget_us=start.latency_budget_us, busy_poll=start.busy_poll)
        except ImportError as error:
            reason = f"the native module is missing ({error}); install mcrelay from a wheel or with a compiler"
        except OSError as error:
            reason = _why_no_io_uring(error)
        if kind == "uring":
            raise SystemRefusal(f"engine uring cannot run: {reason}", "or use --engine reference, which is slow")
        log.warning("engine uring cannot run: %s. Forwarding with engine reference, which is slow", reason)
    from mcrelay.engines.reference import ReferenceEngine

    return ReferenceEngine(page)


def _why_no_io_uring(error: OSError) -> str:
    release = os.uname().release
    version = tuple(int(part) for part in release.split("-")[0].split(".")[:2])
    if version < KERNEL_MIN:
        return f"Linux {release} is too old, {'.'.join(map(str, KERNEL_MIN))} is needed"
    if error.errno in (errno.EPERM, errno.EACCES, errno.ENOSYS):
        return "io_uring is disabled; see 'sysctl kernel.io_uring_disabled' and the container's seccomp profile"
    return f"io_uring: {error.strerror}"


class Known(NamedTuple):
    """A rule, as it was told and as the engine needs it."""

    rule: Rule
    record: RuleRecord
    slots: dict[str, int]  # of the interfaces that it names
    entries: tuple[Entry, ...]


class DataPlane:
    """One worker. `make` is the engine's maker, so that tests can put a fake one in its place."""

    def __init__(
        self,
        start: Start,
        descriptors: list[int],
        life: Life,
        make: Callable[[Start, memoryview], Engine] = make_engine,
    ) -> None:
        request_fd, command_fd, page_fd = descriptors
        if start.core is not None:
            os.sched_setaffinity(0, {start.core})  # inherited by the engine's thread
        self._life = life
        self._map = mmap.mmap(page_fd, counters.PAGE_SIZE)
        os.close(page_fd)
        self._page = counters.Page(memoryview(self._map))
        self._page.initialise()
        self._sockets: dict[tuple[int, Direction], int] = {}
        self._ports: dict[int, dict[int, int]] = {}  # of plain interfaces, by slot
        self._rules: dict[str, Known] = {}  # by id
        self._incoming: dict[str, Known] = {}  # of an unfinished SyncRules, and its ticket
        self._incoming_error: Exception | None = None
        self._incoming_ticket = 0
        self._answers: dict[int, Callable[[int], None]] = {}
        self._noticed: dict[tuple[str, str], int] = {}  # interface name and counter -> how much of it was logged
        self._workers = start.workers
        self._names: dict[int, str] = {}  # of interfaces, by slot
        self._for_patterns: dict[str, int] = {}  # slots of those that rules with a pattern are for
        self._looped = 0  # packets dropped for loops, when somebody last looked why
        self._suspended_until_ns: dict[str, int] = {}  # rules whose suspension was logged
        self._loop = asyncio.get_running_loop()
        self._requests = Channel(
            "request_sock",
            socket.socket(fileno=request_fd),
            Codec("request_sock", "supervisor", "data"),
            self._command,
            self._channel_closed,
            on_malformed=self._count_malformed,
        )
        self._commands = Channel(
            "command_sock",
            socket.socket(fileno=command_fd),
            Codec("command_sock", "supervisor", "data"),
            self._command,
            self._channel_closed,
            on_malformed=self._count_malformed,
        )
        try:
            self._engine = make(start, memoryview(self._map))
        except Error as error:
            self._requests.send(Failed(code=error.code, message=error.message, hint=error.hint))
            life.end(error.exit_code)
            return
        self._loop.add_reader(self._engine.answer_fd, self._take_answers)
        self._thread = threading.Thread(target=self._run_engine, name="engine", daemon=True)
        self._thread.start()
        self._requests.send(Ready(engine=self._engine.name))
        self._notice()
        self._notice_loops()

    def from_supervisor(self, message: Message, descriptors: list[int]) -> None:
        raise AssertionError(f"{type(message).__name__} is not for a data plane")

    def _channel_closed(self, reason: str) -> None:
        self._life.end()

    def _count_malformed(self, error: Malformed) -> None:
        self._page.count(counters.FRAMES_MALFORMED)

    # The engine.

    def _run_engine(self) -> None:
        code = 0
        try:
            self._engine.run()
        except Exception:
            log.exception("the engine ended")
            code = EXIT_CODES["internal"]
        self._loop.call_soon_threadsafe(self._engine_ended, code)

    def _engine_ended(self, code: int) -> None:
        self._take_answers()
        self._life.end(code)

    def _take_answers(self) -> None:
        for ticket, error in self._engine.answers():
            self._answers.pop(ticket)(error)

    def _notice(self) -> None:
        """Log what somebody can do something about, when it began and when it went on."""
        for slot, name in self._names.items():
            counted = self._page.interface(slot)
            for key in NOTICES:
                before = self._noticed.get((name, key), 0)
                if counted[key] > before:
                    log.warning(NOTICES[key], {"name": name, "more": counted[key] - before})
                self._noticed[name, key] = counted[key]
        self._loop.call_later(NOTICE_S, self._notice)

    def _notice_loops(self) -> None:
        """Log each suspension while it lasts. Whether there may be one is a single counter's news, whatever the number
        of rules."""
        looped = self._page.dropped().get("loop", 0)
        if looped != self._looped:
            self._looped = looped
            now_ns = time.monotonic_ns()
            before, self._suspended_until_ns = self._suspended_until_ns, {}
            for rule_id, known in self._rules.items():
                until_ns = self._page.loop(known.record.counter).suspended_until_ns
                if until_ns <= now_ns:
                    continue
                self._suspended_until_ns[rule_id] = until_ns
                if before.get(rule_id) != until_ns:
                    seconds = -(-(until_ns - now_ns) // 10**9)  # it began a moment ago
                    said = {"label": known.rule.label, "input": known.record.input, "seconds": seconds}
                    log.warning(SUSPENDED, said)
        self._loop.call_later(LOOP_NOTICE_S, self._notice_loops)

    # Commands.

    def _command(self, message: Message, descriptors: list[int]) -> None:
        if not isinstance(message, Probe):
            log.debug("told %s", type(message).__name__)
        match message:
            case AttachInterface():
                self._attach(message, *descriptors)
            case AttachPort():
                self._attach_port(message, descriptors[0])
            case DetachPort():
                self._detach_port(message)
            case DetachInterface():
                self._detach(message)
            case AddRule():
                self._change(message.ticket, lambda rules: self._put(rules, message.rule, message.slots))
            case RemoveRule():
                self._change(message.ticket, lambda rules: rules.pop(message.rule))
            case SyncRules():
                self._sync(message)
            case SetOwnAddresses():
                self._set_own_addresses(message)
            case SetPatternInterfaces():
                self._change(
                    message.ticket, lambda rules: self._follow(rules, message.slots), for_patterns=message.slots
                )
            case OpenTap():
                self._open_tap(message, descriptors[0])
            case SetLevels():
                logs.set_levels(message.levels)
                self._acknowledge(message.ticket)
            case Probe():
                self._execute(message.ticket, self._engine.probe, lambda error: None)
            case Shutdown():
                self._answers[self._engine.stop()] = lambda error: None

    def _acknowledge(self, ticket: int, error: str | None = None) -> None:
        try:
            self._requests.send(Acknowledge(ticket=ticket, error=error))
        except (Busy, ConnectionError) as failure:
            log.error("cannot acknowledge: %s", failure)
            self._life.end(EXIT_CODES["internal"])

    def _change(
        self, ticket: int, edit: Callable[[dict[str, Known]], object], for_patterns: dict[str, int] | None = None
    ) -> None:
        """Edit a copy of the rules and have the engine forward by it; if it cannot, nothing has changed."""
        rules = dict(self._rules)
        try:
            edit(rules)
            answer = self._engine.set_rules(distinct((known.rule, known.entries) for known in rules.values()))
        except (Error, KeyError, ValueError, OSError) as error:
            self._acknowledge(ticket, f"{type(error).__name__}: {error}")
            return
        self._rules = rules
        if for_patterns is not None:
            self._for_patterns = for_patterns
        self._answers[answer] = functools.partial(self._answered, ticket)

    def _answered(self, ticket: int, error: int) -> None:
        self._acknowledge(ticket, os.strerror(error) if error else None)

    def _sync(self, message: SyncRules) -> None:
        if message.ticket != self._incoming_ticket:
            self._incoming = {}  # the rest of the last one never came
            self._incoming_error = None
            self._incoming_ticket = message.ticket
        try:
            for record in message.rules:
                self._put(self._incoming, record, message.slots)
        except (Error, KeyError, ValueError) as error:
            self._incoming_error = error
        if not message.complete:
            return
        complete, self._incoming = self._incoming, {}

        def replace(rules: dict[str, Known]) -> None:
            if self._incoming_error:
                raise self._incoming_error
            rules.clear()
            rules.update(complete)

        self._change(message.ticket, replace)

    def _put(self, rules: dict[str, Known], record: RuleRecord, slots: dict[str, int]) -> None:
        rule = parse_rule(record.input, record.outputs, record.name)
        entries = compile_rule(
            rule, slots, record.counter, record.output_counters, workers=self._workers, open=self._for_patterns
        )
        rules[rule.id] = Known(rule, record, slots, entries)

    def _follow(self, rules: dict[str, Known], slots: dict[str, int]) -> None:
        """Have the patterns of these rules be for the interfaces with these slots. Only what that adds is compiled:
        there may be hundreds of rules for dozens of interfaces, which come one by one."""
        before = self._for_patterns
        gone = {slot for name, slot in before.items() if slots.get(name) != slot}
        new = {name: slot for name, slot in slots.items() if before.get(name) != slot}
        for rule_id, known in rules.items():
            if not known.rule.input.is_pattern:
                continue
            kept = tuple(entry for entry in known.entries if entry.ingress not in gone) if gone else known.entries
            record = known.record
            added = compile_rule(
                known.rule, known.slots, record.counter, record.output_counters, workers=self._workers, open=new
            )
            rules[rule_id] = known._replace(entries=kept + added)

    def _attach(self, message: AttachInterface, fd: int = -1) -> None:
        """A plain interface has no socket."""
        self._names[message.slot] = message.name
        try:
            is_ingress = message.direction == "ingress"
            attach = self._attach_ingress(message, fd) if is_ingress else self._attach_egress(message, fd)
        except (OSError, ValueError, struct.error) as error:
            _close(fd)
            self._acknowledge(message.ticket, f"{type(error).__name__}: {error}")
            return

        def done(error: int) -> None:
            if error:
                _close(fd)
                return
            self._close_socket(message.slot, message.direction)
            self._sockets[message.slot, message.direction] = fd

        self._execute(message.ticket, attach, done)

    def _attach_ingress(self, message: AttachInterface, fd: int) -> Callable[[], int]:
        if message.plain:
            return functools.partial(self._engine.attach_datagrams, message.slot, loopback=message.loopback)
        ring = message.ring
        return functools.partial(
            self._engine.attach_ingress,
            message.slot,
            fd,
            message.mtu,
            RingGeometry(ring.block_size, ring.blocks, ring.frame_size) if ring else None,
            loopback=message.loopback,
        )

    def _attach_egress(self, message: AttachInterface, fd: int) -> Callable[[], int]:
        link = Link.unpack(bytes.fromhex(message.link)) if message.link else Link()
        way = WAYS[message.direction]
        return functools.partial(self._engine.attach_egress, message.slot, way, fd, message.mtu, link)

    def _attach_port(self, message: AttachPort, fd: int) -> None:
        def done(error: int) -> None:
            if error:
                os.close(fd)
            else:
                self._ports.setdefault(message.slot, {})[message.port] = fd

        self._execute(message.ticket, functools.partial(self._engine.add_socket, message.slot, message.port, fd), done)

    def _detach_port(self, message: DetachPort) -> None:
        def done(error: int) -> None:
            _close(self._ports.get(message.slot, {}).pop(message.port, -1))

        step = functools.partial(self._engine.remove_socket, message.slot, message.port)
        self._execute(message.ticket, step, done, accept=errno.ENOENT)

    def _detach(self, message: DetachInterface) -> None:
        detach = (
            functools.partial(self._engine.detach_ingress, message.slot)
            if message.direction == "ingress"
            else functools.partial(self._engine.detach_egress, message.slot, WAYS[message.direction])
        )
        self._execute(
            message.ticket,
            detach,
            lambda error: self._close_socket(message.slot, message.direction),
            accept=errno.ENOENT,  # what is not attached needs no detaching
        )

    def _set_own_addresses(self, message: SetOwnAddresses) -> None:
        try:
            addresses = frozenset(mapped(ip_address(text)) for text in message.addresses)
        except ValueError as error:
            self._acknowledge(message.ticket, f"{type(error).__name__}: {error}")
            return
        step = functools.partial(self._engine.set_own_addresses, addresses)
        self._execute(message.ticket, step, lambda error: None)

    def _open_tap(self, message: OpenTap, fd: int) -> None:
        def answered(error: int) -> None:
            if error:
                os.close(fd)
            else:
                self._loop.add_reader(fd, self._close_tap, fd)  # nobody writes to us: whatever comes is its end
            why = f"{TAPS_MAX} taps are open" if error == errno.EBUSY else os.strerror(error)
            self._acknowledge(message.ticket, why if error else None)

        try:
            self._answers[self._engine.open_tap(message.rule, fd, message.count, message.snap_length)] = answered
        except OSError as error:
            os.close(fd)
            self._acknowledge(message.ticket, error.strerror)

    def _close_tap(self, fd: int) -> None:
        """Its reader is gone. Where the engine has too many commands waiting, the loop calls again."""
        try:
            ticket = self._engine.close_tap(fd)
        except BlockingIOError:
            return
        self._loop.remove_reader(fd)
        self._answers[ticket] = lambda error: os.close(fd)

    def _close_socket(self, slot: int, direction: Direction) -> None:
        _close(self._sockets.pop((slot, direction), -1))
        for fd in self._ports.pop(slot, {}).values() if direction == "ingress" else ():
            _close(fd)

    def _execute(self, ticket: int, step: Callable[[], int], done: Callable[[int], None], *, accept: int = 0) -> None:
        """Hand a step to the engine; when it has answered, call done(error or 0) and acknowledge. The error `accept` is
        none."""

        def answered(error: int) -> None:
            error = 0 if error == accept else error
            done(error)
            self._answered(ticket, error)

        try:
            self._answers[step()] = answered
        except OSError as error:
            answered(error.errno or errno.EIO)


def _close(fd: int) -> None:
    if fd >= 0:
        os.close(fd)


def main() -> None:
    """python -m mcrelay.dataplane UID GID FORMAT, with FD 3."""
    identity = worker.identity(sys.argv[1:])
    # Import both engines while the code can still be read.
    import mcrelay.engines.reference

    with contextlib.suppress(ImportError):  # make_engine says so
        import mcrelay.engines.uring  # noqa: F401 - imported for later
    name_process("mcrelay-data")
    worker.main("data", DataPlane, *identity)


if __name__ == "__main__":
    main()

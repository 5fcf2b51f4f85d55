"""A data plane worker with a fake engine in its place: what it is told reaches the engine, what the engine says is
acknowledged."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import mmap
import os
import socket
import time
from collections.abc import Iterable
from typing import Any, ClassVar

import msgspec
import pytest

from mcrelay import __version__, counters, dataplane, entries, ruletext
from mcrelay.channel import Channel
from mcrelay.codec import Codec
from mcrelay.dataplane import DataPlane
from mcrelay.entries import Entry
from mcrelay.limits import RULES_MAX, TAPS_MAX, RingGeometry
from mcrelay.messages import (
    Acknowledge,
    AddRule,
    AttachInterface,
    AttachPort,
    DetachInterface,
    DetachPort,
    LogSettings,
    Message,
    OpenTap,
    Ready,
    RemoveRule,
    Ring,
    RuleRecord,
    SetOwnAddresses,
    SetPatternInterfaces,
    Shutdown,
    Start,
    SyncRules,
)
from mcrelay.rules import Rule
from mcrelay.ways import Direction, Link, Way
from mcrelay.worker import Life

DEADLINE_S = 5.0


class FakeEngine:
    """Remembers what it is told, and answers when the test says so."""

    name: ClassVar[str] = "fake"

    def __init__(self) -> None:
        self.told: list[tuple[object, ...]] = []
        self.rules_max = RULES_MAX
        self._answer_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self._stop_fd = os.eventfd(0)
        self._answers: list[tuple[int, int]] = []

    @property
    def answer_fd(self) -> int:
        return self._answer_fd

    def run(self) -> None:
        os.eventfd_read(self._stop_fd)

    def _note(self, *command: object) -> int:
        self.told.append(command)
        return len(self.told)

    def attach_ingress(
        self, interface: int, fd: int, mtu: int, ring: RingGeometry | None = None, *, loopback: bool = False
    ) -> int:
        return self._note("attach_ingress", interface, mtu, ring, loopback)

    def attach_datagrams(self, interface: int, *, loopback: bool = False) -> int:
        return self._note("attach_datagrams", interface, loopback)

    def add_socket(self, interface: int, number: int, fd: int) -> int:
        return self._note("add_socket", interface, number)

    def remove_socket(self, interface: int, number: int) -> int:
        return self._note("remove_socket", interface, number)

    def detach_ingress(self, interface: int) -> int:
        return self._note("detach_ingress", interface)

    def attach_egress(self, interface: int, way: Way, fd: int, mtu: int, link: Link) -> int:
        return self._note("attach_egress", interface, way, mtu, link)

    def detach_egress(self, interface: int, way: Way) -> int:
        return self._note("detach_egress", interface, way)

    def set_rules(self, entries: Iterable[Entry]) -> int:
        counters = sorted(entry.counter for entry in entries)
        if len(counters) > self.rules_max:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return self._note("set_rules", counters)

    def set_own_addresses(self, addresses: Iterable[bytes]) -> int:
        return self._note("set_own_addresses", sorted(addresses))

    def open_tap(self, rule: int, fd: int, count: int, snap: int) -> int:
        return self._note("open_tap", rule, count, snap)

    def close_tap(self, fd: int) -> int:
        return self._note("close_tap")

    def probe(self) -> int:
        return self._note("probe")

    def stop(self) -> int:
        os.eventfd_write(self._stop_fd, 1)
        return self._note("stop")

    def answers(self) -> list[tuple[int, int]]:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._answer_fd)
        taken, self._answers = self._answers, []
        return taken

    def close(self) -> None:
        pass

    def say(self, ticket: int, error: int = 0) -> None:
        self._answers.append((ticket, error))
        os.eventfd_write(self._answer_fd, 1)


def record(number: int) -> RuleRecord:
    return RuleRecord(
        input=f"239.1.1.{number}:5000%in0",
        outputs=("239.2.2.2:6000%out0",),
        name=None,
        counter=number,
        output_counters=(number,),
    )


SLOTS = {"in0": 0, "out0": 1}


class Rig:
    """The supervisor's side of one worker."""

    def __init__(self) -> None:
        self.engine = FakeEngine()
        self.said: list[Message] = []
        self.life = Life()
        page = os.memfd_create("page")
        os.ftruncate(page, counters.PAGE_SIZE)
        self.page = counters.Page(memoryview(mmap.mmap(page, counters.PAGE_SIZE)))
        requests, theirs = socket.socketpair()
        commands, their_commands = socket.socketpair()
        self._requests = Channel(
            "requests", requests, Codec("request_sock", "data", "supervisor"), self._take, lambda reason: None
        )
        self.commands = Channel(
            "commands", commands, Codec("command_sock", "data", "supervisor"), self._take, lambda reason: None
        )
        start = Start(
            role="data",
            index=0,
            workers=1,
            core=None,
            engine="auto",
            latency_budget_us=0,
            busy_poll=False,
            version=__version__,
            logs=LogSettings(),
        )
        self.worker = DataPlane(
            start, [theirs.detach(), their_commands.detach(), page], self.life, lambda kind, memory: self.engine
        )

    def _take(self, message: Message, descriptors: list[int]) -> None:
        self.said.append(message)

    async def until(self, what: object) -> None:
        """Until the worker has said exactly this last."""
        async with asyncio.timeout(DEADLINE_S):
            while not self.said or self.said[-1] != what:
                await asyncio.sleep(0.001)

    async def told(self, count: int) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while len(self.engine.told) < count:
                await asyncio.sleep(0.001)


def test_commands_reach_the_engine_and_its_answers_the_supervisor() -> None:
    async def test() -> None:
        rig = Rig()
        await rig.until(Ready(engine="fake"))
        with open("/dev/null") as null:
            rig.commands.send(
                AttachInterface(ticket=1, slot=0, name="in0", mtu=1500, direction="ingress", ring=Ring(4096, 2, 2048)),
                [null.fileno()],
            )
            await rig.told(1)
        assert rig.engine.told == [("attach_ingress", 0, 1500, RingGeometry(4096, 2, 2048), False)]
        assert rig.said == [Ready(engine="fake")]  # nothing is acknowledged before the engine has answered
        rig.engine.say(1)
        await rig.until(Acknowledge(ticket=1))
        rig.commands.send(AddRule(ticket=2, rule=record(1), slots=SLOTS))
        rig.commands.send(AddRule(ticket=3, rule=record(2), slots=SLOTS))
        await rig.told(3)
        assert rig.engine.told[1:] == [("set_rules", [1]), ("set_rules", [1, 2])]
        rig.engine.say(2)
        rig.engine.say(3)
        await rig.until(Acknowledge(ticket=3))
        rig.commands.send(SyncRules(ticket=4, rules=(record(5),), slots=SLOTS, complete=False))
        rig.commands.send(SyncRules(ticket=5, rules=(record(6),), slots=SLOTS, complete=False))
        rig.commands.send(SyncRules(ticket=5, rules=(record(7),), slots=SLOTS, complete=True))
        await rig.told(4)
        assert rig.engine.told[3] == ("set_rules", [6, 7])  # a list that broke off is forgotten
        rig.engine.say(4)
        await rig.until(Acknowledge(ticket=5))
        rig.commands.send(DetachInterface(ticket=6, slot=0, direction="ingress"))
        await rig.told(5)
        rig.engine.say(5, 2)  # ENOENT: it is gone, which is what was asked
        await rig.until(Acknowledge(ticket=6))
        rig.commands.send(Shutdown())
        async with asyncio.timeout(DEADLINE_S):
            assert await rig.life.wait() == 0

    asyncio.run(test())


def test_ports_come_and_go_on_a_plain_interface() -> None:
    async def test() -> None:
        rig = Rig()
        await rig.until(Ready(engine="fake"))
        rig.commands.send(AttachInterface(ticket=1, slot=2, name="in0", mtu=1500, direction="ingress", plain=True))
        await rig.told(1)
        rig.engine.say(1)
        await rig.until(Acknowledge(ticket=1))
        reading, writing = os.pipe()  # stands for the sockets: it tells when all descriptors of it are closed
        os.set_blocking(reading, False)
        for ticket, port in ((2, 5000), (3, 5000 + 65536), (4, 5001)):
            rig.commands.send(AttachPort(ticket=ticket, slot=2, port=port), [writing])
            await rig.told(ticket)
            rig.engine.say(ticket, errno.ENFILE if port == 5001 else 0)
            await rig.until(Acknowledge(ticket=ticket, error=os.strerror(errno.ENFILE) if port == 5001 else None))
        os.close(writing)
        with pytest.raises(BlockingIOError):
            os.read(reading, 1)
        rig.commands.send(DetachPort(ticket=5, slot=2, port=5000))
        await rig.told(5)
        rig.engine.say(5)
        await rig.until(Acknowledge(ticket=5))
        with pytest.raises(BlockingIOError):
            os.read(reading, 1)
        rig.commands.send(DetachInterface(ticket=6, slot=2, direction="ingress"))  # what is left goes with it
        await rig.told(6)
        rig.engine.say(6)
        await rig.until(Acknowledge(ticket=6))
        assert os.read(reading, 1) == b""
        os.close(reading)
        assert rig.engine.told == [
            ("attach_datagrams", 2, False),
            ("add_socket", 2, 5000),
            ("add_socket", 2, 70536),
            ("add_socket", 2, 5001),
            ("remove_socket", 2, 5000),
            ("detach_ingress", 2),
        ]

    asyncio.run(test())


def test_the_engine_knows_this_hosts_addresses_and_where_they_may_come_from() -> None:
    async def test() -> None:
        rig = Rig()
        await rig.until(Ready(engine="fake"))
        with open("/dev/null") as null:
            rig.commands.send(
                AttachInterface(ticket=1, slot=2, name="lo", mtu=65536, direction="ingress", loopback=True),
                [null.fileno()],
            )
            await rig.told(1)
        assert rig.engine.told == [("attach_ingress", 2, 65536, None, True)]
        rig.engine.say(1)
        rig.commands.send(SetOwnAddresses(ticket=2, addresses=("192.0.2.1", "2001:db8::1", "192.0.2.1")))
        await rig.told(2)
        mapped = bytes.fromhex("00000000000000000000ffffc0000201")
        assert rig.engine.told[1] == ("set_own_addresses", [mapped, bytes.fromhex("20010db8" + "00" * 11 + "01")])
        assert rig.said[-1] == Acknowledge(ticket=1)
        rig.engine.say(2)
        await rig.until(Acknowledge(ticket=2))
        rig.commands.send(SetOwnAddresses(ticket=3, addresses=("192.0.2.1", "192.0.2.256")))
        await rig.until(
            Acknowledge(ticket=3, error="ValueError: '192.0.2.256' does not appear to be an IPv4 or IPv6 address")
        )
        assert len(rig.engine.told) == 2

    asyncio.run(test())


def test_a_tap_is_the_engines_until_its_reader_is_gone() -> None:
    async def test() -> None:
        rig = Rig()
        await rig.until(Ready(engine="fake"))

        def open_tap(ticket: int) -> socket.socket:
            reader, writer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with writer:
                rig.commands.send(OpenTap(ticket=ticket, rule=4, count=10, snap_length=64), [writer.fileno()])
            return reader

        reader = open_tap(1)
        await rig.told(1)
        assert rig.engine.told == [("open_tap", 4, 10, 64)]
        rig.engine.say(1)
        await rig.until(Acknowledge(ticket=1))
        reader.shutdown(socket.SHUT_WR)  # as good as gone
        await rig.told(2)
        assert rig.engine.told[1] == ("close_tap",)
        reader.setblocking(False)
        with pytest.raises(BlockingIOError):  # the engine may still write
            reader.recv(1)
        rig.engine.say(2)
        assert await asyncio.get_running_loop().sock_recv(reader, 1) == b""
        reader.close()
        # What the engine refuses is closed.
        reader = open_tap(2)
        await rig.told(3)
        rig.engine.say(3, errno.EBUSY)
        await rig.until(Acknowledge(ticket=2, error=f"{TAPS_MAX} taps are open"))
        assert reader.recv(1) == b""
        reader.close()


def test_the_engine_knows_each_way_out_and_what_headers_need() -> None:
    async def test() -> None:
        rig = Rig()
        await rig.until(Ready(engine="fake"))
        link = Link(source4=bytes(10) + b"\xff\xff\x0a\0\0\1", mac=b"\2\0\0\0\0\1")
        attached: list[tuple[int, Direction, str | None]] = [
            (1, "udp6", None),
            (2, "frame", link.packed.hex()),
            (3, "frame", "00"),
        ]
        with open("/dev/null") as null:
            for ticket, direction, packed in attached:
                rig.commands.send(
                    AttachInterface(ticket=ticket, slot=1, name="out0", mtu=1500, direction=direction, link=packed),
                    [null.fileno()],
                )
        await rig.until(Acknowledge(ticket=3, error="error: unpack requires a buffer of 56 bytes"))
        rig.commands.send(DetachInterface(ticket=4, slot=1, direction="frame"))
        await rig.told(3)
        assert rig.engine.told == [
            ("attach_egress", 1, Way.UDP6, 1500, Link()),
            ("attach_egress", 1, Way.FRAME, 1500, link),
            ("detach_egress", 1, Way.FRAME),
        ]

    asyncio.run(test())


def test_a_pattern_follows_what_the_supervisor_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule for in+ is told to the engine for each interface that matches. To attach them changes nothing more."""
    parsed: list[str] = []
    compiled: list[list[str]] = []

    def parse_rule(input: str, outputs: Iterable[str], name: str | None) -> Rule:
        parsed.append(input)
        return ruletext.parse_rule(input, outputs, name)

    def compile_rule(*arguments: Any, workers: int, open: dict[str, int]) -> tuple[Entry, ...]:
        compiled.append(sorted(open))
        return entries.compile_rule(*arguments, workers=workers, open=open)

    monkeypatch.setattr(dataplane, "parse_rule", parse_rule)
    monkeypatch.setattr(dataplane, "compile_rule", compile_rule)

    async def test() -> None:
        rig = Rig()
        await rig.until(Ready(engine="fake"))
        pattern = msgspec.structs.replace(record(1), input="239.1.1.1:5000%in+")

        def follow(ticket: int, slots: dict[str, int]) -> None:
            rig.commands.send(SetPatternInterfaces(ticket=ticket, slots=slots))

        follow(1, {"in0": 0})
        rig.commands.send(SyncRules(ticket=2, rules=(pattern, record(2)), slots=SLOTS, complete=True))
        with open("/dev/null") as null:
            rig.commands.send(
                AttachInterface(ticket=3, slot=0, name="in0", mtu=1500, direction="ingress"), [null.fileno()]
            )
        follow(4, {"in0": 0, "in2": 2, "in3": 3})
        follow(5, {"eth0": 0, "in2": 3})  # in the places of in0 and in3
        follow(6, {})
        await rig.told(6)
        assert rig.engine.told == [
            ("set_rules", []),
            ("set_rules", [1, 2]),
            ("attach_ingress", 0, 1500, None, False),
            ("set_rules", [1, 1, 1, 2]),
            ("set_rules", [1, 2]),
            ("set_rules", [2]),
        ]
        for ticket in range(1, 7):
            rig.engine.say(ticket)
        await rig.until(Acknowledge(ticket=6))

    asyncio.run(test())
    assert len(parsed) == 2
    assert compiled == [["in0"], ["in0"], ["in2", "in3"], ["eth0", "in2"], []]


def test_what_patterns_are_for_stays_where_the_engine_refuses_more() -> None:
    async def test() -> None:
        rig = Rig()
        await rig.until(Ready(engine="fake"))
        pattern = msgspec.structs.replace(record(1), input="239.1.1.1:5000%in+")
        rig.commands.send(SetPatternInterfaces(ticket=1, slots={"in0": 0}))
        rig.commands.send(AddRule(ticket=2, rule=pattern, slots=SLOTS))
        await rig.told(2)
        rig.engine.rules_max = 2
        rig.commands.send(SetPatternInterfaces(ticket=3, slots={"in0": 0, "in2": 2, "in3": 3}))
        await rig.until(Acknowledge(ticket=3, error="OSError: [Errno 22] Invalid argument"))
        rig.commands.send(AddRule(ticket=4, rule=record(2), slots=SLOTS))
        await rig.told(3)
        assert rig.engine.told[1:] == [("set_rules", [1]), ("set_rules", [1, 2])]

    asyncio.run(test())


def test_what_the_engine_or_the_worker_cannot_do_is_refused_and_changes_nothing() -> None:
    async def test() -> None:
        rig = Rig()
        await rig.until(Ready(engine="fake"))
        rig.commands.send(RemoveRule(ticket=1, rule="no such rule"))
        await rig.until(Acknowledge(ticket=1, error="KeyError: 'no such rule'"))
        rig.commands.send(AddRule(ticket=2, rule=record(1), slots={"in0": 0}))
        await rig.until(Acknowledge(ticket=2, error="KeyError: 'out0'"))
        assert rig.engine.told == []
        with open("/dev/null") as null:
            rig.commands.send(
                AttachInterface(ticket=3, slot=0, name="in0", mtu=1500, direction="udp4"), [null.fileno()]
            )
            await rig.told(1)
        rig.engine.say(1, 12)
        await rig.until(Acknowledge(ticket=3, error=os.strerror(12)))

    asyncio.run(test())


def test_what_somebody_can_mend_on_an_interface_is_logged_by_its_name(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dataplane, "NOTICE_S", 0.01)

    async def test() -> None:
        rig = Rig()
        with open("/dev/null") as null:
            rig.commands.send(
                AttachInterface(ticket=1, slot=3, name="in0", mtu=1500, direction="ingress"), [null.fileno()]
            )
            await rig.told(1)
        for merged in (5, 2):
            rig.page.count_interface(3, "merged", merged)
            async with asyncio.timeout(DEADLINE_S):
                while f"in0: dropped {merged} frames" not in caplog.text:
                    await asyncio.sleep(0.001)

    asyncio.run(test())
    assert "ethtool -K in0 rx-udp-gro-forwarding off" in caplog.text
    assert len(caplog.records) == 2


def test_each_suspension_of_a_rule_is_logged_once_while_it_lasts(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dataplane, "LOOP_NOTICE_S", 0.01)

    async def test() -> None:
        rig = Rig()
        rig.commands.send(SyncRules(ticket=1, rules=(record(1), record(2)), slots=SLOTS, complete=True))
        await rig.told(1)
        rig.page.suspend_rule(1, time.monotonic_ns() - 1)  # over before anybody looked: a predecessor's
        rig.engine.say(1)
        await rig.until(Acknowledge(ticket=1))
        for seconds in (60, 120):
            rig.page.suspend_rule(2, time.monotonic_ns() + seconds * 10**9)
            for _ in range(3):  # it is suspended, and goes on to be
                rig.page.count_dropped(counters.REASON["loop"])
                async with asyncio.timeout(DEADLINE_S):
                    while f"suspended for {seconds} s" not in caplog.text:
                        await asyncio.sleep(0.001)
                await asyncio.sleep(0.05)  # longer only means more chances to fail

    asyncio.run(test())
    assert "(239.1.1.2:5000%in0): suspended for 60 s, since another relay sends its output back" in caplog.text
    assert len(caplog.records) == 2

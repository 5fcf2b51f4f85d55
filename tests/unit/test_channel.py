"""Channel: messages and descriptors over a socketpair, on a real event loop.

    supervisor's end                               control plane's end
    Codec(supervisor_sock)  -- sends only -->      Codec(supervisor_sock): Start, Client, RecordRules, Shutdown
    a raw socket            -- any bytes -->       the same, to see what malformed input does

Every test leaves no more descriptors open than it found open, and no callback of the loop fails.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import fcntl
import gc
import os
import resource
import signal
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from types import FrameType
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcrelay.api import Failure, GetVersion, Ping, Version
from mcrelay.channel import QUEUE_MAX, SCM_MAX_FD, Channel
from mcrelay.codec import Codec, encode
from mcrelay.errors import Busy
from mcrelay.frames import FRAME_MAX, HEADER, Malformed
from mcrelay.messages import Client, LogSettings, Message, RecordRules, Shutdown, Start

DEADLINE_S = 10.0
CLIENT = Client(pid=1, uid=2, gid=3)
RECORD = RecordRules(generation=1, added=(), removed=(), complete=True, interfaces=())
START = Start(
    role="control",
    index=0,
    workers=2,
    core=None,
    engine="auto",
    latency_budget_us=0,
    busy_poll=False,
    version="1",
    logs=LogSettings(),
)
GARBAGE = HEADER.pack(7) + b"garbage"


def open_descriptors() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one that lists them
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return found


def _too_late(_number: int, _frame: FrameType | None) -> None:
    raise TimeoutError("something blocks the event loop")


@pytest.fixture(autouse=True)
def _nothing_blocks() -> Iterator[None]:
    """A call that waits in the kernel is interrupted, and the test fails."""
    former = signal.signal(signal.SIGALRM, _too_late)
    signal.setitimer(signal.ITIMER_REAL, 3 * DEADLINE_S)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, former)


class End:
    """A channel, and what came out of it. It owns the descriptors that it was handed."""

    def __init__(self, sock: socket.socket, codec: Codec) -> None:
        self.messages: list[Message] = []
        self.descriptors: list[int] = []
        self.malformed: list[Malformed] = []
        self.closed: list[str] = []
        self.on_malformed: Callable[[], None] = lambda: None
        self.channel = Channel("test", sock, codec, self._deliver, self.closed.append, on_malformed=self._malformed)

    def _deliver(self, message: Message, descriptors: list[int]) -> None:
        assert len(descriptors) == message.descriptors()
        self.messages.append(message)
        self.descriptors += descriptors

    def _malformed(self, error: Malformed) -> None:
        self.malformed.append(error)
        self.on_malformed()

    @property
    def stages(self) -> list[str]:
        assert self.channel.malformed == len(self.malformed)
        return [error.stage for error in self.malformed]

    def close(self) -> None:
        self.channel.close()
        for descriptor in self.descriptors:
            os.close(descriptor)
        self.descriptors.clear()


async def until(condition: Callable[[], object]) -> None:
    """Let the loop turn until the condition holds."""
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.001)


async def turn() -> None:
    """Let the loop handle all that is readable now, and what follows from it at once."""
    for _ in range(3):
        await asyncio.sleep(0)


def run(test: Coroutine[Any, Any, None]) -> None:
    """The test, in which no callback of the loop may fail and after which no descriptor may be left."""

    async def watched() -> None:
        failures: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: failures.append(context))
        await test
        assert failures == []

    before = open_descriptors()
    asyncio.run(watched())
    if open_descriptors().items() - before.items():
        gc.collect()  # a socket that nobody refers to is no leak
    assert open_descriptors().items() - before.items() == set()


@contextlib.asynccontextmanager
async def pair() -> AsyncIterator[tuple[End, End]]:
    """The supervisor's and the control plane's end."""
    one, two = socket.socketpair()
    supervisor = End(one, Codec("supervisor_sock", "control", "supervisor"))
    control = End(two, Codec("supervisor_sock", "supervisor", "control"))
    try:
        yield supervisor, control
    finally:
        supervisor.close()
        control.close()


@contextlib.asynccontextmanager
async def raw(codec: Codec | None = None) -> AsyncIterator[tuple[socket.socket, End]]:
    """A socket for any bytes, and the control plane's end."""
    one, two = socket.socketpair()
    one.setblocking(False)
    control = End(two, codec or Codec("supervisor_sock", "supervisor", "control"))
    try:
        yield one, control
    finally:
        one.close()
        control.close()


@contextlib.contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    reading, writing = os.pipe()
    try:
        yield reading, writing
    finally:
        os.close(reading)
        os.close(writing)


def memory(content: bytes) -> int:
    """A descriptor that can be told from others by what it holds."""
    descriptor = os.memfd_create("test", os.MFD_CLOEXEC)
    os.write(descriptor, content)
    return descriptor


def content(descriptor: int) -> bytes:
    return os.pread(descriptor, 64, 0)


def is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def send_raw(sock: socket.socket, data: bytes, descriptors: Sequence[int] = ()) -> None:
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    assert sock.sendmsg([data], rights) == len(data)


def record(size: int) -> RecordRules:
    """A message of about this many bytes, up to the longest."""
    return RecordRules(generation=size, added=(), removed=("x" * 250,) * (size // 253), complete=True, interfaces=())


def fill(end: End, message: Message) -> int:
    """Send a message until the channel is full. Returns how often that was."""
    sent = 0
    try:
        while True:
            end.channel.send(message)
            sent += 1
    except Busy as error:
        refusal = error
    assert "does not read" in refusal.message
    return sent


# --- messages --------------------------------------------------------------------------------------------------------


def test_messages_arrive_in_order() -> None:
    async def test() -> None:
        async with pair() as (supervisor, control):
            sent = [
                RecordRules(generation=n, added=(), removed=("x",) * n, complete=True, interfaces=())
                for n in range(200)
            ]
            for message in sent:
                supervisor.channel.send(message)
            await until(lambda: len(control.messages) == len(sent))
            assert control.messages == sent
            assert supervisor.channel.drained
            assert not control.malformed
            assert not control.closed

    run(test())


def test_both_ends_speak() -> None:
    async def test() -> None:
        one, two = socket.socketpair()
        client = End(one, Codec("client", "control", "client"))
        control = End(two, Codec("client", "client", "control"))
        client.channel.send(GetVersion(id=1))
        control.channel.send(Version(id=1, version="2", protocol=3))
        await until(lambda: client.messages and control.messages)
        assert control.messages == [GetVersion(id=1)]
        assert client.messages == [Version(id=1, version="2", protocol=3)]
        client.close()
        control.close()

    run(test())


def test_a_message_larger_than_the_sockets_buffer_arrives() -> None:
    async def test() -> None:
        one, two = socket.socketpair()
        one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        supervisor = End(one, Codec("supervisor_sock", "control", "supervisor"))
        control = End(two, Codec("supervisor_sock", "supervisor", "control"))
        large = record(FRAME_MAX - 1000)
        assert len(encode(large)) > 100 * 4096
        supervisor.channel.send(large)
        supervisor.channel.send(Shutdown())
        assert not supervisor.channel.drained
        await until(lambda: len(control.messages) == 2)
        assert control.messages == [large, Shutdown()]
        assert supervisor.channel.drained
        supervisor.close()
        control.close()

    run(test())


def test_a_message_too_large_for_a_frame_is_not_sent() -> None:
    async def test() -> None:
        async with pair() as (supervisor, control):
            with pytest.raises(ValueError, match="exceeds a frame"):
                supervisor.channel.send(record(FRAME_MAX + 1000))
            supervisor.channel.send(Shutdown())
            await until(lambda: control.messages)
            assert control.messages == [Shutdown()]

    run(test())


def test_a_channel_that_nobody_reads_is_busy_and_blocks_nobody() -> None:
    async def test() -> None:
        one, two = socket.socketpair()
        supervisor = End(one, Codec("supervisor_sock", "control", "supervisor"))
        large = record(FRAME_MAX // 2)
        sent = fill(supervisor, large)
        # What was accepted waits, up to the bound.
        in_kernel = 2 * one.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        assert QUEUE_MAX - len(encode(large)) < sent * len(encode(large)) < QUEUE_MAX + in_kernel
        # A refused message leaves no trace, and smaller ones still find room.
        supervisor.channel.send(Shutdown())
        assert not supervisor.closed

        control = End(two, Codec("supervisor_sock", "supervisor", "control"))
        await until(lambda: len(control.messages) == sent + 1)
        assert control.messages == [*[large] * sent, Shutdown()]
        supervisor.channel.send(large)
        await until(lambda: len(control.messages) == sent + 2)
        supervisor.close()
        control.close()

    run(test())


def test_a_busy_channel_leaves_the_loop_to_others() -> None:
    """While megabytes wait for a reader that is not there, other channels work."""

    async def test() -> None:
        one, silent = socket.socketpair()
        stuck = End(one, Codec("supervisor_sock", "control", "supervisor"))
        for _ in range(6):
            stuck.channel.send(record(FRAME_MAX - 1000))
        async with pair() as (supervisor, control):
            for _ in range(50):
                supervisor.channel.send(RECORD)
            await until(lambda: len(control.messages) == 50)
        assert not stuck.channel.drained
        stuck.close()
        silent.close()

    run(test())


# --- descriptors -----------------------------------------------------------------------------------------------------


def test_a_descriptor_works_at_the_other_end() -> None:
    async def test() -> None:
        async with pair() as (supervisor, control):
            with pipe() as (reading, writing):
                supervisor.channel.send(CLIENT, [writing])
                await until(lambda: control.messages)
                assert control.messages == [CLIENT]
                (received,) = control.descriptors
                assert received != writing
                os.write(received, b"hello")
                assert os.read(reading, 100) == b"hello"
                assert fcntl.fcntl(received, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
                assert is_open(writing)

    run(test())


def test_descriptors_arrive_with_their_message_in_their_order() -> None:
    async def test() -> None:
        async with pair() as (supervisor, control):
            lent = [memory(b"%d" % n) for n in range(5)]
            supervisor.channel.send(START, lent[:3])
            supervisor.channel.send(CLIENT, lent[3:4])
            supervisor.channel.send(RECORD)
            supervisor.channel.send(CLIENT, lent[4:])
            await until(lambda: len(control.messages) == 4)
            assert control.messages == [START, CLIENT, RECORD, CLIENT]
            assert [content(descriptor) for descriptor in control.descriptors] == [b"0", b"1", b"2", b"3", b"4"]
            for descriptor in lent:
                os.close(descriptor)

    run(test())


@pytest.mark.parametrize("give", [True, False])
def test_descriptors_go_with_the_first_part_of_a_large_message_alone(give: bool) -> None:
    async def test() -> None:
        one, two = socket.socketpair()
        one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        supervisor = End(one, Codec("supervisor_sock", "control", "supervisor"))
        control = End(two, Codec("supervisor_sock", "supervisor", "control"))
        large = msgspec.structs.replace(START, version="x" * 500_000)
        lent = [memory(b"%d" % n) for n in range(3)]
        supervisor.channel.send(large, lent, give=give)
        assert not supervisor.channel.drained  # a part has gone
        await until(lambda: control.messages or control.malformed)
        assert control.messages == [large]
        assert [content(descriptor) for descriptor in control.descriptors] == [b"0", b"1", b"2"]
        await turn()
        assert not control.malformed
        for descriptor in [] if give else lent:
            os.close(descriptor)
        supervisor.close()
        control.close()

    run(test())


@settings(max_examples=25)
@given(
    st.lists(
        st.tuples(st.sampled_from([0, 1, 3]), st.integers(0, 60_000) | st.integers(0, 1000)),
        min_size=1,
        max_size=12,
    ),
    st.booleans(),
)
def test_descriptors_keep_to_their_messages_whatever_is_between(kinds: list[tuple[int, int]], give: bool) -> None:
    """Messages with 0, 1 and 3 descriptors, small ones and ones larger than a read or the socket's buffer."""

    async def test() -> None:
        one, two = socket.socketpair()
        one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
        supervisor = End(one, Codec("supervisor_sock", "control", "supervisor"))
        control = End(two, Codec("supervisor_sock", "supervisor", "control"))
        sent: list[Message] = []
        lent = []
        number = 0
        for count, size in kinds:
            large_start = msgspec.structs.replace(START, version="x" * size)
            message = {0: record(size), 1: Client(pid=size, uid=0, gid=0), 3: large_start}[count]
            descriptors = [memory(b"%d" % (number + n)) for n in range(count)]
            number += count
            supervisor.channel.send(message, descriptors, give=give)
            sent.append(message)
            lent += descriptors
        await until(lambda: len(control.messages) == len(sent))
        assert control.messages == sent
        assert [content(descriptor) for descriptor in control.descriptors] == [b"%d" % n for n in range(number)]
        assert not control.malformed
        for descriptor in [] if give else lent:
            os.close(descriptor)
        supervisor.close()
        control.close()

    run(test())


@pytest.fixture
def closes(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often each descriptor was closed."""
    counted: Counter[int] = Counter()
    close = os.close

    def counting(descriptor: int) -> None:
        counted[descriptor] += 1
        close(descriptor)

    monkeypatch.setattr(os, "close", counting)
    return counted


def test_a_given_descriptor_is_closed_once_it_is_sent(closes: Counter[int]) -> None:
    async def test() -> None:
        async with pair() as (supervisor, control):
            given_away = memory(b"given")
            supervisor.channel.send(CLIENT, [given_away], give=True)
            assert closes[given_away] == 1
            await until(lambda: control.messages)
            assert content(control.descriptors[0]) == b"given"
            supervisor.close()
            assert closes[given_away] == 1

    run(test())


def test_a_given_descriptor_that_waits_is_closed_when_it_is_sent(closes: Counter[int]) -> None:
    async def test() -> None:
        one, two = socket.socketpair()
        supervisor = End(one, Codec("supervisor_sock", "control", "supervisor"))
        supervisor.channel.send(record(FRAME_MAX - 1000))
        given_away = memory(b"given")
        supervisor.channel.send(CLIENT, [given_away], give=True)
        await turn()
        assert is_open(given_away)
        assert closes[given_away] == 0
        control = End(two, Codec("supervisor_sock", "supervisor", "control"))
        await until(lambda: len(control.messages) == 2)
        assert closes[given_away] == 1
        assert content(control.descriptors[0]) == b"given"
        supervisor.close()
        control.close()

    run(test())


def closed_by_us(supervisor: End, peer: socket.socket) -> None:
    supervisor.channel.close()


def closed_by_the_peer(supervisor: End, peer: socket.socket) -> None:
    peer.close()


@pytest.mark.parametrize("ending", [closed_by_us, closed_by_the_peer])
def test_a_given_descriptor_that_waits_is_closed_with_the_channel(
    ending: Callable[[End, socket.socket], None], closes: Counter[int]
) -> None:
    async def test() -> None:
        one, two = socket.socketpair()
        supervisor = End(one, Codec("supervisor_sock", "control", "supervisor"))
        supervisor.channel.send(record(FRAME_MAX - 1000))
        given_away, lent = memory(b"given"), memory(b"lent")
        supervisor.channel.send(CLIENT, [given_away], give=True)
        supervisor.channel.send(CLIENT, [lent])
        ending(supervisor, two)
        await until(lambda: not supervisor.channel.is_open)
        assert closes[given_away] == 1
        assert closes[lent] == 0
        os.close(lent)
        supervisor.close()
        two.close()

    run(test())


async def full(supervisor: End) -> None:
    fill(supervisor, record(FRAME_MAX - 1000))
    fill(supervisor, Shutdown())  # than which nothing is shorter


async def closed(supervisor: End) -> None:
    supervisor.channel.close()


async def unchanged(supervisor: End) -> None:
    pass


@pytest.mark.parametrize(
    ("state", "message", "count", "refusal"),
    [
        (full, CLIENT, 1, Busy),
        (closed, CLIENT, 1, ConnectionError),
        (unchanged, CLIENT, 2, ValueError),
        (unchanged, RECORD, 1, ValueError),
    ],
)
@pytest.mark.parametrize("give", [True, False])
def test_a_given_descriptor_is_closed_even_if_it_cannot_be_sent(
    state: Callable[[End], Coroutine[Any, Any, None]],
    message: Message,
    count: int,
    refusal: type[Exception],
    give: bool,
    closes: Counter[int],
) -> None:
    async def test() -> None:
        one, two = socket.socketpair()
        supervisor = End(one, Codec("supervisor_sock", "control", "supervisor"))
        await state(supervisor)
        descriptors = [memory(b"%d" % n) for n in range(count)]
        with pytest.raises(refusal):
            supervisor.channel.send(message, descriptors, give=give)
        assert [closes[descriptor] for descriptor in descriptors] == [int(give)] * count
        for descriptor in [] if give else descriptors:
            os.close(descriptor)
        supervisor.close()
        two.close()

    run(test())


def test_too_few_descriptors_make_a_message_malformed() -> None:
    async def test() -> None:
        async with raw() as (sock, control):
            before = open_descriptors()
            with pipe() as (reading, _writing):
                send_raw(sock, encode(CLIENT))
                await until(lambda: control.malformed)
                send_raw(sock, encode(START), [reading, reading])
                await until(lambda: len(control.malformed) == 2)
            assert control.stages == ["descriptors", "descriptors"]
            assert "Client goes with 1, 0 came" in control.malformed[0].why
            assert "Start goes with 3, 2 came" in control.malformed[1].why
            assert control.messages == []
            assert open_descriptors() == before
            # The stream goes on.
            send_raw(sock, encode(RECORD))
            await until(lambda: control.messages)
            assert not control.closed

    run(test())


@pytest.mark.parametrize("count", [1, 3, SCM_MAX_FD])
@pytest.mark.parametrize(
    "frame",
    [encode(RECORD), GARBAGE, HEADER.pack(FRAME_MAX + 1) + bytes(100)],
    ids=["another message", "garbage", "oversized"],
)
def test_descriptors_that_nothing_asked_for_are_closed_and_counted(count: int, frame: bytes) -> None:
    async def test() -> None:
        async with raw() as (sock, control):
            before = open_descriptors()
            with pipe() as (reading, _writing):
                send_raw(sock, frame, [reading] * count)
            await until(lambda: control.malformed)
            await turn()
            assert open_descriptors() == before
            assert control.channel.malformed >= 1
            assert not control.closed

    run(test())


def test_descriptors_beyond_those_asked_for_are_closed_and_counted() -> None:
    async def test() -> None:
        async with raw() as (sock, control):
            mine, other = memory(b"mine"), memory(b"other")
            before = open_descriptors()
            send_raw(sock, encode(CLIENT), [mine, other, other])
            await until(lambda: control.malformed)
            assert control.stages == ["descriptors"]
            assert control.messages == [CLIENT]
            assert [content(descriptor) for descriptor in control.descriptors] == [b"mine"]
            assert len(open_descriptors()) == len(before) + 1
            # The next message is not served what was left over.
            next_one = memory(b"next")
            send_raw(sock, encode(CLIENT), [next_one])
            await until(lambda: len(control.messages) == 2)
            assert content(control.descriptors[1]) == b"next"
            for descriptor in (mine, other, next_one):
                os.close(descriptor)

    run(test())


def test_a_malformed_frame_does_not_cost_the_next_one_its_descriptors() -> None:
    """Both are there before the first is read, so that one recvmsg(2) returns both."""

    async def test() -> None:
        async with raw() as (sock, control):
            lent = memory(b"lent")
            send_raw(sock, GARBAGE)
            send_raw(sock, encode(CLIENT), [lent])
            await until(lambda: control.messages or len(control.malformed) > 1)
            assert control.stages == ["decode"]
            assert control.messages == [CLIENT]
            assert content(control.descriptors[0]) == b"lent"
            os.close(lent)

    run(test())


def test_what_came_beside_a_malformed_frame_is_not_passed_off_as_the_next_ones() -> None:
    """The malformed frame comes in two reads, of which the second has the next message, too."""

    async def test() -> None:
        async with raw() as (sock, control):
            other, lent = memory(b"other"), memory(b"lent")
            send_raw(sock, GARBAGE[:-1], [other])
            await turn()
            send_raw(sock, GARBAGE[-1:])
            send_raw(sock, encode(CLIENT), [lent])
            await until(lambda: control.messages or len(control.malformed) > 1)
            assert control.messages == [CLIENT]
            assert [content(descriptor) for descriptor in control.descriptors] == [b"lent"]
            os.close(other)
            os.close(lent)

    run(test())


def test_a_message_that_lacks_its_descriptors_does_not_take_the_next_ones() -> None:
    async def test() -> None:
        async with raw() as (sock, control):
            lent = memory(b"lent")
            send_raw(sock, encode(Client(pid=7, uid=8, gid=9)))
            send_raw(sock, encode(CLIENT), [lent])
            await until(lambda: control.messages and control.malformed)
            assert control.stages == ["descriptors"]
            assert control.messages == [CLIENT]
            assert [content(descriptor) for descriptor in control.descriptors] == [b"lent"]
            os.close(lent)

    run(test())


@pytest.mark.parametrize(
    ("codec", "announced"),
    [
        # None of a client's messages takes a descriptor.
        (Codec("client", "client", "control"), 1000),
        (Codec("client", "client", "control"), FRAME_MAX + 1),
        (Codec("supervisor_sock", "supervisor", "control"), FRAME_MAX + 1),
    ],
    ids=["of a client", "oversized of a client", "oversized"],
)
def test_descriptors_beside_an_unfinished_frame_do_not_pile_up(codec: Codec, announced: int) -> None:
    """They may come with every byte, and would use up the process's descriptors, and with them everybody's."""

    async def test() -> None:
        async with raw(codec) as (sock, control):
            before = len(open_descriptors())
            most = 0
            with pipe() as (reading, _writing):
                send_raw(sock, HEADER.pack(announced))
                for _ in range(20):
                    send_raw(sock, b"x", [reading] * 20)
                    await turn()
                    most = max(most, len(open_descriptors()) - before - 2)
            assert most <= 20
            assert "descriptors" in control.stages

    run(test())


def test_descriptors_beside_a_message_that_takes_some_are_bounded() -> None:
    async def test() -> None:
        async with raw() as (sock, control):
            before = len(open_descriptors())
            most = 0
            with pipe() as (reading, _writing):
                send_raw(sock, encode(CLIENT)[:1])
                for byte in encode(CLIENT)[1:-1]:
                    send_raw(sock, bytes([byte]), [reading] * 100)
                    await turn()
                    most = max(most, len(open_descriptors()) - before - 2)
            assert most <= 2 * SCM_MAX_FD
            assert "descriptors" in control.stages

    run(test())


def test_a_receiver_without_room_for_descriptors_goes_on() -> None:
    """The kernel drops what does not fit the limit of open files; the message that lost it is malformed."""

    async def test() -> None:
        async with raw() as (sock, control):
            lent = memory(b"lent")
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            send_raw(sock, encode(CLIENT), [lent])
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(open_descriptors()) + 1, hard))
            try:
                # Leave no gap below the limit either.
                fillers = []
                with contextlib.suppress(OSError):
                    while True:
                        fillers.append(os.dup(lent))
                await until(lambda: control.malformed)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
                for filler in fillers:
                    os.close(filler)
            assert set(control.stages) == {"descriptors"}
            send_raw(sock, encode(CLIENT), [lent])
            await until(lambda: control.messages)
            assert content(control.descriptors[0]) == b"lent"
            os.close(lent)

    run(test())


# --- malformed streams -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "stage"),
    [
        (GARBAGE, "decode"),
        (HEADER.pack(0), "decode"),
        (encode(Ping(id=1)), "decode"),  # a message, but not one of this channel
        (HEADER.pack(FRAME_MAX + 1) + bytes(FRAME_MAX + 1), "frame"),
    ],
    ids=["garbage", "empty", "not permitted", "oversized"],
)
def test_a_malformed_frame_is_skipped_and_the_next_one_delivered(bad: bytes, stage: str) -> None:
    async def test() -> None:
        async with raw() as (sock, control):
            stream = encode(RECORD) + bad + encode(Shutdown())
            await asyncio.get_running_loop().sock_sendall(sock, stream)
            await until(lambda: len(control.messages) == 2)
            assert control.messages == [RECORD, Shutdown()]
            assert control.stages == [stage]
            assert control.channel.is_open
            assert not control.closed

    run(test())


@pytest.mark.parametrize(
    "part",
    [b"\0", HEADER.pack(100), encode(RECORD)[:-1], HEADER.pack(FRAME_MAX + 1) + b"x"],
    ids=["of a header", "of a body", "but for a byte", "of an oversized frame"],
)
def test_a_stream_that_ends_inside_a_frame_is_counted(part: bytes) -> None:
    async def test() -> None:
        async with raw() as (sock, control):
            send_raw(sock, encode(RECORD) + part)
            sock.close()
            await until(lambda: control.closed)
            assert control.messages == [RECORD]
            assert control.stages[-1] == "frame"
            assert control.channel.malformed == (2 if len(part) == 5 else 1)
            assert len(control.closed) == 1
            assert not control.channel.is_open

    run(test())


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=10))
def test_any_bytes_leave_a_channel_that_works_or_is_closed(pieces: list[bytes]) -> None:
    async def test() -> None:
        async with raw() as (sock, control):
            with pipe() as (reading, _writing):
                for piece in pieces:
                    send_raw(sock, piece, [reading] * (piece[0] % 3))
            sock.close()
            await until(lambda: control.closed)
            assert len(control.closed) == 1

    run(test())


# --- ending ----------------------------------------------------------------------------------------------------------


def test_a_peer_that_closes_is_told_of_once() -> None:
    async def test() -> None:
        async with raw() as (sock, control):
            send_raw(sock, encode(RECORD))
            sock.close()
            await until(lambda: control.closed)
            await turn()
            assert control.messages == [RECORD]
            assert control.closed == ["the other side closed it"]
            assert not control.channel.is_open
            with pytest.raises(ConnectionError, match="test is closed"):
                control.channel.send(Shutdown())

    run(test())


def test_a_peer_that_closed_is_noticed_by_sending() -> None:
    async def test() -> None:
        one, two = socket.socketpair()
        supervisor = End(one, Codec("supervisor_sock", "control", "supervisor"))
        two.close()
        lent = memory(b"lent")
        with contextlib.suppress(ConnectionError):
            supervisor.channel.send(CLIENT, [lent])
        await until(lambda: supervisor.closed)
        await turn()
        assert len(supervisor.closed) == 1
        assert is_open(lent)
        os.close(lent)

    run(test())


def test_closing_is_silent_and_may_be_repeated() -> None:
    async def test() -> None:
        async with pair() as (supervisor, control):
            supervisor.channel.close()
            supervisor.channel.close()
            assert not supervisor.channel.is_open
            await until(lambda: control.closed)
            assert supervisor.closed == []

    run(test())


@pytest.mark.parametrize("then_closes", [True, False])
def test_an_answer_to_a_stream_that_broke_off_does_not_end_the_channel_twice(then_closes: bool) -> None:
    """What was malformed is answered, and the answer finds nobody."""

    async def test() -> None:
        async with raw(Codec("client", "client", "control")) as (sock, control):

            def answer() -> None:
                control.channel.send(Failure(id=None, code="protocol", message="m", hint="h"))
                if then_closes:
                    control.channel.close()

            control.on_malformed = answer
            send_raw(sock, encode(Ping(id=1))[:-1])
            sock.close()
            await until(lambda: not control.channel.is_open)
            await turn()
            assert len(control.closed) == 1

    run(test())


def test_a_channel_may_be_closed_from_its_own_callback() -> None:
    """What comes behind the message that closed it is not delivered."""

    async def test() -> None:
        one, two = socket.socketpair()
        received: list[Message] = []
        closed: list[str] = []

        def deliver(message: Message, descriptors: list[int]) -> None:
            received.append(message)
            channel.close()

        channel = Channel("test", two, Codec("client", "client", "control"), deliver, closed.append)
        with pipe() as (reading, _writing):
            send_raw(one, encode(Ping(id=1)) + encode(Ping(id=2)), [reading])
            await until(lambda: received)
            await turn()
        assert received == [Ping(id=1)]
        assert closed == []
        one.close()

    run(test())

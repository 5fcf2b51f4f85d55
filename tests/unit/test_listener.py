"""Listener: the path from bind to unlink, and who may connect."""

from __future__ import annotations

import asyncio
import errno
import multiprocessing
import os
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from mcrelay import listener as listener_module
from mcrelay.acceptor import ACCEPTS_PER_TURN
from mcrelay.api import Failure
from mcrelay.codec import Codec
from mcrelay.endpoint import PATH_MAX
from mcrelay.errors import Error, UsageError
from mcrelay.frames import HEADER
from mcrelay.listener import Listener

DEADLINE_S = 10.0
NOBODY = 65534
OURS = 54321  # a group
WELCOME = b"welcome"

fork = multiprocessing.get_context("fork")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to connect as somebody else")


@pytest.fixture
def directory() -> Iterator[Path]:
    """One that everybody can reach, with a short name."""
    path = Path(tempfile.mkdtemp(prefix="mcrelay-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def path(directory: Path) -> Path:
    return directory / "control.sock"


def contents(directory: Path) -> dict[str, tuple[int, int]]:
    return {entry.name: (entry.lstat().st_ino, entry.lstat().st_mode) for entry in directory.iterdir()}


def listening(path: Path, backlog: int = 128) -> socket.socket:
    """A socket that somebody else listens on."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(str(path))
    sock.listen(backlog)
    return sock


def connects(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        try:
            client.connect(str(path))
        except OSError:
            return False
        return True


def check_refused(path: Path, exit_code: int, *words: str) -> None:
    """It is refused, and nothing has changed."""
    before = contents(path.parent)
    mask = os.umask(0o022)
    descriptors = os.listdir("/proc/self/fd")
    with pytest.raises(Error) as refusal:
        Listener(str(path))
    assert refusal.value.exit_code == exit_code
    assert str(path) in refusal.value.message
    assert all(word in str(refusal.value) for word in words)
    assert refusal.value.hint
    assert contents(path.parent) == before
    assert os.umask(mask) == 0o022
    assert len(os.listdir("/proc/self/fd")) == len(descriptors)


# --- the path --------------------------------------------------------------------------------------------------------


def test_the_socket_is_for_its_group_alone(path: Path) -> None:
    opened = Listener(str(path))
    status = path.stat()
    assert stat.S_ISSOCK(status.st_mode)
    assert stat.S_IMODE(status.st_mode) == 0o660
    assert status.st_uid == os.geteuid()
    opened.close()


@needs_root
@pytest.mark.parametrize("known", [True, False])
def test_the_group_is_mcrelay_if_there_is_one(path: Path, known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener_module, "group_id", {"mcrelay": OURS if known else None}.get)
    opened = Listener(str(path))
    assert path.stat().st_gid == (OURS if known else os.getegid())
    opened.close()


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o777])
def test_the_mode_does_not_depend_on_the_umask_and_leaves_it(path: Path, mask: int) -> None:
    former = os.umask(mask)
    try:
        opened = Listener(str(path))
    finally:
        after = os.umask(former)
    assert after == mask
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    opened.close()


def test_missing_directories_are_made(directory: Path) -> None:
    path = directory / "run" / "mcrelay" / "control.sock"
    opened = Listener(str(path))
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o755
    opened.close()
    assert contents(path.parent) == {}


def test_a_stale_socket_is_replaced(path: Path) -> None:
    listening(path).close()
    assert not connects(path)
    opened = Listener(str(path))
    assert connects(path)
    opened.close()
    assert not path.exists()


def test_a_live_socket_is_left_alone(path: Path) -> None:
    with listening(path):
        check_refused(path, 73, "another mcrelay already listens", "--socket")
        assert connects(path)


def test_a_listener_is_alive_before_it_accepts(path: Path) -> None:
    opened = Listener(str(path))
    check_refused(path, 73, "another mcrelay already listens")
    opened.close()


def test_a_live_socket_with_a_full_backlog_is_left_alone(path: Path) -> None:
    with listening(path, backlog=0):
        waiting = []
        while True:
            client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            client.setblocking(False)
            waiting.append(client)
            try:
                client.connect(str(path))
            except BlockingIOError:
                break
        check_refused(path, 73, "another mcrelay already listens")
        for client in waiting:
            client.close()


def make_file(path: Path) -> None:
    path.write_text("precious")


def make_directory(path: Path) -> None:
    path.mkdir()


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_link_to_a_file(path: Path) -> None:
    make_file(path.with_name("target"))
    path.symlink_to("target")


@pytest.mark.parametrize("make", [make_file, make_directory, make_pipe, make_link_to_a_file])
def test_what_is_not_a_socket_is_left_alone(path: Path, make: Callable[[Path], None]) -> None:
    make(path)
    check_refused(path, 73, "exists and is not a socket", "move it away")


def test_a_link_to_nothing_is_left_alone(path: Path) -> None:
    path.symlink_to("nothing")
    check_refused(path, 73, "cannot create socket")


def test_somebody_elses_kind_of_socket_is_left_alone(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(path))
        check_refused(path, 73)


@pytest.mark.parametrize("parent", ["/proc/mcrelay", "/dev/null"])
def test_a_directory_that_cannot_be_is_refused(parent: str) -> None:
    with pytest.raises(Error, match=f"cannot use {parent} for the socket") as refusal:
        Listener(f"{parent}/control.sock")
    assert refusal.value.exit_code == 73
    assert "--socket" in refusal.value.hint


@pytest.mark.parametrize("text", ["", "control.sock", "./control.sock", "~/control.sock", "@abstract", "\0abstract"])
def test_a_path_that_is_not_absolute_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="give an absolute path") as refusal:
        Listener(text)
    assert repr(text) in refusal.value.message


@pytest.mark.parametrize("filler", ["x", "\u00e9"])
def test_a_path_has_the_length_that_the_kernel_allows(directory: Path, filler: str) -> None:
    """In bytes: beyond it, bind(2) would cut it off or fail."""
    room = PATH_MAX - len(f"{directory}/")
    name = filler * (room // len(filler.encode()))
    name += "x" * (room - len(name.encode()))
    opened = Listener(f"{directory}/{name}")
    assert connects(directory / name)
    opened.close()
    with pytest.raises(UsageError, match=f"up to {PATH_MAX} bytes"):
        Listener(f"{directory}/{name}x")
    assert contents(directory) == {}


def test_a_bind_that_fails_half_way_leaves_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object, **_options: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "chown", refuse)
    check_refused(path, 73, "cannot create socket", "Operation not permitted")


def test_closing_removes_the_socket(path: Path) -> None:
    Listener(str(path)).close()
    assert not path.exists()


def test_closing_without_a_socket_is_no_error(path: Path) -> None:
    opened = Listener(str(path))
    path.unlink()
    opened.close()


def test_closing_leaves_what_is_not_its_own(path: Path) -> None:
    opened = Listener(str(path))
    path.unlink()
    with listening(path):
        opened.close()
        assert connects(path)


@pytest.mark.parametrize("moment", ["stat", "unlink"])
def test_a_successor_that_starts_while_the_listener_closes_keeps_its_socket(
    path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused because the old one still listens, or it listens and stays; whenever it comes."""
    opened = Listener(str(path))
    successors: list[Listener] = []
    came: list[bool] = []
    real: Callable[..., object] = getattr(os, moment)

    def successor_first(*arguments: object, **options: object) -> object:
        monkeypatch.setattr(os, moment, real)
        came.append(True)
        try:
            successors.append(Listener(str(path)))
        except Error as error:
            assert error.exit_code == 73  # noqa: PT017 - the other outcome is as good
        return real(*arguments, **options)

    monkeypatch.setattr(os, moment, successor_first)
    opened.close()
    assert came == [True]
    assert connects(path) == bool(successors)
    for successor in successors:
        successor.close()
    assert contents(path.parent) == {}


def _bind(path: str, start: Barrier, end: Barrier, result: Connection) -> None:
    start.wait(DEADLINE_S)
    try:
        bound = Listener(path)
    except Error as error:
        result.send(error.exit_code)
        bound = None
    else:
        result.send(0)
    end.wait(DEADLINE_S)
    del bound  # and not close(): the next ones find a stale socket


def test_of_daemons_that_start_at_once_one_wins(path: Path) -> None:
    contenders = 4
    for _ in range(8):
        start, end = fork.Barrier(contenders), fork.Barrier(contenders + 1)
        processes, results = [], []
        for _ in range(contenders):
            receiver, sender = fork.Pipe(duplex=False)
            process = fork.Process(target=_bind, args=(str(path), start, end, sender))
            process.start()
            sender.close()
            processes.append(process)
            results.append(receiver)
        codes = []
        for receiver in results:
            assert receiver.poll(DEADLINE_S)
            codes.append(receiver.recv())
            receiver.close()
        assert sorted(codes) == [0] + [73] * (contenders - 1)
        assert connects(path)
        end.wait(DEADLINE_S)
        for process in processes:
            process.join(DEADLINE_S)
            assert process.exitcode == 0


def waits_for_a_lock(pid: int) -> bool:
    """As /proc/locks says (proc(5))."""
    with open("/proc/locks") as file:
        return any("->" in line and str(pid) in line.split() for line in file)


@pytest.mark.parametrize("moment", ["unlink", "listen"])
def test_of_daemons_that_start_one_amid_the_other_one_wins(
    path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one starts when the first has found a stale socket and is about to remove it, or has bound its own
    and is about to listen. It may win or lose or wait, but not share."""
    listening(path).close()
    start, end = fork.Barrier(2), fork.Barrier(2)
    receiver, sender = fork.Pipe(duplex=False)
    second = fork.Process(target=_bind, args=(str(path), start, end, sender))
    second.start()
    owner: object = os if moment == "unlink" else socket.socket
    real: Callable[..., object] = getattr(owner, moment)

    def second_first(*arguments: object) -> object:
        monkeypatch.setattr(owner, moment, real)
        start.wait(DEADLINE_S)
        assert second.pid is not None
        deadline = time.monotonic() + DEADLINE_S
        while not receiver.poll(0.001) and not waits_for_a_lock(second.pid):
            assert time.monotonic() < deadline
        return real(*arguments)

    monkeypatch.setattr(owner, moment, second_first)
    first: Listener | None = None
    try:
        first = Listener(str(path))
        codes = [0]
    except Error as error:
        codes = [error.exit_code]
    assert receiver.poll(DEADLINE_S)
    codes.append(receiver.recv())
    assert sorted(codes) == [0, 73]
    assert connects(path)
    end.wait(DEADLINE_S)
    second.join(DEADLINE_S)
    receiver.close()
    sender.close()
    if first:
        first.close()


# --- who may connect -------------------------------------------------------------------------------------------------


def _connect(path: str, uid: int, gid: int, groups: list[int], result: Connection) -> None:
    """Become somebody, connect, and tell what comes until the end."""
    os.setgroups(groups)
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(DEADLINE_S)
        client.connect(path)
        received = b""
        while data := client.recv(65536):
            received += data
    result.send(received)


class Peer:
    """A process of another user that connects, and waits until it is dismissed."""

    def __init__(self, path: Path, uid: int, gid: int, groups: list[int]) -> None:
        self._result, sender = fork.Pipe(duplex=False)
        self._process = fork.Process(target=_connect, args=(str(path), uid, gid, groups, sender))
        self._process.start()
        sender.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def is_done(self) -> bool:
        return self._result.poll()

    def received(self) -> bytes:
        assert self._result.poll(DEADLINE_S)
        data: bytes = self._result.recv()
        self._result.close()
        self._process.join(DEADLINE_S)
        assert self._process.exitcode == 0
        return data


class Door:
    """What a listener delivers: it welcomes and dismisses everybody."""

    def __init__(self) -> None:
        self.clients: list[tuple[int, int, int]] = []

    def deliver(self, descriptor: int, pid: int, uid: int, gid: int) -> None:
        self.clients.append((pid, uid, gid))
        with socket.socket(fileno=descriptor) as client:
            client.sendall(WELCOME)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.001)


def serve(opened: Listener, condition: Callable[[Door], object]) -> Door:
    """Open the door until the condition holds. No callback of the loop may fail, and no descriptor stay open."""
    door = Door()
    failures: list[dict[str, object]] = []

    async def accept() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: failures.append(context))
        opened.open(door.deliver)
        try:
            await until(lambda: failures or condition(door))
        finally:
            opened.shut()

    before = len(os.listdir("/proc/self/fd"))
    asyncio.run(accept())
    assert failures == []
    assert len(os.listdir("/proc/self/fd")) == before
    return door


@pytest.fixture
def ours(path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Listener]:
    """A listener for group OURS, whose socket's mode lets everybody in: the check alone decides."""
    monkeypatch.setattr(listener_module, "group_id", lambda _name: OURS)
    opened = Listener(str(path))
    path.chmod(0o666)
    yield opened
    opened.close()


MANY_GROUPS = list(range(100_000, 100_300))


@needs_root
@pytest.mark.parametrize(
    ("uid", "gid", "groups"),
    [
        (0, 0, []),
        (0, NOBODY, []),
        (NOBODY, OURS, []),
        (NOBODY, NOBODY, [OURS]),
        (NOBODY, NOBODY, [1, 2, 3, OURS, 2**31]),
        (NOBODY, NOBODY, [*MANY_GROUPS, OURS]),
    ],
    ids=["root", "root of another group", "primary group", "other group", "among groups", "among many groups"],
)
def test_root_and_members_may_connect(ours: Listener, path: Path, uid: int, gid: int, groups: list[int]) -> None:
    peer = Peer(path, uid, gid, groups)
    door = serve(ours, lambda _door: peer.is_done)
    assert door.clients == [(peer.pid, uid, gid)]
    assert peer.received() == WELCOME


@needs_root
@pytest.mark.parametrize("groups", [[], [1, OURS - 1, OURS + 1], MANY_GROUPS], ids=["none", "some", "many"])
def test_others_are_told_why_not_and_sent_away(ours: Listener, path: Path, groups: list[int]) -> None:
    peer = Peer(path, NOBODY, NOBODY, groups)
    door = serve(ours, lambda _door: peer.is_done)
    assert door.clients == []
    frame = peer.received()
    assert frame[: HEADER.size] == HEADER.pack(len(frame) - HEADER.size)
    refusal = Codec("client", "control", "client").decode(frame[HEADER.size :])
    assert isinstance(refusal, Failure)
    assert refusal.id is None
    assert refusal.code == "not_permitted"
    assert refusal.message == f"user {NOBODY} (process {peer.pid}) may not use {path}"
    assert refusal.hint == "become root or a member of group mcrelay"


@needs_root
def test_nobody_is_sent_into_a_group_that_is_not_there(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener_module, "group_id", lambda _name: None)
    opened = Listener(str(path))
    path.chmod(0o666)
    peer = Peer(path, NOBODY, NOBODY, [])
    serve(opened, lambda _door: peer.is_done)
    refusal = Codec("client", "control", "client").decode(peer.received()[HEADER.size :])
    assert isinstance(refusal, Failure)
    assert refusal.hint == "become root, or whoever runs the daemon"
    opened.close()


def _try_to_connect(path: str, result: Connection) -> None:
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        result.send(client.connect_ex(path))


@needs_root
def test_the_mode_keeps_others_out_already(path: Path) -> None:
    opened = Listener(str(path))
    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=_try_to_connect, args=(str(path), sender))
    process.start()
    assert receiver.poll(DEADLINE_S)
    assert receiver.recv() == errno.EACCES
    process.join(DEADLINE_S)
    receiver.close()
    sender.close()
    opened.close()


@needs_root
def test_one_who_may_not_delays_nobody(ours: Listener, path: Path) -> None:
    strangers = [Peer(path, NOBODY, NOBODY, []) for _ in range(3)]
    friend = Peer(path, NOBODY, OURS, [])
    door = serve(ours, lambda _door: friend.is_done and all(stranger.is_done for stranger in strangers))
    assert [client[0] for client in door.clients] == [friend.pid]
    assert friend.received() == WELCOME
    assert all(WELCOME not in stranger.received() for stranger in strangers)


def connected(path: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client.settimeout(DEADLINE_S)
    client.connect(str(path))
    return client


def test_clients_wait_until_the_door_opens_and_while_it_is_shut(path: Path) -> None:
    opened = Listener(str(path))
    count = 2 * ACCEPTS_PER_TURN + 1
    for _ in range(2):
        clients = [connected(path) for _ in range(count)]
        clients[0].setblocking(False)
        with pytest.raises(BlockingIOError):
            clients[0].recv(1)
        clients[0].settimeout(DEADLINE_S)
        door = serve(opened, lambda door: len(door.clients) == count)
        assert door.clients == [(os.getpid(), os.geteuid(), os.getegid())] * count
        for client in clients:
            assert client.recv(100) == WELCOME
            client.close()
    opened.close()


def test_a_client_that_went_away_while_it_waited_is_nobody_to_fear(path: Path) -> None:
    opened = Listener(str(path))
    connected(path).close()
    client = connected(path)

    class Silent(Door):
        def deliver(self, descriptor: int, pid: int, uid: int, gid: int) -> None:
            self.clients.append((pid, uid, gid))
            os.close(descriptor)

    silent = Silent()

    async def accept() -> None:
        opened.open(silent.deliver)
        opened.open(silent.deliver)  # a second time means nothing
        await until(lambda: len(silent.clients) == 2)
        opened.shut()
        opened.shut()

    asyncio.run(accept())
    client.close()
    opened.close()

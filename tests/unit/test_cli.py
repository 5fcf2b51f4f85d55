"""The command line and the client, against daemons that are not there, fake or hostile, and the daemon's own refusals
before it opens anything. What is typed runs as the installed program, in a process of its own.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pwd
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import click
import pytest
from click.shell_completion import ShellComplete

from lab.program import PROGRAM, run_program
from mcrelay import __version__, service
from mcrelay.api import (
    PROTOCOL,
    Add,
    Added,
    Failure,
    GetStats,
    GetVersion,
    GetWorkers,
    Hello,
    ListRules,
    LogLevels,
    Pause,
    Paused,
    Ping,
    Pong,
    Remove,
    Removed,
    Restarted,
    RestartWorker,
    RuleFacts,
    Rules,
    RuleStats,
    SetLogLevels,
    Stats,
    Upgrade,
    Upgraded,
    Version,
    Workers,
)
from mcrelay.cli import cli
from mcrelay.client import DEFAULT_SOCKET, Client
from mcrelay.codec import Codec, encode
from mcrelay.errors import EXIT_CODES, Busy, Error, NotPermitted, Unavailable, UsageError
from mcrelay.frames import FRAME_MAX, HEADER, FrameReader, Malformed
from mcrelay.handshake import welcome
from mcrelay.messages import Message, Shutdown
from mcrelay.process import check_privileges

DEADLINE_S = 20.0
NOBODY = 65534


def lacking() -> str:
    """Why a daemon cannot run here."""
    try:
        check_privileges()
    except NotPermitted as error:
        return error.message
    return "" if os.geteuid() == 0 else "needs root, to become somebody else"


needs_root = pytest.mark.skipif(bool(lacking()), reason=lacking())

INPUT = "239.1.1.1:5000%eth0"
OUTPUT = "239.2.2.2:6000%eth1"
CLIENT_COMMANDS = {
    "add": ["add", INPUT, OUTPUT],
    "remove": ["remove", "feed-a"],
    "pause": ["pause", "feed-a", "1"],
    "resume": ["resume", "feed-a"],
    "list": ["list"],
    "stats": ["stats"],
    "workers": ["workers"],
    "restart-worker": ["restart-worker", "0"],
    "upgrade": ["upgrade"],
    "log": ["log", "debug", "links=info"],
    "trace": ["trace", "feed-a"],
    "capture": ["capture", "feed-a", "-w", "-"],
    "ping": ["ping"],
    "version": ["version"],
    "diff": ["diff"],
    "events": ["events"],
    "health": ["health"],
    "apply": ["apply"],
    "save": ["save"],
}


@pytest.fixture
def directory() -> Iterator[Path]:
    """One that everybody can reach, with a name short enough for a socket's path."""
    path = Path(tempfile.mkdtemp(prefix="mcrelay-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def path(directory: Path) -> Path:
    return directory / "control.sock"


def execute(arguments: Sequence[object], **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name != "MCRELAY_SOCKET"}
    return subprocess.run(
        [str(argument) for argument in arguments],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        env={**clean, **environment},
        check=False,
    )


def mcrelay(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    if environment:
        return execute([PROGRAM, *arguments], **environment)
    return run_program([str(argument) for argument in arguments], timeout=DEADLINE_S, without=["MCRELAY_SOCKET"])


def mcrelay_as(uid: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The program in the hands of another user, who need not be able to read where it is installed."""
    return as_user(uid, "mcrelay.cli.main()", *arguments)


def as_user(uid: int, code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    preparation = (
        "import os, sys, mcrelay.cli, mcrelay.process, mcrelay.service; os.setgroups([]); "
        f"os.setresgid({uid}, {uid}, {uid}); os.setresuid({uid}, {uid}, {uid}); "
    )
    return execute([sys.executable, "-c", preparation + code, *arguments])


def check_error(result: subprocess.CompletedProcess[str], exit_code: int, *words: str, output: str = "") -> None:
    """One line that says what is wrong and what to do, and nothing else."""
    assert result.returncode == exit_code, result.stderr
    assert result.stdout == output
    assert re.fullmatch(r"mcrelay: [^\n]+; [^\n]+\n", result.stderr)
    for word in words:
        assert word in result.stderr


OWN_VERSION = {"version": f"mcrelay {__version__}\n"}  # also without a daemon

# --- without a daemon ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", CLIENT_COMMANDS)
def test_without_a_daemon_a_command_says_how_to_start_one(path: Path, command: str) -> None:
    result = mcrelay(*CLIENT_COMMANDS[command], "--socket", path)
    check_error(result, 69, str(path), "No such file", "start one: mcrelay run", output=OWN_VERSION.get(command, ""))


def test_the_socket_may_come_from_the_environment(path: Path) -> None:
    check_error(mcrelay("ping", MCRELAY_SOCKET=str(path)), 69, str(path))
    check_error(mcrelay("ping", "--socket", f"{path}-2", MCRELAY_SOCKET=str(path)), 69, f"{path}-2")
    assert DEFAULT_SOCKET in mcrelay("ping", "--help").stdout


def make_file(path: Path) -> None:
    path.touch()


def make_directory(path: Path) -> None:
    path.mkdir()


def make_stale_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.bind(str(path))


@pytest.mark.parametrize("make", [make_file, make_directory, make_stale_socket])
def test_what_does_not_listen_is_no_daemon(path: Path, make: Callable[[Path], None]) -> None:
    make(path)
    check_error(mcrelay("ping", "--socket", path), 69, str(path), "Connection refused", "start one: mcrelay run")


def test_a_path_that_cannot_be_a_socket_is_no_daemon() -> None:
    check_error(mcrelay("ping", "--socket", "/tmp/" + "x" * 200), 69, "start one")


@needs_root
def test_a_user_who_may_not_connect_is_told_so(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.bind(str(path))
        sock.listen()
        path.chmod(0o660)
        result = mcrelay_as(NOBODY, "ping", "--socket", path)
    check_error(result, 77, f"not permitted to use {path}", "member of the socket's group")


def test_programs_are_told_that_there_is_no_daemon(path: Path) -> None:
    found = json.loads(mcrelay("health", "--json", "--socket", path).stdout)
    assert (found["status"], str(path) in found["reasons"][0]) == ("failing", True)
    found = json.loads(mcrelay("version", "--json", "--socket", path).stdout)
    assert found == {"client": __version__, "daemon": None, "protocol": None}
    (problem,) = json.loads(mcrelay("check", "--json", path).stdout)["problems"]
    assert problem["what"] == f"cannot read {path}: No such file or directory"


# --- usage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("", "mcrelay --help"),
        ("unknown", "No such command 'unknown'"),
        ("--unknown", "No such option"),
        ("add", "Missing argument 'INPUT'"),
        (f"add {INPUT}", "Missing argument 'OUTPUTS"),
        (f"add {INPUT} {OUTPUT} --name", "--name"),
        (f"add {INPUT} {OUTPUT} --unknown", "--unknown"),
        ("remove", "Missing argument"),
        ("remove a b", "unexpected extra argument"),
        ("list a", "unexpected extra argument"),
        ("stats --watch=yes", "--watch"),
        ("workers a", "unexpected extra argument"),
        ("trace", "Missing argument 'NAME|ID'"),
        ("trace a --count -1", "--count"),
        ("trace a --snap-length 65576", "0<=x<=65575"),
        ("capture a", "Missing option '-w' / '--write'"),
        ("capture a -w - --count 0", "--count"),
        ("capture a -w - --seconds 0", "--seconds"),
        ("capture a -w - --snap-length 0", "1<=x<=65575"),
        ("ping --socket", "--socket"),
        ("ping --sockt /x", "--socket"),
        ("version a", "unexpected extra argument"),
        ("run a", "unexpected extra argument"),
        ("run --workers x", "'x' is not a valid whole number"),
        ("run --ring-mib x", "'x' is not a valid whole number; see 'mcrelay run --help'"),
        ("import", "Missing argument 'FORMAT'. Write one of mcr, smcroute, "),
        ("run --workers 1.5", "--workers"),
        ("run --workers ''", "--workers"),
        ("run --engine unknown", "'auto', 'uring', 'reference'"),
        ("run --ingress unknown", "'ring', 'recv'"),
        ("run --ring-mib 0", "--ring-mib"),
        ("run --ring-mib 1025", "1<=x<=1024"),
        ("run --latency-budget-us -1", "--latency-budget-us"),
        ("run --latency-budget-us 10001", "0<=x<=10000"),
        ("run --latency-budget-us 0.5", "--latency-budget-us"),
        ("run --busy-poll=yes", "--busy-poll"),
        ("run --engine ''", "--engine"),
        ("top --interval 0", "--interval"),
        ("top --interval nan", "--interval"),
        ("re x", "'re' may be "),
        ("re x", "remove, restart-worker or resume"),
        ("statistics", "No such command 'statistics'; did you mean 'stats'?"),
        ("lsit", "did you mean 'list'?"),
        ("explain", "Missing argument 'INPUT'"),
        (f"explain {INPUT} --seconds 0", "--seconds"),
        (f"explain {INPUT} --seconds nan", "no number of seconds"),
        (f"explain {INPUT} --seconds inf", "--seconds"),
        ("doctor --seconds nan", "no number of seconds"),
        ("doctor a", "unexpected extra argument"),
        ("doctor --seconds x", "--seconds"),
    ],
)
def test_a_command_line_that_is_none_is_refused(line: str, word: str) -> None:
    check_error(mcrelay(*shlex.split(line)), 64, word, "--help'")


HELP = {
    "run": "mcrelay run --rootless",
    "check": "Examples: mcrelay check ./mcrelay.toml",
    "diff": "Example: mcrelay diff && echo",
    "apply": "Example: mcrelay apply --dry-run",
    "save": "&& mcrelay save",
    "schema": "Example: mcrelay schema >",
    "import": "Examples: mcrelay import smcroute /etc/smcroute.conf",
    "add": "239.2.2.2:6000%eth1,ttl=8",
    "remove": "Example: mcrelay remove feed-a",
    "pause": "Example: mcrelay pause feed-a 239.2.2.2:6000%eth1",
    "resume": "Example: mcrelay resume feed-a",
    "list": "Example: mcrelay list --json",
    "stats": "Example: mcrelay stats --watch",
    "top": "Example: mcrelay top",
    "workers": "Example: mcrelay workers",
    "restart-worker": "Example: mcrelay restart-worker 0",
    "upgrade": "Example: mcrelay upgrade",
    "events": "Examples: mcrelay events",
    "log": "mcrelay log links=debug clients=warning",
    "health": "Example: mcrelay health || systemctl restart mcrelay",
    "trace": "Example: mcrelay trace feed-a",
    "capture": "Example: mcrelay capture feed-a -w - | tshark -r -",
    "ping": "Example: mcrelay ping",
    "version": "Example: mcrelay version",
    "send": "Example: mcrelay send 239.1.1.1:5000%eth0",
    "receive": "Example: mcrelay receive 239.2.2.2:6000%eth1",
    "explain": "Example: sudo mcrelay explain 239.1.1.1:5000%eth0",
    "doctor": "Example: sudo mcrelay doctor",
}
WITHOUT_DAEMON = {"send", "receive", "check", "schema", "import"}
ON_TERMINALS = {"top"}
DIAGNOSES = {"explain", "doctor"}  # to which a daemon that is not there is a finding


def test_every_command_has_its_help_tested() -> None:
    assert set(cli.commands) == set(HELP)
    assert set(CLIENT_COMMANDS) == set(HELP) - {"run"} - WITHOUT_DAEMON - DIAGNOSES - ON_TERMINALS


@pytest.mark.parametrize("command", HELP)
def test_help_shows_how_it_is_used(command: str) -> None:
    result = mcrelay(command, "--help")
    assert result.returncode == 0
    assert result.stderr == ""
    assert result.stdout.startswith(f"Usage: mcrelay {command} ")
    assert HELP[command] in result.stdout
    assert ("--socket PATH" in result.stdout) == (command not in WITHOUT_DAEMON)
    assert ("--json" in result.stdout) == (command not in ("run", "capture", "schema", "import", "top"))
    assert "None" not in result.stdout


def test_help_of_the_program_shows_the_commands() -> None:
    result = mcrelay("-h")
    assert result.returncode == 0
    assert "mcrelay add 239.1.1.1:5000%eth0 239.2.2.2:6000%eth1,ttl=8" in result.stdout
    for command in HELP:
        assert f"\n  {command} " in result.stdout


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


def test_every_help_has_an_example() -> None:
    found = dict(commands(cli))
    assert ("add",) in found
    without = [" ".join(path) for path, command in found.items() if "Example" not in (command.help or "")]
    assert without == []


def test_the_version_needs_no_daemon() -> None:
    result = mcrelay("--version")
    assert (result.returncode, result.stdout, result.stderr) == (0, f"mcrelay {__version__}\n", "")


def test_a_command_may_be_abbreviated(path: Path) -> None:
    check_error(mcrelay("li", "--socket", path), 69, str(path))
    help_text = mcrelay("rem", "--help").stdout
    assert help_text == mcrelay("remove", "--help").stdout
    assert help_text.startswith("Usage: mcrelay remove ")


def completed(words: list[str], typed: str) -> list[str]:
    completions = ShellComplete(cli, {}, "mcrelay", "_MCRELAY_COMPLETE").get_completions(words, typed)
    return [item.value for item in completions]


@pytest.mark.parametrize("typed", ["", "st", "stats", "li", "re"])
def test_completion_has_each_command_once(typed: str) -> None:
    completed = [
        item.value for item in ShellComplete(cli, {}, "mcrelay", "_MCRELAY_COMPLETE").get_completions([], typed)
    ]
    assert completed == sorted(name for name in cli.commands if name.startswith(typed))


def test_options_of_an_abbreviated_command_are_completed() -> None:
    assert completed(["li"], "--s") == ["--socket"]
    completed(["re"], "--s")  # may be several: whatever comes, it is no error
    completed(["nothing"], "--s")


def test_top_needs_a_terminal(path: Path) -> None:
    check_error(mcrelay("top", "--socket", path), 64, "top needs a terminal", "mcrelay stats --watch --json")


# --- a daemon that cannot start --------------------------------------------------------------------------------------


def tree(directory: Path) -> list[str]:
    return sorted(str(entry) for entry in directory.rglob("*"))


def check_does_not_start(directory: Path, exit_code: int, arguments: Sequence[object], *words: str) -> None:
    before = tree(directory)
    check_error(mcrelay("run", *arguments), exit_code, *words)
    assert tree(directory) == before


CORES = sorted(os.sched_getaffinity(0))


REFUSED_CORES = [
    *(
        (["--cores", text], [f"--cores {text!r} is not a list of cores", "for example, 0,2-3"])
        for text in ("", "x", "1-", "-1", "0,,1", "0,", "1-0", "0x1", " 0", "4096", "0-99999999999", "\u0661", "0-1-2")
    ),
    (["--cores", f"{CORES[0]},{CORES[0]}"], ["names a core twice", "one worker per core"]),
    (["--cores", "4095"], ["--cores 4095: core 4095 is not there", f"use some of {CORES[0]}"]),
    (["--cores", f"{CORES[0]}", "--workers", "2"], [f"--workers 2 and --cores {CORES[0]} disagree", "one of them"]),
    *(
        (["--workers", f"{number}"], [f"--workers {number}", f"a number from 1 to {len(CORES)}"])
        for number in (0, -1, len(CORES) + 1, 10**20)
    ),
]


@pytest.mark.parametrize(("arguments", "words"), [*REFUSED_CORES, (["--metrics", "9478"], ["is not ADDRESS:PORT"])])
def test_what_cannot_be_is_refused_before_anything_is_done(
    arguments: list[str], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "run", None)
    with pytest.raises(UsageError) as refusal:
        cli.main(["run", *arguments], standalone_mode=False)
    assert all(word in str(refusal.value) for word in words)


@needs_root
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        REFUSED_CORES[0],
        REFUSED_CORES[-1],
        (["--user", "root"], ["--user root: workers do not run as root", "unprivileged"]),
        (["--user", "nobody-of-that-name"], ["--user nobody-of-that-name: there is no such user", "getent passwd"]),
        (["--socket", "relative"], ["--socket 'relative' is not possible", "an absolute path"]),
        (["--socket", ""], ["--socket '' is not possible", "an absolute path"]),
        (["--socket", "/tmp/" + "x" * 103], ["is not possible", "up to 107 bytes"]),
    ],
)
def test_a_daemon_refuses_what_cannot_be(
    directory: Path, path: Path, arguments: list[object], words: list[str]
) -> None:
    socket_option = [] if "--socket" in arguments else ["--socket", path]
    check_does_not_start(directory, 64, [*arguments, *socket_option], *words)


@needs_root
@pytest.mark.parametrize(
    ("make", "name", "words"),
    [
        (make_file, "control.sock", ["exists and is not a socket", "move it away"]),
        (make_directory, "control.sock", ["exists and is not a socket", "move it away"]),
        (make_file, "control.sock/below", ["cannot use", "choose another: --socket PATH"]),
    ],
)
def test_a_daemon_refuses_a_socket_that_cannot_be(
    directory: Path, path: Path, make: Callable[[Path], None], name: str, words: list[str]
) -> None:
    make(path)
    check_does_not_start(directory, 73, ["--socket", directory / name], str(path), *words)


@needs_root
def test_a_daemon_refuses_a_socket_in_use(directory: Path, path: Path) -> None:
    with fake_daemon(path, answering(lambda request: [Pong(id=1)])):
        check_does_not_start(directory, 73, ["--socket", path], f"another mcrelay already listens on {path}", "stop it")
        Client(str(path), timeout_s=DEADLINE_S).ping()


@needs_root
def test_a_daemon_needs_privilege(directory: Path, path: Path) -> None:
    result = mcrelay_as(NOBODY, "run", "--socket", path)
    check_error(result, 77, "CAP_NET_RAW and CAP_NET_ADMIN", "as root or with sudo")
    assert tree(directory) == []


@needs_root
@pytest.mark.parametrize("missing", ["net_raw", "net_admin"])
def test_a_daemon_says_which_privilege_it_lacks(directory: Path, path: Path, missing: str) -> None:
    """Root without a capability, as in a container."""
    result = execute(["setpriv", f"--bounding-set=-{missing}", PROGRAM, "run", "--socket", path])
    check_error(result, 77, f"mcrelay run lacks CAP_{missing.upper()}")
    assert tree(directory) == []


@needs_root
def test_a_user_without_a_name_may_run_a_daemon() -> None:
    """Containers run as any number, with capabilities and no entry in /etc/passwd."""
    uid = next(uid for uid in range(54321, 60000) if uid not in {entry.pw_uid for entry in pwd.getpwall()})
    result = as_user(uid, "print(mcrelay.process.identity(None))")
    assert result.returncode == 0, result.stderr
    assert f"uid={uid}, gid={uid}" in result.stdout


# --- daemons that are not ours ---------------------------------------------------------------------------------------

Serve = Callable[[socket.socket], None]


@contextlib.contextmanager
def fake_daemon(path: Path, serve: Serve) -> Iterator[None]:
    """A socket at `path` whose clients are served by `serve`, one after the other, on a thread."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.bind(str(path))
    listening.listen()
    failures: list[Exception] = []

    def accept() -> None:
        while True:
            try:
                client, _address = listening.accept()
            except OSError:
                return  # shut down
            client.settimeout(DEADLINE_S)
            with client:
                try:
                    serve(client)
                except (BrokenPipeError, ConnectionResetError):
                    pass  # the client has gone
                except Exception as error:
                    failures.append(error)

    thread = threading.Thread(target=accept)
    thread.start()
    try:
        yield
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        thread.join(DEADLINE_S)
        listening.close()
    assert not thread.is_alive()
    assert failures == []


def requests(client: socket.socket) -> Iterator[Message]:
    """What a client asks, once it has said hello, until it goes."""
    reader = FrameReader()
    codec = Codec("client", "client", "control")
    while data := client.recv(65536):
        for frame in reader.feed(data):
            assert not isinstance(frame, Malformed)
            request = codec.decode(frame)
            if isinstance(request, Hello):
                client.sendall(encode(welcome(request, is_first=True)))
            else:
                yield request


def answering(answer: Callable[[Message], Sequence[Message]]) -> Serve:
    def serve(client: socket.socket) -> None:
        for request in requests(client):
            for reply in answer(request):
                client.sendall(encode(reply))

    return serve


def sending(data: bytes) -> Serve:
    """Reads the request, sends some bytes and closes."""

    def serve(client: socket.socket) -> None:
        next(requests(client))
        client.sendall(data)

    return serve


def closing_at_once(client: socket.socket) -> None:
    pass


def silent(client: socket.socket) -> None:
    """Reads all and says nothing."""
    for _request in requests(client):
        pass


WRONG_ANSWERS: dict[str, tuple[Serve, int, str]] = {
    "closes at once": (closing_at_once, 69, "the daemon at "),
    "closes": (sending(b""), 69, "closed the connection"),
    "closes inside a frame": (sending(encode(Pong(id=1))[:-1]), 69, "closed the connection"),
    "garbage": (sending(HEADER.pack(7) + b"garbage"), 76, "cannot be read"),
    "another protocol": (sending(b"HTTP/1.1 400 Bad Request\r\n\r\n"), 76, "cannot be read"),
    "too large a frame": (sending(HEADER.pack(FRAME_MAX + 1)), 76, "at most"),
    "an empty frame": (sending(HEADER.pack(0)), 76, "cannot be read"),
    "no answer to this": (sending(encode(Version(id=1, version="1", protocol=1))), 76, "answered with Version"),
    "an internal message": (sending(encode(Shutdown())), 76, "cannot be read"),
    "a request": (sending(encode(Ping(id=1))), 76, "cannot be read"),
    "an unknown field": (
        sending(encode(Pong(id=1)).replace(b"}", b',"a":1}').replace(b"\x18", b"\x1e")),
        76,
        "same version",
    ),
}


@pytest.mark.parametrize("what", WRONG_ANSWERS)
def test_a_daemon_that_answers_wrong_is_an_error_and_not_a_crash(path: Path, what: str) -> None:
    serve, exit_code, words = WRONG_ANSWERS[what]
    with fake_daemon(path, serve):
        check_error(mcrelay("ping", "--socket", path), exit_code, words)


@pytest.mark.parametrize(("code", "exit_code"), [*EXIT_CODES.items(), ("of a later version", 70)])
def test_a_refusal_has_its_exit_code(path: Path, code: str, exit_code: int) -> None:
    failure = Failure(id=1, code=code, message="it cannot be", hint="do something else")
    with fake_daemon(path, answering(lambda request: [failure])), Client(str(path), timeout_s=DEADLINE_S) as client:
        with pytest.raises(Error) as refusal:
            client.ping()
        assert (refusal.value.message, refusal.value.hint) == ("it cannot be", "do something else")
        assert refusal.value.exit_code == exit_code


def test_a_refusal_is_printed_with_its_hint(path: Path) -> None:
    failure = Failure(id=1, code="bad_rule", message="it cannot be", hint="do something else")
    with fake_daemon(path, answering(lambda request: [failure])):
        check_error(mcrelay("remove", "x", "--socket", path), 65, "it cannot be; do something else")


def test_a_refusal_of_what_the_daemon_could_not_read_is_an_answer(path: Path) -> None:
    failure = Failure(id=None, code="protocol", message="malformed request", hint="see docs/protocol.md")
    with fake_daemon(path, answering(lambda request: [failure])):
        check_error(mcrelay("ping", "--socket", path), 76, "malformed request; see docs/protocol.md")


def test_a_daemon_that_never_answers_is_given_up(path: Path) -> None:
    with fake_daemon(path, silent), Client(str(path), timeout_s=0.2) as client:
        started = time.monotonic()
        with pytest.raises(Unavailable, match=f"the daemon at {path} does not answer"):
            client.ping()
        assert 0.1 < time.monotonic() - started < DEADLINE_S / 2


def test_a_daemon_that_does_not_accept_is_given_up(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        listening.bind(str(path))
        listening.listen()
        with pytest.raises(Unavailable, match="does not answer"):
            Client(str(path), timeout_s=0.2)


def test_a_daemon_with_too_many_clients_waiting_is_busy_and_not_away(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening, contextlib.ExitStack() as waiting:
        listening.bind(str(path))
        listening.listen(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                client = waiting.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                client.setblocking(False)
                client.connect(str(path))
        with pytest.raises(Busy, match=f"the daemon at {path}") as refusal:
            Client(str(path), timeout_s=0.2)
        assert "start one" not in str(refusal.value)


def test_an_answer_that_comes_too_late_is_not_taken_for_the_next(path: Path) -> None:
    def serve(client: socket.socket) -> None:
        asked = list(itertools.islice(requests(client), 2))
        for request, version in zip(asked, ("late", "in time"), strict=False):
            assert isinstance(request, GetVersion)
            client.sendall(encode(Version(id=request.id, version=version, protocol=1)))
        silent(client)

    with fake_daemon(path, serve), Client(str(path), timeout_s=0.2) as client:
        with pytest.raises(Unavailable):
            client.version()
        # To have closed the connection for good is as right as to wait for the answer.
        with contextlib.suppress(Unavailable):
            assert client.version().version == "in time"


def test_an_answer_in_many_pieces_is_an_answer(path: Path) -> None:
    def serve(client: socket.socket) -> None:
        for request in requests(client):
            assert isinstance(request, Ping)
            for byte in encode(Pong(id=request.id)):
                client.sendall(bytes([byte]))

    with fake_daemon(path, serve), Client(str(path), timeout_s=DEADLINE_S) as client:
        client.ping()
        client.ping()


def test_a_request_that_cannot_be_sent_says_why(path: Path) -> None:
    with fake_daemon(path, silent), Client(str(path), timeout_s=DEADLINE_S) as client:
        with pytest.raises(Error, match="fewer or shorter") as refusal:
            client.add(INPUT, ["x" * FRAME_MAX])
        assert refusal.value.exit_code == 64


def test_a_text_that_is_no_unicode_is_refused(path: Path) -> None:
    """Such a word comes from a command line in another encoding. More or shorter outputs would not help."""
    with fake_daemon(path, silent), Client(str(path), timeout_s=DEADLINE_S) as client:
        with pytest.raises(Error) as refusal:
            client.remove(os.fsdecode(b"feed-\xff"))
        assert refusal.value.exit_code in (64, 65)
        assert "outputs" not in str(refusal.value)


def test_a_user_who_is_refused_by_the_daemon_is_told_so(path: Path) -> None:
    """The supervisor, and a control plane with too many clients, say so and close before anything is asked."""
    refused = Failure(id=None, code="not_permitted", message="user 7 may not", hint="become root")

    def serve(client: socket.socket) -> None:
        client.sendall(encode(refused))

    with fake_daemon(path, serve), pytest.raises(NotPermitted, match="user 7 may not"):
        Client(str(path), timeout_s=DEADLINE_S)


# --- what is printed -------------------------------------------------------------------------------------------------

RULES = tuple(
    RuleFacts(
        id=f"{n:012x}",
        name=f"feed-{n}" if n % 2 else None,
        input=f"239.1.1.{n}:5000%eth0",
        outputs=(OUTPUT,),
        state="pending" if n == 3 else "active",
        problems=("there is no interface 'eth0'",) if n == 3 else (),
    )
    for n in range(5)
)


def playing(request: Message) -> list[Message]:
    """A daemon with five rules, of which it tells two at a time."""
    match request:
        case Ping():
            return [Pong(id=request.id)]
        case GetVersion():
            return [Version(id=request.id, version="9.9.9", protocol=PROTOCOL)]
        case Add():
            facts = RuleFacts("0" * 12, request.name, request.input, request.outputs, state="active", problems=())
            return [Added(id=request.id, rule=facts, generation=7, workers=2)]
        case Remove():
            return [Removed(id=request.id, rule=RULES[1], generation=8, workers=1)]
        case Pause():
            return [Paused(id=request.id, rule=RULES[1], generation=8, workers=1)]
        case ListRules() | GetStats():
            seen = [rule.id for rule in RULES].index(request.after) + 1 if request.after else 0
            page, more = RULES[seen : seen + 2], seen + 2 < len(RULES)
            if isinstance(request, ListRules):
                return [Rules(id=request.id, generation=7, rules=page, interfaces=(), more=more)]
            stats = tuple(
                RuleStats(
                    r.id, r.name, r.input, 1, 2, forwarded=1, dropped=0, own=0, looped=0, suspensions=0, outputs=()
                )
                for r in page
            )
            return [Stats(id=request.id, generation=7, workers=(), rules=stats, more=more, frames_malformed=3)]
        case RestartWorker():
            return [Restarted(id=request.id, index=request.index, pid=77)]
        case Upgrade():
            return [Upgraded(id=request.id, pid=78)]
        case SetLogLevels(level="debug"):
            known = ("clients", "links")
            return [LogLevels(id=request.id, level="debug", components={"links": "info"}, known=known)]
        case GetWorkers():
            return [Workers(id=request.id, processes=())]
    raise AssertionError(request)


@pytest.fixture
def player(path: Path) -> Iterator[Path]:
    with fake_daemon(path, answering(playing)):
        yield path


def test_long_lists_are_asked_for_until_their_end(player: Path) -> None:
    with Client(str(player), timeout_s=DEADLINE_S) as client:
        assert tuple(client.rules()) == RULES
        stats = client.stats()
        assert [rule.id for rule in stats.rules] == [rule.id for rule in RULES]
        assert not stats.more


# The fields that programs rely on.
JSON = {
    "add": {"rule", "generation", "workers"},
    "remove": {"rule", "generation", "workers"},
    "pause": {"rule", "generation", "workers"},
    "resume": {"rule", "generation", "workers"},
    "list": {"generation", "rules", "interfaces"},
    "stats": {"generation", "workers", "rules", "frames_malformed"},
    "workers": {"processes"},
    "restart-worker": {"index", "pid"},
    "upgrade": {"pid"},
    "log": {"level", "components", "known"},
    "version": {"client", "daemon", "protocol"},
}


@pytest.mark.parametrize("command", JSON)
def test_json_has_the_fields_that_programs_rely_on(player: Path, command: str) -> None:
    result = mcrelay(*CLIENT_COMMANDS[command], "--json", "--socket", player)
    assert (result.returncode, result.stderr) == (0, "")
    assert set(json.loads(result.stdout)) == JSON[command]


DIAGNOSIS = {
    "explain": (["explain", "239.1.1.1:5000%lo", "--seconds", "0.1"], {"input", "seconds", "holds", "findings"}),
    "doctor": (["doctor", "--seconds", "0.1"], {"seconds", "holds", "findings"}),
}


@pytest.mark.parametrize("command", sorted(DIAGNOSES))
def test_a_diagnosis_says_that_there_is_no_daemon(path: Path, command: str) -> None:
    arguments, fields = DIAGNOSIS[command]
    result = mcrelay(*arguments, "--json", "--socket", path)
    assert (result.returncode, result.stderr) == (1, "")
    document = json.loads(result.stdout)
    assert set(document) == fields
    assert document["holds"] is False
    assert set(document["findings"][0]) == {"step", "verdict", "fact", "remedy"}
    assert document["findings"][0]["step"] == "daemon"
    assert document["findings"][0]["remedy"] == f"sudo mcrelay run --socket {path}"
    text = mcrelay(*arguments, "--socket", path)
    assert text.returncode == 1
    assert re.search(rf"^BAD +daemon +no mcrelay daemon at {path}", text.stdout)
    assert "\033" not in text.stdout  # no terminal, no colours
    assert re.search(r"^wrong: daemon", text.stdout, re.MULTILINE)


@pytest.mark.parametrize("command", sorted(DIAGNOSES))
def test_a_diagnosis_asks_a_daemon(player: Path, command: str) -> None:
    arguments, _fields = DIAGNOSIS[command]
    document = json.loads(mcrelay(*arguments, "--json", "--socket", player).stdout)
    assert document["findings"][0] == {
        "step": "daemon",
        "verdict": "ok",
        "fact": f"mcrelay 9.9.9 answers at {player}",
        "remedy": None,
    }


def test_what_mends_it_names_the_daemon_that_the_environment_named(path: Path) -> None:
    done = mcrelay("explain", "239.1.1.1:5000%lo", "--seconds", "0.1", "--json", MCRELAY_SOCKET=str(path))
    remedies = [finding["remedy"] for finding in json.loads(done.stdout)["findings"] if finding["remedy"]]
    asking = [one for one in remedies if one.startswith(("mcrelay explain", "mcrelay add", "sudo mcrelay"))]
    assert asking
    assert all(f"--socket {path}" in one for one in asking), remedies


def test_an_input_that_is_none_is_not_explained(path: Path) -> None:
    check_error(mcrelay("explain", "239.1.1.1%eth0", "--socket", path), 65, "has no port")
    twice = mcrelay("explain", f"10.0.0.1@{INPUT}", "--from", "10.0.0.2", "--socket", path)
    check_error(twice, 64, "has a source", "give one of them")
    check_error(mcrelay("explain", INPUT, "--from", "2001:db8::1", "--socket", path), 65, "cannot send to 239.1.1.1")


@pytest.mark.parametrize(
    ("command", "printed"),
    [
        ("add", "000000000000: active on 2 workers"),
        ("remove", "feed-1: removed"),
        ("pause", "feed-1: paused"),
        ("resume", "feed-1: resumed"),
        ("list", "000000000004  -                239.1.1.4:5000%eth0 -> 239.2.2.2:6000%eth1"),
        ("stats", "feed-1  239.1.1.1:5000%eth0"),
        ("workers", "capabilities"),
        ("ping", "answers"),
        ("version", f"mcrelay {__version__}; the daemon is 9.9.9, protocol {PROTOCOL}"),
    ],
)
def test_a_person_is_told_what_happened(player: Path, command: str, printed: str) -> None:
    result = mcrelay(*CLIENT_COMMANDS[command], "--socket", player)
    assert (result.returncode, result.stderr) == (0, "")
    assert printed in result.stdout


def test_a_reader_that_goes_away_is_no_crash(player: Path) -> None:
    with subprocess.Popen(
        [PROGRAM, "stats", "--watch", "--json", "--socket", player], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert process.wait(DEADLINE_S) == 74
        assert process.stderr.read() == b""

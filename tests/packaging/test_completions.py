"""Completions, as the package installs them: in shells on a terminal, and where a shell is missing, by what it would
ask and be told.

    a terminal -- keys --> shell -- line --> mcrelay --> a daemon
"""

from __future__ import annotations

import contextlib
import os
import pty
import re
import shutil
import socket
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import pytest

from lab.daemon import Daemon
from lab.topology import RelayLine
from mcrelay.importers import FORMATS
from mcrelay.levels import COMPONENTS, LEVELS

ROOT: Final = Path(__file__).resolve().parents[2]
PROGRAM: Final = Path(sys.executable).with_name("mcrelay")
BASH_COMPLETION: Final = Path("/usr/share/bash-completion/bash_completion")
DEADLINE_S: Final = 20.0
INPUT: Final = "239.1.1.1:5000%in0"
OUTPUT: Final = "239.2.2.2:6000%out0"


@pytest.fixture(scope="module")
def completions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("completions")
    subprocess.run([ROOT / "packaging/completions", PROGRAM, directory], check=True, timeout=60)
    return directory


@pytest.fixture(scope="module")
def daemon(line: RelayLine) -> Iterator[Daemon]:
    with Daemon(line.relay) as daemon:
        daemon.run("add", INPUT, f"{OUTPUT},ttl=8", "239.2.2.3:6000%out0", "--name", "feed-a")
        daemon.run("add", "239.1.1.2:5000%in0", OUTPUT, "--name", "feed-b")
        daemon.run("add", "239.1.1.3:5000%in0", OUTPUT, "--name", "camera")
        daemon.run("add", "239.1.1.4:5000%in0", OUTPUT)
        yield daemon


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A directory with files in it."""
    for name in ("mcrelay.toml", "mcr.json5", "other.toml"):
        (tmp_path / name).touch()
    (tmp_path / "mcrelay.d").mkdir()
    return tmp_path


def environment(**more: str) -> dict[str, str]:
    return {"PATH": f"{PROGRAM.parent}:{os.environ['PATH']}", "TERM": "dumb", "LANG": "C.UTF-8", **more}


class Terminal:
    """A shell on a terminal of its own."""

    # Control-A, what prints the words of a line in brackets, and Return.
    SHOW: Final = r"printf '\074%s\076\n' "

    def __init__(self, argv: list[str], directory: Path, **more: str) -> None:
        self._ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (24, 4000))  # no line is too long for it
        self._process = subprocess.Popen(
            argv,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=directory,
            env=environment(HOME=str(directory), **more),
            start_new_session=True,
        )
        os.close(theirs)
        os.set_blocking(self._ours, False)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._process.kill()
        self._process.wait(10)
        os.close(self._ours)

    def type(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def read_until(self, mark: str) -> str:
        text, deadline = "", time.monotonic() + DEADLINE_S
        while mark not in text:
            assert time.monotonic() < deadline, f"{mark!r} does not come: {text!r}"
            try:
                text += os.read(self._ours, 65536).decode()
            except BlockingIOError:
                time.sleep(0.01)
        return text

    def line(self, keys: str) -> list[str]:
        """The words of the line that the keys make."""
        self.type(f"{keys}\x01{self.SHOW}\x05 '' end\r")
        words = re.findall("<(.*?)>", self.read_until("<end>").replace("\r", ""))
        return words[: words.index("")]


@pytest.fixture
def bash(completions: Path, files: Path, daemon: Daemon) -> Iterator[Terminal]:
    with Terminal(["bash", "--norc", "--noprofile", "-i"], files, MCRELAY_SOCKET=daemon.socket) as terminal:
        if BASH_COMPLETION.exists():
            terminal.type(f"source {BASH_COMPLETION}\r")
        terminal.type(f"source {completions / 'mcrelay.bash'}; bind 'set bell-style none'; PS1='rea''dy'\r")
        terminal.read_until("ready")
        yield terminal


def offers(bash: Terminal, line: str) -> list[str]:
    """What stands in the place of the last word when bash puts in all that is possible (Escape *)."""
    before = line.split(" ")[:-1]
    words = bash.line(f"{line}\x1b*")
    assert words[: len(before)] == before
    return words[len(before) :]


def test_bash_completes_commands_options_and_choices(bash: Terminal) -> None:
    assert offers(bash, "mcrelay rem") == ["remove"]
    assert {"remove", "restart-worker", "resume", "receive"} <= set(offers(bash, "mcrelay re"))
    assert {"--ring-mib", "--rootless"} <= set(offers(bash, "mcrelay run --r"))
    assert offers(bash, "mcrelay run --engine re") == ["reference"]
    assert offers(bash, "mcrelay import ") == list(FORMATS)
    assert offers(bash, "mcrelay li --j") == ["--json"]


@pytest.mark.parametrize(
    "begun",
    [
        *(f"mcrelay {command} " for command in ("check", "diff", "apply --dry-run", "save", "import mcr", "che")),
        *(f"mcrelay {command} " for command in ("run --config", "capture feed-a -w", "events --run")),
        *(f"mcrelay {command} --socket " for command in ("list", "run", "doctor", "explain", "top")),
        "mcrelay list --socket=",
    ],
)
def test_bash_completes_files(bash: Terminal, begun: str) -> None:
    assert " ".join(bash.line(f"{begun}mcrelay.t\t")) == f"{begun}mcrelay.toml"


def test_bash_completes_what_the_daemon_knows(bash: Terminal, daemon: Daemon) -> None:
    with daemon.client() as client:
        nameless = client.rules()[-1].id
    for command in ("remove", "rem", "pause", "resume", "trace", "capture"):
        assert offers(bash, f"mcrelay {command} ") == ["feed-a", "feed-b", "camera", nameless]
    assert offers(bash, "mcrelay remove ca") == ["camera"]
    assert offers(bash, f"mcrelay remove {nameless[:8]}") == [nameless]
    assert offers(bash, f"mcrelay remove --socket {daemon.socket} ca") == ["camera"]
    assert offers(bash, "mcrelay pause feed-a ") == [OUTPUT, "239.2.2.3:6000%out0"]
    assert bash.line("mcrelay pause feed-a 239.2.2.3:\t") == ["mcrelay", "pause", "feed-a", "239.2.2.3:6000%out0"]
    assert bash.line("mcrelay explain 239.1.1.1:50\t --fr\t") == ["mcrelay", "explain", INPUT, "--from"]


def test_bash_completes_levels(bash: Terminal) -> None:
    components = [f"{name}=" for name in COMPONENTS]
    assert offers(bash, "mcrelay log ") == [*LEVELS, *components]
    assert offers(bash, "mcrelay log clie") == [f"clients={level}" for level in (*LEVELS, "default")]
    assert bash.line("mcrelay log clie\tde\t") == ["mcrelay", "log", "clients=de"]  # debug or default
    assert bash.line("mcrelay log clients=deb\t links=w\t") == ["mcrelay", "log", "clients=debug", "links=warning"]
    assert bash.line("mcrelay run --log-level net.pl\tw\t") == ["mcrelay", "run", "--log-level", "net.plain=warning"]


def asked(
    shell: str, words: list[str], begun: str, program: Sequence[str | Path] = (PROGRAM,), **more: str
) -> list[str]:
    """What the program says to a shell, one completion a line, and nothing on standard error."""
    line = " ".join([*words, begun])
    number = {"bash": "", "zsh": str(len(words)), "fish": begun}[shell]
    done = subprocess.run(
        program,
        capture_output=True,
        text=True,
        check=True,
        timeout=DEADLINE_S,
        env=environment(_MCRELAY_COMPLETE=f"{shell}_complete", COMP_WORDS=line, COMP_CWORD=number, **more),
    )
    assert done.stderr == ""
    return done.stdout.splitlines()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_shell_is_told(shell: str, daemon: Daemon) -> None:
    told = asked(shell, ["mcrelay", "check"], "mc")
    assert told[0].startswith("file")
    assert "camera" in "\n".join(asked(shell, ["mcrelay", "rem"], "cam", MCRELAY_SOCKET=daemon.socket))
    assert "clients=debug" in "\n".join(asked(shell, ["mcrelay", "log"], "clients=deb"))


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_without_a_daemon_there_is_silence(shell: str, tmp_path: Path) -> None:
    assert "\n".join(asked(shell, ["mcrelay", "remove"], "f", MCRELAY_SOCKET=str(tmp_path / "none"))).strip() == ""
    (tmp_path / "file").touch()
    assert "\n".join(asked(shell, ["mcrelay", "remove"], "f", MCRELAY_SOCKET=str(tmp_path / "file"))).strip() == ""


@contextlib.contextmanager
def deaf(path: str) -> Iterator[None]:
    """A daemon that lets in and says nothing."""
    with socket.create_server(path, family=socket.AF_UNIX):
        yield


@contextlib.contextmanager
def full(path: str) -> Iterator[None]:
    """One that lets nobody in any more."""
    with socket.create_server(path, family=socket.AF_UNIX, backlog=0), contextlib.ExitStack() as waiting:
        with contextlib.suppress(BlockingIOError):
            while True:
                client = waiting.enter_context(socket.socket(socket.AF_UNIX))
                client.setblocking(False)
                client.connect(path)
        yield


@contextlib.contextmanager
def closing(path: str) -> Iterator[None]:
    """One that closes each connection."""
    with socket.create_server(path, family=socket.AF_UNIX) as server:

        def close_all() -> None:
            with contextlib.suppress(OSError):
                while True:
                    server.accept()[0].close()

        thread = threading.Thread(target=close_all)
        thread.start()
        try:
            yield
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join(DEADLINE_S)


# The program, where a client waits for ever.
PATIENT: Final = """
import sys
from mcrelay import conversation
conversation.TIMEOUT_S = conversation.AGAIN_FOR_S = 3600.0
from mcrelay.cli import main
sys.argv = ["mcrelay"]
main()
"""


@pytest.mark.parametrize("daemon", [deaf, full, closing])
def test_a_daemon_that_does_not_answer_is_not_waited_for(
    daemon: Callable[[str], contextlib.AbstractContextManager[None]], tmp_path: Path
) -> None:
    """As long as a client waits for a daemon is too long for a key."""
    path = str(tmp_path / "socket")
    with daemon(path):
        program = [sys.executable, "-c", PATIENT]
        assert asked("bash", ["mcrelay", "remove"], "f", program, MCRELAY_SOCKET=path) in ([], [""])


def test_fish_completes(completions: Path, files: Path, daemon: Daemon) -> None:
    if (fish := shutil.which("fish")) is None:
        pytest.skip("there is no fish")

    def completed(line: str) -> list[str]:
        done = subprocess.run(
            [fish, "--no-config", "-c", f"source {completions / 'mcrelay.fish'}; complete -C '{line}'"],
            capture_output=True,
            text=True,
            check=True,
            cwd=files,
            env=environment(HOME=str(files), MCRELAY_SOCKET=daemon.socket),
        )
        assert done.stderr == ""
        return [text.partition("\t")[0] for text in done.stdout.splitlines()]

    assert completed("mcrelay rem") == ["remove"]
    assert set(completed("mcrelay check mcrelay.")) == {"mcrelay.toml", "mcrelay.d/"}
    assert set(completed("mcrelay rem feed")) == {"feed-a", "feed-b"}
    assert completed("mcrelay log links=w") == ["links=warning"]


def test_zsh_completes(completions: Path, files: Path, daemon: Daemon) -> None:
    if (zsh := shutil.which("zsh")) is None:
        pytest.skip("there is no zsh")
    with Terminal([zsh, "-f", "-i"], files, MCRELAY_SOCKET=daemon.socket) as terminal:
        terminal.type("unsetopt zle_bracketed_paste; autoload -Uz compinit; compinit -D -u; bindkey -e\r")
        terminal.type(f"source {completions / 'mcrelay.zsh'}; PS1='rea''dy'\r")
        terminal.read_until("ready")
        assert terminal.line("mcrelay rem\t") == ["mcrelay", "remove"]
        assert terminal.line("mcrelay check mcrelay.t\t") == ["mcrelay", "check", "mcrelay.toml"]
        assert terminal.line("mcrelay rem cam\t") == ["mcrelay", "rem", "camera"]
        assert terminal.line("mcrelay log links=w\t") == ["mcrelay", "log", "links=warning"]

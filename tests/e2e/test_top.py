"""`mcrelay top` and tables on a terminal, which tmux is: its keys are pressed and its screen is read.

sender 203.0.113.10 --- in0 relay out0 --- receiver
                                  out1 --- receiver1
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from lab.daemon import Daemon
from lab.namespaces import wait_until
from lab.plan import SendPlan
from lab.program import PROGRAM
from lab.terminal import Terminal
from lab.topology import RelayLine
from lab.traffic import start_sender

pytestmark = pytest.mark.skipif(not shutil.which("tmux"), reason="no tmux here")

INPUT: Final = "239.1.1.1:5000"
OUTPUT: Final = "239.2.2.2:6000%out0"
NOWHERE: Final = "239.2.2.3:6000%now\x9b31m0"  # an interface's name may have an escape sequence
GONE: Final = "DONE"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the socket, for daemons that follow each other."""
    return tmp_path_factory.mktemp("top")


@pytest.fixture(scope="module")
def relay(line: RelayLine, directory: Path) -> Iterator[Daemon]:
    """Relays 500 packets/s by the rule live, of whose three outputs one works; 30 others rest."""
    with Daemon(line.relay, "--workers", "1", directory=directory) as daemon:
        with daemon.client() as client:
            client.change([(f"239.1.2.{n}:5000%in0", [OUTPUT], f"rests-{n}") for n in range(30)])
            client.add(f"{INPUT}%in0", [OUTPUT, NOWHERE, "239.2.2.4:6000%out1,paused"], "live")
        sender = start_sender(line.sender, SendPlan(INPUT, interface="eth0", rate=500, size=1000))
        yield daemon
        sender.stop()


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    with Terminal(columns=150) as terminal:
        yield terminal


@pytest.fixture
def top(terminal: Terminal, relay: Daemon) -> Terminal:
    terminal.type("echo of before")
    terminal.press("Enter")
    terminal.start(PROGRAM, "top", "--socket", relay.socket, "--interval", "0.2", then=f"echo {GONE} $?")
    terminal.wait_for("rates over", "1 rules 31")
    return terminal


def rows(screen: str) -> list[list[str]]:
    """The words of the table's rows."""
    return [text.split() for text in screen.splitlines()[4:-1] if text]


def check_restored(terminal: Terminal, code: int = 0) -> None:
    """The shell's screen is there again, and the terminal echoes."""
    screen = terminal.wait_for(f"{GONE} {code}")
    assert "of before" in screen
    assert "rates over" not in screen
    assert not terminal.is_alternate
    terminal.type("echo it ech''oes")
    terminal.press("Enter")
    terminal.wait_for("echo it ech''oes", "\nit echoes")


def test_top_shows_rates_and_answers_keys(top: Terminal) -> None:
    def flows(screen: str) -> bool:
        first, *_others = rows(screen) or [[]]
        loss = first[6:7]  # one output works, one does not, one is paused
        return first[:2] == ["live", "partial"] and loss == ["50%"] and re.fullmatch(r"[3-7]\d\d", first[2]) is not None

    screen = top.wait_until(flows, "live first, at about 500 packets/s")
    live = rows(screen)[0]
    assert re.fullmatch(r"\d\.\dM", live[3])  # payload of 1000 bytes
    assert rows(screen)[1][:7] == ["rests-0", "active", "0", "0", "0", "0", "0%"]
    assert re.search(r"in \d+/s \d\.\d Mbit/s  out \d+/s", screen)
    assert top.is_alternate
    # Order.
    top.press("<", "<")
    top.wait_until(lambda screen: "RULE^" in screen and rows(screen)[0][0] == "live", "sorted by name")
    top.press("r")
    top.wait_until(lambda screen: "RULEv" in screen and rows(screen)[0][0] == "rests-9", "sorted backwards")
    # Filter.
    top.press("/")
    top.type("rests-2")
    screen = top.wait_for("/rests-2_", "1 rules 11/31")
    assert [row[0] for row in rows(screen)][:2] == ["rests-29", "rests-28"]
    top.press("Escape")
    top.wait_for("1 rules 31 ")
    # Details.
    top.press("End", "Enter")
    screen = top.wait_for("rule live", "problem ", "output 2: 239.2.2.3:6000%now?31m0")
    assert "egress_unreachable: " in screen
    top.press("q")
    # Other views.
    top.press("2")
    top.wait_until(lambda screen: rows(screen) and rows(screen)[0][:2] == [OUTPUT, "live"], "outputs")
    top.press("3")
    top.wait_until(lambda screen: rows(screen) and rows(screen)[0][:2] == ["data/0", "ready"], "workers")
    top.press("4")
    screen = top.wait_for("now?31m0", "out1")
    assert "\x9b" not in screen
    assert [row[0] for row in rows(screen)] == ["in0", "now?31m0", "out0", "out1"]
    # Help, pause, and the end.
    top.press("h")
    top.wait_for("details of the row")
    top.press("q", "p")
    top.wait_for("PAUSED")
    top.press("q")
    check_restored(top)


def test_top_fits_any_terminal(top: Terminal) -> None:
    top.resize(30, 5)
    top.wait_until(
        lambda screen: len(screen.splitlines()) == 5 and "live" in screen and "~" in screen, "what there is room for"
    )
    top.resize(8, 1)
    top.wait_until(lambda screen: len(screen.splitlines()) == 1 and screen.startswith("in "), "one line")
    top.resize(110, 30)
    top.wait_until(lambda screen: len(rows(screen)) == 25 and "rates over" in screen, "all of it again")
    top.press("q")
    check_restored(top)


@pytest.mark.parametrize("end", ["C-c", "SIGTERM"])
def test_the_terminal_is_restored_whatever_ends_top(top: Terminal, end: str) -> None:
    if end == "SIGTERM":
        (pid,) = top.children()
        os.kill(pid, signal.SIGTERM)
    else:
        top.press(end)
    check_restored(top)


def test_the_terminal_is_restored_after_a_mistake_of_ours(terminal: Terminal, relay: Daemon, tmp_path: Path) -> None:
    terminal.type("echo of before")
    terminal.press("Enter")
    code = "import mcrelay.cli, mcrelay.top as top; top.press = lambda state, key: 1 / 0; mcrelay.cli.main()"
    python = Path(PROGRAM).with_name("python")
    said = tmp_path / "said"
    begin = 'said=$1; shift; exec "$@" 2>"$said"'
    command = (str(python), "-c", code, "top", "--socket", relay.socket)
    terminal.start("sh", "-c", begin, "sh", str(said), *command, then=f"echo {GONE} $?")
    terminal.wait_for("rates over")
    terminal.press("x")
    check_restored(terminal, 1)
    assert "ZeroDivisionError" in said.read_text()


def test_colours_are_for_terminals_that_have_them_and_people_who_want_them(relay: Daemon) -> None:
    colour = re.compile(r"\x1b\[[0-9;]*3[0-7]m")
    command = (PROGRAM, "top", "--socket", relay.socket)
    listing = f"{PROGRAM} list --socket {relay.socket} | cat; echo {GONE}"
    for no_colour, has_colours in (("", True), ("1", False)):
        with Terminal(rows=40, NO_COLOR=no_colour) as terminal:
            terminal.start(*command)
            terminal.wait_for("rates over", "partial")
            assert bool(colour.search(terminal.styled)) is has_colours
            terminal.press("q")
            terminal.wait_until(lambda screen: "rates over" not in screen, "its end")
            terminal.start(PROGRAM, "workers", "--socket", relay.socket, then=f"echo {GONE}")
            screen = terminal.wait_for("capabilities", "ready", f"\n{GONE}")
            assert bool(colour.search(terminal.styled)) is has_colours
            if has_colours:
                piped = relay.run("workers").stdout
                assert "\x1b" not in piped
                assert all(line in screen for line in piped.splitlines())
                terminal.start("sh", "-c", listing)
                screen = terminal.wait_for("[partial: there is no interface", f"\n{GONE}")
    assert "\x9b" not in relay.run("list").stdout


@pytest.mark.parametrize(("name", "word"), [("dumb", "TERM='dumb'"), ("nobody-s", "TERM='nobody-s'"), ("", "TERM=''")])
def test_a_terminal_that_cannot_show_a_screen_is_refused(
    terminal: Terminal, relay: Daemon, name: str, word: str
) -> None:
    terminal.start("env", f"TERM={name}", PROGRAM, "top", "--socket", relay.socket, then=f"echo {GONE} $?")
    screen = terminal.wait_for(f"{GONE} 64").replace("\n", "")
    assert word in screen
    assert "mcrelay stats --watch --json" in screen


def test_without_a_daemon_top_does_not_begin(terminal: Terminal, tmp_path: Path) -> None:
    terminal.start(PROGRAM, "top", "--socket", str(tmp_path / "x"), then=f"echo {GONE} $?")
    assert "no mcrelay daemon at" in terminal.wait_for(f"{GONE} 69")


def test_in_a_locale_without_unicode_names_are_shown_as_it_can(relay: Daemon) -> None:
    with relay.client() as client, Terminal(rows=50) as terminal:
        added = client.add("239.1.3.1:5000%caf\u00e90", [OUTPUT])
        for locale, shown in (("C.UTF-8", "caf\u00e90"), ("C", "caf?0")):
            terminal.start("env", f"LC_ALL={locale}", PROGRAM, "top", "--socket", relay.socket)
            terminal.wait_for(f"239.1.3.1:5000%{shown}")
            terminal.press("q")
            terminal.wait_until(lambda screen: "rates over" not in screen, "its end")
        client.remove(added.rule.id)


def test_stats_are_watched_with_rates(relay: Daemon) -> None:
    with subprocess.Popen(
        [PROGRAM, "stats", "--watch", "--socket", relay.socket], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        lines = (line for line in process.stdout if "live" in line)
        assert "/s" not in next(lines)
        assert re.search(r" \d+ \(\d{3}/s\) +[\d.]+ .?B \(\d\.\d Mbit/s\) ", next(lines))
        process.terminate()
        process.stdout.close()


def test_top_goes_on_with_the_next_daemon(line: RelayLine, terminal: Terminal, tmp_path: Path) -> None:
    """The daemon is killed, so that its socket stays; another one has another rule."""
    tmp_path.chmod(0o755)
    options = ("--workers", "1", "--no-restore")
    daemon = Daemon(line.relay, *options, directory=tmp_path).__enter__()
    try:
        daemon.run("add", f"{INPUT}%in0", OUTPUT, "--name", "first")
        terminal.start(PROGRAM, "top", "--socket", daemon.socket, "--interval", "0.2", then=f"echo {GONE} $?")
        terminal.wait_for("rates over", "first")
        daemon.process.kill()
        assert "first" in terminal.wait_for(f"no daemon at {daemon.socket}; reconnecting")
    finally:
        daemon.process.kill()
        daemon.process.wait()
        daemon.stop(check=False)
    with Daemon(line.relay, *options, directory=tmp_path) as daemon:
        daemon.run("add", f"{INPUT}%in0", OUTPUT, "--name", "second")
        screen = terminal.wait_for("rates over", "second")
        assert "first" not in screen
        assert "reconnecting" not in screen
        terminal.press("q")
        terminal.wait_for(f"{GONE} 0")


def test_tmux_servers_end_with_their_terminals() -> None:
    with Terminal() as terminal:
        pid = terminal.pid
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), 10, "the shell is still there")

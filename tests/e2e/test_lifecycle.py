"""Processes die, are stopped, are restarted: forwarding goes on, nothing is left behind, nothing leaks."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import threading
import time
from collections.abc import Callable

import pytest

from lab.daemon import Daemon, answers, settled
from lab.namespaces import Lab, unsupported, wait_until
from lab.plan import ReceivePlan, SendPlan
from lab.program import PROGRAM
from lab.topology import RelayLine, relay_line
from lab.traffic import run_sender, start_receiver, start_sender
from mcrelay.errors import Error
from tests.e2e.conftest import StartDaemon
from tests.e2e.lives import IMPATIENT, INPUT, owner_of_input, packet_sockets, wait_for_successor

OUTPUT = "239.2.2.2:6000"


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def memberships(line: RelayLine) -> str:
    return line.relay.ip("-4", "maddress", "show", "dev", "in0").stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_leaves_nothing_behind(start: StartDaemon, line: RelayLine, number: signal.Signals) -> None:
    before = memberships(line), packet_sockets(line)
    daemon = start()
    daemon.run("add", f"{INPUT}%in0", f"{OUTPUT}%out0")
    pids = daemon.pids()
    assert memberships(line) != before[0]
    assert packet_sockets(line) > before[1]
    sender = start_sender(line.sender, SendPlan(INPUT, interface="eth0", rate=10_000, duration_s=5))
    os.kill(daemon.process.pid, number)
    assert daemon.process.wait(timeout=20) == 0
    sender.stop()
    wait_until(lambda: not [name for name, pid in pids.items() if alive(pid)], 5, "workers live on")
    assert not os.path.exists(daemon.socket)
    wait_until(lambda: (memberships(line), packet_sockets(line)) == before, 20, "sockets are left")


def test_workers_do_not_outlive_a_killed_supervisor(start: StartDaemon, line: RelayLine) -> None:
    before = memberships(line), packet_sockets(line)
    daemon = start()
    daemon.run("add", f"{INPUT}%in0", f"{OUTPUT}%out0")
    pids = daemon.pids()
    daemon.process.kill()
    daemon.process.wait()
    daemon.process.returncode = 0  # as the fixture would have it
    wait_until(lambda: not any(alive(pid) for pid in pids.values()), 20, "workers live on")
    wait_until(lambda: (memberships(line), packet_sockets(line)) == before, 20, "sockets are left")
    os.unlink(daemon.socket)  # what a killed process cannot do itself


def test_what_no_rule_uses_is_kept_for_a_while_and_goes(daemon: Daemon, line: RelayLine) -> None:
    """A rule that comes back soon finds its sockets; the group is left at once."""
    wait_until(lambda: packet_sockets(line) == len(os.sched_getaffinity(0)), 5, "no stock")
    before = memberships(line), packet_sockets(line)
    daemon.run("add", f"{INPUT}%in0", f"{OUTPUT}%out0", "--name", "feed")
    wait_until(lambda: packet_sockets(line) == 2 * before[1], 5, "the stock is not replenished")
    for _ in range(2):
        daemon.run("remove", "feed")
        assert memberships(line) == before[0]
        assert packet_sockets(line) == 2 * before[1]
        daemon.run("add", f"{INPUT}%in0", f"{OUTPUT}%out0", "--name", "feed")
        receiver = start_receiver(line.receiver, ReceivePlan(OUTPUT, interface="eth0", count=100, expect=100))
        run_sender(line.sender, SendPlan(INPUT, interface="eth0", rate=1000, count=100))
        assert receiver.result().lost == 0
    daemon.run("remove", "feed")
    wait_until(lambda: packet_sockets(line) == before[1], 15, "sockets are kept for ever")
    daemon.run("add", f"{INPUT}%in0", f"{OUTPUT}%out0", "--name", "feed")
    receiver = start_receiver(line.receiver, ReceivePlan(OUTPUT, interface="eth0", count=100, expect=100))
    run_sender(line.sender, SendPlan(INPUT, interface="eth0", rate=1000, count=100))
    assert receiver.result().lost == 0


def test_an_interface_that_is_made_anew_while_no_rule_uses_it() -> None:
    """The sockets that were kept are those of the former one."""
    if reason := unsupported():
        pytest.skip(reason)
    with Lab() as lab:
        line = relay_line(lab)
        with Daemon(line.relay) as daemon:
            for life in range(2):
                daemon.run("add", f"{INPUT}%in0", f"{OUTPUT}%out0", "--name", "feed")
                receiver = start_receiver(line.receiver, ReceivePlan(OUTPUT, interface="eth0", count=100, expect=100))
                run_sender(line.sender, SendPlan(INPUT, interface="eth0", rate=1000, count=100))
                assert receiver.result().lost == 0
                daemon.run("remove", "feed")
                if life == 0:
                    line.relay.ip("link", "del", "in0")
                    lab.veth(
                        *(line.sender, "eth0", line.relay, "in0"),
                        address_a="203.0.113.10/24",
                        address_b="192.0.2.1/24",
                    )
                    line.sender.ip("route", "add", "224.0.0.0/4", "dev", "eth0")


def test_a_successor_takes_the_socket_of_a_killed_daemon(start: StartDaemon, line: RelayLine) -> None:
    first = start()
    first.process.kill()
    first.process.wait()
    assert os.path.exists(first.socket)
    second = start()
    # The same path: the one left behind is recognised as stale.
    taken = line.relay.popen(PROGRAM, "run", "--socket", first.socket)
    wait_until(lambda: second.run("ping").returncode == 0, 5)
    wait_until(lambda: answers(first.socket), 30, "the successor does not serve the socket")
    taken.terminate()
    assert taken.wait(20) == 0
    first.process.returncode = 0


def test_the_control_plane_dies_and_forwarding_does_not_notice(start: StartDaemon, line: RelayLine) -> None:
    daemon = start("--ring-mib", "64")  # of six seconds: a worker may have to wait for a processor
    daemon.run("add", f"{INPUT}%in0", f"{OUTPUT}%out0", "--name", "feed")
    rules = daemon.json("list")["rules"]
    receiver = start_receiver(line.receiver, ReceivePlan(OUTPUT, interface="eth0", count=15_000, expect=15_000))
    sender = start_sender(line.sender, SendPlan(INPUT, interface="eth0", rate=5000, count=15_000))
    for life in range(3):
        os.kill(daemon.pids()["control"], signal.SIGKILL)
        wait_until(lambda n=life + 1: daemon.log.count("control is back") == n, 30)  # type: ignore[misc] # as above
        # The new one knows every rule, and can change them.
        assert daemon.json("list")["rules"] == rules
        added = daemon.json("add", f"239.1.3.{life}:5000%in0", f"{OUTPUT}%out1")
        daemon.run("remove", added["rule"]["id"])
    sender.result()
    assert receiver.result().lost == 0
    with daemon.client() as client:
        assert settled(client)["forwarded"] == 15_000


def test_a_data_plane_dies_and_its_rules_and_counters_come_back(daemon: Daemon, line: RelayLine) -> None:
    daemon.run("add", f"{INPUT}%in0", f"{OUTPUT}%out0", "--name", "feed")
    count = 1000
    for life in range(1, 3):
        receiver = start_receiver(line.receiver, ReceivePlan(OUTPUT, interface="eth0", count=count, expect=count))
        run_sender(line.sender, SendPlan(INPUT, interface="eth0", rate=5000, count=count))
        assert receiver.result().lost == 0
        with daemon.client() as client:
            assert settled(client)["forwarded"] == life * count
        for name, pid in daemon.pids().items():
            if name.startswith("data/"):
                os.kill(pid, signal.SIGKILL)
        wait_until(
            lambda: all(p["state"] == "ready" for p in daemon.json("workers")["processes"]),
            10,
            "the workers do not come back",
        )
        assert {p["restarts"] for p in daemon.json("workers")["processes"] if p["role"] == "data"} == {life}


def test_packets_sent_while_a_worker_is_replaced_wait_for_it(daemon: Daemon, line: RelayLine) -> None:
    """The supervisor keeps the socket, so what arrives meanwhile is forwarded late, not lost."""
    daemon.run("add", f"{INPUT}%in0", f"{OUTPUT}%out0")
    receiver = start_receiver(
        line.receiver, ReceivePlan(OUTPUT, interface="eth0", count=3000, expect=3000, idle_timeout_s=5)
    )
    for name, pid in daemon.pids().items():
        if name.startswith("data/"):
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda pid=pid: not alive(pid), 5)  # type: ignore[misc] # mypy cannot infer the default
    run_sender(line.sender, SendPlan(INPUT, interface="eth0", rate=30_000, count=3000))
    report = receiver.result()
    assert (report.lost, report.duplicated) == (0, 0)


def test_a_worker_that_hangs_is_replaced(daemon: Daemon, line: RelayLine) -> None:
    daemon.run("add", f"{INPUT}%in0", f"{OUTPUT}%out0")
    owner = owner_of_input()
    former = daemon.pids()[f"data/{owner}"]
    os.kill(former, signal.SIGSTOP)
    wait_for_successor(daemon, owner, former)
    assert f"data/{owner} did not answer" in daemon.log
    receiver = start_receiver(line.receiver, ReceivePlan(OUTPUT, interface="eth0", count=100, expect=100))
    run_sender(line.sender, SendPlan(INPUT, interface="eth0", rate=1000, count=100))
    assert receiver.result().lost == 0


def test_a_client_connects_anew_when_the_control_plane_was_replaced(daemon: Daemon) -> None:
    with daemon.client() as client:
        client.add(f"{INPUT}%in0", [f"{OUTPUT}%out0"], "feed")
        os.kill(daemon.pids()["control"], signal.SIGKILL)
        assert [rule.name for rule in client.rules()] == ["feed"]
        wait_until(lambda: "control is back" in daemon.log, 10)
        os.kill(daemon.pids()["control"], signal.SIGKILL)
        with pytest.raises(Error, match=r"lost the daemon|closed the connection"):
            client.remove("feed")  # it may have been done
        # Not before: a change is not tried again by itself, should the connection be passed to one that has just died.
        wait_until(lambda: daemon.log.count("control is back") == 2, 10)
        client.remove("feed")
        assert client.rules() == ()


def test_a_control_plane_that_hangs_is_replaced(daemon: Daemon) -> None:
    daemon.run("add", f"{INPUT}%in0", f"{OUTPUT}%out0", "--name", "feed")
    former = daemon.pids()["control"]
    os.kill(former, signal.SIGSTOP)
    daemon.wait_for_log("control is back", 15)
    assert "control did not answer" in daemon.log
    assert [rule["name"] for rule in daemon.json("list")["rules"]] == ["feed"]


def test_a_spare_that_dies_is_replaced_and_not_missed(start: StartDaemon) -> None:
    daemon = start(program=IMPATIENT)
    wait_until(lambda: "spare" in daemon.pids(), 15, "no spare")
    spare = daemon.pids()["spare"]
    os.kill(spare, signal.SIGKILL)
    wait_until(lambda: daemon.pids().get("spare", spare) != spare, 30, "no other spare")  # after five seconds
    # Both at once: there is one spare for two.
    pids = daemon.pids()
    os.kill(pids["spare"], signal.SIGKILL)
    for name in ("data/0", "control"):
        os.kill(pids[name], signal.SIGKILL)
    wait_until(lambda: _are_back(daemon, pids), 40, "somebody does not come back")


def _are_back(daemon: Daemon, before: dict[str, int]) -> bool:
    if not answers(daemon.socket):
        return False
    now = daemon.pids()
    return set(now) == set(before) and all(now[name] != before[name] for name in ("data/0", "control", "spare"))


@pytest.mark.parametrize(
    ("index", "exit_code", "words"),
    [("99", 64, "no worker 99"), ("x", 64, "'x'"), ("-1", 64, "-1"), ("1.5", 64, "'1.5'")],
)
def test_a_worker_that_is_none_is_not_restarted(daemon: Daemon, index: str, exit_code: int, words: str) -> None:
    before = daemon.pids()
    done = daemon.run("restart-worker", index, check=False)
    assert done.returncode == exit_code
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert daemon.pids() == before


def test_a_rule_added_while_its_worker_is_replaced_is_active_when_acknowledged(daemon: Daemon, line: RelayLine) -> None:
    for name, pid in daemon.pids().items():
        if name.startswith("data/"):
            os.kill(pid, signal.SIGKILL)

    def is_added() -> bool:
        """A change waits for a worker that is being restarted, but not for ever."""
        done = daemon.run("add", f"{INPUT}%in0", f"{OUTPUT}%out0", check=False)
        assert done.returncode in (0, 75), done.stderr
        return done.returncode == 0

    wait_until(is_added, 30, "no rule can be added")
    receiver = start_receiver(line.receiver, ReceivePlan(OUTPUT, interface="eth0", count=100, expect=100))
    run_sender(line.sender, SendPlan(INPUT, interface="eth0", rate=1000, count=100))
    assert receiver.result().lost == 0


def test_the_summary_is_logged_on_request(daemon: Daemon, line: RelayLine) -> None:
    daemon.run("add", f"{INPUT}%in0", f"{OUTPUT}%out0")
    run_sender(line.sender, SendPlan(INPUT, interface="eth0", rate=1000, count=100))
    with daemon.client() as client:
        settled(client)
    os.kill(daemon.process.pid, signal.SIGUSR1)
    daemon.wait_for_log("1 rules; 100 packets received, 100 forwarded, 0 dropped", 5)


def test_a_worker_may_die_of_any_signal(daemon: Daemon) -> None:
    """Real-time signals have numbers without a name."""
    for number in (signal.SIGRTMIN + 1, signal.SIGRTMAX, signal.SIGQUIT):
        pids = daemon.pids()
        os.kill(pids["data/0"], number)
        wait_until(functools.partial(_is_another, daemon, pids["data/0"]), 20, f"no successor:\n{daemon.log}")
        assert f"was ended by signal {int(number)} " in daemon.log


def _is_another(daemon: Daemon, former: int) -> bool:
    return daemon.pids().get("data/0", former) != former


def test_a_control_plane_that_comes_back_during_a_change_has_the_right_counters(
    daemon: Daemon, line: RelayLine
) -> None:
    """The change is under way while it starts: what it learns first must be the whole."""
    daemon.run("add", f"{INPUT}%in0", f"{OUTPUT}%out0", "--name", "first")
    data = [pid for name, pid in daemon.pids().items() if name.startswith("data/")]
    control = daemon.pids()["control"]
    for pid in data:
        os.kill(pid, signal.SIGSTOP)
    with daemon.client() as client:
        adding = threading.Thread(target=_ignoring_errors, args=(client.add, "239.1.1.2:5000%in0", [f"{OUTPUT}%out1"]))
        adding.start()
        time.sleep(0.3)  # the change is under way; the workers cannot acknowledge it
        os.kill(control, signal.SIGKILL)
        wait_until(lambda: "restarting control" in daemon.log, 5)
        time.sleep(0.5)  # the new one starts meanwhile
        for pid in data:
            with contextlib.suppress(ProcessLookupError):  # ended, where it took longer than a worker may
                os.kill(pid, signal.SIGCONT)
        adding.join(20)
    wait_until(lambda: "control is back" in daemon.log, 30)
    wait_until(lambda: all(p["state"] == "ready" for p in daemon.json("workers")["processes"]), 30)
    daemon.run("remove", daemon.json("add", "239.1.1.9:5000%in0", f"{OUTPUT}%out0")["rule"]["id"])  # behind the change
    known = len(daemon.json("list")["rules"])
    for number in range(3, 8):
        daemon.run("add", f"239.1.1.{number}:5000%in0", f"{OUTPUT}%out0")
    assert len(daemon.json("list")["rules"]) == known + 5
    for rule in daemon.json("list")["rules"]:
        daemon.run("remove", rule["id"])


def _ignoring_errors(call: Callable[..., object], *arguments: object) -> None:
    with contextlib.suppress(Error):
        call(*arguments)

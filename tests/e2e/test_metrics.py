"""A real Prometheus server scrapes a daemon every second, with the alerts and the dashboard that are shipped.

sender: eth0 -- in0 :relay, with the server: out0 -- eth0 :receiver
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from lab.daemon import Daemon, settled
from lab.namespaces import wait_until
from lab.prometheus import Prometheus
from lab.topology import RelayLine
from lab.traffic import SendPlan, start_sender
from mcrelay.limits import SCRAPERS_MAX

ROOT: Final = Path(__file__).resolve().parents[2]
ALERTS: Final = ROOT / "packaging" / "prometheus" / "mcrelay.rules.yml"
DASHBOARD: Final = ROOT / "packaging" / "grafana" / "mcrelay.json"
TARGET: Final = "127.0.0.1:9478"
PLAN: Final = SendPlan("239.1.1.1:5000", interface="eth0", rate=200, duration_s=120)


def impatient(alerts: str) -> str:
    """The same alerts, which look back for seconds and fire at once."""
    return re.sub(r"\[\d+h\]", "[60s]", re.sub(r"\[\d+m\]", "[3s]", re.sub(r"for: \w+", "for: 0s", alerts)))


@pytest.fixture(scope="module")
def daemon(line: RelayLine) -> Iterator[Daemon]:
    with Daemon(line.relay, "--debug", "--metrics", TARGET) as daemon:
        daemon.run("add", "239.1.1.1:5000%in0", "239.2.2.2:6000%out0", "--name", "feed-a")
        daemon.run("add", "239.1.1.2:5000%in0", "239.2.2.3:6000%out0", "239.2.2.4:6000%nowhere", "--name", "half")
        yield daemon
    slow = [line for line in daemon.log.split("\n") if "Executing" in line and "took" in line]
    assert not slow, "\n".join(slow)
    assert "Traceback" not in daemon.log, daemon.log


@pytest.fixture(scope="module")
def prometheus(line: RelayLine, daemon: Daemon) -> Iterator[Prometheus]:
    with Prometheus(line.relay, TARGET, impatient(ALERTS.read_text())) as prometheus:
        yield prometheus


def get(line: RelayLine, path: str, accept: str = "*/*") -> tuple[int, bytes]:
    def ask() -> tuple[int, bytes]:
        request = urllib.request.Request(f"http://{TARGET}{path}", headers={"Accept": accept})
        try:
            with urllib.request.urlopen(request, timeout=10) as reply:
                return reply.status, reply.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    return line.relay.call(ask)


def is_served(line: RelayLine) -> bool:
    try:
        return get(line, "/metrics")[0] == 200
    except ConnectionResetError:
        return False


def panels() -> Iterator[tuple[str, str, str]]:
    """Row, title and expression of all that the dashboard asks for, as Grafana would ask."""
    row = ""
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        if panel["type"] == "row":
            row = panel["title"]
        for target in panel.get("targets", ()):
            expression = target["expr"].replace("$__rate_interval", "3s")
            yield row, panel["title"], expression.replace("$instance", ".*").replace("$rule", ".*")


def test_the_files_are_sound(line: RelayLine, daemon: Daemon) -> None:
    line.relay.run("promtool", "check", "rules", str(ALERTS))
    for accept in ("text/plain", "application/openmetrics-text"):
        status, text = get(line, "/metrics", accept)
        assert status == 200
        if accept == "text/plain":
            checked = line.relay.run("promtool", "check", "metrics", input=text.decode())
            assert checked.stdout + checked.stderr == ""
        else:
            assert text.endswith(b"# EOF\n")


@pytest.fixture
def traffic(line: RelayLine) -> Iterator[None]:
    sender = start_sender(line.sender, PLAN)
    yield
    sender.stop()


@pytest.mark.usefixtures("traffic")
def test_every_expression_is_answered(daemon: Daemon, prometheus: Prometheus) -> None:
    wait_until(
        lambda: prometheus.query("rate(mcrelay_rule_received_packets_total[3s]) > 100"), 15, "no traffic is seen"
    )
    # A scrape that took longer than its second leaves a gap in all of it.
    wait_until(lambda: [value for _labels, value in prometheus.query('up{job="mcrelay"}')] == [1.0], 20, "it is down")

    def empty() -> set[tuple[str, str]]:
        found: dict[tuple[str, str], int] = {}
        for row, title, expression in panels():
            found[row, title] = found.get((row, title), 0) + len(prometheus.query(expression))
        assert len(found) > 20
        return {key for key, answers in found.items() if not answers}

    # Nothing is dropped yet.
    nothing = {("Drop reasons", "Dropped by reason"), ("Outputs", "Dropped by output")}
    wait_until(lambda: empty() == nothing, 20, "not everything has an answer, or what has none has one")
    expressions = re.findall(r"expr: (?:>-\n((?: {10,}.*\n)+)|(.*)\n)", ALERTS.read_text())
    assert len(expressions) == ALERTS.read_text().count("- alert:")
    for several, one in expressions:
        prometheus.query(" ".join((several or one).split()))
    wait_until(
        lambda: {alert["labels"]["alertname"] for alert in prometheus.alerts()} <= {"McrelayRulePending"},
        20,
        "there are alerts",
    )


def test_at_rest_metrics_are_what_stats_shows(line: RelayLine, daemon: Daemon, prometheus: Prometheus) -> None:
    with daemon.client() as client:
        settled(client)
    stats = daemon.json("stats")
    sent = stats["rules"][0]["packets"]
    assert sent > 0

    def series(name: str, *labels: str) -> dict[tuple[str, ...], float]:
        return {tuple(each[label] for label in labels): value for each, value in prometheus.query(f"mcrelay_{name}")}

    wait_until(lambda: series("rule_received_packets_total", "rule")["feed-a",] == sent, 5)
    for field, name in (
        ("received", "received_packets"),
        ("received_bytes", "received_bytes"),
        ("forwarded", "forwarded_packets"),
        ("copies", "copies"),
        ("copies_bytes", "copies_bytes"),
        ("sends", "sends"),
    ):
        expected = {(str(worker["index"]),): worker[field] for worker in stats["workers"]}
        assert series(f"worker_{name}_total", "worker") == expected, field
    for field, name in (
        ("bytes", "received_bytes"),
        ("forwarded", "forwarded_packets"),
        ("dropped", "dropped_packets"),
    ):
        assert series(f"rule_{name}_total", "rule") == {(rule["name"],): rule[field] for rule in stats["rules"]}, field
    outputs: dict[tuple[str, ...], Any] = {
        (rule["name"], output["output"]): output for rule in stats["rules"] for output in rule["outputs"]
    }
    for field in ("packets", "bytes"):
        shown = series(f"output_sent_{field}_total", "rule", "output")
        assert shown == {key: output[field] for key, output in outputs.items()}


def firing(prometheus: Prometheus) -> set[tuple[str, str]]:
    """Each alert with what it is about."""
    return {
        (alert["labels"]["alertname"], alert["labels"].get("rule") or alert["labels"].get("process") or "")
        for alert in prometheus.alerts()
        if alert["state"] == "firing"
    }


def test_alerts_fire_and_health_says_why(line: RelayLine, daemon: Daemon, prometheus: Prometheus) -> None:
    wait_until(lambda: ("McrelayFlowSilent", "feed-a") in firing(prometheus), 20, "silence is not noticed")
    assert ("McrelayRulePending", "half") in firing(prometheus)
    status, body = get(line, "/health")
    assert (status, json.loads(body)["status"], json.loads(body)["reasons"]) == (
        200,
        "degraded",
        ["1 rule is partial: half"],
    )

    def fails() -> bool:
        """Killed again and again, a worker has to wait for its next life."""
        with contextlib.suppress(KeyError, ProcessLookupError):
            os.kill(daemon.pids()["data/0"], signal.SIGKILL)
        status, body = get(line, "/health")
        return status == 503 and json.loads(body)["reasons"][0].startswith("data/0 is not ready: ")

    wait_until(fails, 20, "health does not notice")
    wait_until(lambda: ("McrelayWorkerRestarting", "data/0") in firing(prometheus), 10, "the death is not noticed")
    assert ("McrelayWorkerRestarting", "data/1") not in firing(prometheus)
    wait_until(lambda: get(line, "/health")[0] == 200, 20, "health does not notice the recovery")
    daemon.run("remove", "half")
    wait_until(lambda: json.loads(get(line, "/health")[1])["status"] == "ok", 5)


class Knocking:
    """Somebody who connects all the time, and notes each refusal."""

    def __init__(self, line: RelayLine) -> None:
        self.refused = 0
        self.connected = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=line.relay.call, args=(self._knock,))

    def _knock(self) -> None:
        host, _colon, port = TARGET.partition(":")
        while not self._over.wait(0.005):
            try:
                socket.create_connection((host, int(port)), timeout=10).close()
                self.connected += 1
            except ConnectionRefusedError:
                self.refused += 1

    def __enter__(self) -> Knocking:
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._over.set()
        self._thread.join(15)


def test_scraping_survives_the_control_plane_and_an_upgrade(
    line: RelayLine, daemon: Daemon, prometheus: Prometheus
) -> None:
    (_labels, before), *_ = prometheus.query('mcrelay_rule_received_packets_total{rule="feed-a"}')
    with Knocking(line) as knocking:
        former = daemon.pids()["control"]
        os.kill(former, signal.SIGKILL)
        # One that it had in hand died with it.
        wait_until(lambda: is_served(line), 5, "nobody is served")
        assert daemon.pids()["control"] != former
        daemon.upgrade()
        wait_until(lambda: is_served(line), 5, "nobody is served")
        wait_until(lambda: prometheus.query('mcrelay_process_restarts_total{process="control"} == 0'), 10)
    assert knocking.connected > 20
    assert knocking.refused == 0
    wait_until(lambda: prometheus.query('up{job="mcrelay"} == 1'), 5)
    ((_labels, values),) = prometheus.values('mcrelay_rule_received_packets_total{rule="feed-a"}[5m]')
    assert values == sorted(values), "a counter went back"
    assert values[-1] == before


def test_hostile_connections_keep_nobody_from_scraping(line: RelayLine, daemon: Daemon) -> None:
    host, _colon, port = TARGET.partition(":")
    pids = daemon.pids()

    def crowd() -> list[socket.socket]:
        begun = [
            b"",
            b"GET /metrics HT",
            b"\x16\x03\x01\x02\x00",
            b"x" * 100_000,
            b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n" * 9,
        ]
        found = []
        for n in range(300):
            sock = socket.create_connection((host, int(port)), timeout=10)
            with contextlib.suppress(ConnectionError):  # it may be closed already
                sock.sendall(begun[n % len(begun)])
            found.append(sock)
        return found

    sockets = line.relay.call(crowd)
    for _ in range(3):
        assert get(line, "/metrics")[0] == 200
    descriptors = os.listdir(f"/proc/{pids['control']}/fd")
    assert len(descriptors) < SCRAPERS_MAX + 32, "they all keep their places"
    for sock in sockets:
        sock.close()
    assert daemon.pids() == pids
    daemon.run("ping")


def test_a_port_in_use_is_refused_in_one_line(line: RelayLine, daemon: Daemon, tmp_path: Path) -> None:
    program = str(daemon.process.args[4])  # type: ignore[index] # a list: ip netns exec NAME PROGRAM
    socket_path = str(tmp_path / "control.sock")
    done = line.relay.run(program, "run", "--socket", socket_path, "--metrics", TARGET, check=False)
    assert done.returncode == 73
    error = done.stderr.strip().splitlines()[-1]
    remedy = "'ss -ltnp' shows who uses it; choose another port"
    assert error == f"mcrelay: cannot serve metrics at {TARGET}: Address already in use; {remedy}"
    assert not os.path.exists(socket_path)

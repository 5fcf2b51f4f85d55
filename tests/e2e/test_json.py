"""What commands print with --json is what their schemas say (tests/unit/snapshots), of a daemon that has something to
tell: every key, and no other.

sender 203.0.113.10 --- in0 relay out0 --- receiver
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any, Final

import jsonschema
import pytest

from lab.plan import ReceivePlan, SendPlan
from lab.program import PROGRAM
from lab.topology import RelayLine
from lab.traffic import start_receiver, start_sender
from mcrelay.limits import TAP_BYTES_DEFAULT
from tests.e2e.conftest import StartDaemon
from tests.unit.schemas import PRINTED, snapshot_of

INPUT: Final = "239.1.1.1:5000"
OUTPUT: Final = "239.2.2.2:6000%out0"


def closed(schema: Any) -> Any:
    """The schema that permits no other key where it names some."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: closed(value) for key, value in schema.items()}
    return {"additionalProperties": False, **inner} if isinstance(inner.get("properties"), dict) else inner


def check(command: str, document: Any) -> None:
    jsonschema.validate(document, closed(json.loads(snapshot_of(command).read_text())))


def test_a_key_too_many_or_of_another_type_is_seen() -> None:
    good = {"client": "1", "daemon": "1", "protocol": 1}
    check("version", good)
    for bad in ({**good, "more": 1}, {**good, "protocol": "1"}, {"client": "1"}):
        with pytest.raises(jsonschema.ValidationError):
            check("version", bad)


FILE: Final = f"""\
[[rule]]
input = "{INPUT}%in0"
output = "{OUTPUT},ttl=3"

[[rule]]
input = "239.1.1.9:5000%in0"
output = "{OUTPUT}"
"""


def test_commands_print_what_their_schemas_say(start: StartDaemon, line: RelayLine, tmp_path: Path) -> None:
    daemon = start("--workers", "1")
    checked = set()

    def run(command: str, *arguments: str) -> Any:
        done = daemon.run(command, *arguments, "--json", check=command not in ("explain", "doctor", "diff", "check"))
        document = json.loads(done.stdout)
        check(command, document)
        checked.add(command)
        return document

    run("add", f"{INPUT}%in0", OUTPUT, "239.2.2.3:6000%nowhere0", "--name", "feed")
    receiver = start_receiver(line.receiver, ReceivePlan("239.2.2.2:6000", interface="eth0"))
    sender = start_sender(line.sender, SendPlan(INPUT, interface="eth0", rate=500))
    trace = daemon.run("trace", "feed", "--json", "--count", "3")
    lines = trace.stdout.splitlines()
    assert len(lines) == 3
    for text in lines:
        check("trace", json.loads(text))
        assert len(json.loads(text)["data"]) == 2 * TAP_BYTES_DEFAULT
    run("explain", f"{INPUT}%in0", "--seconds", "0.2")
    run("doctor", "--seconds", "0.2")
    assert run("stats")["rules"][0]["outputs"][1]["dropped"]["egress_unreachable"]
    assert run("list")["rules"][0]["problems"]
    run("workers")
    run("version")
    run("ping")
    watch = subprocess.Popen(
        [PROGRAM, "stats", "--watch", "--json", "--socket", daemon.socket], stdout=subprocess.PIPE, text=True
    )
    with watch:
        assert watch.stdout is not None
        check("stats", json.loads(watch.stdout.readline()))
        watch.terminate()
    for command, traffic in (("send", sender), ("receive", receiver)):
        check(command, {"event": "report", **traffic.stop().as_dict()})
    run("pause", "feed", "1")
    run("resume", "feed")
    file = tmp_path / "mcrelay.toml"
    file.write_text("[deamon]\n")
    broken = json.loads(subprocess.run([PROGRAM, "check", str(file), "--json"], stdout=subprocess.PIPE).stdout)
    check("check", broken)
    assert broken["problems"][0]["line"] == 1
    checked.add("check")
    file.write_text(FILE)
    assert run("diff", str(file))["changed"]
    assert run("save", str(tmp_path / "saved.toml"))["added"]
    assert run("apply", str(file))["added"]
    run("apply", str(tmp_path / "saved.toml"))
    following = subprocess.Popen(
        [PROGRAM, "events", "--json", "--count", "2", "--socket", daemon.socket], stdout=subprocess.PIPE, text=True
    )
    with following:
        assert following.stdout is not None
        while following.poll() is None:  # once it has subscribed, it sees two
            daemon.run("pause", "feed")
            daemon.run("resume", "feed")
        for text in following.stdout:
            check("events", json.loads(text))
            checked.add("events")
    run("log", "links=debug")
    assert run("health")["status"] == "degraded"  # an output names an interface that is not there
    run("restart-worker", "0")
    run("remove", "feed")
    daemon.pid = int(run("upgrade")["pid"])
    assert daemon.process.wait(10) == 0
    assert checked | {"trace", "send", "receive"} == set(PRINTED)

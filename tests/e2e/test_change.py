"""Many rules in one step: all of them are active when it is acknowledged, or nothing has changed.

sender 203.0.113.10 --- in0 relay out0 --- receiver
"""

from __future__ import annotations

import json
import socket
import struct
from ipaddress import IPv4Address
from typing import Any

import pytest

from lab.daemon import Daemon, settled
from lab.plan import ReceivePlan, SendPlan
from lab.topology import RelayLine
from lab.traffic import run_sender, start_receiver
from mcrelay.client import Client
from mcrelay.errors import Error
from mcrelay.limits import RULES_MAX

RULES = 3000
SAMPLE = 50  # flows with traffic, one group after the other

RuleText = tuple[str, list[str], str | None]


def rule(number: int, port: int = 6000) -> RuleText:
    group = IPv4Address("239.1.0.0") + number
    return f"{group}:5000%in0", [f"{IPv4Address('239.101.0.0') + number}:{port}%out0"], f"rule-{number}"


def relayed(client: Client, line: RelayLine, *, port: int = 6000) -> int:
    """How many of SAMPLE flows of one datagram each come out at this port."""
    receiver = start_receiver(
        line.receiver,
        ReceivePlan(f"239.101.0.0:{port}", interface="eth0", flows=SAMPLE, flow_step="group", idle_timeout_s=60),
    )
    sent = SendPlan("239.1.0.0:5000", interface="eth0", flows=SAMPLE, flow_step="group", count=SAMPLE, rate=2000)
    run_sender(line.sender, sent)
    settled(client)  # what the relay has not sent yet, the receiver would not wait for
    with_traffic = receiver.stop()
    assert with_traffic.duplicated == with_traffic.corrupted == 0
    return with_traffic.received


def test_thousands_of_rules_come_change_and_go_in_one_step_each(daemon: Daemon, line: RelayLine) -> None:
    with daemon.client() as client:
        changed = client.change([rule(number) for number in range(RULES)])
        assert (changed.added, changed.removed, changed.generation) == (RULES, 0, 1)
        assert [r.name for r in client.rules()] == [f"rule-{number}" for number in range(RULES)]
        assert relayed(client, line) == SAMPLE
        settled(client)
        # The same inputs with other outputs: the old rules go and the new ones come between two packets.
        changed = client.change([rule(n, 6001) for n in range(RULES)], [f"rule-{n}" for n in range(RULES)])
        assert (changed.added, changed.removed) == (RULES, RULES)
        assert relayed(client, line, port=6001) == SAMPLE
        assert relayed(client, line) == 0
        changed = client.change([], [f"rule-{number}" for number in range(1, RULES)])
        assert (changed.added, changed.removed) == (0, RULES - 1)
        assert [r.name for r in client.rules()] == ["rule-0"]
        assert relayed(client, line, port=6001) == 1
        client.remove("rule-0")
        assert relayed(client, line, port=6001) == 0


@pytest.mark.parametrize(
    ("add", "remove", "message"),
    [
        ([rule(1), ("239.1.0.2:5000%in0", ["nonsense"], None)], [], "nonsense"),
        ([rule(1), rule(1)], [], "rule-1"),
        ([rule(1), ("239.1.0.0:5000%in0", ["239.9.9.9:1%out0"], None)], [], "rule-0"),
        ([rule(1), ("239.1.0.2:5000%in0", ["239.9.9.9:1%out0"], "rule-0")], [], "rule-0"),
        ([rule(1)], ["rule-0", "no-such-rule"], "no-such-rule"),
        ([rule(n) for n in range(RULES_MAX + 1)], [], "too long"),
    ],
    ids=[
        "a wrong text", "the same input twice", "an input that is taken", "a name that is taken",
        "no such rule", "too many",
    ],
)  # fmt: skip
def test_one_wrong_rule_and_nothing_has_changed(
    daemon: Daemon, add: list[RuleText], remove: list[str], message: str
) -> None:
    with daemon.client() as client:
        client.change([rule(0)])
        before = client.listing().rules, client.stats().generation
        with pytest.raises(Error, match=message):
            client.change(add, remove)
        assert (client.listing().rules, client.stats().generation) == before
        # Nothing of it stayed: the same is possible without what was wrong.
        client.change([rule(1)], ["rule-0"])
        assert [r.name for r in client.rules()] == ["rule-1"]


def test_pieces_of_a_change_belong_together(daemon: Daemon) -> None:
    """As a client in another language sends them; a second change in between is refused, the first goes on."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        sock.connect(daemon.socket)

        def say(request_id: int, complete: bool, *numbers: int, remove: tuple[str, ...] = ()) -> None:
            rules = [{"input": r[0], "outputs": r[1], "name": r[2]} for r in map(rule, numbers)]
            body = {"type": "change", "id": request_id, "add": rules, "remove": remove, "complete": complete}
            encoded = json.dumps(body).encode()
            sock.sendall(struct.pack(">I", len(encoded)) + encoded)

        def hear() -> Any:
            (length,) = struct.unpack(">I", sock.recv(4, socket.MSG_WAITALL))
            return json.loads(sock.recv(length, socket.MSG_WAITALL))

        say(1, False, 1, 2)
        say(2, False, 3)
        refused = hear()
        assert (refused["type"], refused["id"], refused["code"]) == ("failure", 2, "busy")
        assert daemon.json("list")["rules"] == []
        say(1, False, 4)
        say(1, True, 5)
        changed = hear()
        assert (changed["type"], changed["id"], changed["added"]) == ("changed", 1, 4)
        say(2, True, 3)  # the rest of what was refused
        # One that grows without end is refused before it is complete, and what follows is another.
        long = json.dumps(
            {"type": "change", "id": 9, "add": [], "remove": ["x" * 1000] * 1000, "complete": False}
        ).encode()
        for _ in range(9):
            sock.sendall(struct.pack(">I", len(long)) + long)
        refused = hear()
        assert (refused["type"], refused["id"], refused["code"]) == ("failure", 9, "bad_rule")
        assert "too long" in refused["message"]
        say(9, False, 7)  # the rest of it changes nothing
        say(9, True, 8)
        say(11, False, 7)
        sock.sendall(struct.pack(">I", 4) + b"nope")  # which may have been a piece of it
        assert hear()["id"] is None
        say(11, True, 8)
        say(3, True, 6, remove=("rule-1", "rule-1", "rule-2"))
        assert hear()["removed"] == 2
    assert [r["name"] for r in daemon.json("list")["rules"]] == ["rule-4", "rule-5", "rule-6"]

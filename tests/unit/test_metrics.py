"""Metrics: from a snapshot to what Prometheus reads, by prometheus_client's own parsers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families as read_text

from mcrelay import metrics
from mcrelay.api import InterfaceFacts, OutputStats, RuleFacts, RuleStats, WorkerStats
from mcrelay.counters import DROP_REASONS
from mcrelay.messages import FileState, ProcessFacts
from mcrelay.metrics import OPENMETRICS, OTHERS, TEXT, Listing, Remainder, Snapshot, chosen_format, families, rendered
from mcrelay.reasons import REASONS

ROOT = Path(__file__).resolve().parents[2]
ALERTS = (ROOT / "packaging" / "prometheus" / "mcrelay.rules.yml").read_text()
DASHBOARD = json.loads((ROOT / "packaging" / "grafana" / "mcrelay.json").read_text())
PAGE = (ROOT / "docs" / "metrics.md").read_text()

Series = dict[tuple[str, frozenset[tuple[str, str]]], float]


def worker(index: int, dropped: dict[str, int] | None = None, **counters: int) -> WorkerStats:
    fields: dict[str, Any] = dict.fromkeys(WorkerStats.__struct_fields__, 0)
    return WorkerStats(**{**fields, "index": index, "dropped": dropped or {}, **counters})


def rule(number: int, *outputs: OutputStats, name: str | None = None, **counters: int) -> RuleStats:
    fields: dict[str, Any] = dict.fromkeys(metrics.RULE_SUMS, 0)
    return RuleStats(
        id=f"{number:012x}", name=name, input=f"239.1.1.1:{number}%eth0", outputs=outputs, **{**fields, **counters}
    )


def facts(stats: RuleStats, state: str = "active") -> RuleFacts:
    outputs = tuple(output.output for output in stats.outputs)
    return RuleFacts(stats.id, stats.name, stats.input, outputs, state, ())  # type: ignore[arg-type] # a literal


def output(text: str, packets: int = 0, **dropped: int) -> OutputStats:
    return OutputStats(output=text, packets=packets, bytes=10 * packets, dropped=dropped)


FEED = rule(1, output("239.2.2.2:6000%eth1,ttl=8,paused", 4, paused=3), name="feed-a", packets=7, bytes=70, dropped=3)
SNAPSHOT = Snapshot(
    version="1.2.3",
    generation=12,
    processes=(
        ProcessFacts("supervisor", 0, "ready", 1, 0, "0", "0", 0),
        ProcessFacts("control", 0, "ready", 2, 0, "0", "0", 1),
        ProcessFacts("data", 0, "waiting", None, 0, "0", "0", 2),
    ),
    started_s=1.5,
    file=FileState(in_force=False, since_s=2.5),
    workers=(worker(0, {"no_rule": 5}, received=12, received_bytes=120), worker(1, received=1)),
    interfaces=(
        InterfaceFacts("eth0", (), 3, 2, 1, 0, True),
        InterfaceFacts("eth1", ("there is no interface 'eth1'",), 0, 0, 0, 0, True),
    ),
    states={"active": 1, "pending": 1},
    listed=((facts(FEED), FEED),),
    others=rule(2, output(OTHERS, 9), packets=9),
    unlisted=1,
    clients=4,
    frames_malformed=6,
    scrape_s=0.25,
)


def read(snapshot: Snapshot, content_type: str) -> list[Metric]:
    text = b"".join(rendered(snapshot, content_type)).decode()
    return list((read_openmetrics if content_type == OPENMETRICS else read_text)(text))


def series(snapshot: Snapshot, content_type: str = OPENMETRICS) -> Series:
    found: Series = {}
    for family in read(snapshot, content_type):
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in found, "twice"
            found[key] = sample.value
    return found


def value(found: Series, name: str, **labels: str) -> float:
    return found[f"mcrelay_{name}", frozenset(labels.items())]


@pytest.mark.parametrize("content_type", [TEXT, OPENMETRICS])
def test_what_is_counted_arrives(content_type: str) -> None:
    found = series(SNAPSHOT, content_type)
    assert value(found, "build_info", version="1.2.3") == 1
    assert value(found, "process_up", process="control") == 1
    assert value(found, "process_up", process="data/0") == 0
    assert value(found, "process_restarts_total", process="data/0") == 2
    assert value(found, "worker_received_packets_total", worker="0") == 12
    assert value(found, "worker_dropped_packets_total", worker="0", reason="no_rule") == 5
    assert value(found, "worker_dropped_packets_total", worker="1", reason="no_rule") == 0
    assert value(found, "interface_overruns_total", interface="eth0") == 2
    assert value(found, "interface_up", interface="eth0") == 1
    assert value(found, "interface_up", interface="eth1") == 0
    assert value(found, "rules", state="pending") == 1
    assert value(found, "rules", state="suspended") == 0
    assert value(found, "rule_info", rule="feed-a", id=FEED.id, input=FEED.input) == 1
    assert value(found, "rule_state", rule="feed-a", state="active") == 1
    assert value(found, "rule_state", rule="feed-a", state="pending") == 0
    assert value(found, "rule_received_packets_total", rule="feed-a") == 7
    assert value(found, "rule_received_packets_total", rule=OTHERS) == 9
    # An output's name does not say that it is paused, or else its counters would begin anew.
    assert value(found, "output_sent_bytes_total", rule="feed-a", output="239.2.2.2:6000%eth1") == 40
    dropped = {"rule": "feed-a", "output": "239.2.2.2:6000%eth1", "reason": "paused"}
    assert value(found, "output_dropped_packets_total", **dropped) == 3
    assert value(found, "scrape_duration_seconds") == 0.25
    reasons = {dict(labels)["reason"] for name, labels in found if name == "mcrelay_worker_dropped_packets_total"}
    assert reasons == set(DROP_REASONS[1:])


def test_without_an_answer_of_the_supervisor_its_facts_are_missing() -> None:
    found = series(Snapshot(**{**vars(SNAPSHOT), "processes": None}))
    assert value(found, "supervisor_up") == 0
    assert not [name for name, _labels in found if name.startswith("mcrelay_process")]


def test_names_and_types_are_those_of_the_trade() -> None:
    for family in families(SNAPSHOT):
        assert re.fullmatch(r"mcrelay_[a-z]+(_[a-z]+)*", family.name)
        assert family.type in ("counter", "gauge", "info")
        assert family.documentation.endswith(".")
        assert family.samples, f"{family.name} is not tested"
        for sample in family.samples:
            assert (sample.name == f"{family.name}_total") == (family.type == "counter")


def test_the_page_has_each_metric_with_its_labels() -> None:
    rows = re.findall(r"^\| `(mcrelay_\w+)` \| (\w+) \| ([^|]*) \|", PAGE, re.MULTILINE)
    expected = [
        (
            family.samples[0].name,
            "gauge" if family.type == "info" else family.type,
            ", ".join(f"`{label}`" for label in family.samples[0].labels),
        )
        for family in families(SNAPSHOT)
    ]
    assert [(name, kind, labels.strip()) for name, kind, labels in rows] == expected


def test_alerts_and_dashboard_name_metrics_that_there_are() -> None:
    there = {sample.name for family in families(SNAPSHOT) for sample in family.samples}
    named = set(re.findall(r"\bmcrelay_\w+", ALERTS + json.dumps(DASHBOARD["panels"])))
    assert named <= there
    assert len(named) > 20
    alerts = re.findall(r"- alert: (\w+)", ALERTS)
    assert re.findall(r"^\| `(Mcrelay\w+)` \|", PAGE, re.MULTILINE) == alerts


def test_alerts_leave_out_the_reasons_that_are_expected() -> None:
    expected = {name for name, reason in REASONS.items() if reason.expected}
    assert {*re.findall(r'packets_total\{reason!~"([\w|]+)"', ALERTS)} == {
        "|".join(name for name in ("not_ip", "not_udp", "other_host", "no_rule", "paused", "split_horizon")),
        "paused|split_horizon",
    }
    (all_of_them,) = set(re.findall(r'reason!~\\"([\w|]+)\\"', json.dumps(DASHBOARD)))
    assert set(all_of_them.split("|")) == expected


def test_pieces_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    for content_type in (TEXT, OPENMETRICS):
        whole = b"".join(rendered(SNAPSHOT, content_type))
        monkeypatch.setattr(metrics, "SAMPLES_PER_PIECE", 1)
        pieces = list(rendered(SNAPSHOT, content_type))
        assert b"".join(pieces) == whole
        assert len(pieces) > 50
        monkeypatch.undo()


def test_a_label_is_escaped() -> None:
    nasty = 'a"b\\c\nd# HELP mcrelay_clients {'
    found = series(Snapshot(**{**vars(SNAPSHOT), "interfaces": (InterfaceFacts(nasty, (), 8, 0, 0, 0, True),)}))
    assert value(found, "interface_frames_total", interface=nasty) == 8


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ("", TEXT),
        ("*/*", TEXT),
        ("text/plain;version=0.0.4;q=0.5,*/*;q=0.1", TEXT),
        ("application/openmetrics-text", OPENMETRICS),
        ("application/openmetrics-text;version=1.0.0;q=0.8,text/plain;version=0.0.4;q=0.5", OPENMETRICS),
        ("text/html, Application/OpenMetrics-Text; version=1.0.0; charset=utf-8", OPENMETRICS),
        ("application/openmetrics-text;version=0.0.1", OPENMETRICS),
        ("application/openmetrics-text;version=9.0.0", TEXT),
        ("application/openmetrics-text;q=0", TEXT),
        (";;,,=;q=", TEXT),
        ("\xff\x00", TEXT),
    ],
)
def test_the_format_is_what_the_request_accepts(accept: str, content_type: str) -> None:
    assert chosen_format(accept) == content_type


# --- rules without series of their own -------------------------------------------------------------------------------


def test_the_first_rules_are_listed_up_to_a_number_of_them_and_of_outputs() -> None:
    listing = Listing(3)
    many = tuple(output(f"239.2.2.{n}:1%eth1") for n in range(20))
    rules = [rule(1, *many[:2]), rule(2, *many), rule(3, *many[:5]), rule(4, *many[:5]), rule(5), rule(6)]
    assert [listing.take(facts(each), each) for each in rules] == [True, False, True, True, False, False]
    assert [stats.id for _facts, stats in listing.rules] == [rules[n].id for n in (0, 2, 3)]
    assert not Listing(0).take(facts(rules[0]), rules[0])


def totals(remainder: Remainder, *rules: RuleStats) -> tuple[int, int, int] | None:
    for each in rules:
        remainder.count(each)
    total = remainder.total()
    if total is None:
        return None
    return total.packets, total.outputs[0].packets, total.outputs[0].dropped.get("egress_full", 0)


def test_the_sum_of_the_others_never_becomes_less() -> None:
    remainder = Remainder()
    assert totals(remainder) is None
    one = rule(1, output("a", 5, egress_full=1), output("b", 6), packets=10)
    other = rule(2, output("a", 7), packets=20)
    assert totals(remainder, one, other) == (30, 18, 1)
    grown = rule(1, output("a", 6, egress_full=2), output("b", 6), packets=11)
    assert totals(remainder, grown, other) == (31, 19, 2)
    assert totals(remainder, other) == (31, 19, 2)  # one is removed, or listed
    assert totals(remainder) == (31, 19, 2)
    assert totals(remainder, rule(2, output("a", 1), packets=1)) == (32, 20, 2)  # added anew
    assert totals(remainder, rule(2, output("a", 0), packets=0)) == (32, 20, 2)  # and again

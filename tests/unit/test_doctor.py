"""What is found of a host and a daemon as a whole, from facts that are written down."""

from __future__ import annotations

import string
from collections.abc import Iterable
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from mcrelay.api import InterfaceFacts, OutputStats, RuleFacts, Rules, RuleStats, Stats, WorkerStats
from mcrelay.counters import DROP_REASONS
from mcrelay.doctor import Patient, examine, wanted_routes
from mcrelay.facts import Bridge, Daemon, Finding, Host, Link, Route
from mcrelay.messages import ProcessFacts
from mcrelay.reasons import REASONS, remedy
from mcrelay.ruletext import parse_rule

INPUT = "239.1.1.1:5000%in0"
OUTPUT = "10.1.0.2:6000%out0"
CAPABILITIES = f"{(1 << 41) - 1:016x}"


def rule(input: str = INPUT, *outputs: str, state: Any = "active", why: str = "") -> RuleFacts:
    texts = outputs or (OUTPUT,)
    return RuleFacts(parse_rule(input, texts).id, None, input, texts, state, (why,) if why else ())


def worker(index: int = 0, *, exhausted: int = 0, dropped: dict[str, int] | None = None) -> WorkerStats:
    return WorkerStats(index, 0, 0, 0, 0, 0, exhausted, 0, 0, 0, 0, 0, 0, dropped or {})


def stats(workers: Iterable[WorkerStats] = (worker(),), rules: Iterable[RuleStats] = ()) -> Stats:
    return Stats(id=1, generation=1, workers=tuple(workers), rules=tuple(rules), more=False, frames_malformed=0)


def counted(facts: RuleFacts, **dropped: int) -> RuleStats:
    outputs = tuple(OutputStats(text, 0, 0, dropped) for text in facts.outputs)
    return RuleStats(facts.id, None, facts.input, 0, 0, 0, 0, 0, 0, 0, outputs)


def interface(name: str = "in0", *, overruns: int = 0, segmentation: bool = True) -> InterfaceFacts:
    return InterfaceFacts(name, (), 1000, overruns, merged=0, segments_refused=3, segmentation=segmentation)


def listing(*rules: RuleFacts, interfaces: Iterable[InterfaceFacts] = (interface(),)) -> Rules:
    return Rules(id=1, generation=1, rules=rules, interfaces=tuple(interfaces), more=False)


SUPERVISOR = ProcessFacts("supervisor", 0, "ready", 70, 0, CAPABILITIES, "0-1", 0)
DATA = ProcessFacts("data", 0, "ready", 71, 99, "0", "1", 0, "uring")
DAEMON = Daemon(
    "/run/mcrelay/control.sock",
    version="1",
    listing=listing(rule()),
    earlier=listing(rule()),
    processes=(SUPERVISOR, DATA),
    before=stats(),
    after=stats(),
    seconds=3.0,
    locked_memory=8 << 20,
)
HOST = Host(
    release="6.12.1-amd64",
    links={
        "in0": Link("in0", 1, 1500, is_up=True, has_carrier=True),
        "out0": Link("out0", 2, 1500, is_up=True, has_carrier=True),
    },
    sysctls={"kernel.io_uring_disabled": "0", "net.core.netdev_max_backlog": "1000", "net.ipv4.igmp_max_msf": "10"},
)


def examined(daemon: Daemon = DAEMON, host: Host = HOST, earlier: Host = HOST) -> list[Finding]:
    return examine(Patient(host, earlier, daemon, 3.0))


def wrong(findings: Iterable[Finding]) -> list[str]:
    return [finding.step for finding in findings if finding.verdict == "bad"]


def found(findings: Iterable[Finding], step: str) -> Finding:
    matching = [finding for finding in findings if finding.step == step]
    assert matching, f"no {step} in {findings}"
    return max(matching, key=lambda finding: ("ok", "unknown", "note", "bad").index(finding.verdict))


def with_link(name: str, **changes: Any) -> Host:
    return replace(HOST, links={**HOST.links, name: replace(HOST.links[name], **changes)})


def with_sysctl(key: str, value: int) -> Host:
    return replace(HOST, sysctls={**HOST.sysctls, key: str(value)})


def test_a_healthy_host_has_nothing_wrong() -> None:
    assert {finding.verdict for finding in examined()} == {"ok"}


def test_every_reason_for_a_drop_has_a_cause_and_a_remedy() -> None:
    assert set(REASONS) == set(DROP_REASONS) - {"none"}
    for name, reason in REASONS.items():
        assert reason.cause
        assert {field for _text, field, *_ in string.Formatter().parse(reason.remedy) if field} <= {
            "ingress",
            "egress",
            "rule",
        }
        assert "{" not in remedy(name, ingress="in0", egress="out0", rule=INPUT)


def test_the_page_about_diagnosis_has_every_reason() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/diagnosis.md").read_text()
    for name, reason in REASONS.items():
        assert f"| `{name}` | {reason.cause}{' (expected)' if reason.expected else ''} |" in page


def test_without_a_daemon_the_host_is_examined() -> None:
    findings = examined(Daemon("/run/x", problem="no mcrelay daemon at /run/x", remedy="sudo mcrelay run"))
    assert wrong(findings) == ["daemon"]
    assert found(findings, "kernel").verdict == "ok"


def test_of_a_host_that_is_not_the_daemon_s_nothing_is_said() -> None:
    findings = examined(replace(DAEMON, elsewhere="sudo nsenter"), with_sysctl("net.ipv4.conf.in0.rp_filter", 1))
    assert wrong(findings) == ["namespace"]
    assert not [finding for finding in findings if finding.step in ("rp_filter", "backlog")]


@pytest.mark.parametrize(("release", "verdict"), [("5.15.0", "bad"), ("6.1.0-9-amd64", "note"), ("6.2.0", "ok")])
def test_the_kernel_is_old_enough(release: str, verdict: str) -> None:
    assert found(examined(host=replace(HOST, release=release)), "kernel").verdict == verdict


@pytest.mark.parametrize("value", [1, 2])
def test_io_uring_that_is_disabled_is_told(value: int) -> None:
    findings = examined(host=with_sysctl("kernel.io_uring_disabled", value))
    assert wrong(findings) == ["io_uring"]
    assert (found(findings, "io_uring").remedy or "").startswith("sysctl -w kernel.io_uring_disabled=0")


def test_little_locked_memory_is_told() -> None:
    assert found(examined(replace(DAEMON, locked_memory=65536)), "locked memory").verdict == "note"
    assert found(examined(replace(DAEMON, locked_memory=None)), "locked memory").verdict == "ok"


@pytest.mark.parametrize(
    ("bits", "step", "verdict"),
    [(12, "privileges", "bad"), (13, "privileges", "bad"), (23, "privileges", "note"), (39, "filter", "note")],
)
def test_a_capability_that_is_missing_is_told(bits: int, step: str, verdict: str) -> None:
    without = f"{(1 << 41) - 1 & ~(1 << bits) & ~(1 << 21):016x}"
    processes = (replace_process(SUPERVISOR, capabilities=without), DATA)
    assert found(examined(replace(DAEMON, processes=processes)), step).verdict == verdict


def test_a_rootless_daemon_is_told_as_such() -> None:
    rootless = replace(DAEMON, processes=(replace_process(SUPERVISOR, capabilities="0" * 16), DATA))
    findings = examined(rootless, with_sysctl("net.ipv4.conf.in0.rp_filter", 1))
    assert wrong(findings) == []
    assert found(findings, "privileges").verdict == "note"
    assert "rootless" in found(findings, "privileges").fact
    assert "does not get packets of sources without a route" in found(findings, "rp_filter").fact
    assert "filter" not in [finding.step for finding in findings]


def replace_process(process: ProcessFacts, **changes: Any) -> ProcessFacts:
    fields = {field: getattr(process, field) for field in ProcessFacts.__struct_fields__}
    return ProcessFacts(**{**fields, **changes})


def test_workers_that_die_are_told() -> None:
    waiting = replace_process(DATA, state="waiting", restarts=4)
    findings = examined(replace(DAEMON, processes=(SUPERVISOR, waiting)))
    assert "data/0 is waiting, after 4 restarts" in [finding.fact for finding in findings]
    restarted = replace_process(DATA, restarts=2)
    findings = examined(replace(DAEMON, processes=(SUPERVISOR, restarted)))
    assert wrong(findings) == []
    assert found(findings, "workers").verdict == "note"
    slow = replace_process(DATA, engine="reference")
    assert found(examined(replace(DAEMON, processes=(SUPERVISOR, slow))), "engine").verdict == "note"


def test_another_relay_in_the_same_network_is_told() -> None:
    assert SUPERVISOR.pid is not None
    told = found(examined(host=replace(HOST, relays={17: SUPERVISOR.pid, 4711: 4711})), "other relay")
    assert (told.verdict, "process 4711 is another mcrelay" in told.fact) == ("note", True)
    assert "other relay" not in {finding.step for finding in examined(host=replace(HOST, relays={17: SUPERVISOR.pid}))}


def test_a_card_that_interrupts_a_worker_s_core_is_told() -> None:
    findings = examined(host=with_link("in0", interrupts={42: (1,), 43: (0,), 44: (0, 1)}))
    assert found(findings, "interrupts").remedy == "echo 0 > /proc/irq/42/smp_affinity_list"
    assert len([finding for finding in findings if finding.step == "interrupts"]) == 1


def test_rules_that_wait_are_told() -> None:
    waiting = rule(state="suspended", why="a loop")
    findings = examined(replace(DAEMON, listing=listing(waiting)))
    assert wrong(findings) == ["rules"]
    assert found(findings, "rules").remedy == f"mcrelay explain {INPUT}"
    assert "suspended: a loop" in found(findings, "rules").fact
    many = [rule(f"239.1.2.{n}:5000%in0", state="pending", why="x") for n in range(20)]
    assert "12 more" in [f for f in examined(replace(DAEMON, listing=listing(*many))) if f.step == "rules"][-1].fact


@pytest.mark.parametrize("reason", REASONS)
def test_a_reason_that_grows_is_told_with_what_it_means(reason: str) -> None:
    after = stats([worker(dropped={reason: 7})], [counted(rule(), **{reason: 7})])
    findings = examined(replace(DAEMON, before=stats(rules=[counted(rule())]), after=after))
    finding = found(findings, "drops")
    assert finding.fact.startswith(f"7 packets within 3.0 s as {reason}: {REASONS[reason].cause}")
    assert finding.verdict == ("note" if REASONS[reason].expected else "bad")
    assert finding.remedy
    assert "INPUT" not in finding.remedy or reason in ("vlan_tagged", "no_rule", "own", "loop")


def test_a_reason_that_grew_before_is_past() -> None:
    past = stats([worker(dropped={"ingress_overrun": 7})])
    findings = examined(replace(DAEMON, before=past, after=past))
    assert wrong(findings) == []
    assert "before: ingress_overrun 7" in found(findings, "drops").fact


def test_copies_of_packets_that_left_elsewhere_are_told() -> None:
    after = stats(rules=[counted(rule(), egress_full=9)])
    findings = examined(replace(DAEMON, before=stats(rules=[counted(rule())]), after=after))
    assert wrong(findings) == ["drops"]
    assert found(findings, "drops").fact.startswith(f"9 copies to {OUTPUT} within 3.0 s as egress_full")
    assert "out0" in (found(findings, "drops").remedy or "")


def test_rings_slots_and_segments_are_looked_at() -> None:
    overrun = replace(DAEMON, listing=listing(rule(), interfaces=[interface(overruns=5)]))
    assert wrong(examined(overrun)) == ["rings"]
    past = replace(overrun, earlier=overrun.listing)
    assert found(examined(past), "rings").verdict == "note"
    refusing = listing(rule(), interfaces=[interface(segmentation=False)])
    assert found(examined(replace(DAEMON, listing=refusing)), "segments").verdict == "note"
    exhausted = replace(DAEMON, after=stats([worker(exhausted=3)]))
    assert wrong(examined(exhausted)) == ["slots"]


def test_what_the_kernel_loses_is_told() -> None:
    findings = examined(host=replace(HOST, backlog_dropped=5))
    assert wrong(findings) == ["backlog"]
    assert found(findings, "backlog").remedy == "sysctl -w net.core.netdev_max_backlog=10000"
    assert wrong(examined(host=replace(HOST, reassembly_failures=5))) == ["fragments"]
    assert wrong(examined(host=with_link("in0", received_dropped=5))) == ["interfaces"]


def test_interfaces_have_settings_that_matter() -> None:
    for key, step in (("rp_filter", "rp_filter"), ("mc_forwarding", "routing")):
        assert found(examined(host=with_sysctl(f"net.ipv4.conf.in0.{key}", 1)), step).verdict == "note"
    assert found(examined(host=with_sysctl("net.ipv4.conf.in0.force_igmp_version", 2)), "igmp").verdict == "note"
    narrow = examined(host=with_link("out0", mtu=1400))
    assert found(narrow, "mtu").remedy == "ip link set dev out0 mtu 1500"
    six = replace(DAEMON, listing=listing(rule("[ff05::1]:5000%in0", "[ff05::2]:5000%out0")))
    assert wrong(examined(six, with_sysctl("net.ipv6.conf.in0.disable_ipv6", 1))) == ["ipv6"]


def test_a_bridge_without_a_querier_is_told() -> None:
    bridge = Link("br0", 9, 1500, is_up=True, has_carrier=True, bridge=Bridge(snooping=True, querier=False))
    findings = examined(host=replace(HOST, links={**HOST.links, "br0": bridge}))
    assert found(findings, "querier").remedy == "ip link set dev br0 type bridge mcast_querier 1"


def test_many_sources_of_a_group_need_a_higher_limit() -> None:
    rules = [rule(f"10.0.0.{n}@{INPUT}") for n in range(1, 13)]
    findings = examined(replace(DAEMON, listing=listing(*rules)))
    assert found(findings, "memberships").remedy == "sysctl -w net.ipv4.igmp_max_msf=12"


def test_outputs_to_nobody_are_told() -> None:
    assert wanted_routes([rule(INPUT, "239.2.2.2:6000%out0", OUTPUT)]) == [(ip_address("10.1.0.2"), "out0")]
    for route in (Route(error="Network is unreachable"), Route(neighbour="failed")):
        findings = examined(host=replace(HOST, routes={(ip_address("10.1.0.2"), "out0"): route}))
        assert wrong(findings) == ["outputs"]
        assert found(findings, "outputs").remedy == f"mcrelay explain {INPUT}"

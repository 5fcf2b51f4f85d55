"""What is found on a packet's way, from facts that are written down: which step is wrong, and what mends it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from ipaddress import ip_address, ip_interface
from typing import Any

import pytest

from mcrelay.api import InterfaceFacts, OutputStats, RuleFacts, Rules, RuleStats, Stats, WorkerStats
from mcrelay.explain import explain
from mcrelay.facts import (
    Arrival,
    Bridge,
    Case,
    Daemon,
    Finding,
    Flow,
    FlowKey,
    Host,
    Joined,
    Link,
    Querier,
    Route,
    Sightings,
)
from mcrelay.messages import ProcessFacts
from mcrelay.nearness import choose
from mcrelay.ruletext import parse_input, parse_rule

INPUT = "239.1.1.1:5000%in0"
MULTICAST = "239.2.2.2:6000%out0,ttl=8"
UNICAST = "10.1.0.2:6000%out1"
GROUP = ip_address("239.1.1.1")
SENDER = ip_address("203.0.113.10")
ALL_CAPABILITIES = f"{(1 << 41) - 1:016x}"


def facts_of(input: str, *outputs: str, name: str | None = None, state: Any = "active", why: str = "") -> RuleFacts:
    rule = parse_rule(input, outputs or (MULTICAST,), name)
    return RuleFacts(rule.id, name, input, outputs or (MULTICAST,), state, (why,) if why else ())


def link(name: str, *addresses: str, index: int = 1, **changes: Any) -> Link:
    made = Link(name, index, 1500, is_up=True, has_carrier=True, addresses=tuple(map(ip_interface, addresses)))
    return replace(made, **changes)


def stats_of(rule: RuleFacts, packets: int, *, own: int = 0, dropped: dict[str, int] | None = None) -> RuleStats:
    lost = dropped or {}
    outputs = tuple(OutputStats(text, packets - sum(lost.values()), 0, lost) for text in rule.outputs)
    forwarded = packets - sum(lost.values())
    return RuleStats(rule.id, rule.name, rule.input, packets, 0, forwarded, sum(lost.values()), own, 0, 0, outputs)


def stats(*rules: RuleStats, dropped: dict[str, int] | None = None) -> Stats:
    worker = WorkerStats(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, dropped or {})
    return Stats(id=1, generation=1, workers=(worker,), rules=rules, more=False, frames_malformed=0)


def interface_facts(frames: int) -> InterfaceFacts:
    return InterfaceFacts("in0", (), frames, overruns=0, merged=0, segments_refused=0, segmentation=True)


def daemon_with(*rules: RuleFacts, before: int = 0, after: int = 100, **changes: Any) -> Daemon:
    made = Daemon(
        "/run/mcrelay/control.sock",
        version="1",
        listing=Rules(id=1, generation=1, rules=rules, interfaces=(interface_facts(after),), more=False),
        earlier=Rules(id=1, generation=1, rules=rules, interfaces=(interface_facts(before),), more=False),
        processes=(
            ProcessFacts("supervisor", 0, "ready", 70, 0, ALL_CAPABILITIES, "0-1", 0),
            ProcessFacts("data", 0, "ready", 71, 99, "0", "1", 0, "uring"),
        ),
        before=stats(*(stats_of(rule, before) for rule in rules)),
        after=stats(*(stats_of(rule, after) for rule in rules)),
        seconds=3.0,
    )
    return replace(made, **changes)


HOST = Host(
    release="6.12.1-amd64",
    links={
        "in0": link("in0", "192.0.2.1/24"),
        "out0": link("out0", "198.51.100.1/24", index=2),
        "out1": link("out1", "10.1.0.1/24", index=3),
    },
    joined=(Joined("in0", GROUP),),
    igmp_versions={"in0": "V3"},
    routes={
        (ip_address("239.2.2.2"), "out0"): Route(),
        (ip_address("10.1.0.2"), "out1"): Route(neighbour="reachable", mac="02:00:00:00:00:02"),
    },
)


def flow(
    destination: str = "239.1.1.1",
    port: int | None = 5000,
    *,
    interface: str = "in0",
    vlan: int | None = None,
    source: str = str(SENDER),
    ttl: int = 4,
    length: int = 1028,
    arrivals: Iterable[Arrival] = ("multicast",),
    **counts: Any,
) -> dict[FlowKey, Flow]:
    key = FlowKey(interface, vlan, ip_address(source), ip_address(destination), "udp", port)
    counted = {"packets": 100, "checked": 100, **counts}
    return {key: Flow(ttl_min=ttl, ttl_max=ttl, length_max=length, arrivals=set(arrivals), **counted)}


def walk(
    daemon: Daemon,
    flows: dict[FlowKey, Flow] | None = None,
    *,
    host: Host = HOST,
    input: str = INPUT,
    source: str | None = None,
    **seen: Any,
) -> list[Finding]:
    given = replace(parse_input(input), source=ip_address(source)) if source else parse_input(input)
    sightings = Sightings(3.0, flow() if flows is None else flows, **seen)
    return explain(Case(given, choose(given, daemon.rules), host, host, daemon, sightings))


def wrong(findings: Iterable[Finding]) -> list[str]:
    return [finding.step for finding in findings if finding.verdict == "bad"]


def found(findings: Iterable[Finding], step: str) -> Finding:
    matching = [finding for finding in findings if finding.step == step]
    assert matching, f"no {step} in {findings}"
    return max(matching, key=lambda finding: ("ok", "unknown", "note", "bad").index(finding.verdict))


RULE = facts_of(INPUT, MULTICAST, UNICAST, name="camera")


def with_link(name: str, **changes: Any) -> Host:
    return replace(HOST, links={**HOST.links, name: replace(HOST.links[name], **changes)})


def with_route(destination: str, interface: str, route: Route) -> Host:
    return replace(HOST, routes={**HOST.routes, (ip_address(destination), interface): route})


def test_nothing_is_wrong_where_all_holds() -> None:
    findings = walk(daemon_with(RULE), queriers={Querier("in0", ip_address("192.0.2.254"), "IGMPv3")})
    assert {finding.verdict for finding in findings} == {"ok"}
    steps = [finding.step for finding in findings]
    way = ["daemon", "rule", "interface", "carrier", "joined", "querier", "arriving", "link address", "checksum", "ttl"]
    way += ["length", "filter", "worker", "counters"]
    for number in (1, 2):
        way += [f"output {number} {step}" for step in ("state", "interface", "carrier", "address", "route")]
        way += [f"output {number} neighbour"] * (number == 2)
        way += [f"output {number} {step}" for step in ("mtu", "ttl", "counters")]
    assert steps == way


# --- the daemon and its rules -----------------------------------------------------------------------------------------


def test_without_a_daemon_the_rest_is_looked_at() -> None:
    findings = walk(Daemon("/run/x", problem="no mcrelay daemon at /run/x", remedy="sudo mcrelay run"))
    assert wrong(findings) == ["daemon"]
    assert found(findings, "daemon").remedy == "sudo mcrelay run"
    assert found(findings, "rule").verdict == "unknown"
    assert found(findings, "arriving").verdict == "ok"


def test_who_may_not_ask_the_daemon_does_not_know() -> None:
    findings = walk(Daemon("/run/x", problem="not permitted to use /run/x", is_at_fault=False))
    assert wrong(findings) == []


def test_a_daemon_in_another_namespace_is_asked_there() -> None:
    findings = walk(daemon_with(RULE, elsewhere="sudo nsenter --net=/proc/70/ns/net mcrelay explain"))
    assert wrong(findings) == ["namespace"]
    assert [finding.step for finding in findings] == ["daemon", "namespace", "rule"]


@pytest.mark.parametrize(
    ("asked", "rule", "word"),
    [
        ("239.1.1.1:5001%in0", INPUT, "Another port: it is for 5000"),
        ("239.1.1.1:5000%out0", INPUT, "Another interface: it is for in0"),
        ("239.1.1.9:5000%in0", INPUT, "Another address: it is for 239.1.1.1"),
        ("239.9.1.1:5000%in0", "239.1.0.0/16:5000%in0", "Other groups: its 239.1.0.0/16 does not hold 239.9.1.1"),
        ("239.1.1.1:5000%in0,vlan=5", INPUT, "It is for untagged packets"),
        ("239.1.1.1:5000%in0", "239.1.1.1:5000%in0,vlan=5", "It is for VLAN 5"),
        ("239.1.1.1:5000%in0", "10.0.0.9@239.1.1.1:5000%in0", "Another source: it is for packets from 10.0.0.9"),
        ("239.1.1.1:esp%in0", INPUT, "Another protocol: it is for UDP"),
        ("239.1.1.0/24:5000%in0", INPUT, "A part only: it is for 239.1.1.1 alone"),
        ("239.1.1.1:5000%eth+", "239.1.1.1:5000%eth1", "Another interface: it is for eth1"),
    ],
)
def test_a_rule_that_almost_takes_it_says_why_not(asked: str, rule: str, word: str) -> None:
    output = "239.2.2.2:esp%out0" if rule.endswith(":esp%in0") else MULTICAST
    findings = walk(daemon_with(facts_of(rule, output)), {}, input=asked)
    assert "rule" in wrong(findings)
    assert word in found(findings, "other rule").fact
    assert (found(findings, "rule").remedy or "").startswith("mcrelay add ")


def test_a_far_rule_is_not_near() -> None:
    findings = walk(daemon_with(facts_of("[ff05::1]:5000%in0"), facts_of("10.0.0.1:5000%in0")), {})
    assert not [finding for finding in findings if finding.step == "other rule"]


def test_the_most_specific_rule_takes_it() -> None:
    wide = [facts_of(text) for text in ("239.0.0.0/8:5000%in0", "239.1.0.0/16:5000%in0", "239.1.1.1:*%in0")]
    findings = walk(daemon_with(*wide))
    assert "for 239.1.1.1:*%in0 takes it" in found(findings, "rule").fact
    assert len([finding for finding in findings if finding.step == "other rule"]) == 2
    exact, of_source = facts_of(INPUT), facts_of(f"{SENDER}@{INPUT}")
    findings = walk(daemon_with(*wide, exact, of_source), source=str(SENDER))
    assert f"for {SENDER}@{INPUT} takes it" in found(findings, "rule").fact
    assert f"for {INPUT} takes it" in found(walk(daemon_with(*wide, exact, of_source)), "rule").fact


def test_a_rule_that_waits_says_for_what() -> None:
    rule = facts_of(INPUT, state="pending", why="interface 'in0' is down")
    findings = walk(daemon_with(rule, after=0), {}, host=with_link("in0", is_up=False))
    assert wrong(findings)[:2] == ["rule", "interface"]
    assert "interface 'in0' is down" in found(findings, "rule").fact
    assert "suspended" in found(walk(daemon_with(facts_of(INPUT, state="suspended", why="a loop"))), "rule").fact


def test_paused_outputs_are_told() -> None:
    findings = walk(daemon_with(facts_of(INPUT, f"{MULTICAST},paused")))
    assert wrong(findings) == []
    assert "paused" in found(findings, "rule").fact
    assert f"mcrelay add {INPUT} {MULTICAST}" in (found(findings, "output 1 state").remedy or "")


# --- between the wire and the daemon ----------------------------------------------------------------------------------


def test_an_interface_that_is_missing_is_named() -> None:
    findings = walk(daemon_with(), {}, input="239.1.1.1:5000%nope")
    assert "there is no interface 'nope'; this host has in0, out0, out1" in found(findings, "interface").fact
    assert "begins with 'eth'" in found(walk(daemon_with(), {}, input="239.1.1.1:5000%eth+"), "interface").fact


def test_an_interface_that_is_down_is_to_be_set_up() -> None:
    findings = walk(daemon_with(RULE), {}, host=with_link("in0", is_up=False))
    assert found(findings, "interface").remedy == "ip link set dev in0 up"


@pytest.mark.parametrize(("kind", "word"), [("", "cable"), ("veth", "other end"), ("bridge", "ports")])
def test_an_interface_without_a_carrier_is_told_by_its_kind(kind: str, word: str) -> None:
    findings = walk(daemon_with(RULE), {}, host=with_link("in0", has_carrier=False, kind=kind))
    assert "carrier" in wrong(findings)
    assert word in found(findings, "carrier").fact


def test_a_group_that_is_not_joined_is_told() -> None:
    findings = walk(daemon_with(RULE), host=replace(HOST, joined=()))
    assert "joined" in wrong(findings)
    findings = walk(daemon_with(), host=replace(HOST, joined=()), joined=("in0",))
    assert found(findings, "joined").verdict == "note"
    assert "joined while looking" in found(findings, "joined").fact


def test_sources_that_are_asked_for_are_told() -> None:
    rule = facts_of(f"{SENDER}@{INPUT}")
    joined = replace(HOST, joined=(Joined("in0", GROUP, (SENDER,)),))
    assert found(walk(daemon_with(rule), host=joined, source=str(SENDER)), "joined").verdict == "ok"
    other = replace(HOST, joined=(Joined("in0", GROUP, (ip_address("10.0.0.9"),)),))
    assert found(walk(daemon_with(rule), host=other, source=str(SENDER)), "joined").verdict == "unknown"
    older = replace(joined, igmp_versions={"in0": "V2"})
    assert "IGMPv2" in found(walk(daemon_with(rule), host=older, source=str(SENDER)), "joined").fact


def test_prefixes_are_joined_up_to_a_size() -> None:
    rule = facts_of("239.1.1.0/30:5000%in0")
    assert "1 of 4 groups" in found(walk(daemon_with(rule), input=rule.input), "joined").fact
    assert found(walk(daemon_with(rule), input=rule.input), "joined").verdict == "bad"
    wide = facts_of("239.0.0.0/8:5000%in0")
    assert found(walk(daemon_with(wide), input=wide.input), "joined").verdict == "note"


def test_a_group_of_a_rule_that_joins_nothing_may_come_all_the_same() -> None:
    daemon, silent = daemon_with(facts_of("239.0.0.0/8:5000%in0", "=:=%out0")), replace(HOST, joined=())
    comes = found(walk(daemon, host=silent), "joined")
    assert comes.verdict == "note"
    assert "239.0.0.0/8 is wider than /22" in comes.fact
    assert "239.1.1.1 comes all the same" in comes.fact
    assert (comes.remedy or "").startswith(f"mcrelay add {INPUT} '=:=%out0'  # ")
    assert "239.1.1.1 does not come" in found(walk(daemon, {}, host=silent), "joined").fact
    part = found(walk(daemon, {}, host=silent, input="239.1.1.0/24:5000%in0"), "joined")
    assert part.verdict == "note"
    assert "239.1.1.0/24 does not come" in part.fact


def test_a_unicast_input_is_an_address_of_this_host() -> None:
    rule = facts_of("192.0.2.1:5000%in0")
    seen = flow("192.0.2.1", arrivals=("host",))
    assert found(walk(daemon_with(rule), seen, input=rule.input), "address").verdict == "ok"
    elsewhere = facts_of("192.0.2.77:5000%in0")
    findings = walk(daemon_with(elsewhere), {}, input=elsewhere.input)
    assert "no address of this host" in found(findings, "address").fact
    broadcast = facts_of("192.0.2.255:5000%in0")
    assert "broadcast" in found(walk(daemon_with(broadcast), {}, input=broadcast.input), "address").fact


def test_a_bridge_that_snoops_without_a_querier_is_told() -> None:
    def with_bridge(bridge: Bridge) -> Host:
        host = with_link("in0", master="br0")
        return replace(host, links={**host.links, "br0": link("br0", kind="bridge", index=9, bridge=bridge)})

    findings = walk(daemon_with(RULE), host=with_bridge(Bridge(snooping=True, querier=False)))
    assert found(findings, "querier").verdict == "note"
    assert found(findings, "querier").remedy == "ip link set dev br0 type bridge mcast_querier 1"
    for bridge in (Bridge(snooping=False, querier=False), Bridge(snooping=True, querier=True)):
        assert found(walk(daemon_with(RULE), host=with_bridge(bridge)), "querier").verdict == "ok"


def test_no_querier_within_seconds_says_little() -> None:
    findings = walk(daemon_with(RULE))
    assert found(findings, "querier").verdict == "unknown"
    assert found(findings, "querier").remedy == f"mcrelay explain {INPUT} --seconds 130"
    older = replace(HOST, igmp_versions={"in0": "V2"})
    assert found(walk(daemon_with(RULE), host=older), "querier").verdict == "ok"
    forced = replace(older, sysctls={**older.sysctls, "net.ipv4.conf.all.force_igmp_version": "2"})
    assert found(walk(daemon_with(RULE), host=forced), "querier").verdict == "unknown"


def test_an_output_to_this_host_itself() -> None:
    own = HOST.links["out0"].addresses[0].ip
    for name, verdict in (("out0", "ok"), ("in0", "bad")):
        route = found(walk(daemon_with(facts_of(INPUT, f"{own}:6000%{name}"))), "output 1 route")
        assert (route.verdict, "this host's own" in route.fact) == (verdict, True)


def test_what_is_proposed_can_be_pasted() -> None:
    near = facts_of(INPUT, "239.2.2.2:6000%out0,ttl=3,paused")
    for asked, proposed in (
        ("239.1.1.2:5000%in0", "mcrelay add 239.1.1.2:5000%in0 239.2.2.2:6000%out0,ttl=3"),
        ("239.1.1.1:esp%in0", "mcrelay add 239.1.1.1:esp%in0 ADDRESS:esp%INTERFACE"),
        ("239.1.1.1:5000%nope0", None),
    ):
        assert found(walk(daemon_with(near), {}, input=asked), "rule").remedy == proposed
    assert found(walk(daemon_with(near), {}, input="239.1.1.1:esp%in0"), "arriving").remedy is None


@pytest.mark.parametrize(
    ("flows", "word", "remedy"),
    [
        (flow(port=5001), "to port 5001", "mcrelay explain 239.1.1.1:5001%in0"),
        (flow(interface="out1"), "on out1", "mcrelay explain 239.1.1.1:5000%out1"),
        (flow(vlan=7), "VLAN 7", "mcrelay explain 239.1.1.1:5000%in0,vlan=7"),
        (flow("239.9.9.9"), "other groups came: 239.9.9.9", "mcrelay send 239.1.1.1:5000%INTERFACE --count 1000"),
        ({}, "no packet of 239.1.1.1:5000%in0 within 3 s", "mcrelay send 239.1.1.1:5000%INTERFACE --count 1000"),
    ],
)
def test_what_comes_instead_is_shown(flows: dict[FlowKey, Flow], word: str, remedy: str) -> None:
    findings = walk(daemon_with(RULE, after=0), flows)
    assert wrong(findings) == ["arriving"]
    assert word in found(findings, "arriving").fact
    assert (found(findings, "arriving").remedy or "").partition("  #")[0] == remedy


def test_another_source_is_shown() -> None:
    findings = walk(daemon_with(RULE), source="10.9.9.9")
    assert f"but 100 from {SENDER}" in found(findings, "arriving").fact


def test_without_rights_it_says_what_was_not_looked_at() -> None:
    findings = walk(
        daemon_with(RULE), {}, problem="to look at frames takes CAP_NET_RAW", remedy="sudo mcrelay explain x"
    )
    assert wrong(findings) == []
    assert found(findings, "arriving").remedy == "sudo mcrelay explain x"
    assert found(findings, "counters").verdict == "ok"


@pytest.mark.parametrize(
    ("flows", "step"),
    [
        (flow(bad_checksums=3), "checksum"),
        (flow(arrivals=("other host",)), "link address"),
        (flow(source="198.51.100.1"), "source"),
    ],
)
def test_packets_that_would_be_dropped_are_told(flows: dict[FlowKey, Flow], step: str) -> None:
    assert wrong(walk(daemon_with(RULE), flows)) == [step]


def test_frames_with_a_wrong_destination_are_noted_if_they_come() -> None:
    findings = walk(daemon_with(RULE), flow(wrong_macs={"01:00:5e:7f:00:01"}))
    assert wrong(findings) == []
    assert "01:00:5e:7f:00:01, which is not the group's 01:00:5e:01:01:01" in found(findings, "link address").fact


def test_merged_frames_are_wrong_only_where_they_cannot_be_told() -> None:
    assert wrong(walk(daemon_with(RULE), flow(length=30000))) == []
    assert wrong(walk(daemon_with(RULE), flow(length=30000), host=replace(HOST, release="6.1.0-9"))) == ["length"]


# --- the daemon's part ------------------------------------------------------------------------------------------------


def test_packets_that_the_daemon_does_not_take_up_are_told() -> None:
    findings = walk(daemon_with(RULE, after=0))
    assert wrong(findings) == ["filter", "counters"]


def test_packets_that_the_rule_does_not_take_have_a_reason() -> None:
    listing = daemon_with(RULE).listing
    dropping = daemon_with(RULE, after=0, listing=listing)
    after = stats(stats_of(RULE, 0), dropped={"bad_udp_checksum": 100})
    findings = walk(replace(dropping, after=after))
    assert wrong(findings) == ["counters"]
    assert "100 as bad_udp_checksum" in found(findings, "counters").fact
    assert (found(findings, "counters").remedy or "").startswith("ethtool -S in0")
    own = replace(dropping, after=stats(stats_of(RULE, 0, own=100)))
    assert "dropped as own" in found(walk(own), "counters").fact


def test_a_worker_that_does_not_work_is_told() -> None:
    dead = ProcessFacts("data", 0, "waiting", None, None, None, None, 7)
    findings = walk(daemon_with(RULE, processes=(dead,)))
    assert "worker" in wrong(findings)
    assert "restarted 7 times" in found(findings, "worker").fact
    assert found(findings, "filter").verdict == "unknown"


def test_a_daemon_without_its_filter_says_so() -> None:
    supervisor = ProcessFacts("supervisor", 0, "ready", 70, 0, "3000", "0-1", 0)
    findings = walk(daemon_with(RULE, processes=(supervisor, *daemon_with(RULE).workers)))
    assert found(findings, "filter").verdict == "note"


def test_what_does_not_reach_a_rootless_daemon_is_told() -> None:
    supervisor = ProcessFacts("supervisor", 0, "ready", 70, 1000, "0" * 16, "0-1", 0)
    workers = daemon_with(RULE).workers
    assert found(walk(daemon_with(RULE, processes=(supervisor, *workers))), "sockets").verdict == "note"
    findings = walk(daemon_with(RULE, after=0, processes=(supervisor, *workers)))
    assert wrong(findings) == ["sockets", "counters"]
    assert "no route back" in found(findings, "sockets").fact
    assert "net.ipv4.conf.in0.rp_filter=0" in (found(findings, "sockets").remedy or "")


# --- outputs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "step", "remedy"),
    [
        (replace(HOST, links={"in0": HOST.links["in0"], "out0": HOST.links["out0"]}), "interface", "ip -brief link"),
        (with_link("out1", is_up=False), "interface", "ip link set dev out1 up"),
        (with_link("out1", has_carrier=False), "carrier", "ethtool out1"),
        (with_link("out1", addresses=()), "address", "ip address add ADDRESS/LENGTH dev out1"),
        (
            with_route("10.1.0.2", "out1", Route(error="Network is unreachable")),
            "route",
            "ip route add 10.1.0.2/32 via GATEWAY dev out1",
        ),
        (with_route("10.1.0.2", "out1", Route(neighbour="failed")), "neighbour", "ping -c 3 -I out1 10.1.0.2"),
        (
            with_route("10.1.0.2", "out1", Route(gateway=ip_address("10.1.0.9"), neighbour="incomplete")),
            "neighbour",
            "ping -c 3 -I out1 10.1.0.9",
        ),
    ],
)
def test_an_output_that_leads_nowhere_is_told(host: Host, step: str, remedy: str) -> None:
    findings = walk(daemon_with(RULE), host=host)
    assert wrong(findings) == [f"output 2 {step}"]
    assert found(findings, f"output 2 {step}").remedy == remedy


def test_a_destination_without_a_route_is_taken_for_a_neighbour() -> None:
    unknown = with_route("10.1.0.2", "out1", Route(matched=False, neighbour="failed"))
    assert wrong(walk(daemon_with(RULE), host=unknown)) == ["output 2 route", "output 2 neighbour"]
    known = with_route("10.1.0.2", "out1", Route(matched=False, neighbour="reachable"))
    assert wrong(walk(daemon_with(RULE), host=known)) == []


def test_a_source_that_is_not_this_host_s_is_noted() -> None:
    for option, verdict in (
        ("source=198.51.100.1", "ok"),
        ("source=keep", "ok"),
        ("source=198.51.100.77", "note"),
        ("source=198.51.100.77,sport=4000", "note"),
    ):
        findings = walk(daemon_with(facts_of(INPUT, f"239.2.2.2:6000%out0,{option}")))
        assert wrong(findings) == []
        address = found(findings, "output 1 address")
        assert address.verdict == verdict
        assert ("rp_filter" in address.fact) == (option != "source=198.51.100.1")


@pytest.mark.parametrize(
    ("destination", "source", "is_wrong"),
    [
        ("ff05::2", None, True),
        ("ff0e::2", None, True),
        ("ff02::2", None, False),
        ("fe80::9", None, False),
        ("2001:db8::9", None, True),
        ("2001:db8::9", "2001:db8:7::1", False),  # of another interface, as the kernel chose
        ("2001:db8::9", "fe80::1", True),
    ],
)
def test_a_link_local_source_does_not_get_beyond_the_link(destination: str, source: str | None, is_wrong: bool) -> None:
    address = ip_address(destination)
    route = Route(neighbour="reachable", source=ip_address(source) if source else None)
    host = replace(with_link("out0", addresses=(ip_interface("fe80::1/64"),)), routes={(address, "out0"): route})
    findings = walk(daemon_with(facts_of(INPUT, f"[{destination}]:6000%out0,ttl=8")), host=host)
    assert wrong(findings) == (["output 1 address"] if is_wrong else [])
    if is_wrong:
        assert found(findings, "output 1 address").remedy == "ip address add ADDRESS/LENGTH dev out0"


@pytest.mark.parametrize(
    ("options", "came", "verdict", "word"),
    [
        ("", 4, "ok", "TTL 3 (it came with 4)"),
        ("", 1, "note", "TTL 1"),
        (",ttl=keep", 4, "ok", "TTL 4"),
        (",ttl=1", 9, "note", "no router forwards them"),
    ],
)
def test_the_ttl_says_how_far_copies_get(options: str, came: int, verdict: str, word: str) -> None:
    findings = walk(daemon_with(facts_of(INPUT, f"239.2.2.2:6000%out0{options}")), flow(ttl=came))
    assert found(findings, "output 1 ttl").verdict == verdict
    assert word in found(findings, "output 1 ttl").fact


def test_a_ttl_of_1_does_not_pass_a_gateway() -> None:
    gateway = with_route("10.1.0.2", "out1", Route(gateway=ip_address("10.1.0.9"), neighbour="reachable"))
    findings = walk(daemon_with(RULE), flow(ttl=1), host=gateway)
    assert wrong(findings) == ["output 2 ttl"]
    expected = f"mcrelay remove camera && mcrelay add {INPUT} {MULTICAST} {UNICAST},ttl=8 --name camera"
    assert found(findings, "output 2 ttl").remedy == expected


def test_copies_longer_than_the_mtu_are_cut_apart() -> None:
    findings = walk(daemon_with(RULE), host=with_link("out0", mtu=900))
    assert found(findings, "output 1 mtu").remedy == "ip link set dev out0 mtu 1028"
    findings = walk(daemon_with(RULE, after=0), {}, host=with_link("out0", mtu=900))
    assert found(findings, "output 1 mtu").verdict == "note"
    assert "up to 1,500 bytes" in found(findings, "output 1 mtu").fact


def test_datagrams_that_came_in_fragments_leave_in_them() -> None:
    rule = facts_of(INPUT, "[ff05::2]:6000%out0", "239.2.2.2:6000%out1")
    host = with_link("out0", addresses=(ip_interface("2001:db8::1/64"),))
    seen = flow(length=1500, fragments=100, fragmented_max=3008)
    findings = walk(daemon_with(rule), seen, host=host)
    assert "of up to 3,048 bytes leave" in found(findings, "output 1 mtu").fact
    assert found(findings, "output 1 mtu").remedy == "ip link set dev out0 mtu 3048"
    assert "of up to 3,028 bytes leave" in found(findings, "output 2 mtu").fact
    assert "datagrams of up to 3,028 bytes" in found(findings, "fragments").fact
    huge = walk(daemon_with(rule), flow(length=1500, fragments=100, fragmented_max=60000), host=host)
    assert found(huge, "output 1 mtu").remedy is None


def test_without_traffic_the_longest_that_can_come_is_compared() -> None:
    rule = facts_of(INPUT, "[ff05::2]:6000%out0", "239.2.2.2:6000%out1")
    findings = walk(daemon_with(rule, after=0), {})
    mtu = found(findings, "output 2 mtu")
    assert (mtu.verdict, "up to 1,500 bytes" in mtu.fact) == ("ok", True)
    mtu = found(findings, "output 1 mtu")
    assert (mtu.verdict, "up to 1,520 bytes" in mtu.fact) == ("note", True)
    gone = replace(HOST, links={name: link for name, link in HOST.links.items() if name != "in0"})
    assert found(walk(daemon_with(rule, after=0), {}, host=gone), "output 2 mtu").verdict == "unknown"


def test_an_output_that_drops_says_why() -> None:
    after = stats(stats_of(RULE, 100, dropped={"egress_full": 60}))
    findings = walk(replace(daemon_with(RULE), after=after))
    assert wrong(findings) == ["output 1 counters", "output 2 counters"]
    assert "60 copies dropped within 3.0 s as egress_full" in found(findings, "output 1 counters").fact
    assert (found(findings, "output 1 counters").remedy or "").startswith("tc -s qdisc show dev out0")


def test_ipv6_is_walked_alike() -> None:
    rule = facts_of("[ff05::1]:5000%in0", "[ff05::2]:6000%out0", "[2001:db8::9]:6000%out1")
    host = replace(
        HOST,
        joined=(Joined("in0", ip_address("ff05::1")),),
        links={**HOST.links, "out0": link("out0", "2001:db8:1::1/64"), "out1": link("out1", "2001:db8::1/64")},
        routes={
            (ip_address("ff05::2"), "out0"): Route(),
            (ip_address("2001:db8::9"), "out1"): Route(neighbour="stale"),
        },
    )
    seen = flow("ff05::1", source="2001:db8:5::5")
    assert wrong(walk(daemon_with(rule), seen, host=host, input=rule.input)) == []
    tentative = replace(host.links["out0"], tentative=(ip_address("2001:db8:1::1"),))
    blocked = replace(host, links={**host.links, "out0": tentative})
    assert wrong(walk(daemon_with(rule), seen, host=blocked, input=rule.input)) == ["output 1 address"]


def test_of_many_rules_the_nearest_are_shown() -> None:
    rules = [facts_of(f"239.{n}.1.1:5000%in0") for n in range(100)]
    findings = walk(daemon_with(*rules), {}, input="239.2.1.9:5000%in0")
    shown = [finding.remedy for finding in findings if finding.step == "other rule"]
    assert shown[0] == "mcrelay explain 239.2.1.1:5000%in0"
    assert len(shown) == 3


def test_a_rule_for_all_workers_is_told_in_one_line() -> None:
    supervisor = daemon_with().processes[0]
    workers = [ProcessFacts("data", n, "ready", 71 + n, 99, "0", str(n), 0, "uring") for n in range(8)]
    rule = facts_of("239.1.0.0/16:5000%in0")
    findings = walk(daemon_with(rule, processes=(supervisor, *workers)))
    assert [f.fact for f in findings if f.step == "worker"] == ["steered to 8 of 8 data planes, by destination: ready"]
    workers[3] = ProcessFacts("data", 3, "waiting", None, None, None, None, 9)
    findings = walk(daemon_with(rule, processes=(supervisor, *workers)))
    assert "data/3 of 8: waiting, restarted 9 times" in found(findings, "worker").fact

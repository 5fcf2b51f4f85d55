"""Other relays' configurations, read as files of theirs are written, and what mcrelay makes of them."""

from __future__ import annotations

import contextlib
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.program import run_program
from mcrelay.config import read
from mcrelay.errors import BadConfig
from mcrelay.importers import FORMATS
from mcrelay.importers.imported import Imported, command_lines
from mcrelay.rules import Rule

FILES: Final = Path(__file__).with_name("imports")
SPEAKERS: Final = "--interfaces eth0 eth1 eth2 --noSonosDiscovery --noTransmitInterfaces eth2 --masquerade eth1"


# A rule of two outputs: interface and group of its input, and of the first.
MCR: Final = (
    "{{rules: [{{input: {{interface: '{}', port: 7, group: '{}'}}, outputs: ["
    "{{interface: '{}', port: 8, group: '{}'}}, {{interface: 'z', port: 9, group: '239.9.9.9'}}]}}]}}"
)


def rules(imported: Imported) -> list[Rule]:
    """What the daemon would have of it."""
    return list(read([("imported.toml", "\n".join(imported.toml()).encode())]).rules)


def texts(imported: Imported) -> dict[str, list[str]]:
    return {str(rule.input): list(map(str, rule.outputs)) for rule in rules(imported)}


def remarks(imported: Imported) -> list[str]:
    return list(map(str, imported.remarks))


def test_mcr() -> None:
    imported = FORMATS["mcr"].read((FILES / "mcr.json5").read_text())
    assert texts(imported) == {
        "239.1.1.1:5001%eth0": ["239.2.2.2:5002%eth1,ttl=8", "10.0.0.100:6003%eth2", "239.2.2.2:5002%eth3"],
        "10.0.0.50:5002%eth1": ["[ff15::7]:5002%eth0"],
    }
    assert [rule.name for rule in rules(imported)] == ["hall-feed-1", None]
    assert read([("x", "\n".join(imported.toml()).encode())]).settings.daemon.cores == "2,3,4"
    assert [remark.split(";")[0] for remark in remarks(imported)] == [
        "rule 1, output 2: 'dtls' is left out: it has no equivalent",
        "'hall feed/1' cannot be a rule's name",
        "rule 3 is left out: Object missing required field `port` - at `$.input`",
        "'once more' cannot be a rule's name",
        "rule 4 has the input of 'hall-feed-1', and its outputs are added there",
        "rule 5 is left out: rule '239.1.1.7:5001%eth0' has no output",
        "'pinning' of 'eth2' is left out: it names no core",
        "mcrelay's workers are not an interface's: each core's has packets of all",
        "'igmp' has no equivalent: mcrelay has no IGMP querying",
        "'pim' has no equivalent: mcrelay has no PIM-SM",
        "'msdp' has no equivalent: mcrelay has no MSDP",
        "'control_plane' has no equivalent: mcrelay has no place for a router's",
        "'prometheus' is left out: it has no equivalent",
    ]
    assert remarks(imported)[1].endswith("; it is called hall-feed-1")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{rules: [3]}", "rule 1 is left out: Expected `object`, got `int`"),
        ("{rules: [{input: 3, outputs: []}]}", "rule 1 is left out: Expected `object`, got `int` - at `$.input`"),
        ("{rules: [{input: {interface: 'a', group: 7, port: 1}, outputs: []}]}", "Expected `str`, got `int`"),
        ("{rules: [{input: {interface: 'a', group: 'x', port: 0x" + "f" * 5000 + "}, outputs: []}]}", "$.input.port"),
        ("{pinning: 0}", "'pinning' is left out: Expected `object`, got `int`"),
        ("{pinning: {eth0: 'all'}}", "'pinning' is left out: Expected `array`, got `str`"),
    ],
)
def test_what_mcr_would_not_take_is_left_out(text: str, says: str) -> None:
    imported = FORMATS["mcr"].read(text)
    assert not imported.has_rules
    (said,) = remarks(imported)
    assert says in said
    assert "; " in said


def test_smcroute() -> None:
    imported = FORMATS["smcroute"].read((FILES / "smcroute.conf").read_text())
    kept = ",source=keep,sport=keep"
    both = [f"=:=%eth1{kept}", f"=:=%eth2{kept}"]
    assert texts(imported) == {
        "192.0.2.42@225.1.2.3:*%eth0": both,
        "225.3.2.0/24:*%eth0": both,
        **{f"192.0.2.{n}@225.9.9.9:*%eth+": [f"=:=%eth9{kept}"] for n in (8, 9, 10, 11)},
        "[ff2e::42]:*%eth0": [f"=:=%eth1{kept}"],
        "225.7.7.0/24:*%eth0": [f"=:=%eth1{kept}"],
    }
    assert [remark.split("; ")[0] for remark in remarks(imported)] == [
        "line 2: ttl-threshold 11 of 'eth0' has no equivalent",
        "line 3: mrdisc of 'eth1' has no equivalent",
        "line 11: this line is left out: group '232.1.1.1' of '192.0.2.1' is joined on 'eth4', and no rule"
        " forwards all of it",
        "line 12: the output 'eth5' is left out: packets do not leave where they came in",
        "line 12: the output 'eth+' is left out: a pattern is for inputs",
        "line 12: this route is left out: nothing of '225.5.5.5' is sent on",
        "line 13: '/etc/smcroute.d/*.conf' is left out: included files are not read",
        "line 15: 'eth7' is disabled here, and rules that name it are written all the same",
        "line 16: 'igmpv3' is no word of phyint, and is left out",
        "line 17: group '225.3.2.0/24' of '192.0.2.7' is joined on 'eth0', and not of others",
        "line 18: 'iif' is no word of mroute, and is left out",
        "line 18: 'eth0' is no word of mroute, and is left out",
        "line 18: the output 'eth1' is named twice, and counts once",
        "line 18: the output 'eth0' is left out: packets do not leave where they came in",
        "line 19: this rule is left out: input '10.1.2.3/8:*%eth0': a prefix is one of multicast groups",
    ]
    assert all("; " in remark for remark in remarks(imported))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("mroute from eth0 bogus group 225.1.1.1 blah to eth1", ["bogus", "blah"]),
        ("mgroup from eth0 group 225.1.1.1 foo", ["foo"]),
        ("ssmgroup from eth0 source 192.0.2.1 port 5 group 225.1.1.1", ["port", "5"]),
        ("mgroup from eth0 group 225.1.1.1 to eth1", ["to", "eth1"]),
        ("phyint eth0 frob", ["frob"]),
        ("phyint eth0 enable threshold 3", ["threshold", "3"]),
        ("include /etc/a.conf /etc/b.conf", ["/etc/b.conf"]),
    ],
)
def test_words_that_smcroute_has_not_are_named(line: str, words: list[str]) -> None:
    imported = FORMATS["smcroute"].read(f"\nmroute from eth0 group 225.1.1.1 to eth1\n{line}")
    assert list(texts(imported)) == ["225.1.1.1:*%eth0"]
    named = [remark for remark in imported.remarks if "is no word of" in remark.what]
    assert [(remark.line, remark.what.split(" ")[0]) for remark in named] == [(3, repr(word)) for word in words]


def test_joins_that_a_route_does_not_make_are_named() -> None:
    text = "mroute from a source 192.0.2.1 group 225.1.1.1 to b\n" + "".join(
        f"mgroup from {join}\n"
        for join in (
            "a group 225.1.1.1",
            "a source 192.0.2.1 group 225.1.1.1",
            "a source 192.0.2.2 group 225.1.1.1",
            "b group 225.1.1.1",
            "a group 225.1.1.0/24",
        )
    )
    imported = FORMATS["smcroute"].read(text)
    assert [remark.line for remark in imported.remarks] == [4, 5, 6]
    assert all("this line is left out" in remark.what for remark in imported.remarks)


@pytest.mark.parametrize(
    ("route", "join", "says"),
    [
        ("a group 225.1.1.1/32", "a group 225.1.1.1", None),
        ("a group 225.1.1.1", "a group 225.1.1.1/32", None),
        ("a group 225.1.0.0/16", "a group 225.1.1.0/24", None),
        ("a group 225.1.1.0/25 to c\nmroute from a group 225.1.1.128/25", "a group 225.1.1.0/24", None),
        ("a group 225.1.1.0/25 to c\nmroute from a group 225.1.1.192/26", "a group 225.1.1.0/24", "no rule"),
        ("a group 225.1.1.0/25", "a group 225.1.1.0/24", "no rule"),
        ("a group 225.1.1.0/24", "a group ff05::1", "no rule"),
        ("a+ group 225.1.1.1", "a0 group 225.1.1.1", None),
        ("a+ group 225.1.1.1", "a+ group 225.1.1.1", None),
        ("a0 group 225.1.1.1", "a+ group 225.1.1.1", "no rule"),
        ("a source 192.0.2.0/29 group 225.1.1.1", "a source 192.0.2.7 group 225.1.1.1", None),
        ("a source 192.0.2.0/29 group 225.1.1.1", "a source 192.0.2.4/30 group 225.1.1.1/32", None),
        ("a source 192.0.2.0/29 group 225.1.1.1", "a source 192.0.2.0/28 group 225.1.1.1", "no rule"),
        ("a source 192.0.2.0/29 group 225.1.1.1", "a source 192.0.0.0/16 group 225.1.1.1", "no rule"),
        ("a group 225.1.0.0/16", "a source 192.0.2.7 group 225.1.1.1", "any source"),
        ("a group 225.1.1.1", "a group x", "not an IP address"),
        ("a group 225.1.1.1", "a source fe80::1%c group 225.1.1.1", "not an IP address"),
    ],
)
def test_a_join_is_compared_with_the_rules_made(route: str, join: str, says: str | None) -> None:
    imported = FORMATS["smcroute"].read(f"mgroup from {join}\nmroute from {route} to b")
    assert imported.has_rules
    assert [says in remark if says else remark for remark in remarks(imported)] == ([True] if says else [])


def test_a_join_whose_route_is_left_out_is_named() -> None:
    imported = FORMATS["smcroute"].read("mgroup from a group 225.1.1.1\nmroute from a group 225.1.1.1 to a")
    assert "line 1: this line is left out" in remarks(imported)[0]


@pytest.mark.parametrize(
    ("name", "text", "left", "says"),
    [
        ("smcroute", "mroute from a,vlan=5 group 225.1.1.1 to b", 0, "this route is left out: 'a,vlan=5' is not"),
        ("smcroute", "mroute from a group 225.1.1.1 to b,paused c", 1, "the output 'b,paused' is left out"),
        ("smcroute", "mroute from a group 1.2.3.4@225.1.1.1 to b", 0, "'1.2.3.4@225.1.1.1' is not an IP address"),
        ("smcroute", "mroute from a group = to b", 0, "'=' is not an IP address"),
        ("smcroute", "mroute from a group 225.1.1.0/24:7%c,vlan=5 to b", 0, "/24:7%c,vlan=5"),
        ("multicast-relay", "--interfaces a b c,paused --noM --noSS", 2, "the interface 'c,paused' is left out"),
        ("multicast-relay", "--interfaces a b eth+ --noM --noSS", 2, "'eth+' would be a pattern"),
        ("udp-broadcast-relay", "--port 7 --dev a --dev b --dev c,ttl=9", 2, "the device 'c,ttl=9' is left out"),
        ("udp-broadcast-relay", "--port 7 --dev a --dev c,ttl=9", 0, "fewer than two are left"),
        ("udp-broadcast-relay", "--port 7 --dev a --dev b -s 192.0.2.1,paused", 0, "'192.0.2.1,paused' is not"),
        ("udp-broadcast-relay", "--port 7 --dev a --dev b --multicast 1.2.3.4@239.1.1.1", 0, "the group '1.2.3.4@239"),
        ("udp-broadcast-relay", "--port '*' --dev a --dev b", 0, "'*' is not a port"),
        ("mcr", MCR.format("a", "1.2.3.4@239.1.1.1", "b", "239.2.2.2"), 0, "rule 1 is left out: '1.2.3.4@239.1.1.1'"),
        ("mcr", MCR.format("a", "239.1.1.0/24", "b", "239.2.2.2"), 0, "'239.1.1.0/24' is not an IP address"),
        ("mcr", MCR.format("a,vlan=5", "239.1.1.1", "b", "239.2.2.2"), 0, "'a,vlan=5' is not possible"),
        ("mcr", MCR.format("a+", "239.1.1.1", "b", "239.2.2.2"), 0, "'a+' would be a pattern"),
        ("mcr", MCR.format("a", "239.1.1.1", "b,paused", "239.2.2.2"), 1, "rule 1, output 1, is left out: 'b,paused'"),
        ("mcr", MCR.format("a", "239.1.1.1", "b", "="), 1, "rule 1, output 1, is left out: '='"),
        ("mcr", MCR.format("a", "239.1.1.1', source: 'fe80::1%x", "b", "239.2.2.2"), 0, "'fe80::1%x' is not"),
    ],
)
def test_names_are_not_read_as_more_than_names(name: str, text: str, left: int, says: str) -> None:
    imported = FORMATS[name].read(text)
    outputs = [output for rule in rules(imported) for output in rule.outputs]
    assert len(outputs) == left
    assert not any(output.paused for output in outputs)
    assert [said for said in remarks(imported) if says in said]


def test_a_line_ends_at_a_line_feed_alone() -> None:
    imported = FORMATS["smcroute"].read("# \u2028mroute from a group 225.1.1.1 to b\r\nphyint a mrdisc\r\n")
    assert not imported.has_rules
    assert [remark.line for remark in imported.remarks] == [2]


def test_multicast_relay() -> None:
    imported = FORMATS["multicast-relay"].read(f"python3 /opt/multicast-relay.py {SPEAKERS} --relay 239.9.9.9:99")
    way = "source=keep,sport=keep"
    for group in ("224.0.0.251:5353", "239.255.255.250:1900", "239.9.9.9:99"):
        found = {name: outputs for name, outputs in texts(imported).items() if name.startswith(group)}
        assert found == {
            f"{group}%eth0": ["=:=%eth1,ttl=keep,sport=keep"],
            f"{group}%eth1": [f"=:=%eth0,ttl=keep,{way}"],
            f"{group}%eth2": [f"=:=%eth0,ttl=keep,{way}", "=:=%eth1,ttl=keep,sport=keep"],
        }
    assert len(texts(imported)) == 9
    assert remarks(imported) == []


def test_multicast_relay_has_what_mcrelay_has_not() -> None:
    imported = FORMATS["multicast-relay"].read((FILES / "multicast-relay.txt").read_text())
    found = texts(imported)
    groups = ("224.0.0.251:5353", "239.255.255.250:1900", "239.9.9.9:99", "255.255.255.255:9")
    assert {name: outputs for name, outputs in found.items() if name.endswith(("%br-lan", "%br-iot"))} == {
        **{f"{group}%br-lan": ["=:=%br-iot,ttl=7,sport=keep"] for group in groups},
        **{f"{group}%br-iot": ["=:=%br-lan,ttl=7,source=keep,sport=keep"] for group in groups},
    }
    kept = "ttl=keep,source=keep,sport=keep"
    assert found["255.255.255.255:6969%eth2"] == [f"=:=%eth0,{kept}", f"=:=%eth1,{kept}"]
    assert found["255.255.255.255:6969%eth0"] == [f"=:=%eth1,{kept}"]
    assert len(found) == 11
    assert [remark.split("; ")[0] for remark in remarks(imported)] == [
        "line 2: the interface '192.0.2.0/24' is left out: an address stands for an interface that only the host knows",
        "line 2: '192.0.2.0/24' of --masquerade is none of the interfaces, and is left out",
        "line 2: --mdnsForceUnicast has no equivalent",
        "line 2: --ifFilter has no equivalent",
        "line 2: --remote has no equivalent",
        "line 2: --remotePort has no equivalent",
        "line 2: --aes has no equivalent",
        "line 2: --k8sport has no equivalent",
        "line 2: --relay '239.9.9.9' is left out: it has not the form ADDRESS:PORT",
        "line 6: 'sudo ip netns exec hall' in front of the program is not translated",
        "line 6: the interface 'eth1' is named twice, and counts once",
        "line 6: 'eth3' of --noTransmitInterfaces is none of the interfaces, and is left out",
        "line 6: --ssdpRepeat has no equivalent",
        "line 6: --logfile has no equivalent",
    ]


def test_options_are_abbreviated_and_given_twice() -> None:
    line = "--interf a b --interfaces c d --noM --noSS --noSo --rel 239.1.1.1:7 239.1.1.1:7"
    imported = FORMATS["multicast-relay"].read(line)
    assert list(texts(imported)) == ["239.1.1.1:7%c", "239.1.1.1:7%d"]
    assert [remark.what for remark in imported.remarks] == [
        "--interfaces is there twice, and the last counts",
        "--relay '239.1.1.1:7' is named twice, and counts once",
    ]


def test_command_lines_are_a_shells() -> None:
    text = (
        "# one\n"
        """--log /tmp/a#b '#' ""# c'o'\\#d # two \\\n"""
        """--dev 'a\nb' "c \\\\\\" \\x \\\nd" \\\r\n  e\\ f\\\ng\r\n\n\n"""
        "-x \\"
    )
    assert list(command_lines(text)) == [
        (2, ["--log", "/tmp/a#b", "#", "#", "co#d"]),
        (3, ["--dev", "a\nb", 'c \\" \\x d', "e fg"]),
        (10, ["-x"]),
    ]


@given(st.lists(st.text(), min_size=1))
def test_quoted_words_are_words(words: list[str]) -> None:
    line = shlex.join(words).replace("\r\n", "\n")
    if "$" not in line and "`" not in line:
        assert list(command_lines(line)) == [(1, [word.replace("\r\n", "\n") for word in words])]


def test_a_hash_inside_a_word_begins_no_comment() -> None:
    line = "multicast-relay.py --interfaces a b --logfile /tmp/a#b --noMDNS --noSSDP # --noSonosDiscovery"
    assert list(texts(FORMATS["multicast-relay"].read(line))) == ["255.255.255.255:6969%a", "255.255.255.255:6969%b"]


def test_udp_broadcast_relay() -> None:
    imported = FORMATS["udp-broadcast-relay"].read((FILES / "udp-broadcast-relay.txt").read_text())
    way = "ttl=keep,source=keep,sport=keep"
    ssdp = "239.255.255.250:1900"
    assert texts(imported) == {
        "255.255.255.255:6112%eth0": [f"=:=%eth1,{way}"],
        "255.255.255.255:6112%eth1": [f"=:=%eth0,{way}"],
        f"{ssdp}%eth0": [f"=:=%eth1,{way}", f"=:=%br2,{way}"],
        f"{ssdp}%eth1": [f"=:=%eth0,{way}", f"=:=%br2,{way}"],
        f"{ssdp}%br2": [f"=:=%eth0,{way}", f"=:=%eth1,{way}"],
        "224.0.0.251:5353%eth0": ["=:=%eth1,ttl=keep,sport=5353"],
        "224.0.0.251:5353%eth1": ["=:=%eth0,ttl=keep,sport=5353"],
        **{
            f"{where}%{here}": [f"=:=%{there},{way}"]
            for where in ("239.255.255.250:1902", "255.255.255.255:21027")
            for here, there in (("eth0", "eth1"), ("eth1", "eth0"))
        },
    }
    assert [(remark.line, remark.what) for remark in imported.remarks if "broadcasts" not in remark.what] == [
        (7, "--msearch 'dial' has no equivalent"),
        (7, "--msearch 'block,upnp:rootdevice' has no equivalent"),
        (7, "--blockid '3' has no equivalent"),
        (7, "--pid '/run/relay.pid' has no equivalent"),
        (9, "--blockcidr '192.0.2.0/24' has no equivalent"),
        (9, "'eth2' is left out: it belongs to no option"),
    ]
    assert [remark.line for remark in imported.remarks if "broadcasts" in remark.what] == [2, 3, 4, 7, 9]


def test_what_starts_a_program_is_none_of_its_options() -> None:
    for start, remarked in (("sudo ", False), ("/usr/sbin/", False), ("ip netns exec x ", True), ("", False)):
        imported = FORMATS["udp-broadcast-relay"].read(f"{start}udp-broadcast-relay -f 1 6112 eth0 eth1 &")
        assert len(texts(imported)) == 2
        assert any("in front of the program" in remark for remark in remarks(imported)) == remarked


def test_a_value_that_is_given_twice_is_named() -> None:
    imported = FORMATS["udp-broadcast-relay"].read("--port 7 --port 8 --dev a --dev b --dev a")
    assert list(texts(imported)) == ["255.255.255.255:8%a", "255.255.255.255:8%b"]
    assert remarks(imported)[0].startswith("line 1: --port is there twice, and the last counts; ")
    assert remarks(imported)[1].startswith("line 1: the device 'a' is named twice, and counts once; ")


def test_a_source_that_is_given() -> None:
    line = "--id 1 --port 7 --dev a --dev b --multicast 239.1.1.1 {}"
    outputs = {
        "-s 192.0.2.7": "source=192.0.2.7,sport=keep",
        "-s 1.1.1.2": "sport=keep",
        "-s 1.1.1.1": "sport=7",
    }
    for option, says in outputs.items():
        imported = FORMATS["udp-broadcast-relay"].read(line.format(option))
        assert texts(imported)["239.1.1.1:7%a"] == [f"=:=%b,ttl=keep,{says}"]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("mcr", "{", "this is not JSON5"),
        ("mcr", "[]", "this is no object"),
        ("mcr", "{rules: 3}", "'rules' is no list"),
        ("mcr", "[" * 1000, "nested too deeply"),
        ("smcroute", "mroute from eth0 to eth1", "line 1: there is no 'group'"),
        ("smcroute", "\nfrobnicate eth0", "line 2: 'frobnicate' is no directive"),
        ("mcr", "{rules: [], rules: []}", "this is not JSON5"),
        ("smcroute", "mroute eth0 group 225.1.1.1 to b", "line 1: there is no 'from'"),
        ("smcroute", "mroute from a group 225.1.1.1", "line 1: there is no 'to'"),
        ("smcroute", "mroute from a to b group 225.1.1.1", "line 1: 'group' stands behind 'to'"),
        ("smcroute", "mroute from a group 225.1.1.1 to b ttl 5", "line 1: 'ttl' stands behind 'to'"),
        ("smcroute", "mroute from a from b group 225.1.1.1 to c", "line 1: 'from' is there twice"),
        ("smcroute", "mroute from a source group 225.1.1.1 to c", "line 1: there is nothing behind 'source'"),
        ("smcroute", "mroute from a group", "line 1: there is nothing behind 'group'"),
        ("smcroute", 'mroute from "eth 0" group 225.1.1.1 to b', "line 1: '\"eth' has a quote"),
        ("smcroute", "phyint", "line 1: 'phyint' names no interface"),
        ("smcroute", "phyint a ttl-threshold", "line 1: '' is no TTL"),
        ("smcroute", "phyint a ttl-threshold 256", "line 1: '256' is no TTL"),
        ("smcroute", "include", "line 1: 'include' names no file"),
        ("smcroute", "mroute from a source x group 225.1.1.1 to b", "line 1: 'x' is no source"),
        ("multicast-relay", "--noSSDP", "--interfaces"),
        ("multicast-relay", "--interfaces a b --frob", "--frob"),
        ("multicast-relay", "'", "no command line"),
        ("multicast-relay", "# nothing", "there is no command line"),
        ("multicast-relay", "eth0 --interfaces a b", "line 1: these are no options"),
        ("multicast-relay", "--interfaces a b --ttl x", "--ttl"),
        ("multicast-relay", "--interfaces a b --ttl 256", "line 1: --ttl 256 is not possible"),
        ("multicast-relay", "\n--interfaces $LAN b", "line 2: '$LAN' is known to the shell alone"),
        ("udp-broadcast-relay", "--port 7 --dev a --dev a", "line 1: there is no port, or fewer than two devices"),
        ("udp-broadcast-relay", "x 7 a b", "line 1: there is no port, or fewer than two devices"),
        ("udp-broadcast-relay", "--port 7 --dev a --dev b # \\\n --dev", "line 2: --dev has no value"),
        ("udp-broadcast-relay", "", "there is no command line"),
        ("udp-broadcast-relay", "\n/usr/bin/socat 1 6112 eth0 eth1", "line 2: '/usr/bin/socat' is another program"),
        ("multicast-relay", "/opt/relay --interfaces a b", "line 1: '/opt/relay' is another program"),
        ("multicast-relay", '--interfaces a b\n\n--relay "x', "line 3: this is no command line: a quote has no end"),
        ("udp-broadcast-relay", "--port 7 --dev a", "line 1: there is no port, or fewer than two devices"),
        ("udp-broadcast-relay", "--port", "--port has no value"),
        ("udp-broadcast-relay", "--port 7 \\\n --dev a \\\n --dev b\n\n--port 8 \\\n --frob 7", "line 5: '--frob'"),
        ("udp-broadcast-relay", "--frob 7", "'--frob' is no option"),
    ],
)
def test_what_is_none_of_a_format_is_refused(name: str, text: str, says: str) -> None:
    with pytest.raises(BadConfig) as caught:
        FORMATS[name].read(text)
    assert says in caught.value.message
    assert caught.value.hint


def test_what_cannot_be_is_remarked_on_and_the_rest_goes_on() -> None:
    imported = FORMATS["smcroute"].read("mroute from a group 10.0.0.1/8 to b\nmroute from a group 225.1.1.1 to b\n")
    assert list(texts(imported)) == ["225.1.1.1:*%a"]
    (said,) = remarks(imported)
    assert said.startswith(
        "line 1: this rule is left out: input '10.0.0.1/8:*%a': a prefix is one of multicast groups; "
    )
    assert said.endswith("; or write a [[rule]] for it by hand: docs/rules.md")


@pytest.mark.parametrize("name", ["\U0001f600", "e\x7f", "\u202eeth", 'a"\\'])
def test_any_interface_that_can_be_stands_in_the_file(name: str) -> None:
    # Not by way of smcroute.conf, whose words have no quotes.
    imported = Imported()
    imported.add(1, f"225.1.1.1:*%{name}", ["=:=%b"])
    assert list(texts(imported)) == [f"225.1.1.1:*%{name}"]


def test_a_prefix_of_sources_is_written_out_only_so_far() -> None:
    imported = FORMATS["smcroute"].read("mroute from a source 10.0.0.0/8 group 225.1.1.1 to b")
    assert list(texts(imported)) == ["225.1.1.1:*%a"]
    assert "too many to be written out" in remarks(imported)[0]


WORDS: Final = st.sampled_from(
    (
        *("mroute", "mgroup", "phyint", "from", "group", "to", "source", "eth0", "eth1", "eth+", "ttl-threshold"),
        *("225.1.1.1", "225.1.1.0/24", "10.0.0.0/30", "ff05::1", "\U0001f600", "e\x7f", "\u202ex", "[[rule]]", '"""'),
        *(
            "--port",
            "7",
            "--dev",
            "--multicast",
            "-s",
            "--interfaces",
            "--relay",
            "239.1.1.1:7",
            "--ttl",
            "--masquerade",
        ),
        *("{", "}", "[", "]", "rules:", "input:", "pinning:", '"x"', ",", "#", "\n", "\r", "\\\n", "'", "$x"),
    )
)
ROUTES: Final = st.builds("mroute from {} group 225.1.1.1 to {}".format, st.text(max_size=9), st.text(max_size=9))
TEXTS: Final = st.one_of(st.text(max_size=60), ROUTES, st.lists(WORDS, max_size=14).map(" ".join))


@pytest.mark.parametrize("name", FORMATS)
@given(text=TEXTS)
def test_any_text_is_a_configuration_or_refused(name: str, text: str) -> None:
    with contextlib.suppress(BadConfig):
        imported = FORMATS[name].read(text)
        assert len(rules(imported)) == list(imported.toml()).count("[[rule]]")
        assert imported.has_rules == bool(rules(imported))


# --- the command -----------------------------------------------------------------------------------------------------


def run(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    return run_program(["import", *arguments], input=text, timeout=30)


@pytest.mark.parametrize(
    ("format", "name", "count"),
    [
        ("mcr", "mcr.json5", 2),
        ("smcroute", "smcroute.conf", 8),
        ("multicast-relay", "multicast-relay.txt", 11),
        ("udp-broadcast-relay", "udp-broadcast-relay.txt", 11),
    ],
)
def test_the_command_prints_a_file_and_says_what_it_lacks(format: str, name: str, count: int, tmp_path: Path) -> None:
    example = str(FILES / name)
    done = run(format, example)
    assert done.returncode == 0
    file = tmp_path / "mcrelay.toml"
    file.write_text(done.stdout)
    assert f"fine, {count} rules" in run_program(["check", str(file)], timeout=30).stdout
    said = [line.removeprefix(f"mcrelay: {example}: ") for line in done.stderr.splitlines()]
    assert [f"# {line}" for line in said] == [line for line in done.stdout.splitlines() if line.startswith("#")]
    assert said


def test_the_command_is_strict_if_it_is_told_to_be() -> None:
    assert run("smcroute", "--strict", str(FILES / "smcroute.conf")).returncode == 65
    assert run("smcroute", "--strict", text="mroute from a group 225.1.1.1 to b").returncode == 0
    assert (
        run("smcroute", "-", text="mroute from a group 225.1.1.1 to b").stdout
        == run("smcroute", text="mroute from a group 225.1.1.1 to b").stdout
    )


def test_the_command_takes_options_and_refuses_what_is_none() -> None:
    done = run("multicast-relay", "--", "--interfaces", "eth0", "eth1", "--noSSDP", "--noSonosDiscovery")
    assert done.returncode == 0
    assert 'name = "mdns-eth0"' in done.stdout
    done = run("udp-broadcast-relay", "--", "--port", "7", "--dev", "a", "--dev", "b", "--dev", "b\nc #'$x")
    assert (done.returncode, done.stdout.count("[[rule]]")) == (0, 2)
    assert 'mcrelay: options: the device "b\\nc #\'$x" is left out: ' in done.stderr
    done = run("multicast-relay", "--", "--interfaces")
    assert (done.returncode, done.stderr.count("\n")) == (65, 1)
    assert run("mcr", "a", "b").returncode == 64


@pytest.mark.parametrize(
    ("arguments", "text", "says", "also"),
    [
        (["multicast-relay", "--", "--interfaces", "10.1.1.1", "eth1"], "", "two interfaces by name", 2),
        (["multicast-relay", "--", "--interfaces", "eth0", "eth0"], "", "two interfaces by name", 2),
        (["multicast-relay", "--", "--interfaces", "eth0", "--oneInterface"], "", "two interfaces by name", 2),
        (["multicast-relay"], "--interfaces a b --noMDNS --noSSDP --noSonosDiscovery", "something to relay", 0),
        (["udp-broadcast-relay"], "--port x --dev a --dev b", "a port and two devices", 1),
        (["smcroute"], "", "lines such as 'mroute", 0),
        (["smcroute"], "mroute from a group 10.0.0.1/8 to b", "lines such as 'mroute", 1),
        (["mcr"], "{rules: []}", "rules: [...]", 0),
    ],
)
def test_an_import_of_no_rule_has_failed(arguments: list[str], text: str, says: str, also: int) -> None:
    done = run(*arguments, text=text)
    assert done.returncode == 65
    *remarked, last = done.stderr.splitlines()
    assert ": no rule came of it; it takes " in last
    assert says in last
    assert (len(remarked), len(done.stdout.splitlines())) == (also, also)
    assert all(line.startswith("# ") for line in done.stdout.splitlines())


def test_the_command_says_in_one_line_what_it_cannot_take(tmp_path: Path) -> None:
    latin = tmp_path / "latin.conf"
    latin.write_bytes(b"# caf\xe9")
    for arguments, code, says in (
        ([], 64, "'FORMAT'. Write one of mcr, smcroute, multicast-relay, udp-broadcast-relay"),
        (["frob"], 64, "'frob' is not one of"),
        (["smcroute", "/nowhere/smcroute.conf"], 78, "cannot read /nowhere/smcroute.conf: No such file or directory; "),
        (["multicast-relay", "/nowhere/options"], 78, "cannot read /nowhere/options: No such file or directory; "),
        (["mcr", str(tmp_path)], 78, "Is a directory; "),
        (["smcroute", str(latin)], 78, "is not UTF-8 text; "),
        (["udp-broadcast-relay", "--", "--port", "7", "--fr\nob", "1"], 65, "options: '--fr\\nob' is no option"),
    ):
        done = run(*arguments)
        assert (done.returncode, done.stderr.count("\n"), done.stdout) == (code, 1, "")
        assert says in done.stderr
    assert run_program(["check", "/nowhere/mcrelay.toml"], timeout=30).returncode == 78


def test_the_command_is_one_of_click_8_1_too() -> None:
    """Where a Choice has no subscript, and asks for a message without a context."""
    program = """
import click
click.Choice = type("Choice", (click.Choice,), {"__class_getitem__": None})
from mcrelay.cli_import import import_
print(import_.params[0].type.get_missing_message(import_.params[0]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.startswith("Write one of mcr, ")

"""Other relays' configurations, read as files of theirs are written, and what mcrelay makes of them."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.program import run_program
from mcrelay.config import read
from mcrelay.errors import BadConfig
from mcrelay.importers import FORMATS
from mcrelay.importers.imported import Imported
from mcrelay.rules import Rule

FILES: Final = Path(__file__).with_name("imports")
SPEAKERS: Final = "--interfaces eth0 eth1 eth2 --noSonosDiscovery --noTransmitInterfaces eth2 --masquerade eth1"


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
        "239.1.1.1:5001%eth0": ["239.2.2.2:5002%eth1,ttl=8", "10.0.0.100:6003%eth2"],
        "10.0.0.50:5002%eth1": ["[ff15::7]:5002%eth0"],
    }
    assert [rule.name for rule in rules(imported)] == ["hall-feed-1", None]
    assert read([("x", "\n".join(imported.toml()).encode())]).settings.daemon.cores == "2,3,4"
    renamed, portless, pinned, igmp = remarks(imported)
    assert renamed == "'hall feed/1' cannot be a rule's name; it is called hall-feed-1"
    assert "port '' is not possible" in portless
    assert "each core's has packets of all" in pinned
    assert "no IGMP querying" in igmp


def test_smcroute() -> None:
    imported = FORMATS["smcroute"].read((FILES / "smcroute.conf").read_text())
    kept = ",source=keep,sport=keep"
    both = [f"=:=%eth1{kept}", f"=:=%eth2{kept}"]
    assert texts(imported) == {
        "192.0.2.42@225.1.2.3:*%eth0": both,
        "225.3.2.0/24:*%eth0": both,
        **{f"192.0.2.{n}@225.9.9.9:*%eth+": [f"=:=%eth9{kept}"] for n in (8, 9, 10, 11)},
        "[ff2e::42]:*%eth0": [f"=:=%eth1{kept}"],
    }
    assert [remark.line for remark in imported.remarks] == [2, 3, 12, 12, 13, 11]
    assert all("; " in remark for remark in remarks(imported))


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
    line = "--interfaces eth0 10.0.0.0/24 eth1 --noMDNS --noSSDP --ttl 7"
    imported = FORMATS["multicast-relay"].read(f"{line} --ifFilter f.json --remote 192.0.2.1 --mdnsForceUnicast")
    assert texts(imported) == {
        "255.255.255.255:6969%eth0": ["=:=%eth1,ttl=7,source=keep,sport=keep"],
        "255.255.255.255:6969%eth1": ["=:=%eth0,ttl=7,source=keep,sport=keep"],
    }
    assert [remark.split(";")[0] for remark in remarks(imported)] == [
        "'10.0.0.0/24' stands for an interface",
        "--mdnsForceUnicast has no equivalent",
        "--ifFilter has no equivalent",
        "--remote has no equivalent",
    ]


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
    }
    assert [remark.line for remark in imported.remarks] == [2, 3, 4]


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
        ("smcroute", "mroute eth0 group 225.1.1.1", "line 1: 'eth0' is at a wrong place"),
        ("smcroute", "mroute from a source x group 225.1.1.1 to b", "line 1: 'x' is no source"),
        ("multicast-relay", "--noSSDP", "--interfaces"),
        ("multicast-relay", "--interfaces a b --frob", "--frob"),
        ("multicast-relay", "'", "no command line"),
        ("udp-broadcast-relay", "", "there is no command line"),
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
    assert imported.remarks[0].line == 1


def test_a_prefix_of_sources_is_written_out_only_so_far() -> None:
    imported = FORMATS["smcroute"].read("mroute from a source 10.0.0.0/8 group 225.1.1.1 to b")
    assert list(texts(imported)) == ["225.1.1.1:*%a"]
    assert "too many to be written out" in remarks(imported)[0]


WORDS: Final = st.sampled_from(
    (
        *(
            "mroute",
            "mgroup",
            "from",
            "group",
            "to",
            "source",
            "eth0",
            "eth1",
            "225.1.1.1",
            "10.0.0.0/30",
            "--port",
            "7",
        ),
        *(
            "--dev",
            "--interfaces",
            "--relay",
            "239.1.1.1:7",
            "{",
            "}",
            "[",
            "]",
            "rules:",
            "input:",
            '"x"',
            ",",
            "\n",
            "'",
        ),
    )
)
TEXTS: Final = st.one_of(st.text(max_size=60), st.lists(WORDS, max_size=14).map(" ".join))


@pytest.mark.parametrize("name", FORMATS)
@given(text=TEXTS)
def test_any_text_is_a_configuration_or_refused(name: str, text: str) -> None:
    with contextlib.suppress(BadConfig):
        imported = FORMATS[name].read(text)
        assert len(rules(imported)) == "\n".join(imported.toml()).count("[[rule]]")


# --- the command -----------------------------------------------------------------------------------------------------


def run(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    return run_program(["import", *arguments], input=text, timeout=30)


def test_the_command_prints_a_file_and_says_what_it_lacks(tmp_path: Path) -> None:
    done = run("smcroute", str(FILES / "smcroute.conf"))
    assert done.returncode == 0
    file = tmp_path / "mcrelay.toml"
    file.write_text(done.stdout)
    assert "fine, 7 rules" in run_program(["check", str(file)], timeout=30).stdout
    lines = done.stderr.splitlines()
    assert len(lines) == 6
    assert all(line.startswith(f"mcrelay: {FILES / 'smcroute.conf'}: line ") for line in lines)
    assert run("smcroute", "--strict", str(FILES / "smcroute.conf")).returncode == 65
    assert (
        run("smcroute", "-", text="mroute from a group 225.1.1.1 to b").stdout
        == run("smcroute", text="mroute from a group 225.1.1.1 to b").stdout
    )


def test_the_command_takes_options_and_refuses_what_is_none() -> None:
    done = run("multicast-relay", "--", "--interfaces", "eth0", "eth1", "--noSSDP", "--noSonosDiscovery")
    assert done.returncode == 0
    assert 'name = "mdns-eth0"' in done.stdout
    done = run("multicast-relay", "--", "--interfaces")
    assert (done.returncode, done.stderr.count("\n")) == (65, 1)
    done = run("smcroute", "/nowhere/smcroute.conf")
    assert (done.returncode, "cannot read" in done.stderr) == (64, True)
    assert run("mcr", "a", "b").returncode == 64

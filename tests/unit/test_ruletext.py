"""ruletext.py: the text form and its refusals."""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mcrelay.errors import RuleError
from mcrelay.limits import RULE_OUTPUTS_MAX
from mcrelay.rules import Input, Output, Rate, Rule, shown
from mcrelay.ruletext import check_name, parse_input, parse_output, parse_rule
from tests.unit.rule_strategies import inputs, outputs, rules

INPUT = "239.1.1.1:5000%eth0"
OUTPUT = "239.2.2.2:6000%eth1"

# --- what may be written ---------------------------------------------------------------------------------------------


@given(inputs())
def test_an_input_reads_as_it_is_written(value: Input) -> None:
    assert parse_input(str(value)) == value


@given(outputs())
def test_an_output_reads_as_it_is_written(value: Output) -> None:
    assert parse_output(str(value)) == value


@given(rules())
def test_a_rule_reads_as_it_is_written(value: Rule) -> None:
    assert parse_rule(str(value.input), map(str, value.outputs)) == value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("224.0.0.0:1%a", Input(IPv4Address("224.0.0.0"), 1, "a")),
        ("239.255.255.255:65535%eth0.100-abcdefg", None),  # 16 characters
        ("239.255.255.255:65535%eth0.100-abcdef", Input(IPv4Address("239.255.255.255"), 65535, "eth0.100-abcdef")),
        ("239.1.1.1:5000%veth@if2", None),  # '@' is what ip(8) prints, not part of the name
        ("239.1.1.1:5000%...", Input(IPv4Address("239.1.1.1"), 5000, "...")),
        ("[ff05::1]:5000%eth0", Input(IPv6Address("ff05::1"), 5000, "eth0")),
        ("10.1.1.9@232.1.1.1:5000%e", Input(IPv4Address("232.1.1.1"), 5000, "e", IPv4Address("10.1.1.9"))),
        ("[2001:db8::9]@[ff3e::1]:1%e", Input(IPv6Address("ff3e::1"), 1, "e", IPv6Address("2001:db8::9"))),
        ("2001:db8::9@[ff3e::1]:1%e", Input(IPv6Address("ff3e::1"), 1, "e", IPv6Address("2001:db8::9"))),
        ("239.1.0.0/16:*%eth+", Input(IPv4Address("239.1.0.0"), None, "eth+", prefix=16)),
        ("[ff00::]/8:7%e", Input(IPv6Address("ff00::"), 7, "e", prefix=8)),
        ("[ff10::]/12:7%e", Input(IPv6Address("ff10::"), 7, "e", prefix=12)),
        ("[ff00::]/14:7%e", Input(IPv6Address("ff00::"), 7, "e", prefix=14)),  # ff02:: and ff03:: are in it
        ("[ff0e::]/15:7%e", Input(IPv6Address("ff0e::"), 7, "e", prefix=15)),
        ("[ff05::]/16:7%e", Input(IPv6Address("ff05::"), 7, "e", prefix=16)),
        ("239.1.1.1:esp%e,vlan=5", Input(IPv4Address("239.1.1.1"), None, "e", vlan=5, protocol="esp")),
        ("10.1.1.2:5000%eth0", Input(IPv4Address("10.1.1.2"), 5000, "eth0")),
        ("255.255.255.255:6%eth0", Input(IPv4Address("255.255.255.255"), 6, "eth0")),
    ],
)
def test_inputs_at_the_edge(text: str, expected: Input | None) -> None:
    if expected is None:
        with pytest.raises(RuleError):
            parse_input(text)
    else:
        assert parse_input(text) == expected


valid_texts = inputs().map(str) | outputs().map(str)


@st.composite
def spoilt_texts(draw: st.DrawFn) -> str:
    """A valid text with one character more, less or changed, or any text at all."""
    text: str = draw(valid_texts | st.text(max_size=40))
    at = draw(st.integers(0, len(text)))
    inserted: str = draw(
        st.sampled_from(["", *"%:,=@/[]+-*._ 09a\n\0", "\u0661", "\u00e9", "\udcff", "::", ",ttl=", "ttl"])
    )
    return text[:at] + inserted + text[at + draw(st.integers(0, 1)) :]


@given(spoilt_texts(), st.sampled_from([parse_input, parse_output]))
@example("", parse_input)
@example("%", parse_output)
@example(",", parse_output)
def test_any_text_is_read_in_its_canonical_form_or_refused_by_its_text(
    text: str, parse: Callable[[str], Input | Output]
) -> None:
    try:
        value = parse(text)
    except RuleError as error:
        refusal = error
    else:
        assert parse(str(value)) == value
        return
    assert shown(text) in refusal.message
    assert refusal.hint
    assert "\n" not in str(refusal)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("=:=%e", Output(None, None, "e")),
        ("239.2.0.0/16:=%e,ttl=keep", Output(IPv4Address("239.2.0.0"), None, "e", prefix=16, ttl="keep")),
        ("[ff02::2]:5%e,dscp=EF", Output(IPv6Address("ff02::2"), 5, "e", dscp=46)),
        ("10.0.0.1:5%e,dscp=keep", Output(IPv4Address("10.0.0.1"), 5, "e")),
        ("10.0.0.1:5%e,dscp=af41", Output(IPv4Address("10.0.0.1"), 5, "e", dscp=34)),
        ("239.1.1.1:5%e,source=keep,sport=7", Output(IPv4Address("239.1.1.1"), 5, "e", source="keep", source_port=7)),
        ("=:5%e,source=10.0.0.9", Output(None, 5, "e", source=IPv4Address("10.0.0.9"))),
        ("=:5%e,rate=10Mbit", Output(None, 5, "e", rate=Rate(10**7, "bit"))),
        ("=:5%e,rate=2500pps,loop,paused", Output(None, 5, "e", rate=Rate(2500, "pps"), loop=True, paused=True)),
        ("=:esp%e", Output(None, None, "e", protocol="esp")),
        ("255.255.255.255:6%eth0", Output(IPv4Address("255.255.255.255"), 6, "eth0")),
    ],
)
def test_what_outputs_say(text: str, expected: Output) -> None:
    assert parse_output(text) == expected
    assert parse_output(str(expected)) == expected


# --- what is refused, and how ----------------------------------------------------------------------------------------

# (text, what is said of it, what is said to be right)
REFUSED_ADDRESSES = [
    ("example.org:5000%eth0", "'example.org' is not an IP address", "for example 239.1.1.1"),
    ("239.1.1.x:5000%eth0", "'239.1.1.x' is not an IP address", "for example 239.1.1.1"),
    ("239.1.1:5000%eth0", "'239.1.1' is not an IP address", "for example 239.1.1.1"),
    ("239.1.1.1.1:5000%eth0", "'239.1.1.1.1' is not an IP address", "for example 239.1.1.1"),
    ("239.1.1.256:5000%eth0", "'239.1.1.256' is not an IP address", "for example 239.1.1.1"),
    ("239.001.1.1:5000%eth0", "'239.001.1.1' is not an IP address", "for example 239.1.1.1"),
    ("239.1.1.01:5000%eth0", "'239.1.1.01' is not an IP address", "for example 239.1.1.1"),
    ("0xef010101:5000%eth0", "'0xef010101' is not an IP address", "for example 239.1.1.1"),
    ("4009754625:5000%eth0", "'4009754625' is not an IP address", "for example 239.1.1.1"),
    ("239.1.1.\u0661:5000%eth0", "'239.1.1.\u0661' is not an IP address", "for example 239.1.1.1"),
    (" 239.1.1.1:5000%eth0", "' 239.1.1.1' is not an IP address", "for example 239.1.1.1"),
    ("239.1.1.1 :5000%eth0", "'239.1.1.1 ' is not an IP address", "for example 239.1.1.1"),
    (":5000%eth0", "'' is not an IP address", "for example 239.1.1.1"),
    ("[]:5000%eth0", "'[]' is not an IP address", "for example 239.1.1.1"),
    ("[[239.1.1.1]:5000%eth0", "'[[239.1.1.1]' is not an IP address", "for example 239.1.1.1"),
    ("[239.1.1.1]:5000%eth0", "brackets are for IPv6", "write 239.1.1.1"),
    ("[ff3e::1]%eth0", "has no port", ":PORT"),
    ("ff3e::1:5000%eth0", "an IPv6 address stands in brackets", "[ff05::1]:"),
    ("ff3e::1%eth0", "an IPv6 address stands in brackets", "[ff05::1]:"),
    ("[fe80::1%eth0]:5000%eth1", "has a zone", "leave it out"),
    ("[::ffff:239.1.1.1]:5000%eth0", "is an IPv4 address", "write 239.1.1.1"),
    ("[ff01::1]:5000%eth0", "never leaves a host", "ff02::"),
    ("[ff00::1]:5000%eth0", "reserved scope", "ff02::"),
    ("[ff0f::1]:5000%eth0", "reserved scope", "ff02::"),
    ("[ff00::]/15:5000%eth0", "reserved scope", "ff02::"),
    ("[ff01::]/16:5000%eth0", "never leaves a host", "ff02::"),
    ("[ff0f::]/17:5000%eth0", "reserved scope", "ff02::"),
    ("0.0.0.0:5000%eth0", "0.0.0.0", "unicast address"),
    ("0.1.2.3:5000%eth0", "0.1.2.3", "unicast address"),
    ("[::]:5000%eth0", "::", "unicast address"),
    ("239.1.1.0/33:5000%eth0", "prefix '/33' is not possible", "/0 to /32"),
    ("[ff05::]/129:5000%eth0", "prefix '/129' is not possible", "/0 to /128"),
    ("239.1.1.0/-1:5000%eth0", "prefix '/-1' is not possible", "/0 to /32"),
    ("239.1.1.0/:5000%eth0", "prefix '/' is not possible", "/0 to /32"),
    ("239.1.1.0/16:5000%eth0", "has bits behind the prefix", "239.1.0.0/16"),
    ("[ff05::1]/16:5000%eth0", "has bits behind the prefix", "ff05::/16"),
    ("10.1.0.0/16:5000%eth0", "a prefix is one of multicast groups", ""),
]
REFUSED_PORTS = [
    (f"239.1.1.1:{port}%eth0", f"port {port!r} is not possible", "a number from 1 to 65535")
    for port in ("0", "65536", "-1", "+5", "0x10", "5e3", "5.0", "5_000", " 5000", "\u0661\u0662", "", "5000000", "a")
]
REFUSED_INTERFACES = [
    ("239.1.1.1:5000", "names no interface", "%INTERFACE"),
    ("239.1.1.1:5000$eth0", "names no interface", "%INTERFACE"),
    ("", "names no interface", "%INTERFACE"),
    ("239.1.1.1:5000%", "'' is not an interface name", "ip -brief link"),
    ("239.1.1.1:5000%abcdefghijklmnop", "'abcdefghijklmnop' is not an interface name", "ip -brief link"),
    # 15 characters, but the kernel counts bytes.
    ("239.1.1.1:5000%abcdefghijklmn\u00e9", "'abcdefghijklmn\u00e9' is not an interface name", "ip -brief link"),
    ("239.1.1.1:5000%eth/0", "'eth/0' is not an interface name", "ip -brief link"),
    ("239.1.1.1:5000%eth:0", "'eth:0' is not an interface name", "ip -brief link"),
    ("239.1.1.1:5000%eth 0", "'eth 0' is not an interface name", "ip -brief link"),
    ("239.1.1.1:5000%eth0\n", "'eth0\\n' is not an interface name", "ip -brief link"),
    ("239.1.1.1:5000%eth\0", "'eth\\x00' is not an interface name", "ip -brief link"),
    # As a command line in another encoding is read; no process can be told of it in JSON.
    ("239.1.1.1:5000%eth\udcff", "'eth\\udcff' is not an interface name", "ip -brief link"),
    ("239.1.1.1:5000%.", "'.' is not an interface name", "ip -brief link"),
    ("239.1.1.1:5000%..", "'..' is not an interface name", "ip -brief link"),
    ("239.1.1.1%eth0", "has no port", ":PORT"),
    ("239.1.1.1;5000%eth0", "has no port", ":PORT"),
    ("%eth0", "has no port", ":PORT"),
]
REFUSED_EITHER = [*REFUSED_ADDRESSES, *REFUSED_PORTS, *REFUSED_INTERFACES]
REFUSED_INPUTS = [
    ("nobody@239.1.1.1:5000%eth0", "'nobody' is not an IP address", "for example 239.1.1.1"),
    ("@239.1.1.1:5000%eth0", "'' is not an IP address", "for example 239.1.1.1"),
    ("239.9.9.9@239.1.1.1:5000%eth0", "239.9.9.9 is nobody's address", "unicast"),
    ("127.0.0.1:5000%eth0", "127.0.0.1 comes in by lo only", "write %lo"),
    ("[::1]:5000%eth+", "::1 comes in by lo only", "write %lo"),
    ("240.0.0.1:5000%eth0", "240.0.0.1 is in 240.0.0.0/4", "a unicast address of this host"),
    *(
        (f"{source}@239.1.1.1:5000%eth0", f"{source} is nobody's address", "unicast")
        for source in ("0.0.0.0", "0.1.2.3", "127.0.0.1", "127.9.9.9", "240.0.0.1", "255.255.255.255")
    ),
    *(
        (f"{source}@[ff05::1]:5000%eth0", f"{source} is nobody's address", "unicast")
        for source in ("::", "::1", "ff05::2")
    ),
    ("[2001:db8::1]@239.1.1.1:5000%eth0", "cannot send to 239.1.1.1", "one IP version"),
    ("10.1.1.1@[ff05::1]:5000%eth0", "cannot send to ff05::1", "one IP version"),
    ("=:5000%eth0", "'=' is not an IP address", "for example 239.1.1.1"),
    ("239.1.1.1:=%eth0", "port '=' is not possible", "'*' or 'esp'"),
    ("239.1.1.1/32:5000%eth0", "is one address", "leave out '/32'"),
    ("224.0.0.0/3:5000%eth0", "a prefix is one of multicast groups", "224.0.0.0/4"),
    ("10.1.1.1:*%eth0", "any port of a unicast address", "name the port"),
    *(
        (f"{INPUT},vlan={vlan}", f"vlan {vlan!r} is not possible", "a number from 1 to 4094")
        for vlan in ("0", "4095", "", "x", "-1")
    ),
    (f"{INPUT},vlan=1,vlan=2", "vlan is given twice", "give it once"),
    (f"{INPUT},ttl=1", "unknown option 'ttl=1'", "vlan=N"),
    (f"{INPUT},", "unknown option ''", "vlan=N"),
]
REFUSED_OUTPUTS = [
    ("127.0.0.1:5000%eth0", "never leaves this host", "interface's network"),
    ("[::1]:5000%eth0", "never leaves this host", "interface's network"),
    ("240.0.0.1:5000%eth0", "240.0.0.0/4", "a group or a host"),
    ("239.1.1.1:*%eth0", "port '*' is not possible", "a number from 1 to 65535"),
    ("10.1.1.1@239.1.1.1:5000%eth0", "'10.1.1.1@239.1.1.1' is not an IP address", "for example 239.1.1.1"),
    ("239.1.1.1:5000%eth+", "an output has one interface", "patterns are for inputs"),
    *(
        (f"{OUTPUT},ttl={ttl}", f"ttl {ttl!r} is not possible", "a number from 1 to 255")
        for ttl in ("0", "256", "abc", "", "-1", "+1", " 1", "1.0", "\u0661", "1=2")
    ),
    *(
        (f"{OUTPUT},dscp={dscp}", f"dscp {dscp!r} is not possible", "a number from 0 to 63")
        for dscp in ("64", "af5", "", "-1", "best")
    ),
    *(
        (f"{OUTPUT},sport={port}", f"sport {port!r} is not possible", "a number from 1 to 65535")
        for port in ("0", "65536", "", "any")
    ),
    *(
        (f"{OUTPUT},rate={rate}", f"rate {rate!r} is not possible", "rate=10Mbit")
        for rate in ("10", "0bit", "-1pps", "1.5Mbit", "10mbit", "Mbit", "", "9999Gbit")
    ),
    (f"{OUTPUT},source=nobody", "'nobody' is not an IP address", "for example"),
    (f"{OUTPUT},source=239.1.1.1", "239.1.1.1 is nobody's address", "unicast"),
    *(
        (f"{destination}:5%e,source={source}", f"{source} is nobody's address", "unicast")
        for destination, source in (
            *(("239.2.2.2", source) for source in ("0.1.2.3", "127.0.0.1", "240.0.0.1", "255.255.255.255")),
            ("=", "127.0.0.1"),
            ("[ff05::1]", "::1"),
        )
    ),
    (f"{OUTPUT},source=2001:db8::1", "cannot send to 239.2.2.2", "one IP version"),
    (f"{OUTPUT},loop,source=keep", "is not heard on this host", "leave out loop"),
    (f"{OUTPUT},loop,sport=5", "is not heard on this host", "leave out loop"),
    ("10.1.1.1:5000%e,loop", "loop is for multicast", "leave out loop"),
    ("239.1.1.1:esp%e,sport=5", "ESP has no ports", "leave out sport"),
    (f"{OUTPUT},ttl=1,ttl=2", "ttl is given twice", "give it once"),
    (f"{OUTPUT},tos=4", "unknown option 'tos=4'", "ttl, dscp"),
    (f"{OUTPUT},TTL=4", "unknown option 'TTL=4'", "ttl, dscp"),
    (f"{OUTPUT},ttl", "unknown option 'ttl'", "ttl, dscp"),
    (f"{OUTPUT},loop=1", "unknown option 'loop=1'", "ttl, dscp"),
    (f"{OUTPUT},", "unknown option ''", "ttl, dscp"),
    (f"{OUTPUT}, ttl=4", "unknown option ' ttl=4'", "ttl, dscp"),
]


def check_refusal(error: RuleError, text: str, reason: str, correction: str) -> None:
    assert repr(text) in error.message
    assert reason in error.message
    assert correction in error.hint
    assert error.code == "bad_rule"
    assert error.exit_code == 65


@pytest.mark.parametrize(("text", "reason", "correction"), [*REFUSED_EITHER, *REFUSED_INPUTS])
def test_an_input_is_refused(text: str, reason: str, correction: str) -> None:
    with pytest.raises(RuleError) as refusal:
        parse_input(text)
    check_refusal(refusal.value, text, reason, correction)


@pytest.mark.parametrize(("text", "reason", "correction"), [*REFUSED_EITHER, *REFUSED_OUTPUTS])
def test_an_output_is_refused(text: str, reason: str, correction: str) -> None:
    with pytest.raises(RuleError) as refusal:
        parse_output(text)
    check_refusal(refusal.value, text, reason, correction)


@pytest.mark.parametrize(
    ("input", "outputs", "name", "offending", "reason", "correction"),
    [
        (INPUT, [], None, INPUT, "has no output", "give at least one"),
        (INPUT, [INPUT], None, INPUT, "where the input comes from", "another group, port or interface"),
        (INPUT, [OUTPUT, f"{INPUT},ttl=3"], None, f"{INPUT},ttl=3", "would feed itself", "another group"),
        (INPUT, [OUTPUT, OUTPUT], None, OUTPUT, "is given twice", "once"),
        *(
            (given, [output], None, output, "the link-local source fe80::1 cannot send to", "ff02::/16")
            for given, output in (
                (INPUT, "[ff05::1]:5%e,source=fe80::1"),
                ("[ff05::9]:5000%eth0", "=:=%eth1,source=fe80::1"),
                ("[fe80::1]@[ff05::9]:5000%eth0", "=:=%eth1,source=keep"),
                ("[ff02::9]:5000%eth0", "[2001:db8::9]:=%eth1,source=fe80::1"),
            )
        ),
        *(
            ("239.1.0.0/24:*%eth0", [*outputs, "239.3.3.3:=%eth1"], None, outputs[1], "sends to, too", "leave one out")
            for outputs in (
                ["=:6000%eth1", "239.1.0.7:6000%eth1"],
                ["239.1.0.7:6000%eth1", "=:6000%eth1"],
                ["239.2.0.0/24:=%eth1", "239.2.0.255:9%eth1,ttl=3"],
                ["239.2.0.7:9%eth1", "239.2.0.7:=%eth1"],
                ["239.2.0.7:=%eth1", "239.2.0.7:9%eth1"],
                ["239.2.0.7:8%eth1", "239.2.0.0/24:=%eth1", "239.2.0.7:9%eth1"][:2],
            )
        ),
        (INPUT, [OUTPUT, f"{OUTPUT},ttl=3"], None, f"{OUTPUT},ttl=3", "is given twice", "once"),
        (INPUT, ["10.0.0.1:6000%eth1", "nonsense"], None, "nonsense", "names no interface", "%INTERFACE"),
        ("nonsense", [OUTPUT], None, "nonsense", "names no interface", "%INTERFACE"),
        (
            INPUT,
            [f"10.0.{n // 256}.{n % 256}:6000%eth1" for n in range(RULE_OUTPUTS_MAX + 1)],
            None,
            INPUT,
            f"has {RULE_OUTPUTS_MAX + 1} outputs",
            f"at most {RULE_OUTPUTS_MAX}",
        ),
        (INPUT, ["239.2.0.0/16:=%eth1"], None, "239.2.0.0/16:=%eth1", "the input has no prefix", "name one group"),
        ("239.1.0.0/16:1%e", ["239.0.0.0/8:=%f"], None, "239.0.0.0/8:=%f", "the input has /16", "write /16"),
        ("239.1.0.0/16:1%e", ["239.1.1.0/24:=%f"], None, "239.1.1.0/24:=%f", "the input has /16", "write /16"),
        ("[ff05::]/32:1%e", ["239.0.0.0/32:=%f"], None, "239.0.0.0/32:=%f", "same length", "write /32"),
        (INPUT, ["[ff05::1]:1%f,source=keep"], None, "[ff05::1]:1%f,source=keep", "cannot be kept", "source=ADDRESS"),
        (INPUT, ["=:=%f,source=2001:db8::1"], None, "=:=%f,source=2001:db8::1", "cannot send to", "one IP version"),
        (INPUT, ["10.1.1.1:esp%f"], None, "10.1.1.1:esp%f", "the input is UDP", "give a port"),
        ("239.1.1.1:esp%e", ["239.1.1.1:5%f"], None, "239.1.1.1:5%f", "ESP has no ports", "write esp"),
        ("239.1.1.1:esp%e", ["239.1.1.1:=%f"], None, "239.1.1.1:=%f", "the input is ESP", "write esp"),
        ("10.1.1.1:5%e", ["=:=%f,loop"], None, "=:=%f,loop", "loop is for multicast", "leave out loop"),
        (f"10.0.0.9@{INPUT}", ["=:=%eth0"], None, "=:=%eth0", "where the input comes from", "another group"),
        ("239.1.0.0/16:*%e", ["239.1.2.3:5%e"], None, "239.1.2.3:5%e", "would feed itself", "another group"),
        ("239.1.0.0/16:*%e+", ["239.1.2.3:5%eth0"], None, "239.1.2.3:5%eth0", "would feed itself", "another group"),
        (INPUT, ["=:=%eth0"], None, "=:=%eth0", "where the input comes from", "another group"),
        (INPUT, ["=:=%eth1", INPUT.replace("eth0", "eth1")], None, INPUT.replace("eth0", "eth1"), "twice", "once"),
        (INPUT, [OUTPUT], "a b", "a b", "is not possible", "letters, digits"),
    ],
)
def test_a_rule_is_refused(
    input: str, outputs: list[str], name: str | None, offending: str, reason: str, correction: str
) -> None:
    with pytest.raises(RuleError) as refusal:
        parse_rule(input, outputs, name)
    check_refusal(refusal.value, offending, reason, correction)


def test_a_rule_may_have_as_many_outputs_as_an_engine_takes() -> None:
    texts = [f"10.0.{n // 256}.{n % 256}:6000%eth1" for n in range(1, RULE_OUTPUTS_MAX + 1)]
    assert len(parse_rule(INPUT, texts).outputs) == RULE_OUTPUTS_MAX


@pytest.mark.parametrize(
    ("input", "output"),
    [
        (f"{INPUT},vlan=7", INPUT),  # the tag is taken off
        (f"10.0.0.9@{INPUT}", f"{INPUT},source=10.0.0.8"),
        ("239.1.1.1:5000%eth+", INPUT),  # not where it came in
    ],
)
def test_what_a_rule_does_not_take_may_go_where_it_comes_from(input: str, output: str) -> None:
    assert len(parse_rule(input, [output]).outputs) == 1


def test_the_same_group_may_go_on_to_another_port_or_interface() -> None:
    rule = parse_rule(INPUT, ["239.1.1.1:5001%eth0", "239.1.1.1:5000%eth1", "239.1.1.2:5000%eth0"])
    assert len(rule.outputs) == 3


@pytest.mark.parametrize(
    "name", ["a", "0", "feed-a", "Feed.A_1", "x" * 64, "0123456789a", "0123456789ABC", "g23456789abc"]
)
def test_a_name_is_possible(name: str) -> None:
    check_name(name)
    assert parse_rule(INPUT, [OUTPUT], name).label == name


@pytest.mark.parametrize(
    ("name", "reason", "correction"),
    [
        ("", "name is empty", "leave the name out"),
        *(
            (name, f"name {name!r} is not possible", "starting with a letter or digit")
            for name in ("-a", ".a", "_a", "a b", " a", "a\n", "a/b", "a%b", "\u00e4", "\u0661", "x" * 65)
        ),
        ("0123456789ab", "looks like a rule's id", "another"),
        ("ffffffffffff", "looks like a rule's id", "another"),
    ],
)
def test_a_name_is_refused(name: str, reason: str, correction: str) -> None:
    with pytest.raises(RuleError) as refusal:
        parse_rule(INPUT, [OUTPUT], name)
    assert reason in refusal.value.message
    if correction != "another":
        assert correction in refusal.value.hint
    assert refusal.value.hint

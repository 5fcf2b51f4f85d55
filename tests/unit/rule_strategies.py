"""Strategies for rules: any that can be written."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address
from typing import Any

from hypothesis import strategies as st

from mcrelay.errors import RuleError
from mcrelay.rules import Address, Input, Output, Rate, Rule, bits, masked
from mcrelay.ruletext import parse_rule

ports = st.integers(1, 65535)
groups4: st.SearchStrategy[Address] = st.integers(0xE0000000, 0xEFFFFFFF).map(IPv4Address)
hosts4: st.SearchStrategy[Address] = st.integers(0x01000001, 0x7EFFFFFF).map(IPv4Address)
groups6: st.SearchStrategy[Address] = st.builds(
    lambda flags, scope, rest: IPv6Address(0xFF << 120 | flags << 116 | scope << 112 | rest),
    st.integers(0, 15),
    st.integers(2, 14),
    st.integers(0, (1 << 112) - 1),
)
hosts6: st.SearchStrategy[Address] = st.integers(0x2000 << 112, (0x4000 << 112) - 1).map(IPv6Address)
# What the kernel takes for an interface's name, less what the text form itself uses.
interfaces = (
    st.text(st.characters(exclude_categories=("Cc", "Cs", "Z"), exclude_characters="/:%,@+"), min_size=1, max_size=15)
    .filter(lambda name: len(name.encode()) <= 15)
    .filter(lambda name: name not in (".", ".."))
)
patterns = interfaces.map(lambda name: f"{name[:3]}+")


@st.composite
def inputs(draw: st.DrawFn) -> Input:
    version = draw(st.sampled_from([4, 6]))
    groups, hosts = (groups4, hosts4) if version == 4 else (groups6, hosts6)
    unicast = draw(st.booleans())
    address: Address = draw(hosts if unicast else groups)
    prefix = None
    if not unicast and draw(st.booleans()):
        prefix = draw(st.integers(8, bits(address) - 1))
        address = type(address)(masked(address, max(prefix, 16)))
        prefix = max(prefix, 16)
    protocol: Any = draw(st.sampled_from(["udp", "udp", "esp"]))
    port = None if protocol == "esp" else draw(ports if unicast else ports | st.none())
    return Input(
        address,
        port,
        draw(interfaces | patterns),
        draw(hosts | st.none()),
        prefix,
        draw(st.none() | st.integers(1, 4094)),
        protocol,
    )


rates = st.builds(Rate, st.integers(1, 10**9), st.sampled_from(["bit", "pps"]))


@st.composite
def outputs(draw: st.DrawFn) -> Output:
    """On their own: not every input can be sent on so."""
    version = draw(st.sampled_from([4, 6]))
    groups, hosts = (groups4, hosts4) if version == 4 else (groups6, hosts6)
    address = draw(groups | hosts | st.none())
    prefix = None
    if address is not None and address.is_multicast and draw(st.booleans()):
        prefix = draw(st.integers(16, bits(address)))
        address = type(address)(masked(address, prefix))
    protocol: Any = draw(st.sampled_from(["udp", "udp", "udp", "esp"]))
    source: Any = draw(st.none() | st.just("keep") | hosts)
    source_port: Any = draw(st.none() | st.just("keep") | ports) if protocol == "udp" else None
    loop = draw(st.booleans())
    if loop:
        loop = protocol == "udp" and source != "keep" and source_port is None
        loop = loop and (address is None or address.is_multicast)
    ttl: Any = draw(st.none() | st.just("keep") | st.integers(1, 255))
    return Output(
        address,
        None if protocol == "esp" else draw(ports | st.none()),
        draw(interfaces),
        prefix,
        ttl,
        draw(st.none() | st.integers(0, 63)),
        source,
        source_port,
        draw(st.none() | rates),
        loop,
        draw(st.booleans()),
        protocol,
    )


@st.composite
def rules(draw: st.DrawFn) -> Rule:
    """Those that can be."""
    given = draw(inputs())
    legs = draw(st.lists(outputs(), min_size=1, max_size=4))
    possible: list[Output] = []
    for leg in legs:
        try:
            parse_rule(str(given), [str(leg), *map(str, possible)])
        except RuleError:
            continue
        possible.append(leg)
    if not possible:
        esp = "esp" if given.protocol == "esp" else "6000"
        possible = [parse_rule(str(given), [f"10.9.9.9:{esp}%out"]).outputs[0]]
    return Rule(given, tuple(possible))

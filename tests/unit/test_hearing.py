"""net/hearing.py: where what a host sends comes in again."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from mcrelay.net.hearing import Hearing
from mcrelay.net.interfaces import Interface
from mcrelay.rules import Target


def interface(name: str, index: int, **facts: object) -> Interface:
    return Interface(name, index, 1500, is_up=True, has_ipv4=True, **facts)  # type: ignore[arg-type]


LO = interface("lo", 1, is_loopback=True)
ETH0 = interface("eth0", 2)
BRIDGE = interface("br0", 3, kind="bridge")
V0, V1 = interface("v0", 10, kind="veth", peer=11), interface("v1", 11, kind="veth", peer=10)
PORT = interface("v0", 10, kind="veth", peer=11, master=3)
V0_7 = interface("v0.7", 20, kind="vlan", lower=10, vlan=7)
V1_7 = interface("v1.7", 21, kind="vlan", lower=11, vlan=7)
V1_8 = interface("v1.8", 22, kind="vlan", lower=11, vlan=8)
MAC0 = interface("mac0", 30, kind="macvlan", lower=10)
MAC1 = interface("mac1", 31, kind="macvlan", lower=10)
W0, W1 = interface("w0", 40, kind="veth", peer=41, master=3), interface("w1", 41, kind="veth", peer=40)


@pytest.mark.parametrize(
    ("name", "interfaces", "heard"),
    [
        ("eth0", [LO, ETH0, V0, V1], {}),
        ("nothing", [LO, ETH0], {}),
        ("lo", [LO, ETH0], {"lo": None}),
        ("v0", [LO, V0, V1], {"v1": None}),
        ("v0", [V0], {}),  # the peer is in another namespace
        ("br0", [BRIDGE, PORT, V1], {"v1": None}),
        ("br0", [BRIDGE, ETH0], {}),
        ("v0.7", [V0, V1, V0_7], {"v1": 7}),
        ("v0.7", [V0, V1, V0_7, V1_7, V1_8], {"v1": 7, "v1.7": None}),
        ("v0", [V0, V1, V0_7, V1_7], {"v1": None}),
        ("mac0", [V0, V1, MAC0], {"v1": None}),
        ("mac0", [V0, V1, MAC0, MAC1], {"v1": None, "mac1": None}),
        ("v1", [V0, V1, MAC0, MAC1], {"v0": None, "mac0": None, "mac1": None}),
        ("v1", [BRIDGE, PORT, V1], {"v0": None, "br0": None}),
        ("v1", [BRIDGE, PORT, V1, W0, W1], {"v0": None, "br0": None, "w1": None}),  # through the bridge
        ("br0.5", [BRIDGE, PORT, V1, interface("br0.5", 50, kind="vlan", lower=3, vlan=5)], {"v1": 5}),
    ],
)
def test_what_hears_what(name: str, interfaces: list[Interface], heard: dict[str, int | None]) -> None:
    target = Target(ip_address("239.1.1.1"), 32, 5000, name)
    ends = Hearing(interfaces, {2: {"192.0.2.1"}}).of(target)
    assert {end.interface: end.vlan for end in ends} == heard
    assert len(ends) == len(heard)
    assert all(end[:3] == target[:3] for end in ends)


@pytest.mark.parametrize("address", ["192.0.2.1", "2001:db8::1"])
@pytest.mark.parametrize(("name", "heard"), [("eth0", "lo"), ("lo", "lo"), ("v0", "v1"), ("nothing", None)])
def test_what_is_sent_to_an_own_address_by_its_interface_is_heard_at_the_loopback_device(
    address: str, name: str, heard: str | None
) -> None:
    own = {ETH0.index: {"192.0.2.1", "2001:db8::1"}, V0.index: {"198.51.100.1"}}
    target = Target(ip_address(address), 32 if "." in address else 128, 5000, name)
    assert Hearing([LO, ETH0, V0, V1], own).of(target) == ([target._replace(interface=heard)] if heard else [])


def test_a_circle_of_devices_is_gone_through_once() -> None:
    """Two bridges joined by two veth pairs, one of which tags what it passes on."""
    other = interface("br1", 4, kind="bridge")
    a0 = interface("a0", 60, kind="veth", peer=61, master=3)
    a1 = interface("a1", 61, kind="veth", peer=60, master=4)
    b0, b1 = interface("b0", 62, kind="veth", peer=63), interface("b1", 63, kind="veth", peer=62, master=3)
    tagging = interface("b0.9", 64, kind="vlan", lower=62, vlan=9, master=4)
    target = Target(ip_address("239.1.1.1"), 32, 5000, "br0")
    ends = Hearing([BRIDGE, other, a0, a1, b0, b1, tagging], {}).of(target)
    assert {("br1", None), ("br0", 9), ("br1", 9)} <= {(end.interface, end.vlan) for end in ends}


def test_two_ends_hear_each_other_whoever_knows() -> None:
    """Of two that come one after the other, the first does not know the second."""
    first, second = interface("v8", 80, kind="veth"), interface("v9", 81, kind="veth", peer=80)
    for name, heard in (("v8", "v9"), ("v9", "v8")):
        (end,) = Hearing([first, second], {}).of(Target(ip_address("239.1.1.1"), 32, 5000, name))
        assert end.interface == heard


def test_an_extract_is_another_where_what_is_heard_is() -> None:
    def extract(interfaces: list[Interface], own: dict[int, set[str]]) -> object:
        return Hearing(interfaces, own).extract(["v0", "eth0"], [("192.0.2.1", "eth0")])

    usual = extract([LO, ETH0, V0], {})
    assert usual == extract([LO, ETH0, V0], {ETH0.index: {"192.0.2.9"}, V0.index: {"192.0.2.1"}})
    assert usual != extract([LO, ETH0, V0, V1], {})
    assert usual != extract([LO, ETH0, V0], {ETH0.index: {"192.0.2.1"}})

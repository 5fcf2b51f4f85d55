"""What a diagnosis reads in frames."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.frames import ethernet_ipv4, ethernet_ipv4_udp, igmp_query, internet_checksum, udp_segment
from mcrelay.facts import Flow, FlowKey, Querier, Sightings
from mcrelay.sightings import Frame, take

SOURCE = "203.0.113.10"
GROUP = "239.1.1.1"


def see(*frames: bytes, vlan: int | None = None, sums_checkable: bool = True) -> Sightings:
    seen = Sightings(1.0)
    for data in frames:
        take(seen, Frame(data, 14, "in0", "multicast", vlan, sums_checkable))
    return seen


def only(seen: Sightings) -> tuple[FlowKey, Flow]:
    assert len(seen.flows) == 1
    return next(iter(seen.flows.items()))


def ipv6(destination: str, kind: int, payload: bytes, *, hops: int = 5) -> bytes:
    source = IPv6Address("2001:db8::10")
    header = struct.pack("!IHBB", 6 << 28, len(payload), kind, hops) + source.packed
    packed = IPv6Address(destination).packed
    return b"\x33\x33" + packed[12:] + bytes(6) + b"\x86\xdd" + header + packed + payload


def udp6(destination: str, port: int, payload: bytes) -> bytes:
    header = struct.pack("!HHH", 4000, port, 8 + len(payload))
    pseudo = IPv6Address("2001:db8::10").packed + IPv6Address(destination).packed
    pseudo += struct.pack("!II", 8 + len(payload), 17)
    return header + struct.pack("!H", internet_checksum(pseudo + header + b"\0\0" + payload) or 0xFFFF) + payload


def test_a_datagram_is_known_by_all_that_a_rule_may_name() -> None:
    frame = ethernet_ipv4_udp(SOURCE, GROUP, 4000, 5000, b"hello", ttl=3)
    key, flow = only(see(frame, frame, vlan=7))
    assert key == FlowKey("in0", 7, IPv4Address(SOURCE), IPv4Address(GROUP), "udp", 5000)
    assert (flow.packets, flow.ttl_min, flow.ttl_max, flow.length_max) == (2, 3, 3, 33)
    assert (flow.checked, flow.bad_checksums, flow.wrong_macs, flow.arrivals) == (2, 0, set(), {"multicast"})


@pytest.mark.parametrize("wrong", [{"udp_checksum": 1}, {"ip_checksum": 1}])
def test_wrong_checksums_are_counted_if_somebody_made_them(wrong: dict[str, int]) -> None:
    frame = ethernet_ipv4_udp(SOURCE, GROUP, 4000, 5000, b"odd", **wrong)  # type: ignore[arg-type]
    assert only(see(frame))[1].bad_checksums == 1
    left_to_a_device = only(see(frame, sums_checkable=False))[1]
    assert (left_to_a_device.checked, left_to_a_device.bad_checksums) == (0, 0)


def test_a_datagram_without_a_checksum_has_no_wrong_one() -> None:
    flow = only(see(ethernet_ipv4_udp(SOURCE, GROUP, 4000, 5000, b"none", udp_checksum=0)))[1]
    assert (flow.checked, flow.bad_checksums) == (1, 0)


def test_what_was_cut_short_is_not_judged_by_its_checksum() -> None:
    frame = ethernet_ipv4_udp(SOURCE, GROUP, 4000, 5000, bytes(500))
    assert only(see(frame[:256]))[1].checked == 0


def test_a_frame_for_another_group_s_address_is_noticed() -> None:
    frame = ethernet_ipv4_udp(SOURCE, GROUP, 4000, 5000, destination_mac="01:00:5e:01:01:02")
    assert only(see(frame))[1].wrong_macs == {"01:00:5e:01:01:02"}


def test_fragments_but_the_first_have_no_port() -> None:
    segment = udp_segment(SOURCE, GROUP, 4000, 5000, bytes(1000))
    first = ethernet_ipv4(SOURCE, GROUP, 17, segment[:512], more_fragments=True)
    second = ethernet_ipv4(SOURCE, GROUP, 17, segment[512:], fragment_offset=64)
    seen = see(first, second)
    assert {key.port: (flow.fragments, flow.checked) for key, flow in seen.flows.items()} == {
        5000: (1, 0),
        None: (1, 0),
    }


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_the_length_of_a_datagram_is_told_from_its_fragments(order: tuple[int, ...]) -> None:
    segment = udp_segment(SOURCE, GROUP, 4000, 5000, bytes(3000))
    ends = [(0, 1480), (1480, 2960), (2960, 3008)]
    parts = [
        ethernet_ipv4(SOURCE, GROUP, 17, segment[a:b], more_fragments=b < 3008, fragment_offset=a // 8) for a, b in ends
    ]
    assert max(flow.fragmented_max for flow in see(*(parts[n] for n in order)).flows.values()) == 3008
    datagram = udp6("ff05::1", 5000, bytes(3000))
    parts = [
        ipv6("ff05::1", 44, struct.pack("!BBHI", 17, 0, a | (b < 3008), 7) + datagram[a:b])
        for a, b in ((0, 1448), (1448, 2896), (2896, 3008))
    ]
    seen = see(*(parts[n] for n in order))
    assert max(flow.fragmented_max for flow in seen.flows.values()) == 3008
    assert sum(flow.fragments for flow in seen.flows.values()) == 3


def test_ipv6_is_read_behind_its_extension_headers() -> None:
    options = struct.pack("!BB6x", 60, 0) + struct.pack("!BB6x", 17, 0)  # hop-by-hop, destination options
    plain = ipv6("ff05::1", 17, udp6("ff05::1", 5000, b"hello"))
    extended = ipv6("ff05::1", 0, options + udp6("ff05::1", 5000, b"hello"))
    key, flow = only(see(plain, extended))
    assert (key.destination, key.port) == (IPv6Address("ff05::1"), 5000)
    assert (flow.packets, flow.checked, flow.bad_checksums, flow.ttl_max) == (2, 2, 0, 5)


def test_a_checksum_of_zero_is_wrong_in_ipv6() -> None:
    datagram = udp6("ff05::1", 5000, b"hello")
    assert only(see(ipv6("ff05::1", 17, datagram[:6] + b"\0\0" + datagram[8:])))[1].bad_checksums == 1


def test_esp_has_no_port() -> None:
    key, flow = only(see(ethernet_ipv4(SOURCE, GROUP, 50, bytes(32))))
    assert (key.protocol, key.port, flow.packets) == ("esp", None, 1)


@pytest.mark.parametrize("version", [2, 3])
def test_a_querier_is_known_by_its_version(version: int) -> None:
    seen = see(igmp_query("192.0.2.254", version=version))
    assert seen.queriers == {Querier("in0", IPv4Address("192.0.2.254"), f"IGMPv{version}")}
    assert seen.flows == {}


def test_queriers_of_the_oldest_igmp_and_of_mld_are_known() -> None:
    assert {q.protocol for q in see(igmp_query("192.0.2.254", version=2, max_response_code=0)).queriers} == {"IGMPv1"}
    router_alert = struct.pack("!BB6B", 58, 0, 5, 2, 0, 0, 1, 0)
    for size, protocol in ((24, "MLDv1"), (28, "MLDv2")):
        query = ipv6("ff02::1", 0, router_alert + b"\x82" + bytes(size - 1))
        assert {q.protocol for q in see(query).queriers} == {protocol}


def test_what_is_neither_is_left_out() -> None:
    seen = see(b"", bytes(14), bytes(60), ethernet_ipv4(SOURCE, GROUP, 6, bytes(20)))
    assert (seen.flows, seen.queriers) == ({}, set())


@given(st.binary(max_size=120), st.sampled_from([0x45, 0x46, 0x4F, 0x60, 0x00]))
def test_no_bytes_are_too_damaged_to_look_at(data: bytes, first: int) -> None:
    see(bytes(14) + bytes([first]) + data)

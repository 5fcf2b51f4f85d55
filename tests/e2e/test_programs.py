"""Real programs on both sides of the relay, by the rules of docs/recipes/ as they stand there.

    a 192.0.2.2 --- eth0 relay eth1 --- 198.51.100.2 b          (lab/topology.py, two_segments)

Each program first finds nothing, then works, and finds nothing any more when its rules are gone. That nothing comes is
shown without waiting for it: what a program sends is seen to leave its segment, then a datagram that a rule does relay
follows it, by the same interface and worker, and arrives in the other segment alone.
"""

from __future__ import annotations

import functools
import itertools
import os
import socket
import struct
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple

import pytest

from lab import recipes
from lab.capture import Capture, Frame
from lab.daemon import Daemon
from lab.frames import ALLOW_NEW_SOURCES, BLOCK_OLD_SOURCES, CHANGE_TO_INCLUDE, MODE_IS_INCLUDE, internet_checksum
from lab.namespaces import Lab, Namespace, unsupported, wait_until
from lab.programs import Avahi, Program, ZeroconfPeer, minidlna, missing, ptp4l, search
from lab.topology import Segments, two_segments

MDNS, MDNS6 = "224.0.0.251", "ff02::fb"
SSDP = "239.255.255.250"
PTP = "224.0.1.129"
SENTINEL, SENTINEL_PORT = "239.255.99.99", 9999

Predicate = Callable[[Frame], bool]


def sent_to(address: str, port: int | None = None) -> Predicate:
    """Of frames: to this address and, unless it is a fragment behind the first, this UDP port. Of IPv6 without
    extension headers."""
    packed = ip_address(address).packed
    ethertype, place, payload = (b"\x08\x00", 30, 34) if len(packed) == 4 else (b"\x86\xdd", 38, 54)

    def matches(frame: Frame) -> bool:
        data = frame.data
        if data[12:14] != ethertype or data[place : place + len(packed)] != packed:
            return False
        return port is None or struct.unpack_from("!H", data, payload + 2)[0] == port

    return matches


def any_of(*predicates: Predicate) -> Predicate:
    return lambda frame: any(predicate(frame) for predicate in predicates)


def ending_in(payload: bytes) -> Predicate:
    return lambda frame: frame.data.endswith(payload)


class Header(NamedTuple):
    source: str
    ttl: int  # or hop limit
    source_port: int


def header(frame: Frame) -> Header:
    """Of a UDP datagram in one piece, IPv6 without extension headers, whose checksums are right."""
    data = frame.data
    if data[12:14] == b"\x08\x00":
        start, source, destination, ttl = 34, data[26:30], data[30:34], data[22]
        assert internet_checksum(data[14:34]) == 0, str(frame)
    else:
        start, source, destination, ttl = 54, data[22:38], data[38:54], data[21]
    source_port, _, length = struct.unpack_from("!HHH", data, start)
    segment = data[start : start + length]
    assert segment[6:8] != bytes(2), "the checksum is left out"
    assert internet_checksum(source + destination + struct.pack("!HH", 17, length) + segment) == 0, str(frame)
    return Header(str(ip_address(source)), ttl, source_port)


class World:
    """Two segments, and a relay between them."""

    def __init__(self, segments: Segments, daemon: Daemon) -> None:
        self.relay, self.a, self.b = segments.relay, segments.a, segments.b
        self.daemon = daemon
        self._numbers = itertools.count()

    def own(self, interface: str) -> set[str]:
        """The relay's addresses there that it sends from to a neighbour's group: IPv4, and IPv6 of the link."""
        addresses = {address.partition("/")[0] for address in self.relay.addresses[interface]}
        return {
            address for address in addresses if ip_address(address).version == 4 or ip_address(address).is_link_local
        }

    @contextmanager
    def rules(self, page: str) -> Iterator[None]:
        """As the recipe has them; removed as the recipe says."""
        with self.daemon.client() as client:
            try:
                for given in recipes.rules(page):
                    client.add(*given)
                yield
                for name in recipes.removals(page):
                    client.remove(name)
            finally:
                names = [rule.name or rule.id for rule in client.rules()]
                left = [name for name in names if not name.startswith("sentinel")]
                for name in left:
                    client.remove(name)
        assert left == [], f"docs/recipes/{page}.md does not remove all that it adds"

    @staticmethod
    def arriving(client: Namespace, wanted: Predicate) -> Capture:
        """What comes in there and is wanted."""
        return Capture(client, "eth0", only=lambda f: not f.outgoing and wanted(f))

    @contextmanager
    def nothing_crosses(
        self,
        source: Namespace,
        target: Namespace,
        unwanted: Predicate,
        having: bytes = b"",
        *,
        leaving: Predicate | None = None,
    ) -> Iterator[None]:
        """What is done in this block makes a frame with these bytes in it leave the source: `leaving`, or one of those
        that are unwanted at the target. None of these comes to it."""
        sentinel = sent_to(SENTINEL, SENTINEL_PORT)
        with (
            Capture(source, "eth0", only=lambda f: f.outgoing and (leaving or unwanted)(f)) as near,
            Capture(target, "eth0", only=lambda f: not f.outgoing and (unwanted(f) or sentinel(f))) as far,
        ):
            yield
            near.wait_for(lambda f: having in f.data, 15)
            # Twice, since what is in one batch may leave in any order.
            for _ in range(2):
                number = struct.pack("!I", next(self._numbers))
                send(source, SENTINEL, SENTINEL_PORT, number)
                far.wait_for(ending_in(number))
            assert far.matching(unwanted) == []


def send(client: Namespace, address: str, port: int, payload: bytes, source: str | None = None) -> None:
    """One datagram to a group or a host."""
    with client.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 8)
        if source:
            sender.bind((source, 0))
        sender.sendto(payload, (address, port))


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    if reason := unsupported():
        pytest.skip(reason)
    with Lab() as lab:
        segments = two_segments(lab)
        # One worker: what comes by one interface leaves in that order.
        with Daemon(segments.relay, "--debug", "--workers", "1") as daemon:
            world = World(segments, daemon)
            for there, here in (("eth0", "eth1"), ("eth1", "eth0")):
                sentinel = f"{SENTINEL}:{SENTINEL_PORT}"
                daemon.run("add", f"{sentinel}%{there}", f"{sentinel}%{here}", "--name", f"sentinel-{there}")
            yield world
        assert "Traceback" not in daemon.log, daemon.log


def has_joined(client: Namespace, group: str) -> bool:
    return group in client.ip("maddress", "show", "dev", "eth0").stdout


def needs(*commands: str) -> None:
    if reason := missing(*commands):
        pytest.skip(reason)


# --- multicast DNS ----------------------------------------------------------------------------------------------------


def test_mdns_between_avahi_and_python_zeroconf(world: World) -> None:
    needs("avahi-daemon", "avahi-publish", "avahi-browse", "dbus-daemon")
    mdns = any_of(sent_to(MDNS, 5353), sent_to(MDNS6, 5353))
    with ExitStack() as stack:
        alpha, beta = Avahi(world.a, "alpha"), Avahi(world.b, "beta")
        peers = [
            stack.enter_context(ZeroconfPeer(world.b, version, address))
            for version, address in ((4, "198.51.100.2"), (6, "2001:db8:b::2"))
        ]
        alpha.wait_until_ready()
        beta.wait_until_ready()

        # Neither what is published is heard, nor a question.
        with world.nothing_crosses(world.a, world.b, mdns, b"Printer"):
            stack.enter_context(alpha.publish("Printer", "_ipp._tcp", 631))
        with world.nothing_crosses(world.b, world.a, mdns, b"_ipp"):
            vain = stack.enter_context(beta.browse("_ipp._tcp"))
        vain.stop()
        assert not vain.said("Printer")

        with (
            world.arriving(world.b, mdns) as to_b,
            world.arriving(world.a, mdns) as to_a,
            world.rules("mdns"),
        ):
            browser = stack.enter_context(beta.browse("_ipp._tcp"))
            for peer, name in zip(peers, ("Python4", "Python6"), strict=True):
                peer.browse("_ipp._tcp")
                peer.publish(name, "_http._tcp", 8080)
            back = stack.enter_context(alpha.browse("_http._tcp"))
            for version in ("IPv4", "IPv6"):
                found = browser.wait_for("=;", version, ";Printer;").split(";")
                assert found[6] == "alpha.local"
                assert found[7] in ("192.0.2.2", "192.0.2.9", "2001:db8:a::2")
                assert found[8] == "631"
            for peer, name, version, address in zip(
                peers, ("Python4", "Python6"), ("IPv4", "IPv6"), ("198.51.100.2", "2001:db8:b::2"), strict=True
            ):
                found = back.wait_for("=;", version, f";{name};").split(";")
                assert found[7:9] == [address, "8080"]
                wait_until(functools.partial(has_found, peer, "Printer"), 15, "python-zeroconf found no printer")
                assert peer.resolve("Printer", "_ipp._tcp")[1] == 631
            # From port 5353, as answers have to be (RFC 6762, section 6), and the relay's own addresses.
            for capture, own in ((to_b, world.own("eth1")), (to_a, world.own("eth0"))):
                capture.wait_for(sent_to(MDNS))
                capture.wait_for(sent_to(MDNS6))
                assert {header(frame) for frame in capture.frames} == {Header(address, 255, 5353) for address in own}

        with world.nothing_crosses(world.a, world.b, mdns, b"Late"):
            stack.enter_context(alpha.publish("Late", "_ipp._tcp", 632))
        assert not browser.said("Late")
        assert all("Late" not in peer.found() for peer in peers)


def has_found(peer: ZeroconfPeer, name: str) -> bool:
    return name in peer.found()


# --- SSDP -------------------------------------------------------------------------------------------------------------


def test_ssdp_search_and_announcements_of_minidlna(world: World) -> None:
    needs("minidlnad", "socat")
    ssdp = sent_to(SSDP, 1900)
    with ExitStack() as stack:
        with world.nothing_crosses(world.b, world.a, ssdp, b"ssdp:alive"):
            stack.enter_context(minidlna(world.b, "Lab media"))
        with world.nothing_crosses(world.a, world.b, ssdp, b"M-SEARCH"):
            vain = stack.enter_context(search(world.a))
        vain.stop()
        assert not vain.said("HTTP/1.1 200 OK")

        with (
            world.arriving(world.a, ssdp) as announced,
            world.arriving(world.b, ssdp) as asked,
            world.rules("ssdp"),
        ):
            answer = stack.enter_context(search(world.a))
            # The device answers the one who asked, whose address the question kept.
            location = answer.wait_for("LOCATION:").partition(":")[2].strip()
            assert location == "http://198.51.100.2:8200/rootDesc.xml"
            assert "Lab media" in world.a.call(fetch, location)
            assert header(asked.wait_for(lambda f: b"M-SEARCH" in f.data)).source == "192.0.2.2"
            assert header(announced.wait_for(lambda f: b"ssdp:alive" in f.data)).source == "198.51.100.2"

        with world.nothing_crosses(world.a, world.b, ssdp, b"M-SEARCH"):
            late = stack.enter_context(search(world.a))
        late.stop()
        assert not late.said("HTTP/1.1 200 OK")
        with world.nothing_crosses(world.b, world.a, ssdp, b"ssdp:alive"):
            pass  # it announces itself once a second


def fetch(location: str) -> str:
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(location, timeout=10) as page:
        return str(page.read(), "utf-8")


# --- the Precision Time Protocol --------------------------------------------------------------------------------------


def test_ptp_reaches_a_clock_on_the_far_side(world: World) -> None:
    needs("ptp4l", "setpriv")
    ptp = any_of(sent_to(PTP, 319), sent_to(PTP, 320))
    with ExitStack() as stack:
        with world.nothing_crosses(world.a, world.b, ptp):
            master = stack.enter_context(ptp4l(world.a, "priority1 1"))
            slave = stack.enter_context(ptp4l(world.b, "slaveOnly 1"))
            master.wait_for("assuming the grand master role")
        assert not slave.said("new foreign master")

        with world.rules("ptp"):
            master_id = master.wait_for("selected local clock").split()[4]
            slave.wait_for("selected best master clock", master_id)
            # Syncs arrive, and the delay of requests and responses, which go the other way, is known.
            offset = int(slave.wait_for("master offset", "path delay").split()[3])
            assert abs(offset) < 100_000_000  # ns; in truth it is one clock, read on a loaded machine
        heard = len(slave.lines)
        slave.wait_for("selected local clock", after=heard)  # the master is heard no more
        with world.nothing_crosses(world.a, world.b, ptp):
            pass


# --- DDS: datagrams that have to be fragmented ------------------------------------------------------------------------


def test_dds_sized_datagrams_arrive_whole(world: World, tmp_path: Path) -> None:
    needs("socat")
    group, port = "239.255.0.1", 7400
    sent = tmp_path / "sent"
    sent.write_bytes(os.urandom(8192))

    def publish() -> None:
        world.a.run("socat", "-u", "-b", "65536", f"OPEN:{sent}", f"UDP4-DATAGRAM:{group}:{port},ip-multicast-ttl=4")

    with world.nothing_crosses(world.a, world.b, sent_to(group)):
        publish()
    with world.rules("dds"), world.arriving(world.b, sent_to(group)) as arriving:
        received = tmp_path / "received"
        with Program(
            world.b,
            *("socat", "-u", "-b", "65536", f"UDP4-RECVFROM:{port},reuseaddr,ip-add-membership={group}:eth0"),
            f"CREATE:{received}",
        ) as receiver:
            wait_until(lambda: has_joined(world.b, group), 5, "socat did not join")
            publish()
            receiver.process.wait(10)
        assert received.read_bytes() == sent.read_bytes()
        wait_until(lambda: len(arriving.frames) >= 6, 5)  # fragments of 1480 bytes of 8200
        assert len(arriving.frames) == 6
    with world.nothing_crosses(world.a, world.b, sent_to(group)):
        publish()


# --- source-specific multicast ----------------------------------------------------------------------------------------


def test_ssm_takes_one_source_of_two(world: World) -> None:
    needs("iperf")
    group, port, allowed, other = "232.1.1.1", 5000, "192.0.2.9", "192.0.2.2"

    def stream(source: str) -> None:
        options = f"-T 4 -b 100pps -l 500 -n 10000 -p {port}"
        world.a.run("iperf", "-u", "-c", group, "-B", source, *options.split())

    with world.nothing_crosses(world.a, world.b, sent_to(group)):
        send(world.a, group, port, b"early", allowed)

    with Capture(world.a, "eth0", only=lambda f: f.igmp is not None) as reports:
        with world.rules("ssm"), world.arriving(world.b, sent_to(group)) as arriving:
            asks = (ALLOW_NEW_SOURCES, CHANGE_TO_INCLUDE, MODE_IS_INCLUDE)
            reports.wait_for(lambda f: reports_source(f, group, allowed, *asks))
            with Program(world.b, "iperf", "-s", "-u", "-B", group, "-H", allowed, "-p", str(port)) as receiver:
                wait_until(lambda: has_joined(world.b, group), 5, "iperf did not join")
                stream(other)
                stream(allowed)
                receiver.wait_for("/", "(0%)")
            arriving.wait_for(sent_to(group))
            assert {header(frame).source for frame in arriving.frames} == {allowed}
        reports.wait_for(lambda f: reports_source(f, group, allowed, BLOCK_OLD_SOURCES))

    with world.nothing_crosses(world.a, world.b, sent_to(group)):
        send(world.a, group, port, b"late", allowed)


def reports_source(frame: Frame, group: str, source: str, *kinds: int) -> bool:
    """An IGMPv3 report about this source of the group, and about it alone."""
    message = frame.igmp
    return message is not None and any(
        (record.group, record.sources) == (group, (source,)) and record.kind in kinds for record in message.records
    )


# --- the other pages --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("page", "datagrams"),
    [
        (
            "unicast-to-multicast",
            [(("239.1.1.1", 5000), ("198.51.100.2", 6000)), (("192.0.2.1", 6000), ("239.1.1.1", 5000))],
        ),
        (
            "group-and-port",
            [(("239.1.1.1", 5000), ("239.2.2.2", 6000)), (("239.3.1.7", 5555), ("239.4.1.7", 5555))],
        ),
        (
            "unroutable-source",
            [(("239.1.1.1", 5000), ("239.1.1.1", 5000)), (("239.1.2.77", 5077), ("239.1.2.77", 5077))],
        ),
        ("ipv4-to-ipv6", [(("239.1.1.1", 5000), ("ff05::1:1", 5000))]),
    ],
)
def test_a_page_does_what_it_says(
    world: World, page: str, datagrams: list[tuple[tuple[str, int], tuple[str, int]]]
) -> None:
    own = ("198.51.100.1", "2001:db8:b::1")
    with world.rules(page):
        for given, arrives in datagrams:
            wanted = sent_to(*arrives)
            with world.arriving(world.b, wanted) as arriving:
                send(world.a, *given, page.encode())
                frame = arriving.wait_for(wanted, message=f"nothing for {arrives}")
            assert frame.data.endswith(page.encode())
            assert header(frame).source in own
    for given, arrives in datagrams:
        with world.nothing_crosses(world.a, world.b, sent_to(*arrives), b"late", leaving=sent_to(*given)):
            send(world.a, *given, b"late")

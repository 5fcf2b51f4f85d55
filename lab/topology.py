"""The topologies that tests, demo and benchmarks share, with documentation addresses where they last.

A topology is a function that takes a Lab and returns a dataclass of namespaces and the names in them. It
starts no relay: what runs in the middle is the caller's business, which lets the benchmarks put other
relays there.
"""

from __future__ import annotations

from dataclasses import dataclass

from lab.namespaces import Lab, Namespace

SENDER_ADDRESS = "203.0.113.10"
SENDER_ADDRESS6 = "2001:db8:a::10"
INGRESS_ADDRESS = "192.0.2.1"
INGRESS_ADDRESS6 = "2001:db8:b::1"
OUTPUTS_MAX = 254  # output n > 0 uses 10.<n>.0.0/24


@dataclass(frozen=True)
class Egress:
    """One output interface of the relay and the namespace behind it."""

    interface: str  # in the relay
    address: str  # of the relay on it
    receiver: Namespace
    receiver_interface: str
    receiver_address: str

    @property
    def address6(self) -> str:
        """Of the relay, if the line has IPv6."""
        return f"2001:db8:{self.interface.removeprefix('out')}::1"

    @property
    def receiver_address6(self) -> str:
        return f"2001:db8:{self.interface.removeprefix('out')}::2"


@dataclass(frozen=True)
class RelayLine:
    """What `relay_line` built."""

    sender: Namespace
    sender_interface: str
    sender_address: str
    relay: Namespace
    ingress_interface: str
    ingress_address: str
    egresses: tuple[Egress, ...]

    @property
    def receiver(self) -> Namespace:
        """The first receiver, for the many tests that need no other."""
        return self.egresses[0].receiver

    @property
    def receivers(self) -> tuple[Namespace, ...]:
        return tuple(egress.receiver for egress in self.egresses)


def relay_line(
    lab: Lab,
    *,
    outputs: int = 1,
    mtu: int = 1500,
    offloads: bool = True,
    ip_forward: bool = False,
    ipv6: bool = False,
) -> RelayLine:
    """A source that is not routable, a relay, and receivers behind it.

        +------------------------+  +----------------------------------------+  +----------------------+
        | sender                 |  | relay                                  |  |             receiver |
        |   eth0 203.0.113.10/24 +--+ in0 192.0.2.1/24  out0 198.51.100.1/24 +--+ eth0 198.51.100.2/24 |
        +------------------------+  |                                        |  +----------------------+
                                    |                                        |  +----------------------+
                                    |                       out1 10.1.0.1/24 +--+ eth0 10.1.0.2/24     |
                                    |                       ...              |  |            receiver1 |
                                    +----------------------------------------+  +----------------------+

    Sender and relay share a cable but no subnet: 203.0.113.10 has no route in the relay, whose strict
    reverse-path check (rp_filter=1 everywhere) therefore drops its datagrams before any UDP socket or
    multicast route sees them. That is the situation the relay exists for. Sender and receivers have
    224.0.0.0/4 on eth0; forwarding is off unless asked for. With `ipv6` it is the same in IPv6: the sender
    is 2001:db8:a::10, in0 2001:db8:b::1, output n 2001:db8:n::1, and the receiver behind it 2001:db8:n::2.
    """
    if not 1 <= outputs <= OUTPUTS_MAX:
        raise ValueError(f"outputs must be 1 to {OUTPUTS_MAX}, not {outputs}")
    sender = lab.namespace("sender", ipv6=ipv6)
    relay = lab.namespace("relay", ipv6=ipv6)
    relay.sysctl("net.ipv4.ip_forward", int(ip_forward))
    for scope in ("all", "default"):
        relay.sysctl(f"net.ipv4.conf.{scope}.rp_filter", 1)

    lab.veth(
        *(sender, "eth0", relay, "in0"),
        address_a=f"{SENDER_ADDRESS}/24",
        address_b=f"{INGRESS_ADDRESS}/24",
        mtu=mtu,
        offloads=offloads,
    )
    relay.sysctl("net.ipv4.conf.in0.rp_filter", 1)
    sender.ip("route", "add", "224.0.0.0/4", "dev", "eth0")
    if ipv6:
        sender.ip("address", "add", f"{SENDER_ADDRESS6}/64", "dev", "eth0")
        relay.ip("address", "add", f"{INGRESS_ADDRESS6}/64", "dev", "in0")

    egresses = []
    for number in range(outputs):
        receiver = lab.namespace("receiver" if number == 0 else f"receiver{number}", ipv6=ipv6)
        subnet = "198.51.100" if number == 0 else f"10.{number}.0"
        egress = Egress(
            interface=f"out{number}",
            address=f"{subnet}.1",
            receiver=receiver,
            receiver_interface="eth0",
            receiver_address=f"{subnet}.2",
        )
        lab.veth(
            *(relay, egress.interface, receiver, egress.receiver_interface),
            address_a=f"{egress.address}/24",
            address_b=f"{egress.receiver_address}/24",
            mtu=mtu,
            offloads=offloads,
        )
        relay.sysctl(f"net.ipv4.conf.{egress.interface}.rp_filter", 1)
        receiver.ip("route", "add", "224.0.0.0/4", "dev", egress.receiver_interface)
        if ipv6:
            relay.ip("address", "add", f"{egress.address6}/64", "dev", egress.interface)
            receiver.ip("address", "add", f"{egress.receiver_address6}/64", "dev", egress.receiver_interface)
        egresses.append(egress)

    return RelayLine(
        sender=sender,
        sender_interface="eth0",
        sender_address=SENDER_ADDRESS,
        relay=relay,
        ingress_interface="in0",
        ingress_address=INGRESS_ADDRESS,
        egresses=tuple(egresses),
    )


@dataclass(frozen=True)
class Segments:
    """What `two_segments` built; every interface of a client is eth0."""

    relay: Namespace
    a: Namespace
    b: Namespace


def two_segments(lab: Lab) -> Segments:
    """Clients on both sides of a host that routes between them, IPv4 and IPv6, as in docs/recipes/.

        +---------------------------+  +--------------------------------------------+  +---------------------------+
        | a                         |  | relay                                      |  |                         b |
        |   eth0 192.0.2.2/24       +--+ eth0 192.0.2.1/24     eth1 198.51.100.1/24 +--+ eth0 198.51.100.2/24      |
        |        2001:db8:a::2/64   |  |      2001:db8:a::1/64      2001:db8:b::1/64|  |      2001:db8:b::2/64     |
        +---------------------------+  +--------------------------------------------+  +---------------------------+

    Unicast gets through; multicast does not, as nothing there routes it. a has a second address, 192.0.2.9.
    """
    relay, a, b = (lab.namespace(label, ipv6=True) for label in ("relay", "a", "b"))
    relay.sysctl("net.ipv4.ip_forward", 1)
    relay.sysctl("net.ipv6.conf.all.forwarding", 1)
    for client, interface, subnet, prefix in (
        (a, "eth0", "192.0.2", "2001:db8:a::"),
        (b, "eth1", "198.51.100", "2001:db8:b::"),
    ):
        lab.veth(
            *(client, "eth0", relay, interface),
            address_a=f"{subnet}.2/24",
            address_b=f"{subnet}.1/24",
            offloads=False,
        )
        client.ip("address", "add", f"{prefix}2/64", "dev", "eth0")
        relay.ip("address", "add", f"{prefix}1/64", "dev", interface)
        client.ip("route", "add", "default", "via", f"{subnet}.1")
        client.ip("-6", "route", "add", "default", "via", f"{prefix}1")
    a.ip("address", "add", "192.0.2.9/24", "dev", "eth0")
    return Segments(relay, a, b)

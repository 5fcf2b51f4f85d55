"""The network that is measured: a generator, one relay core, and devices that count what comes out.

                +------------------------+  +--------------------------------------+  +----------------------+
    core 0      | sender                 |  | relay                        core 1  |  |             receiver |
                |   eth0 192.0.2.10/24   +--+ in0 192.0.2.1/24   out0 10.1.0.1/24  +--+ eth0 10.1.0.2/24     |
                +------------------------+  |                    out1 10.2.0.1/24  +--+ eth1 10.2.0.2/24     |
                                            |                    ...               |  | ...                  |
                                            +--------------------------------------+  +----------------------+

Unlike lab.topology.relay_line the source is routable at the relay, so that the kernel's own multicast forwarding, which
checks the reverse path, can take part; and one namespace has all receiving ends, since they are only counted.

Owns the topology, its offloads and device counters. Knows no relay.

Kernel facts relied on:

- A veth hands a frame to the other end's backlog on the core that sends it. So the sender's core does the relay's
  receiving below its socket, as a core does that a network card interrupts, and all of what a relay in the kernel does.
- Receive packet steering (rps_cpus) on in0 moves that to the relay's core: everything that the relay causes is done by
  one core then, as it is for a machine whose network card interrupts the core of its relay.
- A UDP_SEGMENT run passes a veth in one piece unless the device is told that it cannot (tx-udp-segmentation off): then
  the sender's kernel cuts it apart, and single frames arrive, as from a wire.
- The backlog of a core is one queue for all devices (net.core.netdev_max_backlog frames). The receiving devices are
  therefore steered to the sender's core: on the relay's, their frames would be dropped with the overload at in0, and
  that loss is ours, not the relay's.
- A veth counts as received what the backlog took and as dropped what it did not; a run that is handed over whole is
  one frame, and so the datagrams in it are found from the bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lab.namespaces import Lab, Namespace

GROUP: Final = "239.1.0.1"
PORT: Final = 5000
SOURCE: Final = "192.0.2.10"
INGRESS: Final = "in0"
INGRESS_ADDRESS: Final = "192.0.2.1"
SENDER_CORE: Final = 0
RELAY_CORE: Final = 1
TTL: Final = 8
HEADERS_SIZE: Final = 42  # Ethernet, IPv4 and UDP
STEERINGS: Final = ("sender", "relay")


@dataclass(frozen=True)
class Counters:
    """Of one direction of a device, or of several together: frames."""

    packets: int
    bytes: int
    dropped: int

    def __sub__(self, other: Counters) -> Counters:
        return Counters(self.packets - other.packets, self.bytes - other.bytes, self.dropped - other.dropped)

    def datagrams(self, size: int) -> int:
        """Of `size` bytes of payload, also those in runs and those that the device dropped. A few small frames of
        others (IGMP) do not count."""
        return (self.bytes - self.packets * HEADERS_SIZE) // size + self.dropped


@dataclass(frozen=True)
class Network:
    sender: Namespace
    relay: Namespace
    receiver: Namespace
    outputs: int
    steering: str

    @property
    def egresses(self) -> tuple[str, ...]:
        return tuple(f"out{number}" for number in range(self.outputs))

    def egress_address(self, number: int) -> str:
        return f"10.{number + 1}.0.1"

    def emitted(self) -> Counters:
        """What has reached the receiving devices."""
        return self._sum(self.receiver, "eth")

    def arrived(self) -> Counters:
        """What has reached the relay's ingress device, taken or not."""
        return self._sum(self.relay, INGRESS)

    def segmentation(self, *, in_device: bool) -> None:
        """Who cuts apart the runs that a relay sends: the kernel in software, or the device, that is, nobody here."""
        for egress in self.egresses:
            self.relay.ethtool("-K", egress, "tx-udp-segmentation", "on" if in_device else "off")

    def _sum(self, namespace: Namespace, prefix: str) -> Counters:
        # The same counters as those of `ip -s link`, without a process for each look.
        lines = namespace.call(Path("/proc/thread-self/net/dev").read_text).splitlines()[2:]
        found = [line.split(":")[1].split() for line in lines if line.strip().startswith(prefix)]
        size, packets, dropped = (sum(int(fields[column]) for fields in found) for column in (0, 1, 3))
        return Counters(packets, size, dropped)


def build(lab: Lab, *, outputs: int = 1, steering: str = "sender") -> Network:
    """`steering`: whose core does the relay's ingress work below its socket. The "sender"'s: nothing is steered, and
    each veth's other end is the business of whoever sends; or the "relay"'s own."""
    sender, relay, receiver = (lab.namespace(label) for label in ("sender", "relay", "receiver"))
    lab.veth(sender, "eth0", relay, INGRESS, address_a=f"{SOURCE}/24", address_b=f"{INGRESS_ADDRESS}/24")
    sender.ethtool("-K", "eth0", "tx-udp-segmentation", "off")
    sender.ip("route", "add", "224.0.0.0/4", "dev", "eth0")
    if steering == "relay":
        _steer(relay, [INGRESS], RELAY_CORE)
    network = Network(sender, relay, receiver, outputs, steering)
    for number, egress in enumerate(network.egresses):
        subnet = f"10.{number + 1}.0"
        lab.veth(relay, egress, receiver, f"eth{number}", address_a=f"{subnet}.1/24", address_b=f"{subnet}.2/24")
    if steering == "relay":
        _steer(receiver, [f"eth{number}" for number in range(outputs)], SENDER_CORE)
    network.segmentation(in_device=False)
    return network


def _steer(namespace: Namespace, devices: list[str], core: int) -> None:
    # sysfs shows the devices of the namespace in which it was mounted; `ip netns exec` mounts it anew.
    paths = " ".join(f"/sys/class/net/{device}/queues/rx-0/rps_cpus" for device in devices)
    namespace.run("sh", "-c", f"for path in {paths}; do echo {1 << core:x} > $path; done")

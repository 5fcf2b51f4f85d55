"""Reasons: why packets are dropped, what brings that about, and what to do.

Owns the texts for each of counters.DROP_REASONS. `{ingress}` and `{egress}` stand for names of interfaces, `{rule}` for
a rule's input. Remedies are for a shell: what stands behind '#' is for its user. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Reason:
    cause: str
    remedy: str
    expected: bool = False  # it is what somebody asked for, or harms nobody


REASONS: Final[dict[str, Reason]] = {
    "truncated": Reason(
        "their headers claim more bytes than arrived: the sender or a device on the way is broken",
        "tcpdump -ni {ingress} -vv -c 20 udp",
    ),
    "oversize": Reason(
        "reassembled or merged beyond what one packet can hold here, as IPv4 datagrams in fragments are with "
        "`--ingress recv`",
        "mcrelay run --ingress ring  # the default; if it is: ethtool -K {ingress} rx-udp-gro-forwarding off",
    ),
    "not_ip": Reason(
        "neither IPv4 nor IPv6: without CAP_BPF the workers see all frames of the interface; harmless",
        "sudo mcrelay run  # as root, or with CAP_BPF, the kernel keeps them away",
        expected=True,
    ),
    "bad_ip_header": Reason(
        "an IP header that contradicts itself: the sender or a device on the way is broken",
        "tcpdump -ni {ingress} -vv -c 20 ip",
    ),
    "bad_ip_checksum": Reason(
        "damaged on the way: cable, transceiver or a switch",
        "ethtool -S {ingress} | grep -iE 'err|crc'",
    ),
    "fragment": Reason(
        "fragments of which the others did not come: lost on the way, or sent by ways of their own",
        "nstat -az IpReasmFails IpReasmTimeout Ip6ReasmFails  # then have the sender send less than the MTU",
    ),
    "not_udp": Reason("neither UDP nor ESP: only those are relayed", "tcpdump -ni {ingress} not udp", expected=True),
    "bad_udp_length": Reason(
        "a UDP length beyond the packet: the sender is broken", "tcpdump -ni {ingress} -vv -c 20 udp"
    ),
    "bad_udp_checksum": Reason(
        "damaged on the way, or sent with a checksum that a device was to fill in and did not",
        "ethtool -S {ingress} | grep -iE 'err|csum'  # at a virtual sender: ethtool -K INTERFACE tx off",
    ),
    "other_host": Reason(
        "frames for the link-layer address of another host, which come where an interface is promiscuous",
        "ip -details link show dev {ingress}  # promiscuity",
        expected=True,
    ),
    "vlan_tagged": Reason(
        "tagged with a VLAN that no rule is for",
        "mcrelay explain INPUT,vlan=N  # or a rule for the VLAN's own interface",
    ),
    "no_rule": Reason(
        "no rule wants them; they cost something where the kernel's filter is missing (CAP_BPF)",
        "mcrelay explain INPUT  # says which rules almost take it",
        expected=True,
    ),
    "ingress_overrun": Reason(
        "the worker did not read fast enough and its ring was full",
        "mcrelay run --ring-mib 64  # and more workers: --cores LIST",
    ),
    "egress_full": Reason(
        "the output's interface or its queue took no more: it is slower than the flow",
        "tc -s qdisc show dev {egress}  # then: ip link set dev {egress} txqueuelen 10000",
    ),
    "egress_unreachable": Reason(
        "the output's interface is down or gone, has no address to send from, or no IPv6 route; copies to a host that "
        "does not answer, or has no IPv4 route, count as forwarded",
        "mcrelay explain {rule}",
    ),
    "egress_refused": Reason(
        "a packet filter of this host forbids it",
        "nft list ruleset  # or iptables -S OUTPUT",
    ),
    "egress_error": Reason("the kernel refused the send for another reason", "mcrelay explain {rule}"),
    "merged": Reason(
        "several datagrams that a device merged into one frame, and which could not be had whole",
        "ethtool -K {ingress} rx-udp-gro-forwarding off rx-gro-list off",
    ),
    "interrupted": Reason("a worker died with them in hand", "mcrelay workers  # the daemon's log says why"),
    "own": Reason(
        "they match a rule but come from an address of this host: our own traffic come back",
        "mcrelay list  # what another rule or router sends back here",
    ),
    "loop": Reason(
        "the rule is suspended: the same payload came round again and again by way of another relay",
        "mcrelay list  # then remove one of the two that feed each other: mcrelay remove NAME",
    ),
    "bad_extension": Reason(
        "IPv6 extension headers that lie, are too many, or route elsewhere",
        "tcpdump -ni {ingress} -vv -c 20 ip6",
    ),
    "egress_limited": Reason(
        "beyond the rate that the output permits: its rate= option", "mcrelay list  # rate= of rule {rule}"
    ),
    "paused": Reason("the output is paused", "mcrelay list  # paused in rule {rule}", expected=True),
    "split_horizon": Reason(
        "the output would have sent it back where it came from, as a rule for several interfaces must not",
        "mcrelay list",
        expected=True,
    ),
}


def remedy(reason: str, *, ingress: str = "INTERFACE", egress: str = "INTERFACE", rule: str = "INPUT") -> str:
    return REASONS[reason].remedy.format(ingress=ingress, egress=egress, rule=rule)

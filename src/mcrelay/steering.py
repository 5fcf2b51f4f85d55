"""Steering: which worker a packet belongs to, computed by the kernel and by us.

The kernel asks a classic BPF program for every packet and takes the result modulo the number of workers
(PACKET_FANOUT_CBPF, packet(7)). The supervisor computes the same function to know which worker needs a rule. Both forms
stand here, side by side, and a test runs traffic through the kernel's to see that they agree.

The fanout's program sees a packet from its network header on, a socket's filter from its link-layer header on (the
sockets are SOCK_RAW). Both see packets of any protocol, without a VLAN tag, which the kernel keeps beside the packet.
Knows nothing of sockets or rules.
"""

from __future__ import annotations

from typing import Final

# Two odd constants for multiplicative hashing; the high half of the product is the better mixed one.
PORT_MULTIPLIER: Final = 0x9E3779B1
MULTIPLIER: Final = 0x85EBCA6B
SHIFT: Final = 16

# The network header wherever it is, as long as it lies in a packet's linear part (SKF_NET_OFF of linux/filter.h).
NETWORK: Final = 0xFFF00000

Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, constant

# What the kernel knows of a packet, beside its bytes (SKF_AD_OFF, SKF_AD_PROTOCOL and SKF_AD_PKTTYPE).
PROTOCOL: Final = 0xFFFFF000
PACKET_TYPE: Final = 0xFFFFF004
OUTGOING: Final = 4  # PACKET_OUTGOING of linux/if_packet.h

ETHERTYPE_IPV4: Final = 0x0800
ETHERTYPE_IPV6: Final = 0x86DD
UDP: Final = 17
ESP: Final = 50

# Classic BPF (linux/filter.h): class | size or source | mode or operation.
LD_W_ABS: Final = 0x20  # of packet[k]; of PROTOCOL and PACKET_TYPE, the number itself
LD_B_ABS: Final = 0x30
LD_H_IND: Final = 0x48
LDX_B_MSH: Final = 0xB1  # X = 4 * (packet[k] & 15): the length of the IPv4 header
ALU_ADD_X: Final = 0x0C
ALU_MUL_K: Final = 0x24
ALU_RSH_K: Final = 0x74
ALU_XOR_X: Final = 0xAC
TAX: Final = 0x07
RET_A: Final = 0x16
RET_K: Final = 0x06
JMP_K: Final = 0x05
JEQ_K: Final = 0x15


def steer(destination: int, port: int) -> int:
    """The value of the program for an IPv4 datagram to `destination`:`port` (32 bits, not yet modulo workers)."""
    mixed = (destination + port * PORT_MULTIPLIER) * MULTIPLIER & 0xFFFFFFFF
    return mixed ^ mixed >> SHIFT


def steer_address(packed: bytes) -> int:
    """The value of the program for packets to this address whose port does not count: 4 or 16 bytes, in network order.
    IPv6 packets are all steered so, since only the first fragment of a datagram has its port."""
    mixed = 0
    for at in range(0, len(packed), 4):
        mixed = (mixed + int.from_bytes(packed[at : at + 4], "big")) * MULTIPLIER & 0xFFFFFFFF
    return mixed ^ mixed >> SHIFT


def steering_program() -> list[Instruction]:
    """IPv6 by its destination address. All else is taken for IPv4 UDP: what is not, such as ESP, falls where it falls,
    and is looked for by all workers. A packet that is too short goes to the first worker."""
    ipv4: list[Instruction] = [
        (LDX_B_MSH, 0, 0, 0),
        (LD_H_IND, 0, 0, 2),  # UDP destination port
        (ALU_MUL_K, 0, 0, PORT_MULTIPLIER),
        (TAX, 0, 0, 0),
        (LD_W_ABS, 0, 0, 16),  # IPv4 destination address
        (ALU_ADD_X, 0, 0, 0),
        (ALU_MUL_K, 0, 0, MULTIPLIER),
    ]
    ipv6: list[Instruction] = [(LD_W_ABS, 0, 0, 24), (ALU_MUL_K, 0, 0, MULTIPLIER)]  # the destination's first word
    for at in (28, 32, 36):
        ipv6 += [(TAX, 0, 0, 0), (LD_W_ABS, 0, 0, at), (ALU_ADD_X, 0, 0, 0), (ALU_MUL_K, 0, 0, MULTIPLIER)]
    return [
        (LD_B_ABS, 0, 0, 0),
        (ALU_RSH_K, 0, 0, 4),  # the version
        (JEQ_K, len(ipv4) + 1, 0, 6),
        *ipv4,
        (JMP_K, 0, 0, len(ipv6)),
        *ipv6,
        (TAX, 0, 0, 0),
        (ALU_RSH_K, 0, 0, SHIFT),
        (ALU_XOR_X, 0, 0, 0),
        (RET_A, 0, 0, 0),
    ]


def udp_filter(network: int = NETWORK) -> list[Instruction]:
    """Accept what comes in of IPv4 UDP and ESP and of IPv6, in whatever VLAN, all bytes of it. What IPv6 packets carry
    may stand behind other headers, which only the engine walks. `network`: where the network header begins, from where
    the program sees the packet."""
    return [
        (LD_W_ABS, 0, 0, PACKET_TYPE),
        (JEQ_K, 7, 0, OUTGOING),
        (LD_W_ABS, 0, 0, PROTOCOL),
        (JEQ_K, 4, 0, ETHERTYPE_IPV6),
        (JEQ_K, 0, 4, ETHERTYPE_IPV4),
        (LD_B_ABS, 0, 0, network + 9),
        (JEQ_K, 1, 0, UDP),
        (JEQ_K, 0, 1, ESP),
        (RET_K, 0, 0, 0xFFFFFFFF),
        (RET_K, 0, 0, 0),
    ]


def drop_filter() -> list[Instruction]:
    """Accept nothing."""
    return [(RET_K, 0, 0, 0)]

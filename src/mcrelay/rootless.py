"""Rootless mode: what it can do without any privilege, and why not the rest.

Owns the refusals and remarks of `mcrelay run --rootless`; net/plain.py has the sockets. There a rule's packets come in
by an ordinary UDP socket, so only what the kernel would deliver to any program of this host. docs/rootless.md says it
for people.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from mcrelay.errors import RuleError, UsageError
from mcrelay.rules import Output, Rule

AS_ROOT: Final = "run mcrelay as root for that (without --rootless)"


def check_cores(workers: int | None, cores: str | None) -> None:
    """UsageError if more than one data plane worker is asked for."""
    if (workers or 1) > 1 or (cores is not None and ("," in cores or "-" in cores)):
        raise UsageError(
            "--rootless has one data plane worker: of several, each would get all of a group's datagrams",
            "leave out --workers, and name one core if any; or run mcrelay as root",
        )


def no_ring(what: str) -> UsageError:
    """About `what`, which gives the size of rings."""
    return UsageError(
        f"{what} is about packet rings, of which --rootless has none",
        f"leave it out and raise net.core.rmem_max, or {AS_ROOT}",
    )


def check_rule(rule: Rule, first_port: int = 0, own: Collection[str] | None = None) -> None:
    """RuleError if ordinary sockets cannot do what the rule says. Ports below `first_port` are privileged; `own` are
    the addresses of this host, if they are known."""
    given = rule.input
    what = f"input '{given}' is not possible with --rootless"
    if given.vlan is not None:
        raise RuleError(f"{what}: an ordinary socket sees no VLAN tag", f"name a VLAN interface, or {AS_ROOT}")
    if given.prefix is not None:
        raise RuleError(f"{what}: an ordinary socket takes no prefix of addresses", f"name each one, or {AS_ROOT}")
    if given.protocol == "esp":
        raise RuleError(f"{what}: an ordinary socket takes no ESP", f"name a UDP port, or {AS_ROOT}")
    if given.port is None:
        raise RuleError(f"{what}: an ordinary socket is bound to one port", f"name the port, or {AS_ROOT}")
    if given.port < first_port:
        raise RuleError(
            f"{what}: ports below {first_port} are the system's",
            f"sysctl -w net.ipv4.ip_unprivileged_port_start={given.port}, or {AS_ROOT}",
        )
    for output in rule.outputs:
        _check_output(output, own)


def _check_output(output: Output, own: Collection[str] | None) -> None:
    what = f"output '{output}' is not possible with --rootless"
    if output.source == "keep":
        raise RuleError(
            f"{what}: another host's source takes a packet socket",
            f"leave out source=keep, or {AS_ROOT}",
        )
    if output.source_port is not None:
        raise RuleError(
            f"{what}: a source port that is given takes a packet socket",
            f"leave out sport={output.source_port}, or {AS_ROOT}",
        )
    if output.source is not None and own is not None and str(output.source) not in own:
        raise RuleError(
            f"{what}: {output.source} is no address of this host", f"use one of 'ip -brief address', or {AS_ROOT}"
        )


def buffer_remark(wanted: int, allowed: int) -> str | None:
    """What to say of the size of receive buffers, if they are smaller than they should be."""
    if allowed >= wanted:
        return None
    return (
        f"receive buffers are limited to {allowed} bytes (net.core.rmem_max), so that bursts may be lost; "
        f"as root, raise it: sysctl -w net.core.rmem_max={wanted}"
    )


REMARK: Final = (
    "without privilege: packets whose source this host has no route back to stay out where net.ipv4.conf.*.rp_filter "
    "says so, as does what the firewall drops; docs/rootless.md has the rest"
)


def reverse_path_remark(interface: str, strictness: int) -> str | None:
    """What to say of an interface on which rp_filter is 1 (strict) or 2 (loose)."""
    if strictness not in (1, 2):
        return None
    condition = "by this interface" if strictness == 1 else "at all"
    return (
        f"{interface}: the kernel drops packets whose source it has no route to {condition} "
        f"(net.ipv4.conf.{interface}.rp_filter or .all is {strictness}); switch that off or run mcrelay as root"
    )

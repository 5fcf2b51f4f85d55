"""What to send and what to wait for: one list of options, and the command line made from it.

`SendPlan` and `ReceivePlan` are the only place where an option has a name, a type, a default and a
description. The argument parser is built from their fields, and `arguments` turns a plan back into the
command line that stands for it, so that a plan reaches a process in another namespace as readable text.
Option `idle_timeout_s` is the flag `--idle-timeout`.
"""

from __future__ import annotations

import argparse
import ipaddress
import socket
import types
import typing
from dataclasses import dataclass, field, fields
from typing import Any

from lab.sequence import FLOWS_MAX, SIZE_MAX, SIZE_MIN


@dataclass(frozen=True)
class Target:
    """ADDRESS:PORT, an IPv6 address in brackets."""

    address: ipaddress.IPv4Address | ipaddress.IPv6Address
    port: int

    @classmethod
    def parse(cls, text: str) -> Target:
        host, colon, port = text.rpartition(":")
        if not colon or not port.isdecimal() or not 1 <= int(port) <= 65535:
            raise ValueError(f"{text!r} is not ADDRESS:PORT")
        if host.startswith("[") and host.endswith("]"):
            return cls(ipaddress.IPv6Address(host[1:-1]), int(port))
        return cls(ipaddress.IPv4Address(host), int(port))

    @property
    def family(self) -> int:
        return socket.AF_INET if self.address.version == 4 else socket.AF_INET6

    @property
    def socket_address(self) -> tuple[str, int]:
        return str(self.address), self.port

    def flow(self, number: int, step: str) -> Target:
        """The target of flow `number`: that many ports, or groups, further."""
        if step == "group":
            return Target(self.address + number, self.port)
        if self.port + number > 65535:
            raise ValueError(f"{number + 1} consecutive ports do not fit above {self.port}")
        return Target(self.address, self.port + number)


def _option(default: Any, text: str) -> Any:
    return field(default=default, kw_only=True, metadata={"help": text})


@dataclass(frozen=True)
class Plan:
    """What sender and receiver have in common."""

    target: str
    interface: str | None = _option(None, "send from, or join on, this interface")
    flows: int = _option(1, "number of flows, round robin")
    flow_step: str = _option("port", "flows differ in their 'port' or 'group', counting up from the target's")
    core: int | None = _option(None, "run on this core only")
    progress: bool = _option(False, "print a JSON line every 0.5 s")

    def __post_init__(self) -> None:
        if not 1 <= self.flows <= FLOWS_MAX:
            raise ValueError(f"flows must be 1 to {FLOWS_MAX}")
        if self.flow_step not in ("port", "group"):
            raise ValueError("flow_step must be 'port' or 'group'")
        _ = self.targets  # refuses a malformed target now, not in the process that gets the plan

    @property
    def targets(self) -> list[Target]:
        first = Target.parse(self.target)
        return [first.flow(number, self.flow_step) for number in range(self.flows)]


@dataclass(frozen=True)
class SendPlan(Plan):
    """What to send. Ends after `count` datagrams or `duration_s`, whichever is first; one is required."""

    rate: float = _option(1000.0, "datagrams/s over all flows; 0: as fast as possible")
    count: int | None = _option(None, "datagrams over all flows")
    duration_s: float | None = _option(None, "seconds to send for")
    size: int = _option(1000, f"bytes of payload, {SIZE_MIN} to {SIZE_MAX}")
    ttl: int = _option(8, "time to live, hop limit")
    interface_address: str | None = _option(None, "send from this address (and its interface)")
    flow_id: int = _option(0, "id of the first flow; senders to one receiver need different ones")
    burst_interval_s: float = _option(0.0005, "least time between two wake-ups of the pacing")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.count is None and self.duration_s is None:
            raise ValueError("a count or a duration is needed")
        if not SIZE_MIN <= self.size <= SIZE_MAX:
            raise ValueError(f"size must be {SIZE_MIN} to {SIZE_MAX}")
        if self.rate < 0:
            raise ValueError("rate must not be negative")


@dataclass(frozen=True)
class ReceivePlan(Plan):
    """What to wait for. Ends with `count` distinct datagrams, a pause after the first, or the deadline."""

    count: int | None = _option(None, "end after this many distinct datagrams")
    expect: int | None = _option(None, "datagrams sent, for the loss; default: count, else highest seen")
    idle_timeout_s: float = _option(1.0, "end when nothing came for so long after the first datagram")
    linger_s: float = _option(0.0, "stay so long after the count is reached, to see late duplicates")
    deadline_s: float = _option(60.0, "end after so long in any case")


def _flag(name: str) -> str:
    return "--" + name.removesuffix("_s").replace("_", "-")


def arguments(plan: Plan) -> list[str]:
    """The command line that stands for `plan`."""
    argv = ["send" if isinstance(plan, SendPlan) else "receive", plan.target]
    for option in fields(plan):
        value = getattr(plan, option.name)
        if option.name == "target" or value == option.default:
            continue
        argv += [_flag(option.name)] if value is True else [_flag(option.name), str(value)]
    return argv


def plan_from(argv: list[str]) -> SendPlan | ReceivePlan:
    """The plan that a command line stands for; exits with 2 and a usage message when it stands for none."""
    parser = argparse.ArgumentParser(prog="python -m lab.traffic", description="Sequence-numbered traffic.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, plan_type in (("send", SendPlan), ("receive", ReceivePlan)):
        verb_parser = verbs.add_parser(verb, description=(plan_type.__doc__ or "").splitlines()[0])
        verb_parser.set_defaults(plan_type=plan_type)
        verb_parser.add_argument("target", metavar="ADDRESS:PORT")
        hints = typing.get_type_hints(plan_type)
        for option in fields(plan_type):
            if option.name == "target":
                continue
            kind = hints[option.name]
            if isinstance(kind, types.UnionType):  # "int | None": the flag takes an int, its absence is None
                kind = next(part for part in typing.get_args(kind) if part is not type(None))
            how: dict[str, Any] = {"action": "store_true"} if kind is bool else {"type": kind}
            how |= {"dest": option.name, "default": option.default, "help": option.metadata["help"]}
            verb_parser.add_argument(_flag(option.name), **how)
    options = vars(parser.parse_args(argv))
    plan_type = options.pop("plan_type")
    del options["verb"]
    try:
        plan: SendPlan | ReceivePlan = plan_type(**options)
    except ValueError as error:
        parser.error(str(error))
    return plan

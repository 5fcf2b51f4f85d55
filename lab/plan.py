"""What to send and what to wait for, as the command line of `mcrelay send` and `mcrelay receive`.

The defaults are those of a test: it ends by itself. `mcrelay` checks what it is given; nothing is checked here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class _Options:
    """What sender and receiver have in common."""

    interface: str | None = None  # to send from, or join on
    flows: int = 1  # round robin
    flow_step: str = "port"  # flows differ in their 'port' or 'group', counting up from the target's
    rtp: bool = False
    core: int | None = None  # to run on
    progress: bool = False  # twice a second


@dataclass(frozen=True)
class Plan(_Options):
    target: str  # ADDRESS:PORT, an IPv6 address in brackets


@dataclass(frozen=True)
class SendPlan(Plan):
    """Ends after `count` datagrams or `duration_s`, whichever is first, else when stopped."""

    rate: float = 1000.0  # datagrams/s over all flows; 0: as fast as possible
    count: int | None = None  # datagrams over all flows
    duration_s: float | None = None
    size: int = 1000  # bytes of payload
    ttl: int = 8
    source: str | None = None  # address to send from
    flow_id: int = 0  # of the first flow; senders to one receiver need different ones
    # Most datagrams in one send. One, since a veth would carry several as one frame, and a wire does not.
    segments: int | None = 1


@dataclass(frozen=True)
class ReceivePlan(Plan):
    """Ends with `count` distinct datagrams, a pause after the first, or the deadline."""

    count: int | None = None
    expect: int | None = None  # datagrams sent, for the loss; default: count, else highest seen
    # End when nothing came for so long after the first datagram; by default 5 s with `count`, which is an end without a
    # pause, and 1 s without.
    idle_timeout_s: float | None = None
    linger_s: float = 0.0  # stay so long after the count is reached, to see late duplicates
    deadline_s: float = 60.0  # end after so long in any case


FLAGS = {"duration_s": "--duration", "idle_timeout_s": "--idle", "linger_s": "--linger", "deadline_s": "--duration"}


def arguments(plan: Plan) -> list[str]:
    """The command line that stands for `plan`, less the program."""
    options = dict(vars(plan))
    if isinstance(plan, ReceivePlan) and plan.idle_timeout_s is None:
        options["idle_timeout_s"] = 1.0 if plan.count is None else 5.0
    target, interface = options.pop("target"), options.pop("interface")
    argv = ["send" if isinstance(plan, SendPlan) else "receive", f"{target}%{interface}" if interface else target]
    for name, value in options.items():
        flag = FLAGS.get(name, "--" + name.replace("_", "-"))
        if value is True:
            argv.append(flag)
        elif value is not None and value is not False:
            argv += [flag, str(value)]
    return argv

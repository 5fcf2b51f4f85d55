"""The relays that are measured: how each is installed, started with rules, changed, and ended.

One class each. A relay runs in the relay namespace of a bench.network.Network, on RELAY_CORE where it has a process
that touches packets. Knows nothing of traffic or measurements.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final, Self

from bench.network import GROUP, INGRESS, INGRESS_ADDRESS, PORT, RELAY_CORE, SOURCE, TTL, Network
from lab.daemon import Daemon
from lab.namespaces import end_processes, wait_until
from mcrelay.client import Client

MAXVIFS: Final = 32  # <linux/mroute.h>: interfaces that the kernel's multicast forwarding can use
READY_S: Final = 30.0


class Unsuitable(Exception):
    """This relay cannot do what is asked for; the text says why."""


@dataclass(frozen=True)
class Rule:
    """One group, sent on unchanged through the first `outputs` of the network's egress interfaces."""

    group: str = GROUP
    outputs: int = 1


def rules(count: int, outputs: int = 1) -> list[Rule]:
    """Of consecutive groups, as the flows of `mcrelay send --flow-step group`."""
    return [Rule(str(IPv4Address(GROUP) + number), outputs) for number in range(count)]


class Relay:
    """A context manager: running inside it with the rules it was made for, gone behind it."""

    name = ""
    needs: tuple[str, ...] = ()  # programs
    changes = False  # whether rules can be added and removed while it runs
    runs = False  # whether it sends runs of datagrams in one call, so that segmentation matters
    slow = False  # left out of what takes a fast one
    special = False  # measured only in settings that name it

    def __init__(self, network: Network, rules: Sequence[Rule]) -> None:
        self.network = network
        self.rules = rules
        self.stack = ExitStack()
        self.processes: list[subprocess.Popen[str]] = []

    @classmethod
    def missing(cls) -> str | None:
        """Why it cannot be measured here."""
        missing = [program for program in cls.needs if shutil.which(program) is None]
        return f"{' and '.join(missing)} not installed" if missing else None

    def __enter__(self) -> Self:
        with ExitStack() as undo:
            undo.push(self.stack)
            self.directory = Path(self.stack.enter_context(tempfile.TemporaryDirectory(prefix="mcrelay-bench-")))
            self.stack.callback(self._end)
            self.start()
            undo.pop_all()
        return self

    def __exit__(self, *_error: object) -> None:
        self.stack.close()

    def start(self) -> None:
        raise NotImplementedError

    def pids(self) -> dict[str, int]:
        return {f"{self.name}/{number}": process.pid for number, process in enumerate(self.processes)}

    def worker_pids(self) -> list[int]:
        """Of those that touch packets."""
        return list(self.pids().values())

    def add(self, rule: Rule) -> None:
        raise NotImplementedError

    def remove(self, rule: Rule) -> None:
        raise NotImplementedError

    def spawn(self, *argv: str) -> subprocess.Popen[str]:
        """A process on the relay's core."""
        process = self.network.relay.popen(
            *("taskset", "--cpu-list", str(RELAY_CORE), *argv), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.processes.append(process)
        return process

    def _end(self) -> None:
        end_processes(self.processes)


class NoRelay(Relay):
    """Nothing forwards: what generator and network cost by themselves."""

    name = "none"

    def start(self) -> None:
        pass


class Mcrelay(Relay):
    name = "mcrelay"
    changes = True
    runs = True
    options: tuple[str, ...] = ()

    def start(self) -> None:
        daemon = Daemon(self.network.relay, "--cores", str(RELAY_CORE), *self.options)
        self.daemon = self.stack.enter_context(daemon)
        self.client: Client = self.stack.enter_context(daemon.client())
        if self.rules:
            self.apply(self.rules)

    def pids(self) -> dict[str, int]:
        return self.daemon.pids()

    def worker_pids(self) -> list[int]:
        return [pid for name, pid in self.pids().items() if name.startswith("data/")]

    def apply(self, rules: Sequence[Rule]) -> None:
        """All in one step."""
        self.client.change(add=[(*self._text(rule), rule.group) for rule in rules])

    def clear(self) -> None:
        self.client.change(remove=[fact.id for fact in self.client.rules()])

    def add(self, rule: Rule) -> None:
        self.client.add(*self._text(rule), name=rule.group)

    def remove(self, rule: Rule) -> None:
        self.client.remove(rule.group)

    def _text(self, rule: Rule) -> tuple[str, list[str]]:
        outputs = [f"{rule.group}:{PORT}%{egress}" for egress in self.network.egresses[: rule.outputs]]
        return f"{rule.group}:{PORT}%{INGRESS}", outputs


class McrelayNoBudget(Mcrelay):
    name = "mcrelay-budget-0"
    options = ("--latency-budget-us", "0")


class McrelayBudget20(Mcrelay):
    name = "mcrelay-budget-20"
    options = ("--latency-budget-us", "20")


class McrelayBudget200(Mcrelay):
    name = "mcrelay-budget-200"
    options = ("--latency-budget-us", "200")


class McrelayBusyPoll(Mcrelay):
    name = "mcrelay-busy-poll"
    options = ("--busy-poll",)


class McrelayRecv(Mcrelay):
    name = "mcrelay-recv"
    options = ("--ingress", "recv")


class McrelayReference(Mcrelay):
    name = "mcrelay-reference"
    options = ("--engine", "reference")
    runs = False
    slow = True


class McrelayBefore(Mcrelay):
    """Another version's program, by --before. It may speak another protocol: its own commands ask its daemon."""

    name = "mcrelay-before"
    special = True
    program: str | None = None

    @classmethod
    def missing(cls) -> str | None:
        return super().missing() or (None if cls.program else "no program: --before PATH")

    def start(self) -> None:
        assert self.program
        daemon = Daemon(self.network.relay, "--cores", str(RELAY_CORE), program=[self.program])
        self.daemon = self.stack.enter_context(daemon)
        self.apply(self.rules)

    def apply(self, rules: Sequence[Rule]) -> None:
        for rule in rules:
            given, outputs = self._text(rule)
            self._ask("add", given, *outputs, "--name", rule.group)

    def pids(self) -> dict[str, int]:
        processes = json.loads(self._ask("workers", "--json"))["processes"]
        return {f"{one['role']}/{one['index']}": one["pid"] for one in processes if one["pid"] is not None}

    def _ask(self, *arguments: str) -> str:
        assert self.program
        command = [self.program, *arguments, "--socket", self.daemon.socket]
        return subprocess.run(command, capture_output=True, text=True, timeout=READY_S, check=True).stdout


class McrelaySourceKept(Mcrelay):
    """The copies have the packets' source address and port."""

    name = "mcrelay-source-keep"
    special = True

    def _text(self, rule: Rule) -> tuple[str, list[str]]:
        given, outputs = super()._text(rule)
        return given, [f"{output},source=keep" for output in outputs]


class McrelayUnicast(Mcrelay):
    """To hosts."""

    name = "mcrelay-unicast"
    special = True

    def _text(self, rule: Rule) -> tuple[str, list[str]]:
        given, outputs = super()._text(rule)
        hosts = [f"10.{number + 1}.0.2" for number in range(len(outputs))]
        return given, [f"{host}:{output.rpartition(':')[2]}" for host, output in zip(hosts, outputs, strict=True)]


class McrelaySourceKeptUnicast(McrelayUnicast):
    name = "mcrelay-unicast-source-keep"

    def _text(self, rule: Rule) -> tuple[str, list[str]]:
        given, outputs = super()._text(rule)
        return given, [f"{output},source=keep" for output in outputs]


class McrelayPrefix(Mcrelay):
    """A rule for a prefix and any port, and many exact rules beside it that take nothing of the traffic."""

    name = "mcrelay-prefix"
    special = True
    beside = 10_000

    def apply(self, rules: Sequence[Rule]) -> None:
        network = f"{GROUP.rpartition('.')[0].rpartition('.')[0]}.0.0/16"
        follow = [f"=:=%{egress}" for egress in self.network.egresses[: rules[0].outputs]]
        first = IPv4Address("239.128.0.0")
        exact = [(f"{first + n}:{PORT}%{INGRESS}", [f"{first + n}:{PORT}%out0"], None) for n in range(self.beside)]
        self.client.change(add=[*exact, (f"{network}:*%{INGRESS}", follow, None)])


class Kernel(Relay):
    """Multicast forwarding by the kernel, its routes set by smcroute."""

    name = "kernel"
    needs = ("smcrouted", "smcroutectl")
    changes = True

    def start(self) -> None:
        if self.network.outputs + 1 >= MAXVIFS:
            raise Unsuitable(f"the kernel forwards between at most {MAXVIFS} interfaces")
        self.network.relay.sysctl("net.ipv4.ip_forward", 1)
        self.stack.callback(self.network.relay.sysctl, "net.ipv4.ip_forward", 0)
        configuration = self.directory / "smcroute.conf"
        configuration.write_text("".join(f"mroute from {self._route(rule)}\n" for rule in self.rules))
        self._socket = str(self.directory / "smcroute.sock")
        self.spawn(
            *("smcrouted", "-n", "-f", str(configuration), "-u", self._socket, "-P", str(self.directory / "pid"))
        )
        wait_until(lambda: self._routes() == len(self.rules), READY_S, "smcroute did not set all routes")

    def add(self, rule: Rule) -> None:
        self._control("add", *self._route(rule, keywords=False).split())

    def remove(self, rule: Rule) -> None:
        self._control("remove", *self._route(rule, keywords=False).split())

    def _routes(self) -> int:
        if not Path(self._socket).exists():
            return -1
        return len(self.network.relay.call(Path("/proc/thread-self/net/ip_mr_cache").read_text).splitlines()) - 1

    def _route(self, rule: Rule, *, keywords: bool = True) -> str:
        egresses = " ".join(self.network.egresses[: rule.outputs])
        if keywords:
            return f"{INGRESS} source {SOURCE} group {rule.group} to {egresses}"
        return f"{INGRESS} {SOURCE} {rule.group} {egresses}"

    def _control(self, *arguments: str) -> None:
        subprocess.run(["smcroutectl", "-u", self._socket, *arguments], check=True, capture_output=True)


class Socat(Relay):
    name = "socat"
    needs = ("socat",)

    def start(self) -> None:
        if len(self.rules) != 1 or self.rules[0].outputs != 1:
            raise Unsuitable("one socat relays one group to one output")
        group = self.rules[0].group
        self.spawn(
            *("socat", "-u", f"UDP4-RECV:{PORT},bind={group},ip-add-membership={group}:{INGRESS}"),
            f"UDP4-DATAGRAM:{group}:{PORT},ip-multicast-if={self.network.egress_address(0)},"
            f"ip-multicast-ttl={TTL - 1},ip-multicast-loop=0",
        )
        wait_until(self._bound, READY_S, "socat does not listen")

    def _bound(self) -> bool:
        return f":{PORT:04X} " in self.network.relay.call(Path("/proc/thread-self/net/udp").read_text)


class Mcr(Relay):
    """github.com/acooks/mcr"""

    name = "mcr"
    needs = ("mcrd", "mcrctl")
    changes = False

    def start(self) -> None:
        self._socket = str(self.directory / "mcrd.sock")
        self.spawn("mcrd", "supervisor", "--control-socket-path", self._socket, "--num-workers", "1")
        wait_until(lambda: Path(self._socket).exists(), READY_S, "mcrd did not make its socket")
        for rule in self.rules:
            self.add(rule)

    def add(self, rule: Rule) -> None:
        outputs = ",".join(f"{rule.group}:{PORT}:{egress}" for egress in self.network.egresses[: rule.outputs])
        arguments = ["--input-interface", INGRESS, "--input-group", rule.group, "--input-port", str(PORT)]
        command = ["mcrctl", "--socket", self._socket, "add", *arguments, "--outputs", outputs]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=READY_S)
        if done.returncode:
            raise Unsuitable(f"mcrctl refuses the rule: {done.stderr.strip() or done.stdout.strip()}")


class UdpBroadcastRelay(Relay):
    """github.com/udp-redux/udp-broadcast-relay-redux"""

    name = "udp-broadcast-relay"
    needs = ("udp-broadcast-relay-redux",)

    def start(self) -> None:
        if len(self.rules) != 1:
            raise Unsuitable("one process relays one group")
        devices = [INGRESS, *self.network.egresses[: self.rules[0].outputs]]
        arguments = [word for device in devices for word in ("--dev", device)]
        self.spawn(
            *("udp-broadcast-relay-redux", "--id", "1", "--port", str(PORT)),
            *("--multicast", self.rules[0].group, *arguments),
        )
        wait_until(self._bound, READY_S, "udp-broadcast-relay-redux does not listen")

    def _bound(self) -> bool:
        return f":{PORT:04X} " in self.network.relay.call(Path("/proc/thread-self/net/udp").read_text)


RELAYS: Final[dict[str, type[Relay]]] = {
    relay.name: relay
    for relay in (
        Mcrelay,
        McrelayNoBudget,
        McrelayBudget20,
        McrelayBudget200,
        McrelayBusyPoll,
        McrelayRecv,
        McrelayReference,
        McrelayBefore,
        McrelaySourceKept,
        McrelayUnicast,
        McrelaySourceKeptUnicast,
        McrelayPrefix,
        Kernel,
        Socat,
        Mcr,
        UdpBroadcastRelay,
    )
}

assert INGRESS_ADDRESS.rpartition(".")[0] == SOURCE.rpartition(".")[0]  # or the kernel's check of the source fails

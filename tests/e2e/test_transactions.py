"""Random changes of the rules, with a model alongside: after each, what is listed and what is forwarded is exactly what
the model says, and a flow that no change is about loses nothing.

                                   +-- out0 --- receiver
    sender 203.0.113.10 --- in0 relay
                                   +-- out1 --- receiver1

    MCRELAY_TRANSACTIONS=1000 MCRELAY_SEED=7    how many, and which; `make soak` takes 1,000 and any seed
"""

from __future__ import annotations

import os
import random
import select
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import pytest

from lab.daemon import Daemon, settled
from lab.namespaces import Namespace, wait_until
from lab.plan import ReceivePlan, SendPlan
from lab.topology import RelayLine
from lab.traffic import start_receiver, start_sender
from mcrelay.client import Client
from mcrelay.errors import Error

TRANSACTIONS: Final = int(os.environ.get("MCRELAY_TRANSACTIONS", "60"))
SEED: Final = int(os.environ.get("MCRELAY_SEED", "1"))

INPUTS: Final = tuple(f"239.1.1.{group}:{port}%in0" for group in range(1, 6) for port in (5000, 5001))
OUTPUTS: Final = tuple(
    f"239.101.0.{group}:{port}%{interface}"
    for group in range(1, 4)
    for port in (6000, 6001)
    for interface in ("out0", "out1")
)
NAMES: Final = ("alpha", "beta", "gamma", "delta")
STEADY: Final = ("239.1.9.9:5000", "239.109.9.9:6000")  # the flow that no change is about
PROBE: Final = struct.Struct("!II")  # transaction, input

Text = tuple[str, list[str], str | None]


@dataclass(frozen=True)
class Change:
    """What is asked for, and a word of the refusal if it has to be refused."""

    add: Sequence[Text]
    remove: Sequence[str]
    expect: int | None = None
    refusal: str | None = None


@dataclass
class Model:
    """What the rules have to be: by input, their name and outputs; and the ids that the daemon has given them."""

    rules: dict[str, tuple[str | None, tuple[str, ...]]] = field(default_factory=dict)
    ids: dict[str, str] = field(default_factory=dict)
    generation: int = 0

    def commit(self, change: Change) -> None:
        names = {name: input for input, (name, _outputs) in self.rules.items() if name}
        inputs = {rule_id: input for input, rule_id in self.ids.items()}
        for label in change.remove:
            del self.rules[names[label] if label in names else inputs[label]]
        for input, outputs, name in change.add:
            self.rules[input] = (name, tuple(outputs))
        self.generation += 1

    def label(self, input: str, rng: random.Random) -> str:
        name = self.rules[input][0]
        return name if name and rng.random() < 0.5 else self.ids[input]


def invent(rng: random.Random, model: Model) -> Change:
    """A change that is right, or one that is so but for one thing."""
    least = int(len(model.rules) == len(INPUTS))  # a change is of something
    removed = rng.sample(sorted(model.rules), rng.randint(least, max(least, min(2, len(model.rules)))))
    kept = [input for input in model.rules if input not in removed]
    free = [input for input in INPUTS if input not in kept]  # some of which are those that go
    free_names = [name for name in NAMES if name not in {model.rules[input][0] for input in kept}]
    add: list[Text] = []
    for input in rng.sample(free, rng.randint(0 if removed else 1, min(3, len(free)))):
        name = free_names.pop(rng.randrange(len(free_names))) if free_names and rng.random() < 0.5 else None
        add.append((input, rng.sample(OUTPUTS, rng.randint(1, 3)), name))
    remove = [model.label(input, rng) for input in removed]
    expect = model.generation if rng.random() < 0.3 else None
    right = Change(add, remove, expect)
    if rng.random() < 0.6:
        return right
    wrongs = [
        Change([*add, ("239.1.2.1:5000%in0", ["nonsense"], None)], remove, expect, "nonsense"),
        Change([*add, ("239.1.2.1:5000%in0", [OUTPUTS[0]] * 2, None)], remove, expect, "twice"),
        Change([*add, ("239.1.2.1:5000%in0", [OUTPUTS[0]], "no name")], remove, expect, "no name"),
        Change(add, [*remove, "nobody"], expect, "nobody"),
        Change(add, [*remove, "0123456789ab"], expect, "0123456789ab"),
    ]
    if model.generation:
        wrongs.append(Change(add, remove, rng.randrange(model.generation), "rules have changed"))
    if add:
        wrongs.append(Change([*add, (add[0][0], [OUTPUTS[0]], None)], remove, expect, "already belongs"))
    if kept:
        taken = rng.choice(kept)
        wrongs.append(Change([*add, (taken, [OUTPUTS[0]], None)], remove, expect, "already belongs"))
        if name := model.rules[taken][0]:
            wrongs.append(Change([*add, ("239.1.2.1:5000%in0", [OUTPUTS[0]], name)], remove, expect, name))
    return rng.choice(wrongs)


class Probes:
    """One datagram to every input, and what came out of it where. Each says which transaction it belongs to, so that
    one that is forwarded by mistake is found even if it comes late."""

    def __init__(self, line: RelayLine) -> None:
        self._sender = line.sender.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._poll = select.poll()
        self._outputs: dict[int, tuple[str, socket.socket]] = {}
        self._came: Counter[tuple[int, int, str]] = Counter()  # transaction, input, output
        self._expected: set[tuple[int, int, str]] = set()
        for output in OUTPUTS:
            target, interface = output.split("%")
            opened = _member(line.receivers[int(interface.removeprefix("out"))], target)
            self._outputs[opened.fileno()] = output, opened
            self._poll.register(opened, select.POLLIN)

    def check(self, transaction: int, model: Model) -> None:
        """What the model says comes out; nothing has come out that it did not say."""
        wanted = {
            (transaction, INPUTS.index(input), output)
            for input, (_name, outputs) in model.rules.items()
            for output in outputs
        }
        self._expected |= wanted
        for number, input in enumerate(INPUTS):
            address, _, port = input.split("%")[0].partition(":")
            self._sender.sendto(PROBE.pack(transaction, number), (address, int(port)))
        wait_until(lambda: self.read() >= wanted, 5, f"of {sorted(wanted)} some do not come out")
        self.check_nothing_else()

    def check_nothing_else(self) -> None:
        unexpected = set(self.read()) - self._expected
        assert not unexpected, f"came out by mistake: {sorted(unexpected)}"
        assert max(self._came.values(), default=1) == 1, "something came out twice"

    def read(self) -> set[tuple[int, int, str]]:
        while ready := self._poll.poll(0):
            for descriptor, _event in ready:
                output, opened = self._outputs[descriptor]
                transaction, number = PROBE.unpack(opened.recv(1 << 16))
                self._came[transaction, number, output] += 1
        return set(self._came)

    def close(self) -> None:
        self._sender.close()
        for _output, opened in self._outputs.values():
            opened.close()


def _member(namespace: Namespace, target: str) -> socket.socket:
    """A socket that hears this group at this port, and no other."""
    group, _, port = target.partition(":")
    opened = namespace.socket(socket.AF_INET, socket.SOCK_DGRAM)
    opened.bind((group, int(port)))
    request = struct.pack("4s4si", socket.inet_aton(group), bytes(4), namespace.ifindex("eth0"))
    opened.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, request)
    return opened


@pytest.fixture
def probes(line: RelayLine) -> Iterator[Probes]:
    made = Probes(line)
    yield made
    made.close()


def apply(client: Client, change: Change, rng: random.Random) -> None:
    """As one change, or as the request of its own that a single rule has."""
    if len(change.add) == 1 and not change.remove and change.expect is None and rng.random() < 0.5:
        input, outputs, name = change.add[0]
        client.add(input, outputs, name)
    elif len(change.remove) == 1 and not change.add and change.expect is None and rng.random() < 0.5:
        client.remove(change.remove[0])
    else:
        client.change(change.add, change.remove, expect=change.expect)


def test_random_transactions_do_what_a_model_says(daemon: Daemon, line: RelayLine, probes: Probes) -> None:
    print(f"seed {SEED}, {TRANSACTIONS} transactions: MCRELAY_SEED={SEED} MCRELAY_TRANSACTIONS={TRANSACTIONS}")
    rng = random.Random(SEED)
    model, refused = Model(), 0
    with daemon.client() as client:
        client.add(f"{STEADY[0]}%in0", [f"{STEADY[1]}%out1"], "steady")
        steady = client.rules()[0].id
        model.generation = 1
        receiver = start_receiver(
            line.receivers[1], ReceivePlan(STEADY[1], interface="eth0", idle_timeout_s=3, deadline_s=600)
        )
        sender = start_sender(line.sender, SendPlan(STEADY[0], interface="eth0", rate=4000, duration_s=500, size=200))
        for transaction in range(TRANSACTIONS):
            change = invent(rng, model)
            print(f"{transaction}: {change}")
            if change.refusal:
                with pytest.raises(Error, match=change.refusal):
                    apply(client, change, rng)
                refused += 1
            else:
                apply(client, change, rng)
                model.commit(change)
            listing = client.listing()
            assert listing.generation == model.generation
            found = {rule.input: (rule.name, rule.outputs) for rule in listing.rules if rule.id != steady}
            assert found == model.rules
            model.ids = {rule.input: rule.id for rule in listing.rules if rule.id != steady}
            probes.check(transaction, model)
        sent = sender.stop().sent
        report = receiver.result()
        assert (report.received, report.lost, report.duplicated, report.reordered) == (sent, 0, 0, 0)
        totals = settled(client)
    assert set(totals["dropped"]) <= {"no_rule"}  # probes of rules that went, where nothing filters them before
    probes.check_nothing_else()
    assert 0 < refused < TRANSACTIONS


def test_a_change_of_rules_that_are_no_longer_so_is_refused(daemon: Daemon) -> None:
    with daemon.client() as one, daemon.client() as other:
        seen = one.listing().generation
        other.add(INPUTS[0], [OUTPUTS[0]], "theirs")
        with pytest.raises(Error, match=f"generation {seen} was expected, {seen + 1} is active") as refused:
            one.change([(INPUTS[1], [OUTPUTS[0]], None)], expect=seen)
        assert (refused.value.code, refused.value.exit_code) == ("conflict", 75)
        assert "list" in refused.value.hint
        assert [rule.name for rule in one.rules()] == ["theirs"]
        changed = one.change([(INPUTS[1], [OUTPUTS[0]], "ours")], ["theirs"], expect=seen + 1)
        assert changed.generation == seen + 2
        assert one.change([], ["ours"]).generation == seen + 3  # whoever does not ask is not refused


def test_of_those_who_expect_the_same_one_at_a_time_succeeds(daemon: Daemon) -> None:
    """All ask at once, over and over: each generation is followed by one change alone, and none is lost."""
    clients, wins = 4, 8
    start = threading.Barrier(clients)
    won: list[int] = []
    failures: list[BaseException] = []

    def compete(number: int) -> None:
        try:
            with daemon.client() as client:
                start.wait(10)
                for win in range(wins):
                    text = (f"239.3.{number}.{win}:5000%in0", [OUTPUTS[0]], None)
                    while True:
                        expect = client.listing().generation
                        try:
                            changed = client.change([text], expect=expect)
                        except Error as error:
                            if error.code != "conflict":
                                raise
                            continue
                        assert changed.generation == expect + 1
                        won.append(changed.generation)
                        break
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=compete, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not failures
    assert sorted(won) == list(range(1, clients * wins + 1))
    assert len(daemon.json("list")["rules"]) == clients * wins

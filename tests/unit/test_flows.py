"""What the counters of a rule tell, from look to look."""

from __future__ import annotations

from mcrelay.flows import Change, Flows, Look
from mcrelay.settings import EventsSection

SETTINGS = EventsSection(silent_s=3, stopped_s=10, loss_percent=5)


class Rule:
    """One that is looked at once a second."""

    def __init__(self, packets: int = 0, *, known: bool = True) -> None:
        self.flows = Flows(SETTINGS)
        self.packets, self.dropped, self.now_s = packets, 0, 100.0
        if known:
            self.flows.begin(Look("r", packets, 0, False), self.now_s)

    def see(self, came: int = 0, dropped: int = 0, *, suspended: bool = False) -> list[Change]:
        self.now_s += 1
        self.packets += came
        self.dropped += dropped
        return list(self.flows.see(Look("r", self.packets, self.dropped, suspended), self.now_s))

    def kinds(self, *came: int) -> list[list[str]]:
        return [[change.kind for change in self.see(n)] for n in came]


def test_a_flow_starts_falls_silent_and_stops() -> None:
    rule = Rule()
    assert rule.kinds(0, 5, 5) == [[], ["flow_started"], []]
    assert rule.kinds(0, 0, 0, 0) == [[], [], ["flow_silent"], []]
    (again,) = rule.see(7)
    assert (again.kind, again.values) == ("flow_started", {"packets": 7, "silent_s": 5.0})
    assert rule.kinds(*[0] * 12) == [[], [], ["flow_silent"], *[[]] * 6, ["flow_stopped"], [], []]
    assert rule.kinds(1) == [["flow_started"]]


def test_what_goes_on_when_one_begins_to_look_is_no_event() -> None:
    assert Rule(1000).kinds(5, 5) == [[], []]
    silent = Rule(1000)
    assert silent.kinds(0, 0, 0, 0) == [[], [], [], []]
    (started,) = silent.see(1)
    assert started.kind == "flow_started"


def test_a_rule_that_is_new_has_counted_from_zero() -> None:
    assert Rule(known=False).kinds(3) == [["flow_started"]]


def test_a_rule_that_is_another_counts_from_zero() -> None:
    rule = Rule()
    assert rule.kinds(1000) == [["flow_started"]]
    rule.packets = 0
    assert rule.kinds(0, 0, 0) == [[], [], ["flow_silent"]]
    rule.packets = 0
    assert rule.kinds(5) == [["flow_started"]]


def test_loss_begins_above_the_threshold_and_ends_below_it() -> None:
    rule = Rule()
    rule.see(100)
    assert rule.see(100, 4) == []
    (loss,) = rule.see(100, 5)
    assert (loss.kind, loss.values) == ("loss", {"dropped": 5, "percent": 5.0})
    assert "5 of 100 packets dropped (5.0 %)" in loss.text
    assert rule.see(100, 50) == []
    assert rule.see() == []  # nothing came: nobody knows
    (over,) = rule.see(100)
    assert over.kind == "loss_over"


def test_one_packet_in_a_handful_is_no_loss() -> None:
    rule = Rule()
    rule.see(1)
    assert rule.see(1, 1) == []


def test_a_suspension_begins_and_ends() -> None:
    rule = Rule()
    assert [change.kind for change in rule.see(suspended=True)] == ["rule_suspended"]
    assert rule.see(suspended=True) == []
    assert [change.kind for change in rule.see()] == ["rule_resumed"]


def test_a_rule_that_is_forgotten_begins_anew() -> None:
    rule = Rule()
    assert rule.kinds(1) == [["flow_started"]]
    rule.flows.forget(["r", "nobody"])
    assert rule.kinds(1) == [["flow_started"]]

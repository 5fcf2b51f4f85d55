"""The measurements. Each takes a Station, a relay that runs with its rules, and yields samples.

What a station has, which measurements share one, and in what order everything runs: bench.course.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from bench.network import Network
from bench.relays import Relay
from bench.samples import Parameters, Profile, Sample


@dataclass
class Station:
    """A relay in its network, running, and what the measurements have in common."""

    network: Network
    relay: Relay
    profile: Profile
    repetition: int
    flows: int = 1  # of the generator, one group each
    rules: int = 1  # of the relay
    runs: bool = True  # the generator may send several datagrams of a flow in one call
    known: dict[str, float] = field(default_factory=dict)  # what an earlier repetition found, to begin a search with
    progress: Callable[[str], None] = lambda _text: None

    @property
    def outputs(self) -> int:
        return self.network.outputs

    def sample(self, measurement: str, parameters: Parameters, figures: dict[str, float], *notes: str) -> Sample:
        sample = Sample(measurement, self.relay.name, self.repetition, parameters, figures, notes)
        shown = "  ".join(f"{name} {value:,.6g}" for name, value in figures.items())
        chosen = " ".join(f"{name}={value}" for name, value in parameters.items())
        self.progress(f"{measurement} {chosen}: {shown}{''.join(f' ({note})' for note in notes)}")
        return sample


Measurement = Callable[[Station], Iterator[Sample]]

"""Reassembly of engine `reference`: IPv6 packets put together from their fragments (RFC 8200, section 4.5).

The oracle of native/reassembly.c, whose header says which fragments are lost and why: what becomes of each one, and
when, is the same. Time is the caller's; so is the counting, of packets and of the fragments that none came of. Knows
nothing of sockets and rules.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, NamedTuple

WAITING_MAX: Final = 64  # incomplete packets
TIMEOUT_NS: Final = 2_000_000_000
HEADER: Final = 40
PAYLOAD_MAX: Final = 65535  # behind IPv6's own header
UNIT: Final = 8  # fragments begin at multiples of it, and end there but for the last


@dataclass(frozen=True, slots=True)
class Fragment:
    source: bytes
    destination: bytes
    identification: bytes
    header: bytes  # IPv6's own
    next: int  # kind of the header that the packet goes on with: the first fragment's counts
    before: int  # bytes of extension headers in front of the fragment's
    offset: int
    more: bool
    piece: bytes
    headless: bool  # the first one, but not with all headers

    @property
    def end(self) -> int:
        return self.offset + len(self.piece)

    @property
    def is_sound(self) -> bool:
        """Whether it may be part of a packet."""
        if not self.piece or self.headless or (self.more and len(self.piece) % UNIT):
            return False
        return self.before + self.end <= PAYLOAD_MAX


class Key(NamedTuple):
    source: bytes
    destination: bytes
    identification: bytes
    interface: int
    vlan: int


@dataclass(slots=True)
class Waiting:
    since_ns: int
    fragments: list[Fragment] = field(default_factory=list)
    is_spoilt: bool = False  # nothing of it is wanted any more

    @property
    def packet(self) -> bytes | None:
        """If it is complete."""
        ordered = sorted(self.fragments, key=lambda fragment: fragment.offset)
        body = b"".join(fragment.piece for fragment in ordered)
        first, last = ordered[0], ordered[-1]
        if first.offset or last.more or len(body) != last.end:
            return None
        head = first.header
        return head[:4] + len(body).to_bytes(2) + bytes((first.next,)) + head[7:] + body

    def contradicts(self, new: Fragment) -> bool:
        return any(_contradict(new, old) or _contradict(old, new) for old in self.fragments)


def _contradict(a: Fragment, b: Fragment) -> bool:
    """They overlap, or b reaches beyond a, which is the last."""
    return (a.offset < b.end and b.offset < a.end) or (not a.more and a.end < b.end)


class Reassembler:
    def __init__(self) -> None:
        self._waiting: dict[Key, Waiting] = {}  # the oldest first

    @property
    def waits(self) -> bool:
        return bool(self._waiting)

    def add(self, fragment: Fragment, interface: int, vlan: int, now_ns: int) -> tuple[bytes | None, int]:
        """The packet that is complete with this fragment, and how many fragments are lost now."""
        if not fragment.is_sound:
            return None, 1
        key = Key(fragment.source, fragment.destination, fragment.identification, interface, vlan)
        lost = 0
        waiting = self._waiting.get(key)
        if waiting is not None and now_ns - waiting.since_ns >= TIMEOUT_NS:
            lost += self._lose(key)
            waiting = None
        if waiting is None:
            if len(self._waiting) == WAITING_MAX:
                lost += self._lose(next(iter(self._waiting)))
            waiting = self._waiting[key] = Waiting(now_ns)
        if waiting.is_spoilt or any(_is_duplicate(fragment, other) for other in waiting.fragments):
            return None, lost + 1
        if waiting.contradicts(fragment):
            lost += len(waiting.fragments) + 1
            waiting.fragments.clear()
            waiting.is_spoilt = True
            return None, lost
        waiting.fragments.append(fragment)
        packet = waiting.packet
        if packet is None:
            return None, lost
        first = next(other for other in waiting.fragments if not other.offset)
        if first.before + len(packet) - HEADER > PAYLOAD_MAX:
            return None, lost + self._lose(key)
        del self._waiting[key]
        return packet, lost

    def expire(self, now_ns: int) -> int:
        """Lose what has waited for too long; how many fragments that were."""
        return sum(
            self._lose(key) for key, waiting in list(self._waiting.items()) if now_ns - waiting.since_ns >= TIMEOUT_NS
        )

    def forget(self, interface: int) -> int:
        """Lose what came by an interface; how many fragments that were."""
        return sum(self._lose(key) for key in list(self._waiting) if key.interface == interface)

    def _lose(self, key: Key) -> int:
        return len(self._waiting.pop(key).fragments)


def _is_duplicate(a: Fragment, b: Fragment) -> bool:
    return (a.offset, a.more, a.piece) == (b.offset, b.more, b.piece)

"""Fragments of IPv6, right and wrong, in any order: all engines make the same of them."""

from __future__ import annotations

import random

import pytest

from lab.topology import RelayLine
from tests.engines.bench import OUT0, OUT1, entry, leg
from tests.engines.packets import FRAGMENT, UDP, ethernet, fragment_header, ip_packet, option_header, udp
from tests.engines.test_differential import SENTINEL, compare

HOST6, GROUP6 = "2001:db8:a::10", "ff05::101"


def fragments_of(random: random.Random, identification: int) -> list[bytes]:
    """Frames with the fragments of one packet: mostly right, and some wrong in one way or two. What they become
    is no longer than the MTU."""
    body = bytearray(
        udp(
            HOST6,
            GROUP6,
            4000,
            random.choice([5000, 5000, 5001]),
            random.randbytes(random.choice([9, 100, 900, 1400])),
        )
    )
    room = random.choice([8, 16, 1000]) if len(body) < 200 else random.choice([104, 504, 1000])
    cuts = [(at, min(at + room, len(body))) for at in range(0, len(body), room)]
    pieces = [(at, bytes(body[at:end]), end < len(body)) for at, end in cuts]
    if random.random() < 0.5:
        random.shuffle(pieces)
    for _ in range(random.choice([0, 0, 0, 1, 2])):
        at, piece, more = random.choice(pieces)
        wrong = random.randrange(7)
        if wrong == 0:  # the same again
            more_of_it = (at, piece, more)
        elif wrong == 1:  # with other content
            more_of_it = (at, bytes((piece[0] ^ 1,)) + piece[1:], more)
        elif wrong == 2:  # shifted
            more_of_it = (at + 8, piece, more)
        elif wrong == 3:  # longer or shorter
            more_of_it = (at, piece[: random.choice([0, 3, 8])] or piece + bytes(8), more)
        elif wrong == 4:
            more_of_it = (at, piece, not more)
        elif wrong == 5:
            more_of_it = (65528, piece, more)
        else:
            pieces.remove((at, piece, more))
            if not pieces:
                break
            continue
        pieces.insert(random.randrange(len(pieces) + 1), more_of_it)
    before = random.choice([b"", b"", b"", option_header(FRAGMENT)])
    carried = random.choice([UDP] * 9 + [60])
    return [
        ethernet(
            ip_packet(
                *(HOST6, GROUP6, piece),
                protocol=60 if before else FRAGMENT,
                ttl=random.choice([1, 8, 64]),
                extensions=before + fragment_header(carried, at, identification, more=more),
            )
        )
        for at, piece, more in pieces
    ]


@pytest.mark.parametrize("seed", range(4))
def test_engines_agree_on_fragments(line: RelayLine, descriptors: None, seed: int) -> None:
    """Of some packets at a time, mixed; few enough that none has to give way to another's."""
    source = random.Random(seed)
    frames: list[bytes] = []
    for batch in range(10):
        packets = [fragments_of(source, batch * 100 + n) for n in range(5)]
        while any(packets):
            frames.append(source.choice([packet for packet in packets if packet]).pop(0))
    rules = [
        entry(GROUP6, 5000, [leg("239.2.2.1", 6000, OUT0), leg("239.2.2.2", 6001, OUT1, counter=1)]),
        entry(*SENTINEL, [leg("239.2.2.9", 9999, OUT0, counter=2)], counter=1),
    ]
    observed = compare(line, rules, frames)
    assert observed["totals"]["forwarded"] >= 10
    assert observed["dropped"]["fragment"] >= 20
    assert observed["dropped"]["no_rule"]

"""What decodes bytes from strangers, on damaged ones: the reader of frames, the codec of clients, the parser of rules.

Seeds are real requests. Damage is done to bytes and to the JSON that they are; a seed of the generator and the number
of rounds are all that a failure needs to be repeated:

    python tests/unit/test_damaged_frames.py SECONDS [SEED]    the longer run, of `make fuzz`
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable
from typing import Any, Final

import pytest

from mcrelay.api import Add, Change, GetStats, ListRules, Ping, Remove, RestartWorker, RuleText, StartTap
from mcrelay.codec import Codec, encode
from mcrelay.errors import RuleError
from mcrelay.frames import FRAME_MAX, HEADER, WHY_MAX, FrameReader, Malformed
from mcrelay.messages import Message
from mcrelay.ruletext import parse_rule

ROUNDS: Final = 20_000  # some seconds
REASON_MAX: Final = 3 * WHY_MAX  # characters of a refusal

OUTPUTS: Final = ("239.2.2.2:6000%eth1,ttl=8", "10.9.0.7:6000%eth2")
REQUESTS: Final[tuple[Message, ...]] = (
    Ping(id=1),
    Add(id=2, input="239.1.1.1:5000%eth0", outputs=OUTPUTS, name="feed-a"),
    Add(id=3, input="192.0.2.1@239.1.1.0/24:*%eth0", outputs=("[ff3e::1]:5000%eth1",)),
    Remove(id=4, rule="feed-a"),
    Change(
        id=5,
        add=(RuleText(input="239.1.1.1:5000%eth0", outputs=OUTPUTS, name=None),) * 2,
        remove=("a", "b"),
        complete=True,
        expect=7,
    ),
    ListRules(id=6, after="0123456789ab"),
    GetStats(id=7),
    RestartWorker(id=8, index=1),
    StartTap(id=9, rule="feed-a", count=10, snap_length=128),
)
TEXTS: Final = ("239.1.1.1:5000%eth0", "192.0.2.1@[ff3e::8000:1]/64:*%eth0.7", *OUTPUTS, "feed-a")
# What is seldom right, and sometimes wrong in a way of its own.
TELLING_BYTES: Final = (b"\0", b"\xff", b'"', b"\\", b"{", b"[", b"]", b"}", b",", b":", b"e", b"-", b"\xed\xa0\x80")
TELLING_VALUES: Final[tuple[Any, ...]] = (
    None,
    True,
    -1,
    2**53 + 1,
    10**400,
    1.5,
    "",
    "\0",
    "\ud800",
    "9" * 5000,
    [],
    {},
    [[[]]],
    {"": 0},
)
TELLING_TEXTS: Final = (
    "",
    ":",
    "%",
    "@",
    "/",
    ",",
    "=",
    "[",
    "]",
    "*",
    "-1",
    "0",
    "65536",
    "\0",
    "٣",
    "é",
    " ",
    "9" * 400,
)


def damaged_bytes(rng: random.Random, data: bytes) -> bytes:
    for _ in range(rng.randint(1, 4)):
        at, to = sorted((rng.randint(0, len(data)), rng.randint(0, len(data))))
        match rng.randrange(5):
            case 0:
                data = data[:at]
            case 1:
                data = data[:at] + rng.choice(TELLING_BYTES) * rng.choice((1, 1, 2, 500)) + data[at:]
            case 2:
                data = data[:at] + data[to:]
            case 3:
                data = data[:to] + data[at:]  # a piece twice
            case _:
                data = data[:at] + rng.randbytes(1) + data[at + 1 :]
    return data


def damaged_value(rng: random.Random, value: Any) -> Any:
    """One place in a JSON value is another."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        other = {k: damaged_value(rng, v) if k == key else v for k, v in value.items()}
        match rng.randrange(8):
            case 0:
                del other[key]
            case 1:
                other[rng.choice(("", key.upper(), "type", "id", "expect"))] = rng.choice(TELLING_VALUES)
        return other
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        return [*value[:at], damaged_value(rng, value[at]), *value[at + rng.choice((0, 1, 1)) :]]
    if isinstance(value, str) and rng.random() < 0.7:
        return damaged_text(rng, value)
    return rng.choice(TELLING_VALUES)


def damaged_text(rng: random.Random, text: str) -> str:
    at, to = sorted((rng.randint(0, len(text)), rng.randint(0, len(text))))
    return text[:at] + rng.choice((*TELLING_TEXTS, text[at:to] * 2)) + text[rng.choice((at, to)) :]


# --- what has to hold ------------------------------------------------------------------------------------------------


def check_said(reason: str) -> None:
    """It can be logged, sent and shown, whatever it quotes."""
    assert 0 < len(reason) < REASON_MAX, reason
    assert reason.isprintable(), reason


def check_codec(rng: random.Random) -> None:
    """A message or Malformed with a short reason; a message is what it says once more when it is written again."""
    body = encode(rng.choice(REQUESTS))[HEADER.size :]
    if rng.random() < 0.6:
        body = json.dumps(damaged_value(rng, json.loads(body)), ensure_ascii=rng.random() < 0.9).encode(
            errors="surrogatepass"
        )
    else:
        body = damaged_bytes(rng, body)
    codec = Codec("client", "client", "control")
    try:
        message = codec.decode(body)
    except Malformed as malformed:
        check_said(malformed.why)
        return
    assert isinstance(message, codec.permitted)
    assert codec.decode(encode(message)[HEADER.size :]) == message


def check_reader(rng: random.Random) -> None:
    """The frames of a damaged stream do not depend on how it is cut, and what is kept is bounded."""
    stream = b"".join(encode(rng.choice(REQUESTS)) for _ in range(rng.randint(1, 4)))
    if rng.random() < 0.3:
        stream = HEADER.pack(rng.choice((0, 1, FRAME_MAX, FRAME_MAX + 1, 2**31, 2**32 - 1))) + stream
    stream = damaged_bytes(rng, stream)
    whole, pieces = FrameReader(), FrameReader()
    expected = [str(frame) for frame in whole.feed(stream)]
    found: list[str] = []
    while stream:
        size = rng.choice((1, 3, 5, 64, len(stream)))
        found += [str(frame) for frame in pieces.feed(stream[:size])]
        stream = stream[size:]
    assert found == expected
    assert whole.held == pieces.held <= HEADER.size + FRAME_MAX
    assert whole.between_frames == pieces.between_frames


def check_rule(rng: random.Random) -> None:
    """A rule that reads as it is written, or a RuleError of a short line that can be shown and sent."""
    input, *outputs = (rng.choice(TEXTS) for _ in range(rng.randint(1, 4)))
    name = rng.choice((None, "feed-a"))
    match rng.randrange(3):
        case 0:
            input = damaged_text(rng, input)
        case 1:
            outputs = [damaged_text(rng, output) for output in outputs]
        case _:
            name = damaged_text(rng, name or "feed")
    try:
        rule = parse_rule(input, outputs, name)
    except RuleError as error:
        check_said(f"{error.message}; {error.hint}")
        return
    assert parse_rule(str(rule.input), map(str, rule.outputs), rule.name) == rule


CHECKS: Final[dict[str, Callable[[random.Random], None]]] = {
    "codec": check_codec,
    "reader": check_reader,
    "rule": check_rule,
}


def run(name: str, seed: int) -> None:
    try:
        CHECKS[name](random.Random(seed))
    except BaseException:
        print(f"{name} fails with seed {seed}: python {__file__} 0 {seed}", file=sys.stderr)
        raise


@pytest.mark.parametrize("name", CHECKS)
def test_damage_is_refused_or_harmless(name: str) -> None:
    for seed in range(ROUNDS):
        run(name, seed)


def main(seconds: float, seed: int) -> None:
    for name in CHECKS:
        end, executions = time.monotonic() + seconds / len(CHECKS), 0
        while not executions or time.monotonic() < end:
            run(name, seed + executions)
            executions += 1
        print(f"{name:15} {executions:>12,} executions", flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else ROUNDS)

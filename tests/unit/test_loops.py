"""Loops: engine `reference` judges as the C core does, whatever comes.

tests/native/test_loops.c says what is a loop and what is not; here random packets are judged by both.
"""

from __future__ import annotations

import random
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from mcrelay.engines.loops import Loops, Verdict

NATIVE = Path(__file__).resolve().parents[2] / "native"
PACKETS = 200_000

# Reads packets as numbers, prints for each the verdict and until when the rule is suspended.
PROGRAM = """
#include "loops.h"
#include <inttypes.h>
#include <stdio.h>

int main(void)
{
    static struct loop_watch watch;
    uint64_t rule, now_ns;
    unsigned source, number, length;

    while (scanf("%" SCNu64 " %u %u %u %" SCNu64, &rule, &source, &number, &length, &now_ns) == 5) {
        uint8_t payload[32] = {(uint8_t)number, [31] = (uint8_t)number};
        struct packet packet = {
            .source = {.words = {0, 0, 0, source}}, .payload = payload + (length % 2), .payload_length = length};
        int verdict = loops_judge(&watch, rule, &packet, now_ns);

        printf("%d %" PRIu64 "\\n", verdict, watch.suspended_until_ns);
    }
    return 0;
}
"""
VERDICTS = list(Verdict)  # in the order of enum loop_verdict


class Seen(NamedTuple):
    rule: int
    source: int
    number: int
    length: int
    now_ns: int

    @property
    def payload(self) -> memoryview:
        whole = bytearray(32)
        whole[0] = whole[31] = self.number
        start = self.length % 2
        return memoryview(bytes(whole[start : start + self.length]))


def packets(source: random.Random) -> Iterator[Seen]:
    """Mostly one payload that comes back from somewhere, by a rule that now and then is another's."""
    now_ns, rule, payload = 10**12, 1, 0
    returner = 2
    for _ in range(PACKETS):
        if source.random() < 0.0001:
            rule += 1
        if source.random() < 0.002:
            payload = (payload + 1) % 250
        if source.random() < 0.01:
            returner = source.choice([1, 2, 3])
        now_ns += source.choice([0, 0, 10**3, 10**6, 10**6, 3 * 10**6])
        if source.random() < 0.003:
            now_ns += source.choice([10**8, 10**9, 10**9, 10**9, 10**10])
        if source.random() < 0.0001:
            now_ns += 3 * 10**11
        yield Seen(
            rule,
            returner if source.random() < 0.95 else source.choice([1, 2, 3]),
            payload if source.random() < 0.9 else payload + source.randrange(3),
            source.choice([31, 31, 31, 31, 31, 31, 31, 30, 4]),
            now_ns,
        )


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = tmp_path_factory.mktemp("loops") / "judge"
    source = built.with_suffix(".c")
    source.write_text(PROGRAM)
    subprocess.run(
        ["cc", "-std=gnu11", "-O1", f"-I{NATIVE}", "-o", built, source, NATIVE / "loops.c"], check=True, timeout=60
    )
    return built


@pytest.mark.parametrize("seed", range(3))
def test_both_judge_alike(program: Path, seed: int) -> None:
    seen = list(packets(random.Random(seed)))
    lines = "\n".join(" ".join(map(str, packet)) for packet in seen)
    printed = subprocess.run([program], input=lines, check=True, capture_output=True, text=True, timeout=60).stdout
    loops = Loops()
    verdicts: Counter[Verdict] = Counter()
    suspensions: Counter[int] = Counter()
    for packet, line in zip(seen, printed.splitlines(), strict=True):
        watch = loops.watch(0, packet.rule)
        verdict = watch.judge(packet.payload, packet.source.to_bytes(16), packet.now_ns)
        number, until_ns = map(int, line.split())
        assert (verdict, watch.suspended_until_ns) == (VERDICTS[number], until_ns), packet
        verdicts[verdict] += 1
        if verdict is Verdict.FOUND:
            suspensions[watch.suspension_s] += 1
    # The test is worth its name only if all of it was reached.
    assert min(verdicts[verdict] for verdict in Verdict) > 20, verdicts
    assert set(suspensions) >= {1, 2, 4}, suspensions

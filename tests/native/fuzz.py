"""The longer run of the fuzz targets: `make fuzz`, or python tests/native/fuzz.py SECONDS.

Each target is compiled with libFuzzer, which is led by coverage, and both sanitizers, and runs for its share of the
time on a corpus that grows in build/fuzz. A finding ends the run: the input that shows it is kept beside the corpus.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
BUILD: Final = ROOT / "build" / "fuzz"
INPUT_MAX: Final = 4096  # bytes, as in fuzz.h

# What each target needs of native/.
TARGETS: Final = {
    "fuzz_packet": ["packet.c"],
    "fuzz_table": ["table.c"],
    "fuzz_ring": ["ring.c", "ingress.c", "pool.c", "whole.c"],
    "fuzz_analyser": ["analyser.c"],
}


def compile_target(name: str) -> Path:
    program = BUILD / name
    sources = [ROOT / "tests" / "native" / f"{name}.c", *(ROOT / "native" / source for source in TARGETS[name])]
    subprocess.run(
        [
            *("clang", "-std=gnu11", "-g", "-O1", "-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all"),
            *("-DFUZZ_LIBFUZZER", f"-I{ROOT / 'native'}", f"-I{ROOT / 'tests' / 'native'}"),
            *map(str, sources),
            *("-o", str(program), "-luring"),
        ],
        check=True,
    )
    return program


def main() -> int:
    seconds = int(sys.argv[1]) if len(sys.argv) > 1 else 600
    BUILD.mkdir(parents=True, exist_ok=True)
    for name in TARGETS:
        program = compile_target(name)
        corpus = BUILD / f"{name}.corpus"
        corpus.mkdir(exist_ok=True)
        share = max(1, seconds // len(TARGETS))
        print(f"== {name}, {share} s", flush=True)
        done = subprocess.run(
            [
                *(str(program), str(corpus), f"-max_total_time={share}", f"-max_len={INPUT_MAX}"),
                *("-print_final_stats=1", "-verbosity=0", f"-artifact_prefix={BUILD}/{name}-"),
            ],
            check=False,
        )
        if done.returncode:
            print(f"{name} has a finding; the input is {BUILD}/{name}-*", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

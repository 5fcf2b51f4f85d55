"""The longer run of the fuzz targets: `make fuzz`, or python tests/native/fuzz.py SECONDS [EXECUTIONS].

Each target is compiled with libFuzzer, which is led by coverage, and both sanitizers, and runs for its share of the
time, or until it has done its share of the executions. It starts from the inputs in tests/native/corpus and keeps what
it finds in build/fuzz. A finding ends the run: the input that shows it is kept beside those.

    python tests/native/fuzz.py --merge    make the corpora of the tree anew from what was found: few inputs, each
                                           small, of which each reaches something that no other does
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
BUILD: Final = ROOT / "build" / "fuzz"
CORPUS: Final = Path(__file__).with_name("corpus")
INPUT_MAX: Final = 4096  # bytes, as in fuzz.h
KEPT_MAX: Final = 512  # bytes of an input in the tree
KEPT: Final = 48  # inputs of a target in the tree, the smallest

# What each target needs of native/.
TARGETS: Final = {
    "fuzz_packet": ["packet.c"],
    "fuzz_table": ["table.c"],
    "fuzz_ring": ["ring.c", "ingress.c", "pool.c", "whole.c"],
    "fuzz_reassembly": ["reassembly.c"],
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


def fuzz(name: str, seconds: int, executions: int | None) -> int | None:
    """Run a target; how often it was executed, or None if it has a finding."""
    program = compile_target(name)
    found = BUILD / f"{name}.corpus"
    found.mkdir(exist_ok=True)
    limits = [f"-max_total_time={seconds}", *([f"-runs={executions}"] if executions else [])]
    done = subprocess.run(
        [
            *(str(program), str(found), str(CORPUS / name), *limits, f"-max_len={INPUT_MAX}"),
            *("-print_final_stats=1", "-verbosity=0", f"-artifact_prefix={BUILD}/{name}-"),
        ],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return None
    (count,) = re.findall(r"stat::number_of_executed_units: *([0-9]+)", done.stderr)
    return int(count)


def merge(name: str) -> None:
    program = compile_target(name)
    merged = BUILD / f"{name}.merged"
    shutil.rmtree(merged, ignore_errors=True)
    merged.mkdir()
    sources = [path for path in (CORPUS / name, BUILD / f"{name}.corpus") if path.exists()]
    subprocess.run(
        [str(program), "-merge=1", f"-max_len={KEPT_MAX}", str(merged), *map(str, sources)],
        capture_output=True,
        check=True,
    )
    kept = CORPUS / name
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    smallest = sorted(merged.iterdir(), key=lambda path: (path.stat().st_size, path.name))
    for path in smallest[:KEPT]:
        shutil.copy(path, kept / path.name[:16])


def main(arguments: Sequence[str]) -> int:
    BUILD.mkdir(parents=True, exist_ok=True)
    if arguments[:1] == ["--merge"]:
        for name in TARGETS:
            merge(name)
        return 0
    seconds = int(arguments[0]) if arguments else 600
    executions = int(arguments[1]) if len(arguments) > 1 else None
    total = 0
    for name in TARGETS:
        count = fuzz(name, max(1, seconds // len(TARGETS)), executions and -(-executions // len(TARGETS)))
        if count is None:
            print(f"{name} has a finding; the input is {BUILD}/{name}-*", file=sys.stderr)
            return 1
        print(f"{name:15} {count:>12,} executions", flush=True)
        total += count
    print(f"{'in total':15} {total:>12,} executions, no finding", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

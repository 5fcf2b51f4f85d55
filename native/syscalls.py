"""List the system calls that the C library's and the kernel's headers know for the machine that is compiled for.

    syscalls.py OUTPUT COMPILER...

writes one line CALL(name) for each, for native/forbidden.c: numbers differ between architectures, and the headers have
them right.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

NO_CALLS = {"syscalls", "arch_specific_syscall"}  # __NR_syscalls is how many there are


def main() -> None:
    output, *compiler = sys.argv[1:]
    macros = subprocess.run(
        [*compiler, "-E", "-dM", "-include", "sys/syscall.h", "-x", "c", "/dev/null"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    names = set(re.findall(r"^#define __NR_([a-z]\w*) ", macros, re.MULTILINE)) - NO_CALLS
    Path(output).write_text("".join(f"CALL({name})\n" for name in sorted(names)))


if __name__ == "__main__":
    main()

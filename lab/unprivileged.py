"""Programs run by somebody without any privilege, wherever the interpreter and the package lie.

A clone, or a Python of pyenv, is often in a home that nobody else may enter. `ip netns exec` gives a program a mount
namespace of its own: there, what it needs of such a directory is shown in one that all may enter, and the rest is not
there.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from lab.program import PROGRAM

SETPRIV: Final = "setpriv --reuid {user} --regid {group} --clear-groups --bounding-set=-all --inh-caps=-all"


def unprivileged(*, user: str = "nobody", group: str = "nogroup", program: str = PROGRAM) -> tuple[str, ...]:
    """The beginning of a command line in a namespace of the lab: arguments of `program` may follow."""
    steps = ["set -e", *_opened({sys.prefix, sys.base_prefix, str(Path(program).parent.parent)})]
    steps.append(f'exec {SETPRIV.format(user=user, group=group)} "$@"')
    return ("sh", "-c", "\n".join(steps), "sh", program)


def _opened(needed: Iterable[str]) -> list[str]:
    """Shell commands that make these directories accessible."""
    closed: dict[Path, set[str]] = {}
    for path in map(Path, needed):
        for directory in reversed(path.parents):
            if not os.stat(directory).st_mode & 0o001:
                closed.setdefault(directory, set()).add(path.relative_to(directory).parts[0])
                break
    steps = []
    for directory, children in closed.items():
        steps.append("opened=$(mktemp -d); mount -t tmpfs -o mode=755 lab $opened")
        for child in children:
            inner, outer = f"$opened/{shlex.quote(child)}", shlex.quote(str(directory / child))
            steps.append(f"mkdir {inner}; mount --bind {outer} {inner}")
        steps.append(f"mount --rbind $opened {shlex.quote(str(directory))}; umount -l $opened; rmdir $opened")
    return steps

"""A terminal for programs that need one: a pane of tmux, whose keys are pressed and whose screen is read.

Owns a tmux server of its own, which knows nothing of anybody's configuration and ends with the context, and with it
what runs in the pane. The screen is text: what curses or escape sequences have made of the cells, not the bytes.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from lab.namespaces import wait_until

DEADLINE_S: Final = 15.0
COMMAND_S: Final = 10.0


class Terminal:
    """A context manager: a shell runs in the pane inside it. Its prompt is '$ '."""

    def __init__(self, columns: int = 100, rows: int = 24, **environment: str) -> None:
        self._own = ExitStack()
        # Where the server's socket is: nobody else's server can be meant.
        self._directory = self._own.enter_context(tempfile.TemporaryDirectory(prefix="mcrelay-lab-"))
        kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME")}
        self._environment = {**kept, "LC_ALL": "C.UTF-8", "TMUX_TMPDIR": self._directory, **environment}
        size = ("-x", str(columns), "-y", str(rows))
        shell = "PS1='$ ' exec sh"
        try:
            self._tmux("-f", "/dev/null", "new-session", "-d", *size, shell)
            self._tmux("set-option", "-g", "escape-time", "0")
            self.wait_for("$")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        subprocess.run(self._command("kill-server"), env=self._environment, capture_output=True, check=False)
        self._own.close()

    def _command(self, *arguments: str) -> list[str]:
        return ["tmux", "-L", "lab", *arguments]

    def _tmux(self, *arguments: str) -> str:
        return subprocess.run(
            self._command(*arguments),
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
            check=True,
        ).stdout

    @property
    def screen(self) -> str:
        return self._tmux("capture-pane", "-p")

    @property
    def lines(self) -> list[str]:
        return self.screen.splitlines()

    @property
    def styled(self) -> str:
        """The screen with the escape sequences that would draw it."""
        return self._tmux("capture-pane", "-p", "-e")

    @property
    def is_alternate(self) -> bool:
        """Whether a program has the whole screen, which the shell's is behind."""
        return self._tmux("display-message", "-p", "#{alternate_on}").strip() == "1"

    @property
    def pid(self) -> int:
        """Of the shell."""
        return int(self._tmux("display-message", "-p", "#{pane_pid}"))

    def children(self) -> list[int]:
        """Processes that the shell has started."""
        return list(map(int, Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()))

    def press(self, *keys: str) -> None:
        """Keys by tmux's names: Enter, Down, C-c; or characters."""
        self._tmux("send-keys", *keys)

    def type(self, text: str) -> None:
        self._tmux("send-keys", "-l", text)

    def start(self, *command: str, then: str = "") -> None:
        """Have the shell run a command, and then what the shell makes of `then`."""
        self.type(f"{shlex.join(command)}{then and f'; {then}'}")
        self.press("Enter")

    def resize(self, columns: int, rows: int) -> None:
        self._tmux("resize-window", "-x", str(columns), "-y", str(rows))

    def wait_for(self, *texts: str, deadline_s: float = DEADLINE_S) -> str:
        """The screen once it has all of these."""
        return self.wait_until(lambda screen: all(text in screen for text in texts), f"{texts}", deadline_s)

    def wait_until(self, holds: Callable[[str], object], what: str, deadline_s: float = DEADLINE_S) -> str:
        """The screen of which something holds."""
        seen: Sequence[str] = []

        def look() -> bool:
            nonlocal seen
            seen = [self.screen]
            return bool(holds(seen[0]))

        try:
            wait_until(look, deadline_s, what)
        except (TimeoutError, AssertionError) as error:
            raise AssertionError(f"not on the screen: {what}\n{seen[0] if seen else ''}") from error
        return seen[0]

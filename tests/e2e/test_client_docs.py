"""The examples in docs/client.md and docs/protocol.md do what they say, with a daemon that relays.

sender 203.0.113.10 --- in0 relay out0 --- receiver

In the documents the interfaces are eth0 and eth1, and daemons listen below /run. Nothing else of an example is changed.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from lab.daemon import Daemon
from lab.plan import SendPlan
from lab.topology import RelayLine
from lab.traffic import start_sender
from mcrelay.places import SYSTEM_SOCKET, VARIABLE

DOCS: Final = Path(__file__).resolve().parents[2] / "docs"
BLOCK: Final = re.compile(r"^```python\n(.*?)^```\n(?:```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)
LAB_SOCKET: Final = "/run/mcrelay-lab/control.sock"


@dataclass(frozen=True)
class Example:
    code: str
    prints: str
    line: int  # of the document, where the code begins


def examples(text: str) -> list[Example]:
    return [Example(found[1], found[2] or "", text.count("\n", 0, found.start()) + 2) for found in BLOCK.finditer(text)]


@dataclass(frozen=True)
class Site:
    """Two daemons, and what the documents call things."""

    here: Daemon
    lab: Daemon

    def localized(self, text: str) -> str:
        names = {"eth0": "in0", "eth1": "out0", SYSTEM_SOCKET: self.here.socket, LAB_SOCKET: self.lab.socket}
        for name, ours in names.items():
            text = text.replace(name, ours)
        return text


@pytest.fixture(scope="module")
def site(line: RelayLine) -> Iterator[Site]:
    with Daemon(line.relay, "--workers", "1") as here, Daemon(line.relay, "--workers", "1") as lab:
        lab.run("add", "239.1.1.1:5000%nowhere0", "239.2.2.2:6000%out0")
        yield Site(here, lab)


def test_the_examples_of_the_library_print_what_they_say(
    site: Site, line: RelayLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other, as they stand: each finds what those before it have left."""
    monkeypatch.setenv(VARIABLE, site.here.socket)
    text = (DOCS / "client.md").read_text()
    found = examples(text)
    assert len(found) == text.count("```python") > 6
    assert sum(bool(example.prints) for example in found) == text.count("```text")
    sender = start_sender(line.sender, SendPlan("239.1.1.1:5000", interface="eth0", rate=200, duration_s=60))
    try:
        for example in found:
            check(site, example)
    finally:
        sender.stop()


def check(site: Site, example: Example) -> None:
    # As many lines before it as in the document: a traceback shows the line there.
    code = compile("\n" * (example.line - 1) + site.localized(example.code), str(DOCS / "client.md"), "exec")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {"__name__": "__main__"})
    expected = site.localized(example.prints)
    assert doctest.OutputChecker().check_output(expected, printed.getvalue(), doctest.ELLIPSIS), (
        f"client.md:{example.line} printed\n{printed.getvalue()}and not\n{expected}"
    )


def test_the_example_of_the_protocol_does_what_it_shows(site: Site) -> None:
    text = site.localized((DOCS / "protocol.md").read_text())
    names: dict[str, object] = {}
    example = doctest.DocTestParser().get_doctest(text, names, "protocol.md", str(DOCS / "protocol.md"), 0)
    assert len(example.examples) > 5
    said = io.StringIO()
    runner = doctest.DocTestRunner()
    runner.run(example, out=said.write, clear_globs=False)
    for name in ("stream", "sock"):
        example.globs[name].close()
    assert runner.summarize(verbose=False).failed == 0, said.getvalue()

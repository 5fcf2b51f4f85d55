"""Schemas of what commands print with --json, made from the types that they print.

`python -m tests.unit.schemas` writes them to tests/unit/snapshots, which is what programs rely on: a field may come,
but none may go or become another.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import click
import msgspec

from mcrelay.api import Added, Event, Paused, Removed, Restarted, Stats, Upgraded
from mcrelay.cli import cli
from mcrelay.cli_print import ENVELOPE
from mcrelay.documents import (
    Answered,
    AppliedFile,
    CheckedFile,
    FileComparison,
    LevelsInForce,
    Listing,
    Packet,
    Processes,
    SavedFile,
    Versions,
)
from mcrelay.facts import Diagnosis
from mcrelay.health import Health
from mcrelay.traffic import ReceiveReport, SendReport

SNAPSHOTS: Final = Path(__file__).with_name("snapshots")
RENEW: Final = "if the change is meant, and no program can trip over it: .venv/bin/python -m tests.unit.schemas"

# Of each command, its document, or the lines that matter of those that print several.
PRINTED: Final[dict[str, Any]] = {
    "add": Added,
    "remove": Removed,
    "pause": Paused,
    "resume": Paused,
    "list": Listing,
    "stats": Stats,
    "workers": Processes,
    "restart-worker": Restarted,
    "upgrade": Upgraded,
    "version": Versions,
    "ping": Answered,
    "check": CheckedFile,
    "diff": FileComparison,
    "apply": AppliedFile,
    "save": SavedFile,
    "explain": Diagnosis,
    "doctor": Diagnosis,
    "events": Event,
    "log": LevelsInForce,
    "health": Health,
    "trace": Packet,
    "send": SendReport,
    "receive": ReceiveReport,
}
EVENTS: Final = {"send", "receive"}  # whose lines say what they are: a report is the last


def printing_json(group: click.Group = cli, path: str = "") -> Iterator[str]:
    """Commands that have --json."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from printing_json(command, f"{path}{name} ")
        elif any("--json" in option.opts for option in command.params):
            yield f"{path}{name}"


def schema_of(command: str) -> dict[str, Any]:
    """A JSON Schema, whatever the documentation of the types says."""
    schema = msgspec.json.schema(PRINTED[command])
    top = schema["$defs"].pop(schema.pop("$ref").rpartition("/")[2])
    for field in ENVELOPE:
        if top["properties"].pop(field, None):
            top["required"].remove(field)
    if command in EVENTS:
        top["properties"]["event"] = {"const": "report"}
        top["required"].append("event")
    document = {"title": f"mcrelay {command} --json", **{k: v for k, v in top.items() if k != "title"}, **schema}
    return _without_descriptions(document)  # type: ignore[no-any-return]


def _without_descriptions(schema: Any) -> Any:
    if isinstance(schema, dict):
        kept = {k: v for k, v in schema.items() if not (k == "description" and isinstance(v, str))}
        return {key: _without_descriptions(value) for key, value in kept.items()}
    return [_without_descriptions(item) for item in schema] if isinstance(schema, list) else schema


def snapshot_of(command: str) -> Path:
    return SNAPSHOTS / f"{command.replace(' ', '-')}.json"


def as_text(schema: dict[str, Any]) -> str:
    return json.dumps(schema, indent=2) + "\n"


def main() -> None:
    SNAPSHOTS.mkdir(exist_ok=True)
    for old in SNAPSHOTS.glob("*.json"):
        old.unlink()
    for command in PRINTED:
        snapshot_of(command).write_text(as_text(schema_of(command)))


if __name__ == "__main__":
    main()

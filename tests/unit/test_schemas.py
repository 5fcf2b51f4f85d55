"""What programs rely on of --json does not change unnoticed."""

from __future__ import annotations

import json

import jsonschema
import pytest

from tests.unit.schemas import PRINTED, RENEW, SNAPSHOTS, printing_json, schema_of, snapshot_of


def test_every_command_with_json_has_a_schema() -> None:
    commands = set(printing_json())
    assert commands == set(PRINTED), "name the type that it prints in tests/unit/schemas.py"
    assert {path.name for path in SNAPSHOTS.iterdir()} == {snapshot_of(command).name for command in commands}, RENEW


@pytest.mark.parametrize("command", PRINTED)
def test_a_schema_is_as_it_was(command: str) -> None:
    path = snapshot_of(command)
    schema = schema_of(command)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert path.exists(), RENEW
    assert schema == json.loads(path.read_text()), f"`mcrelay {command} --json` prints something else now; {RENEW}"

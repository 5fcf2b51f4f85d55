"""mcr's configuration: JSON5 with rules, and the cores that the workers of each interface are pinned to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final

import msgspec

from mcrelay.importers.imported import BadImport, Imported
from mcrelay.rules import shown

DEPTH_MAX: Final = 50  # of brackets: a reader that calls itself has an end
SECTIONS: Final = {"igmp": "IGMP querying", "pim": "PIM-SM", "msdp": "MSDP", "control_plane": "its control plane"}
RULE: Final = {"name", "input", "outputs", "enabled"}
INPUT: Final = {"interface", "group", "port", "source"}
Core = Annotated[int, msgspec.Meta(ge=0, lt=4096)]
OUTPUT: Final = {"interface", "group", "port", "ttl"}


def read(text: str) -> Imported:
    """BadImport if it is not JSON5, or no object."""
    imported = Imported()
    document = _parse(text)
    rules = document.get("rules", [])
    if not isinstance(rules, list):
        raise BadImport("'rules' is no list", "write rules: [...]")
    for number, rule in enumerate(rules, 1):
        _take_rule(imported, f"rule {number}", rule)
    _take_pinning(imported, document.get("pinning", {}))
    for key in document:
        if key in SECTIONS:
            imported.remark(None, f"'{key}' has no equivalent: mcrelay has no {SECTIONS[key]}", "keep a router for it")
        elif key not in ("rules", "pinning"):
            imported.remark(None, f"{shown(str(key))} has no equivalent", "see mcrelay.toml(5)")
    return imported


def _parse(text: str) -> Mapping[str, Any]:
    import json5  # not before somebody imports such a file

    depth = 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if depth > DEPTH_MAX:
            raise BadImport("it is nested too deeply", "is it a configuration of mcr's?")
    try:
        document = json5.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadImport(f"this is not JSON5: {str(error)[:200]}", "check the file with 'mcrctl config check'") from None
    if not isinstance(document, dict):
        raise BadImport("this is no object of JSON5", "it begins with {")
    return document


def _take_rule(imported: Imported, what: str, rule: Any) -> None:
    if (
        not isinstance(rule, dict)
        or not isinstance(rule.get("input"), dict)
        or not isinstance(rule.get("outputs"), list)
    ):
        imported.remark(None, f"{what} has no 'input' or no 'outputs'", "write it by hand")
        return
    given, outputs = rule["input"], rule["outputs"]
    for key in sorted(map(str, rule.keys() - RULE)) + sorted(map(str, given.keys() - INPUT)):
        imported.remark(None, f"{what}: {shown(key)} has no equivalent", "see docs/rules.md")
    texts = []
    for output in outputs:
        if not isinstance(output, dict):
            imported.remark(None, f"{what}: {shown(str(output))} is no output", "write it by hand")
            continue
        for key in sorted(map(str, output.keys() - OUTPUT)):
            imported.remark(None, f"{what}: {shown(key)} of an output has no equivalent", "see docs/rules.md")
        ttl = f",ttl={output['ttl']}" if "ttl" in output else ""
        paused = ",paused" if rule.get("enabled", True) is False else ""
        texts.append(f"{_place(output)}{ttl}{paused}")
    source = f"{given['source']}@" if given.get("source") else ""
    name = rule.get("name")
    imported.add(None, f"{source}{_place(given)}", texts, None if name is None else str(name))


def _place(given: Mapping[str, Any]) -> str:
    group = str(given.get("group", ""))
    return f"{f'[{group}]' if ':' in group else group}:{given.get('port', '')}%{given.get('interface', '')}"


def _take_pinning(imported: Imported, pinning: Any) -> None:
    """mcrelay's workers have all interfaces, one worker on each core."""
    if not pinning:
        return
    try:
        of_interfaces = msgspec.convert(pinning, dict[str, list[Core]])
    except msgspec.ValidationError:
        imported.remark(None, "'pinning' is no list of cores for each interface", "set daemon.cores by hand")
        return
    cores = sorted({core for cores in of_interfaces.values() for core in cores})
    imported.cores = ",".join(map(str, cores)) or None
    if len(pinning) > 1:
        what = "mcrelay's workers are not an interface's: each core's has packets of all"
        imported.remark(None, what, "choose other cores in daemon.cores if that does not suit")

"""mcr's configuration: JSON5 with rules, and the cores that the workers of each interface are pinned to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final

import msgspec

from mcrelay.importers.imported import BY_HAND, BadImport, Imported
from mcrelay.rules import shown

DEPTH_MAX: Final = 50  # of brackets: a reader that calls itself has an end
SECTIONS: Final = {"igmp": "IGMP querying", "pim": "PIM-SM", "msdp": "MSDP", "control_plane": "place for a router's"}
Core = Annotated[int, msgspec.Meta(ge=0, lt=4096)]
Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
Ttl = Annotated[int, msgspec.Meta(ge=0, le=255)]


class _Place(msgspec.Struct):
    interface: str
    group: str
    port: Port

    def __str__(self) -> str:
        return f"{f'[{self.group}]' if ':' in self.group else self.group}:{self.port}%{self.interface}"


class _Input(_Place):
    source: str | None = None


class _Output(_Place):
    ttl: Ttl | None = None


class _Rule(msgspec.Struct):
    input: _Input
    outputs: list[_Output]
    name: str | None = None
    enabled: bool = True


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
            imported.leave_out(None, shown(str(key)), "it has no equivalent", "see mcrelay.toml(5)")
    return imported


def _parse(text: str) -> Mapping[str, Any]:
    import json5  # not before somebody imports such a file

    depth = 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if depth > DEPTH_MAX:
            raise BadImport("it is nested too deeply", "is it a configuration of mcr's?")
    try:
        document = json5.loads(text, allow_duplicate_keys=False)
    except (ValueError, RecursionError) as error:
        raise BadImport(f"this is not JSON5: {str(error)[:200]}", "check the file with 'mcrctl config check'") from None
    if not isinstance(document, dict):
        raise BadImport("this is no object of JSON5", "it begins with {")
    return document


def _take_rule(imported: Imported, what: str, given: Any) -> None:
    try:
        rule = msgspec.convert(given, _Rule)
    except msgspec.ValidationError as error:
        imported.leave_out(None, what, str(error), f"mend it, or {BY_HAND}")
        return
    _pass_over(imported, what, given, _Rule)
    _pass_over(imported, f"{what}, input", given["input"], _Input)
    for number, output in enumerate(given["outputs"], 1):
        _pass_over(imported, f"{what}, output {number}", output, _Output)
    if not _is_place(imported, what, rule.input):
        return
    if rule.input.source and not imported.is_address(None, rule.input.source, what):
        return
    paused = "" if rule.enabled else ",paused"
    texts = []
    for number, output in enumerate(rule.outputs, 1):
        if _is_place(imported, f"{what}, output {number},", output):
            ttl = "" if output.ttl is None else f",ttl={output.ttl}"
            texts.append(f"{output}{ttl}{paused}")
    source = f"{rule.input.source}@" if rule.input.source else ""
    texts = imported.once(None, texts, f"{what}: the output")
    imported.add(None, f"{source}{rule.input}", texts, rule.name, what)


def _is_place(imported: Imported, what: str, place: _Place) -> bool:
    return imported.is_interface(None, place.interface, what) and imported.is_address(None, place.group, what)


def _pass_over(imported: Imported, what: str, given: Mapping[str, Any], known: type[msgspec.Struct]) -> None:
    for key in given:
        if key not in known.__struct_fields__:
            imported.leave_out(None, f"{what}: {shown(key)}", "it has no equivalent", "see docs/rules.md")


def _take_pinning(imported: Imported, pinning: Any) -> None:
    """mcrelay's workers have all interfaces, one worker on each core."""
    try:
        of_interfaces = msgspec.convert(pinning, dict[str, list[Core]])
    except msgspec.ValidationError as error:
        imported.leave_out(None, "'pinning'", f"{error}, where each interface has cores", "set daemon.cores by hand")
        return
    cores = sorted({core for cores in of_interfaces.values() for core in cores})
    imported.cores = ",".join(map(str, cores)) or None
    for name, its_cores in of_interfaces.items():
        if not its_cores:
            imported.leave_out(None, f"'pinning' of {shown(name)}", "it names no core", "set daemon.cores by hand")
    if len(of_interfaces) > 1:
        what = "mcrelay's workers are not an interface's: each core's has packets of all"
        imported.remark(None, what, "choose other cores in daemon.cores if that does not suit")

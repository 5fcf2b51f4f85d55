"""Saving: rules written into the files of a configuration, which keep everything else.

Owns where a rule goes: one that a file has already is changed in its place, one that no file has goes to the end of the
main file, one that does not run any more is taken out. All files are ready before the first one is replaced, and each
is replaced at once, so that a reader finds it as it was or as it is to be.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import tempfile
from collections.abc import Container, Iterable
from typing import Final

import tomlkit
from tomlkit.exceptions import TOMLKitError
from tomlkit.items import AoT, Array, Table

from mcrelay import config_files
from mcrelay.config import ConfigError, read, rule_tables
from mcrelay.declared import Difference, difference
from mcrelay.errors import BadConfig, SystemRefusal, UsageError
from mcrelay.rules import Rule
from mcrelay.ruletext import parse_input, parse_output

NEW_MODE: Final = 0o644
INLINE: Final = re.compile(r"""\s*["']?rule["']?\s*=""")
BY_HAND: Final = "write its rules as [[rule]] tables, or change it by hand"


def save(path: str, running: Iterable[Rule]) -> Difference:
    """Have the files say what runs; what changed in them. A file that does not exist is made. ConfigError or FileError
    if they are not as they should be, SystemRefusal if they cannot be written; unless that says what was, nothing has
    changed then."""
    running = list(running)
    if path in config_files.STANDARD_INPUT:
        raise UsageError(f"nothing can be saved to {path}", "give the name of a file")
    files = config_files.read_files(path, new=True)
    before = read(files)
    change = difference(before.rules, running)
    if not change:
        return change
    try:
        saved = [(name, content, _edit(name, content, change, add=name == path)) for name, content in files]
        after = read((name, text) for name, _content, text in saved)
    except (TOMLKitError, ConfigError) as error:
        raise BadConfig(f"{path} is written in a way that cannot be changed: {error}", BY_HAND) from None
    if difference(after.rules, running) or after.settings != before.settings:
        raise BadConfig(f"{path} is written in a way that cannot be changed", BY_HAND)
    _replace([(name, text) for name, content, text in saved if text != content])
    return change


def _edit(name: str, content: bytes, change: Difference, *, add: bool) -> bytes:
    gone = {rule.id for rule in change.removed}
    changed = {after.id: (before, after) for before, after in change.changed}
    document = tomlkit.parse(_without(gone, name, content))
    for table in _tables(name, document):
        if pair := changed.get(_id(table)):
            before, after = pair
            _set_name(table, after)
            if set(before.outputs) != set(after.outputs):
                _set_outputs(table, after)
    text = tomlkit.dumps(document)
    return (_with(change.added, text) if add else text).encode()


def _without(gone: Container[str], name: str, content: bytes) -> str:
    """The text without the tables of these rules. The library would take the comments behind them, too."""
    text = content.decode()
    ids = [_id(table) for table in _tables(name, tomlkit.parse(text))]
    lines = rule_tables(content)
    dropped = {line for rule_id, table in zip(ids, lines, strict=False) if rule_id in gone for line in table}
    return "\n".join(line for number, line in enumerate(text.split("\n"), 1) if number not in dropped)


def _tables(name: str, document: tomlkit.TOMLDocument) -> Iterable[Table]:
    rules = document.get("rule")
    if isinstance(rules, AoT):
        return rules
    if rules:
        written = (number for number, line in enumerate(document.as_string().split("\n"), 1) if INLINE.match(line))
        raise BadConfig(f"{name}:{next(written, 1)}: the rules are not written as [[rule]] tables", BY_HAND)
    return ()


def _id(table: Table) -> str:
    return Rule(parse_input(str(table["input"])), ()).id


def _with(added: Iterable[Rule], text: str) -> str:
    """The text with tables for these rules behind those that it has, or at its end, an empty line before each."""
    lines = text.split("\n")
    end = "\r" if lines[0].endswith("\r") else ""
    tables = rule_tables(text.encode())
    at = tables[-1].stop - 1 if tables else len(text.rstrip().split("\n")) if text.strip() else 0
    new: list[str] = []
    for rule in added:
        table = tomlkit.table()
        _set_name(table, rule)
        table["input"] = str(rule.input)
        _set_outputs(table, rule)
        new += ["", "[[rule]]", *table.as_string().rstrip("\n").split("\n")]
    if not new:
        return text
    behind = lines[at:] if any(line.strip() for line in lines[at:]) else [""]
    if behind[0].strip():
        new.append("")
    return "\n".join([*lines[:at], *(line + end for line in new[0 if at else 1 :]), *behind])


def _set_name(table: Table, rule: Rule) -> None:
    if rule.name is None:
        table.pop("name", None)
    elif table.get("name") != rule.name:
        table["name"] = rule.name


def _set_outputs(table: Table, rule: Rule) -> None:
    outputs = [str(output) for output in rule.outputs]
    written = table.get("output")
    if isinstance(written, Array) and len(written) == len(outputs):  # comments of the list stay
        for position, (before, output) in enumerate(zip(list(written), rule.outputs, strict=True)):
            if parse_output(str(before)) != output:
                written[position] = str(output)
        return
    if len(outputs) == 1:
        table["output"] = outputs[0]
        return
    listed = tomlkit.array()
    listed.extend(outputs)
    table["output"] = listed.multiline(multiline=True)


def _replace(files: Iterable[tuple[str, bytes]]) -> None:
    """Write all, then put each in its place; a symbolic link goes on to lead there. SystemRefusal if one cannot be
    written."""
    done: list[str] = []
    with contextlib.ExitStack() as unfinished:
        ready = []
        try:
            for name, content in files:
                real = os.path.realpath(name)
                ready.append((name, real, _write_beside(real, content, unfinished)))
            for name, real, written in ready:
                os.replace(written, real)
                done.append(name)
                _sync_directory(real)
        except OSError as error:
            before = f"; written is {', '.join(done)}" if done else ""
            hint = (
                "it is mounted by itself: mount its directory instead"
                if error.errno == errno.EBUSY
                else "check its owner, mode and disk"
            )
            raise SystemRefusal(f"cannot write {name}: {error.strerror}{before}", hint) from None


def _write_beside(name: str, content: bytes, unfinished: contextlib.ExitStack) -> str:
    """A new file with the owner and mode of the one that it is to replace, on the disk."""
    descriptor, written = tempfile.mkstemp(prefix=".", suffix=".new", dir=os.path.dirname(name))
    unfinished.callback(_remove, written)
    with open(descriptor, "wb") as file:
        file.write(content)
        try:
            facts = os.stat(name)
        except FileNotFoundError:
            os.fchmod(descriptor, NEW_MODE)
        else:
            os.fchown(descriptor, facts.st_uid, facts.st_gid)
            os.fchmod(descriptor, facts.st_mode & 0o7777)
        file.flush()
        os.fsync(descriptor)
    return written


def _sync_directory(path: str) -> None:
    """So that the name leads to the new file also after a power cut."""
    descriptor = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)

"""docs/troubleshooting.md has every message that a person may have to act on, and none that is said no more."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.test_style import MODULES, ROOT, TREES

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
# "- `message`" with "…" for what differs; one that ends with " …" is the beginning of a longer one.
SHOWN = re.findall(r"^- `([^`]+)`", PAGE, re.MULTILINE)
PLACEHOLDER = re.compile(r"%(\(\w+\))?[-+0-9.]*[srdfx]")


def constants(tree: ast.Module) -> dict[str, ast.expr]:
    """What a module's names stand for."""
    found = {}
    for node in tree.body:
        match node:
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                found[name] = value
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                found[name] = value
    return found


def templates(node: ast.expr, known: dict[str, ast.expr]) -> list[str]:
    """The texts that a message's first argument may be: a constant, a name of one, or one of a constant dictionary."""
    match node:
        case ast.Constant(value=str(text)):
            return [PLACEHOLDER.sub("…", text)]
        case ast.Name(id=name) if name in known:
            return templates(known[name], known)
        case ast.Subscript(value=ast.Name(id=name)) if isinstance(table := known.get(name), ast.Dict):
            return [text for value in table.values for text in templates(value, known)]
    raise AssertionError(f"line {node.lineno}: the message is no constant: {ast.unparse(node)}")


def logged(tree: ast.Module) -> Iterator[str]:
    """Of warnings and what is worse."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id="log"), attr="warning" | "error" | "exception" | "critical"),
                args=[first, *_],
            ):
                yield from templates(first, constants(tree))
            case ast.Call(func=ast.Attribute(value=ast.Name(id="log"), attr="log"), args=[_level, first, *_]):
                yield from templates(first, constants(tree))


def raised(tree: ast.Module) -> Iterator[str]:
    """The texts of errors, and of whatever else is made of a text."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(args=[ast.Constant(value=str(text)), *_]):
                yield text
            case ast.Call(args=[ast.JoinedStr(values=parts), *_]):
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in parts)


def is_shown(message: str) -> bool:
    return any(message == shown or (shown.endswith(" …") and message.startswith(shown[:-2])) for shown in SHOWN)


LOG_MESSAGES = {name: sorted(set(logged(tree))) for name, tree in TREES.items()}


def test_messages_are_found() -> None:
    text = 'TEXT: Final = "a %s"\nTEXTS: Final = {"x": "b %(n)d", "y": "c"}\n'
    calls = (
        "log.warning(TEXT, 1)\ndef f():\n    log.error(TEXTS[key])\n    log.info('no')\n    log.exception('d %r', 1)\n"
    )
    assert sorted(logged(ast.parse(text + calls))) == ["a …", "b …", "c", "d …"]
    with pytest.raises(AssertionError, match="no constant"):
        list(logged(ast.parse("log.warning(f'{x}')")))


@pytest.mark.parametrize("name", [name for name, messages in LOG_MESSAGES.items() if messages])
def test_a_message_that_somebody_may_have_to_act_on_is_in_the_document(name: str) -> None:
    assert [message for message in LOG_MESSAGES[name] if not is_shown(message)] == []


def test_the_document_has_no_message_that_is_said_no_more() -> None:
    said = {message for messages in LOG_MESSAGES.values() for message in messages}
    said |= {text for tree in TREES.values() for text in raised(tree)}
    gone = [
        shown
        for shown in SHOWN
        if shown not in said and not (shown.endswith(" …") and any(text.startswith(shown[:-2]) for text in said))
    ]
    assert gone == []


def test_no_message_is_a_placeholder_alone() -> None:
    """Which nobody could look up, and whose messages would suppress each other."""
    assert [name for name, messages in LOG_MESSAGES.items() for text in messages if not re.search(r"\w{3}", text)] == []


def test_components_are_the_modules_that_log() -> None:
    from mcrelay.levels import COMPONENTS

    loggers = {
        name for name, path in MODULES.items() if re.search(r"^log = logging.getLogger\(", path.read_text(), re.M)
    }
    assert set(COMPONENTS) == {name.removeprefix("mcrelay.") for name in loggers}


def test_a_worker_that_is_a_program_logs_by_its_modules_name() -> None:
    """Where it is __main__, too."""
    for name in ("mcrelay.control", "mcrelay.dataplane"):
        assert f'log = logging.getLogger("{name}")' in Path(MODULES[name]).read_text()

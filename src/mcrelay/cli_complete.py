"""Completions: what a shell may put in the place of an argument that was begun.

Owns what is asked of the daemon for that: with little patience, and in silence, since whoever presses a key has asked
for no error. Commands, options and choices are click's business, and files the shell's, which is only told that there
could be one.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import click

from mcrelay.client import Client
from mcrelay.errors import Error
from mcrelay.levels import ALL, COMPONENTS, DEFAULT, LEVELS

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from mcrelay.api import RuleFacts

PATIENCE_S: Final = 0.5


def files(_context: click.Context, _parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    """Also for sockets and programs."""
    from click.shell_completion import CompletionItem  # only a shell has use for it

    return [CompletionItem(begun, type="file")]


def rules(context: click.Context, _parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    """Names, and the ids of rules without one or of which some digits are there."""
    from click.shell_completion import CompletionItem

    return [
        CompletionItem(name, help=rule.input)
        for rule in _running(context)
        for name in (rule.name, rule.id if begun or rule.name is None else None)
        if name is not None and name.startswith(begun)
    ]


def outputs(context: click.Context, _parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    """Of the rule that was named before, without their options."""
    chosen = context.params.get("rule")
    texts = [text for rule in _running(context) if chosen in (rule.name, rule.id) for text in rule.outputs]
    return _beginning(begun, (text.partition(",")[0] for text in texts))


def inputs(context: click.Context, _parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    return _beginning(begun, (rule.input for rule in _running(context)))


def levels(_context: click.Context, parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    """LEVEL, or COMPONENT=LEVEL: the components first, and once only one is left its levels. A component's own level
    can be taken away, but not before there is one."""
    component, equals, _of_component = begun.partition("=")
    names = [name for name in COMPONENTS if (name == component if equals else name.startswith(component))]
    own = LEVELS if isinstance(parameter, click.Option) else (*LEVELS, DEFAULT)
    possible = [f"{names[0]}={level}" for level in own] if len(names) == 1 else [f"{name}=" for name in names]
    return _beginning(begun, (*LEVELS, *possible, *(f"{ALL}={level}" for level in LEVELS if equals)))


def _beginning(begun: str, texts: Iterator[str] | tuple[str, ...]) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    return [CompletionItem(text) for text in dict.fromkeys(texts) if text.startswith(begun)]


def _running(context: click.Context) -> tuple[RuleFacts, ...]:
    """Asked beside, so that one patience covers all that could be waited for: to be let in, to be let in again where a
    daemon has closed the connection, and an answer. Whoever is then still asking ends with the program."""
    path = context.params.get("path")  # --socket, if it was given before
    answers: list[tuple[RuleFacts, ...]] = []

    def ask() -> None:
        with contextlib.suppress(Error, OSError), Client(path if isinstance(path, str) else None) as client:
            answers.append(client.rules())

    asking = threading.Thread(target=ask, name="asking", daemon=True)
    asking.start()
    asking.join(PATIENCE_S)
    return answers[0] if answers else ()

"""Levels: from which level on each component logs, as people write it.

Owns the components' names and the checks. A component is a module that logs, by its name without `mcrelay.`. logs.py
puts levels in force in a process, verbosity.py in all of them. Pure.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Final, TypeGuard, get_args

from mcrelay.errors import UsageError
from mcrelay.messages import Levels, NewLevel
from mcrelay.settings import LogLevel

LEVELS: Final[tuple[LogLevel, ...]] = get_args(LogLevel)
ALL: Final = "all"  # what has no level of its own
DEFAULT: Final = "default"  # the level of a component that has none of its own
COMPONENTS: Final[tuple[str, ...]] = (
    *(
        "acceptor",
        "active",
        "adoption",
        "channel",
        "children",
        "clients",
        "control",
        "dataplane",
        "handover",
        "links",
        "listener",
        "logs",
    ),
    *("net.absorbers", "net.attachments", "net.interfaces", "net.plain"),
    *(
        "own",
        "patterns",
        "reloads",
        "sandbox",
        "scrape_listener",
        "scrapers",
        "service",
        "spare",
        "state",
        "store",
        "subscriptions",
        "supervisor",
        "verbosity",
        "worker",
    ),
)

Change = tuple[LogLevel | None, dict[str, NewLevel]]


def split(texts: Iterable[str]) -> tuple[str | None, dict[str, str]]:
    """LEVEL, which may be written all=LEVEL, and COMPONENT=LEVEL, as typed: the one level, and each component's.
    UsageError if one is given twice."""
    level: str | None = None
    components: dict[str, str] = {}
    for text in texts:
        component, equals, of_component = text.partition("=")
        if equals and component == ALL:
            component, equals = of_component, ""
        if equals:
            if component in components:
                raise UsageError(f"component {component!r} is there twice", "give it one level")
            components[component] = of_component
        elif level is not None:
            raise UsageError(f"both {level!r} and {component!r} are to be the level of all", "give one of them")
        else:
            level = component
    return level, components


def checked(level: str | None, components: Mapping[str, str]) -> Change:
    """The same, or a UsageError that has the nearest names."""
    if level is not None and not _is_level(level):
        if level in COMPONENTS:
            raise UsageError(f"{level!r} is a component, not a level", f"write, for example, {level}=debug")
        raise UsageError(f"there is no log level {_shown(level)}", _nearest(level, LEVELS))
    changes: dict[str, NewLevel] = {}
    for component, of_component in components.items():
        if component not in COMPONENTS:
            raise UsageError(f"there is no component {_shown(component)}", _nearest(component, COMPONENTS))
        if of_component == DEFAULT:
            changes[component] = DEFAULT
        elif _is_level(of_component):
            changes[component] = of_component
        else:
            message = f"{component}={_shown(of_component)[1:-1]}: there is no such log level"
            raise UsageError(message, _nearest(of_component, (*LEVELS, DEFAULT)))
    return level, changes


def changed(levels: Levels, level: LogLevel | None, components: Mapping[str, NewLevel]) -> Levels:
    """These levels with a change. What is no component here is left out."""
    own = {name: of_own for name, of_own in levels.components.items() if name not in components}
    own |= {name: of_own for name, of_own in components.items() if of_own != "default"}
    known: dict[str, LogLevel] = {name: own[name] for name in COMPONENTS if name in own}
    return Levels(levels.level if level is None else level, known)


def _is_level(text: str) -> TypeGuard[LogLevel]:
    return text in LEVELS


def _shown(text: str) -> str:
    """What was typed, if that is not too long."""
    return repr(text if len(text) <= 40 else f"{text[:40]}...")


def _nearest(text: str, names: tuple[str, ...]) -> str:
    """What could have been meant; names are near by their last part, too."""
    by_text = {name: name for name in names} | {name.rpartition(".")[2]: name for name in names}
    near = dict.fromkeys(by_text[match] for match in difflib.get_close_matches(text[:40].lower(), by_text, n=3))
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"there are {', '.join(names)}"

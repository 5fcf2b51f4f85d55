"""Cells: what a text takes of a terminal's line, and how to make it fit.

Names of rules, interfaces and reasons come from others: no character that is more than a picture, such as a control
character or one that changes the direction of writing, may reach a terminal from here. Knows nothing of a terminal but
that it is made of cells, one or two to a character. Also numbers as people read them: 1.2 Mbit/s. Pure.
"""

from __future__ import annotations

import unicodedata
from typing import Final

REPLACEMENT: Final = "?"
ELLIPSIS: Final = "~"  # ASCII, since not every terminal has the other
PREFIXES: Final = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")


def printable(text: str) -> str:
    """The text with a question mark for every character that is not printed as itself."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(character if character.isprintable() else REPLACEMENT for character in text)


def width(text: str) -> int:
    """Cells that a printable text takes."""
    return len(text) if text.isascii() else sum(map(_width, text))


def _width(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def clip(text: str, cells: int) -> str:
    """As much of a printable text as fits; what was cut ends with '~'."""
    if width(text) <= cells:
        return text
    kept: list[str] = []
    left = cells - len(ELLIPSIS)
    if left < 0:
        return ""
    for character in text:
        left -= _width(character)
        if left < 0:
            break
        kept.append(character)
    return "".join(kept) + ELLIPSIS


def fit(text: str, cells: int, *, right: bool = False) -> str:
    """Exactly so many cells of a printable text, flush left or right."""
    text = clip(text, cells)
    room = " " * (cells - width(text))
    return room + text if right else text + room


def human(value: float, unit: str = "") -> str:
    """Three digits at most and a decimal prefix: 999, 1.2k, 35.0 Mbit/s. `unit` brings a space with it."""
    step = 0
    while value >= 999.5 and step < len(PREFIXES) - 1:
        value /= 1000
        step += 1
    digits = f"{value:.0f}" if value >= 99.95 or (step == 0 and value == int(value)) else f"{value:.1f}"
    return f"{digits}{' ' if unit else ''}{PREFIXES[step]}{unit}"

"""mcrelay.toml(5) has every key of the configuration, in its section, with its default, and no other."""

from __future__ import annotations

import re

import pytest

from mcrelay.settings import InterfaceSection, RuleSection, Section, Settings, WorkerSection
from tests.unit.test_style import ROOT

PAGE = (ROOT / "man" / "mcrelay.toml.5").read_text()
SECTIONS: dict[str, type[Section]] = {
    "[[rule]]": RuleSection,
    "[interface.NAME]": InterfaceSection,
    "[worker.N]": WorkerSection,
    **{
        f"[{name}]": type(value)
        for name in Settings.__struct_fields__
        if isinstance(value := getattr(Settings(), name), Section)
    },
}


def text_of(section: str) -> str:
    found = re.search(rf"^\.SH {re.escape(section)}\n(.*?)^\.SH", PAGE, re.MULTILINE | re.DOTALL)
    assert found, section
    return found[1]


def test_every_table_has_its_section() -> None:
    assert set(re.findall(r"^\.SH (\[.*\])$", PAGE, re.MULTILINE)) == set(SECTIONS)


@pytest.mark.parametrize("section", SECTIONS)
def test_every_key_is_there_with_its_default(section: str) -> None:
    entries = dict(re.findall(r"^\.TP\n\.B (\w+)\n(.*?)(?=^\.TP|\Z)", text_of(section), re.MULTILINE | re.DOTALL))
    fields = SECTIONS[section]
    assert list(entries) == list(fields.__struct_fields__)
    if section in ("[[rule]]", "[interface.NAME]", "[worker.N]"):
        return
    for key, text in entries.items():
        default = getattr(fields(), key)
        if default is None or default == {}:
            continue
        shown = f'"{default}"' if isinstance(default, str) else f"{default!r:.5}".lower().removesuffix(".0")
        assert re.search(rf"Default:\s{re.escape(shown)}\.", text), (key, shown)

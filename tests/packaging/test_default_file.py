"""The configuration file that the package installs: all that can be set, with its default."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Final

from mcrelay import config
from mcrelay.settings import InterfaceSection, RuleSection, Settings, WorkerSection

FILE: Final = Path(__file__).resolve().parents[2] / "packaging/mcrelay.toml"
# Which has no default, or is shown by an example.
EXAMPLES: Final = {"socket", "workers", "cores", "user", "listen", "levels"}


def uncommented() -> str:
    """What the file would say without its comment signs."""
    return re.sub(r"^#(?=[a-z\[])", "", FILE.read_text(), flags=re.MULTILINE)


def test_as_installed_it_sets_nothing() -> None:
    read = config.read([(str(FILE), FILE.read_bytes())])
    assert read == config.Configuration(Settings(), ())


def test_it_has_each_setting_with_its_default() -> None:
    shown = tomllib.loads(uncommented())
    for name in ("daemon", "log", "metrics", "events"):
        defaults = getattr(Settings(), name)
        assert set(shown[name]) == set(defaults.__struct_fields__)
        for key, value in shown[name].items():
            assert key in EXAMPLES or value == getattr(defaults, key), f"{name}.{key}"
    assert set(shown["interface"]["eth0"]) == set(InterfaceSection.__struct_fields__)
    assert set(shown["worker"]["0"]) == set(WorkerSection.__struct_fields__)
    assert set(shown["rule"][0]) == set(RuleSection.__struct_fields__)
    assert set(shown) == set(Settings.__struct_fields__)


def test_its_examples_are_right() -> None:
    text = re.sub("^cores = .*", "", uncommented(), flags=re.MULTILINE)  # instead of workers
    assert [rule.name for rule in config.read([("mcrelay.toml", text.encode())]).rules] == ["camera"]

"""Rules saved into configuration files: what changes in them, and what stays."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from mcrelay import config_files, config_text
from mcrelay.config import ConfigError, read
from mcrelay.errors import BadConfig, SystemRefusal, UsageError
from mcrelay.rules import Rule
from mcrelay.ruletext import parse_rule

TEXT = """\
# The relay of hall 3.
[daemon]
workers = 1   # enough

# Cameras.
[[rule]]
name = "one"  # at the door
input = "239.1.1.1:5000%eth0"
output = [
  "239.2.2.1:6000%eth1",  # monitors
]

# Sound.
[[rule]]
name = 'two'
input = "239.1.1.2:5000%eth0"
output = "239.2.2.2:6000%eth1"

[log]
level = "info"
"""
ONE = parse_rule("239.1.1.1:5000%eth0", ["239.2.2.1:6000%eth1"], "one")
TWO = parse_rule("239.1.1.2:5000%eth0", ["239.2.2.2:6000%eth1"], "two")
NEW = parse_rule("239.1.1.3:5000%eth0", ["239.2.2.3:6000%eth1", "239.2.2.4:6000%eth1"], None)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mcrelay.toml"
    path.write_text(TEXT)
    return path


def saved(file: Path, *rules: Rule) -> str:
    config_text.save(str(file), rules)
    assert {rule.id for rule in read(config_files.read_files(str(file))).rules} == {rule.id for rule in rules}
    assert [entry for entry in os.listdir(file.parent) if entry.endswith(".new")] == []
    return file.read_text()


def test_what_is_the_same_stays_as_it_is(file: Path) -> None:
    before = file.stat()
    assert saved(file, TWO, ONE) == TEXT
    assert file.stat() == before  # not even written


def test_a_rule_goes_and_comments_around_it_stay(file: Path) -> None:
    assert saved(file, TWO) == TEXT.replace(TEXT[TEXT.index("[[rule]]") : TEXT.index("\n# Sound.")], "")


def test_a_rule_comes_behind_the_others(file: Path) -> None:
    new = (
        '[[rule]]\ninput = "239.1.1.3:5000%eth0"\n'
        'output = [\n    "239.2.2.3:6000%eth1",\n    "239.2.2.4:6000%eth1",\n]\n'
    )
    assert saved(file, ONE, TWO, NEW) == TEXT.replace("[log]", f"{new}\n[log]")
    for before, behind in (
        (TEXT.replace("\n[log]", "[log]"), TEXT.replace("[log]", f"{new}\n[log]")),
        (TEXT[: TEXT.index("\n[log]")], TEXT[: TEXT.index("[log]")] + new),
        (TEXT[: TEXT.index("\n[log]") - 1], TEXT[: TEXT.index("[log]")] + new),
        (TEXT[: TEXT.index("[log]")] + "# The end.\n", TEXT.replace('[log]\nlevel = "info"\n', f"{new}\n# The end.\n")),
        (TEXT.replace("\n", "\r\n"), TEXT.replace("[log]", f"{new}\n[log]").replace("\n", "\r\n")),
    ):
        file.write_bytes(before.encode())
        saved(file, ONE, TWO, NEW)
        assert file.read_bytes().decode() == behind


def test_a_rule_changes_in_its_place(file: Path) -> None:
    changed = parse_rule("239.1.1.2:5000%eth0", ["239.2.2.2:6000%eth1,paused"], "two")
    assert saved(file, ONE, changed) == TEXT.replace('6000%eth1"\n\n[log]', '6000%eth1,paused"\n\n[log]')


def test_a_name_goes_or_comes(file: Path) -> None:
    nameless = parse_rule("239.1.1.1:5000%eth0", ["239.2.2.1:6000%eth1"], None)
    renamed = parse_rule("239.1.1.2:5000%eth0", ["239.2.2.2:6000%eth1"], "zwei")
    text = saved(file, nameless, renamed)
    assert "at the door" not in text
    assert "zwei" in text


def test_only_what_changes_is_written_anew(file: Path) -> None:
    renamed = parse_rule("239.1.1.1:5000%eth0", ["239.2.2.1:6000%eth1"], "None")
    text = saved(file, renamed, TWO)
    assert text == TEXT.replace('"one"', '"None"')
    nameless = parse_rule("239.1.1.1:5000%eth0", ["239.2.2.1:6000%eth1"], None)
    assert saved(file, nameless, TWO) == TEXT.replace('name = "one"  # at the door\n', "")
    assert saved(file, renamed, TWO).count('name = "None"') == 1


def test_an_output_changes_in_its_list(file: Path) -> None:
    paused = parse_rule("239.1.1.1:5000%eth0", ["239.2.2.1:6000%eth1,paused"], "one")
    assert saved(file, paused, TWO) == TEXT.replace('6000%eth1",  # monitors', '6000%eth1,paused",  # monitors')


@pytest.mark.parametrize(
    ("text", "end"),
    [
        (TEXT.replace("hall", "hall\u0085"), "\n"),
        (TEXT.replace("hall", "hall\u2028"), "\n"),
        (TEXT.replace("\n", "\r\n"), "\r\n"),
    ],
)
def test_a_line_ends_where_toml_has_it_end(file: Path, text: str, end: str) -> None:
    file.write_bytes(text.encode())
    config_text.save(str(file), [TWO])
    gone = text[text.index("[[rule]]") : text.index(f"{end}# Sound.")]
    assert file.read_bytes().decode() == text.replace(gone, "", 1)


def test_each_file_keeps_its_rules(file: Path) -> None:
    (file.parent / "conf.d").mkdir()
    drop_in = file.parent / "conf.d" / "10.toml"
    drop_in.write_text('# more\n[[rule]]\ninput = "239.1.1.3:5000%eth0"\noutput = "239.2.2.3:6000%eth1"\n')
    main = saved(file, ONE, TWO, NEW)
    assert main == TEXT
    assert "239.2.2.4:6000%eth1" in drop_in.read_text()
    saved(file, ONE, TWO)
    assert drop_in.read_text() == "# more\n"


def test_a_new_file_is_made_and_has_nothing_that_a_drop_in_has(tmp_path: Path) -> None:
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d" / "10.toml").write_text(
        '[[rule]]\ninput = "239.1.1.3:5000%eth0"\noutput = "239.2.2.3:6000%eth1"\n'
    )
    assert "239.1.1.3" not in saved(tmp_path / "new.toml", ONE, NEW)
    assert "239.1.1.1:5000%eth0" in saved(tmp_path / "new.toml", ONE)


def test_owner_and_mode_stay(file: Path) -> None:
    file.chmod(0o640)
    saved(file, ONE)
    assert file.stat().st_mode & 0o777 == 0o640


def test_a_link_leads_to_the_same_file(file: Path) -> None:
    link = file.parent / "etc" / "mcrelay.toml"
    link.parent.mkdir()
    link.symlink_to("../mcrelay.toml")
    config_text.save(str(link), [TWO])
    assert link.is_symlink()
    assert "239.1.1.1" not in file.read_text()
    assert os.listdir(link.parent) == ["mcrelay.toml"]


def test_a_file_that_cannot_be_replaced(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(_from: str, _to: str) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    monkeypatch.setattr(os, "replace", busy)
    with pytest.raises(SystemRefusal, match=r"mcrelay.toml: Device or resource busy; it is mounted by itself"):
        config_text.save(str(file), [ONE])
    assert file.read_text() == TEXT
    assert os.listdir(file.parent) == ["mcrelay.toml"]


def test_a_broken_file_is_not_touched(file: Path) -> None:
    file.write_text(TEXT + "nonsense = 1\n")
    with pytest.raises(ConfigError):
        config_text.save(str(file), [ONE])
    assert file.read_text() == TEXT + "nonsense = 1\n"


def test_a_file_that_is_written_in_another_way_is_not_touched(file: Path) -> None:
    text = 'rule = [{input = "239.1.1.1:5000%eth0", output = "239.2.2.1:6000%eth1"}]\n'
    file.write_text(text)
    with pytest.raises(BadConfig, match=f"{file}:1: the rules are not written as"):
        config_text.save(str(file), [TWO])
    assert file.read_text() == text


@pytest.mark.parametrize("name", ["-", "/dev/stdin"])
def test_nothing_is_saved_to_standard_input(name: str) -> None:
    with pytest.raises(UsageError, match="nothing can be saved"):
        config_text.save(name, [ONE])


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SystemRefusal, match="cannot write"):
        config_text.save(str(tmp_path / "none" / "x.toml"), [ONE])

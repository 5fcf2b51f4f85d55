"""What docs/ tells people to paste can be pasted. Whether it also works, tests/e2e/test_programs.py sees."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.recipes import RECIPES, ROOT, addition, commands, removals, rules
from mcrelay.cycles import check_no_cycle
from mcrelay.rules import RuleSet
from mcrelay.ruletext import parse_rule

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGE_NAMES = sorted(page.stem for page in RECIPES.glob("*.md") if page.name != "README.md")
INLINE = re.compile(r"`(?:sudo )?mcrelay (add [^`]+)`")


def additions(page: Path) -> Iterator[list[str]]:
    """Of code blocks, and of code within a line that is a whole command."""
    yield from commands(page, "add")
    for match in INLINE.finditer(page.read_text()):
        if "%" in match[1]:
            yield shlex.split(match[1])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_rule_in_the_documentation_parses(page: Path) -> None:
    for arguments in additions(page):
        parse_rule(*addition(arguments))


def test_commands_are_found() -> None:
    assert sum(len(list(additions(page))) for page in PAGES) > 20
    assert len(PAGE_NAMES) >= 9


@pytest.mark.parametrize("page", PAGE_NAMES)
def test_a_page_has_what_each_has_and_its_rules_go_together(page: str) -> None:
    text = (RECIPES / f"{page}.md").read_text()
    assert re.findall(r"^## (.*)$", text, re.MULTILINE)[-3:] == ["Commands", "What to see", "When it does not work"]
    assert f"({page}.md)" in (RECIPES / "README.md").read_text()
    added = [parse_rule(*given) for given in rules(page)]
    assert [rule.name for rule in added] == removals(page), "not all is named, or removed"
    check_no_cycle(added, RuleSet.of(added).fed_by, lambda _target: ())


def test_a_line_that_goes_on_is_one_command(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "mcrelay add not:1%code\n\n"
        "    sudo mcrelay add 239.1.1.1:5000%eth0 \\\n        239.2.2.2:6000%eth1 --name a    # why\n"
        "    mcrelay add INPUT OUTPUT... [--name NAME]\n    mcrelay list\n"
    )
    assert list(commands(page, "add")) == [
        ["add", "239.1.1.1:5000%eth0", "239.2.2.2:6000%eth1", "--name", "a"],
    ]

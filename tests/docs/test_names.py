"""What the README and the guides name is there, and what there is to call is named."""

import re
from pathlib import Path

from helmholtz.cli.main import GROUPS, usage

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(page for page in sorted((ROOT / "docs").rglob("*.md")) if page.name != "LOG.md"),
]
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
CODE = re.compile(r"^```.*?^```|`[^`\n]+`", re.MULTILINE | re.DOTALL)


def named_targets(text):
    """Targets of ``make`` in blocks and spans of code."""
    code = "\n".join(match[0] for match in CODE.finditer(text))
    return {name for words in re.findall(r"\bmake((?: [a-z][a-z-]*)+)", code) for name in words.split()}


def test_the_readme_lists_every_command():
    groups = re.findall(r"^ {26}([a-z ]+): ([a-z |]+)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert {title: names.split(" | ") for title, names in groups} == {
        title: list(commands) for title, commands in GROUPS.items()
    }


def test_the_page_of_the_command_line_begins_with_what_its_help_says():
    assert (
        (ROOT / "docs" / "command-line.md")
        .read_text()
        .startswith(f"# The command line\n\n```\n{usage()}\n```\n")
    )


def test_every_make_target_that_is_named_exists():
    missing = {
        f"{page.relative_to(ROOT)}: make {name}"
        for page in PAGES
        for name in named_targets(page.read_text()) - TARGETS
    }
    assert not missing


def test_the_readme_names_the_targets_that_everybody_needs():
    assert {"setup", "demo", "test"} <= named_targets((ROOT / "README.md").read_text())

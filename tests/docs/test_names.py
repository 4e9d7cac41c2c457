"""What the README and the guides name is there, and what there is to call is named."""

import contextlib
import functools
import importlib
import pkgutil
import re
from pathlib import Path

import helmholtz
from helmholtz.cli.main import GROUPS, usage

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(page for page in sorted((ROOT / "docs").rglob("*.md")) if page.name != "LOG.md"),
]
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
UNRELATED = {"data.folder", "data.py", "models.py"}
"""A setting, and files of an experiment."""
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


def test_every_file_and_name_of_the_package_that_is_named_exists():
    folders = [ROOT, ROOT / "src" / "helmholtz", ROOT / "docs"]
    packages = {module.name for module in pkgutil.iter_modules(helmholtz.__path__)}
    missing = set()
    for page in PAGES:
        if page.parent.name == "design" or page.name.startswith("migrating"):  # which tell of what was
            continue
        for span in re.findall(r"`([^`\n]+)`", page.read_text()):
            file = re.fullmatch(r"(\w+/[\w./-]+\.(?:py|md|yaml|sbatch|toml))", span)
            dotted = re.fullmatch(r"(?:helmholtz\.)?((\w+)\.[\w.]+)", span)
            known = not dotted or dotted[2] not in packages or dotted[1] in UNRELATED or exists(dotted[1])
            if not known or (file and not any((folder / span).exists() for folder in folders)):
                missing.add(f"{page.name}: {span}")
    assert missing <= {"CONTRIBUTING.md: docs/design/NNN-name.md"}


def exists(name):
    """Whether ``name`` is a module of the package, or something in one."""
    parts = name.split(".")
    for split in range(len(parts), 0, -1):
        with contextlib.suppress(ImportError):
            found = importlib.import_module(".".join(["helmholtz", *parts[:split]]))
            return (
                functools.reduce(lambda at, part: getattr(at, part, None), parts[split:], found) is not None
            )
    return False

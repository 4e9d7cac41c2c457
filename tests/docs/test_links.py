"""Links between the pages of the repository lead to files and headings that are there; those of the site are also
checked by ``make docs``."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    *(page for page in ROOT.glob("*.md") if page.name != "CHANGELOG.md"),
    *(ROOT / "docs").rglob("*.md"),
    *ROOT.glob("*/README.md"),
]
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
BUILT = {"report/index.html"}
"""What ``make docs`` puts beside the pages."""


def anchors(page):
    """Of the headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ +(.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_no_link_is_dead(page):
    dead = []
    for target in LINK.findall(FENCE.sub("", page.read_text())):
        if re.match(r"[a-z]+:", target) or target in BUILT:
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            dead.append(target)
    assert not dead


def test_the_readme_leads_everywhere_in_two_clicks():
    def targets(page):
        names = (target.partition("#")[0] for target in LINK.findall(page.read_text()))
        found = ((page.parent / name).resolve() for name in names if name and not name.startswith("http"))
        return {file for file in found if file.suffix == ".md" and file.exists()}

    first = targets(ROOT / "README.md")
    second = first.union(*map(targets, first))
    guides = {page for page in (ROOT / "docs").glob("*.md") if page.name != "index.md"}
    assert guides <= second, sorted(page.name for page in guides - second)

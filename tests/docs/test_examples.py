"""The Python blocks of the README and of the guides run as written."""

import ast
import re
from pathlib import Path
from unittest import mock

import pytest

from helmholtz.models import MODELS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
SIGNATURES = {
    "docs/design/001-foundation.md",
    "docs/design/004-free-transformer.md",
    "docs/design/005-mamba-hopfield.md",
}  # lists signatures, in the shape of Python but not to be run
TOO_LONG_TO_RUN = {"docs/training.md"}  # trains for minutes: its blocks are compiled, its imports run


def blocks(page):
    """Source of each block, padded so that line numbers in tracebacks are those of the page."""
    text = page.read_text()
    return ["\n" * text[: match.start(1)].count("\n") + match[1] for match in BLOCK.finditer(text)]


RUNNABLE = {page.relative_to(ROOT).as_posix(): blocks(page) for page in PAGES}


def _imports(block):
    tree = ast.parse(block)
    tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    return tree


@pytest.mark.parametrize(
    "page", sorted(page for page, found in RUNNABLE.items() if found and page not in SIGNATURES)
)
def test_blocks_of_a_page_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    with mock.patch.dict(MODELS):  # a page may add a model of its own
        for block in RUNNABLE[page]:
            exec(compile(_imports(block) if page in TOO_LONG_TO_RUN else block, page, "exec"), names)


def test_there_are_blocks_to_run():
    assert "docs/data.md" in RUNNABLE
    assert RUNNABLE["docs/data.md"]


def test_a_mixer_of_ones_own_in_a_hybrid_takes_less_than_40_lines():
    (block,) = [block for block in RUNNABLE["docs/how-to-extend.md"] if "AbstractMixerConfig):" in block]
    assert all(word in block for word in ("DecoderConfig", ".fit()", "generate(", '"attention"', '"fem"'))
    assert len([line for line in block.splitlines() if line]) < 40

"""The lists of ``tools/mutants.py`` fit the code: a mutant that no longer applies tests nothing."""

import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LISTS = sorted((ROOT / "tools" / "mutants").glob("*.toml"))


@pytest.mark.parametrize("path", LISTS, ids=lambda path: path.stem)
def test_every_mutant_changes_one_place_and_names_a_test(path):
    for mutant in tomllib.loads(path.read_text())["mutant"]:
        code = (ROOT / "src" / "helmholtz" / mutant["file"]).read_text()
        assert code.count(mutant["find"]) == 1, mutant["find"]
        assert mutant["replace"] != mutant["find"]
        file, _, name = mutant["test"].partition("::")
        assert not name or f"def {name.partition('[')[0]}(" in (ROOT / file).read_text(), mutant["test"]
        assert (ROOT / file).exists(), mutant["test"]

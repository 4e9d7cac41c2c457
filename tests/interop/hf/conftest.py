"""A tiny run, trained once, and what it exports."""

import pytest

from helmholtz.interop.hf import export
from helmholtz.training.run import train
from tiny_runs import prepare_text, tiny_run


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf_run")
    train(tiny_run(prepare_text(folder), folder / "run", steps=12))
    return folder / "run"


@pytest.fixture(scope="session")
def exported(run_folder):
    return export(run_folder, run_folder.parent / "tiny", license="cc0-1.0").folder

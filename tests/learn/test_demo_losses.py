"""The first ten losses of the demo's models, those that commit 252ba62 gave (``tools/write_checkpoints.py``)."""

import hashlib
import json

import pytest

from helmholtz.cli.main import main
from old_numbers import DEMO, DEMO_BASE, DEMO_LOSSES, DEMO_STEPS, demo_steps

pytestmark = pytest.mark.learn
STORED = json.loads(DEMO_LOSSES.read_text())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "data"
    assert main(["data", f"--config={DEMO_BASE}", f"--data.folder={folder}"]) == 0
    assert hashlib.sha256((folder / "train.bin").read_bytes()).hexdigest() == STORED["data"]
    return folder


def test_every_model_of_the_demo_is_here():
    assert set(STORED["steps"]) == {file.stem for file in DEMO.glob("*.yaml")}


@pytest.mark.parametrize("name", STORED["steps"])
def test_the_first_losses_are_those_they_were(name, data):
    found, stored = demo_steps(name, data), STORED["steps"][name]
    assert len(found) == len(stored) == DEMO_STEPS
    for now, before in zip(found, stored, strict=True):
        assert now == pytest.approx(before, rel=1e-5)  # loss and gradient norm

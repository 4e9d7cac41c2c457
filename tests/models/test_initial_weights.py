"""The same seeds give at 0.02 the initial weights that they gave at commit 252ba62, and configs fill in the same sizes.

``initial_weights.json`` is from ``tools/write_checkpoints.py``. Normal draws may round otherwise on other processors.
"""

import json

import pytest

from old_numbers import INITIAL_WEIGHTS, SEED, differences, fingerprint, initial_model

STORED = json.loads(INITIAL_WEIGHTS.read_text())


@pytest.mark.parametrize("name", STORED["models"])
def test_a_seed_gives_the_weights_it_gave(name: str) -> None:
    stored = STORED["models"][name]
    assert STORED["seed"] == SEED
    model = initial_model(stored["architecture"], stored["options"])
    assert json.loads(json.dumps(model.config.to_dict())) == stored["config"] | {"initializer_range": 0.02}
    found = fingerprint(model)
    shapes = {tensor: value["shape"] for tensor, value in found["tensors"].items()}
    assert shapes == {tensor: value["shape"] for tensor, value in stored["tensors"].items()}
    if found["sha256"] != stored["sha256"]:
        far = {tensor: error for tensor, error in differences(found, stored).items() if error > 1e-6}
        assert not far

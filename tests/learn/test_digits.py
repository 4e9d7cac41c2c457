"""``make learn``: both vision transformers learn the digits, at the sizes of the study and with other seeds."""

import pytest

from helmholtz.experiments.vision.data import digits
from helmholtz.experiments.vision.run import compute_vision, vision_runs


@pytest.mark.learn
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("model", ["attention", "fem"])
@pytest.mark.parametrize("seed", [3, 4, 5])
def test_digits_are_learnt(model, seed):
    data = digits()
    (run,) = vision_runs([data], [model], [seed])
    result = compute_vision(run, {"digits": data})
    assert result["test"]["accuracy"] > 0.93
    assert sum(result["confusion"][i][i] for i in range(10)) == round(400 * result["test"]["accuracy"])

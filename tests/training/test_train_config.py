import re

import pytest
import torch

from helmholtz.training.config import TrainConfig
from helmholtz.training.loop import float32_products


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"steps": 0}, "train.steps must be an integer of at least 1, got 0"),
        ({"lr": float("nan")}, "train.lr must be a finite number above 0, got nan"),
        ({"lr": -1.0}, "train.lr must be a finite number above 0, got -1.0"),
        ({"steps": 10, "warmup_steps": 10}, "train.warmup_steps must be below 10 steps, got 10"),
        ({"betas": (0.9, 1.0)}, "train.betas must be in [0, 1), got 1.0"),
        ({"min_lr_ratio": 1.5}, "train.min_lr_ratio must be in [0, 1], got 1.5"),
        ({"seed": -1}, "train.seed must be an integer of at least 0, got -1"),
        ({"output_dir": ""}, "train.output_dir must be the name of a folder, got ''"),
    ],
)
def test_a_bad_setting_is_named_with_its_value(setting, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TrainConfig(**setting)


def test_settings_that_may_change_on_resumption_are_not_part_of_the_numerics():
    one = TrainConfig(output_dir="a", threads=1, save_every=3, resume="never")
    two = TrainConfig(output_dir="b", threads=2, save_every=7, resume="auto")
    assert one.numerics() == two.numerics()
    assert one.numerics() != TrainConfig(output_dir="a", lr=1e-3).numerics()
    assert (
        one.numerics() != TrainConfig(output_dir="a", eval_every=3).numerics()
    )  # it decides which state is best


def test_products_as_they_always_were_are_not_in_the_identity_of_a_run():
    """Runs that were begun before there was a choice go on."""
    assert "matmul_precision" not in TrainConfig().numerics()
    assert TrainConfig(matmul_precision="high").numerics()["matmul_precision"] == "high"


def test_the_precision_of_products_is_put_back():
    before = torch.get_float32_matmul_precision()
    with float32_products("high"):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before

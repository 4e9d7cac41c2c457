import pytest
import torch

from helmholtz.training.order import window_starts

SETTINGS = {"n_tokens": 107, "seq_len": 10, "seed": 3}


def test_an_epoch_reads_every_window_once_and_stays_inside_the_text():
    for epoch in range(5):
        starts = window_starts(9 * epoch, 9, **SETTINGS).sort().values
        assert starts.diff().eq(10).all()
        assert 0 <= starts[0] < 10
        assert starts[-1] + 11 <= 107


def test_the_order_is_a_function_of_seed_and_position():
    whole = window_starts(0, 40, **SETTINGS)
    pieces = torch.cat([window_starts(first, 8, **SETTINGS) for first in range(0, 40, 8)])
    assert torch.equal(whole, pieces)
    assert not torch.equal(whole, window_starts(0, 40, **SETTINGS | {"seed": 4}))
    assert not torch.equal(whole[:9], whole[9:18])


def test_the_order_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    window_starts(90, 9, **SETTINGS | {"seed": 77})
    assert torch.equal(before, torch.get_rng_state())


def test_a_text_too_short_for_a_window_is_refused():
    with pytest.raises(
        ValueError, match="the training text has 19 tokens; train.seq_len = 10 needs at least 20"
    ):
        window_starts(0, 1, n_tokens=19, seq_len=10, seed=0)
    assert window_starts(5, 1, n_tokens=20, seq_len=10, seed=0).item() <= 9

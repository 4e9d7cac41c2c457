import pytest
import torch

from helmholtz import reference
from helmholtz.ops.row_random import _mixed, row_keys, row_uniform

ROWS = torch.arange(64)


def draw(seed=0, rows=ROWS, shape=(50, 20), site=0, dtype=torch.float32):
    return row_uniform(row_keys(seed, rows), shape, site=site, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_are_uniform_in_every_row_and_at_every_place(dtype):
    u = draw(rows=torch.arange(500), dtype=dtype).double()
    assert 0 <= u.min() < 1e-4
    assert 1 - 1e-4 < u.max() < 1
    count = torch.histc(u.flatten(), bins=50, min=0, max=1)
    expected = u.numel() / 50
    assert (count - expected).square().sum() / expected < 95  # chi square of 49 degrees: 99.99 %
    for means in (u.mean((1, 2)), u.mean(0).flatten()):
        deviation = (means - 0.5) / (means.numel() / 12 / u.numel()) ** 0.5
        assert deviation.abs().max() < 5


def test_numbers_of_rows_places_seeds_and_sites_are_independent():
    base = draw().flatten(1) - 0.5
    others = [
        draw(seed=1).flatten(1),
        draw(site=1).flatten(1),
        draw(site=-2).flatten(1),
        draw(rows=ROWS + 1).flatten(1),
        draw().flatten(1).roll(1, dims=1),
        draw(rows=ROWS + 2**32).flatten(1),
    ]
    for other in others:
        correlation = (base * (other - 0.5)).mean() * 12
        assert abs(correlation) < 5 / base.numel() ** 0.5


def test_a_row_depends_on_its_key_alone():
    whole = draw()
    for rows in (ROWS[7:9], ROWS.flip(0), ROWS[[3, 3]]):
        assert torch.equal(draw(rows=rows), whole[rows])
    assert torch.equal(draw(shape=(25, 20)), whole[:, :25])


def test_keys_differ():
    keys = torch.cat([row_keys(seed, torch.arange(10000)) for seed in (0, 1, 2, 2**31)])
    assert len(keys.unique()) == len(keys)


def test_the_mixing_function_is_splitmix64():
    """Its first outputs from state 0, as published with the algorithm."""
    state = torch.arange(1, 4) * (0x9E3779B97F4A7C15 - 2**64)
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [int(x) % 2**64 for x in _mixed(state)] == published


def test_numbers_are_those_of_the_reference():
    rows = torch.tensor([0, 5, 2**40, 7])
    for seed in (0, 3, 2**32 + 1):
        keys = row_keys(seed, rows)
        assert torch.equal(keys, reference.row_keys(seed, rows))
        for site in (0, 3, -2):
            expected = reference.row_uniform(keys, (3, 5), site=site)
            assert torch.equal(row_uniform(keys, (3, 5), site=site, dtype=torch.float64), expected)
            coarse = (expected * 2**24).floor() / 2**24
            assert torch.equal(row_uniform(keys, (3, 5), site=site).double(), coarse)


def test_another_dtype_is_refused():
    with pytest.raises(ValueError, match=r"dtype must be torch.float32 or torch.float64, got torch.float16"):
        draw(dtype=torch.float16)

import pytest
import torch

from helmholtz.layers.row_draws import RowDropout, drawn_by_row, number_dropouts
from helmholtz.models.free_transformer import FreeTransformer, FreeTransformerConfig
from helmholtz.ops.row_random import row_keys

KEYS = row_keys(3, torch.arange(6))


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 16}
    return FreeTransformer(FreeTransformerConfig(**sizes, n_latent_bits=4, dropout=0.3)).train()


def tokens():
    return torch.arange(60).view(6, 10) % 11


def test_dropout_scales_what_it_keeps_and_drops_its_share():
    layer = RowDropout(0.25)
    x = torch.ones(6, 100, 100)
    with drawn_by_row(KEYS):
        y = layer(x)
        assert torch.equal(y, layer(x)), "the same mask again, as recomputation needs"
    assert y.unique().tolist() == [0.0, pytest.approx(1 / 0.75)]
    assert (y == 0).float().mean() == pytest.approx(0.25, abs=0.01)
    assert layer.eval()(x) is x


def test_every_dropout_of_a_model_has_masks_of_its_own(model):
    layers = [module for module in model.modules() if isinstance(module, RowDropout)]
    assert len({layer.site for layer in layers}) == len(layers) > 4
    with drawn_by_row(KEYS):
        masks = [layer(torch.ones(6, 8, 8)) for layer in layers]
    for index, mask in enumerate(masks):
        assert not any(torch.equal(mask, other) for other in masks[:index])


def test_rows_of_a_training_pass_do_not_depend_on_the_batch(model):
    """Dropout, and the plans of posterior and prior."""

    def logits_and_plans(rows):
        with drawn_by_row(KEYS[rows]):
            half = model.lower(tokens()[rows])
            plan = model.sample_posterior(half)
            return model.upper(half, plan).logits, plan.code, model.sample_prior(len(rows), 10).code

    whole = logits_and_plans(torch.arange(6))
    part = logits_and_plans(torch.tensor([4, 1]))
    torch.testing.assert_close(part[0], whole[0][[4, 1]], rtol=1e-5, atol=1e-6)
    assert torch.equal(part[1], whole[1][[4, 1]])
    assert torch.equal(part[2], whole[2][[4, 1]])
    assert not torch.equal(part[1], part[2])


def test_outside_of_the_block_the_global_generator_draws(model):
    with drawn_by_row(KEYS):
        pass
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(model(tokens()).logits)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_the_block_ends_also_with_an_error():
    layer = RowDropout(0.5)
    with pytest.raises(KeyError), drawn_by_row(KEYS):
        raise KeyError
    layer(torch.ones(3, 4))  # three rows: six keys would not fit


def test_numbering_starts_at_0():
    layers = torch.nn.Sequential(RowDropout(0.1), torch.nn.Sequential(RowDropout(0.1)))
    number_dropouts(layers)
    assert [layers[0].site, layers[1][0].site] == [0, 1]

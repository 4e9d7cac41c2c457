"""The inner loop of ``generate`` against ``model.step``, which the other tests hold to the full pass."""

import pytest
import torch
from torch import nn

from helmholtz.layers.latent import Plan
from helmholtz.models import decoding
from helmholtz.models.base import AbstractDecoder
from helmholtz.models.decoding import TokenDecoder, is_plain
from helmholtz.models.fem_lm import FEMLM, FEMLMConfig
from helmholtz.models.free_transformer import FreeTransformer, FreeTransformerConfig
from helmholtz.models.generation import SamplingSettings, generate
from helmholtz.models.transformer import Transformer, TransformerConfig

SIZES = dict(vocab_size=40, d_model=32, n_layers=3, n_heads=4, max_seq_len=64, norm_eps=1e-3)


def livened(model: AbstractDecoder) -> AbstractDecoder:
    """Weights large enough that every part of the model matters, all norms included."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
        elif parameter.ndim == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return model.eval()


MODELS = {
    "transformer": lambda: Transformer(TransformerConfig(**SIZES, tie_embeddings=False)),
    "grouped": lambda: Transformer(TransformerConfig(**SIZES, n_kv_heads=2, rope_theta=100.0)),
    "free": lambda: FreeTransformer(FreeTransformerConfig(**SIZES, n_latent_bits=5, split_layer=2)),
    "free-first": lambda: FreeTransformer(
        FreeTransformerConfig(**SIZES, n_kv_heads=1, n_latent_bits=3, split_layer=1, post_sampler="bits")
    ),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_gives_the_logits_of_step(name: str, padded: bool, dtype: torch.dtype) -> None:
    model = livened(MODELS[name]()).to(dtype)
    tokens, codes = torch.randint(40, (3, 20)), torch.randint(8, (3, 20))
    mask = torch.arange(8) >= torch.tensor([[3], [0], [7]]) if padded else None
    given = (lambda part: {"z": Plan(codes[:, part])}) if "free" in name else lambda part: {}
    state = model.step(tokens[:, :8], model.init_state(3), attention_mask=mask, **given(slice(0, 8))).state
    decoder = TokenDecoder(model, state, mask)
    # float32 angles limit float64
    scale = {torch.float32: 1e-5, torch.float64: 1e-6, torch.bfloat16: 0.1}[dtype]
    for t in range(8, 20):
        here = slice(t, t + 1)
        output = model.step(tokens[:, here], state, **given(here))
        state = output.state
        plan = model.post_sampler(Plan(codes[:, here])) if "free" in name else None
        got = decoder.step(tokens[:, here], plan)
        torch.testing.assert_close(got, output.logits[:, -1], rtol=scale, atol=scale)


def test_a_model_with_hooks_or_replaced_modules_is_not_plain() -> None:
    model = livened(MODELS["free"]())
    assert is_plain(model)
    handle = model.blocks[1].mlp.down_proj.register_forward_hook(lambda *_: None)
    assert not is_plain(model)
    handle.remove()
    model.blocks[1].mlp.down_proj = nn.Sequential(model.blocks[1].mlp.down_proj)
    assert not is_plain(model)
    assert not is_plain(FEMLM(FEMLMConfig(vocab_size=9, d_model=32, n_layers=1, n_heads=2)))


@pytest.mark.parametrize("name", MODELS)
def test_what_is_sampled_does_not_depend_on_the_way(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = livened(MODELS[name]()), [[1, 2, 3, 4], [5], [6, 7]]
    settings = SamplingSettings(max_new_tokens=20, seed=3)
    direct = generate(model, prompts, settings)
    calls = []
    monkeypatch.setattr(decoding.TokenDecoder, "step", lambda *_: calls.append(1))
    handle = model.norm.register_forward_hook(lambda *_: None)
    assert generate(model, prompts, settings) == direct
    handle.remove()
    assert not calls

"""The Mamba decoder: its config, its sizes, what it does not have, gradients by recomputation."""

import pytest
import torch

from decoder_cases import liven, tokens_of
from helmholtz import Mamba, MambaConfig, Transformer
from helmholtz.models import mamba, transformer
from helmholtz.models.decoder import Decoder
from helmholtz.ops.losses import cross_entropy


def make_model(**fields: object) -> Decoder:
    torch.manual_seed(1)
    sizes = {"vocab_size": 37, "d_model": 32, "n_layers": 3, "d_state": 8, "d_head": 16}
    return liven(Mamba(MambaConfig(**sizes | fields)))


def size(model: Decoder) -> int:
    return sum(p.numel() for p in model.parameters()) - model.embed.weight.numel()


def test_config_is_completed_and_plain() -> None:
    config = MambaConfig(vocab_size=10, d_model=64)
    assert (config.d_inner, config.d_state, config.d_conv, config.d_head) == (128, 64, 4, 64)
    assert MambaConfig.from_dict(config.to_dict()) == config
    assert not {"n_heads", "d_ff", "rope_theta"} & config.to_dict().keys()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"d_head": 24}, "d_head must divide d_inner, got d_head=24 and d_inner=64"),
        ({"d_inner": 100}, "d_head must divide d_inner, got d_head=64 and d_inner=100"),
        ({"d_state": 0}, "d_state must be an integer of at least 1, got 0"),
        ({"d_conv": 0}, "d_conv must be an integer of at least 1, got 0"),
        ({"vocab_size": 0}, "vocab_size must be an integer of at least 1, got 0"),
    ],
)
def test_bad_sizes_are_refused(fields: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MambaConfig(**{"vocab_size": 10, "d_model": 32} | fields)


def test_attention_options_are_unknown() -> None:
    with pytest.raises(ValueError, match="MambaConfig has no key 'n_heads'"):
        MambaConfig.from_dict({"vocab_size": 10, "n_heads": 4})


@pytest.mark.parametrize("name", ["small", "medium"])
def test_presets_have_the_size_of_the_baseline(name: str) -> None:
    with torch.device("meta"):
        ours = size(Mamba(getattr(mamba, name)(100)))
        theirs = size(Transformer(getattr(transformer, name)(100)))
    assert abs(ours / theirs - 1) < 0.05


def test_a_block_is_norm_mixer_and_residual_alone() -> None:
    model, tokens = make_model(), tokens_of(2, 20)
    x = model.embed(tokens)
    for block in model.blocks:
        x = x + block.mixer(block.mixer_norm(x))
    assert torch.equal(model(tokens).logits, model.unembed(model.norm(x)))


def test_what_a_block_writes_is_scaled_by_depth() -> None:
    torch.manual_seed(0)
    model = Mamba(MambaConfig(vocab_size=5, d_model=128, n_layers=8))
    for block in model.blocks:
        assert block.mixer.o_proj.weight.std().item() == pytest.approx((3 * 256 * 8) ** -0.5, rel=0.05)


def test_gradient_checkpointing_changes_no_gradient_and_keeps_less() -> None:
    model, tokens, kept = make_model(), tokens_of(2, 33), []

    def gradients() -> list[torch.Tensor]:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda z: (sizes.append(z.numel()), z)[1], lambda z: z):
            loss = cross_entropy(model(tokens[:, :-1]).logits, tokens[:, 1:])
        kept.append(sum(sizes))
        return list(torch.autograd.grad(loss, list(model.parameters())))

    plain = gradients()
    model.gradient_checkpointing_enable()
    recomputed = gradients()
    model.gradient_checkpointing_disable()
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))
    assert kept[1] < kept[0] / 2
    gradients()
    assert kept[2] == kept[0]

"""A mixer of one's own in a decoder's layers: built, saved, loaded and refused as the library's are."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from helmholtz.cli.inspect import budget_lines, stack_table
from helmholtz.interop.hf import HelmholtzForCausalLM
from helmholtz.layers import AbstractMixer, AbstractMixerConfig, Attention
from helmholtz.layers.state import KVCache
from helmholtz.models.base import LayerConfig
from helmholtz.models.checkpoint import load_checkpoint, save_checkpoint
from helmholtz.models.decoder import Decoder
from helmholtz.models.decoder_config import DecoderConfig


class Shifted(AbstractMixer[KVCache]):
    """Attention, and a constant on top of it."""

    def __init__(self, d_model, shift, causal):
        super().__init__()
        self.d_model, self.causal = d_model, causal
        self.inner = Attention(d_model, 2, causal=causal)
        self.o_proj = nn.Linear(d_model, d_model)
        self.shift = nn.Parameter(torch.full((d_model,), shift))

    def init_state(self, batch_size):
        return self.inner.init_state(batch_size)

    def _mix(self, x, source, layout, state):
        found = self.inner(x, source=source, layout=layout, state=state)
        mixed, after = (found, None) if state is None else found
        return self.o_proj(mixed + self.shift), after


@dataclass(frozen=True, slots=True, kw_only=True)
class ShiftedConfig(AbstractMixerConfig):
    kind: str = "shifted"
    shift: float = 0.5
    causal: bool = True

    def build(self):
        return Shifted(self.d_model, self.shift, self.causal)


@dataclass(frozen=True, kw_only=True)
class Impostor(AbstractMixerConfig):
    kind: str = "attention"

    def build(self):
        raise AssertionError("the library's own kinds are not taken over")


LAYERS = [
    {"mixer": {"kind": "attention", "n_heads": 2}, "d_ff": 24},
    {"mixer": {"kind": "shifted", "shift": 2.0}},
]
PARTS = [{}, {"plan": {"layer": 1, "n_bits": 3}}, {"equilibrium": {"d_head": 16, "n_patterns": 8}}]


def config_with(parts):
    return DecoderConfig.from_dict(
        {"vocab_size": 11, "d_model": 16, "max_seq_len": 32, "layers": LAYERS} | parts
    )


@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_checkpoints_and_hugging_face_folders_hold_it(parts, tmp_path):
    model = Decoder(config_with(parts)).eval()
    assert isinstance(model.blocks[1].mixer, Shifted) and isinstance(model.blocks[0].mixer, Attention)
    assert model.blocks[1].mixer.shift.tolist() == [2.0] * 16
    tokens = torch.randint(11, (2, 9))
    plan = (
        {}
        if model.plan is None
        else {"z": model.sample_prior(2, 9, generator=torch.Generator().manual_seed(0))}
    )
    save_checkpoint(model, tmp_path / "ours")
    loaded = load_checkpoint(tmp_path / "ours")
    assert loaded.config == model.config
    HelmholtzForCausalLM.of(model).save_pretrained(tmp_path / "theirs")
    theirs = HelmholtzForCausalLM.from_pretrained(tmp_path / "theirs").model.eval()
    with torch.no_grad():
        for other in (loaded, theirs):
            assert torch.equal(other(tokens, **plan).logits, model(tokens, **plan).logits)


def test_inspect_shows_it():
    model = Decoder(config_with({}))
    assert list(stack_table(model).columns[1].cells) == ["attention", "shifted"]
    assert len(budget_lines(model)) == 2


def test_what_it_must_be_is_said():
    with pytest.raises(
        ValueError, match=r"layers\[1\].mixer.kind must be one of \['attention', 'fem', 'mamba', .*'shifted'"
    ):
        config_with({"layers": [LAYERS[0], {"mixer": {"kind": "unheard of"}}]})
    with pytest.raises(ValueError, match=r"layers\[0\].mixer.*'shif'.*'shift'"):
        config_with({"layers": [{"mixer": {"kind": "shifted", "shif": 1.0}}]})
    with pytest.raises(ValueError, match=r"layers\[0\].mixer.causal must be true"):
        config_with({"layers": [{"mixer": {"kind": "shifted", "causal": False}}]})
    with pytest.raises(ValueError, match=r"layers\[0\].mixer.d_model must be d_model = 16, got 8"):
        DecoderConfig(vocab_size=11, d_model=16, layers=[LayerConfig(mixer=ShiftedConfig(d_model=8))])


def test_a_mixer_that_sees_later_tokens_is_refused_whatever_its_config_says():
    class Deceiving(Decoder):
        def build_mixer(self, layer):
            return Attention(16, 2, causal=False)

    with pytest.raises(ValueError, match=r"layers\[0\].mixer.causal must be true"):
        Deceiving(config_with({}))


def test_of_a_class_that_is_defined_again_the_last_counts():
    def define():
        @dataclass(frozen=True, slots=True, kw_only=True)
        class Again(ShiftedConfig):
            kind: str = "again"

        return Again

    first, last = define(), define()
    (layer,) = config_with({"layers": [{"mixer": {"kind": "again"}}]}).layers
    assert type(layer.mixer) is last is not first

"""An output matrix that is no longer the embedding: whatever is saved and loaded again computes the same."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrizations

from decoder_cases import liven
from helmholtz.interop.hf import HelmholtzForCausalLM, from_hf
from helmholtz.interop.seeds import checkpoints as seeds
from helmholtz.models import MODELS
from helmholtz.models.checkpoint import load_checkpoint, read_config, save_checkpoint
from helmholtz.models.decoder import Decoder
from helmholtz.models.tied import is_tied
from helmholtz.training.checkpoint import save_run
from hf_cases import CORES

TOKENS = torch.arange(12).view(2, 6)
TIED = {type(core()): name for name, core in reversed(CORES.items()) if core().config.tie_embeddings}
EACH = pytest.mark.parametrize("name", TIED.values())


def test_every_architecture_is_among_the_cases() -> None:
    assert set(TIED) == set(MODELS.values())


def make(name: str) -> Decoder:
    torch.manual_seed(1)
    return liven(CORES[name]())


def logits(model: Decoder) -> torch.Tensor:
    torch.manual_seed(3)  # of a free transformer's plan
    with torch.no_grad():
        return model(TOKENS).logits


def with_two(model: Decoder) -> dict[str, torch.Tensor]:
    """A state dict with a head of its own."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return state | {"unembed.weight": torch.randn_like(state["embed.weight"])}


def on_meta(model: Decoder) -> Decoder:
    with torch.device("meta"):
        return type(model)(model.config)


def by_assignment(model: Decoder) -> Decoder:
    state = with_two(model)
    model.load_state_dict(state, assign=True)
    return model


def by_to_empty(model: Decoder) -> Decoder:
    fresh = on_meta(model).to_empty(device="cpu")
    fresh.load_state_dict(with_two(model))
    return fresh.eval()


def by_another_head(model: Decoder) -> Decoder:
    model.unembed = nn.Linear(model.config.d_model, model.config.vocab_size, bias=False)
    return model


def by_another_embedding(model: Decoder) -> Decoder:
    model.embed = nn.Embedding(model.config.vocab_size, model.config.d_model)
    return model


PARTED: dict[str, Callable[[Decoder], Decoder]] = {
    "assign": by_assignment,
    "to_empty": by_to_empty,
    "head": by_another_head,
    "embedding": by_another_embedding,
}


def own(model: Decoder, folder: Path) -> Decoder:
    save_checkpoint(model, folder)
    return load_checkpoint(folder)


def of_a_run(model: Decoder, folder: Path) -> Decoder:
    save_run(folder, model, {"kind.json": b'{"kind": "bytes"}'}, None)
    return load_checkpoint(folder)


def of_transformers(model: Decoder, folder: Path) -> Decoder:
    HelmholtzForCausalLM.of(model).save_pretrained(folder)
    return from_hf(folder)


def of_transformers_afterwards(model: Decoder, folder: Path) -> Decoder:
    """The head is parted while the model is inside the wrapper."""
    config = replace(model.config, tie_embeddings=True)
    wrapper = HelmholtzForCausalLM.of(type(model)(config))
    wrapper.model.load_state_dict(model.state_dict(), assign=True)
    wrapper.save_pretrained(folder)
    return from_hf(folder)


class OfTheSeeds(torch.nn.Module):
    """A model of the original names holds a decoder."""

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.model = model


def of_the_seeds(model: Decoder, folder: Path) -> Decoder:
    optimizer = torch.optim.AdamW(model.parameters())
    seeds.save_checkpoint(OfTheSeeds(model), optimizer, 3, folder)
    again = copy.deepcopy(model)
    for parameter in again.parameters():
        parameter.data.zero_()
    assert seeds.load_checkpoint(OfTheSeeds(again), None, folder) == 3
    return again


SAVERS: dict[str, Callable[[Decoder, Path], Decoder]] = {
    "checkpoint": own,
    "run": of_a_run,
    "transformers": of_transformers,
    "transformers afterwards": of_transformers_afterwards,
    "seeds": of_the_seeds,
}


@EACH
@pytest.mark.parametrize("parted", PARTED)
def test_a_head_of_its_own_is_saved(name: str, parted: str, tmp_path: Path) -> None:
    model = PARTED[parted](make(name))
    again = own(model, tmp_path / "a")
    assert torch.equal(logits(again), logits(model))
    assert again.unembed.weight is not again.embed.weight
    assert not again.config.tie_embeddings and not read_config(tmp_path / "a")[1].tie_embeddings


@pytest.mark.parametrize("saver", SAVERS)
@pytest.mark.parametrize("parted", PARTED)
def test_every_saver_keeps_the_function(saver: str, parted: str, tmp_path: Path) -> None:
    model = PARTED[parted](make("transformer"))
    want = logits(model)
    again = SAVERS[saver](model, tmp_path / "a").eval()
    assert torch.equal(logits(again), want)
    assert not again.unembed.weight.is_set_to(again.embed.weight)
    if saver != "seeds":  # which loads into a model that is there
        assert not again.config.tie_embeddings


@pytest.mark.parametrize("saver", SAVERS)
def test_matrices_tied_by_hand_stay_tied(saver: str, tmp_path: Path) -> None:
    model = make("transformer-gqa-untied")
    model.unembed.weight = model.embed.weight
    want = logits(model)
    again = SAVERS[saver](model, tmp_path / "a").eval()
    assert torch.equal(logits(again), want)
    assert again.unembed.weight is again.embed.weight


@EACH
@pytest.mark.parametrize("assign", [False, True])
def test_loading_a_tied_model_ties_it_again(name: str, assign: bool) -> None:
    model = make(name)
    fresh = on_meta(model) if assign else on_meta(model).to_empty(device="cpu")
    fresh.load_state_dict(model.state_dict(), assign=assign)
    assert fresh.unembed.weight is fresh.embed.weight and fresh.config.tie_embeddings
    assert torch.equal(logits(fresh.eval()), logits(model))


def test_an_untied_model_gets_two_matrices_from_a_tied_state_dict() -> None:
    state = make("transformer").state_dict()
    config = replace(make("transformer").config, tie_embeddings=False)
    model = MODELS["transformer"](config)
    model.load_state_dict(state, assign=True)
    assert not model.unembed.weight.is_set_to(model.embed.weight)
    assert torch.equal(model.unembed.weight, model.embed.weight) and not model.config.tie_embeddings


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_a_file_with_one_matrix_is_a_whole_state_dict(assign: bool, strict: bool, tmp_path: Path) -> None:
    model = make("transformer")
    save_checkpoint(model, tmp_path / "a")
    fresh = on_meta(model).to_empty(device="cpu").eval()
    state = load_file(tmp_path / "a" / "model.safetensors")
    assert not fresh.load_state_dict(state, assign=assign, strict=strict).missing_keys
    assert fresh.unembed.weight is fresh.embed.weight
    assert torch.equal(logits(fresh), logits(model))


def test_one_matrix_is_no_state_dict_of_a_model_with_two() -> None:
    state = {name: x for name, x in make("transformer").state_dict().items() if name != "unembed.weight"}
    model = make("transformer-gqa-untied")
    with pytest.raises(RuntimeError, match="Missing key.*unembed.weight"):
        model.load_state_dict(state | {n: x for n, x in model.state_dict().items() if "blocks" in n})


def test_a_head_that_comes_alone_is_kept() -> None:
    model, head = make("transformer"), torch.randn(37, 32)
    model.load_state_dict({"unembed.weight": head}, assign=True, strict=False)
    assert torch.equal(model.unembed.weight, head) and not torch.equal(model.embed.weight, head)


def test_a_head_whose_weight_is_made_of_others_is_loaded_as_it_is() -> None:
    model, other = make("transformer"), make("transformer")
    for parted in (model, other):
        by_another_head(parted)
        parametrizations.weight_norm(parted.unembed)
    model.load_state_dict(other.state_dict())
    assert torch.equal(logits(model), logits(other))


def test_two_parameters_of_one_memory_are_tied(tmp_path: Path) -> None:
    model = make("transformer-gqa-untied")
    model.unembed.weight = nn.Parameter(model.embed.weight.detach())
    assert is_tied(model) and own(model, tmp_path / "a").config.tie_embeddings
    model.unembed.weight = nn.Parameter(model.embed.weight.detach().clone())
    assert not is_tied(model) and not own(model, tmp_path / "b").config.tie_embeddings


def test_matrices_of_two_dtypes_are_two() -> None:
    model = make("transformer")
    state = model.state_dict()
    model.load_state_dict(state | {"unembed.weight": state["embed.weight"].double()}, assign=True)
    assert model.unembed.weight.dtype == torch.float64 and not model.config.tie_embeddings


def test_a_state_dict_without_numbers_says_nothing_of_ties() -> None:
    model = make("transformer")
    model.load_state_dict(on_meta(model).state_dict(), assign=True)
    assert model.config.tie_embeddings


def test_a_tied_model_takes_no_two_matrices(tmp_path: Path) -> None:
    model, parted = make("transformer"), by_another_head(make("transformer"))
    before = logits(model)
    with pytest.raises(
        ValueError, match=r"state_dict: unembed.weight differs from embed.weight.*assign=True"
    ):
        model.load_state_dict(parted.state_dict())
    assert torch.equal(logits(model), before)
    model.load_state_dict(parted.state_dict(), assign=True)
    assert torch.equal(logits(model), logits(parted)) and not model.config.tie_embeddings
    optimizer = torch.optim.AdamW(model.parameters())
    seeds.save_checkpoint(OfTheSeeds(parted), optimizer, 1, tmp_path / "a")
    with pytest.raises(ValueError, match="unembed.weight differs from embed.weight"):
        seeds.load_checkpoint(OfTheSeeds(make("transformer")), None, tmp_path / "a")


@pytest.mark.parametrize("equal", [True, False])
def test_a_file_with_two_matrices_under_a_tied_config_is_believed(equal: bool, tmp_path: Path) -> None:
    """Files written before: the config ties, the tensors decide."""
    model = make("transformer")
    save_checkpoint(model, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    head = state["embed.weight"].clone() if equal else torch.randn_like(state["embed.weight"])
    save_file(state | {"unembed.weight": head}, tmp_path / "model.safetensors")
    assert json.loads((tmp_path / "config.json").read_text())["config"]["tie_embeddings"]
    again = load_checkpoint(tmp_path)
    assert again.config.tie_embeddings == equal == (again.unembed.weight is again.embed.weight)
    assert torch.equal(again.unembed.weight, head)


def test_layers_that_share_weights_are_saved_as_copies(tmp_path: Path) -> None:
    model = make("transformer")
    model.blocks[1] = model.blocks[0]
    assert torch.equal(logits(own(model, tmp_path / "a")), logits(model))


def _biased(model: Decoder) -> None:
    model.unembed = nn.Linear(model.config.d_model, model.config.vocab_size)


def _longer(model: Decoder) -> None:
    model.embed = nn.Embedding(model.config.vocab_size + 3, model.config.d_model)


def _rootless(model: Decoder) -> None:
    del model.norm


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_biased, "tensor 'unembed.bias' is not part of its config"),
        (_longer, r"model: embed.weight must be \(37, 32\), as in its config, got \(40, 32\)"),
        (_rootless, "tensor 'norm.weight' is missing"),
    ],
)
def test_what_could_not_be_loaded_again_is_not_saved(
    change: Callable[[Decoder], None], message: str, tmp_path: Path
) -> None:
    model = make("transformer")
    change(model)
    with pytest.raises(ValueError, match=message):
        save_checkpoint(model, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_a_model_without_memory_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model: embed.weight must be a tensor that holds numbers"):
        save_checkpoint(on_meta(make("transformer")), tmp_path / "a")
    assert not list(tmp_path.iterdir())

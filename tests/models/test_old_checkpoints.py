"""Checkpoints that commit 252ba62 wrote after 50 steps of training keep their meaning.

Each folder below ``checkpoints`` holds one, with what that code computed from it (``tools/write_checkpoints.py``).
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from helmholtz.models.checkpoint import CONFIG, WEIGHTS, load_checkpoint, save_checkpoint
from helmholtz.models.decoder import Decoder
from old_numbers import CHECKPOINTS, EXPECTED, numbers, streamed

FOLDERS = sorted(folder.name for folder in CHECKPOINTS.iterdir())
INPUTS = ("tokens", "attention_mask", "code")
Loaded = tuple[Decoder, dict[str, Tensor], Path]


@pytest.fixture(params=FOLDERS)
def old(request: pytest.FixtureRequest) -> Loaded:
    folder = CHECKPOINTS / request.param
    return load_checkpoint(folder), load_file(folder / EXPECTED), folder


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_there_is_a_checkpoint_of_every_architecture_and_prior() -> None:
    kinds = ("transformer", "fem", "free", "mamba", "equilibrium")
    assert {name.split("_")[0] for name in FOLDERS} == set(kinds)
    assert {f"fem_{prior}" for prior in ("softmax", "linear", "gla", "rnn_softmax", "mamba")} <= set(FOLDERS)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_an_old_checkpoint_gives_the_numbers_it_gave(old: Loaded, padded: bool) -> None:
    model, expected, _ = old
    masks = {"attention_mask": expected["attention_mask"]} if padded else {}
    found = numbers(model, expected["tokens"], expected.get("code"), **masks)
    prefix = "padded_" if padded else ""
    stored = {name for name in expected if name not in INPUTS and name.startswith("padded_") == padded}
    assert {prefix + name for name in found} == stored
    for name, value in found.items():
        assert_same(value, expected[prefix + name])


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_its_stream_gives_them_too(old: Loaded, padded: bool) -> None:
    model, expected, _ = old
    masks = {"attention_mask": expected["attention_mask"]} if padded else {}
    found = streamed(model, expected["tokens"], expected.get("code"), **masks)
    assert_same(found, expected["padded_logits" if padded else "logits"])


def test_it_has_the_parameters_and_the_tie_it_had(old: Loaded) -> None:
    model, _, folder = old
    with safe_open(folder / EXPECTED, framework="pt") as file:
        described = file.metadata()
    assert described["parameters"] == str(sum(parameter.numel() for parameter in model.parameters()))
    assert described["tied"] == str(model.unembed.weight is model.embed.weight)


def test_its_config_says_what_it_said(old: Loaded) -> None:
    """Also what no logit shows: dropout, how training solves and differentiates, what a memory does with a row."""
    model, _, folder = old
    assert (
        json.loads(json.dumps(model.config.to_dict())) == json.loads((folder / CONFIG).read_text())["config"]
    )


def test_it_takes_sequences_as_long_as_it_took(old: Loaded) -> None:
    model, expected, _ = old
    tokens = torch.zeros(1, 65, dtype=torch.long)
    longest = tokens[:, :64]
    assert numbers(model, longest, longest if "code" in expected else None)["logits"].isfinite().all()
    with pytest.raises(ValueError, match="max_seq_len=64"):
        model(tokens)


def test_saved_again_it_holds_the_same_tensors(old: Loaded, tmp_path: Path) -> None:
    model, _, folder = old
    save_checkpoint(model, tmp_path / "again")
    found, before = load_file(tmp_path / "again" / WEIGHTS), load_file(folder / WEIGHTS)
    assert found.keys() == before.keys()
    assert all(torch.equal(found[name], before[name]) for name in before)

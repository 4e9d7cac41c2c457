"""A model on disk: ``config.json`` (architecture and config) and ``model.safetensors`` (weights and buffers)."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from helmholtz._checks import check_choice, check_keys
from helmholtz._files import atomic_folder, complete_folder, first_damage
from helmholtz.models import MODELS
from helmholtz.models.base import AbstractDecoder, ModelConfig

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_TIED = "unembed.weight"


def save_checkpoint(model: AbstractDecoder, folder: str | os.PathLike[str]) -> None:
    """Make ``folder`` a checkpoint of ``model``, replacing any that is there without ever losing it."""
    with atomic_folder(folder) as partial:
        write_checkpoint(model, partial)


def write_checkpoint(
    model: AbstractDecoder, folder: Path, weights: Mapping[str, Tensor] | None = None
) -> None:
    """Write the two files of a checkpoint into an existing folder. Tied weights are stored once.

    Args:
        weights: the model's ``checkpoint_weights`` if they are not all its own, because processes share them.

    Raises: OSError if the disk is full or cannot be written to.
    """
    names = [name for name, cls in MODELS.items() if cls is type(model)]
    if not names:
        raise ValueError(f"model: {type(model).__name__} is none of the architectures {sorted(MODELS)}")
    description = {"architecture": names[0], "config": model.config.to_dict()}
    (folder / CONFIG).write_text(json.dumps(description, indent=2) + "\n")
    tensors = dict(checkpoint_weights(model) if weights is None else weights)
    try:
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{folder / WEIGHTS}: cannot be written ({error})") from error


def load_checkpoint(
    folder: str | os.PathLike[str], device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> AbstractDecoder:
    """The model saved in ``folder``, in evaluation mode, on ``device``.

    The random number generators are left as they were.

    Args:
        dtype: convert floating-point weights; None keeps the saved dtypes, and then logits are bit-equal.

    Raises: ValueError naming the file, and the tensor or key, if a file is missing, damaged or unfit.
    """
    folder = complete_folder(folder)
    architecture, config = read_config(folder)
    damage = first_damage(folder, (CONFIG, WEIGHTS))
    if damage:
        raise ValueError(damage)
    with torch.random.fork_rng(devices=[]):
        model = MODELS[architecture](config)
    weights = _read_weights(folder / WEIGHTS)
    _check_weights(folder / WEIGHTS, weights, checkpoint_weights(model))
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    return model.to(device=device, dtype=dtype).eval()


def read_config(folder: str | os.PathLike[str]) -> tuple[str, ModelConfig]:
    """Architecture and config of a checkpoint. Raises: ValueError naming the file if missing or wrong."""
    file = complete_folder(folder) / CONFIG
    try:
        description = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{file}: no such file; a checkpoint folder holds {CONFIG} and {WEIGHTS}") from error
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON ({error})") from error
    try:
        return _parse(description)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _parse(description: Any) -> tuple[str, ModelConfig]:
    if not isinstance(description, dict) or description.keys() < {"architecture", "config"}:
        raise ValueError("wanted the keys 'architecture' and 'config'")
    check_keys("the file", description, ("architecture", "config"))
    architecture = description["architecture"]
    check_choice("architecture", architecture, MODELS)
    return architecture, MODELS[architecture].config_class.from_dict(description["config"])


def checkpoint_weights(model: AbstractDecoder) -> dict[str, Tensor]:
    """What a checkpoint stores of a model, by name."""
    weights = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_embeddings:
        del weights[_TIED]
    return weights


def _read_weights(file: Path) -> dict[str, Tensor]:
    """Each tensor in memory of its own: in the file they start anywhere, and how a product rounds may depend on it."""
    try:
        return {name: tensor.clone() for name, tensor in load_file(file).items()}
    except FileNotFoundError as error:
        raise ValueError(f"{file}: no such file") from error
    except SafetensorError as error:
        raise ValueError(f"{file}: damaged or not a safetensors file ({error})") from error


def _check_weights(file: Path, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for name in wanted.keys() - found.keys():
        raise ValueError(f"{file}: tensor {name!r} is missing")
    for name in found.keys() - wanted.keys():
        raise ValueError(f"{file}: tensor {name!r} is not part of this model")
    for name, tensor in wanted.items():
        floating = tensor.is_floating_point()
        fits = found[name].is_floating_point() if floating else found[name].dtype == tensor.dtype
        if found[name].shape != tensor.shape or not fits:
            raise ValueError(
                f"{file}: tensor {name!r} is {found[name].dtype} of shape {tuple(found[name].shape)}, "
                f"the config asks for {'floating-point' if floating else tensor.dtype} {tuple(tensor.shape)}"
            )
    dtypes = {found[name].dtype: name for name, tensor in wanted.items() if tensor.is_floating_point()}
    if len(dtypes) > 1:
        listed = ", ".join(f"{name!r} is {dtype}" for dtype, name in dtypes.items())
        raise ValueError(f"{file}: tensors of different dtypes: {listed}")

"""A model on disk: ``config.json`` (architecture and config) and ``model.safetensors`` (weights and buffers).

What is stored goes by the tensors. The output matrix is left out if it *is* the embedding; if it is another tensor,
although the config ties the two, it is stored and the config that is written says so. A file with two matrices under a
config that ties them gives a model with both, tied only if they are equal. Other tensors that share memory are each
stored: the loaded model computes the same and shares nothing.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from helmholtz._checks import check, check_choice, check_keys
from helmholtz._files import atomic_folder, complete_folder, first_damage, read_complete
from helmholtz._hardware import usable_device
from helmholtz._json import parse_json
from helmholtz.models import MODELS
from helmholtz.models.base import ModelConfig
from helmholtz.models.decoder import Decoder
from helmholtz.models.tied import EMBED, UNEMBED, is_tied, local_part

CONFIG, WEIGHTS = "config.json", "model.safetensors"
MODEL_TYPE = "helmholtz"
"""What the config of an exported model says it is."""
_EXPORTED = {"architecture": "architecture", "config": "core"}
"""Keys of a checkpoint's config, as that of an exported model calls them."""


def save_checkpoint(model: Decoder, folder: str | os.PathLike[str]) -> None:
    """Make ``folder`` a checkpoint of ``model``, replacing any that is there without ever losing it.

    Raises: ValueError for a model whose tensors are not those that its config describes, so that they could not be
        loaded again (another head than a matrix, adapters), or are on the meta device.
    """
    _check_saveable(model)
    with atomic_folder(folder) as partial:
        write_checkpoint(model, partial)


def write_checkpoint(model: Decoder, folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
    """Write the two files of a checkpoint into an existing folder.

    Args:
        weights: the model's ``checkpoint_weights`` if they are not all its own, because processes share them.

    Raises: OSError if the disk is full or cannot be written to.
    """
    config = model.config.to_dict() | {"tie_embeddings": is_tied(model)}
    description = {"architecture": architecture_of(model), "config": config}
    (folder / CONFIG).write_text(json.dumps(description, indent=2) + "\n")
    tensors = dict(checkpoint_weights(model) if weights is None else weights)
    try:
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{folder / WEIGHTS}: cannot be written ({error})") from error


def architecture_of(model: Decoder) -> str:
    """The key of ``MODELS`` for a model. Raises: ValueError if it is none of them."""
    names = [name for name, cls in MODELS.items() if cls is type(model)]
    if not names:
        raise ValueError(f"model: {type(model).__name__} is none of the architectures {sorted(MODELS)}")
    return names[0]


def load_checkpoint(
    folder: str | os.PathLike[str], device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> Decoder:
    """The model saved in ``folder``, in evaluation mode, on ``device``.

    The random number generators are left as they were.

    Args:
        dtype: convert floating-point weights; None keeps the saved dtypes, and then logits are bit-equal.

    Raises: ValueError naming the file, and the tensor or key, if a file is missing, damaged or unfit, or a device that
        this machine does not have.
    """
    device = usable_device("device", device)
    return read_complete(folder, _load).to(device=device, dtype=dtype).eval()


def is_exported(folder: str | os.PathLike[str]) -> bool:
    """Whether it is the Hugging Face folder of a model of this library."""
    try:
        return bool(parse_json((Path(folder) / CONFIG).read_text()).get("model_type") == MODEL_TYPE)
    except (OSError, ValueError, AttributeError):
        return False


def load_exported(folder: str | os.PathLike[str]) -> Decoder:
    """The model in a folder that ``helmholtz export`` wrote, in evaluation mode; transformers is not needed.

    Raises: ValueError naming the file, and the tensor or key, if one is missing, damaged or unfit.
    """
    file = Path(folder) / CONFIG
    try:
        description = parse_json(file.read_text())
        architecture, config = _parse({name: description.get(of) for name, of in _EXPORTED.items()})
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{file}: {error}") from error
    weights = dict[str, Tensor]()
    if not weight_files(folder):
        raise ValueError(f"{folder}: no weights here (*.safetensors)")
    for shard in weight_files(folder):
        weights |= {name.removeprefix("model."): tensor for name, tensor in _read_weights(shard).items()}
    return _filled(Path(folder) / WEIGHTS, architecture, config, weights).eval()


def weight_files(folder: str | os.PathLike[str]) -> list[Path]:
    """The files of weights of a checkpoint, or of an exported folder, which may have several."""
    return sorted(Path(folder).glob("*.safetensors"))


def _load(folder: Path) -> Decoder:
    architecture, config = read_config(folder)
    damage = first_damage(folder, (CONFIG, WEIGHTS))
    if damage:
        raise ValueError(damage)
    return _filled(folder / WEIGHTS, architecture, config, _read_weights(folder / WEIGHTS))


def _filled(source: Path, architecture: str, config: ModelConfig, weights: dict[str, Tensor]) -> Decoder:
    """The model with these weights, which are those of the file ``source``."""
    if config.tie_embeddings and EMBED in weights:
        weights.setdefault(UNEMBED, weights[EMBED])
    model = _empty_model(source.with_name(CONFIG), architecture, config)
    _check_weights(source, weights, model.state_dict())
    # each in memory of its own: in the file they start anywhere, and how a product rounds may depend on it
    model.load_state_dict({name: tensor.clone() for name, tensor in weights.items()}, assign=True)
    return model


def _empty_model(source: object, architecture: str, config: ModelConfig) -> Decoder:
    """The model without memory for its tensors. Raises: ValueError naming ``source`` for sizes no tensor can have."""
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            return MODELS[architecture](config)
    except (RuntimeError, OverflowError) as error:
        raise ValueError(f"{source}: no model has these sizes ({error})") from error


def read_config(folder: str | os.PathLike[str]) -> tuple[str, ModelConfig]:
    """Architecture and config of a checkpoint. Raises: ValueError naming the file if missing or wrong."""
    file = complete_folder(folder) / CONFIG
    try:
        description = parse_json(file.read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{file}: no such file; a checkpoint folder holds {CONFIG} and {WEIGHTS}") from error
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON ({error})") from error
    try:
        _check_layers(description, file.with_name(WEIGHTS))
        return _parse(description)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _check_layers(description: Any, weights: Path) -> None:
    """No more layers than tensors, each of which would cost time even without memory."""
    config = description.get("config") if isinstance(description, dict) else None
    n_layers = config.get("n_layers") if isinstance(config, dict) else None
    if isinstance(n_layers, int) and weights.is_file():
        n_tensors = len(_read_weights(weights))
        check(
            n_layers <= n_tensors, "n_layers", n_layers, f"at most {n_tensors}, the tensors of {weights.name}"
        )


def _parse(description: Any) -> tuple[str, ModelConfig]:
    if not isinstance(description, dict) or description.keys() < {"architecture", "config"}:
        raise ValueError("wanted the keys 'architecture' and 'config'")
    check_keys("the file", description, ("architecture", "config"))
    architecture = description["architecture"]
    check_choice("architecture", architecture, MODELS)
    return architecture, MODELS[architecture].config_class.from_dict(description["config"])


def checkpoint_weights(model: Decoder) -> dict[str, Tensor]:
    """What a checkpoint stores of a model, by name: no two of them share memory.

    Raises: ValueError for a tensor on the meta device, which holds nothing.
    """
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    for name, tensor in weights.items():
        check(not tensor.is_meta, f"model: {name}", "one on the meta device", "a tensor that holds numbers")
    if is_tied(model):
        weights.pop(UNEMBED, None)
    seen = set[int]()
    for name, tensor in weights.items():
        tensor = tensor.contiguous()
        address = local_part(tensor).untyped_storage().data_ptr()
        weights[name] = tensor.clone() if address in seen else tensor
        seen.add(address)
    return weights


def _check_saveable(model: Decoder) -> None:
    """``load_checkpoint`` will find all that it needs and nothing else."""
    wanted = _empty_model("model.config", architecture_of(model), model.config).state_dict()
    found = model.state_dict()
    for name in [name for name in (*wanted, *found) if name not in wanted or name not in found]:
        raise ValueError(
            f"model: tensor {name!r} is {'missing' if name in wanted else 'not part of its config'}; the config "
            f"describes an unchanged {type(model).__name__}: save the state_dict of a changed one"
        )
    for name, tensor in wanted.items():
        got = tuple(found[name].shape)
        check(got == tuple(tensor.shape), f"model: {name}", got, f"{tuple(tensor.shape)}, as in its config")


def _read_weights(file: Path) -> dict[str, Tensor]:
    """Tensors in the mapped file: nothing is read yet."""
    try:
        return load_file(file)
    except FileNotFoundError as error:
        raise ValueError(f"{file}: no such file") from error
    except (
        SafetensorError,
        RuntimeError,
    ) as error:  # the latter if another file has taken its place in between
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

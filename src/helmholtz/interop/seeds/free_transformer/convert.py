"""Files of the original, read: its YAML, its token files, its checkpoints.

    python -m helmholtz.interop.seeds.free_transformer.convert config old.yaml new.yaml
    python -m helmholtz.interop.seeds.free_transformer.convert data old_folder new_folder
    python -m helmholtz.interop.seeds.free_transformer.convert checkpoint old.pt new_folder --config old.yaml

The original's ``.pt`` files are pickled; they are read with ``weights_only=True``, which runs no code of theirs.
"""

import argparse
import math
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from jaxtyping import Int
from rich.console import Console
from torch import Tensor

from helmholtz._checks import check, check_keys
from helmholtz.data.rows import write_rows
from helmholtz.data.tokens import Metadata
from helmholtz.interop.seeds.free_transformer.config import (
    ModelConfig,
    TrainingConfig,
    build,
    read_yaml,
    section,
)
from helmholtz.models.checkpoint import save_checkpoint
from helmholtz.models.decoder import Decoder
from helmholtz.models.free_transformer import FreeTransformer
from helmholtz.models.tied import are_equal
from helmholtz.models.transformer import Transformer

LOGITS_DIFFER = (
    "the weights are the original's, the model is not: here the encoder has rotary positions, and it and the middle "
    "block normalise what keys and values are made of; train on before use"
)
UNUSED = {
    "model": (),
    "training": ("use_deepspeed", "fsdp_config", "deepspeed_config", "wandb_project", "checkpoint_dir"),
    "data": ("dataset_name", "num_workers"),
}
"""Keys of the original's YAML that have no counterpart here."""
DATA_KEYS = ("dataset_name", "data_dir", "max_length", "num_workers")
TRAIN = {
    **{"steps": "max_steps", "batch_size": "batch_size", "accumulation": "gradient_accumulation_steps"},
    **{"lr": "learning_rate", "warmup_steps": "warmup_steps", "weight_decay": "weight_decay"},
    **{"clip_norm": "grad_clip", "eval_every": "eval_every", "save_every": "save_every"},
}
"""Our settings of training that have one in the original, and its name."""


def convert_config(
    values: Mapping[str, Any], *, architecture: str, output_dir: str
) -> tuple[dict[str, Any], list[str]]:
    """A run in this library's YAML layout from one in the original's (``model``, ``training``, ``data``).

    Args:
        architecture: "free_transformer" or "transformer"; the original's scripts, not its files, decide that.

    Returns: the settings, and one sentence for each key that means something else here or nothing.
    Raises: ValueError for an unknown key or a value that nothing here would honour.
    """
    given = {name: section(dict(values), name) for name in ("model", "training", "data")}
    check_keys("data", given["data"], DATA_KEYS)
    kept = {part: {k: v for k, v in given[part].items() if k not in UNUSED[part]} for part in given}
    model = build(ModelConfig, kept["model"], "model")
    training = build(TrainingConfig, kept["training"], "training")
    core = (model.to_core() if architecture == "free_transformer" else model.to_baseline()).to_dict()
    del core["vocab_size"]
    converted: dict[str, Any] = {
        "data": {"folder": str(kept["data"].get("data_dir", "data/synthetic")), "tokenizer": "ids"},
        "model": {"architecture": architecture, **core},
        "train": {ours: getattr(training, theirs) for ours, theirs in TRAIN.items()},
    }
    converted["train"] |= {
        "output_dir": output_dir,
        "seq_len": min(kept["data"].get("max_length", model.max_seq_len), model.max_seq_len),
        "min_lr_ratio": 0.0,
        "betas": [training.beta1, training.beta2],
        "log_every": min(training.log_every, training.max_steps),
    }
    if training.use_fsdp:
        converted["parallel"] = {"strategy": "fsdp"}
    if architecture == "free_transformer":
        check(training.beta_kl == 1, "training.beta_kl", training.beta_kl, "1, the paper's objective")
        converted["objective"] = {"kappa_bits": training.kappa_free_bits / math.log(2)}
    return converted, _notes(given, converted)


def _notes(given: Mapping[str, Mapping[str, Any]], converted: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What of the given keys means something else in the converted settings, or nothing."""
    notes = [f"{part}.{key}: not used here" for part in given for key in UNUSED[part] if key in given[part]]
    if "ffn_hidden_dim" not in given["model"]:
        notes.append(
            f"model.ffn_hidden_dim: {converted['model']['d_ff']} (the original: 11008, whatever the width)"
        )
    if "vocab_size" in given["model"]:
        notes.append("model.vocab_size: taken from the data, which have an end token besides")
    if "parallel" in converted:
        notes.append("training.use_fsdp: start it by torchrun; batch_size counts all processes")
    if converted["train"]["accumulation"] > 1:
        notes.append("training.gradient_accumulation_steps: honoured (the original ignores it)")
    notes.append(
        "training.max_steps: one cosine to the last step (the original's has the period of the warm-up)"
    )
    if "objective" not in converted:
        unused = (key for key in ("beta_kl", "kappa_free_bits") if key in given["training"])
        notes += [f"training.{key}: not used without a plan" for key in unused]
    return notes


def read_pickled(path: str | os.PathLike[str]) -> Any:
    """What ``torch.save`` wrote, if it is tensors and plain values. Raises: ValueError if it is more, or damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on damaged bytes the unpickler fails with whatever it stumbles over
        raise ValueError(f"{os.fspath(path)}: not readable as tensors alone ({error})") from error


def convert_data(
    source: str | os.PathLike[str], folder: str | os.PathLike[str], *, overwrite: bool = False
) -> Metadata:
    """The original's ``train.pt`` and ``val.pt`` as a folder for ``DataConfig(tokenizer="ids")``.

    The ids are those up to the largest that occurs, or up to the ``vocab_size`` of ``train_metadata.json``.

    Raises: ValueError for files that hold no integer ``N T``, and as ``write_rows``.
    """
    source = Path(source)
    train, validation = (_rows(source / name) for name in ("train.pt", "val.pt"))
    described = source / "train_metadata.json"
    if described.exists():
        n_ids = int(read_yaml(described)["vocab_size"])  # JSON is YAML
    else:
        n_ids = 1 + int(max(train.max(), validation.max()))
    return write_rows(folder, train, validation, n_ids=n_ids, overwrite=overwrite)


def _rows(path: Path) -> Int[Tensor, "N T"]:
    rows = read_pickled(path)
    is_rows = isinstance(rows, Tensor) and rows.ndim == 2 and rows.dtype in (torch.int32, torch.int64)
    check(is_rows and rows.numel() > 0, str(path), type(rows).__name__, "a tensor of ids of shape (N, T)")
    return rows


def convert_checkpoint(state: Mapping[str, Any], config: ModelConfig) -> Decoder:
    """A model with the weights of the original's ``model_state_dict``.

    Args:
        config: its sizes, which its checkpoints do not hold; heads cannot be read off the weights.

    Returns: a Transformer, with the original's logits, or a FreeTransformer, with others. Its output matrix is its
        embedding if the two are equal in the checkpoint.
    Warns: for a Free Transformer, why its logits differ.
    Raises: ValueError for a tensor that is missing, unknown or of another shape than ``config`` asks for.
    """
    free = "encoder.zeta" in state
    embed, output = state.get("token_embedding.weight"), state.get("output.weight")
    tied = embed is None or output is None or are_equal(embed, output)
    model: Decoder
    if free:
        model = FreeTransformer(replace(config.to_core(), tie_embeddings=tied))
    else:
        model = Transformer(replace(config.to_baseline(), tie_embeddings=tied))
    if free:
        warnings.warn(LOGITS_DIFFER, stacklevel=2)
    weights = _renamed(state, 0 if model.plan is None else model.plan.layer)
    wanted = model.state_dict()
    for name in wanted.keys() ^ weights.keys():
        raise ValueError(f"checkpoint: {name} is {'missing' if name in wanted else 'no part of this model'}")
    for name, tensor in wanted.items():
        got = tuple(weights[name].shape)
        check(got == tuple(tensor.shape), f"checkpoint: {name}", got, f"of shape {tuple(tensor.shape)}")
    model.load_state_dict(weights)
    return model.eval()


_BLOCK = {
    "attn_norm.weight": "mixer_norm.weight",
    "ffn_norm.weight": "mlp_norm.weight",
    "wo.weight": "mixer.o_proj.weight",
    "ffn.w2.weight": "mlp.down_proj.weight",
}
_JOINED = {
    "mixer.in_proj.weight": ("wq.weight", "wk.weight", "wv.weight"),
    "mlp.gate_up_proj.weight": ("ffn.w1.weight", "ffn.w3.weight"),
}
_REST = {
    "token_embedding.weight": "embed.weight",
    "output.weight": "unembed.weight",
    "norm.weight": "norm.weight",
    "encoder.norm.weight": "encoder.norm.weight",
    "encoder.readout.weight": "encoder.readout.weight",
}
_BUFFERS = ("inv_freq", "cos_cached", "sin_cached", "powers")


def _renamed(state: Mapping[str, Any], split_layer: int) -> dict[str, Tensor]:
    """The weights under this library's names; a tensor of an unknown name keeps it."""
    weights: dict[str, Tensor] = {}
    left = {name: tensor for name, tensor in state.items() if name.rsplit(".", 1)[-1] not in _BUFFERS}
    for old, new in _REST.items():
        if old in left:
            weights[new] = left.pop(old)
    if "encoder.zeta" in left:
        weights["encoder.query"] = left.pop("encoder.zeta").flatten()
    if "latent_plan.post_sampler_fc.weight" in left:
        weights["post_sampler.weight"] = left.pop("latent_plan.post_sampler_fc.weight").T
    for old, new in _block_prefixes(left, split_layer).items():
        for before, after in _BLOCK.items():
            if old + before in left:
                weights[new + after] = left.pop(old + before)
        for after, parts in _JOINED.items():
            if all(old + part in left for part in parts):
                weights[new + after] = torch.cat([left.pop(old + part) for part in parts])
    return weights | left


def _block_prefixes(names: Mapping[str, Any], split_layer: int) -> dict[str, str]:
    """``first_half_blocks.0.`` and the like, and what they are called here."""
    prefixes = {"encoder.transformer_block.": "encoder.block."}
    for group, offset in (("blocks", 0), ("first_half_blocks", 0), ("second_half_blocks", split_layer)):
        found = {name.split(".")[1] for name in names if name.startswith(f"{group}.")}
        prefixes |= {f"{group}.{i}.": f"blocks.{offset + int(i)}." for i in found if i.isdecimal()}
    return prefixes


def _write_config(values: argparse.Namespace, console: Console) -> None:
    architecture = "transformer" if values.baseline else "free_transformer"
    output = "checkpoints/baseline" if values.baseline else "checkpoints/free"
    converted, notes = convert_config(read_yaml(values.source), architecture=architecture, output_dir=output)
    Path(values.target).write_text(yaml.safe_dump(converted, sort_keys=False))
    for note in notes:
        console.print(note, markup=False)


def _write_checkpoint(values: argparse.Namespace, console: Console) -> None:
    saved = read_pickled(values.source)
    is_checkpoint = isinstance(saved, dict) and isinstance(saved.get("model_state_dict"), dict)
    check(is_checkpoint, values.source, type(saved).__name__, "a checkpoint with 'model_state_dict'")
    config = build(ModelConfig, section(read_yaml(values.config), "model"), "model")
    save_checkpoint(convert_checkpoint(saved["model_state_dict"], config), values.target)
    console.print("the state of the optimizer is left behind: its parameters are laid out differently here")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one conversion and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="convert", description="Convert files of the original free-transformer."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("config", "data", "checkpoint"):
        command = commands.add_parser(name)
        command.add_argument("source")
        command.add_argument("target")
        if name == "config":
            command.add_argument(
                "--baseline", action="store_true", help="a run of the decoder without a plan"
            )
        if name == "checkpoint":
            command.add_argument("--config", required=True, help="the YAML it was trained with")
    values, console = parser.parse_args(arguments), Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        if values.command == "data":
            convert_data(values.source, values.target)
        else:
            {"config": _write_config, "checkpoint": _write_checkpoint}[values.command](values, console)
    except (ValueError, OSError) as error:
        console.print(f"convert {values.command}: error: {error}", markup=False)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

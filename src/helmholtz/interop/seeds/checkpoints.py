"""Checkpoints of the facades' training: the model's own, and beside it optimizer, step and random state."""

import json
import os
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from helmholtz._checks import check
from helmholtz._files import atomic_folder, complete_folder
from helmholtz.models import checkpoint
from helmholtz.models.decoder import Decoder
from helmholtz.training.state import Progress, load_progress, load_training_state, save_training_state

METADATA = "metadata.json"


def save_checkpoint(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    path: str | os.PathLike[str],
    metadata: dict[str, Any] | None = None,
) -> None:
    """Make the folder ``path`` a checkpoint, replacing any that is there without ever losing it.

    Safetensors and JSON; nothing is pickled. The commands of ``helmholtz`` take the folder. ``metadata`` (JSON values)
    is stored beside.
    """
    own = _own(model)
    with atomic_folder(path) as partial:
        checkpoint.write_checkpoint(own, partial)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        save_training_state(partial, own, optimizer, scaler, Progress(step=step))
        (partial / METADATA).write_text(json.dumps(metadata or {}, indent=2) + "\n")


def load_checkpoint(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, path: str | os.PathLike[str]
) -> int:
    """Restore the model and, unless the optimizer is None, it and the random state of torch, numpy and Python.

    Returns: the step.

    Raises: ValueError if the checkpoint is of another architecture or other sizes, has an output matrix of its own
        where the model's is its embedding, or is a pickled file (``free_transformer.convert`` reads those).
    """
    own, folder = _own(model), complete_folder(path)
    check(folder.is_dir(), "path", os.fspath(path), "a folder; foreign files have converters of their own")
    found = checkpoint.load_checkpoint(folder)
    config = replace(
        own.config, tie_embeddings=found.config.tie_embeddings
    )  # of these two the tensors decide
    check(found.config == config, "model", own.config, f"of the checkpoint's config {found.config}")
    own.load_state_dict(found.state_dict())
    if optimizer is None:
        return load_progress(folder).step
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return load_training_state(folder, own, optimizer, scaler).step


def _own(model: nn.Module) -> Decoder:
    decoder = getattr(model, "model", None)
    wanted = "a FreeTransformer, a TransformerBaseline or a UnifiedMambaHopfieldDEQ of the original names"
    check(isinstance(decoder, Decoder), "model", type(model).__name__, wanted)
    assert isinstance(decoder, Decoder)
    return decoder

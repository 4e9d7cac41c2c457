"""A trained model as a folder that transformers loads, and back."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from helmholtz._checks import check
from helmholtz._files import atomic_folder
from helmholtz._hardware import git_commit, usable_device
from helmholtz._run_folder import RUN, TOKENIZER
from helmholtz.data.tokenizer import IdTokenizer, load_tokenizer
from helmholtz.evals.runs import Run, find_checkpoint, read_run
from helmholtz.interop.hf.card import CARD, ModelFacts, model_card
from helmholtz.interop.hf.model import HelmholtzForCausalLM
from helmholtz.interop.hf.tokenizer import to_transformers
from helmholtz.models.checkpoint import load_checkpoint
from helmholtz.models.decoder import Decoder

MAX_SHARD_SIZE = "5GB"
UNKNOWN_LICENSE = "unknown"


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written."""

    folder: Path
    facts: ModelFacts


def export(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    license: str = UNKNOWN_LICENSE,
    max_shard_size: str = MAX_SHARD_SIZE,
) -> Exported:
    """Write the model of a run (its best weights) or of a checkpoint as a Hugging Face folder, whole or not at all.

    The folder holds weights, config, tokenizer, generation config and a model card. Logits are those of the checkpoint,
    bit for bit. Of a run, the objective's settings go with it.

    Args:
        license: identifier of the weights' licence for the card.
        max_shard_size: largest file of weights, as "200MB".

    Raises: ValueError if ``source`` is neither, is a run that has not ended, or has no tokenizer, and if ``folder``
        exists and is not empty.
    """
    source, folder = Path(source), Path(folder)
    empty = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    check(empty, "folder", str(folder), "a new or an empty folder: nothing is overwritten")
    check(bool(license.strip()), "license", license, "an identifier, as apache-2.0, or unknown")
    size = re.fullmatch(r"\d+(\.\d+)?[KMGT]B", max_shard_size)
    check(size is not None, "max_shard_size", max_shard_size, "a number of KB, MB, GB or TB, as 200MB")
    checkpoint, run = find_checkpoint(source), read_run(source) if (source / RUN).exists() else None
    model, tokenizer = load_checkpoint(checkpoint), load_tokenizer(checkpoint / TOKENIZER)
    got, vocab_size = tokenizer.vocab_size, model.config.vocab_size
    check(got == vocab_size, "tokenizer.vocab_size", got, f"{vocab_size}, the model's vocabulary")
    wrapper = HelmholtzForCausalLM.of(model)
    wrapper.config.objective = _objective(wrapper, run)
    theirs = to_transformers(tokenizer, max_seq_len=model.config.max_seq_len)
    end, pad = theirs.eos_token_id, theirs.pad_token_id
    wrapper.config.pad_token_id = pad
    wrapper.generation_config = GenerationConfig(bos_token_id=end, eos_token_id=end, pad_token_id=pad)
    text = "0" if isinstance(tokenizer, IdTokenizer) else "Once"
    facts = _facts(wrapper, run, license, text)
    with atomic_folder(folder) as partial:
        wrapper.save_pretrained(partial, max_shard_size=max_shard_size)
        theirs.save_pretrained(partial)
        (partial / CARD).write_text(model_card(facts, folder.name))
    return Exported(folder, facts)


def from_hf(
    folder: str | os.PathLike[str], device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> Decoder:
    """The model inside a Hugging Face folder, in evaluation mode: the way back of ``export``.

    Args:
        dtype: convert floating-point weights; None keeps the saved dtypes, and then logits are bit-equal.

    Raises: ValueError if the folder has no model of this library, or its weights do not fit.
    """
    device, config = usable_device("device", device), Path(folder) / "config.json"
    check(config.is_file(), "folder", str(folder), "a local folder with a config.json")
    wrapper = HelmholtzForCausalLM.from_pretrained(
        str(folder), dtype="auto" if dtype is None else dtype, local_files_only=True, use_safetensors=True
    )
    return wrapper.model.to(device).eval()


def _objective(wrapper: HelmholtzForCausalLM, run: Run | None) -> dict[str, Any] | None:
    """What the run was trained for, as far as transformers' config can say it."""
    names = wrapper.config.objective
    trained = None if run is None else run.description["objective"]
    return names if names is None or trained is None else {name: trained[name] for name in names}


def _facts(wrapper: HelmholtzForCausalLM, run: Run | None, license: str, text: str) -> ModelFacts:
    return ModelFacts(
        architecture=wrapper.config.architecture,
        parameters=sum(parameter.numel() for parameter in wrapper.parameters()),
        max_seq_len=wrapper.config.max_position_embeddings,
        vocab_size=wrapper.config.vocab_size,
        text=text,
        license=license,
        exported_by=git_commit(),
        is_bound=wrapper.config.plan_seed is not None,
        data=None if run is None else Path(run.data_folder).name,
        tokens=None if run is None else run.summary["tokens"],
        trained_by=None if run is None else run.summary["commit"],
        bits_per_byte=None if run is None else min(run.series("eval", "validation_bits_per_byte")[1]),
    )

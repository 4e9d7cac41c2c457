"""Whether a decoder's output matrix is its embedding: the tensors say so, and ``load_state_dict`` keeps it true."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

EMBED, UNEMBED = "embed.weight", "unembed.weight"


def same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one piece of memory; of sharded ones, whether this process's parts are."""
    a, b = local_part(a), local_part(b)
    return a is b or (not a.is_meta and not b.is_meta and a.device == b.device and a.is_set_to(b))


def is_tied(model: nn.Module) -> bool:
    """Whether the output matrix of a decoder is its embedding, whatever the config says."""
    embed, unembed = (getattr(model.get_submodule(name), "weight", None) for name in ("embed", "unembed"))
    return isinstance(embed, Tensor) and isinstance(unembed, Tensor) and same_memory(embed, unembed)


def are_equal(a: Tensor, b: Tensor) -> bool:
    """Whether two matrices hold the same numbers, as far as this process holds them."""
    a, b = local_part(a), local_part(b)
    if a.is_meta or b.is_meta or a.shape != b.shape or a.dtype != b.dtype:
        return False
    return same_memory(a, b) or torch.equal(a, b.to(a.device))


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor that FSDP has sharded; another one as it is."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def keep_ties(model: nn.Module) -> None:
    """Let ``load_state_dict`` of a decoder give the function that the state dict describes.

    ``to_empty`` and ``load_state_dict(assign=True)`` part the two matrices. They are one parameter again after loading
    if the config ties them and they are equal; if the state dict holds two different ones, the config is changed to say
    so. Where they are one and stay one (no ``assign``), two different ones are refused: torch would keep the last.
    """
    model.register_load_state_dict_pre_hook(_before_loading)
    model.register_load_state_dict_post_hook(_after_loading)


def _before_loading(
    model: Any, state: dict[str, Any], prefix: str, metadata: Mapping[str, Any], *others: Any
) -> None:
    embed, unembed = state.get(prefix + EMBED), state.get(prefix + UNEMBED)
    if embed is None or "weight" not in model.unembed._parameters:
        return
    tied, assign = model.config.tie_embeddings, metadata.get("assign_to_params_buffers", False)
    if unembed is None:
        if tied:
            state[prefix + UNEMBED] = embed  # files hold tied weights once
    elif embed.is_meta or unembed.is_meta:
        return
    elif are_equal(embed, unembed):
        if assign and not tied:  # or an optimizer would update one memory twice
            state[prefix + UNEMBED] = unembed.clone()
    elif is_tied(model) and not assign:
        raise ValueError(
            f"state_dict: {UNEMBED} differs from {EMBED}, but they are one tensor in this model; build it with "
            "tie_embeddings=False, or load with assign=True"
        )
    elif tied:
        model.config = replace(model.config, tie_embeddings=False)


def _after_loading(model: Any, incompatible: object) -> None:
    if not model.config.tie_embeddings or "weight" not in model.unembed._parameters:
        return
    embed, unembed = model.embed.weight, model.unembed.weight
    if embed is not unembed and are_equal(embed, unembed):
        model.tie_weights()

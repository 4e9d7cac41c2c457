"""Layers in a few words: ``attention, fem:gla x3, mamba``."""

import re
from typing import Any

from helmholtz._checks import check, check_choice
from helmholtz.layers.fem_config import PRIORS, FreeEnergyMixerConfig
from helmholtz.layers.sizing import matched_d_ff
from helmholtz.models.base import MOST_LAYERS, default_d_ff

KINDS = ("attention", "fem", "mamba")
N_HEADS = 4


def layers_of(pattern: str, d_model: int) -> list[dict[str, Any]]:
    """The layers that a pattern names, as values of ``LayerConfig``.

    Parts have commas between them. Each is ``attention``, ``fem`` (softmax), ``fem:PRIOR`` or ``mamba``, and ``xN``
    after one repeats it. Attention and FEM have 4 heads (one if these do not fit) and a feed-forward, that of FEM
    matched to attention's parameters; Mamba has ``2 d_model`` channels and no feed-forward.

    Raises: ValueError naming the part that is none of these.
    """
    layers: list[dict[str, Any]] = []
    for part in pattern.split(","):
        found = re.fullmatch(r"\s*(\w+)(?::(\w+))?(?:\s*x\s*(\d{1,5}))?\s*", part)
        form = "parts such as attention, fem:gla x3 or mamba, with commas between them"
        check(found is not None, "layers", part.strip(), form)
        assert found is not None
        kind, prior, times = found[1], found[2], int(found[3] or 1)
        check_choice("layers", kind, KINDS)
        check(prior is None or kind == "fem", "layers", part.strip(), "a prior after fem alone")
        check(1 <= times <= MOST_LAYERS, "layers", part.strip(), f"from 1 to {MOST_LAYERS} times")
        layers += [_layer(kind, prior or "softmax", d_model)] * times
    return layers


def _layer(kind: str, prior: Any, d_model: int) -> dict[str, Any]:
    if kind == "mamba":
        widths = [width for width in (64, 32, 16, 8, 4, 2, 1) if 2 * d_model % width == 0]
        return {"mixer": {"kind": "mamba", "d_model": d_model, "d_head": widths[0]}}
    fits = d_model % N_HEADS == 0 and d_model // N_HEADS % 2 == 0
    n_heads, d_ff = N_HEADS if fits else 1, default_d_ff(d_model)
    mixer = {"kind": kind, "d_model": d_model, "n_heads": n_heads}
    if kind == "attention":
        return {"mixer": mixer, "d_ff": d_ff}
    check_choice("layers: the prior of fem", prior, PRIORS)
    config = FreeEnergyMixerConfig(d_model=d_model, n_heads=n_heads, prior=prior)
    return {"mixer": mixer | {"prior": prior}, "d_ff": matched_d_ff(config, d_ff=d_ff)}

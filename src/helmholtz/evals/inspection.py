"""What a model is made of, and how its Free Energy Mixers read a text."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from helmholtz._checks import check_choice
from helmholtz.evals.equilibria import read
from helmholtz.layers.attention import Attention
from helmholtz.layers.fem import FreeEnergyMixer
from helmholtz.layers.fem_config import FreeEnergyMixerConfig
from helmholtz.layers.fem_reading import Reading, inspect_read
from helmholtz.layers.mixer_config import AttentionConfig
from helmholtz.layers.sizing import attention_block_parameters
from helmholtz.models.base import default_d_ff, evaluation_mode
from helmholtz.models.decoder import Decoder

OPENED = re.compile(r"|blocks|blocks\.\d+|encoder|encoder\.block|equilibrium|equilibrium\.dynamics")
"""Modules of a model whose parts are counted one by one."""


@dataclass(frozen=True, slots=True)
class ParameterCount:
    """Parameters of a part of a model; a shared one (tied embeddings) belongs to the part that comes first."""

    module: str
    parameters: int


@dataclass(frozen=True, slots=True)
class ReadSummary:
    """How one layer reads a text: averages over heads, channels and all queries but the first."""

    layer: str
    prior: str
    num_tokens_prior: float
    """Effective number of tokens that the prior reads: the exponential of its entropy."""
    num_tokens_posterior: float
    """The same after the tilt at ``beta_max``."""
    beta_max: float
    beta_star: float
    """Median hidden temperature: the ``beta`` whose free energy is the gated read."""
    kl: float
    """``KL(prior || posterior)`` in nats."""
    inner_gate: float


def count_parameters(model: Decoder) -> list[ParameterCount]:
    """Embedding, each block's mixer, feed-forward and norms, encoder and table of a plan, dynamics and patterns of an
    equilibrium, final norm, output matrix."""
    seen: set[int] = set()
    counts = []
    last = ("norm", "unembed")  # they are made before a plan and an equilibrium, and read after them
    for name, found in sorted(_parts(model, ""), key=lambda part: part[0] in last):
        own = {id(parameter): parameter.numel() for parameter in found if id(parameter) not in seen}
        seen |= own.keys()
        counts.append(ParameterCount(name, sum(own.values())))
    assert sum(count.parameters for count in counts) == sum(p.numel() for p in model.parameters())
    return counts


def _parts(module: nn.Module, name: str) -> Iterator[tuple[str, list[nn.Parameter]]]:
    """The parts of what ``OPENED`` names, in the order in which they were made, and others as they are."""
    if not OPENED.fullmatch(name):
        parameters = list(module.parameters())
        if parameters:
            yield name, parameters
        return
    start = f"{name}." if name else ""
    for key, parameter in module.named_parameters(recurse=False):
        yield f"{start}{key}", [parameter]
    for key, child in module.named_children():
        yield from _parts(child, f"{start}{key}")


def baseline_block_parameters(model: Decoder) -> int:
    """Mixer and feed-forward of the baseline's block of the same width and heads: the budget of a FEM block.

    Of a model without heads: the block whose heads share nothing.
    """
    c = model.config
    headed = AttentionConfig | FreeEnergyMixerConfig
    found = [layer.mixer for layer in c.layer_configs() if isinstance(layer.mixer, headed)]
    n_heads = max((mixer.n_heads for mixer in found), default=1)
    n_kv_heads = min((mixer.n_kv_heads or mixer.n_heads for mixer in found), default=1)
    return attention_block_parameters(c.d_model, n_heads, n_kv_heads, default_d_ff(c.d_model))


def mixers(model: nn.Module) -> dict[str, FreeEnergyMixer]:
    """The Free Energy Mixers of a model that read a free energy, by name."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, FreeEnergyMixer)}
    return {name: mixer for name, mixer in found.items() if mixer.config.read != "mean"}


def readable(model: nn.Module) -> dict[str, FreeEnergyMixer | Attention]:
    """The layers of a model that ``read_text`` can take apart, by name: mixers and attention, but not the encoder of a
    plan, which does not run."""
    found = mixers(model) | {name: m for name, m in model.named_modules() if isinstance(m, Attention)}
    names = [name for name, _ in model.named_modules() if name in found and not name.startswith("encoder.")]
    return {name: found[name] for name in names}


def read_text(
    model: Decoder, tokens: Int[Tensor, "1 T"], *, layer: str | None = None, words: Sequence[str] = ()
) -> dict[str, Reading]:
    """Each mixer's reading of one text, by the mixer's name; empty for a model without mixers.

    A model with a plan reads under one of its prior, and its encoder does not run.

    Args:
        layer: name of the one layer whose reading is wanted, a mixer or attention; None: of all mixers.
        words: what the tokens spell, for the labels of the readings.
    """
    inputs: dict[str, tuple[Tensor, Tensor | None]] = {}

    def keep(name: str) -> torch.utils.hooks.RemovableHandle:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...], options: dict[str, Any]) -> None:
            inputs[name] = arguments[0], options.get("source")

        return known[name].register_forward_pre_hook(hook, with_kwargs=True)

    known = readable(model)
    if layer is not None:
        check_choice("layer", layer, known)
    handles = [keep(name) for name in (mixers(model) if layer is None else [layer]) if name in known]
    try:
        with evaluation_mode(model):
            read(model, tokens)
            return {
                name: inspect_read(known[name], x, source=source, words=words)
                for name, (x, source) in inputs.items()
            }
    finally:
        for handle in handles:
            handle.remove()


def summarise(model: Decoder, readings: dict[str, Reading]) -> list[ReadSummary]:
    """One line per layer. The first query is left out: with one token to read there is nothing to select."""
    found = mixers(model)
    return [_summary(name, found[name], reading) for name, reading in readings.items()]


def _summary(name: str, mixer: FreeEnergyMixer, reading: Reading) -> ReadSummary:
    later = slice(1, None)
    prior_tokens = torch.special.entr(reading.prior).sum(-2).exp()
    return ReadSummary(
        layer=name,
        prior=mixer.config.prior,
        num_tokens_prior=prior_tokens[:, :, later].mean().item(),
        num_tokens_posterior=reading.num_tokens_read[:, :, later].mean().item(),
        beta_max=reading.beta_max.mean().item(),
        beta_star=reading.beta_star[:, :, later].nanmedian().item(),
        kl=reading.kl[:, :, later].mean().item(),
        inner_gate=reading.inner[:, :, later].mean().item(),
    )


def most_selective(readings: dict[str, Reading]) -> tuple[str, int]:
    """Layer and head whose posterior is furthest from the prior on average."""
    gaps = {name: reading.kl[0].mean(dim=(1, 2)) for name, reading in readings.items()}
    name = max(gaps, key=lambda key: gaps[key].max().item())
    return name, int(gaps[name].argmax())


def last_read(reading: Reading, head: int, n_channels: int = 6) -> dict[str, list[float]]:
    """Weights over the tokens of a text, as its last query reads it: the prior's, then the posteriors of some channels.

    The channels are those of ``head`` whose posterior is furthest from the prior. Where the prior has its own weights
    per channel (rnn_softmax, mamba) its row is their mean.
    """
    gap, counts = reading.kl[0, head, -1], reading.num_tokens_read[0, head, -1]
    prior, posterior = reading.prior[0, head, -1], reading.posterior[0, head, -1]
    rows = {"prior": prior.mean(-1).tolist()}
    for channel in gap.argsort(descending=True)[:n_channels].tolist():
        read = f"KL {gap[channel]:.2f} nats, reads {counts[channel].item():.1f} tokens"
        rows[f"channel {channel}: {read}"] = posterior[:, channel].tolist()
    return rows

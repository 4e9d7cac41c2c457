"""Looking inside a Free Energy Mixer or attention: which tokens each channel reads, and at which temperature."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from helmholtz._checks import check
from helmholtz.layers.attention import Attention
from helmholtz.layers.fem import FreeEnergyMixer
from helmholtz.layers.priors.base import Tilt
from helmholtz.layers.sequence import sequence_layout
from helmholtz.ops.attention import softmax_attention
from helmholtz.ops.free_energy import hidden_temperature, posterior


@dataclass(frozen=True, slots=True)
class Reading:
    """One call of a mixer taken apart, in float64. Channels are those of the value heads; T queries, S = T tokens.

    A notebook shows it with sliders for head, token, inner gate and beta (of the first text, up to 64 tokens).
    """

    prior: Float[Tensor, "B H T S V"]
    """Weights of the prior; equal over V for every prior but rnn_softmax and mamba."""
    posterior: Float[Tensor, "B H T S V"]
    """Weights after the tilt at ``beta_max``: which tokens the free-energy branch reads."""
    values: Float[Tensor, "B H S V"]
    mean: Float[Tensor, "B H T V"]
    free: Float[Tensor, "B H T V"]
    """Free energy at ``beta_max``."""
    kl: Float[Tensor, "B H T V"]
    """``KL(prior || posterior)`` in nats: ``free = mean + kl / beta_max``."""
    inner: Float[Tensor, "B H T V"]
    """Inner gate lambda; 1 where the mixer reads the free energy itself."""
    beta_max: Float[Tensor, "H V"]
    beta_star: Float[Tensor, "B H T V"]
    """Hidden temperature: the ``beta`` whose free energy is the gated read; NaN where the values do not vary."""
    kind: str
    """Name of the prior; "attention" of plain attention."""
    causal: bool
    words: tuple[str, ...] = ()
    """What the tokens spell, where it is known."""

    @property
    def n_heads(self) -> int:
        return self.prior.shape[1]

    @property
    def num_tokens_read(self) -> Float[Tensor, "B H T V"]:
        """Effective number of tokens that each channel reads: the exponential of the posterior's entropy."""
        return torch.special.entr(self.posterior).sum(-2).exp()

    def _repr_html_(self) -> str:
        from helmholtz._notebook.reading import reading_html

        return reading_html(self)


class _Places(Tilt):
    """A signal per token: 1 at its place, 0 elsewhere."""

    __slots__ = ()
    by_kernels = False

    def __call__(
        self, values: Float[Tensor, "B G T V"], *, signals_first: bool = False
    ) -> Float[Tensor, "B G T N V"]:
        steps = values.shape[2]
        onehots = torch.eye(steps, device=values.device)[:, :, None]
        return onehots.expand(*values.shape[:3], steps, values.shape[-1])


@torch.no_grad()
def inspect_read(
    mixer: FreeEnergyMixer | Attention,
    x: Float[Tensor, "B T D"],
    *,
    attention_mask: Shaped[Tensor, "..."] | None = None,
    source: Float[Tensor, "B T D"] | None = None,
    words: Sequence[str] = (),
) -> Reading:
    """Take apart how ``mixer`` reads ``x``, or ``source`` by the queries of ``x``, for any prior: its weights are
    recovered by averaging one-hot positions.

    Of attention: its weights are the prior, its inner gate is 0 and its ``beta_max`` is 1, so that the posterior is
    what a free-energy read of the same keys and values would weight at that temperature.

    To look at: nothing of it has a gradient.

    Args:
        words: what the tokens spell; the reading keeps them as its labels.

    Cost: O(B T^2 H V) memory: for short sequences.
    Raises: ValueError if the mixer reads the mean alone: there is no tilt to look at; if there are not T words.
    """
    check(len(words) in (0, x.shape[1]), "words", f"{len(words)} of them", f"{x.shape[1]}, one per token")
    layout, words = sequence_layout(x, attention_mask), tuple(words)
    if isinstance(mixer, Attention):
        q, k, values = mixer.project(x, layout, source)
        eye = torch.eye(x.shape[1], device=x.device).expand(*values.shape[:2], -1, -1)
        weights = softmax_attention(q.float(), k.float(), eye, causal=mixer.causal, key_mask=layout.mask)
        closed = values.new_zeros(*q.shape[:3], mixer.d_head).double()
        beta, every = closed.new_ones(values.shape[1], mixer.d_head), weights.unsqueeze(-1)
        every = every.expand(*weights.shape, mixer.d_head)
        return _take_apart(every, values, beta, closed, "attention", mixer.causal, words)
    c = mixer.config
    if c.read == "mean":
        raise ValueError("mixer: read='mean' has no free energy to inspect")
    features, values = mixer.project(x, layout, source)
    weights, _ = mixer.prior(features, values, _Places(None, math.inf), layout, layout, None)
    inner = torch.ones_like(weights[..., 0, :], dtype=torch.float64)
    if c.read == "temperature":
        inner = features["inner"].unflatten(-1, (c.n_heads, -1)).transpose(1, 2).double().sigmoid()
    return _take_apart(weights, values, mixer.beta_max, inner, c.prior, c.causal, words)


def _take_apart(
    weights: Tensor,
    values: Tensor,
    beta: Tensor,
    inner: Tensor,
    kind: str,
    causal: bool,
    words: tuple[str, ...],
) -> Reading:
    """``values`` and ``beta`` are those of the value heads, which heads of a group share."""
    weights = weights.double()
    total = weights.sum(-2, keepdim=True)  # 1 up to float32, and 0 for a query that sees nothing
    weights = weights / torch.where(total > 0, total, 1.0)
    group = weights.shape[1] // values.shape[1]
    values, beta = (
        values.double().repeat_interleave(group, dim=1),
        beta.double().repeat_interleave(group, dim=0),
    )
    p = weights.transpose(-1, -2)
    v = values.transpose(-1, -2).unsqueeze(2).expand_as(p)
    temperature = beta[:, None, :].expand(p.shape[:-1])
    at_max = hidden_temperature(torch.ones_like(inner), p, v, temperature)
    mean = (p * v).sum(-1)
    return Reading(
        prior=weights,
        posterior=posterior(p, v, temperature).transpose(-1, -2),
        values=values,
        mean=mean,
        free=at_max.value,
        kl=temperature * (at_max.value - mean),
        inner=inner,
        beta_max=beta,
        beta_star=hidden_temperature(inner, p, v, temperature).beta,
        kind=kind,
        causal=causal,
        words=words,
    )


@torch.no_grad()
def read_statistics(model: nn.Module, run: Callable[[], object]) -> dict[str, float]:
    """What the mixers of ``model`` have learned: ``{"<module>/beta_mean": ..., "<module>/inner_gate_mean": ...}``.

    Args:
        run: a forward pass of ``model``, on whose inputs the gates are averaged (pads left out).

    Returns: per mixer with a learned temperature ``beta_min``, ``beta_mean``, ``beta_max``, ``inner_gate_mean`` and
        ``inner_gate_std``; empty for a model without such mixers.
    """
    found: dict[str, float] = {}

    def hook(name: str) -> Callable:
        def record(mixer: FreeEnergyMixer, args: tuple, kwargs: dict) -> None:
            masks = (kwargs.get("attention_mask"), kwargs.get("cu_seqlens"))
            layout = kwargs.get("layout") or sequence_layout(args[0], *masks)
            gate = mixer.project(args[0], layout)[0]["inner"].float().sigmoid()
            gate = gate if layout.mask is None else gate[layout.mask]
            beta = mixer.beta_max
            found.update(
                {
                    f"{name}/beta_min": beta.min().item(),
                    f"{name}/beta_mean": beta.mean().item(),
                    f"{name}/beta_max": beta.max().item(),
                    f"{name}/inner_gate_mean": gate.mean().item(),
                    f"{name}/inner_gate_std": gate.std(correction=0).item(),
                }
            )

        return record

    hooks = [
        module.register_forward_pre_hook(hook(name), with_kwargs=True)
        for name, module in model.named_modules()
        if isinstance(module, FreeEnergyMixer) and module.config.read == "temperature"
    ]
    try:
        run()
    finally:
        for handle in hooks:
            handle.remove()
    return found

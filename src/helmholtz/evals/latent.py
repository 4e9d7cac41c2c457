"""What a model with a latent plan pays for a text: bounds on its own likelihood, and what the plan is used for."""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from helmholtz._checks import check, check_integer
from helmholtz.data.tokens import TokenDataset, bits_per_byte
from helmholtz.evals.language import check_window, text_stream
from helmholtz.layers.latent import Plan, sample_plan
from helmholtz.layers.placement import device_of
from helmholtz.models.base import evaluation_mode
from helmholtz.models.decoder import Decoder
from helmholtz.models.outputs import LowerOutput
from helmholtz.ops.binary_latent import code_log_probability, kl_per_token
from helmholtz.ops.code_usage import CodeUsage, code_usage

PRIOR_DRAWS = 4
"""Plans per window from the prior, ``J``."""
UPPER_BOUNDS = ("prior_cross_entropy", "elbo", "importance_weighted", "mixture_weighted")
"""Fields of ``LatentBounds``."""


@dataclass(frozen=True, slots=True)
class LatentBounds:
    """Nats per token. Four upper bounds of the model's own; the posterior cross-entropy alone is not one."""

    posterior_cross_entropy: float
    """LEAKS: given plans that were read from the very text that is predicted. Not a language-model loss."""
    prior_cross_entropy: float
    """Given plans drawn from the prior: an upper bound."""
    kl: float
    """Of the posterior from the uniform prior: what the plans of the posterior cross-entropy cost."""
    elbo: float
    """``posterior_cross_entropy + kl``: an upper bound."""
    importance_weighted: float
    """From ``n_samples`` posterior plans per window: an upper bound, in expectation the tighter the more there are."""
    mixture_weighted: float
    """The same from these and the prior's plans together: an upper bound that also holds tight where the posterior is
    a worse guess than the prior, as it is of a plan that says nothing."""
    effective_samples: float
    """Mean over windows of the effective number of the ``n_samples`` plans; near 1, one plan has all the weight."""
    n_samples: int
    n_windows: int
    n_tokens: int
    n_bytes: int | None
    """Bytes of text that these tokens stand for; None if they were not counted."""
    usage: CodeUsage
    """Of the code over these windows."""


class _Measured(NamedTuple):
    """A batch of windows: totals of each in nats, in float64, and its tokens' codes."""

    posterior: Float[Tensor, "B"]
    prior: Float[Tensor, "B"]
    weighted: Float[Tensor, "B"]
    mixture: Float[Tensor, "B"]
    effective: Float[Tensor, "B"]
    logits: Float[Tensor, "BT H"]
    code: Int[Tensor, "BT"]
    targets: Int[Tensor, "BT"]


def evaluate_bounds(
    model: Decoder,
    data: TokenDataset | Int[Tensor, " n"],
    *,
    seq_len: int,
    batch_size: int = 16,
    n_samples: int = 64,
    n_windows: int | None = None,
    seed: int = 0,
    count_bytes: Callable[[Tensor], int] | None = None,
) -> LatentBounds:
    r"""Bounds on :math:`-\log p(x)` per token, where :math:`p(x) = \sum_z p(z)\, p(x | z)` for each window ``x``.

    .. math:: \mathrm{ELBO} = \mathbb E_q[-\log p(x|z)] + \mathrm{KL}(q \,\|\, p), \qquad
              \mathrm{IW}_K = -\log \frac1K \sum_{k=1}^K \frac{p(x|z_k)\, p(z_k)}{q(z_k|x)}, \quad z_k \sim q(z|x)

    The mixture takes the mean over all :math:`K + J` plans of
    :math:`p(x|z) p(z) (K + J) / (K q(z|x) + J p(z))`, which is :math:`p(x)` in expectation as well.

    Convention: stream, windows and predicted tokens are those of ``evaluate_language`` with ``overlap=0``, so that the
    number of a decoder without a plan from there and these are of the same tokens in the same context. A plan belongs
    to one window, so windows cannot share context: a later part of a text given an earlier one has no such bound.
    The last window may be shorter; it is read without pads.

    Args:
        data: a split, or any stream of tokens, whose first is context and is not predicted.
        n_samples: posterior plans per window, ``K``.
        n_windows: only so many, evenly spaced; None reads the whole split.
        seed: of the plans. Each window has generators of its own: ``batch_size`` changes nothing but rounding.
        count_bytes: of the text that tokens of a stream stand for, for bits per byte; of a split it is the split's.

    Accuracy: weights, sums and logarithms in float64; each bound is estimated, its noise is that of the plans drawn.
    Cost: lower half and encoder once, upper half ``n_samples + 4`` times per window, in batches of ``batch_size`` rows.
    Raises: ValueError for a window that the model cannot take, or counts below 1.
    Source: Burda, Grosse & Salakhutdinov, "Importance Weighted Autoencoders", 2016, eq. 8; Veach & Guibas,
        "Optimally Combining Sampling Techniques for Monte Carlo Rendering", 1995 (balance heuristic).
    """
    if isinstance(data, TokenDataset):
        count_bytes = data.count_bytes
        data = text_stream(data)
    check_window(model, seq_len)
    for name, value in (("batch_size", batch_size), ("n_samples", n_samples)):
        check_integer(name, value)
    check_integer("seed", seed, minimum=0)
    indices = _chosen(-(-(len(data) - 1) // seq_len), n_windows)
    batches = _batches(data, indices, seq_len, batch_size)
    with evaluation_mode(model):
        parts = [_measure(model, rows, here, n_samples, seed) for here, rows in batches]
    return _summed(parts, n_samples, count_bytes)


def bounds_per_byte(bounds: LatentBounds) -> dict[str, float]:
    """What bounds the model's own likelihood, in bits per byte of the tokens that were predicted."""
    assert bounds.n_bytes is not None
    nats = {name: getattr(bounds, name) * bounds.n_tokens for name in UPPER_BOUNDS}
    return {name: bits_per_byte(value, bounds.n_bytes) for name, value in nats.items()}


def report(bounds: LatentBounds) -> dict[str, Any]:
    """The bounds as JSON values: nats per token, and bits per byte of the upper bounds; the leak is named one."""
    values = asdict(bounds)
    values["usage"].pop("kl")  # the one of the bounds
    leak = {"posterior_cross_entropy_leaking": values.pop("posterior_cross_entropy")}
    return leak | values | {f"{name}_bits_per_byte": bits for name, bits in bounds_per_byte(bounds).items()}


def _chosen(available: int, wanted: int | None) -> list[int]:
    if wanted is None:
        return list(range(available))
    check_integer("n_windows", wanted)
    check(wanted <= available, "n_windows", wanted, f"at most the split's {available}")
    return [index * available // wanted for index in range(wanted)]


def _batches(
    stream: Int[Tensor, " n"], indices: list[int], seq_len: int, batch_size: int
) -> list[tuple[list[int], Int[Tensor, "B T1"]]]:
    """Numbers of windows and their tokens, one more than they predict; a shorter last window comes alone."""
    whole = [index for index in indices if (index + 1) * seq_len < len(stream)]
    groups = [whole[first : first + batch_size] for first in range(0, len(whole), batch_size)]
    groups += [[index] for index in indices[len(whole) :]]
    windows = [[stream[i * seq_len : (i + 1) * seq_len + 1] for i in group] for group in groups]
    return [(group, torch.stack(rows)) for group, rows in zip(groups, windows, strict=True)]


def _measure(
    model: Decoder, rows: Int[Tensor, "B T1"], indices: list[int], n_samples: int, seed: int
) -> _Measured:
    rows = rows.to(device_of(model))
    half, targets = model.lower(rows[:, :-1]), rows[:, 1:]
    n_tokens = targets.shape[1]
    logits = model.posterior(half).double().cpu()
    codes = _draw(model, logits, indices, n_samples, seed)
    losses = torch.stack([_loss(model, half, code, targets) for code in codes])
    log_prior = -n_tokens * logits.shape[-1] * math.log(2)
    log_ratio = torch.stack([code_log_probability(code, logits).sum(1) for code in codes]) - log_prior
    log_weights = -losses[:n_samples] - log_ratio[:n_samples]
    total = log_weights.logsumexp(0)
    # K q + J p, relative to p
    log_mixture = torch.logaddexp(
        log_ratio + math.log(n_samples), log_ratio.new_tensor(math.log(PRIOR_DRAWS))
    )
    return _Measured(
        posterior=losses[:n_samples].mean(0),
        prior=losses[n_samples:].mean(0),
        weighted=math.log(n_samples) - total,
        mixture=-(-losses - log_mixture).logsumexp(0),
        effective=(2 * total - (2 * log_weights).logsumexp(0)).exp(),
        logits=logits.flatten(0, 1),
        code=codes[0].flatten(),
        targets=targets.flatten(),
    )


def _draw(
    model: Decoder, logits: Float[Tensor, "B T H"], indices: list[int], n_samples: int, seed: int
) -> Int[Tensor, "KJ B T"]:
    """Plans of each window: ``n_samples`` of the posterior, then ``PRIOR_DRAWS`` of the prior."""
    windows = []
    for row, index in zip(logits, indices, strict=True):
        read = sample_plan(row.expand(n_samples, -1, -1), generator=_generator(seed, index, 0)).code
        drawn = model.sample_prior(PRIOR_DRAWS, len(row), generator=_generator(seed, index, 1)).code
        windows.append(torch.cat([read, drawn.cpu()]))
    return torch.stack(windows, 1)


def _generator(seed: int, window: int, purpose: int) -> torch.Generator:
    state = np.random.SeedSequence((seed, window, purpose)).generate_state(1)
    return torch.Generator().manual_seed(int(state[0]))


def _loss(
    model: Decoder, half: LowerOutput, code: Int[Tensor, "B T"], targets: Int[Tensor, "B T"]
) -> Float[Tensor, "B"]:
    """Nats of each window given a plan, in float64 on the CPU."""
    logits = model.upper(half, Plan(code.to(targets.device))).logits.float()
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view_as(targets).double().sum(1).cpu()


def _summed(
    parts: list[_Measured], n_samples: int, count_bytes: Callable[[Tensor], int] | None
) -> LatentBounds:
    logits, code, effective = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("logits", "code", "effective")
    )
    n_tokens, kl = len(code), kl_per_token(logits).mean().item()

    def per_token(totals: Iterable[Tensor]) -> float:
        return sum(total.sum().item() for total in totals) / n_tokens

    posterior = per_token(part.posterior for part in parts)
    return LatentBounds(
        posterior_cross_entropy=posterior,
        prior_cross_entropy=per_token(part.prior for part in parts),
        kl=kl,
        elbo=posterior + kl,
        importance_weighted=per_token(part.weighted for part in parts),
        mixture_weighted=per_token(part.mixture for part in parts),
        effective_samples=effective.mean().item(),
        n_samples=n_samples,
        n_windows=len(effective),
        n_tokens=n_tokens,
        n_bytes=None if count_bytes is None else sum(count_bytes(part.targets) for part in parts),
        usage=code_usage(logits, code),
    )

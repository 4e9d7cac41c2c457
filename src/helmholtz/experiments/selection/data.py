r"""Channel-wise selection: a lossless cache of tokens from which every channel must read a token of its own.

The law. The values of a channel are ``n`` independent standard normal numbers and all tokens have the same prior
weight. A mean reads 0. A free energy reads, by how much less than the largest value, is known exactly: to the value
of every token add Gumbel noise :math:`g_i / \beta`; the largest sum is a log-sum-exp plus one Gumbel number, so that

.. math:: \mathrm{E} F_\beta = \mathrm{E} \max_i (v_i + g_i / \beta) - \frac{\ln n + \gamma}{\beta}, \qquad
          0 \le \max_i v_i - F_\beta \le \frac{\ln n}{\beta}

and the maximum of independent numbers is an integral over their distribution function.

The tasks. A query, a cache, and per channel the value that is wanted: the channel's largest, or the one that the query
names for it.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from helmholtz._checks import check, check_choice, check_integer, check_positive

Target = Literal["maximum", "named"]

EULER = 0.5772156649015329
FARTHEST = 9.0
"""Standard deviations beyond which a normal number is not looked for: they hold 1e-18 of it."""
NODES, WEIGHTS = np.polynomial.legendre.leggauss(12)
STEP = 0.05
"""Of the outer integral, in standard deviations."""


def expected_maximum(n_tokens: int) -> float:
    r"""Mean of the largest of ``n`` standard normal numbers, :math:`\int 1 - \Phi(x)^n` from where the power is 0.

    Accuracy: 1e-12.
    """
    check_integer("n_tokens", n_tokens)
    x = torch.arange(-FARTHEST, FARTHEST, STEP, dtype=torch.float64)
    return _mean_of(-FARTHEST, STEP, torch.special.ndtr(x) ** n_tokens)


def expected_free_energy(n_tokens: int, beta: float, *, cap: float = math.inf) -> float:
    r"""Mean of :math:`F_\beta` under the uniform prior over ``n`` standard normal values.

    Args:
        beta: inverse temperature, in 1/units of the values.
        cap: where the exponent is clipped, in nats, as the layers do it.

    Accuracy: 1e-10 for ``beta`` from 0.05 to 200; test against the series at 0 and against samples.
    """
    check_integer("n_tokens", n_tokens)
    check_positive("beta", beta)
    check(cap > 0, "cap", cap, "above 0")
    sharp = cap / beta < FARTHEST  # the borders have a mass, which the noise alone makes smooth
    step = min(STEP, 0.25 / beta) if sharp else STEP * max(1.0, 1 / beta)
    low, high = -FARTHEST - 6 / beta, FARTHEST + (40 + math.log(n_tokens)) / beta
    x = torch.arange(low, high, step, dtype=torch.float64)
    below = torch.cat([_gumbel_distribution(part, beta, cap / beta) for part in x.split(64)])
    return _mean_of(low, step, below**n_tokens) - (math.log(n_tokens) + EULER) / beta


def expected_gap(n_tokens: int, beta: float, *, cap: float = math.inf) -> float:
    """By how much a free energy stays below the channel's largest value, on average."""
    return expected_maximum(n_tokens) - expected_free_energy(n_tokens, beta, cap=cap)


def _mean_of(low: float, step: float, distribution: Float[Tensor, " n"]) -> float:
    """Of a number whose distribution function, in steps from ``low``, goes from 0 to 1: the trapezoid rule, which is
    exact to rounding where the function is smooth and flat at both ends."""
    return low - step / 2 + step * (1 - distribution).sum().item()


def _gumbel_distribution(x: Float[Tensor, " n"], beta: float, border: float) -> Float[Tensor, " n"]:
    """P(clip(v) + g / beta <= x): the density of ``v`` against that of the noise, and the mass at either border."""
    end = min(border, FARTHEST)
    panels = math.ceil(2 * end / min(1.0, 2 / beta))
    width = 2 * end / panels
    middle = -end + width * (torch.arange(panels, dtype=torch.float64) + 0.5)
    v = (middle.unsqueeze(1) + width / 2 * torch.from_numpy(NODES)).flatten()
    mass = (
        (width / 2 * torch.from_numpy(WEIGHTS)).repeat(panels)
        * (-v.square() / 2).exp()
        / math.sqrt(2 * math.pi)
    )
    inside = _gumbel(x.unsqueeze(1) - v, beta) @ mass
    if border >= FARTHEST:
        return inside
    tail = torch.special.ndtr(torch.tensor(-border, dtype=torch.float64))
    return inside + tail * (_gumbel(x - border, beta) + _gumbel(x + border, beta))


def _gumbel(x: Tensor, beta: float) -> Tensor:
    return (-(-beta * x).exp()).exp()


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionTask:
    """What every channel is asked for, and how large the cache is."""

    target: Target = "maximum"
    """The largest value of the channel, or the value of the token that the query names for the channel."""
    n_tokens: int = 32
    n_channels: int = 16

    def __post_init__(self) -> None:
        check_choice("target", self.target, get_args(Target))
        check_integer("n_tokens", self.n_tokens, minimum=2)
        check_integer("n_channels", self.n_channels)

    @property
    def width(self) -> int:
        """Of the query and of a token. A named task needs room for a token's number per channel."""
        if self.target == "maximum":
            return self.n_channels
        return self.n_channels * max(self.n_tokens, 1 + -(-self.n_tokens // self.n_channels))


class Caches(NamedTuple):
    """Independent draws of a task."""

    query: Float[Tensor, "n 1 W"]
    cache: Float[Tensor, "n T W"]
    """The channels come first; in a named task the token's number follows, one-hot."""
    target: Float[Tensor, "n D"]
    token: Int[Tensor, "n D"]
    """Whose value is the target."""


def sample_caches(task: SelectionTask, n_sequences: int, *, generator: torch.Generator) -> Caches:
    """Fresh standard normal values; the query is constant, or the one-hot numbers of the tokens that it names."""
    check_integer("n_sequences", n_sequences)
    n, t, d = n_sequences, task.n_tokens, task.n_channels
    values = torch.randn(n, t, d, generator=generator)
    if task.target == "maximum":
        largest = values.max(1)
        return Caches(torch.ones(n, 1, d), values, largest.values, largest.indices)
    token = torch.randint(t, (n, d), generator=generator)
    query, cache = torch.zeros(n, 1, task.width), torch.zeros(n, t, task.width)
    query[:, 0, : d * t] = torch.nn.functional.one_hot(token, t).flatten(1).float()
    cache[..., :d], cache[..., d : d + t] = values, torch.eye(t)
    return Caches(query, cache, values.gather(1, token.unsqueeze(1)).squeeze(1), token)

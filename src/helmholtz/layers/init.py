"""Initialisation: linear maps by their fan-in, residual branches scaled down with depth.

Every linear map starts with weights from N(0, 1 / (3 fan_in)). Of an input of unit mean square, which is what a norm
gives, its outputs then have variance 1/3 at any width: queries, keys, values, the logits of gates and of decays, the
conditioning, in every mixer alike. 1 / (3 fan_in) is the variance of torch's own ``nn.Linear``, so that
``torch.nn.Linear.reset_parameters`` is the same start but for the shape of the distribution; and its deviation is
0.02, the constant that GPT-2 made customary, at a fan-in of 833, a width of the models for which it was found. At a
width of 128 that constant is 2.5 times smaller, and two maps in a row, as queries and keys are, give logits that are
6.5 times smaller (``docs/design/010-initialisation.md``).

A vector that enters the residual stream (an embedding, a code's vector, a position) is drawn as the row of a matrix of
``fan_in = d_model``: tied to the embedding, the output matrix is one.
"""

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar

import torch
from torch import Tensor, nn

_constant: ContextVar[float | None] = ContextVar("initializer_range", default=None)


@contextlib.contextmanager
def initializer_range(std: float | None) -> Iterator[None]:
    """Within, whatever goes by fan-in is drawn from N(0, std^2) instead; None changes nothing.

    In the same order, from the same random numbers. Layers draw when they are built, so a model enters this around its
    construction; with 0.02 it starts as all models did before 1 / (3 fan_in).
    """
    token = _constant.set(_constant.get() if std is None else std)
    try:
        yield
    finally:
        _constant.reset(token)


@torch.no_grad()
def init_weight(weight: Tensor, fan_in: int) -> None:
    """Draw ``weight`` from N(0, 1 / (3 fan_in)). On the meta device there is no memory to draw into."""
    constant = _constant.get()
    if not weight.is_meta:
        nn.init.normal_(weight, std=(3 * fan_in) ** -0.5 if constant is None else constant)


@torch.no_grad()
def init_normal(module: nn.Module) -> None:
    """Draw every linear and embedding weight below ``module`` from N(0, 1 / (3 fan_in)); biases start at 0.

    The fan-in of an embedding is its width (above). Weights on the meta device are left alone.
    """
    for child in module.modules():
        if isinstance(child, nn.Linear):
            init_weight(child.weight, child.in_features)
        if isinstance(child, nn.Embedding):
            init_weight(child.weight, child.embedding_dim)
        if isinstance(child, nn.Linear) and child.bias is not None and not child.bias.is_meta:
            nn.init.zeros_(child.bias)


@torch.no_grad()
def scale_residual(projections: Sequence[nn.Linear]) -> None:
    """Scale the ``n`` projections that write into a residual stream by ``n^(-1/2)``.

    The stream is a sum of ``n = 2 n_layers`` branches; so its variance at the start does not grow with depth.

    Source: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, section 2.3.
    """
    for projection in projections:
        projection.weight.mul_(len(projections) ** -0.5)

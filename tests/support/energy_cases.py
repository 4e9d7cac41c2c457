"""Random token energies for tests: sizes, strengths and memories of every kind."""

import torch
from hypothesis import strategies as st

from helmholtz.ops import EnergyParameters, TokenField


def energy_case(
    n=5, d=8, e=6, k=7, *, kappa=0.7, strength=0.9, beta=2.0, empty=(), dtype=torch.float64, seed=0, scale=1.0
):
    """``(z, field, parameters)``; rows of the memory in ``empty`` hold nothing, deltas begin with an exact 0."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    patterns = normal(k, d)
    patterns = patterns * d**0.25 / patterns.norm(dim=-1, keepdim=True).clamp(min=1e-9)
    delta = torch.rand(n, e, generator=generator, dtype=torch.float64)
    delta[:, ::3] = 0
    delta[:, 1::3] *= 1e-4
    log_prior = None
    if len(empty):
        log_prior = torch.zeros(k, dtype=torch.float64)
        log_prior[list(empty)] = -torch.inf
    field = TokenField(normal(n, d), normal(n, e), normal(n, e).sigmoid(), delta)
    parameters = EnergyParameters(
        normal(e, d) / e**0.5, patterns, log_prior,
        torch.tensor([kappa], dtype=torch.float64), torch.tensor([strength], dtype=torch.float64), beta,
    )  # fmt: skip
    z = normal(n, d)
    return z.to(dtype), cast(field, dtype), cast(parameters, dtype)


def cast(values, dtype):
    return type(values)(*(x.to(dtype) if isinstance(x, torch.Tensor) else x for x in values))


@st.composite
def energy_cases(draw):
    """Any size, strengths from 0 to far beyond contraction, memories with none, some or all rows empty."""
    d, k = draw(st.integers(1, 32)), draw(st.integers(1, 40))
    empty = draw(st.sampled_from(["none", "some", "all"]))
    rows = {"none": (), "some": range(0, k, 2), "all": range(k)}[empty]
    return energy_case(
        draw(st.integers(1, 4)), d, draw(st.integers(1, 24)), k,
        kappa=draw(st.sampled_from([0.0, 0.3, 5.0])), strength=draw(st.sampled_from([0.0, 0.5, 8.0])),
        beta=draw(st.sampled_from([0.1, 2.0, 20.0])), empty=rows, seed=draw(st.integers(0, 10_000)),
        scale=draw(st.sampled_from([0.1, 1.0, 10.0])),
    )  # fmt: skip

"""Equilibrium layers and models whose every term matters, and the tools to look at their problems."""

from typing import Any

import torch
from torch import Tensor, nn

from helmholtz.layers.equilibrium import Equilibrium, EquilibriumLayer, TokenProblem
from helmholtz.layers.equilibrium_config import EquilibriumConfig
from helmholtz.layers.sequence import sequence_layout
from helmholtz.models.mamba_hopfield import MambaHopfield, MambaHopfieldConfig
from helmholtz.ops.token_energy import EnergyParameters, TokenField
from helmholtz.solvers import SolverConfig

MODES = ("alternating", "simultaneous", "cascade", "picard", "anderson")
MONOTONE = ("alternating", "simultaneous")
TIGHT = SolverConfig(max_steps=200, rtol=1e-13, energy_rtol=1e-13)
"""As far as float64 goes."""


@torch.no_grad()
def enliven(layer: EquilibriumLayer, *, strong: bool = True) -> EquilibriumLayer:
    """Redraw what starts small or equal; with ``strong`` couplings close to what the regime allows."""
    dynamics = layer.dynamics
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            module.weight.normal_(std=module.in_features**-0.5)
            if module.bias is not None:
                module.bias.normal_()
    dynamics.weight.normal_(std=1 / (sum(dynamics.weight.shape) ** 0.5))
    if layer.config.stability == "contractive":
        dynamics.theta.copy_(torch.tensor([2.0, 2.0, -3.0 if strong else 1.0]))
    else:
        dynamics.log_strengths.copy_(torch.tensor([0.5, 0.2]))
    return layer


def make_layer(seed: int = 1, *, strong: bool = True, **fields: Any) -> EquilibriumLayer:
    """A lively layer in float64 that solves tightly, unless ``fields`` say otherwise."""
    torch.manual_seed(seed)
    sizes = {"d_model": 8, "d_inner": 12, "d_state": 5, "d_head": 4, "n_patterns": 9, "solver": TIGHT}
    layer = EquilibriumLayer(EquilibriumConfig(**sizes | fields))
    return enliven(layer, strong=strong).double()


def context(batch: int, time: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, time, width, generator=generator, dtype=torch.float64)


def run(layer: EquilibriumLayer, c: Tensor, mask: Tensor | None = None, **given: Any) -> Equilibrium:
    return layer(c, sequence_layout(c, mask), **given)


def make_model(seed: int = 1, **fields: Any) -> MambaHopfield:
    """A small lively decoder in evaluation mode."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"vocab_size": 37, "d_model": 16, "n_layers": 2, "d_state": 4, "d_head": 8}
    model = MambaHopfield(MambaHopfieldConfig(**sizes | {"n_patterns": 12, "max_seq_len": 64} | fields))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(std=module.in_features**-0.5)
            elif isinstance(module, nn.RMSNorm):
                module.weight.uniform_(0.5, 1.5)
        model.embed.weight.normal_(std=0.5)
    enliven(model.equilibrium)
    return model.eval()


def random_problem(
    seed: int, *, rows: int, width: int, channels: int, patterns: int, strength: float = 1.0
) -> TokenProblem:
    """Energies of any strength, straight from random coefficients: no regime holds them."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    field = TokenField(
        u=normal(rows, width), a=normal(rows, channels), gate=normal(rows, channels).sigmoid(),
        delta=normal(rows, channels).sigmoid(),
    )  # fmt: skip
    stored = nn.functional.normalize(normal(patterns, width), dim=-1) * width**0.25
    parameters = EnergyParameters(
        weight=normal(channels, width) / width**0.5, patterns=stored, log_prior=None,
        kappa=torch.full((1,), strength, dtype=torch.float64),
        strength=torch.full((1,), strength, dtype=torch.float64), beta=2.0,
    )  # fmt: skip
    return TokenProblem(field, parameters)


def jacobians(problem: TokenProblem, z: Tensor) -> Tensor:
    """The Jacobian of every row's map, ``N D D``, by its products with unit vectors."""
    n, width = z.shape
    rows = torch.arange(n).repeat_interleave(width)
    units = torch.eye(width, dtype=z.dtype).repeat(n, 1)
    return problem.take(rows).jvp(z[rows], units).view(n, width, width)

"""What equilibria say of themselves: how near they are to patterns, how far from their start, how steep the map is."""

import math
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from helmholtz.layers.equilibrium import Equilibrium, EquilibriumLayer
from helmholtz.ops.hopfield import hopfield_potential
from helmholtz.solvers.spectrum import local_lipschitz

SMALL = 1e-3
"""Norm, in units of the patterns', far below which an equilibrium has no direction."""
POWER_STEPS = 30


def retrieval_energy(layer: EquilibriumLayer, found: Equilibrium) -> Float[Tensor, "N"]:
    r"""How far the direction of each token's equilibrium is from the stored patterns, at least 0:

    .. math:: L_E = R^2 - \frac1\beta \Big( \log \sum_i e^{\beta m_i \cdot \hat z} - \log K \Big), \qquad
              \hat z = R\, z^* / |z^*|

    The Hopfield energy at norm :math:`R`. Unlike the energy of the token itself it is bounded, by :math:`2 R^2`. An
    equilibrium near 0 has no direction and counts as shorter.
    """
    z, parameters, radius = found.rows(found.z), found.parameters, layer.memory.radius
    length = (z.square().sum(-1, keepdim=True) + (SMALL * radius) ** 2).sqrt()
    potential = hopfield_potential(
        radius * z / length, parameters.patterns, parameters.beta, parameters.log_prior
    )
    return radius**2 - potential


def start_distance(layer: EquilibriumLayer, found: Equilibrium) -> Float[Tensor, "N"]:
    r"""Relative squared distance from start to equilibrium, :math:`|z_0 - z^*|^2 / (|z^*|^2 + \epsilon)`.

    Its gradient reaches the projection that makes the start, and nothing else: neither equilibrium nor context move.
    """
    context, z = found.rows(found.context).detach(), found.rows(found.z).detach()
    start = layer.dynamics.start_proj(context).to(z.dtype)
    floor = (SMALL * layer.memory.radius) ** 2
    return (start - z).square().sum(-1) / (z.square().sum(-1) + floor)


def learned_strengths(layer: EquilibriumLayer) -> dict[str, float]:
    """The factors that all tokens share, and how many patterns there are.

    ``contraction_bound`` bounds the map's Lipschitz constant whatever the text is; ``margin`` is
    that of the pattern which is told apart worst, ``HopfieldMemory.margin``.
    """
    memory, parameters = layer.memory, layer.dynamics.energy_parameters(layer.memory())
    norm = torch.linalg.matrix_norm(parameters.weight.double(), 2).item()
    kappa, strength = parameters.kappa.item(), parameters.strength.item()
    n_active = active_patterns(layer)
    return {
        "kappa": kappa,
        "strength": strength,
        "contraction_bound": kappa * norm**2 + strength * memory.beta * memory.radius**2,
        "margin": memory.margin(),
        "slots_used": float(n_active - layer.config.n_patterns),
    }


def active_patterns(layer: EquilibriumLayer) -> int:
    """Learned patterns and the slots that hold one."""
    prior = layer.memory.log_prior()
    return len(layer.memory.patterns()) if prior is None else int((~torch.isneginf(prior)).sum())


@torch.no_grad()
def equilibrium_statistics(layer: EquilibriumLayer, calls: Iterable[Equilibrium]) -> dict[str, float]:
    """Averages over all tokens of ``calls``, beside ``learned_strengths``.

    ``converged`` is a share; ``mean_steps`` and ``max_steps`` are the solver's; ``residual`` is relative;
    ``retrieval_entropy`` is of the retrieval weights and ``usage_entropy`` of their average, in nats: if they are
    equal, every token retrieves the same. ``lipschitz_local`` is the largest Lipschitz constant at an equilibrium and
    ``lipschitz_certificate`` the proven bound, both of the first call's tokens.
    """
    sums, usage, n_tokens, max_steps = dict[str, float](), torch.zeros(()), 0, 0
    found_curvature = dict[str, float]()
    for found in calls:
        weights = found.weights().double()
        for name, values in _per_token(layer, found, weights).items():
            sums[name] = sums.get(name, 0.0) + values.double().sum().item()
        usage = usage + weights.sum(0).cpu()
        n_tokens += len(weights)
        max_steps = max(max_steps, int(found.solution.num_steps.max()))
        found_curvature = found_curvature or _curvature(found)
    means = {name: total / n_tokens for name, total in sums.items()}
    entropy = torch.special.entr(usage / n_tokens).sum().item()
    counts = {"usage_entropy": entropy, "max_steps": float(max_steps), "n_tokens": float(n_tokens)}
    return means | counts | found_curvature | learned_strengths(layer)


def _per_token(
    layer: EquilibriumLayer, found: Equilibrium, weights: Float[Tensor, "N K"]
) -> dict[str, Tensor]:
    solution = found.solution
    return {
        "converged": solution.converged,
        "mean_steps": solution.num_steps,
        "residual": solution.residual,
        "energy": solution.energy,
        "retrieval_energy": retrieval_energy(layer, found),
        "retrieval_entropy": torch.special.entr(weights).sum(-1),
        "start_distance": start_distance(layer, found),
    }


def _curvature(found: Equilibrium) -> dict[str, float]:
    generator, z = torch.Generator().manual_seed(0), found.rows(found.z)
    constant = local_lipschitz(found.problem, z, steps=POWER_STEPS, generator=generator)
    return {"lipschitz_local": constant.max().item(), "lipschitz_certificate": found.certificate()}


def is_mean_retrieval(layer: EquilibriumLayer, entropy: float, *, within: float = 0.1) -> bool:
    """Whether an entropy of the retrieval weights is that of the mean of all patterns, up to ``within`` nats."""
    n_active = active_patterns(layer)
    return n_active > 1 and entropy > math.log(n_active) - within

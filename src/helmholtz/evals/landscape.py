"""The energy of a model's tokens as arrays: slices, paths of the solvers, basins, critical points, the memory.

``landscape_plots`` draws them. Everything is computed in float64, whatever the model's dtype.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from helmholtz._checks import check, check_integer, check_positive
from helmholtz.evals.equilibria import active_patterns, equilibrium_of
from helmholtz.evals.landscape_case import (
    Basis,
    Plane,
    TokenCase,
    choose_plane,
    flat,
    main_directions,
    token_case,
)
from helmholtz.evals.landscape_flow import (
    Basins,
    CriticalPoint,
    Trajectories,
    basins,
    saddles_between,
    trajectories,
)
from helmholtz.layers.equilibrium import Equilibrium
from helmholtz.models.decoder import Decoder
from helmholtz.ops.hopfield import hopfield_weights, pattern_margins
from helmholtz.solvers import SolverConfig
from helmholtz.solvers.base import Mode

MARGIN = 1.25
"""Half the side of a slice, in distances of the farthest thing that it should hold."""
SHOWN_PATTERNS = 64
"""Patterns, the most used ones, whose cosines are compared."""


@dataclass(frozen=True, slots=True)
class EnergySlice:
    """The energy in a plane through an equilibrium. Index ``[j, i]`` is at ``(ticks[i], ticks[j])``."""

    case: TokenCase
    plane: Plane
    ticks: Float[Tensor, "n"]
    energy: Float[Tensor, "n n"]
    """Above the equilibrium's."""
    descent: Float[Tensor, "n n 2"]
    """The negative gradient's part in the plane."""
    residual: Float[Tensor, "n n"]
    """Norm of the whole gradient, ``|f(z) - z|``."""

    @property
    def lowest(self) -> tuple[float, float]:
        """Coordinates of the grid point with the smallest energy; the equilibrium is at (0, 0)."""
        j, i = divmod(int(self.energy.argmin()), len(self.ticks))
        return self.ticks[i].item(), self.ticks[j].item()


@dataclass(frozen=True, slots=True)
class MemoryOrganisation:
    """How the patterns lie and how much they are used."""

    coordinates: Float[Tensor, "K 2"]
    """Along the patterns' two main directions, from their mean."""
    equilibria: Float[Tensor, "N 2"]
    """The tokens' equilibria in the same plane."""
    explained: float
    """Part of the patterns' variance in these directions."""
    most_used: Int[Tensor, "k"]
    """Indices of at most 64 patterns, the most used first."""
    cosine: Float[Tensor, "k k"]
    """Between those."""
    usage: Float[Tensor, "K"]
    """Mean retrieval weight over the tokens; sums to 1."""
    usage_entropy: float
    """Of ``usage``, in nats; ``ln K`` if all are used alike."""
    token_entropy: float
    """Mean entropy of one token's weights: how many patterns it retrieves at once."""
    margin: float
    """The smallest of ``ops.pattern_margins``, in nats; below 3 a pattern blends into others."""

    @property
    def largest_cosine(self) -> float:
        """Between two different patterns of those compared; 1 with fewer than two."""
        other = self.cosine - 2 * torch.eye(len(self.cosine), dtype=self.cosine.dtype)
        return other.max().item() if len(other) > 1 else 1.0


def energy_slice(case: TokenCase, plane: Plane, ticks: Float[Tensor, "n"]) -> EnergySlice:
    """Energy and gradient at all pairs of ticks, in one call."""
    step, energy = case.evaluate(plane.grid(ticks))
    size = (len(ticks), len(ticks))
    return EnergySlice(
        case=case,
        plane=plane,
        ticks=ticks,
        energy=energy.view(size),
        descent=(step @ plane.axes.T).view(*size, 2),
        residual=step.norm(dim=-1).view(size),
    )


def frame_radius(case: TokenCase, plane: Plane) -> float:
    """Half the side of a square that takes in the start and the patterns that lie in the plane."""
    shown = torch.cat([case.start.unsqueeze(0), case.patterns[list(plane.anchors)]])
    return MARGIN * max(plane.coordinates(shown).abs().max().item(), 0.5 * case.radius)


class EnergyLandscapeAnalyzer:
    """Arrays that describe the energies of the tokens of one call.

    Args:
        equilibrium: of a call of the model; its tokens are named by row of the batch and place in the sequence.
        solver: the model's.
        seed: of random directions.
    """

    def __init__(self, equilibrium: Equilibrium, solver: SolverConfig, *, seed: int = 0) -> None:
        check_integer("seed", seed, minimum=0)
        self.equilibrium, self.solver, self.seed = equilibrium, solver, seed

    @classmethod
    def of(cls, model: Decoder, tokens: Int[Tensor, "B T"], *, seed: int = 0) -> "EnergyLandscapeAnalyzer":
        """Of the equilibria of a text under ``model``, which is left in the mode it was in."""
        return cls(equilibrium_of(model, tokens), model.solver, seed=seed)

    def case(self, *, row: int = 0, token: int = -1) -> TokenCase:
        """One token's energy, its start and its equilibrium. Raises: as ``token_case``."""
        return token_case(self.equilibrium, self.solver, row=row, token=token)

    def slice(
        self,
        *,
        row: int = 0,
        token: int = -1,
        basis: Basis = "memory",
        radius: float | None = None,
        resolution: int = 41,
    ) -> EnergySlice:
        """Energy and gradient in a plane, from ``resolution^2`` points in one call.

        Args:
            basis: what spans the plane, see ``choose_plane``.
            radius: half the side; None takes in the start and the patterns that lie in the plane.
            resolution: points along a side; odd, so that the equilibrium is one of them.
        """
        return energy_slice(*self._grid(row, token, basis, radius, resolution))

    def trajectories(self, *, row: int = 0, token: int = -1) -> Trajectories:
        """How every mode of the solver, and plain steps, go from the token's start to its equilibrium."""
        return trajectories(self.case(row=row, token=token))

    def basins(
        self,
        *,
        row: int = 0,
        token: int = -1,
        basis: Basis = "memory",
        radius: float | None = None,
        resolution: int = 41,
        mode: Mode = "picard",
    ) -> Basins:
        """Where the starts of a grid end, solved in one batch; arguments as of ``slice`` and ``basins``."""
        return basins(*self._grid(row, token, basis, radius, resolution), mode=mode)

    def _grid(
        self, row: int, token: int, basis: Basis, radius: float | None, resolution: int
    ) -> tuple[TokenCase, Plane, Float[Tensor, "n"]]:
        case = self.case(row=row, token=token)
        plane = choose_plane(case, basis, seed=self.seed)
        check_integer("resolution", resolution, minimum=3)
        check(
            resolution % 2 == 1, "resolution", resolution, "odd: the equilibrium is the point in the middle"
        )
        radius = frame_radius(case, plane) if radius is None else radius
        check_positive("radius", radius)
        return case, plane, torch.linspace(-radius, radius, resolution, dtype=torch.float64)

    def critical_points(self, found: Basins) -> tuple[CriticalPoint, ...]:
        """The attractors of a plane and the saddles between them."""
        minima = [point for point in found.attractors if point.kind == "minimum"]
        return (*found.attractors, *saddles_between(found.case, minima))

    def memory(self) -> MemoryOrganisation:
        """How the memory's patterns lie, and which of them the tokens use. Raises: ValueError for an empty memory."""
        parameters = self.equilibrium.parameters
        patterns = active_patterns(parameters).detach().double()
        check(len(patterns) > 0, "memory", "no patterns", "a memory with patterns to look at")
        z = self.equilibrium.rows(self.equilibrium.z).detach().double()
        weights = hopfield_weights(z, patterns, parameters.beta)
        usage = weights.mean(0)
        most_used = usage.argsort(descending=True)[:SHOWN_PATTERNS]
        units = torch.nn.functional.normalize(patterns[most_used], dim=-1)
        mean = patterns.mean(0)
        axes, explained = main_directions(patterns - mean)
        return MemoryOrganisation(
            coordinates=flat(patterns - mean, axes),
            equilibria=flat(z - mean, axes),
            explained=explained,
            most_used=most_used,
            cosine=units @ units.T,
            usage=usage,
            usage_entropy=torch.special.entr(usage).sum().item(),
            token_entropy=torch.special.entr(weights).sum(-1).mean().item(),
            margin=pattern_margins(patterns, parameters.beta).amin().item(),
        )

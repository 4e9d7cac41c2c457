"""The theoretical tools in the original names, over ``helmholtz.evals``."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from helmholtz._checks import check
from helmholtz.evals import convergence, landscape
from helmholtz.evals.equilibria import equilibrium_of, random_tokens
from helmholtz.evals.landscape import EnergySlice, MemoryOrganisation
from helmholtz.evals.landscape_case import Basis
from helmholtz.evals.landscape_flow import Basins, CriticalPoint, Trajectories
from helmholtz.evals.landscape_plots import plot_basins, plot_memory, plot_slice, plot_trajectories
from helmholtz.interop.seeds.unified.model import UnifiedMambaHopfieldDEQ
from helmholtz.layers.equilibrium import Equilibrium

FoundT = TypeVar("FoundT")
CONTEXT_LENGTH = 8


class ConvergenceValidator:
    """Eight tests of what the theory promises, on one text (``helmholtz.evals.convergence``).

    Args:
        tokens: ids ``B T``; None draws some. They go through the model either way.
    """

    def __init__(
        self, model: UnifiedMambaHopfieldDEQ, tokens: Int[Tensor, "B T"] | None = None, *, seed: int = 0
    ) -> None:
        self._validator = convergence.ConvergenceValidator(model.model, tokens, seed=seed)

    def run_all_tests(self) -> dict[str, dict[str, Any]]:
        """Measured values of each test by its name, and ``summary`` with ``all_tests_passed`` and ``failed``."""
        report = self._validator.run_all_tests()
        results = {name: test.to_dict() for name, test in report.tests().items()}
        return results | {"summary": {"all_tests_passed": report.all_passed, "failed": list(report.failed)}}


class EnergyLandscapeAnalyzer:
    """Figures of the energy of one token, and the arrays behind them (``helmholtz.evals.landscape``).

    Every method takes ``diagnostics["z_equilibrium"]`` and ``diagnostics["context"]`` of one call of the model; without
    them it looks at a text of random ids. It draws a PNG into ``output_dir`` and returns what it drew.

    Args:
        output_dir: folder of the figures; None draws none.
    """

    def __init__(
        self,
        model: UnifiedMambaHopfieldDEQ,
        output_dir: str | os.PathLike[str] | None = "results/landscape",
        *,
        seed: int = 0,
    ) -> None:
        self.model, self.seed = model, seed
        self.output_dir = None if output_dir is None else Path(output_dir)

    def visualize_2d_slice(
        self,
        z_equilibrium: Float[Tensor, "B T D"] | None = None,
        context: Equilibrium | None = None,
        *,
        basis: Basis = "memory",
        radius: float | None = None,
        resolution: int = 41,
        row: int = 0,
        token: int = -1,
    ) -> EnergySlice:
        """Energy and its gradient in a plane around a token's equilibrium: ``slice.png``."""
        analyzer = self._analyzer(z_equilibrium, context)
        found = analyzer.slice(row=row, token=token, basis=basis, radius=radius, resolution=resolution)
        return self._drawn(found, plot_slice, "slice.png", "Energy around the equilibrium of a token")

    def visualize_convergence_trajectories(
        self,
        z_equilibrium: Float[Tensor, "B T D"] | None = None,
        context: Equilibrium | None = None,
        *,
        row: int = 0,
        token: int = -1,
    ) -> Trajectories:
        """How each mode of the solver converges, by its real iterates: ``trajectories.png``."""
        found = self._analyzer(z_equilibrium, context).trajectories(row=row, token=token)
        return self._drawn(found, plot_trajectories, "trajectories.png", "From the start to the equilibrium")

    def visualize_basin_of_attraction(
        self,
        z_equilibrium: Float[Tensor, "B T D"] | None = None,
        context: Equilibrium | None = None,
        *,
        basis: Basis = "memory",
        radius: float | None = None,
        resolution: int = 21,
        row: int = 0,
        token: int = -1,
    ) -> Basins:
        """Which start in a plane ends at which equilibrium: ``basins.png``."""
        analyzer = self._analyzer(z_equilibrium, context)
        found = analyzer.basins(row=row, token=token, basis=basis, radius=radius, resolution=resolution)
        return self._drawn(found, plot_basins, "basins.png", "Where each start ends")

    def analyze_critical_points(
        self,
        z_equilibrium: Float[Tensor, "B T D"] | None = None,
        context: Equilibrium | None = None,
        *,
        row: int = 0,
        token: int = -1,
    ) -> tuple[CriticalPoint, ...]:
        """The equilibria reached from a plane of starts, and the saddles between them, by their curvature."""
        analyzer = self._analyzer(z_equilibrium, context)
        return analyzer.critical_points(analyzer.basins(row=row, token=token, resolution=21))

    def visualize_memory_organization(
        self, z_equilibrium: Float[Tensor, "B T D"] | None = None, context: Equilibrium | None = None
    ) -> MemoryOrganisation:
        """How the patterns lie and which are used: ``memory.png``."""
        found = self._analyzer(z_equilibrium, context).memory()
        return self._drawn(found, plot_memory, "memory.png", "The patterns of the memory")

    def _analyzer(self, z: Tensor | None, context: Equilibrium | None) -> landscape.EnergyLandscapeAnalyzer:
        if context is None:
            wanted = "given together with z_equilibrium: an equilibrium is one of some energy"
            check(z is None, "context", None, wanted)
            generator = torch.Generator().manual_seed(self.seed)
            tokens = random_tokens(self.model.model, 1, CONTEXT_LENGTH, generator=generator)
            context = equilibrium_of(self.model.model, tokens)
        wanted = 'diagnostics["context"] of a call of the model'
        check(isinstance(context, Equilibrium), "context", type(context).__name__, wanted)
        if z is not None:
            same = z.shape == context.z.shape and torch.equal(z, context.z)
            check(same, "z_equilibrium", tuple(z.shape), "that of the same call as the context")
        return landscape.EnergyLandscapeAnalyzer(context, self.model.model.solver, seed=self.seed)

    def _drawn(self, found: FoundT, plot: Callable[..., object], name: str, title: str) -> FoundT:
        if self.output_dir is not None:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            plot(found, self.output_dir / name, title=title)
        return found

"""One warning for many calls whose equilibria did not all converge."""

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from helmholtz.layers.equilibrium import EquilibriumLayer
from helmholtz.solvers import ConvergenceWarning, Solution


@contextlib.contextmanager
def one_convergence_warning(model: nn.Module) -> Iterator[None]:
    """Unconverged tokens inside the block are counted, and at its end a single warning says how many they were.

    Acts on the equilibrium layers of ``model`` whose solver warns; for other models the block is like any other.
    """
    layers = [module for module in model.modules() if isinstance(module, EquilibriumLayer)]
    layers = [layer for layer in layers if layer.solver.on_nonconvergence == "warn"]
    own = [layer.solver for layer in layers]
    n_tokens, n_open, worst = 0, 0, 0.0

    def count(solution: Solution) -> None:
        nonlocal n_tokens, n_open, worst
        n_tokens += len(solution.status)
        unsolved = solution.residual[~solution.converged]
        n_open += len(unsolved)
        worst = max([worst, *unsolved.tolist()])

    for layer in layers:
        layer.solver, layer.observer = replace(layer.solver, on_nonconvergence="ignore"), count
    try:
        yield
    finally:
        for layer, solver in zip(layers, own, strict=True):
            layer.solver, layer.observer = solver, None
    if n_open:
        warnings.warn(
            f"{n_open:,} of {n_tokens:,} tokens did not converge (largest relative residual {worst:.1e}); "
            "they are given where their residual was smallest",
            ConvergenceWarning,
            stacklevel=3,
        )

"""Equilibria of independent rows, and their gradients. Knows problems and rows, no model."""

from helmholtz.solvers.adjoint import AbstractAdjoint, Implicit, Phantom, Unrolled
from helmholtz.solvers.base import (
    AbstractProblem,
    BackwardInfo,
    ConvergenceError,
    ConvergenceWarning,
    NonFiniteInputError,
    Solution,
    SolverConfig,
    Status,
)
from helmholtz.solvers.modes import solve

__all__ = [
    "AbstractAdjoint",
    "AbstractProblem",
    "BackwardInfo",
    "ConvergenceError",
    "ConvergenceWarning",
    "NonFiniteInputError",
    "Implicit",
    "Phantom",
    "Solution",
    "SolverConfig",
    "Status",
    "Unrolled",
    "solve",
]

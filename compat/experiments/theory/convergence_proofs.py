"""The original ``experiments.theory.convergence_proofs``."""

from helmholtz.interop.seeds.unified.theory import ConvergenceValidator

__all__ = ["ConvergenceValidator"]

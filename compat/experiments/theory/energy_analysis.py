"""The original ``experiments.theory.energy_analysis``."""

from helmholtz.interop.seeds.unified.theory import EnergyLandscapeAnalyzer

__all__ = ["EnergyLandscapeAnalyzer"]

"""Mamba-Hopfield-DEQ in the spelling of its original README; the page "From Mamba-Hopfield-DEQ" lists what behaves
differently, and why."""

from helmholtz.interop.seeds.unified.config import UnifiedModelConfig
from helmholtz.interop.seeds.unified.model import UnifiedMambaHopfieldDEQ, UnifiedModel
from helmholtz.interop.seeds.unified.objectives import UnifiedTrainingObjective
from helmholtz.interop.seeds.unified.tasks import AssociativeRecallExperiment, ContinualLearningExperiment
from helmholtz.interop.seeds.unified.theory import ConvergenceValidator, EnergyLandscapeAnalyzer
from helmholtz.interop.seeds.unified.trainer import CurriculumConfig, UnifiedModelTrainer

__all__ = [
    "AssociativeRecallExperiment",
    "ContinualLearningExperiment",
    "ConvergenceValidator",
    "CurriculumConfig",
    "EnergyLandscapeAnalyzer",
    "UnifiedMambaHopfieldDEQ",
    "UnifiedModel",
    "UnifiedModelConfig",
    "UnifiedTrainingObjective",
    "UnifiedModelTrainer",
]

"""The original ``free_transformer.injection``."""

from helmholtz.interop.seeds.free_transformer.model import InjectionMechanism

__all__ = ["InjectionMechanism"]

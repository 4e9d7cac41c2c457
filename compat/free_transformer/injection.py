"""The original ``free_transformer.injection``."""

from helmholtz.interop.seeds.free_transformer.injection import InjectionMechanism

__all__ = ["InjectionMechanism"]

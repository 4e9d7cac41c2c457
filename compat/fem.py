"""``from fem import FreeEnergyMixer, FreeEnergyMixerConfig``, as the original README has it."""

from helmholtz.interop.seeds.fem import FreeEnergyMixer, FreeEnergyMixerConfig

__all__ = ["FreeEnergyMixer", "FreeEnergyMixerConfig"]

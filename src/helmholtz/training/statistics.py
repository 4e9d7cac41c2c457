"""What a model's mixers have learned, as numbers for the metrics."""

from torch import nn

from helmholtz.layers.fem import FreeEnergyMixer


def mixer_statistics(model: nn.Module) -> dict[str, float]:
    """``{"<module>/<statistic>": value}`` for every Free Energy Mixer in ``model``: beta and gates. Empty without any."""
    return {
        f"{name}/{key}": value
        for name, module in model.named_modules()
        if isinstance(module, FreeEnergyMixer)
        for key, value in module.statistics().items()
    }

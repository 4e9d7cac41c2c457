"""Products with the weight of an ``nn.Linear``."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def is_plain(module: nn.Module) -> bool:
    """Whether calling the module does nothing but the product of an ``nn.Linear``: no adapter, no hook."""
    return type(module) is nn.Linear and not (module._forward_hooks or module._forward_pre_hooks)


def apply_linear(module: nn.Linear, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch _"]:
    """``module(x)``; where nothing but the product would happen, without the call of a module.

    For one token the call costs a third of the product. A replaced module (an adapter, a quantised weight) and hooks
    are honoured.
    """
    if is_plain(module):
        return F.linear(x, module.weight, module.bias)
    return module(x)

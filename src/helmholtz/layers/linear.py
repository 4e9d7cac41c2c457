"""Products with the weight of an ``nn.Linear``."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def apply_linear(module: nn.Linear, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch _"]:
    """``module(x)``; where nothing but the product would happen, without the call of a module.

    For one token the call costs a third of the product. A replaced module (an adapter, a quantised weight) and hooks
    are honoured.
    """
    if type(module) is nn.Linear and not (module._forward_hooks or module._forward_pre_hooks):
        return F.linear(x, module.weight, module.bias)
    return module(x)

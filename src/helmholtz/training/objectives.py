"""What a training step minimises."""

from collections.abc import Callable
from dataclasses import dataclass, field

from jaxtyping import Float, Int
from torch import Tensor, nn

from helmholtz.ops.losses import cross_entropy


@dataclass(frozen=True, slots=True)
class Objective:
    """A loss and the terms it is made of, all in nats per token."""

    loss: Float[Tensor, ""]
    terms: dict[str, Float[Tensor, ""]] = field(default_factory=dict)


ObjectiveFunction = Callable[[nn.Module, Int[Tensor, "B T1"]], Objective]


def next_token(model: nn.Module, tokens: Int[Tensor, "B T1"]) -> Objective:
    r"""Mean cross-entropy of each token given those before it, :math:`-\frac1T \sum_t \log p(x_{t+1} | x_{\le t})`.

    Takes ``T + 1`` tokens per sequence: the model reads the first ``T`` and is asked for the last ``T``.
    """
    loss = cross_entropy(model(tokens[:, :-1]).logits, tokens[:, 1:])
    return Objective(loss, {"cross_entropy": loss.detach()})

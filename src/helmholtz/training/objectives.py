"""What a training step minimises, and what an evaluation reports of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from jaxtyping import Float, Int
from torch import Tensor, nn

from helmholtz.layers.fem_reading import read_statistics
from helmholtz.ops.losses import cross_entropy


@dataclass(frozen=True, slots=True)
class Objective:
    """A loss, the terms it is made of, and what it says of the model as a language model; all in nats per token."""

    loss: Float[Tensor, ""]
    terms: dict[str, Float[Tensor, ""]]
    """For the record, detached; with what else a step's record shall show."""
    bound: Float[Tensor, ""]
    """Upper bound of the model's own cross-entropy, detached: what is validated and what "best" means."""


ObjectiveFunction = Callable[[nn.Module, Int[Tensor, "B T1"], int], Objective]
"""Of the model, tokens and the number of optimizer steps applied so far."""


@dataclass(frozen=True, slots=True)
class Report:
    """What an evaluation says beside the loss."""

    statistics: dict[str, float]
    warnings: dict[str, str] = field(default_factory=dict)
    """By name, what is wrong and what may help."""


ReportFunction = Callable[[nn.Module, Sequence[Int[Tensor, "_ _"]], int], Report]
"""Of the model, all batches of an evaluation and the number of optimizer steps applied so far."""


def next_token(model: nn.Module, tokens: Int[Tensor, "B T1"], step: int) -> Objective:
    r"""Mean cross-entropy of each token given those before it, :math:`-\frac1T \sum_t \log p(x_{t+1} | x_{\le t})`.

    Takes ``T + 1`` tokens per sequence: the model reads the first ``T`` and is asked for the last ``T``.
    """
    loss = model(tokens[:, :-1], targets=tokens[:, 1:]).nats
    return Objective(loss, {"cross_entropy": loss.detach()}, loss.detach())


def last_tokens(n_targets: int) -> ObjectiveFunction:
    """``next_token`` where only the last ``n_targets`` tokens are asked for: the others cannot be known."""

    def objective(model: nn.Module, tokens: Int[Tensor, "B T1"], step: int) -> Objective:
        logits = model(tokens[:, :-1]).logits[:, -n_targets:]
        loss = cross_entropy(logits, tokens[:, -n_targets:])
        return Objective(loss, {"cross_entropy": loss.detach()}, loss.detach())

    return objective


def learned(model: nn.Module, batches: Sequence[Int[Tensor, "_ _"]], step: int) -> Report:
    """Learned temperatures and gates of the model's mixers, the gates on the first batch."""
    return Report(read_statistics(model, lambda: model(batches[0][:, :-1])))

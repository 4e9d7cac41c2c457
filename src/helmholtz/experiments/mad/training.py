"""Training and measuring one MAD model: the published protocol, its quirks matched or fixed by named options."""

import itertools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from helmholtz._checks import check, check_choice, check_fraction, check_integer, check_positive
from helmholtz.experiments.mad.data import IGNORED, Examples
from helmholtz.models.base import evaluation_mode
from helmholtz.models.decoder import Decoder
from helmholtz.training.diagnosis import NonFiniteError
from helmholtz.training.fit import fit, shuffled
from helmholtz.training.optim import parameter_groups
from helmholtz.training.sequences import DATA_SEED

Schedule = Literal["constant", "cosine"]
Accuracy = Literal["batch_macro", "pooled_macro", "micro"]
Select = Literal["last", "best_test_perplexity"]
Stopped = Literal["end", "accuracy", "diverged"]
MIN_LR = 1e-6
"""End of the cosine."""
StepCallback = Callable[[int], None]
"""Called with the number of steps made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MadProtocol:
    """How models are trained and scored: AdamW with betas 0.9 and 0.999, float32, gradients not clipped.

    Raises: ValueError unless exactly one of ``steps`` and ``epochs`` is given, and for values out of range.
    """

    batch_size: int
    steps: int | None = None
    epochs: int | None = None
    """Passes over the training sequences, the last batch of each as small as it comes."""
    n_evaluations: int
    """Evenly over the training, the last at its end."""
    evaluation_batch_size: int = 128
    """Of the test; "batch_macro" depends on it."""
    schedule: Schedule = "constant"
    """"constant" is what the published code does, "cosine" (to 1e-6, per step) what it was meant to do."""
    accuracy: Accuracy = "batch_macro"
    """What scores a run: class-balanced accuracy per batch, mean over batches (the published code), class-balanced over
    all answers, or the fraction of right answers."""
    select: Select = "last"
    """Which evaluation counts: the last, or that with the lowest test perplexity (the published code)."""
    stop_at: float | None = 0.999
    """Test accuracy at which training ends (the published code); None for never."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "n_evaluations", "evaluation_batch_size"):
            check_integer(name, getattr(self, name))
        check(
            (self.steps is None) != (self.epochs is None),
            "steps",
            self.steps,
            "None if epochs are given, not else",
        )
        for name in ("steps", "epochs"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name))
        check_choice("schedule", self.schedule, get_args(Schedule))
        check_choice("accuracy", self.accuracy, get_args(Accuracy))
        check_choice("select", self.select, get_args(Select))
        if self.stop_at is not None:
            check_fraction("stop_at", self.stop_at, below_one=False)

    def n_steps(self, n_train: int) -> int:
        """Optimizer steps with so many training sequences."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return self.epochs * -(-n_train // self.batch_size)

    def lr_at(self, step: int, n_steps: int, lr: float) -> float:
        """Learning rate of a step, the first being 0."""
        if self.schedule == "constant":
            return lr
        return MIN_LR + (lr - MIN_LR) * 0.5 * (1 + math.cos(math.pi * step / n_steps))


@dataclass(frozen=True, slots=True)
class Scores:
    """Of the answers to a test."""

    loss: float
    """Nats per answer."""
    batch_macro: float
    pooled_macro: float
    micro: float


def macro_accuracy(wanted: Int[Tensor, "N"], answered: Int[Tensor, "N"], n_classes: int) -> float:
    """Mean over classes of the fraction of right answers; a class never wanted counts 0 if answered, else not."""
    right = torch.bincount(wanted[wanted == answered], minlength=n_classes)
    asked = torch.bincount(wanted, minlength=n_classes)
    counted = (asked + torch.bincount(answered, minlength=n_classes)) > 0
    return float((right.double() / asked.clamp(min=1))[counted].mean())


def measure(model: Decoder, test: Examples, *, batch_size: int) -> Scores:
    """All scores of a model, which is left in the mode it was in."""
    losses, macros, wanted, answered = [], [], [], []
    with evaluation_mode(model):
        for tokens, targets in zip(
            test.inputs.split(batch_size), test.targets.split(batch_size), strict=True
        ):
            places = targets != IGNORED
            logits, asked = model(tokens).logits[places], targets[places]
            losses.append(F.cross_entropy(logits, asked, reduction="sum").double())
            wanted.append(asked)
            answered.append(logits.argmax(-1))
            macros.append(macro_accuracy(asked, answered[-1], logits.shape[-1]))
    every, all_answers = torch.cat(wanted), torch.cat(answered)
    return Scores(
        loss=float(torch.stack(losses).sum()) / len(every),
        batch_macro=math.fsum(macros) / len(macros),
        pooled_macro=macro_accuracy(every, all_answers, model.embed.num_embeddings),
        micro=float((every == all_answers).double().mean()),
    )


@dataclass(frozen=True, slots=True)
class Trained:
    """What came out of a run."""

    curve: list[dict[str, float]]
    """Per evaluation: the step, the mean training loss since the one before, and the scores of the test."""
    steps: int
    """Optimizer steps made."""
    stopped: Stopped
    """Why training ended: no more steps, ``stop_at`` reached, or a loss or gradient that was not finite."""

    def scored(self, protocol: MadProtocol) -> dict[str, float] | None:
        """The evaluation that counts; None if the run diverged."""
        if self.stopped == "diverged":
            return None
        if protocol.select == "last":
            return self.curve[-1]
        return min(self.curve, key=lambda point: point["loss"])

    def to_dict(self, protocol: MadProtocol) -> dict[str, Any]:
        """JSON values: the score, the last and the best evaluation, and all of them."""
        scored = self.scored(protocol)
        best = max(self.curve, key=lambda point: point[protocol.accuracy], default=None)
        return {
            "score": None if scored is None else scored[protocol.accuracy],
            "stopped": self.stopped,
            "steps": self.steps,
            "final": self.curve[-1] if self.curve else None,
            "best": best,
            "curve": self.curve,
        }


def train(
    model: Decoder,
    data: tuple[Examples, Examples],
    protocol: MadProtocol,
    *,
    lr: float,
    weight_decay: float,
    seed: int,
    callback: StepCallback = lambda step: None,
) -> Trained:
    """Train on ``data[0]`` and test on ``data[1]``; the seed orders the training sequences.

    Weight matrices and embeddings are decayed, nothing else.
    """
    check_positive("lr", lr)
    training, test = data
    n_steps = protocol.n_steps(len(training))
    due = {-(-n_steps * (i + 1) // protocol.n_evaluations) for i in range(protocol.n_evaluations)}
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay), lr=lr, fused=True)
    generator = torch.Generator().manual_seed(DATA_SEED + seed)
    batches = itertools.islice(shuffled(len(training), protocol.batch_size, generator=generator), n_steps)
    curve, losses = list[dict[str, float]](), list[float]()
    steps = 0
    stopped: Stopped = "end"

    def loss(rows: Int[Tensor, "B"]) -> Float[Tensor, ""]:
        targets = training.targets[rows]
        places = targets != IGNORED
        return F.cross_entropy(model(training.inputs[rows]).logits[places], targets[places])

    def reached(step: int, loss: float) -> bool:
        """Tests when it is due; whether that is enough."""
        nonlocal steps, stopped
        steps = step
        losses.append(loss)
        callback(step)
        if step not in due:
            return False
        scores = asdict(measure(model, test, batch_size=protocol.evaluation_batch_size))
        curve.append({"step": step, "training_loss": math.fsum(losses) / len(losses), **scores})
        losses.clear()
        if protocol.stop_at is not None and scores[protocol.accuracy] >= protocol.stop_at:
            stopped = "accuracy"
        return stopped == "accuracy"

    try:
        fit(
            model,
            batches,
            loss,
            optimizer,
            lr=partial(protocol.lr_at, n_steps=n_steps, lr=lr),
            callback=reached,
        )
    except NonFiniteError:
        return Trained(curve, steps + 1, "diverged")
    return Trained(curve, steps, stopped)

"""What a run is validated by: the objective's bound and its report on the same windows and draws each time."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import torch

from helmholtz.layers.row_draws import drawn_by_row
from helmholtz.models.base import evaluation_mode
from helmholtz.training.batches import Batches
from helmholtz.training.objectives import Report
from helmholtz.training.parallel import LossModule

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """What forward passes compute in; nothing changes with "fp32"."""
    dtype = AUTOCAST.get(precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


class Evaluator:
    """Measures a loss_module on the validation batches of a run."""

    def __init__(self, loss_module: LossModule, batches: Batches) -> None:
        self.loss_module, self.batches = loss_module, batches

    @contextlib.contextmanager
    def same_draws(self) -> Iterator[None]:
        """Evaluation mode with the same draws each time; none is taken from the generators of the training."""
        cuda = range(torch.cuda.device_count())
        computing = autocast(self.batches.config.precision, self.batches.device)
        with torch.random.fork_rng(cuda), evaluation_mode(self.loss_module.model), computing:
            torch.manual_seed(self.batches.config.seed)
            yield

    def loss(self, step: int) -> float:
        """The objective's bound after ``step`` steps, nats per token, over the first ``eval_tokens`` of the split."""
        total = torch.zeros((), dtype=torch.float64, device=self.batches.device)
        with self.same_draws():
            for tokens, keys in self.batches.of_validation():
                with drawn_by_row(keys):
                    total += len(tokens) * self.loss_module(tokens, step)[1].double()
        return total.item() / self.batches.n_validation_windows

    def report(self, step: int) -> Report:
        """The report on the validation batches, without warnings while the learning rate warms up."""
        with self.same_draws():
            report = self.loss_module.report([tokens for tokens, _ in self.batches.of_validation()], step)
        return report if step >= self.batches.config.warmup_steps else replace(report, warnings={})

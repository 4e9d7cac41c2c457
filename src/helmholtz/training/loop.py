"""One short training loop: accumulation, clipping, mixed precision, evaluation, checkpoints, exact resumption."""

import contextlib
import math
import random
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from helmholtz._hardware import peak_memory_bytes
from helmholtz._run_folder import BEST, LAST
from helmholtz.data.tokens import TokenDataset
from helmholtz.models.base import AbstractDecoder, evaluation_mode
from helmholtz.training.callbacks import Callback, EvalRecord, RunResult, StepRecord
from helmholtz.training.checkpoint import save_run
from helmholtz.training.config import TrainConfig
from helmholtz.training.objectives import ObjectiveFunction, Report, ReportFunction, learned, next_token
from helmholtz.training.optim import NO_FACTORS, learning_rate, make_optimizer
from helmholtz.training.order import window_starts
from helmholtz.training.state import Progress, load_training_state

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
MAX_SKIPPED = 50


class NonFiniteError(RuntimeError):
    """The loss or the gradient became infinite or NaN."""


def seed_everything(seed: int) -> None:
    """Seed the three generators that the loop saves: torch's, Python's and numpy's."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """While open, SIGINT and SIGTERM are noted in the list instead of ending the process; a second one ends it."""
    received: list[int] = []
    signals = (signal.SIGINT, signal.SIGTERM)
    try:
        previous: dict[int, Any] = {number: signal.getsignal(number) for number in signals}

        def note(number: int, frame: FrameType | None) -> None:
            received.append(number)
            signal.signal(number, previous[number])

        for number in signals:
            signal.signal(number, note)
    except ValueError:  # only the main thread may set handlers; elsewhere its owner handles signals
        yield received
        return
    try:
        yield received
    finally:
        for number in signals:
            signal.signal(number, previous[number])


class Trainer:
    """Trains ``model`` on the split ``train`` and keeps the best and the last state in ``config.output_dir``.

    Interrupted at any moment, by a signal or by the loss of the machine, and resumed, a run gives the same losses
    to the bit as an uninterrupted one on the same hardware and thread count.

    Args:
        objective: what a step minimises; its ``bound`` is what is validated.
        report: what an evaluation tells beside it.
        lr_factors: by prefix of parameters' names, their learning rate over that of the rest.
    """

    def __init__(
        self,
        model: AbstractDecoder,
        train: TokenDataset,
        validation: TokenDataset,
        config: TrainConfig,
        *,
        objective: ObjectiveFunction = next_token,
        report: ReportFunction = learned,
        lr_factors: Mapping[str, float] = NO_FACTORS,
    ) -> None:
        self.config, self.objective, self.report = config, objective, report
        self.train, self.validation = train, validation
        self.n_validation_windows = min(config.eval_tokens, len(validation) - 1) // config.seq_len
        if self.n_validation_windows < 1:
            raise ValueError(
                f"the first {config.eval_tokens} (train.eval_tokens) of the {len(validation)} validation tokens do "
                f"not hold a window of train.seq_len = {config.seq_len}"
            )
        window_starts(
            0, 1, n_tokens=len(train), seq_len=config.seq_len, seed=config.seed
        )  # is there a window?
        cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
        self.device = torch.device("cuda" if cuda else "cpu")
        self.model = model.to(self.device)
        self.folder = Path(config.output_dir)
        self.optimizer = make_optimizer(self.model, config, lr_factors)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self.progress = Progress()

    def restore(self, folder: Path) -> None:
        """Go on from a checkpoint's training state (the weights are the caller's)."""
        self.progress = load_training_state(folder, self.optimizer, self.scaler)

    def _autocast(self) -> torch.autocast:
        dtype = AUTOCAST.get(self.config.precision)
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    def _micro_batch(self, index: int) -> Int[Tensor, "B T1"]:
        c = self.config
        first = self.progress.windows + index * c.batch_size
        starts = window_starts(first, c.batch_size, n_tokens=len(self.train), seq_len=c.seq_len, seed=c.seed)
        return self.train.read(starts, c.seq_len + 1).to(self.device)

    def _backward(self) -> tuple[float, float, dict[str, float]]:
        """Mean loss, bound and terms over the step's micro-batches; the mean gradient is left in the parameters."""
        total, bound, terms = 0.0, 0.0, dict[str, float]()
        for index in range(self.config.accumulation):
            with self._autocast():
                objective = self.objective(self.model, self._micro_batch(index), self.progress.step)
            loss = objective.loss.item()
            if not math.isfinite(loss):
                raise NonFiniteError(self._failure(f"the loss is {loss}"))
            self.scaler.scale(objective.loss / self.config.accumulation).backward()
            total += loss / self.config.accumulation
            bound += objective.bound.item() / self.config.accumulation
            for name, value in objective.terms.items():
                terms[name] = terms.get(name, 0.0) + value.item() / self.config.accumulation
        return total, bound, terms

    def _failure(self, what: str) -> str:
        last = self.folder / LAST
        kept = (
            f"the last checkpoint is kept in {last}"
            if last.exists()
            else "no checkpoint had been written yet"
        )
        return f"step {self.progress.step + 1}: {what}; {kept}. Try a lower train.lr or train.precision=fp32"

    def step(self) -> StepRecord:
        """One optimizer step, or a skipped one if its fp16 gradient overflowed."""
        c, progress, begin = self.config, self.progress, time.perf_counter()
        lr = learning_rate(progress.step, c)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        self.optimizer.zero_grad(set_to_none=True)
        loss, bound, terms = self._backward()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), c.clip_norm).item()
        skipped = not math.isfinite(norm)
        self._note(norm, skipped=skipped)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        progress.windows += c.accumulation * c.batch_size
        progress.step += not skipped
        seconds = time.perf_counter() - begin
        progress.seconds += seconds
        return StepRecord(
            step=progress.step,
            tokens=progress.windows * c.seq_len,
            loss=loss,
            bits_per_byte=self.train.bits_per_byte(bound),
            grad_norm=norm,
            lr=lr,
            tokens_per_second=c.tokens_per_step / seconds,
            skipped=skipped,
            terms=terms,
        )

    def _note(self, norm: float, *, skipped: bool) -> None:
        progress = self.progress
        progress.skipped += skipped
        progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if skipped else 0
        if progress.skipped_in_a_row > (MAX_SKIPPED if self.scaler.is_enabled() else 0):
            raise NonFiniteError(self._failure(f"the gradient norm is {norm}"))

    def _validation_batches(self) -> Iterator[Int[Tensor, "B T1"]]:
        c = self.config
        for rows in (torch.arange(self.n_validation_windows) * c.seq_len).split(c.batch_size):
            yield self.validation.read(rows, c.seq_len + 1).to(self.device)

    @contextlib.contextmanager
    def _evaluation(self) -> Iterator[None]:
        """Each time the same draws; none is taken from the generators of the training."""
        cuda = range(torch.cuda.device_count())
        with torch.random.fork_rng(cuda), evaluation_mode(self.model), self._autocast():
            torch.manual_seed(self.config.seed)
            yield

    def validation_loss(self) -> float:
        """The objective's bound, nats per token, over the first ``eval_tokens`` of the validation split.

        The windows of ``seq_len`` tokens and any random draws are the same each time.
        """
        total, step = 0.0, self.progress.step
        with self._evaluation():
            for tokens in self._validation_batches():
                total += len(tokens) * self.objective(self.model, tokens, step).bound.item()
        return total / self.n_validation_windows

    def _report(self) -> Report:
        """The report on the validation batches, without warnings while the learning rate warms up."""
        step = self.progress.step
        with self._evaluation():
            report = self.report(self.model, list(self._validation_batches()), step)
        return report if step >= self.config.warmup_steps else replace(report, warnings={})

    def evaluate(self) -> EvalRecord:
        """Validation loss and report; a new best value is noted in the progress."""
        loss, progress = self.validation_loss(), self.progress
        if not math.isfinite(loss):
            raise NonFiniteError(self._failure(f"the validation loss is {loss}"))
        best, report = loss < progress.best, self._report()
        progress.best = min(loss, progress.best)
        return EvalRecord(
            step=progress.step,
            tokens=progress.windows * self.config.seq_len,
            validation_loss=loss,
            validation_bits_per_byte=self.validation.bits_per_byte(loss),
            best=best,
            statistics=report.statistics,
            warnings=report.warnings,
        )

    def _save(self, name: str, callbacks: Sequence[Callback]) -> None:
        self._note_memory()
        state = (self.optimizer, self.scaler, self.progress) if name == LAST else None
        save_run(self.folder / name, self.model, self.train.tokenizer_folder, state)
        for callback in callbacks:
            callback.on_checkpoint(self.folder / name, self.progress.step)

    def _advance(self, callbacks: Sequence[Callback]) -> None:
        c, record = self.config, self.step()
        for callback in callbacks:
            callback.on_step(record)
        if record.skipped:
            return
        final = record.step == c.steps
        if final or record.step % c.eval_every == 0:
            evaluation = self.evaluate()
            for callback in callbacks:
                callback.on_eval(evaluation)
            if evaluation.best:
                self._save(BEST, callbacks)
        if final or record.step % c.save_every == 0:
            self._save(LAST, callbacks)

    def fit(self, callbacks: Sequence[Callback] = ()) -> RunResult:
        """Train to the last step, or until a signal asks to stop: then the step is finished and its state saved.

        Raises: NonFiniteError, naming the step, if a loss or gradient is not finite; checkpoints are not touched.
        """
        status = "failed"
        self.model.train()
        try:
            with stop_signals() as received:
                while self.progress.step < self.config.steps and not received:
                    self._advance(callbacks)
                if self.progress.step < self.config.steps:
                    self._save(LAST, callbacks)
                    status = "interrupted"
                else:
                    status = "finished"
        finally:
            result = self._result(status)
            for callback in callbacks:
                callback.on_end(result)
        return result

    def _note_memory(self) -> None:
        self.progress.peak_memory_bytes = max(self.progress.peak_memory_bytes, peak_memory_bytes())

    def _result(self, status: str) -> RunResult:
        self._note_memory()
        return RunResult(
            status=status,
            step=self.progress.step,
            tokens=self.progress.windows * self.config.seq_len,
            best_validation_loss=self.progress.best,
            folder=self.folder,
        )

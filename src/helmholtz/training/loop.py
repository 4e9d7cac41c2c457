"""One short training loop: accumulation, clipping, mixed precision, evaluation, checkpoints, exact resumption.

One process or many: all make the same steps and see the same records; the main one writes and prints.
"""

import contextlib
import json
import math
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from helmholtz._files import complete_folder, write_atomically
from helmholtz._hardware import PeakMemory
from helmholtz._run_folder import BEST, LAST, NON_FINITE
from helmholtz.data.tokenizer import tokenizer_files
from helmholtz.data.tokens import TokenDataset, bits_per_byte
from helmholtz.layers.row_draws import drawn_by_row
from helmholtz.models.decoder import Decoder
from helmholtz.solvers import NonFiniteInputError
from helmholtz.training.batches import Batch, Batches
from helmholtz.training.budget import Budget, matmul_peak, measure_budget
from helmholtz.training.callbacks import Callback, EvalRecord, RunResult, StepRecord
from helmholtz.training.checkpoint import save_last, save_run
from helmholtz.training.config import TrainConfig
from helmholtz.training.diagnosis import NonFiniteError, first_of_processes
from helmholtz.training.distributed import (
    gather_text,
    lost_rank_named,
    mean_over_ranks,
    on_main,
    training_device,
    world,
)
from helmholtz.training.evaluation import AUTOCAST, Evaluator, autocast
from helmholtz.training.objectives import ObjectiveFunction, ReportFunction, learned, next_token
from helmholtz.training.optim import NO_FACTORS, learning_rate, make_optimizer
from helmholtz.training.parallel import (
    LossModule,
    ParallelConfig,
    full_tensor,
    gradients_exchanged,
    wrap_parallel,
)
from helmholtz.training.state import Progress, load_training_state
from helmholtz.training.stopping import stop_signals


def seed_everything(seed: int) -> None:
    """Seed the three generators that the loop saves: torch's, Python's and numpy's."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


class Trainer:
    """Trains ``model`` on the split ``train`` and keeps the best and the last state in ``config.output_dir``.

    Interrupted at any moment, by a signal or by the loss of the machine, and resumed, a run gives the same losses
    to the bit as an uninterrupted one on the same hardware, thread count and number of processes. Another number of
    processes changes sums in their last digits only: every step consumes the same windows, and what is random in a
    model is a function of the seed and the window (``layers.row_draws``).

    Args:
        parallel: how several processes share the work. They must all have made the same ``model``.
        objective: what a step minimises; its ``bound`` is what is validated.
        report: what an evaluation tells beside it.
        lr_factors: by prefix of parameters' names, their learning rate over that of the rest.
    """

    def __init__(
        self,
        model: Decoder,
        train: TokenDataset,
        validation: TokenDataset,
        config: TrainConfig,
        *,
        objective: ObjectiveFunction = next_token,
        report: ReportFunction = learned,
        lr_factors: Mapping[str, float] = NO_FACTORS,
        parallel: ParallelConfig = ParallelConfig(),  # noqa: B008 (frozen)
    ) -> None:
        self.config = config
        self.device = training_device(config.device)
        self.batches = Batches(train, validation, config, self.device)
        self._tokenizer = tokenizer_files(train.tokenizer_folder)  # which may move while training
        if config.precision == "fp16" and parallel.strategy == "fsdp":
            raise ValueError("train.precision must be fp32 or bf16 with parallel.strategy=fsdp, got 'fp16'")
        self.model = model.to(self.device)
        self.loss_module = LossModule(self.model, objective, report)
        self.evaluator = Evaluator(self.loss_module, self.batches)
        self.parallel_module = wrap_parallel(self.loss_module, parallel, self.device)
        self.folder = Path(config.output_dir)
        self.optimizer = make_optimizer(self.model, config, lr_factors)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self.progress = Progress()
        self._signals: list[int] = []
        self._stopping = False
        self._identity: dict[str, Any] | None = None
        self._check_folder: Callable[[], None] = lambda: None
        self._step_share: float | None = None
        """Seconds that a step would take at the speed of a large matrix product."""

    def restore(self, folder: Path) -> None:
        """Go on from a checkpoint's training state (the weights are the caller's)."""
        self.progress = load_training_state(folder, self.model, self.optimizer, self.scaler)

    def _autocast(self) -> torch.autocast:
        return autocast(self.config.precision, self.device)

    def _loss(self, tokens: Int[Tensor, "B T1"]) -> Float[Tensor, ""]:
        """Of these rows, past DDP: no gradients are exchanged."""
        with self._autocast():
            loss: Tensor = self.loss_module(tokens, self.progress.step)[0]
        return loss

    def _backward(self) -> dict[str, float]:
        """Loss, bound, bytes and terms, means over the step's tokens; the mean gradient is left in the parameters."""
        n = self.config.accumulation
        found = dict[str, float]()
        for index, (tokens, keys) in enumerate(self.batches.of_step(self.progress.windows)):
            with gradients_exchanged(self.parallel_module, index == n - 1), drawn_by_row(keys):
                with self._autocast():
                    loss, bound, terms = self.parallel_module(tokens, self.progress.step)
                self.scaler.scale(loss / n).backward()
            for name, value in ({"loss": loss.detach(), "bound": bound} | terms).items():
                found[name] = found.get(name, 0.0) + value.item() / n
            found["bytes"] = found.get("bytes", 0.0) + self.batches.bytes_per_target(tokens) / n
        found["stop"] = float(bool(self._signals))
        found = dict(zip(found, mean_over_ranks(list(found.values())), strict=True))
        self._stopping = found.pop("stop") > 0
        return found

    def _backward_or_stop(self) -> dict[str, float]:
        """``_backward``; an equilibrium that has no finite start ends the run, for there is no loss to skip."""
        try:
            return self._backward()
        except NonFiniteInputError as error:
            if world().size > 1:  # the others do not come to the search for the first bad tensor
                raise NonFiniteError(self._failure(str(error))) from error
            self._stop_for(str(error), self.batches.of_step(self.progress.windows))

    def _kept(self) -> str:
        last = complete_folder(self.folder / LAST)
        if not last.is_dir():
            return "no checkpoint had been written yet"
        return f"the last checkpoint is kept in {last.resolve()}"

    def _failure(self, what: str) -> str:
        advice = "Try a lower train.lr or train.precision=fp32"
        return f"step {self.progress.step + 1}: {what}; {self._kept()}. {advice}"

    def step(self) -> StepRecord:
        """One optimizer step, or a skipped one if its loss or gradient is not finite."""
        c, progress, begin = self.config, self.progress, time.perf_counter()
        lr = learning_rate(progress.step, c)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        self.optimizer.zero_grad(set_to_none=True)
        with lost_rank_named(f"in step {progress.step + 1}"):
            found = self._backward_or_stop()
            self.scaler.unscale_(self.optimizer)
            norm = full_tensor(nn.utils.clip_grad_norm_(self.model.parameters(), c.clip_norm)).item()
        loss, bound, n_bytes = found.pop("loss"), found.pop("bound"), found.pop("bytes")
        skipped = not (math.isfinite(norm) and math.isfinite(loss))
        self._note_skip(f"the loss is {loss}, the gradient norm {norm}", skipped=skipped)
        if not skipped:
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
            bits_per_byte=bits_per_byte(bound, n_bytes),
            grad_norm=norm,
            lr=lr,
            tokens_per_second=c.tokens_per_step / seconds,
            skipped=skipped,
            terms=found,
            utilization=None if self._step_share is None else self._step_share / seconds,
        )

    def budget(self) -> Budget:
        """What a step of this process costs, counted on its next micro-batch; nothing is trained or written."""
        tokens, keys = self.batches.micro_batch(self.progress.windows, 0)
        before = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        with drawn_by_row(keys):
            found = measure_budget(
                self.model, lambda: self._loss(tokens), micro_batches=self.config.accumulation
            )
        for buffer, value in before:  # a memory has read the rows
            buffer.copy_(value)
        return found

    def measure_utilization(self) -> None:
        """From now on records say which fraction of the matmul speed a step reaches."""
        peak = matmul_peak(AUTOCAST.get(self.config.precision, torch.float32), self.device)
        self._step_share = self.budget().flops / peak

    def _note_skip(self, what: str, *, skipped: bool) -> None:
        progress = self.progress
        progress.skipped += skipped
        progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if skipped else 0
        if progress.skipped_in_a_row > self.config.max_skipped:
            what = f"{what}, in {progress.skipped_in_a_row} steps in a row"
            self._stop_for(what, self.batches.of_step(progress.windows))

    def _stop_for(self, what: str, batches: Iterable[Batch]) -> NoReturn:
        """Raise NonFiniteError with the first bad tensor of any process, which ``non_finite.json`` also names.

        Args:
            batches: on which it was seen, to be repeated.
        """
        where = first_of_processes(self.model, self._loss, batches) or "nothing when the step is repeated"
        report = {
            "step": self.progress.step + 1,
            "windows": self.progress.windows,
            "what": what,
            "first": where,
        }
        on_main(lambda: write_atomically(self.folder / NON_FINITE, json.dumps(report, indent=2) + "\n"))
        raise NonFiniteError(self._failure(f"{what}; first seen in {where}"))

    def _finite_validation_loss(self) -> float:
        """That of the evaluator; NonFiniteError with the first bad tensor if that of any process is not finite."""
        try:
            loss = self.evaluator.loss(self.progress.step)
            what = "" if math.isfinite(loss) else f"the validation loss is {loss}"
        except NonFiniteInputError as error:
            loss, what = math.nan, str(error)
        if seen := next(filter(None, gather_text(what)), ""):
            with self.evaluator.same_draws(), torch.enable_grad():
                self._stop_for(seen, self.batches.of_validation())
        return loss

    def evaluate(self) -> EvalRecord:
        """Validation loss and report; a new best value is noted in the progress."""
        loss, progress, batches = self._finite_validation_loss(), self.progress, self.batches
        best, report = loss < progress.best, self.evaluator.report(progress.step)
        progress.best = min(loss, progress.best)
        return EvalRecord(
            step=progress.step,
            tokens=progress.windows * self.config.seq_len,
            validation_loss=loss,
            validation_bits_per_byte=bits_per_byte(
                loss * batches.n_validation_tokens, batches.validation_bytes
            ),
            best=best,
            statistics=report.statistics,
            warnings=report.warnings,
        )

    def _save(self, name: str, callbacks: Sequence[Callback]) -> None:
        self._note_memory()
        folder = self.folder / name
        try:
            with lost_rank_named("while saving"):
                on_main(self._check_folder)
                if name == BEST:
                    save_run(folder, self.model, self._tokenizer, None)
                else:
                    state = (self.optimizer, self.scaler, self.progress, self._identity)
                    save_last(self.folder, self.model, self._tokenizer, state, keep=self.config.keep)
        except OSError as error:
            raise OSError(
                f"step {self.progress.step}: saving {folder} failed ({error}); {self._kept()}"
            ) from error
        for callback in callbacks:
            callback.on_checkpoint(folder, self.progress.step)

    def _advance(self, callbacks: Sequence[Callback]) -> None:
        c, record = self.config, self.step()
        self._note_memory()
        if world().is_main:
            self._check_folder()
        for callback in callbacks:
            callback.on_step(record)
        if record.skipped:
            return
        final = record.step == c.steps
        if final or record.step % c.eval_every == 0:
            with lost_rank_named("in an evaluation"):
                evaluation = self.evaluate()
            for callback in callbacks:
                callback.on_eval(evaluation)
            if evaluation.best:
                self._save(BEST, callbacks)
        if final or record.step % c.save_every == 0:
            self._save(LAST, callbacks)

    def fit(
        self,
        callbacks: Sequence[Callback] = (),
        *,
        identity: dict[str, Any] | None = None,
        check_folder: Callable[[], None] = lambda: None,
    ) -> RunResult:
        """Train to the last step, or until a signal asks to stop: then the step is finished and its state saved.

        Args:
            identity: JSON values that describe the run, for its checkpoints.
            check_folder: called by the main process in each step and before each save; raises OSError if the folder of
                the run is no longer where it was.

        Raises: NonFiniteError, naming the step, if a loss or gradient is not finite; checkpoints are not touched.
        """
        self._identity, self._check_folder = identity, check_folder
        self.model.train()
        try:
            with stop_signals() as self._signals, PeakMemory(self.device) as self._memory:
                while self.progress.step < self.config.steps and not self._asked_to_stop():
                    self._advance(callbacks)
                finished = self.progress.step == self.config.steps
                if not finished:
                    self._save(LAST, callbacks)
        except BaseException:
            for callback in callbacks:
                with contextlib.suppress(
                    OSError
                ):  # of a full disk, or a lost folder: the first error tells more
                    callback.on_end(self._result("failed"))
            raise
        result = self._result("finished" if finished else "interrupted")
        for callback in callbacks:
            callback.on_end(result)
        return result

    def check_folder(self) -> None:
        """Raises: OSError if the folder of the run is no longer where it was when ``fit`` began."""
        self._check_folder()

    def _asked_to_stop(self) -> bool:
        """Whether a signal came; several processes agree on it in their next step."""
        return self._stopping or (world().size == 1 and bool(self._signals))

    def _note_memory(self) -> None:
        self.progress.peak_memory_bytes = max(self.progress.peak_memory_bytes, self._memory.read() or 0)

    def _result(self, status: str) -> RunResult:
        return RunResult(
            status=status,
            step=self.progress.step,
            tokens=self.progress.windows * self.config.seq_len,
            best_validation_loss=self.progress.best,
            folder=self.folder,
            skipped=self.progress.skipped,
            seconds=self.progress.seconds,
            parameters=sum(parameter.numel() for parameter in self.model.parameters()),
            peak_memory_bytes=self.progress.peak_memory_bytes or None,
        )

"""The optimizer steps of a run: accumulation, clipping, mixed precision, and what is not finite."""

import contextlib
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor, nn

from helmholtz._files import complete_folder, write_atomically
from helmholtz._run_folder import LAST, NON_FINITE
from helmholtz._values import few_reads
from helmholtz.data.tokens import bits_per_byte
from helmholtz.layers.row_draws import drawn_by_row
from helmholtz.models.decoder import Decoder
from helmholtz.solvers import NonFiniteInputError
from helmholtz.training.batches import Batch, Batches
from helmholtz.training.budget import Budget, matmul_peak, measure_budget
from helmholtz.training.callbacks import StepRecord
from helmholtz.training.config import TrainConfig
from helmholtz.training.diagnosis import NonFiniteError, first_of_processes
from helmholtz.training.distributed import lost_rank_named, mean_over_ranks, on_main, world
from helmholtz.training.evaluation import AUTOCAST, autocast
from helmholtz.training.optim import learning_rate, make_optimizer
from helmholtz.training.parallel import (
    LossModule,
    ParallelConfig,
    full_tensor,
    gradients_exchanged,
    wrap_parallel,
)
from helmholtz.training.state import Progress, load_training_state


@dataclass(frozen=True, slots=True)
class _Made:
    """A step whose numbers have not been read yet."""

    windows: int
    """Consumed before it."""
    lr: float
    names: tuple[str, ...]
    values: Float64[Tensor, " names"]


class Stepper:
    """Makes the optimizer steps of ``Trainer``, whose arguments it has.

    A step hands its work to the device and reads nothing back: losses stay there, and the optimizer's kernel leaves out
    an update that must not be made. ``read_steps`` looks at all steps since the last time at once: a read makes the
    processor wait for the device, which then has nothing to do until the next step's work arrives.

    Attributes:
        reads_each_step: whether ``fit`` reads after each step, as on a CPU, where it costs nothing. Elsewhere it does
            every ``log_every`` steps, and before an evaluation or a checkpoint.
    """

    def __init__(
        self,
        model: Decoder,
        batches: Batches,
        config: TrainConfig,
        loss_module: LossModule,
        *,
        lr_factors: Mapping[str, float],
        parallel: ParallelConfig,
    ) -> None:
        if config.precision == "fp16" and parallel.strategy == "fsdp":
            raise ValueError("train.precision must be fp32 or bf16 with parallel.strategy=fsdp, got 'fp16'")
        self.config, self.device, self.batches = config, batches.device, batches
        self.model, self.loss_module = model, loss_module
        self.parallel_module = wrap_parallel(loss_module, parallel, self.device)
        self.folder = Path(config.output_dir)
        self.optimizer = make_optimizer(model, config, lr_factors)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self.progress = Progress()
        self.reads_each_step = self.device.type == "cpu"
        self._made: list[_Made] = []
        self._began = 0.0
        self._signals: list[int] = []
        self._stopping = False
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
            loss: Tensor = self.loss_module(tokens, self.steps_made)[0]
        return loss

    @property
    def steps_made(self) -> int:
        """Steps applied, if none of those that have not been read was skipped."""
        return self.progress.step + len(self._made)

    def _backward(self) -> tuple[tuple[str, ...], Float64[Tensor, " names"]]:
        """Names and values of loss, bound, bytes, whether to stop, and terms: means over the step's tokens. The mean
        gradient is left in the parameters."""
        n = self.config.accumulation
        total = stop = torch.full((), float(bool(self._signals)), dtype=torch.float64, device=self.device)
        for index, (tokens, keys) in enumerate(self.batches.of_step(self.progress.position)):
            with gradients_exchanged(self.parallel_module, index == n - 1), drawn_by_row(keys):
                with self._autocast():
                    loss, bound, terms = self.parallel_module(tokens, self.steps_made)
                self.scaler.scale(loss / n).backward()
            n_bytes = self.batches.bytes_per_target(tokens)
            found = {"loss": loss, "bound": bound, "bytes": n_bytes, "stop": stop} | terms
            values = torch.stack([x.detach().to(self.device, torch.float64) for x in found.values()]) / n
            total = values if index == 0 else total + values
        return tuple(found), mean_over_ranks(total)

    def _backward_or_stop(self) -> tuple[tuple[str, ...], Float64[Tensor, " names"]]:
        """``_backward``; an equilibrium that has no finite start ends the run, for there is no loss to skip."""
        try:
            return self._backward()
        except NonFiniteInputError as error:
            if world().size > 1:  # the others do not come to the search for the first bad tensor
                raise NonFiniteError(self._failure(str(error))) from error
            self._stop_for(str(error), self.progress.windows)

    def _kept(self) -> str:
        last = complete_folder(self.folder / LAST)
        if not last.is_dir():
            return "no checkpoint had been written yet"
        return f"the last checkpoint is kept in {last.resolve()}"

    def _failure(self, what: str) -> str:
        advice = "Try a lower train.lr or train.precision=fp32"
        return f"step {self.progress.step + 1}: {what}; {self._kept()}. {advice}"

    def make_step(self) -> None:
        """One optimizer step, or a skipped one if its loss or gradient is not finite. Nothing of it is read."""
        c, lr = self.config, learning_rate(self.steps_made, self.config)
        if not self._made:
            self._began = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        self.optimizer.zero_grad(set_to_none=True)
        sparing = contextlib.nullcontext() if self.reads_each_step else few_reads()
        with lost_rank_named(f"in step {self.steps_made + 1}"), sparing:
            names, values = self._backward_or_stop()
            self.scaler.unscale_(self.optimizer)
            norm = full_tensor(nn.utils.clip_grad_norm_(self.model.parameters(), c.clip_norm)).double()
        bad = ~(norm.isfinite() & values[0].isfinite())
        # what a GradScaler sets: where it is 1 the fused kernels leave weights and averages as they are
        self.optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.scaler.update()
        values = torch.cat([values, norm.unsqueeze(0)])
        self._made.append(_Made(self.progress.windows, lr, (*names, "norm"), values))
        self.progress.windows += c.accumulation * c.batch_size

    def read_steps(self) -> Iterator[StepRecord]:
        """Wait for the device, and tell of all steps since the last time, one by one."""
        made, self._made = self._made, []
        rows = torch.stack([step.values for step in made]).tolist()
        seconds = (time.perf_counter() - self._began) / len(made)
        for step, row in zip(made, rows, strict=True):
            yield self._record(step, dict(zip(step.names, row, strict=True)), seconds)

    def step(self) -> StepRecord:
        """One optimizer step, read at once."""
        self.make_step()
        (record,) = self.read_steps()
        return record

    def _record(self, made: _Made, found: dict[str, float], seconds: float) -> StepRecord:
        c, progress = self.config, self.progress
        loss, bound, n_bytes, stop, norm = (
            found.pop(name) for name in ("loss", "bound", "bytes", "stop", "norm")
        )
        self._stopping = stop > 0
        skipped = not (math.isfinite(norm) and math.isfinite(loss))
        self._note_skip(f"the loss is {loss}, the gradient norm {norm}", made.windows, skipped=skipped)
        progress.step += not skipped
        progress.seconds += seconds
        return StepRecord(
            step=progress.step,
            tokens=(made.windows + c.accumulation * c.batch_size) * c.seq_len,
            loss=loss,
            bits_per_byte=bits_per_byte(bound, n_bytes),
            grad_norm=norm,
            lr=made.lr,
            tokens_per_second=c.tokens_per_step / seconds,
            skipped=skipped,
            terms=found,
            utilization=None if self._step_share is None else self._step_share / seconds,
        )

    def budget(self) -> Budget:
        """What a step of this process costs, counted on its next micro-batch; nothing is trained or written."""
        tokens, keys = self.batches.micro_batch(self.progress.position, 0)
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

    def _note_skip(self, what: str, windows: int, *, skipped: bool) -> None:
        progress = self.progress
        progress.skipped += skipped
        progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if skipped else 0
        if progress.skipped_in_a_row > self.config.max_skipped:
            what = f"{what}, in {progress.skipped_in_a_row} steps in a row"
            self._stop_for(what, windows)

    def _stop_for(self, what: str, windows: int, batches: Iterable[Batch] | None = None) -> NoReturn:
        """Raise NonFiniteError with the first bad tensor of any process, which ``non_finite.json`` also names.

        Args:
            windows: consumed before the step.
            batches: on which it was seen, to be repeated; None: those of the step.
        """
        if batches is None:
            batches = self.batches.of_step(windows - self.progress.windows_before)
        where = first_of_processes(self.model, self._loss, batches) or "nothing when the step is repeated"
        report = {
            "step": self.progress.step + 1,
            "windows": windows,
            "what": what,
            "first": where,
        }
        on_main(lambda: write_atomically(self.folder / NON_FINITE, json.dumps(report, indent=2) + "\n"))
        raise NonFiniteError(self._failure(f"{what}; first seen in {where}"))

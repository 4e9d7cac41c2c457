"""One short training loop: steps, evaluations, checkpoints, exact resumption.

One process or many: all make the same steps and see the same records; the main one writes and prints.
"""

import contextlib
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from helmholtz._checks import check
from helmholtz._hardware import PeakMemory
from helmholtz._run_folder import BEST, LAST
from helmholtz.data.tokenizer import tokenizer_files
from helmholtz.data.tokens import TokenDataset, bits_per_byte
from helmholtz.models.decoder import Decoder
from helmholtz.solvers import NonFiniteInputError
from helmholtz.training.batches import Batches
from helmholtz.training.callbacks import Callback, EvalRecord, RunResult, StepRecord
from helmholtz.training.checkpoint import save_last, save_run
from helmholtz.training.config import MatmulPrecision, TrainConfig
from helmholtz.training.distributed import gather_text, lost_rank_named, on_main, training_device, world
from helmholtz.training.evaluation import Evaluator
from helmholtz.training.objectives import ObjectiveFunction, ReportFunction, learned, next_token
from helmholtz.training.optim import NO_FACTORS
from helmholtz.training.parallel import LossModule, ParallelConfig
from helmholtz.training.steps import Stepper
from helmholtz.training.stopping import stop_signals


def seed_everything(seed: int) -> None:
    """Seed the three generators that the loop saves: torch's, Python's and numpy's."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


@contextlib.contextmanager
def float32_products(precision: MatmulPrecision) -> Iterator[None]:
    """How matrices of float32 are multiplied within this context, in all of the process."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Trainer(Stepper):
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
        device = training_device(config.device)
        if device.type == "cpu":
            check(
                config.matmul_precision == "highest",
                "train.matmul_precision",
                config.matmul_precision,
                "highest on the CPU",
            )
        batches = Batches(train, validation, config, device)
        self._tokenizer = tokenizer_files(train.tokenizer_folder)  # which may move while training
        loss_module = LossModule(model.to(device), objective, report)
        self.evaluator = Evaluator(loss_module, batches)
        super().__init__(model, batches, config, loss_module, lr_factors=lr_factors, parallel=parallel)
        self._identity: dict[str, Any] | None = None
        self._check_folder: Callable[[], None] = lambda: None

    def _finite_validation_loss(self) -> float:
        """That of the evaluator; NonFiniteError with the first bad tensor if that of any process is not finite."""
        try:
            loss = self.evaluator.loss(self.progress.step)
            what = "" if math.isfinite(loss) else f"the validation loss is {loss}"
        except NonFiniteInputError as error:
            loss, what = math.nan, str(error)
        if seen := next(filter(None, gather_text(what)), ""):
            with self.evaluator.same_draws(), torch.enable_grad():
                self._stop_for(seen, self.progress.windows, self.batches.of_validation())
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
        c = self.config
        self.make_step()
        if not self._is_read_now():
            return
        record = self._tell(callbacks)
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

    def _tell(self, callbacks: Sequence[Callback]) -> StepRecord:
        """Read the steps made, for the callbacks. Returns the last one's record."""
        self._note_memory()
        if world().is_main:
            self._check_folder()
        for record in self.read_steps():
            for callback in callbacks:
                callback.on_step(record)
        return record

    def _is_read_now(self) -> bool:
        c, step = self.config, self.steps_made
        due = step >= c.steps or any(step % n == 0 for n in (c.log_every, c.eval_every, c.save_every))
        return self.reads_each_step or due or self._asked_to_stop()

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
            of_gpu = self.device.type != "cpu"
            products = float32_products(self.config.matmul_precision) if of_gpu else contextlib.nullcontext()
            with products, stop_signals() as self._signals, PeakMemory(self.device) as self._memory:
                while self.progress.step < self.config.steps and not self._asked_to_stop():
                    self._advance(callbacks)
                if self._made:  # a signal came after the last step was found to be read later
                    self._tell(callbacks)
                finished = self.progress.step == self.config.steps
                if not finished:
                    self._save(LAST, callbacks)
        except BaseException:
            for callback in callbacks:
                with contextlib.suppress(OSError):  # full disk or lost folder: the first error tells more
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

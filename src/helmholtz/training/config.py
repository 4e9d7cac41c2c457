"""The settings of a run: model, text, training, objective, processes."""

import json
import re
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from helmholtz._checks import (
    check,
    check_choice,
    check_fraction,
    check_integer,
    check_non_negative,
    check_positive,
)
from helmholtz.data.prepare import DataConfig
from helmholtz.models import MODELS
from helmholtz.models.base import ModelConfig
from helmholtz.training.equilibrium import EquilibriumObjectiveConfig
from helmholtz.training.free_bits import FreeBitsConfig
from helmholtz.training.parallel import ParallelConfig
from helmholtz.training.parts import ObjectiveConfig, objective_class

Precision = Literal["fp32", "bf16", "fp16"]
MatmulPrecision = Literal["highest", "high"]

OPERATIONAL = (
    *("output_dir", "resume", "init_from", "continue_from", "threads", "log_every", "save_every", "keep"),
    *("tensorboard", "tracker", "project", "utilization"),
)
"""Settings that may change between an interruption and its resumption: they do not touch the numbers.

Of ``init_from`` and ``continue_from`` the history of the run speaks (``training.start``)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """How a model is trained."""

    output_dir: str = "runs/default"
    """Folder of the run: checkpoints, metrics, summary."""
    steps: int = 1000
    """Number of optimizer steps; each sees batch_size x seq_len x accumulation tokens."""
    batch_size: int = 16
    """Sequences per forward pass, summed over all processes; a multiple of their number."""
    seq_len: int = 256
    """Tokens per sequence."""
    accumulation: int = 1
    """Forward passes per optimizer step; their gradients are averaged."""
    lr: float = 3e-3
    """Peak learning rate, reached at the end of the warm-up."""
    min_lr_ratio: float = 0.1
    """Learning rate of the last step, as a fraction of lr."""
    warmup_steps: int = 100
    """Steps of linear warm-up; a half cosine follows."""
    weight_decay: float = 0.1
    """AdamW's decay of matrices; vectors (norms, biases, temperatures) are not decayed."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's beta1 and beta2."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this 2-norm over all parameters."""
    precision: Precision = "fp32"
    """All in fp32, or autocast to bf16, or autocast to fp16 with a gradient scaler."""
    matmul_precision: MatmulPrecision = "highest"
    """Products of fp32 matrices on a GPU: in fp32, or by TF32 (high), whose factors have 11 bits. Not for the CPU."""
    device: str = "auto"
    """Device: cpu, cuda or cuda:N; auto takes CUDA if there is one."""
    threads: int = 0
    """CPU threads of torch; 0 keeps torch's own choice."""
    seed: int = 0
    """Seed of the initial weights, of the order of the data and of dropout."""
    eval_every: int = 250
    """Steps between evaluations on validation text; the last step is always evaluated."""
    eval_tokens: int = 32768
    """Validation tokens per evaluation: the first ones of the split, the same each time."""
    save_every: int = 250
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 2
    """Number of newest checkpoints to keep; the best one is kept as well."""
    max_skipped: int = 20
    """Steps in a row that may be skipped because their loss or gradient is not finite; one more ends the run."""
    log_every: int = 1
    """Steps between records of the training metrics."""
    tensorboard: bool = False
    """Also write the metrics for TensorBoard (extra ``train``)."""
    tracker: Literal["none", "wandb", "trackio"] = "none"
    """Also send the metrics to Weights & Biases or trackio (a package of its own each)."""
    project: str = "helmholtz"
    """Name of the project in the tracker."""
    utilization: bool = False
    """Also log the fraction of the machine's matmul speed that training reaches; the speed is measured at the start."""
    resume: Literal["never", "auto"] = "never"
    """What to do if output_dir holds a run: refuse it (never), or continue it (auto; a new run is started if there is
    none). With more steps than the run had, it goes on after its last one."""
    init_from: str | None = None
    """Begin with the weights of this run (its best ones), checkpoint or exported folder: step 0, a new optimizer."""
    continue_from: str | None = None
    """Go on from this run's newest checkpoint in a new ``output_dir``, with another learning rate, steps or text."""

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "seq_len", "accumulation")
        for name in (*counts, "eval_every", "eval_tokens", "save_every", "log_every", "keep"):
            check_integer(f"train.{name}", getattr(self, name))
        for name in ("warmup_steps", "threads", "seed", "max_skipped"):
            check_integer(f"train.{name}", getattr(self, name), minimum=0)
        check(self.seed < 2**31, "train.seed", self.seed, "below 2**31")
        check_positive("train.lr", self.lr)
        check_positive("train.clip_norm", self.clip_norm)
        check_non_negative("train.weight_decay", self.weight_decay)
        check_fraction("train.min_lr_ratio", self.min_lr_ratio, below_one=False)
        below = f"below {self.steps} steps"
        check(self.warmup_steps < self.steps, "train.warmup_steps", self.warmup_steps, below)
        check(len(self.betas) == 2, "train.betas", self.betas, "two numbers")
        for beta in self.betas:
            check_fraction("train.betas", beta)
        check_choice("train.precision", self.precision, get_args(Precision))
        check_choice("train.matmul_precision", self.matmul_precision, get_args(MatmulPrecision))
        known = re.fullmatch(r"auto|cpu|cuda(:\d+)?", str(self.device)) is not None
        check(known, "train.device", self.device, "auto, cpu, cuda or cuda:N")
        check_choice("train.tracker", self.tracker, ("none", "wandb", "trackio"))
        check(bool(self.project), "train.project", self.project, "a name")
        check_choice("train.resume", self.resume, ("never", "auto"))
        check(bool(self.output_dir), "train.output_dir", self.output_dir, "the name of a folder")
        for name in ("init_from", "continue_from"):
            check(getattr(self, name) != "", f"train.{name}", "", "the name of a folder, or null")
        both = self.init_from is not None and self.continue_from is not None
        check(
            not both, "train.init_from", self.init_from, "absent beside train.continue_from: one or the other"
        )

    @property
    def tokens_per_step(self) -> int:
        return self.accumulation * self.batch_size * self.seq_len

    def numerics(self) -> dict[str, Any]:
        """The settings that an interrupted run must keep to be resumed exactly, as JSON values."""
        kept = {
            field.name: getattr(self, field.name) for field in fields(self) if field.name not in OPERATIONAL
        }
        if self.matmul_precision == "highest":  # as it was before there was a choice
            del kept["matmul_precision"]
        return kept | {"betas": list(self.betas), "device": self.device.partition(":")[0]}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """A run: which model, on which text, trained how."""

    architecture: str
    """A key of ``MODELS``."""
    model: ModelConfig
    data: DataConfig
    """The text; ``data.folder`` must have been prepared with these settings."""
    train: TrainConfig
    objective: ObjectiveConfig | None = None
    """Of the model's ``objective_class``, and None of a model without; None elsewhere means the defaults."""
    parallel: ParallelConfig = ParallelConfig()
    """How the processes of ``torchrun`` share the work."""

    def __post_init__(self) -> None:
        check_choice("model.architecture", self.architecture, MODELS)
        longest = self.model.max_seq_len
        wanted = f"at most model.max_seq_len = {longest}"
        check(self.train.seq_len <= longest, "train.seq_len", self.train.seq_len, wanted)
        self._check_objective()

    def _check_objective(self) -> None:
        wanted = objective_class(self.model)
        if wanted is None:
            absent = f"absent for {self.architecture}: the model has neither a plan nor an equilibrium"
            check(self.objective is None, "objective", self.objective, absent)
            return
        if self.objective is None:
            object.__setattr__(self, "objective", wanted())
        of_this = f"a {wanted.__name__} for {self.architecture}"
        check(type(self.objective) is wanted, "objective", self.objective, of_this)
        for name, steps in self._scheduled().items():
            latest = f"at most train.steps = {self.train.steps}"
            check(steps <= self.train.steps, f"objective.{name}", steps, latest)

    def _scheduled(self) -> dict[str, int]:
        """The steps that the objective's schedules name."""
        c, steps = self.objective, dict[str, int]()
        if isinstance(c, FreeBitsConfig):
            steps |= {"kappa_steps": c.kappa_steps, "kl_warmup_steps": c.kl_warmup_steps}
        if isinstance(c, EquilibriumObjectiveConfig) and c.curriculum:
            steps["curriculum.from_step"] = c.curriculum[-1].from_step
        if isinstance(c, EquilibriumObjectiveConfig) and c.memory_write_step is not None:
            equilibrium = self.model.equilibrium_config()
            wanted = "absent without writable patterns (model.n_slots = 0)"
            assert equilibrium is not None
            check(equilibrium.n_slots > 0, "objective.memory_write_step", c.memory_write_step, wanted)
            steps["memory_write_step"] = c.memory_write_step
        return steps

    def identity(self, fingerprint: str) -> dict[str, Any]:
        """What makes this run this run, as JSON values: a resumed run must agree with it.

        Args:
            fingerprint: of the prepared data.
        """
        values = {
            "architecture": self.architecture,
            "model": self.model.to_dict(),
            "data": {"fingerprint": fingerprint, "settings": self.data.settings()},
            "train": self.train.numerics(),
            "objective": None if self.objective is None else asdict(self.objective),
        }
        identity: dict[str, Any] = json.loads(json.dumps(values))
        return identity

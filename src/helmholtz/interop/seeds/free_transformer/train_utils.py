"""Training steps, schedule and checkpoints, in the original names. New code: ``helmholtz.training``."""

import abc
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from helmholtz._checks import check, check_integer, check_non_negative, check_positive
from helmholtz.interop.seeds.checkpoints import load_checkpoint as load_checkpoint
from helmholtz.interop.seeds.checkpoints import save_checkpoint as save_checkpoint
from helmholtz.interop.seeds.free_transformer.model import FreeTransformer, TransformerBaseline
from helmholtz.models.base import evaluation_mode
from helmholtz.training.config import TrainConfig
from helmholtz.training.distributed import connect, is_launched, world
from helmholtz.training.fit import optimizer_step
from helmholtz.training.optim import learning_rate
from helmholtz.training.parallel import ParallelConfig

Model = FreeTransformer | TransformerBaseline


class Trainer(abc.ABC):
    """Single steps of training and evaluation; a subclass says what the loss of a batch is.

    Args:
        use_amp: autocast to bfloat16, on any device and without a gradient scaler (the original: float16 on CUDA, and
            nothing elsewhere).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        use_amp: bool = False,
    ) -> None:
        self.model, self.optimizer, self.device, self.use_amp = model, optimizer, device, use_amp
        self.step = 0

    @abc.abstractmethod
    def _compute_loss(self, batch: Any) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """The loss of a batch and the metrics to report."""

    def train_step(self, batch: Any, grad_clip: float | None = None) -> dict[str, float]:
        """One optimizer step; the metrics of its batch."""
        self.model.train()
        if grad_clip is not None:
            check_positive("grad_clip", grad_clip)
        with self._autocast():
            loss, metrics = self._compute_loss(batch)
        limit = float("inf") if grad_clip is None else grad_clip
        optimizer_step(self.model, self.optimizer, loss, step=self.step + 1, clip_norm=limit)
        self.step += 1
        return metrics

    def eval_step(self, batch: Any) -> dict[str, float]:
        """The metrics of a batch, without gradients; the model stays in the mode it was in."""
        with evaluation_mode(self.model), self._autocast():
            return self._compute_loss(batch)[1]

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.use_amp)


class LRScheduler:
    """Linear warm-up to ``max_lr``, then a half cosine that reaches ``min_lr`` at step ``max_steps``.

    The original has no ``max_steps`` and repeats its cosine with the period of the warm-up.

    Raises: ValueError if the warm-up is not shorter than ``max_steps``, or ``min_lr`` exceeds ``max_lr``.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        warmup_steps: int,
        max_lr: float,
        min_lr: float = 0.0,
        *,
        max_steps: int,
    ) -> None:
        check_positive("max_lr", max_lr)
        check_non_negative("min_lr", min_lr)
        check(min_lr <= max_lr, "min_lr", min_lr, f"at most max_lr = {max_lr}")
        self.optimizer, self.step_count = optimizer, 0
        self._config = TrainConfig(
            steps=max_steps, warmup_steps=warmup_steps, lr=max_lr, min_lr_ratio=min_lr / max_lr
        )

    def step(self) -> float:
        """Set and return the learning rate of the next optimizer step; the first call is that of the first step."""
        lr = learning_rate(self.step_count, self._config)
        self.step_count += 1
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr


def setup_distributed() -> tuple[int, int, int]:
    """Join the processes that ``torchrun`` started, by nccl or gloo: ``(rank, world size, local rank)``.

    A process that it did not start is alone: ``(0, 1, 0)``.
    """
    if is_launched() and not dist.is_initialized():
        connect("cuda" if torch.cuda.is_available() else "cpu", ParallelConfig().timeout_seconds)
    place = world()
    return place.rank, place.size, place.local_rank


def cleanup_distributed() -> None:
    """Leave the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def wrap_model_fsdp(model: Model, mixed_precision: bool = True, min_num_params: int = 1_000_000) -> Model:
    """Share the model's weights out over all processes by FSDP2, in place; make the optimizer afterwards.

    Args:
        mixed_precision: gather and compute in bfloat16; gradients are added up in float32.
        min_num_params: blocks of at least so many parameters become units of their own; the rest is one.

    Raises: ValueError without a process group (``setup_distributed`` in processes of ``torchrun``).
    """
    wanted = "wrapped after setup_distributed, under torchrun"
    check(dist.is_initialized(), "model", type(model).__name__, wanted)
    check_integer("min_num_params", min_num_params, minimum=0)
    low = torch.bfloat16 if mixed_precision else None
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32 if mixed_precision else None)
    for block in model.model.blocks:
        if count_parameters(block) >= min_num_params:
            fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    return model


def count_parameters(model: nn.Module) -> int:
    """Trainable numbers, those of tied weights once."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)

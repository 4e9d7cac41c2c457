"""How one model is trained by several processes, replicated (DDP) or sharded (FSDP2), and how blocks save memory."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from helmholtz._checks import check, check_choice, check_integer
from helmholtz.models.decoder import Decoder
from helmholtz.models.tied import is_tied
from helmholtz.training.distributed import world
from helmholtz.training.objectives import ObjectiveFunction, Report, ReportFunction

Losses = tuple[Float[Tensor, ""], Float[Tensor, ""], dict[str, Float[Tensor, ""]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """How a run is distributed over the processes that torchrun starts. A single process uses only the last three.

    These settings change results by rounding alone, so that a run may be resumed with others.
    """

    strategy: Literal["ddp", "fsdp"] = "ddp"
    """Every process holds the whole model (ddp), or a shard of weights, gradients and optimizer state (fsdp)."""
    replicas: int = 1
    """With fsdp: groups of processes that hold the model once each (HSDP); a divisor of the number of processes."""
    gather_dtype: Literal["fp32", "bf16"] = "fp32"
    """With fsdp: what a block's weights are gathered and computed in; gradients are always summed in fp32."""
    timeout_seconds: int = 600
    """Seconds that a process waits for the others before it gives up."""
    recompute_every: int = 0
    """Recompute the activations of every n-th block in the backward pass (1: all) instead of keeping them; 0: none."""
    logits_mb: int = 1024
    """If the logits of a forward pass would take more, counted in fp32, its loss is made of pieces of that size, which
    the backward pass computes again. With a large vocabulary most of the memory goes to logits."""
    compile: bool = False
    """Compile every block to one graph by torch.compile: a minute or more at the start, then mostly faster."""

    def __post_init__(self) -> None:
        check_choice("parallel.strategy", self.strategy, ("ddp", "fsdp"))
        check_integer("parallel.replicas", self.replicas)
        check_choice("parallel.gather_dtype", self.gather_dtype, ("fp32", "bf16"))
        check_integer("parallel.timeout_seconds", self.timeout_seconds)
        check_integer("parallel.logits_mb", self.logits_mb)
        check_integer("parallel.recompute_every", self.recompute_every, minimum=0)
        if self.strategy == "ddp":
            for name, default in (("replicas", 1), ("gather_dtype", "fp32")):
                value, wanted = getattr(self, name), f"{default} without parallel.strategy=fsdp"
                check(value == default, f"parallel.{name}", value, wanted)


class LossModule(nn.Module):
    """A model with its objective: one module whose forward pass gives a loss, as DDP and FSDP want it."""

    def __init__(self, model: Decoder, objective: ObjectiveFunction, report: ReportFunction) -> None:
        super().__init__()
        self.model = model
        self._objective, self._report = objective, report

    def forward(self, tokens: Int[Tensor, "B T1"], step: int) -> Losses:
        """Loss, bound and terms of these rows; all in nats per token."""
        found = self._objective(self.model, tokens, step)
        return found.loss, found.bound, found.terms

    def report(self, batches: list[Int[Tensor, "_ _"]], step: int) -> Report:
        """What an evaluation says beside the loss."""
        return self._report(self.model, batches, step)


def wrap_parallel(loss_module: LossModule, config: ParallelConfig, device: torch.device) -> nn.Module:
    """The loss_module as this process trains it; weights must already be the same on all processes.

    FSDP's units are every block, the encoder and table of a plan, the equilibrium layer as a whole (its map must not be
    a unit of its own: the implicit gradient would be missing), untied embedding and output matrix. The rest is root.
    """
    model = loss_module.model
    model.logits_bytes = config.logits_mb * 2**20
    if config.recompute_every:
        for block in model.blocks[:: config.recompute_every]:
            _recompute(block)
    if config.compile:
        for block in model.blocks:
            block.compile(fullgraph=True)
    if config.strategy == "fsdp":
        return _sharded(loss_module, config, device)
    if world().size == 1:
        return loss_module
    ids = [world().local_rank] if device.type == "cuda" else None
    return DistributedDataParallel(
        loss_module, device_ids=ids, forward_sync_buffers=False, gradient_as_bucket_view=True
    )


def _recompute(block: nn.Module) -> None:
    forward = block.forward

    def recomputed(*arguments: Any, **options: Any) -> Any:
        return checkpoint(forward, *arguments, use_reentrant=False, **options)

    block.forward = recomputed


def _sharded(loss_module: LossModule, config: ParallelConfig, device: torch.device) -> nn.Module:
    size, model = world().size, loss_module.model
    by_torchrun = "ddp in a process that torchrun has not started"
    check(dist.is_initialized(), "parallel.strategy", config.strategy, by_torchrun)
    check(size % config.replicas == 0, "parallel.replicas", config.replicas, f"a divisor of {size} processes")
    shape, names = (size // config.replicas,), ("shard",)
    if config.replicas > 1:
        shape, names = (config.replicas, *shape), ("replica", *names)  # type: ignore[assignment]
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    low = config.gather_dtype == "bf16"
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if low else None, reduce_dtype=torch.float32 if low else None
    )
    for unit in _units(model):
        # the objective reads the equilibrium layer's parameters after its forward pass
        kept = unit is model.equilibrium
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=not kept)
    fully_shard(loss_module, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(loss_module, "report")
    return loss_module


def _units(model: Decoder) -> list[nn.Module]:
    units: list[nn.Module] = [*model.blocks]
    parts = (model.encoder, model.post_sampler, model.equilibrium)
    units += [part for part in parts if part is not None]
    if not is_tied(model):
        units += [model.embed, model.unembed]
    return units


@contextlib.contextmanager
def gradients_exchanged(module: nn.Module, exchanged: bool) -> Iterator[None]:
    """Whether backward passes inside add up gradients over processes; only the last of a step's has to."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(exchanged)
        yield
    elif isinstance(module, DistributedDataParallel) and not exchanged:
        with module.no_sync():
            yield
    else:
        yield


def full_tensor(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered from all processes (which must all ask for it); another one as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

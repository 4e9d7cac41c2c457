"""What a run will cost: parameters, memory and arithmetic, counted on its first batch before anything is trained."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from helmholtz._hardware import memory_bytes
from helmholtz.layers.mixer_config import build_mixer
from helmholtz.models.base import ModelConfig

PEAK_SIZE = 1024
PEAK_REPEATS = 5
BYTES_PER_BLOCK = 40_000
"""Of Python's objects, beside the weights."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Costs of one optimizer step of one process, and of holding the model."""

    parameters: int
    trained_parameters: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    """AdamW's two averages."""
    activation_bytes: int
    """What one micro-batch keeps for its backward pass, counted."""
    flops: int
    """Of matrix products, convolutions and attention in one step, forward and backward, as PyTorch counts them: without
    element-wise work and scans."""

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + self.activation_bytes


def check_memory(config: ModelConfig) -> None:
    """Raises: ValueError if this machine cannot hold the weights of such a model, before it is filled with them."""
    weights, blocks = config.vocab_size * config.d_model, 0
    try:
        for layer, same in groupby(config.layer_configs()):
            n_same = sum(1 for _ in same)
            with torch.random.fork_rng(devices=[]), torch.device("meta"):
                mixer = sum(parameter.numel() for parameter in build_mixer(layer.mixer).parameters())
            weights += n_same * (mixer + 3 * config.d_model * (layer.d_ff or 0))
            blocks += n_same
    except (RuntimeError, OverflowError) as error:
        raise ValueError(f"model: no model has these sizes ({error})") from error
    needed, there = 4 * weights + BYTES_PER_BLOCK * blocks, memory_bytes()
    if there is not None and needed > there:
        wanted = f"{weights:,} parameters in {blocks:,} blocks take {needed / 1e9:,.1f} GB"
        raise ValueError(f"model: {wanted}, this machine has {there / 1e9:,.1f} GB of memory")


def measure_budget(model: nn.Module, loss: Callable[[], Tensor], *, micro_batches: int) -> Budget:
    """Make one micro-batch's forward and backward pass and count; gradients are left as they were.

    Args:
        loss: the forward pass.
        micro_batches: of one optimizer step.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = [parameter.grad for parameter in trained]
    for parameter in trained:
        parameter.grad = None
    counter = FlopCounterMode(display=False)
    with counter, _kept_bytes(model) as kept:
        loss().backward()
    for parameter, gradient in zip(trained, before, strict=True):
        parameter.grad = gradient
    trained_bytes = sum(parameter.nbytes for parameter in trained)
    return Budget(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        trained_parameters=sum(parameter.numel() for parameter in trained),
        weight_bytes=sum(parameter.nbytes for parameter in model.parameters()),
        gradient_bytes=trained_bytes,
        optimizer_bytes=2 * trained_bytes,
        activation_bytes=sum(kept.values()),
        flops=counter.get_total_flops() * micro_batches,
    )


@contextmanager
def _kept_bytes(model: nn.Module) -> Iterator[dict[int, int]]:
    """Bytes of every storage that autograd keeps, by address; parameters and buffers are not counted."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept = dict[int, int]()
    alive = list[Tensor]()  # or an address could be given out again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def matmul_peak(dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations per second of a large matrix product: the best of some repeats."""
    a = torch.randn(PEAK_SIZE, PEAK_SIZE, device=device, generator=torch.Generator(device)).to(dtype)
    best = float("inf")
    for _ in range(PEAK_REPEATS):
        begin = time.perf_counter()
        product = a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begin)
    assert product.shape == a.shape
    return 2.0 * PEAK_SIZE**3 / best

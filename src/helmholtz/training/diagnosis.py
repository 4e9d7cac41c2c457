"""Where a number that is not finite came from."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from helmholtz.layers.row_draws import drawn_by_row
from helmholtz.training.distributed import gather_text

STAGES = ("parameter", "buffer", "output", "the loss", "gradient")
"""What the words of ``first_non_finite`` begin with, in the order of its search."""


class NonFiniteError(RuntimeError):
    """Losses or gradients stayed infinite or NaN."""


def first_non_finite(model: nn.Module, losses: Callable[[], Tensor]) -> str:
    """The first tensor that is not finite when a step is repeated, in words.

    In this order: parameters and buffers; what modules make of their inputs, as they run; the loss; gradients, in the
    order in which the backward pass makes them (sharded ones in the order of the model). Gradients are left as they
    were. Nothing is left out once something was found: processes that share weights wait for each other's passes.

    Args:
        losses: repeats the forward pass and gives the loss.

    Returns: an empty string if all is finite now.
    """
    found: list[str] = []
    for kind, named in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        found += [f"{kind} {name}: {_describe(tensor)}" for name, tensor in named if not _finite(tensor)]
    try:
        _search_passes(model, losses, found)
    except (RuntimeError, ValueError):  # of a solver that does not take what was found
        if not found:
            raise
    return found[0] if found else ""


def first_of_processes(
    model: nn.Module, loss: Callable[[Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor]]
) -> str:
    """``first_non_finite`` over several batches, rows and their keys, on every process; all are told the first of any.

    Args:
        loss: of the rows of a batch.
    """
    first = ""
    for rows, keys in batches:
        with drawn_by_row(keys):
            found = first_non_finite(model, functools.partial(loss, rows))
        first = first or found
    texts = [f"{text} (rank {rank})" for rank, text in enumerate(gather_text(first)) if text]
    return _earliest(texts) if texts else ""


def _search_passes(model: nn.Module, losses: Callable[[], Tensor], found: list[str]) -> None:
    with _watched_outputs(model, found):
        loss = losses()
    if not found and not _finite(loss):
        found.append(f"the loss: {_describe(loss)}")
    with _watched_gradients(model, found):
        loss.backward()


def _earliest(texts: Sequence[str]) -> str:
    """Of what several processes have found, what comes first in the search."""
    return min(texts, key=lambda text: next(i for i, stage in enumerate(STAGES) if text.startswith(stage)))


@contextlib.contextmanager
def _watched_outputs(model: nn.Module, found: list[str]) -> Iterator[None]:
    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            for tensor in _tensors(output):
                if not found and not _finite(tensor):
                    found.append(f"output of {name} ({type(module).__name__}): {_describe(tensor)}")

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _watched_gradients(model: nn.Module, found: list[str]) -> Iterator[None]:
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    before = [parameter.grad for _, parameter in trained]

    def watch(name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            if not found and parameter.grad is not None and not _finite(parameter.grad):
                found.append(f"gradient of {name}: {_describe(parameter.grad)}")

        return hook

    for _, parameter in trained:
        parameter.grad = None
    handles = [parameter.register_post_accumulate_grad_hook(watch(name)) for name, parameter in trained]
    try:
        yield
        for name, parameter in trained:  # FSDP sets the gradients of its shards past the hooks
            watch(name)(parameter)
    finally:
        for handle in handles:
            handle.remove()
        for (_, parameter), gradient in zip(trained, before, strict=True):
            parameter.grad = gradient


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, tuple | list):
        for item in output:
            yield from _tensors(item)
    elif is_dataclass(output) and not isinstance(output, type):
        for field in fields(output):
            yield from _tensors(getattr(output, field.name))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(_local(tensor).isfinite().all())


def _describe(tensor: Tensor) -> str:
    bad = ~_local(tensor.detach()).isfinite()
    where = [int(index) for index in bad.nonzero()[0]] if bad.ndim else []
    value = float(_local(tensor.detach())[tuple(where)])
    count = f"{int(bad.sum()):,} of {bad.numel():,} values of shape {tuple(tensor.shape)}"
    return f"{count} are not finite, the first is {value} at {where}"

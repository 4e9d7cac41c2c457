"""Where a number that is not finite came from."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class NonFiniteError(RuntimeError):
    """Losses or gradients stayed infinite or NaN."""


def first_non_finite(model: nn.Module, losses: Callable[[], Tensor]) -> str:
    """The first tensor that is not finite when a step is repeated, in words.

    In this order: parameters and buffers; what modules make of their inputs, as they run; the loss; gradients, in the
    order in which the backward pass makes them. Gradients are left as they were.

    Args:
        losses: repeats the forward pass and gives the loss.

    Returns: an empty string if all is finite now.
    """
    for kind, named in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in named:
            if not _finite(tensor):
                return f"{kind} {name}: {_describe(tensor)}"
    found: list[str] = []
    with _watched_outputs(model, found):
        loss = losses()
    if found:
        return found[0]
    if not _finite(loss):
        return f"the loss: {_describe(loss)}"
    with _watched_gradients(model, found):
        loss.backward()
    return found[0] if found else ""


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

"""The gradients of the operators where the compiled library, which has them in C++, is not there: on a GPU without it.

They follow from the names in the schemas (``operators.py``).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from helmholtz.kernels.operators import LIBRARY

Saved = dict[str, Any]


def register(name: str) -> None:
    """Make ``helmholtz::name`` differentiable once by ``helmholtz::name_backward``, if there is such an operator."""
    operator = getattr(torch.ops.helmholtz, name).default
    if not hasattr(torch.ops.helmholtz, f"{name}_backward"):
        _register_end(name)
        return
    backward = getattr(torch.ops.helmholtz, f"{name}_backward").default
    arguments = [x.name for x in operator._schema.arguments]
    results = [x.name for x in operator._schema.returns]
    wanted = {x.name: str(x.type) for x in backward._schema.arguments}
    found = [x.name for x in backward._schema.returns]

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        known = dict(zip(results, outputs, strict=True)) | dict(zip(arguments, inputs, strict=True))
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(known[x] for x in results if f"d{x}" not in wanted))
        kept = {x: known[x] for x in wanted if x in known}
        ctx.names = [x for x, y in kept.items() if isinstance(y, Tensor)]
        ctx.others = {x: y for x, y in kept.items() if not isinstance(y, Tensor)}
        ctx.save_for_backward(*(kept[x] for x in ctx.names))
        ctx.zeros = {f"d{x}": _zeros(known[x]) for x in results if not wanted.get(f"d{x}", "?").endswith("?")}
        ctx.absent = {x for x in arguments if known[x] is None}

    def gradients(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        given = dict(zip((f"d{x}" for x in results), grads, strict=True))
        if all(g is None for grad in grads for g in (grad if isinstance(grad, list | tuple) else [grad])):
            return (None,) * len(arguments)
        known = given | {x: make(given[x]) for x, make in ctx.zeros.items()}
        known |= dict(zip(ctx.names, ctx.saved_tensors, strict=True)) | ctx.others
        returned = backward(*(known[x] for x in wanted))
        by_name = dict(zip(found, returned if isinstance(returned, tuple) else (returned,), strict=True))
        return tuple(None if x in ctx.absent else by_name.get(f"d{x}") for x in arguments)

    torch.library.register_autograd(f"helmholtz::{name}", gradients, setup_context=save, lib=LIBRARY)
    _register_end(f"{name}_backward")


def _register_end(name: str) -> None:
    def refuse(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(f"derivative for helmholtz::{name} is not implemented")

    torch.library.register_autograd(f"helmholtz::{name}", refuse, lib=LIBRARY)


def _zeros(result: Tensor | list[Tensor]) -> Callable[[Any], Any]:
    """What fills in a gradient of ``result`` that autograd leaves out."""
    if not isinstance(result, Tensor):
        each = [_zeros(x) for x in result]
        return lambda grads: [make(x) for make, x in zip(each, grads, strict=True)]
    shape, dtype, device = result.shape, result.dtype, result.device
    return lambda grad: torch.zeros(shape, dtype=dtype, device=device) if grad is None else grad

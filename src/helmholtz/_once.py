"""Functions that are differentiable once: whoever asks for more is told."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._C import _functions
from torch.autograd import forward_ad

Gradients = Tensor | tuple[Tensor | None, ...]


class DifferentiableOnce(torch.autograd.Function):
    """An ``autograd.Function`` whose ``backward`` autograd cannot follow: a second derivative raises, by every route.

    ``torch.autograd.function.once_differentiable`` is not enough. It puts an error on the way through the incoming
    gradients only; what the gradients owe to *saved* tensors has no way in the graph, and ``torch.autograd.grad``
    twice silently leaves it out. Here the error lies on the way to all of them, so a subclass saves enough for every
    input of which a gradient is a function to be reached: the input, or an output (of no elements, if need be). An
    intermediate result leads nowhere.

    Costs nothing unless a graph of the backward pass is asked for.
    """

    why: ClassVar[str] = (
        "its backward pass is written by hand and has no derivative. For second derivatives use its twin in "
        "helmholtz.reference, or differences of gradients"
    )

    def __init_subclass__(cls) -> None:
        setattr(cls, "backward", staticmethod(_guarded(cls.backward, cls.refusal())))  # noqa: B010, a method to mypy

    @classmethod
    def refusal(cls) -> str:
        return f"{cls.__module__} ({cls.__qualname__}) is differentiable once: {cls.why}"

    @classmethod
    def call(cls, *args: Any) -> Any:
        """``apply``, or an error with the reason where torch would ask for a ``setup_context`` or a ``jvp``."""
        if not torch.compiler.is_compiling() and (
            torch._C._are_functorch_transforms_active() or any(map(_has_tangent, args))
        ):
            raise RuntimeError(
                f"{cls.refusal()}. It takes torch.autograd's backward pass alone: neither transforms of torch.func "
                "(grad, jvp, hessian, vmap) nor forward-mode derivatives go through it"
            )
        return cls.apply(*args)


def is_traced() -> bool:
    """A compiler, or a transform of ``torch.func``, or forward mode looks on: none of them follows a hand-written
    backward pass or writes into views, all follow plain operations."""
    compiled = torch.compiler.is_compiling()
    return compiled or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _has_tangent(x: Any) -> bool:
    inside = forward_ad._current_level >= 0
    return inside and isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None


def mark_as_once(name: str, *outputs: Tensor) -> None:
    """For kernels of other packages, whose backward pass leaves no graph: raise where a graph of it is asked for."""

    def refuse(grad: Tensor) -> None:
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"backend {name!r} is differentiable once: its backward pass leaves no graph (create_graph=True). "
                'Take backend="torch"'
            )

    for x in outputs:
        if x.requires_grad:
            x.register_hook(refuse)


class _Context:
    """The context of a backward pass whose saved tensors were read already: checkpointing allows that once."""

    def __init__(self, ctx: Any) -> None:
        self._ctx, self.saved_tensors = ctx, ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def _guarded(backward: Callable[..., Gradients], refusal: str) -> Callable[..., Gradients]:
    @functools.wraps(backward)
    def guarded(ctx: Any, *grads: Tensor | None) -> Gradients:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        context = _Context(ctx)
        with torch.no_grad():
            results = backward(context, *grads)
        return _with_an_end(results, (*grads, *context.saved_tensors), refusal)

    return guarded


def _with_an_end(results: Gradients, sources: Iterable[Tensor | None], refusal: str) -> Gradients:
    """The results, with an error on the way to whatever the sources depend on."""
    given = results if isinstance(results, tuple) else (results,)
    there = [x for x in sources if x is not None and x.requires_grad]
    if not there:
        return results
    here = [x for x in given if x is not None]
    marked = iter(_functions.DelayedError(refusal.encode(), len(here) + len(there))(*here, *there))
    return tuple(None if x is None else next(marked) for x in given)

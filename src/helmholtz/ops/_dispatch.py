"""Which implementation runs a call, decided from the call's own tensors."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Backend:
    """``refuses(*tensors)`` gives the reason this backend cannot take a call, or None if it can."""

    name: str
    run: Callable[..., Any]
    refuses: Callable[..., str | None]


def choose(backends: tuple[Backend, ...], requested: str, *tensors: Tensor | None) -> Backend:
    """First backend that accepts for ``"auto"``, else the named one or a ``ValueError`` with its reason."""
    reasons = []
    for backend in backends:
        if requested not in ("auto", backend.name):
            continue
        reason = backend.refuses(*tensors)
        if reason is None:
            return backend
        reasons.append(f"backend {backend.name!r} cannot run this call: {reason}")
    names = ["auto", *(backend.name for backend in backends)]
    raise ValueError("; ".join(reasons) or f"backend must be one of {names}, got {requested!r}")

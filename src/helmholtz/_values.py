"""Where the values of tensors may be looked at."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack
from torch._subclasses.fake_tensor import FakeTensor

_few_reads = False  # of the process and not of the thread: a GPU's backward pass runs in another


@contextlib.contextmanager
def few_reads() -> Iterator[None]:
    """Within this context values are read only to decide which work is left: nothing is counted, checked or warned of.

    A training step on a GPU runs in it. Each read waits there until all work handed over is done.
    """
    global _few_reads
    before, _few_reads = _few_reads, True
    try:
        yield
    finally:
        _few_reads = before


def has_values(*tensors: Tensor) -> bool:
    """False where code runs without numbers or for many at once: compiled, exported, on fake tensors or the meta
    device, under ``torch.func.vmap``. What depends on values has another form there, or is left out."""
    if torch.compiler.is_compiling():
        return False
    stack = get_interpreter_stack()
    if stack and any(transform.key() == TransformType.Vmap for transform in stack):
        return False
    return not any(x.is_meta or isinstance(x, FakeTensor) for x in tensors)


def free_to_read(*tensors: Tensor) -> bool:
    """Whether looking at values costs nothing. Elsewhere data is not checked: a device would have to be waited for."""
    return all(x.is_cpu for x in tensors) and worth_reading(*tensors)


def worth_reading(*tensors: Tensor) -> bool:
    """Whether to look at values for the sake of a report: where there are any, and not within ``few_reads``."""
    return not _few_reads and has_values(*tensors)


def waits_for_device(x: Tensor) -> bool:
    """Whether looking at ``x`` makes the processor wait for a device. Within ``few_reads`` the CPU counts as one: tests
    without a GPU go its way."""
    return _few_reads or not x.is_cpu

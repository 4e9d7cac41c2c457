"""Where the values of tensors may be looked at."""

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack
from torch._subclasses.fake_tensor import FakeTensor


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
    return all(x.is_cpu for x in tensors) and has_values(*tensors)

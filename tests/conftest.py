"""Shape checks, a seed and poisoned memory for every test; global state is put back afterwards."""

import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from jaxtyping import install_import_hook
from torch import Tensor

import interpreted
from other_rounding import OtherRounding

SHAPE_CHECKS = os.environ.get("SHAPE_CHECKS", "1") != "0"
OTHER_ROUNDING = os.environ.get("OTHER_ROUNDING", "0") != "0"


def _hooked_modules() -> list[str]:
    """Everything but ``interop``, whose classes are read by other libraries."""
    spec = find_spec("helmholtz")
    assert spec is not None and spec.origin is not None
    names = {
        path.stem for path in Path(spec.origin).parent.iterdir() if path.suffix == ".py" or path.is_dir()
    }
    return [f"helmholtz.{name}" for name in sorted(names - {"__init__", "__pycache__", "interop"})]


if SHAPE_CHECKS:
    early = [name for name in sys.modules if name.startswith("helmholtz.")]
    assert not early, f"imported before the shape checks were installed: {early}"
    install_import_hook(
        _hooked_modules(), "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
    )

if interpreted.INTERPRETED:
    interpreted.install()

BUSY = [hypothesis.HealthCheck.too_slow]
"""What another process on the machine can make fail."""
hypothesis.settings.register_profile(
    "tests", deadline=None, derandomize=True, max_examples=50, database=None, suppress_health_check=BUSY
)
hypothesis.settings.register_profile(
    "thorough", deadline=None, max_examples=1000, database=None, print_blob=True, suppress_health_check=BUSY
)
hypothesis.settings.load_profile("tests")

with torch.device("meta"):  # makes torch remember the true torch.empty, which the poison below replaces
    torch.empty(0)


@pytest.fixture
def heard_hangups() -> Iterator[None]:
    """SIGHUP reaches the test and what it starts, also where ``nohup`` has it ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(autouse=True)
def _global_state() -> Iterator[None]:
    """One thread and fixed seeds before each test; whatever it changed globally is restored."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    dtype = torch.get_default_dtype()
    deterministic = torch.are_deterministic_algorithms_enabled()
    grad = torch.is_grad_enabled()
    yield
    torch.set_default_dtype(dtype)
    torch.use_deterministic_algorithms(deterministic)
    torch.set_grad_enabled(grad)


@pytest.fixture(autouse=True)
def _other_rounding(request: pytest.FixtureRequest) -> Iterator[None]:
    """With ``OTHER_ROUNDING=1`` every test runs as on another processor."""
    if not OTHER_ROUNDING or request.node.get_closest_marker("compile"):
        yield
        return
    with OtherRounding():
        yield


def _poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        tensor = allocate(*args, **kwargs)
        if tensor.is_floating_point() and tensor.element_size() > 1:
            tensor.detach().fill_(torch.nan)
        return tensor

    return poisoned


@pytest.fixture(autouse=True)
def _nan_in_uninitialised_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill ``torch.empty`` and its relatives with NaN, so that a read before a write cannot pass."""
    if request.node.get_closest_marker("compile"):
        return
    for owner, name in [(torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")]:
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))

"""Operations that have kernels are tested in both forms."""

from collections.abc import Iterator

import pytest

from helmholtz import kernels
from interpreted import INTERPRETED

HAVE_KERNELS = [
    "test_attention",
    "test_binary_latent",
    "test_causal_conv",
    "test_free_energy",
    "test_linear_attention",
    "test_losses",
    "test_masked_free_energy",
    "test_modulate",
    "test_rms_norm",
    "test_rnn_softmax",
    "test_rope",
    "test_rotary_attention",
    "test_scan",
    "test_second_derivatives",
    "test_selective_scan",
    "test_softmax_read",
    "test_ssd",
    "test_swiglu",
    "test_token_energy",
]
FORMS = ["kernel"] if INTERPRETED else ["plain", *(["kernel"] if kernels.LOADED else [])]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.module.__name__.rpartition(".")[2] in HAVE_KERNELS:
        metafunc.parametrize("form", FORMS, indirect=True)


@pytest.fixture(autouse=True)  # a fixture that is only appended to a test's names never runs
def form(request: pytest.FixtureRequest) -> Iterator[str]:
    if getattr(request, "param", "kernel") == "kernel":
        yield "kernel"
        return
    with kernels.plain_forms():
        yield "plain"

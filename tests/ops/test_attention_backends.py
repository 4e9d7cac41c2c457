"""What the flash kernels are handed, and why they refuse: with a stand-in package, since they need a GPU."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helmholtz import kernels
from helmholtz.layers.fem import FreeEnergyMixer
from helmholtz.layers.fem_config import FreeEnergyMixerConfig
from helmholtz.ops._average import average
from helmholtz.ops.attention import _flash, softmax_attention


class OnCuda(Tensor):
    """A tensor that says it is on a GPU, so that the dispatch can be followed without one."""

    is_cuda = True


class FlashStub(ModuleType):
    """``flash_attn`` as its documentation describes it: ``B T H K``, causal aligned to the last key, grouped heads."""

    def __init__(self) -> None:
        super().__init__("flash_attn")
        self.__spec__ = ModuleSpec("flash_attn", None)
        self.calls: list[str] = []

    def flash_attn_func(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
        self.calls.append("flash_attn_func")
        return self._average(q, k, v, causal)

    def flash_attn_varlen_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        *,
        causal: bool = False,
    ) -> Tensor:
        self.calls.append("flash_attn_varlen_func")
        assert q.ndim == k.ndim == v.ndim == 3, "total T, heads, width"
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert isinstance(max_seqlen_q, int) and isinstance(max_seqlen_k, int)
        lengths = cu_seqlens_q.diff().tolist()
        assert cu_seqlens_k.diff().tolist() == lengths and max_seqlen_q == max_seqlen_k == max(lengths)
        parts = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
        return torch.cat([self._average(*(x[None] for x in part), causal)[0] for part in parts])

    def _average(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        assert q.dtype == k.dtype == v.dtype and q.dtype in (torch.float16, torch.bfloat16)
        assert q.shape[-1] == k.shape[-1] == v.shape[-1]
        assert k.shape[2] == v.shape[2] and q.shape[2] % k.shape[2] == 0
        q, k, v = (x.as_subclass(Tensor).transpose(1, 2) for x in (q, k, v))
        times, sources = q.shape[2], k.shape[2]
        visible = torch.ones(times, sources, dtype=torch.bool).tril(sources - times if causal else sources)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
        return out.transpose(1, 2).as_subclass(OnCuda)


@pytest.fixture(autouse=True)
def capability(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The compute capability of the imagined GPU."""
    version = [8, 0]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: tuple(version))
    return version


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> FlashStub:
    stub = FlashStub()
    monkeypatch.setitem(sys.modules, "flash_attn", stub)
    return stub


def qkv(times=5, sources=5, groups=4, batch=2, width=8, dtype=torch.bfloat16) -> list[Tensor]:
    shapes = [(batch, 4, times, width), (batch, groups, sources, width), (batch, groups, sources, width)]
    return [torch.randn(shape).to(dtype) for shape in shapes]


def on_cuda(tensors: list[Tensor]) -> list[Tensor]:
    return [x.as_subclass(OnCuda) for x in tensors]


SHAPES = [dict(), dict(times=2), dict(groups=2), dict(times=1, groups=1), dict(times=3, sources=7, groups=2)]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", ["auto", "flash_attn"])
def test_dispatch_to_flash_equals_torch(flash, backend, shape, causal):
    tensors = qkv(**shape)
    out = softmax_attention(*on_cuda(tensors), causal=causal, backend=backend)
    assert flash.calls == ["flash_attn_func"]
    expected = softmax_attention(*tensors, causal=causal, backend="torch")
    torch.testing.assert_close(out.as_subclass(Tensor), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("causal", [True, False])
def test_packed_rows_go_to_flash_as_one(flash, causal):
    tensors, bounds = qkv(times=9, sources=9, groups=2, batch=1), torch.tensor([0, 2, 3, 9])
    out = softmax_attention(*on_cuda(tensors), causal=causal, cu_seqlens=bounds)
    assert flash.calls == ["flash_attn_varlen_func"]
    expected = softmax_attention(*tensors, causal=causal, cu_seqlens=bounds, backend="torch")
    torch.testing.assert_close(out.as_subclass(Tensor), expected, rtol=0.02, atol=0.02)


def test_run_hands_over_views_of_the_layout_it_wants(flash, monkeypatch):
    q, k, v = qkv(times=3, sources=7, groups=2)
    handed = []
    monkeypatch.setattr(
        flash, "flash_attn_func", lambda *args, causal: handed.append((args, causal)) or args[0]
    )
    out = _flash(q, k, v, True, None, None)
    (args, causal), shapes = handed[0], [(2, 3, 4, 8), (2, 7, 2, 8), (2, 7, 2, 8)]
    assert causal is True and [tuple(x.shape) for x in args] == shapes
    assert [x.data_ptr() for x in args] == [x.data_ptr() for x in (q, k, v)]
    assert out.shape == q.shape


REFUSALS = {
    "float32": (lambda q, k, v: (q.float(), k.float(), v.float()), {}, "it takes float16 or bfloat16"),
    "widths": (lambda q, k, v: (q, k, v[..., :6]), {}, "equal key and value widths, these are 8 and 6"),
    "mask": (
        lambda q, k, v: (q, k, v),
        {"key_mask": torch.ones(2, 5, dtype=torch.bool)},
        "it takes no padding mask",
    ),
}


@pytest.mark.parametrize("change, options, reason", REFUSALS.values(), ids=REFUSALS)
def test_what_flash_refuses_goes_to_torch_unless_named(flash, change, options, reason):
    tensors = on_cuda(list(change(*qkv())))
    out = softmax_attention(*tensors, backend="auto", **options)
    assert torch.equal(out, softmax_attention(*tensors, backend="torch", **options))
    with pytest.raises(ValueError, match=f"backend 'flash_attn' cannot run this call: .*{reason}"):
        softmax_attention(*tensors, backend="flash_attn", **options)
    assert flash.calls == []


def test_old_gpus_and_wide_heads_are_refused(flash, capability):
    with pytest.raises(ValueError, match="head widths up to 256, this is 264"):
        softmax_attention(*on_cuda(qkv(width=264)), backend="flash_attn")
    capability[0] = 7
    with pytest.raises(ValueError, match=r"compute capability 8\.0 or newer"):
        softmax_attention(*on_cuda(qkv()), backend="flash_attn")
    assert flash.calls == []


def test_mixed_dtypes_are_refused(flash):
    q, k, v = on_cuda(qkv())
    reason = "these are torch.bfloat16, torch.bfloat16, torch.float16"
    with pytest.raises(ValueError, match=f"backend 'flash_attn' cannot run this call: .*{reason}"):
        softmax_attention(q, k, v.half(), backend="flash_attn")
    assert flash.calls == []


def test_cpu_tensors_stay_on_torch_with_the_package_installed(flash):
    tensors = qkv()
    assert torch.equal(softmax_attention(*tensors), softmax_attention(*tensors, backend="torch"))
    with pytest.raises(
        ValueError, match="backend 'flash_attn' cannot run this call: it needs CUDA tensors.* cpu"
    ):
        softmax_attention(*tensors, backend="flash_attn")
    assert flash.calls == []


def test_without_the_package_it_is_the_package_that_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    tensors = on_cuda(qkv())
    with pytest.raises(ValueError, match="the package flash_attn is not installed"):
        softmax_attention(*tensors, backend="flash_attn")
    assert torch.equal(softmax_attention(*tensors), softmax_attention(*tensors, backend="torch"))


def test_unknown_backend_names_the_choices():
    with pytest.raises(
        ValueError, match=r"backend must be one of \['auto', 'flash_attn', 'torch'\], got 'flash'"
    ):
        softmax_attention(*qkv(), backend="flash")


def mixer(read: str, backend: str) -> FreeEnergyMixer:
    torch.manual_seed(0)
    config = FreeEnergyMixerConfig(
        d_model=16, n_heads=2, d_head=4, d_head_v=4, read=read, tdc_width=0, backend=backend
    )
    return FreeEnergyMixer(config).bfloat16()


def test_a_mean_read_runs_on_flash(flash):
    x = torch.randn(2, 6, 16).bfloat16()
    out = mixer("mean", "flash_attn")(x.as_subclass(OnCuda))
    assert flash.calls == ["flash_attn_func"]
    torch.testing.assert_close(out.as_subclass(Tensor), mixer("mean", "torch")(x), rtol=0.03, atol=1e-3)


def test_a_free_energy_read_does_not_because_it_needs_float32(flash):
    x = torch.randn(2, 6, 16).bfloat16().as_subclass(OnCuda)
    with pytest.raises(ValueError, match="it takes float16 or bfloat16.*a free-energy read needs float32"):
        mixer("temperature", "flash_attn")(x)
    mixer("temperature", "auto")(x)
    assert flash.calls == []


def test_padded_widths_change_nothing_and_avoid_the_quadratic_path(monkeypatch):
    """Equal widths are what SDPA's linear-memory kernel takes; the scale stays that of the true key width."""
    widths = []
    original = torch.nn.functional.scaled_dot_product_attention

    def spy(q, k, v, **options):
        widths.append((q.shape[-1], k.shape[-1], v.shape[-1], options["scale"]))
        return original(q, k, v, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    monkeypatch.setattr(kernels, "_plain", False)  # plain forms avoid it, as it is differentiable once
    for k_width, v_width in [(4, 9), (9, 4), (5, 5)]:
        q, k, v = *torch.randn(2, 1, 2, 6, k_width), torch.randn(1, 2, 6, v_width)
        assert average(q, k, v, causal=True).shape[-1] == v_width
        assert widths.pop() == (*[max(k_width, v_width)] * 3, k_width**-0.5)

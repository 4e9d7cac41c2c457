"""The parts of ``tools/gpu.py``: each a list of cases, a case a function without arguments that gives a row."""

import contextlib
import gc
import importlib.util
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import gpu_budget
import gpu_cases
import torch
import torch.nn.functional as F
from gpu_budget import SIZES, TOKENS
from torch import Tensor, nn

from helmholtz import kernels
from helmholtz._values import few_reads
from helmholtz.layers.row_draws import drawn_by_row
from helmholtz.models import MODELS
from helmholtz.models.decoder import Decoder
from helmholtz.ops.row_random import row_keys
from helmholtz.training.config import TrainConfig
from helmholtz.training.objectives import next_token
from helmholtz.training.optim import make_optimizer
from helmholtz.training.parts import objective_class, objective_of

Row = dict[str, Any]
Cases = list[tuple[str, Callable[[], Row]]]
VOCABULARY = 50_257


@dataclass(frozen=True, slots=True)
class Place:
    """Where the parts run; ``tiny`` is every part with sizes that a laptop finishes."""

    device: torch.device
    tiny: bool

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    def wait(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize(self.device)

    def clean(self) -> None:
        """Give back what the last case held."""
        gc.collect()
        if self.is_gpu:
            torch.cuda.empty_cache()


def median_seconds(
    place: Place, function: Callable[[], object], *, seconds: float = 2.0
) -> tuple[float, int]:
    """Median time of a call after two that warm up, and how many were timed: as many as fit, 3 to 30."""
    for _ in range(1 if place.tiny else 2):
        function()
    place.wait()
    times: list[float] = []
    while len(times) < (2 if place.tiny else 3) or (
        sum(times) < seconds and len(times) < 30 and not place.tiny
    ):
        begin = time.perf_counter()
        function()
        place.wait()
        times.append(time.perf_counter() - begin)
    return statistics.median(times), len(times)


# machine


def machine(place: Place) -> Cases:
    return [("ceilings", lambda: ceilings(place))]


def ceilings(place: Place) -> Row:
    """What a copy and a large product of random numbers reach, and float32 vectors."""
    n = 2**20 if place.tiny else 2**30
    size = 256 if place.tiny else 8192
    source, target = torch.randn(n // 4, device=place.device), torch.empty(n // 4, device=place.device)
    copy = 2 * source.nbytes / median_seconds(place, lambda: target.copy_(source))[0]
    a, b = (torch.randn(size, size, device=place.device, dtype=torch.bfloat16) for _ in range(2))
    matmul = 2 * size**3 / median_seconds(place, lambda: a @ b)[0]
    return {
        "device": torch.cuda.get_device_name(place.device) if place.is_gpu else "CPU",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "gpu_kernels": sorted(kernels.gpu.MODULES) if kernels.gpu.PRESENT else [],
        "copy_bytes_per_s": copy,
        "matmul_flop_per_s": matmul,
    }


# kernels


def kernel_cases(place: Place) -> Cases:
    found: Cases = [
        (f"{operator}, {label}, {str(dtype).removeprefix('torch.')}", run)
        for operator, label, dtype, run in gpu_cases.judged(place.device)
    ]
    for operator in kernels.gpu.MODULES:
        if operator not in gpu_cases.CASES:
            found.insert(0, (f"{operator}, no case", _no_case))
    return found[::4] if place.tiny else found


def _no_case() -> Row:
    raise LookupError("tools/gpu_cases.py has no case of this operator")


# steps


def presets(width: int, layers: int, vocabulary: int, tiny: bool) -> dict[str, dict[str, Any]]:
    """Flat settings by architecture; the models of a size are matched to the transformer where they can be."""
    sizes = {"vocab_size": vocabulary, "d_model": width, "n_layers": layers, "max_seq_len": 2048}
    heads = {"n_heads": max(2, width // 64)}
    small = {"d_head": 16, "d_state": 16, "n_patterns": 16} if tiny else {}
    bits = 6 if tiny else 16
    mamba = {k: v for k, v in small.items() if k != "n_patterns"}
    return {
        "transformer": {"architecture": "transformer", **sizes, **heads},
        "fem softmax": {"architecture": "fem_lm", "prior": "softmax", **sizes, **heads},
        "fem gla": {"architecture": "fem_lm", "prior": "gla", **sizes, **heads},
        "free transformer, 16 bits": {"architecture": "free_transformer", "n_latent_bits": bits, **sizes, **heads},
        "mamba": {"architecture": "mamba", **sizes, "n_layers": 2 * layers, **mamba},
        "mamba-hopfield": {"architecture": "mamba_hopfield", **sizes, "n_layers": 2 * layers - 2, **small},
    }  # fmt: skip


def build_model(settings: dict[str, Any], device: torch.device) -> Decoder:
    options = dict(settings)
    kind = MODELS[options.pop("architecture")]
    torch.manual_seed(0)
    model: Decoder = kind(kind.config_class.from_dict(options))  # type: ignore[assignment]
    return model.to(device).train()


def objective_for(model: Decoder) -> Callable[[nn.Module, Tensor, int], Any]:
    wanted = objective_class(model.config)
    return next_token if wanted is None else objective_of(wanted(), seed=0)


class TrainingStep:
    """One optimizer step as the trainer makes it, on random tokens."""

    def __init__(self, place: Place, model: Decoder, batch: int, length: int, *, narrow: bool) -> None:
        self.place, self.model, self.objective = place, model, objective_for(model)
        self.optimizer = make_optimizer(model, TrainConfig(lr=3e-4))
        self.narrow, vocabulary = narrow, model.config.vocab_size
        generator = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(vocabulary, (batch, length + 1), generator=generator).to(place.device)
        self.keys = row_keys(0, torch.arange(batch)).to(place.device)

    def __call__(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        with few_reads(), drawn_by_row(self.keys):
            with torch.autocast(self.place.device.type, dtype=torch.bfloat16, enabled=self.narrow):
                loss: Tensor = self.objective(self.model, self.tokens, 0).loss
            loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.found_inf = (~(norm.isfinite() & loss.isfinite())).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        return loss.detach()


@contextlib.contextmanager
def no_waiting(place: Place, *, error: bool) -> Iterator[list[str]]:
    """Raise where the processor waits for the GPU, or note it; nothing elsewhere."""
    said: list[str] = []
    if not place.is_gpu:
        yield said
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("error" if error else "warn")
        try:
            yield said
        finally:
            torch.cuda.set_sync_debug_mode("default")
            said += [str(warning.message) for warning in caught if "synchroniz" in str(warning.message)]


def step_cases(place: Place) -> Cases:
    width, layers = (32, 2) if place.tiny else (256, 2)
    names = presets(width, layers, 256, tiny=True)
    return [(name, lambda s=s: small_steps(place, s)) for name, s in names.items()]  # type: ignore[misc]


def small_steps(place: Place, settings: dict[str, Any]) -> Row:
    """Three steps of a small model in float32, on the device and on the CPU; on the device without a wait.

    An equilibrium's solver may look at its rows; how often is told.
    """
    batch, length = (2, 33) if place.tiny else (4, 200)
    model = build_model(settings, place.device)
    step, looks = TrainingStep(place, model, batch, length, narrow=False), model.equilibrium is not None
    losses = [step()]
    place.wait()
    with no_waiting(place, error=not looks) as said:
        losses += [step() for _ in range(2)]
    reference = TrainingStep(
        Place(torch.device("cpu"), True),
        build_model(settings, torch.device("cpu")),
        batch,
        length,
        narrow=False,
    )
    with kernels.plain_forms():
        expected = [float(reference()) for _ in range(3)]
    found = [float(x) for x in losses]
    limit = 1e-2 if model.plan is not None else 1e-3  # a bit of a plan may turn
    error = max(abs(a - b) / b for a, b in zip(found, expected, strict=True))
    return {
        "losses": found,
        "on_cpu": expected,
        "error": error,
        "limit": limit,
        "waits": len(said) / 2 if place.is_gpu else None,
        "ok": error <= limit,
    }


# layers


class SDPALayer(nn.Module):
    """Plain attention of torch alone: two matrices and ``F.scaled_dot_product_attention``; ``4 D^2`` parameters."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // gpu_budget.HEAD
        self.in_proj, self.o_proj = (
            nn.Linear(width, 3 * width, bias=False),
            nn.Linear(width, width, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.in_proj(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]


def _fla(name: str, width: int) -> nn.Module:
    import fla.layers  # type: ignore[import-not-found]

    made: nn.Module = getattr(fla.layers, name)(hidden_size=width, num_heads=width // gpu_budget.HEAD)
    return made


def _mamba_ssm(width: int) -> nn.Module:
    from mamba_ssm import Mamba2  # type: ignore[import-not-found]

    made: nn.Module = Mamba2(width, d_state=gpu_budget.HEAD, headdim=gpu_budget.HEAD)
    return made


def layer_cases(place: Place) -> Cases:
    sizes = [(64, 128)] if place.tiny else SIZES
    names = ["sdpa", *gpu_budget.LAYERS]
    if importlib.util.find_spec("fla"):
        names += ["fla GatedLinearAttention", "fla LinearAttention"]
    if importlib.util.find_spec("mamba_ssm"):
        names += ["mamba_ssm Mamba2"]
    return [
        (f"{name}, D={width}, T={length}", lambda n=name, w=width, t=length: layer_speed(place, n, w, t))  # type: ignore[misc]
        for width, length in sizes
        for name in names
    ]


def layer_speed(place: Place, name: str, width: int, length: int) -> Row:
    """Forward and backward under bf16 autocast; the floor is counted for layers of this library and for SDPA."""
    torch.manual_seed(0)
    batch = 1 if place.tiny else TOKENS // length
    layer = _layer(name, width).to(place.device)
    x = torch.randn(batch, length, width, device=place.device, requires_grad=True)
    cotangent = torch.randn(batch, length, width, device=place.device, dtype=torch.bfloat16)
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]

    def run() -> object:
        with torch.autocast(place.device.type, dtype=torch.bfloat16):
            y = layer(x)
        y = y[0] if isinstance(y, tuple) else y
        return torch.autograd.grad(y, leaves, cotangent.to(y.dtype), allow_unused=True)

    seconds, rounds = median_seconds(place, run, seconds=1.0)
    row: Row = {"layer": name, "D": width, "T": length, "B": batch, "ms": 1e3 * seconds, "rounds": rounds}
    row["parameters"] = sum(p.numel() for p in layer.parameters()) / width**2
    if name == "sdpa" or name in gpu_budget.LAYERS:
        found = gpu_budget.floor("attention" if name == "sdpa" else name, width, batch, length)
        row |= {"matmul": found.matmul, "vector": found.vector, "bytes": found.bytes}
    return row


def _layer(name: str, width: int) -> nn.Module:
    if name == "sdpa":
        return SDPALayer(width)
    if name.startswith("fla "):
        return _fla(name.removeprefix("fla "), width)
    return _mamba_ssm(width) if name.startswith("mamba_ssm") else gpu_budget.build(name, width)


# models


def model_cases(place: Place, *, compiled: bool) -> Cases:
    width, layers, vocabulary = (32, 2, 512) if place.tiny else (768, 12, VOCABULARY)
    named = presets(width, layers, vocabulary, place.tiny)
    how = "compiled" if compiled else "eager"
    return [
        (f"{name}, {how}", lambda n=name, s=s: model_speed(place, n, s, compiled))
        for name, s in named.items()
    ]  # type: ignore[misc]


def model_speed(place: Place, name: str, settings: dict[str, Any], compiled: bool) -> Row:
    """Tokens per second and memory of training in bf16, blocks compiled or not, on 8 full rows of 2,048 random ids, as
    the trainer packs its text, without pads."""
    batch, length = (1, 64) if place.tiny else (8, 2048)
    model = build_model(settings, place.device)
    begin = time.perf_counter()
    if compiled:
        torch._dynamo.reset()  # the models before shared its limit of graphs per function
        for block in model.blocks:
            block.compile(fullgraph=True, backend="aot_eager" if place.tiny else "inductor")  # tiny: no C++
    step = TrainingStep(place, model, batch, length, narrow=True)
    if place.is_gpu:
        torch.cuda.reset_peak_memory_stats(place.device)
    first = step()
    place.wait()
    started = time.perf_counter() - begin
    seconds, rounds = median_seconds(place, step, seconds=4.0)
    with no_waiting(place, error=False) as said:
        last = step()
    n = sum(p.numel() for p in model.parameters())
    return {
        "model": name, "compiled": compiled, "parameters": n,
        "tokens_per_s": batch * length / seconds, "ms": 1e3 * seconds,
        "rounds": rounds, "first_step_s": started, "waits": len(said) if place.is_gpu else None,
        "losses": [float(first), float(last)],
        "peak_bytes": torch.cuda.max_memory_allocated(place.device) if place.is_gpu else None,
        "ok": bool(torch.isfinite(last)),
    }  # fmt: skip


def _version(name: str) -> str | None:
    spec = importlib.util.find_spec(name)
    return None if spec is None else str(getattr(importlib.import_module(name), "__version__", "?"))


PARTS: dict[str, Callable[[Place], Cases]] = {
    "machine": machine,
    "kernels": kernel_cases,
    "steps": step_cases,
    "layers": layer_cases,
    "models": lambda place: model_cases(place, compiled=False),
    "compiled": lambda place: model_cases(place, compiled=True),
}

"""A mixer compiled by inductor against itself in eager mode: outputs and all gradients, in float32 and bf16 autocast.

    python tools/compiled.py softmax gla            # x of 4 x 1024 x 256; needs the C++ compiler that inductor uses

Prints the largest difference over the largest entry, in roundings (eps) of what was computed in; ends with 1 if one
is beyond its bound.
"""

import argparse
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from _timing import print_table  # noqa: E402

from helmholtz.kernels import plain_forms  # noqa: E402
from helmholtz.layers import FreeEnergyMixer, FreeEnergyMixerConfig  # noqa: E402
from helmholtz.layers.fem_config import PRIORS  # noqa: E402

SHAPE = (4, 1024, 256)
OF_A_TOKEN, OF_A_SUM = 4, 64
"""Bounds in eps: outputs and their gradient for ``x``, and gradients of parameters, each a sum over 4,096 tokens."""


def mixer(prior: str) -> FreeEnergyMixer:
    torch.manual_seed(0)
    layer = FreeEnergyMixer(FreeEnergyMixerConfig(d_model=SHAPE[-1], n_heads=4, prior=prior))  # type: ignore[arg-type]
    assert layer.tdc is not None
    nn.init.normal_(layer.tdc.out_proj.weight, std=0.02)
    return layer


def results(
    layer: nn.Module, run: nn.Module, x: Tensor, cotangent: Tensor, *, bf16: bool
) -> dict[str, Tensor]:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        y = run(x)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    gradients = torch.autograd.grad(y, (x, *parameters), cotangent.to(y.dtype))
    return {"y": y.detach(), **dict(zip(("x", *names), gradients, strict=True))}


def compared(prior: str, *, bf16: bool) -> dict[str, Any]:
    torch._dynamo.reset()
    layer = mixer(prior)
    x, cotangent = torch.randn(SHAPE, requires_grad=True), torch.randn(SHAPE)
    start = time.perf_counter()
    compiled = results(layer, torch.compile(layer, fullgraph=True), x, cotangent, bf16=bf16)
    seconds, eager = time.perf_counter() - start, results(layer, layer, x, cotangent, bf16=bf16)
    eps = torch.finfo(torch.bfloat16 if bf16 else torch.float32).eps
    errors = {
        name: ((compiled[name] - want).abs().max() / want.abs().max() / eps).item()
        for name, want in eager.items()
    }
    worst = max(errors, key=errors.__getitem__)
    dtype = "bf16" if bf16 else "fp32"
    return {"prior": prior, "dtype": dtype, "y": errors["y"], "x": errors["x"], "worst": worst,
            "its error": errors[worst], "seconds to compile": seconds,
            "within bounds": max(errors["y"], errors["x"]) <= OF_A_TOKEN and errors[worst] <= OF_A_SUM}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("priors", nargs="*", default=["softmax", "gla"], help=f"of {', '.join(PRIORS)}")
    parser.add_argument("--plain", action="store_true", help="plain forms in place of kernels")
    arguments = parser.parse_args()
    with plain_forms() if arguments.plain else nullcontext():
        rows = [compared(prior, bf16=bf16) for prior in arguments.priors for bf16 in (False, True)]
    print_table(rows)
    sys.exit(not all(row["within bounds"] for row in rows))


if __name__ == "__main__":
    main()

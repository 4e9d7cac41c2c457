"""Compile every Triton kernel for GPUs that are not there, and say what the code needs of them.

    python tools/triton_kernels.py                     all; writes docs/triton.md and benchmarks/results/triton.json
    python tools/triton_kernels.py gated_read --no-write

Each module of ``helmholtz.ops.triton`` lists calls of its operators in ``CALLS``. Their launchers are run on tensors
without memory; what they would launch is compiled for the kinds of GPU below, and read back: registers and spills from
the cubin (the registers of PTX are virtual), those of AMD from the assembler's notes. It ends with 1 if a kernel spills
registers, or wants more shared memory than a card has.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map_only
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime import jit

from helmholtz.kernels import gpu
from helmholtz.ops.triton import _shared

ROOT = Path(__file__).resolve().parents[1]
TABLE, NUMBERS = ROOT / "docs" / "triton.md", ROOT / "benchmarks" / "results" / "triton.json"
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * 1024),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024),
}
"""With the shared memory that a block of threads may have there, in bytes."""
PRODUCTS = {"sm_80": ("mma.sync",), "sm_90": ("wgmma", "mma.sync"), "gfx942": ("v_mfma",)}
"""Instructions of the units that multiply matrices."""
Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]


def recorded(call: Callable[[], object]) -> list[Launch]:
    """What ``call`` would launch."""
    found: list[Launch] = []

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        found.append((kernel, arguments, options))

    before, jit.JITFunction.run = jit.JITFunction.run, run
    try:
        call()
    finally:
        jit.JITFunction.run = before
    return found


def launches(operator: str, make: Callable[..., Any], module: Any, name: str) -> list[Launch]:
    _shared.assumed = _shared.Target(TARGETS[name][0].backend, TARGETS[name][0].arch)
    with FakeTensorMode():

        def new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype)

        return recorded(lambda: getattr(module, operator)(*make(new)))


def compiled(launch: Launch, name: str) -> dict[str, Any]:
    """As triton itself would compile this launch, with pointers that are multiples of 16."""
    kernel, arguments, options = launch
    target, room = TARGETS[name]
    backend = make_backend(target)
    bind = jit.create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialised, rest = bind(
        *tree_map_only(FakeTensor, lambda x: jit.MockTensor(x.dtype), arguments), **options
    )
    given, signature, constants, attributes = kernel._pack_args(backend, rest, bound, specialised, rest)
    source = ASTSource(kernel, signature, constants, attributes)
    code = triton.compile(source, target=target, options=given.__dict__)
    used = _of_nvidia(code.asm) if target.backend == "cuda" else _of_amd(code.asm)
    text = code.asm["ptx" if target.backend == "cuda" else "amdgcn"]
    products = [x for x in PRODUCTS[name] if x in text]
    return used | {
        "shared_bytes": code.metadata.shared,
        "shared_limit": room,
        "products": products[0] if products else None,
        "warps": code.metadata.num_warps,
        "constants": {kernel.arg_names[k[0]]: v for k, v in constants.items() if isinstance(v, int | str)},
    }


def _of_nvidia(asm: dict[str, Any]) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(asm["cubin"])
        command = [str(CUOBJDUMP), "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    return {"registers": used["REG"], "spilled": used["STACK"] + used["LOCAL"]}


def _of_amd(asm: dict[str, Any]) -> dict[str, int]:
    def number(key: str) -> int:
        return sum(int(x) for x in re.findall(rf"\.{key}:\s*(\d+)", asm["amdgcn"]))

    return {"registers": number("vgpr_count"), "spilled": number("vgpr_spill_count")}


def examine(job: tuple[str, str, str]) -> list[dict[str, Any]]:
    """One call of a module for one kind of GPU."""
    module_name, label, name = job
    module = import_module(f"helmholtz.ops.triton.{module_name}")
    operator, make = module.CALLS[label]
    return [
        {"operator": operator, "call": label, "kernel": launch[0].__name__.lstrip("_"), "target": name}
        | compiled(launch, name)
        for launch in launches(operator, make, module, name)
    ]


def _examined(job: tuple[str, str, str]) -> list[dict[str, Any]]:
    try:
        return examine(job)
    except Exception as error:
        raise RuntimeError(f"{job}: {error}") from error


def faults(rows: Iterable[dict[str, Any]]) -> list[str]:
    found = []
    for row in rows:
        where = f"{row['operator']}, {row['call']}: {row['kernel']} on {row['target']}"
        if row["spilled"]:
            found.append(f"{where} spills {row['spilled']} bytes")
        if row["shared_bytes"] > row["shared_limit"]:
            found.append(f"{where} wants {row['shared_bytes']} bytes of {row['shared_limit']} shared ones")
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """A line per kernel and call, the kinds of GPU side by side."""
    lines = [
        "# Triton kernels, compiled",
        "",
        "Written by `python tools/triton_kernels.py` (`make test-triton` checks it): each kernel as triton "
        f"{triton.__version__} compiles it for A100 (sm_80), H100 (sm_90) and MI300 (gfx942), on a machine without a "
        "GPU. Registers are those of a thread, shared memory that of a block of threads in KiB; no kernel spills. "
        "*Products* are the instructions of the matrix units, where there are any.",
        "",
        "| operator, call | kernel | warps | registers " + " / ".join(TARGETS) + " | shared KiB | products |",
        "|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str, str, int], list[dict[str, Any]]] = {}
    seen: dict[tuple[str, str, str], int] = {}
    for row in rows:
        key = (row["operator"], row["call"], row["kernel"])
        count = seen[(*key, row["target"])] = seen.get((*key, row["target"]), 0) + 1  # type: ignore[index]
        groups.setdefault((*key, count), []).append(row)
    for (operator, call, kernel, _), group in groups.items():
        registers = " / ".join(str(row["registers"]) for row in group)
        shared = " / ".join(f"{row['shared_bytes'] / 1024:.3g}" for row in group)
        products = (
            " / ".join(row["products"] or "" for row in group) if any(r["products"] for r in group) else ""
        )
        warps = "/".join(dict.fromkeys(str(row["warps"]) for row in group))
        lines.append(f"| `{operator}` {call} | {kernel} | {warps} | {registers} | {shared} | {products} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("modules", nargs="*", help="of helmholtz.ops.triton; all by default")
    parser.add_argument("--no-write", action="store_true", help="check and print only")
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    modules = given.modules or sorted(set(gpu.MODULES.values()))
    jobs = [
        (module, label, name)
        for module in modules
        for label in import_module(f"helmholtz.ops.triton.{module}").CALLS
        for name in TARGETS
    ]
    with ProcessPoolExecutor(given.processes) as pool:
        rows = [row for found in pool.map(_examined, jobs) for row in found]
    print(table(rows))
    if not given.modules and not given.no_write:
        TABLE.write_text(table(rows))
        NUMBERS.write_text(json.dumps(rows, indent=1) + "\n")
    found = faults(rows)
    print("\n".join(found) or f"{len(rows)} compiled, none spills, all fit")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()

"""How every benchmark here measures: check first, interleave, take medians, say on what.

Candidates run in turn within one process and with the same threads, so that a busy machine disturbs all of them alike;
the figure to read is the ratio of medians. Beside another commit (``tools/against.py``) two processes take turns, one
timed run each, and each waits while the other works.
"""

import argparse
import contextlib
import ctypes
import datetime
import gc
import importlib
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
ROOT = Path(__file__).parents[1]
COMMITTED = ROOT / "benchmarks" / "results"
"""Numbers that the report and the documentation quote; only ``--renew`` writes here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to measure: the same for every candidate of a run."""

    threads: int
    rounds: int
    keep_memory: bool
    output: Path


def parse_options(what: str, description: str | None, *, rounds: int = 9) -> Options:
    """Command line of a benchmark called ``what``; threads and the allocator are set on return."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=rounds, help="timed runs of each candidate")
    parser.add_argument("--keep-memory", action="store_true", help="keep glibc from returning freed memory")
    place = parser.add_mutually_exclusive_group()
    default = ROOT / "results" / "benchmarks" / f"{what}.json"
    place.add_argument(
        "--output", type=Path, default=default, help="where the JSON goes; default: results/benchmarks"
    )
    place.add_argument(
        "--renew", dest="output", action="store_const", const=COMMITTED / f"{what}.json",
        help="replace the committed JSON in benchmarks/results",
    )  # fmt: skip
    options = Options(**vars(parser.parse_args()))
    torch.set_num_threads(options.threads)
    if options.keep_memory:
        keep_freed_memory()
    if TURNS is not None and TURNS[2] == "second":
        hand_over()
    elif TURNS is not None:
        os.read(TURNS[0], 1)
    return options


def keep_freed_memory() -> None:
    """Keep freed blocks mapped (glibc): a fresh 14 MB block costs more to map than to fill."""
    _allocator({_M_MMAP_THRESHOLD: 2**30, _M_TRIM_THRESHOLD: 2**30})


def _allocator(values: Mapping[int, int]) -> None:
    for parameter, value in values.items():
        if not ctypes.CDLL(None).mallopt(parameter, value):
            raise RuntimeError(f"mallopt refused parameter {parameter}")


def gate(
    name: str,
    actual: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    *,
    budget: float,
    dtype: torch.dtype | None = None,
) -> None:
    """Stop with an error unless every tensor is within ``budget`` eps (relative RMS) of its reference.

    Args:
        dtype: what was computed in, if it is not the dtype of the tensors.
    """
    if actual.keys() != expected.keys():
        raise RuntimeError(f"{name}: {sorted(actual)} against {sorted(expected)}")
    for key, value in actual.items():
        want = expected[key].double()
        error = (value.double() - want).square().mean().sqrt() / want.square().mean().sqrt()
        if not error <= budget * torch.finfo(dtype or value.dtype).eps:
            raise RuntimeError(f"{name}: {key} is wrong by {error:.3g}; no timing of a wrong result")


def _turns() -> tuple[int, int, str] | None:
    if "BENCHMARK_TURNS" not in os.environ:
        return None
    read, write, place = os.environ["BENCHMARK_TURNS"].split()
    return int(read), int(write), place


TURNS = _turns()
"""Pipes from and to the process that measures another commit, and whether this one is the first or the second."""


def hand_over() -> None:
    """Let the other process go on, and wait until it hands over or has ended."""
    if TURNS is None:
        return
    with contextlib.suppress(BrokenPipeError):
        os.write(TURNS[1], b".")
    os.read(TURNS[0], 1)


def interleave(
    candidates: Mapping[str, Callable[[], Any]], *, rounds: int, warmup: int = 2
) -> dict[str, float]:
    """Median seconds of each candidate, all of them run in turn ``rounds`` times."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(warmup + rounds):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            taken = time.perf_counter() - start
            if turn >= warmup:
                seconds[name].append(taken)
            hand_over()
    return {name: statistics.median(values) for name, values in seconds.items()}


def _status(field: str) -> int:
    """A field of ``/proc/self/status`` in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"no {field} in /proc/self/status: peak memory is measured on Linux only")


def peak_bytes(run: Callable[[], Any], *, keep_memory: bool = False) -> int:
    """Resident memory that ``run`` needs on top of what is resident before it, at its peak.

    Blocks of 128 KiB and more are mapped one by one meanwhile. Left alone glibc raises that size to the largest block
    that was ever freed, up to 32 MB, and what it then keeps of freed blocks moves the peak by hundreds of megabytes.

    Args:
        keep_memory: whether freed blocks are kept before and afterwards.
    """
    _allocator({_M_MMAP_THRESHOLD: 2**17, _M_TRIM_THRESHOLD: 2**17})
    run()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # restarts the high-water mark
    before = _status("VmRSS")
    run()
    peak = max(_status("VmHWM") - before, 0)
    if keep_memory:
        keep_freed_memory()
    return peak


def environment(options: Options) -> dict[str, Any]:
    """What a reader needs to judge or repeat the numbers."""
    model = [x.split(":")[1].strip() for x in _cpuinfo() if x.startswith("model name")]
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": model[0] if model else platform.machine(),
        "logical_cpus": len(model),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "kernels": _kernels(),
        **commit(),
        **{key: value for key, value in asdict(options).items() if key != "output"},
    }


def _kernels() -> str:
    """Which forms of the operations run, ``none`` for a package that has one form only."""
    try:
        kernels = importlib.import_module("helmholtz.kernels")
    except ImportError:
        return "none"
    return "plain forms" if kernels.refusal() else "built"


def commit() -> dict[str, Any]:
    """Of this tree, and whether it is what is measured."""
    changes = _git("status", "--porcelain", "--", "src", "benchmarks", ":!benchmarks/results")
    return {"commit": _git("rev-parse", "--short", "HEAD"), "uncommitted_changes": bool(changes)}


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def _git(*arguments: str) -> str:
    found = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return found.stdout.strip()


def write_results(options: Options, rows: list[dict[str, Any]]) -> None:
    """Write ``rows`` with their environment as JSON to ``options.output``."""
    options.output.parent.mkdir(parents=True, exist_ok=True)
    document = {"environment": environment(options), "rows": rows}
    options.output.write_text(json.dumps(document, indent=1) + "\n")
    print(f"wrote {options.output}")


def print_table(rows: list[dict[str, Any]]) -> None:
    """Aligned columns, empty where a row has no such value."""
    keys = dict.fromkeys(key for row in rows for key in row)
    cells = [list(keys)] + [[_cell(row.get(key, "")) for key in keys] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(keys))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _cell(x: object) -> str:
    return f"{x:.3g}" if isinstance(x, float) else str(x)

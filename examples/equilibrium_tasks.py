"""Small tasks that a Mamba-Hopfield model has to learn, over seeds: a table, and every number in a JSON file.

    python examples/equilibrium_tasks.py --seeds 0 1 2 --output results/equilibrium_tasks.json

About two minutes of one core per seed. What the file already holds for a task and seed is not computed again; --tasks
takes some of: periods, pairs, bytes, stability. The tasks are helmholtz.experiments.equilibrium.run.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console

from helmholtz._files import write_atomically
from helmholtz._hardware import describe_hardware, git_commit
from helmholtz.data.corpus import shakespeare_files
from helmholtz.data.prepare import DataConfig, prepare
from helmholtz.data.tokens import TokenDataset
from helmholtz.experiments.equilibrium import run as tasks

N_BYTES = 100_000


def periods(seed: int) -> dict[str, float]:
    """The solver's mean steps with the convergence term, and without it; the losses of both."""
    found = {}
    for name, weight in (("", 0.05), ("_without_term", 0.0)):
        result = tasks.learn_periods(seed, convergence_weight=weight)
        found |= {f"{key}{name}": value for key, value in result.items()}
    return found


def pairs(seed: int) -> dict[str, float]:
    """Accuracy with the equilibrium, and of its blocks alone."""
    found = {}
    for name, equilibrium in (("", True), ("_blocks_alone", False)):
        result = tasks.learn_pairs(seed, equilibrium=equilibrium)
        found |= {f"{key}{name}": value for key, value in result.items()}
    return found


def byte_model(seed: int) -> dict[str, float]:
    """Hamlet's first 100 kB, a tenth of it for validation."""
    with tempfile.TemporaryDirectory() as folder:
        play = next(file for file in shakespeare_files() if "hamlet" in file.name)
        text = Path(folder, "hamlet.txt")
        text.write_bytes(play.path.read_bytes()[:N_BYTES])
        data = DataConfig(
            folder=f"{folder}/data", sources=(str(text),), tokenizer="bytes", validation_fraction=0.1
        )
        prepare(data)
        return tasks.learn_bytes(
            seed, TokenDataset(data.folder, "train"), TokenDataset(data.folder, "validation")
        )


def stability(seed: int) -> dict[str, float]:
    """Local Lipschitz constants before and after, with the stability term, and without it."""
    found = tasks.learn_stability(seed, stability_weight=tasks.STABILITY_WEIGHT)
    without = tasks.learn_stability(seed, stability_weight=0.0)
    return found | {f"{name}_without_term": without[name] for name in ("after", "largest_after")}


TASKS = {"periods": periods, "pairs": pairs, "bytes": byte_model, "stability": stability}


def main() -> None:
    parser = argparse.ArgumentParser(description="Small tasks that a Mamba-Hopfield model has to learn.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--output", type=Path, default=Path("results/equilibrium_tasks.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(highlight=False)
    cells = json.loads(arguments.output.read_text())["cells"] if arguments.output.exists() else []
    for name in arguments.tasks:
        for seed in arguments.seeds:
            if any((cell["task"], cell["seed"]) == (name, seed) for cell in cells):
                continue
            begin = time.process_time()
            result = TASKS[name](seed)
            cells.append(
                {"task": name, "seed": seed, "cpu_seconds": time.process_time() - begin, "result": result}
            )
            content = {"commit": git_commit(), "hardware": describe_hardware(), "cells": cells}
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(arguments.output, json.dumps(content, indent=2) + "\n")
            numbers = ", ".join(f"{key} {value:.4g}" for key, value in result.items())
            console.print(f"{name}, seed {seed}: {numbers}")


if __name__ == "__main__":
    main()

"""Tables and figures of the vision study."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from helmholtz.evals.plots import saved_figure
from helmholtz.experiments.queue import FinishedRun, grouped, runs_of, spread


def summary(done: Sequence[FinishedRun]) -> list[dict[str, Any]]:
    """A row per set and mixer: accuracies and test loss as a spread over seeds."""
    return [
        {
            "data": data,
            "model": model,
            "seeds": [run.setting("seed") for run in runs],
            "parameters": runs[0].result["parameters"],
            "validation_accuracy": asdict(spread([run.result["validation"]["accuracy"] for run in runs])),
            "test_accuracy": asdict(spread([run.result["test"]["accuracy"] for run in runs])),
            "test_loss": asdict(spread([run.result["test"]["loss"] for run in runs])),
            "cpu_seconds": round(sum(run.timing.get("cpu_seconds", 0.0) for run in runs), 1),
        }
        for (data, model), runs in grouped(done, "data", "model").items()
    ]


def pilot_summary(done: Sequence[FinishedRun]) -> list[dict[str, Any]]:
    """A row per run of a pilot: what its learning rate gives on the validation images."""
    return [
        {
            **{name: run.setting(name) for name in ("data", "model", "lr", "seed")},
            "validation": run.result["validation"],
            "best_step": run.result["best_step"],
        }
        for run in done
    ]


def plot_learning(done: Sequence[FinishedRun], data: str, file: Path) -> None:
    """Validation loss (line) and training loss (faint) against steps, a colour per mixer and a line per seed."""
    with saved_figure(file, (6, 4)) as figure:
        axes = figure.subplots()
        for number, ((model,), runs) in enumerate(grouped(runs_of(done, data=data), "model").items()):
            for run in runs:
                steps, train, validation = zip(*run.result["curve"], strict=True)
                label = model if run is runs[0] else None
                axes.plot(steps, validation, color=f"C{number}", marker="o", markersize=3, label=label)
                axes.plot(steps, train, color=f"C{number}", alpha=0.3, linewidth=1)
        axes.set_yscale("log")
        axes.set_xlabel("steps")
        axes.set_ylabel("cross-entropy, nats")
        axes.set_title(f"{data}: validation (marked) and training (faint)", fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)


def plot_confusion(done: Sequence[FinishedRun], data: str, file: Path) -> None:
    """Fraction of each class that is taken for each other one, a panel per mixer, over all seeds."""
    groups = grouped(runs_of(done, data=data), "model")
    with saved_figure(file, (5.2 * len(groups), 4.8)) as figure:
        panels = figure.subplots(1, len(groups), squeeze=False)
        for axes, ((model,), runs) in zip(panels[0], groups.items(), strict=True):
            counts = np.sum([run.result["confusion"] for run in runs], axis=0)
            shares = counts / counts.sum(1, keepdims=True)
            names = runs[0].run.settings["data"]["classes"]
            axes.imshow(shares, vmin=0, vmax=1, cmap="viridis")
            for i, j in zip(*np.nonzero(counts), strict=True):
                colour = "white" if shares[i, j] < 0.6 else "black"
                text = f"{100 * shares[i, j]:.0f}"
                axes.text(j, i, text, ha="center", va="center", fontsize=6, color=colour)
            axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=8)
            axes.set_yticks(range(len(names)), names, fontsize=8)
            axes.set_xlabel("taken for")
            axes.set_title(f"{model}, {len(runs)} seeds", fontsize=10)
        panels[0][0].set_ylabel("is")
        figure.suptitle(f"{data}: test images of a class, in percent", fontsize=10)

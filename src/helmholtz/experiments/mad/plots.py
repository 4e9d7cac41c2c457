"""Figures of the MAD study."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from helmholtz.evals.plots import saved_figure
from helmholtz.experiments.mad.data import BASELINE, TASKS
from helmholtz.experiments.mad.models import MODELS
from helmholtz.experiments.mad.report import PUBLISHED, SHORT, Row
from helmholtz.experiments.queue import FinishedRun, runs_of, values_of


def plot_accuracy(rows: Sequence[Row], file: Path) -> None:
    """Accuracy per task, a bar per model with its range over seeds; a dash is what was published for that model."""
    with saved_figure(file, (11, 4.4)) as figure:
        axes = figure.subplots()
        width = 0.85 / max(1, len(rows))
        published = {row.model: dict(zip(TASKS, row.tasks, strict=True)) for row in PUBLISHED if row.model}
        for index, row in enumerate(rows):
            for place, task in enumerate(TASKS):
                found = row.tasks.get(task)
                x = place + (index - (len(rows) - 1) / 2) * width
                if found is not None:
                    label = row.label if task == _first_task(row) else None
                    axes.bar(x, 100 * found.mean, 0.9 * width, color=f"C{index}", label=label)
                    axes.plot([x, x], [100 * found.low, 100 * found.high], color="black", linewidth=1.2)
                if row.model in published:
                    height = published[row.model][task]
                    axes.plot(
                        [x - 0.5 * width, x + 0.5 * width], [height, height], color="black", linestyle=":"
                    )
        axes.set_xticks(range(len(TASKS)), [SHORT[task] for task in TASKS])
        axes.set_ylabel("accuracy, per cent")
        axes.set_ylim(0, 104)
        axes.set_title("bars: mean of seeds, lines: lowest to highest, dotted: published", fontsize=10)
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=4, frameon=False)


def _first_task(row: Row) -> str | None:
    return next((task for task in TASKS if row.tasks.get(task) is not None), None)


def plot_curves(finished: Sequence[FinishedRun], accuracy: str, file: Path) -> None:
    """Test accuracy against steps on the baseline setting of each task: mean over runs, which lie behind it.

    A run that stopped at its accuracy keeps it. Marks are rings of different sizes, so that equal points are all seen.
    """
    with saved_figure(file, (12, 6.4)) as figure:
        from matplotlib.lines import Line2D

        panels = figure.subplots(2, 3, sharex=True, sharey=True)
        plain = [done for done in runs_of(finished, setting=BASELINE) if done.result["curve"]]
        models = [model for model in MODELS if model in values_of(plain, "model")]
        for axes, task in zip(panels.flat, TASKS, strict=True):
            for index, model in enumerate(models):
                curves = [done.result["curve"] for done in runs_of(plain, task=task, model=model)]
                if curves:
                    _curve(axes, curves, accuracy, f"C{index}", 3 + 1.2 * (len(models) - index))
            axes.set_title(task, fontsize=10)
            axes.grid(alpha=0.3)
            axes.set_ylim(0, 104)
        panels[0, 0].set_xlim(left=0)
        for axes in panels[1]:
            axes.set_xlabel("step")
        for axes in panels[:, 0]:
            axes.set_ylabel("test accuracy, per cent")
        handles = [Line2D([], [], color=f"C{i}", label=MODELS[model].label) for i, model in enumerate(models)]
        figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False)


def _curve(
    axes: Any, curves: Sequence[Sequence[dict[str, float]]], accuracy: str, colour: str, size: float
) -> None:
    steps = sorted({point["step"] for curve in curves for point in curve})
    lines = []
    for curve in curves:
        values = {point["step"]: 100 * point[accuracy] for point in curve}
        last = max(values)
        lines.append([values.get(min(last, step)) for step in steps])
        axes.plot(steps, lines[-1], color=colour, alpha=0.25, linewidth=0.8)
    means = [statistics.fmean(v for v in column if v is not None) for column in zip(*lines, strict=True)]
    axes.plot(steps, means, color=colour, marker="o", fillstyle="none", markersize=size, linewidth=1.4)

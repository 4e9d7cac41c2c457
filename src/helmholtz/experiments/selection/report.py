"""Figures of the study of channel-wise selection."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from helmholtz.evals.plots import saved_figure
from helmholtz.experiments.queue import FinishedRun, grouped, runs_of, spread
from helmholtz.experiments.selection.data import expected_gap, expected_maximum

SHOWN = ("attention, values fixed", "free energy, beta 2", "free energy, beta 20")
"""Readers whose example is drawn."""


def by_reader(done: Sequence[FinishedRun], target: str) -> dict[str, list[FinishedRun]]:
    """Learned runs of a target by the label of their reader, in the order of the queue."""
    learned = runs_of(done, part="learned")
    own = [run for run in learned if run.run.settings["task"]["target"] == target]
    return {label: runs for (label,), runs in grouped(own, "label").items()}


def plot_gaps(done: Sequence[FinishedRun], file: Path) -> None:
    """Left: gap to the maximum over beta, the law as lines and what was measured as marks. Right: trained layers."""
    with saved_figure(file, (11, 4.3)) as figure:
        left, right = figure.subplots(1, 2)
        _draw_law(left, runs_of(done, part="gaps"))
        _draw_learned(right, by_reader(done, "maximum"))


def _draw_law(axes: Any, runs: Sequence[FinishedRun]) -> None:
    n_tokens = runs[0].run.settings["n_tokens"]
    betas = [0.25 * 1.2**k for k in range(36)]
    axes.axhline(expected_maximum(n_tokens), color="C7", label="attention: the mean")
    axes.plot(betas, [math.log(n_tokens) / b for b in betas], ":", color="C7", label="bound ln n / beta")
    for colour, cap in (("C0", math.inf), ("C1", 80.0), ("C2", 40.0)):
        label = "free energy" if math.isinf(cap) else f"exponent clipped at {cap:g}"
        axes.plot(betas, [expected_gap(n_tokens, b, cap=cap) for b in betas], color=colour, label=label)
        for run in runs:
            rows = [
                r for r in run.result["rows"] if r["beta"] and r["cap"] == (None if math.isinf(cap) else cap)
            ]
            axes.plot([r["beta"] for r in rows], [r["gap"] for r in rows], "o", color=colour, markersize=4)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(0.01, 6)
    axes.set_xlabel("beta, per standard deviation of the values")
    axes.set_ylabel("gap to the channel's maximum")
    axes.set_title(f"uniform prior over {n_tokens} tokens: law (lines), ops (marks)", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _draw_learned(axes: Any, readers: dict[str, list[FinishedRun]]) -> None:
    for place, runs in enumerate(readers.values()):
        colour = "C7" if runs[0].run.settings["reader"]["read"] == "mean" else "C0"
        errors = [run.result["rms_error"] for run in runs]
        axes.plot(errors, [place] * len(errors), "o", color=colour, fillstyle="none")
        axes.plot([spread(errors).mean], [place], "|", color=colour, markersize=14)
        selected = spread([run.result["selected"] for run in runs]).mean
        axes.annotate(
            f"{selected:.0%}", (1.01, place), xycoords=("axes fraction", "data"), va="center", fontsize=8
        )
    axes.set_yticks(range(len(readers)), list(readers), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("root mean square error; right: channels that read their token")
    axes.set_title("trained layers of equal parameters, every channel's maximum", fontsize=10)
    axes.grid(alpha=0.3)


def plot_reads(done: Sequence[FinishedRun], file: Path) -> None:
    """Which token each channel of a trained layer reads, and the token it was asked for (circles), seed 0."""
    readers = by_reader(done, "maximum")
    shown = [(label, readers[label][0].result["example"]) for label in SHOWN if label in readers]
    with saved_figure(file, (4.2 * len(shown), 3.4)) as figure:
        panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)
        for axes, (label, example) in zip(panels[0], shown, strict=True):
            image = axes.imshow(example["influence"], aspect="auto", cmap="viridis", vmin=0, vmax=1)
            axes.scatter(
                example["token"], range(len(example["token"])), s=50, facecolors="none", edgecolors="white"
            )
            axes.set_title(label, fontsize=10)
            axes.set_xlabel("token")
        panels[0][0].set_ylabel("channel")
        figure.colorbar(image, ax=panels[0].tolist(), label="fraction of the channel's gradient")

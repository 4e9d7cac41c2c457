"""Figures of the memory experiments."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from helmholtz.evals.plots import saved_figure
from helmholtz.experiments.recall.patterns import RecallResult


def plot_recall(results: Sequence[RecallResult], file: Path) -> None:
    """Accuracy against noise, a panel per width and a colour per number of patterns.

    Memory as a line, its oracle as circles, the nearest neighbour dashed; the legend gives the margin.
    """
    noisy = [result for result in results if result.corruption.kind == "noise"]
    widths = sorted({result.d_model for result in noisy})
    sizes = sorted({result.n_patterns for result in noisy})
    with saved_figure(file, (4.2 * len(widths), 3.9)) as figure:
        panels = figure.subplots(1, len(widths), sharey=True, squeeze=False)
        for axes, width in zip(panels[0], widths, strict=True):
            for n_patterns in sizes:
                row = [r for r in noisy if (r.d_model, r.n_patterns) == (width, n_patterns)]
                if not row:
                    continue
                row.sort(key=lambda r: r.corruption.level)
                levels = [r.corruption.level for r in row]
                colour = f"C{sizes.index(n_patterns)}"
                label = f"K={n_patterns}, margin {row[0].margin:.1f}"
                axes.plot(levels, [r.accuracy for r in row], color=colour, label=label)
                axes.plot(levels, [r.oracle for r in row], "o", color=colour, markersize=7, fillstyle="none")
                axes.plot(levels, [r.nearest for r in row], "--", color=colour, linewidth=0.9)
            axes.set_title(f"D = {width}")
            axes.set_xlabel("noise, in norms of the pattern")
            axes.set_ylim(-0.04, 1.04)
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8, loc="center left")
        panels[0][0].set_ylabel("patterns recalled")
        figure.suptitle(
            "recall: memory (line), float64 oracle (circles), nearest neighbour (dashed)", fontsize=10
        )


def plot_continual(matrices: Mapping[str, Sequence[Sequence[float]]], file: Path, *, chance: float) -> None:
    """Accuracy of every task after every task, a panel per run."""
    with saved_figure(file, (2.3 * len(matrices) + 1, 2.9)) as figure:
        panels = figure.subplots(1, len(matrices), squeeze=False)
        image = None
        for axes, (name, matrix) in zip(panels[0], matrices.items(), strict=True):
            image = axes.imshow(matrix, vmin=0, vmax=1, cmap="viridis", aspect="auto")
            for i, row in enumerate(matrix):
                for j, value in enumerate(row):
                    colour = "white" if value < 0.6 else "black"
                    axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
            axes.set_title(name, fontsize=9)
            axes.set_xticks(range(len(matrix[0])), range(1, len(matrix[0]) + 1))
            axes.set_yticks(range(len(matrix)), range(1, len(matrix) + 1))
            axes.set_xlabel("task")
        panels[0][0].set_ylabel("after task")
        figure.colorbar(image, ax=panels[0][-1], label=f"accuracy (chance {chance:.2f})")

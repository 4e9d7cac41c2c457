"""Figures of runs and of what a mixer selects. matplotlib (extra ``plot``) is imported where it is used."""

import contextlib
import io
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from helmholtz.evals.compare import is_bounded, model_label, same_model
from helmholtz.evals.inspection import last_read
from helmholtz.evals.runs import read_run
from helmholtz.layers.fem_reading import Reading

SMOOTHING = 25
"""Steps whose training losses are averaged in a curve."""


def file_types() -> list[str]:
    """Suffixes that a figure's file may have. Raises: ImportError naming the extra if there is no matplotlib."""
    try:
        from matplotlib import backend_bases
    except ImportError as error:
        raise ImportError("figures need matplotlib: install helmholtz-nn[plot]") from error
    return sorted(backend_bases.FigureCanvasBase.get_supported_filetypes())


@contextlib.contextmanager
def own_style() -> Iterator[None]:
    """matplotlib's defaults, whatever a matplotlibrc says. Raises: as ``file_types``."""
    file_types()
    from matplotlib import style

    with style.context("default"):
        yield


@contextlib.contextmanager
def saved_figure(file: Path, size: tuple[float, float], *, few_colours: bool = False) -> Iterator[Any]:
    """A figure in ``own_style``, written to ``file`` at the end of the block, its folder included.

    Args:
        size: inches.
        few_colours: write a PNG with 256 colours, which takes a third of the space and looks the same.
    """
    with own_style():
        from matplotlib.figure import Figure  # unlike pyplot's it needs no screen and is nobody else's

        figure = Figure(figsize=size, layout="constrained")
        yield figure
        file.parent.mkdir(parents=True, exist_ok=True)
        if not few_colours:
            figure.savefig(file, dpi=150)
            return
        from PIL import Image

        figure.savefig(drawn := io.BytesIO(), dpi=150)
        method, dither = Image.Quantize.MAXCOVERAGE, Image.Dither.NONE
        Image.open(drawn).convert("RGB").quantize(256, method, dither=dither).save(file, optimize=True)


def plot_loss_curves(folders: Sequence[str | Path], file: Path) -> None:
    """Bits per byte against training tokens: validation as marked lines, training (a running mean) behind them.

    Of a model with a plan both are upper bounds, the ELBO in training; its loss, which has seen the text, is not
    drawn.
    Runs that differ in their seed alone share a colour and a line of the legend.
    """
    runs = [read_run(folder) for folder in folders]
    curves = [run.series("eval", "validation_bits_per_byte") for run in runs]
    keys = [same_model(run) for run in runs]
    with saved_figure(file, (7, 4.5)) as figure:
        axes = figure.subplots()
        for run, (tokens, losses), key in zip(runs, curves, keys, strict=True):
            best = [min(curve[1]) for curve, other in zip(curves, keys, strict=True) if other == key]
            count = f", mean of {len(best)} seeds" if len(best) > 1 else ""
            sign = "\N{LESS-THAN OR EQUAL TO} " if is_bounded(run.description) else ""
            label = f"{run.name}: {model_label(run.description)}, {sign}{statistics.fmean(best):.3f}{count}"
            colour = f"C{list(dict.fromkeys(keys)).index(key)}"
            first = run is runs[keys.index(key)]
            axes.plot(tokens, losses, color=colour, marker="o", markersize=3, label=label if first else None)
            tokens, losses = run.series("step", "bits_per_byte")
            faint = {"color": colour, "alpha": 0.3 / len(best), "linewidth": 1, "zorder": 1}
            axes.plot(tokens, _running_mean(losses), **faint)
        _limit(axes, [losses for _, losses in curves])
        axes.set(xlabel="training tokens", ylabel="bits per byte")
        axes.set_title("validation (marked) and training (faint)")
        figure.legend(title="run: model, best validation", loc="outside lower center", fontsize=8)
        axes.grid(alpha=0.3)


def _limit(axes: Any, curves: Sequence[Sequence[float]]) -> None:
    """Show the range of the validation curves; the start of training lies far above it."""
    lowest, highest = min(map(min, curves)), max(losses[0] for losses in curves)
    axes.set_ylim(lowest - 0.05 * (highest - lowest) - 0.01, highest + 0.2 * (highest - lowest) + 0.01)


def _running_mean(values: Sequence[float]) -> list[float]:
    return [statistics.fmean(values[max(0, i - SMOOTHING + 1) : i + 1]) for i in range(len(values))]


def plot_selection(
    reading: Reading, words: Sequence[str], file: Path, *, title: str, head: int, n_channels: int = 6
) -> None:
    """Which tokens the last query of a text reads: the rows of ``last_read``."""
    rows = last_read(reading, head, n_channels)
    with saved_figure(file, (max(6.0, 0.32 * len(words) + 3.5), 0.42 * len(rows) + 2.2)) as figure:
        axes = figure.subplots()
        image = axes.imshow(list(rows.values()), aspect="auto", cmap="viridis", vmin=0)
        spelled = [visible(word) for word in words]
        axes.set_xticks(range(len(words)), spelled, rotation=70, ha="right", fontsize=8)
        axes.set_yticks(range(len(rows)), list(rows), fontsize=8)
        axes.axhline(0.5, color="white", linewidth=2)
        axes.set_title(title, fontsize=10)
        figure.colorbar(image, ax=axes, label="weight")


def visible(word: str) -> str:
    """A token as a tick label: line ends and surrounding blanks shown, the mathtext sign escaped."""
    return word.replace("\n", "\\n").replace(" ", "\N{OPEN BOX}").replace("$", r"\$")

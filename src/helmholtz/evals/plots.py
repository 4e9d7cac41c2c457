"""Pictures of runs and of what a mixer selects. matplotlib (extra ``plot``) is imported where it is used."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from helmholtz.evals.compare import is_bounded, model_label, same_model
from helmholtz.evals.runs import read_run
from helmholtz.layers.fem_reading import Reading

SMOOTHING = 25
"""Steps whose training losses are averaged in a curve."""


def pyplot() -> ModuleType:
    """matplotlib without a screen. Raises: ImportError naming the extra."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("pictures need matplotlib: install helmholtz-nn[plot]") from error
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt


def save_figure(figure: Any, file: Path, plt: ModuleType) -> None:
    """Write the picture, its folder included, and forget the figure."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def plot_loss_curves(folders: Sequence[str | Path], file: Path) -> None:
    """Bits per byte against training tokens: validation as marked lines, training (a running mean) behind them.

    Of a model with a plan both are upper bounds, the ELBO in training; its loss, which has seen the text, is not
    drawn.
    Runs that differ in their seed alone share a colour and a line of the legend.
    """
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    runs = [read_run(folder) for folder in folders]
    curves = [run.series("eval", "validation_bits_per_byte") for run in runs]
    keys = [same_model(run) for run in runs]
    for run, (tokens, losses), key in zip(runs, curves, keys, strict=True):
        best = [min(curve[1]) for curve, other in zip(curves, keys, strict=True) if other == key]
        count = f", mean of {len(best)} seeds" if len(best) > 1 else ""
        sign = "\N{LESS-THAN OR EQUAL TO} " if is_bounded(run.description) else ""
        label = f"{run.name}: {model_label(run.description)}, {sign}{statistics.fmean(best):.3f}{count}"
        colour = f"C{list(dict.fromkeys(keys)).index(key)}"
        first = run is runs[keys.index(key)]
        axes.plot(tokens, losses, color=colour, marker="o", markersize=3, label=label if first else None)
        tokens, losses = run.series("step", "bits_per_byte")
        axes.plot(tokens, _running_mean(losses), color=colour, alpha=0.3 / len(best), linewidth=1, zorder=1)
    _limit(axes, [losses for _, losses in curves])
    axes.set_xlabel("training tokens")
    axes.set_ylabel("bits per byte")
    axes.set_title("validation (marked) and training (faint)")
    figure.legend(title="run: model, best validation", loc="outside lower center", fontsize=8)
    axes.grid(alpha=0.3)
    save_figure(figure, file, plt)


def _limit(axes: Any, curves: Sequence[Sequence[float]]) -> None:
    """Show the range of the validation curves; the start of training lies far above it."""
    lowest, highest = min(map(min, curves)), max(losses[0] for losses in curves)
    axes.set_ylim(lowest - 0.05 * (highest - lowest) - 0.01, highest + 0.2 * (highest - lowest) + 0.01)


def _running_mean(values: Sequence[float]) -> list[float]:
    return [statistics.fmean(values[max(0, i - SMOOTHING + 1) : i + 1]) for i in range(len(values))]


def plot_selection(
    reading: Reading, words: Sequence[str], file: Path, *, title: str, head: int, n_channels: int = 6
) -> None:
    """Which tokens the last query of a text reads: the prior's weights above the posteriors of some channels.

    The channels shown are those of ``head`` whose posterior is furthest from the prior. Where the prior has its own
    weights per channel (rnn_softmax, mamba) its row is their mean.
    """
    plt = pyplot()
    gap = reading.kl[0, head, -1]
    channels = gap.argsort(descending=True)[:n_channels].tolist()
    prior, posterior = reading.prior[0, head, -1], reading.posterior[0, head, -1]
    rows = [prior.mean(-1), *(posterior[:, channel] for channel in channels)]
    labels = ["prior"]
    for channel in channels:
        count = reading.num_tokens_read[0, head, -1, channel].item()
        labels.append(f"channel {channel}: KL {gap[channel]:.2f} nats, reads {count:.1f} tokens")
    width = max(6.0, 0.32 * len(words) + 3.5)
    figure, axes = plt.subplots(figsize=(width, 0.42 * len(rows) + 2.2), layout="constrained")
    image = axes.imshow([row.tolist() for row in rows], aspect="auto", cmap="viridis", vmin=0)
    axes.set_xticks(range(len(words)), [visible(word) for word in words], rotation=70, ha="right", fontsize=8)
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.axhline(0.5, color="white", linewidth=2)
    axes.set_title(title, fontsize=10)
    figure.colorbar(image, ax=axes, label="weight")
    save_figure(figure, file, plt)


def visible(word: str) -> str:
    """A token as a tick label: line ends and surrounding blanks shown, the mathtext sign escaped."""
    return word.replace("\n", "\\n").replace(" ", "\N{OPEN BOX}").replace("$", r"\$")

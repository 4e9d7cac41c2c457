"""One prompt continued by every run, and what their training came to."""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from helmholtz._notebook.html import NOTHING, card, cells, grid, head_cells, note, table, text_block
from helmholtz.evals.compare import is_bounded, model_label
from helmholtz.evals.plots import plot_loss_curves
from helmholtz.evals.runs import Run, read_run
from helmholtz.explore.html import marked
from helmholtz.explore.runs import OfferedRun
from helmholtz.models.checkpoint import architecture_of
from helmholtz.models.generation import generate
from helmholtz.models.sampling import SamplingSettings

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, slots=True)
class Continuation:
    """What one run makes of the prompt."""

    name: str
    tokens: tuple[int, ...]
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return len(self.tokens) / max(self.seconds, 1e-9)


def continued(run: OfferedRun, prompt: str, *, n_new: int, temperature: float, seed: int) -> Continuation:
    """The prompt's continuation by one run; all runs draw from the same seed."""
    checkpoint = run.checkpoint
    settings = SamplingSettings(
        max_new_tokens=n_new, temperature=temperature, seed=seed, stop_tokens=(checkpoint.tokenizer.eos_id,)
    )
    begin = time.perf_counter()
    (tokens,) = generate(checkpoint.model, [checkpoint.document(prompt)], settings)
    return Continuation(run.name, tuple(tokens), time.perf_counter() - begin)


def texts_html(runs: Sequence[OfferedRun], prompt: str, found: Sequence[Continuation]) -> str:
    """A card per run."""
    cards = []
    for run, text in zip(runs, found, strict=True):
        speed = f"{len(text.tokens)} tokens at {text.tokens_per_second:,.0f} per second, prompt included"
        body = text_block(prompt, marked(run.checkpoint.tokenizer, text.tokens, text.tokens))
        cards.append(card(f"{run.name}: {speed}", body))
    return grid(cards)


def finished(run: OfferedRun) -> Run | None:
    """The run as training left it; None of a bare checkpoint or a run that has not ended."""
    try:
        return read_run(run.folder)
    except ValueError:
        return None


def losses_html(runs: Sequence[OfferedRun]) -> str:
    """Parameters, the best validation loss and the speed of training, a row per run."""
    heads = ("run", "model", "parameters", "training tokens", "bits/byte, validation", "training tokens/s")
    rows = [f"<tr>{cells(*_row(run, finished(run)))}</tr>" for run in runs]
    bounded = (
        "Where it says \N{LESS-THAN OR EQUAL TO} the number is an upper bound: the model has a latent plan. "
    )
    legend = (
        f"{bounded}Validation is the best of training's own; `helmholtz compare` measures the whole split."
    )
    return table([head_cells(*heads)], rows) + note(legend)


def _row(run: OfferedRun, found: Run | None) -> tuple[str, ...]:
    model = run.checkpoint.model
    n_parameters = f"{sum(parameter.numel() for parameter in model.parameters()):,}"
    if found is None:
        return run.name, architecture_of(model), n_parameters, NOTHING, NOTHING, NOTHING
    losses = found.series("eval", "validation_bits_per_byte")[1]
    sign = "\N{LESS-THAN OR EQUAL TO} " if is_bounded(found.description) else ""
    best = f"{sign}{min(losses):.3f}" if losses else NOTHING
    speed = f"{found.train_tokens_per_second():,.0f}"
    return run.name, model_label(found.description), n_parameters, f"{found.summary['tokens']:,}", best, speed


def loss_picture(runs: Sequence[OfferedRun]) -> "Image | None":
    """Loss against training tokens of the runs that have ended; None if none has."""
    ended = [found for run in runs if (found := finished(run)) is not None]
    folders = [run.folder for run in ended if run.series("eval", "validation_bits_per_byte")[1]]
    if not folders:
        return None
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "loss.png"
        plot_loss_curves(folders, file)
        with Image.open(file) as image:
            return image.convert("RGB")

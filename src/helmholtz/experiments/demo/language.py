"""Part of the demo: language models of one size on Shakespeare, by the commands that users have."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from helmholtz._run_folder import METRICS, RUN, TOKENIZER
from helmholtz.data.tokenizer import load_tokenizer
from helmholtz.evals.inspection import last_read, mixers, most_selective, read_text, summarise
from helmholtz.evals.runs import find_checkpoint, read_run
from helmholtz.experiments.demo.settings import DemoSettings, Note
from helmholtz.layers.fem_reading import Reading
from helmholtz.models.checkpoint import load_checkpoint
from helmholtz.models.generation import SamplingSettings, generate

PROMPT = "KING HENRY.\n"
SENTENCE = "To be, or not to be, that is the question"
POLL = 0.5
"""Seconds between two looks at how far a run is."""
DATA, COMPARE = 0.08, 0.85
"""Fractions of the part's time that are gone when the text is prepared, and when all models are trained."""

Command = Callable[[Sequence[str], Callable[[], None]], None]
"""Runs ``helmholtz`` with these arguments, and calls the second while it waits. Raises: DemoError if it fails."""


class DemoError(RuntimeError):
    """A command of the demo failed; the message ends with what it wrote."""


def run_command(arguments: Sequence[str], follow: Callable[[], None]) -> None:
    """In a process of its own, whose output is shown if it fails only."""
    command = [sys.executable, "-m", "helmholtz.cli.main", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            output = _wait(process, follow)
        except BaseException:
            process.terminate()
            raise
    if process.returncode:
        raise DemoError(f"helmholtz {' '.join(arguments)} failed:\n{output}")


def _wait(process: subprocess.Popen[str], follow: Callable[[], None]) -> str:
    while True:
        try:
            return process.communicate(timeout=POLL)[0]
        except subprocess.TimeoutExpired:
            follow()


def compute(settings: DemoSettings, note: Note, folder: Path, command: Command) -> dict[str, Any]:
    """Train the models under ``folder`` one after another, compare them, let each write and FEM be read."""
    note("language models: preparing the complete Shakespeare", 0.0)
    shared = ["--config=configs/demo.yaml", *settings.data]
    command(["data", *shared], lambda: None)
    width = (COMPARE - DATA) / len(settings.models)
    runs = {name: folder / name for name in settings.models}
    for place, (name, run) in enumerate(runs.items()):
        follow = _follower(note, name, run, DATA + place * width, width)
        follow()
        own = [f"--config=configs/demo/{name}.yaml", f"--train.output_dir={run}", *settings.overrides]
        command(
            ["train", *shared, *own, f"--train.seed={settings.seed}", "--train.resume=auto"], follow
        )  # fmt: skip
    note("language models: comparing them", COMPARE)
    comparison = folder / "comparison"
    command(["compare", "--runs", *map(str, runs.values()), f"--output={comparison}"], lambda: None)
    return {
        "comparison": json.loads((comparison / "results.json").read_text()),
        "curves": {name: _curve(run) for name, run in runs.items()},
        "seconds": {name: read_run(run).summary["seconds"] for name, run in runs.items()},
        "prompt": PROMPT,
        "samples": {name: _sample(run, settings) for name, run in runs.items()},
        "readings": {name: found for name, run in runs.items() if (found := _reading(run)) is not None},
    }


def _follower(note: Note, name: str, run: Path, begin: float, width: float) -> Callable[[], None]:
    def follow() -> None:
        fraction, words = _progress(run)
        note(f"language models: training {name}{words}", begin + fraction * width)

    return follow


def _progress(run: Path) -> tuple[float, str]:
    """How far a run is, from the last complete line of its metrics."""
    try:
        last = json.loads((run / METRICS).read_text().splitlines()[-1])
        steps = json.loads((run / RUN).read_text())["identity"]["train"]["steps"]
    except (OSError, ValueError, IndexError, KeyError):
        return 0.0, ""  # not begun, or in the middle of a line
    return last["step"] / steps, f", step {last['step']} of {steps}"


def _curve(run: Path) -> dict[str, list[float]]:
    tokens, losses = read_run(run).series("eval", "validation_bits_per_byte")
    return {"tokens": list(map(float, tokens)), "bits_per_byte": losses}


def _sample(run: Path, settings: DemoSettings) -> str:
    checkpoint = find_checkpoint(run)
    tokenizer, model = load_tokenizer(checkpoint / TOKENIZER), load_checkpoint(checkpoint)
    sampling = SamplingSettings(
        max_new_tokens=settings.sample_tokens, temperature=0.8, top_p=0.95, seed=settings.seed,
        stop_tokens=(tokenizer.eos_id,),
    )  # fmt: skip
    (row,) = generate(model, [[tokenizer.eos_id, *tokenizer.encode(PROMPT)]], sampling)
    return PROMPT + tokenizer.decode(row)


def _reading(run: Path) -> dict[str, Any] | None:
    """What each channel of the most selective head reads at the sentence's last token; None without a FEM layer."""
    checkpoint = find_checkpoint(run)
    model, tokenizer = load_checkpoint(checkpoint), load_tokenizer(checkpoint / TOKENIZER)
    if not mixers(model):
        return None
    tokens = tokenizer.encode(SENTENCE)
    readings: dict[str, Reading] = read_text(model, torch.tensor([tokens]))
    layer, head = most_selective(readings)
    return {
        "words": [tokenizer.decode([token]) for token in tokens],
        "layer": layer,
        "head": head,
        "rows": last_read(readings[layer], head),
        "summary": [asdict(summary) for summary in summarise(model, readings)],
    }

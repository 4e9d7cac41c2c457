"""The language study: options and report."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from helmholtz._files import write_json
from helmholtz.experiments.base import (
    COMPUTING,
    LIST,
    Note,
    Study,
    add_names,
    add_seeds,
    make_table,
    spread_text,
)
from helmholtz.experiments.language.models import LANGUAGE_MODELS
from helmholtz.experiments.language.run import (
    CORPORA,
    TOKENIZERS,
    LanguageStudy,
    compute_language,
    language_runs,
    prepare_corpus,
    scaling_fits,
)
from helmholtz.experiments.queue import FinishedRun, QueuedRun, grouped, spread


class Language(Study):
    name = "language"
    actions = {
        "run": "Train language models of equal parameters on two texts, by bytes and by BPE, and three sizes of some; "
        "then the report. Each run's result is kept, and not computed again; an interrupted queue goes on where it "
        "was.",
        "report": "Table of the finished runs, and bits per byte by the number of parameters.",
        "list": LIST,
    }
    reported = ("run", "report")

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser, action: str) -> None:
        add_names(parser, "corpora", CORPORA)
        add_names(parser, "tokenizers", TOKENIZERS)
        add_names(parser, "models", list(LANGUAGE_MODELS))
        add_seeds(parser, "of weights and data order")
        steps = LanguageStudy().steps
        parser.add_argument("--steps", type=int, default=steps, help="optimizer steps of a run")
        if action in COMPUTING:
            parser.add_argument(
                "--data", type=str, default="data/language", help="folder of the prepared texts"
            )

    def runs(self) -> list[QueuedRun]:
        return language_runs(
            LanguageStudy(steps=self.values["steps"]),
            corpora=self.values["corpora"],
            tokenizers=self.values["tokenizers"],
            models=self.values["models"],
            seeds=self.values["seeds"],
        )

    def prepare(self) -> None:
        for corpus in self.values["corpora"]:
            for tokenizer in self.values["tokenizers"]:
                prepare_corpus(corpus, tokenizer, Path(self.values["data"]))

    def compute(self, run: QueuedRun, note: Note) -> dict[str, Any]:
        return compute_language(run, data=Path(self.values["data"]), folder=self.folder)

    def report(self, done: Sequence[FinishedRun], missing: Sequence[QueuedRun], console: Console) -> None:
        console.print(result_table(done))
        fits = scaling_fits(done)
        write_json(self.folder / "scaling.json", {"fits": fits})
        for fit in fits:
            slope = f"{fit['slope']:.3f} ± {fit['standard_error']:.3f}"
            console.print(f"{fit['model']}: {slope} bits/byte per tenfold parameters", markup=False)


STUDY = Language


def result_table(done: Sequence[FinishedRun]) -> Table:
    """Bits per byte of every model on every text, mean and deviation over seeds; "<" marks a bound."""
    groups = grouped(done, "corpus", "tokenizer", "size", "model")
    return make_table("Validation bits per byte", [_cells(key, runs) for key, runs in groups.items()], left=4)


def _cells(key: tuple[str, ...], runs: Sequence[FinishedRun]) -> dict[str, str]:
    sign = "< " if runs[0].result["kind"] == "bound" else ""
    return {
        **dict(zip(("text", "tokens", "size", "model"), key, strict=True)),
        "parameters": f"{runs[0].result['parameters']:,}",
        "bits/byte": sign + spread_text(spread([run.result["bits_per_byte"] for run in runs]), digits=3),
        "seeds": str(len(runs)),
    }

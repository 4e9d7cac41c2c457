"""The vision study: options, images, report."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from helmholtz.experiments.base import (
    LIST,
    Note,
    Study,
    add_learning_rates,
    add_names,
    add_seeds,
    load_data,
    make_table,
    spread_text,
)
from helmholtz.experiments.queue import SEEDS, FinishedRun, QueuedRun, values_of
from helmholtz.experiments.vision.data import PACKAGED, ImageSplits, idx_images
from helmholtz.experiments.vision.report import (
    pilot_summary,
    plot_confusion,
    plot_learning,
    summary,
)
from helmholtz.experiments.vision.run import LEARNING_RATES, compute_vision, vision_runs


class Vision(Study):
    name = "vision"
    actions = {
        "run": "Train and measure vision transformers. Finished runs are kept, an interrupted queue goes on where it "
        "was.",
        "list": LIST,
        "pilot": "Compare learning rates on validation images alone; the test images are not looked at.",
        "report": "Table and figures of the runs that are finished.",
    }

    def __init__(self, action: str, values: Mapping[str, Any]) -> None:
        super().__init__(action, values)
        files = "a folder of IDX files"
        self.data = load_data(values["data"], PACKAGED, read_folder, files)

    @classmethod
    def output(cls, action: str) -> str:
        return f"results/vision/{'pilot' if action == 'pilot' else 'run'}"

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser, action: str) -> None:
        if action == "pilot":
            add_learning_rates(parser)
        folders = f"{', '.join(PACKAGED)}, or folders of IDX files named as MNIST's"
        add_names(parser, "data", ["digits"], folders)
        add_names(parser, "models", list(LEARNING_RATES), "mixers")
        add_seeds(parser, "of weights and order", [1000] if action == "pilot" else SEEDS)

    def runs(self) -> list[QueuedRun]:
        return vision_runs(
            self.data,
            self.values["models"],
            self.values["seeds"],
            measured=self.measured,
            lrs=self.lrs,
        )

    def compute(self, run: QueuedRun, note: Note) -> dict[str, Any]:
        return compute_vision(run, {one.name: one for one in self.data})

    def report(self, done: Sequence[FinishedRun], missing: Sequence[QueuedRun], console: Console) -> None:
        if self.action == "pilot":
            rows = pilot_summary(done)
            console.print(
                make_table("Validation by learning rate", [_pilot_cells(row) for row in rows], left=2)
            )
        else:
            rows = summary(done)
            console.print(make_table("Mean over seeds ± deviation", [_cells(row) for row in rows], left=2))
            for data in values_of(done, "data"):
                plot_learning(done, data, self.folder / f"{data}-learning.png")
                plot_confusion(done, data, self.folder / f"{data}-confusion.png")
        self.write_summary(rows, done, missing)


STUDY = Vision


def read_folder(folder: Path) -> ImageSplits:
    """The images of a folder, called by its name; a tenth of the training images validates."""
    return idx_images(folder, name=folder.resolve().name)


def _cells(row: Mapping[str, Any]) -> dict[str, str]:
    return {
        "data": row["data"],
        "mixer": row["model"],
        "parameters": f"{row['parameters']:,}",
        "test accuracy": spread_text(row["test_accuracy"]),
        "test loss": spread_text(row["test_loss"]),
        "seeds": str(len(row["seeds"])),
    }


def _pilot_cells(row: Mapping[str, Any]) -> dict[str, str]:
    return {
        "data": row["data"],
        "mixer": row["model"],
        "lr": f"{row['lr']:g}",
        "seed": str(row["seed"]),
        "loss": f"{row['validation']['loss']:.4f}",
        "accuracy": f"{row['validation']['accuracy']:.4f}",
        "best step": str(row["best_step"]),
    }

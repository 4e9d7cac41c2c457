"""The MAD study: options, profiles, and what is written of them."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from helmholtz._checks import check_choice
from helmholtz._files import write_atomically, write_json
from helmholtz.experiments.base import (
    LIST,
    Note,
    Study,
    add_names,
    add_seeds,
    make_table,
)
from helmholtz.experiments.mad.grid import grid_content, grid_markdown, grid_rows
from helmholtz.experiments.mad.plots import plot_accuracy, plot_curves
from helmholtz.experiments.mad.report import markdown, report_content, rows_of, table_rows
from helmholtz.experiments.mad.run import PROFILES, MadRun, chosen_rates
from helmholtz.experiments.queue import FinishedRun, QueuedRun, split_finished

RATES = "learning_rates.json"


class Mad(Study):
    """Each profile has a folder of its own in ``--output``."""

    name = "mad"
    starts = ()
    actions = {
        "run": "Train the models of a profile on the MAD tasks. Finished runs are kept, an interrupted queue goes on.",
        "report": "Table, figures and report.json of a profile's finished runs, beside the published rows.",
        "list": LIST,
        "pilot": "Choose the learning rate of each task and model for the profile quick, on a seed of its own.",
    }

    def __init__(self, action: str, values: Mapping[str, Any]) -> None:
        super().__init__(action, values)
        self.profile_name = values.get("profile", "pilot")
        check_choice("profile", self.profile_name, PROFILES)
        self.profile = PROFILES[self.profile_name]
        self.folder /= self.profile_name

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser, action: str) -> None:
        if action != "pilot":
            parser.add_argument("--profile", type=str, default="quick", help=f"one of {', '.join(PROFILES)}")
        if action in ("run", "list"):
            add_names(parser, "models", [], "default: all of the profile")
            add_seeds(parser, "default: those of the profile", [])
        if action != "report":
            add_names(parser, "tasks", [], "default: all of the profile")

    def runs(self) -> list[QueuedRun]:
        return [run.queued() for run in self._runs(self.values.get("tasks"))]

    def runs_of_report(self) -> list[QueuedRun]:
        profile = self.profile
        extra = profile.runs(list(profile.settings), profile.models, profile.extra_seeds)
        there, _ = split_finished(self.folder, [run.queued() for run in extra])
        return [run.queued() for run in self._runs()] + [done.run for done in there]

    def _runs(self, tasks: Sequence[str] | None = None) -> list[MadRun]:
        return self.profile.runs(
            tasks or list(self.profile.settings),
            self.values.get("models") or self.profile.models,
            self.values.get("seeds") or self.profile.seeds,
        )

    def compute(self, run: QueuedRun, note: Note) -> dict[str, Any]:
        tasks = self.values.get("tasks")
        mad_run = next(one for one in self._runs(tasks) if one.name == run.name)
        n_steps = mad_run.protocol.n_steps(mad_run.setting.n_train)
        return mad_run.compute(lambda step: note(step, n_steps))

    def report(self, done: Sequence[FinishedRun], missing: Sequence[QueuedRun], console: Console) -> None:
        if self.action == "pilot":
            self._write_rates(done, missing, console)
            return
        if len(self.profile.initializations) > 1:
            self._write_grid(done, missing, console)
            return
        rows = rows_of(self.profile, done)
        cells = table_rows(rows, list(self.profile.settings))
        console.print(make_table("Accuracy in per cent", [_narrow(row) for row in cells]))
        content = report_content(self.profile_name, self.profile, done, missing)
        console.print(f"{len(done)} runs, {len(missing)} missing, {len(content['diverged'])} diverged")
        write_json(self.folder / "report.json", content)
        write_atomically(self.folder / "report.md", markdown(content, cells))
        plot_accuracy(rows, self.folder / "accuracy.png")
        plot_curves(done, self.profile.protocol.accuracy, self.folder / "curves.png")
        files = "report.json, report.md, accuracy.png and curves.png"
        console.print(f"wrote {files} in {self.folder}", markup=False)

    def _write_grid(
        self, done: Sequence[FinishedRun], missing: Sequence[QueuedRun], console: Console
    ) -> None:
        """Every run by itself: a profile of several starts has no single score of a model."""
        cells = grid_rows(done)
        console.print(make_table("Accuracy in per cent", cells, left=4))
        content = grid_content(self.profile_name, self.profile, done, missing)
        write_json(self.folder / "report.json", content)
        write_atomically(self.folder / "report.md", grid_markdown(content, cells))
        console.print(f"wrote report.json and report.md in {self.folder}", markup=False)

    def _write_rates(
        self, done: Sequence[FinishedRun], missing: Sequence[QueuedRun], console: Console
    ) -> None:
        """What the pilot chose, unless runs are missing."""
        if missing:
            console.print(f"{len(missing)} runs of the pilot are missing: no learning rate is chosen yet")
            return
        rates, file = chosen_rates(done), Path(self.values["output"]) / RATES
        tried = [
            {**{name: d.run.settings[name] for name in ("task", "model", "initialization", "lr", "seed")},
             "score": d.result["score"], "loss": d.result["final"] and d.result["final"]["loss"],
             "commit": d.timing.get("commit"), "hardware": d.timing.get("hardware")}
            for d in done
        ]  # fmt: skip
        protocol = done[0].run.settings["protocol"]
        write_json(file, {"learning_rates": rates, "protocol": protocol, "tried": tried})
        console.print(f"wrote {file}: LEARNING_RATES = {rates}", markup=False)


STUDY = Mad


def _narrow(row: Mapping[str, str]) -> dict[str, str]:
    """Without the parameters, and with deviations below the means: that fits into 80 columns."""
    return {name: cell.replace(" ± ", "\n± ") for name, cell in row.items() if name != "parameters"}

"""The study of hybrids: options and report."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

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
from helmholtz.experiments.hybrids.report import difference_rows, letter_rows, plot_hybrids, text_rows
from helmholtz.experiments.hybrids.run import PARTS, compute_hybrid, hybrid_runs, prepare_shakespeare
from helmholtz.experiments.letters.report import kappa_label
from helmholtz.experiments.queue import FinishedRun, QueuedRun

LETTER_COLUMNS = {
    "posterior CE": "posterior_cross_entropy",
    "prior CE": "prior_cross_entropy",
    "CE - law + KL": "excess",
    "KL bits": "kl_bits",
    "valid": "valid",
    "start spread": "start_spread",
    '"!" repeats': "noise_repetition",
}
PLAN_COLUMNS = {
    "ELBO": "elbo",
    "KL bits": "kl_bits",
    "information": "mutual_information_bits",
    "same: one plan": "same_token_one_plan",
    "a plan each": "same_token_a_plan_each",
}
EQUILIBRIUM_COLUMNS = {
    "steps": "mean_steps",
    "most": "max_steps",
    "converged": "converged",
    "residual": "residual",
    "contraction": "contraction_bound",
}


class Hybrids(Study):
    name = "hybrids"
    actions = {
        "run": "Train a plan over FEM and over attention, on letters and on Shakespeare, and an equilibrium over "
        "FEM-GLA and over Mamba. Finished runs are kept, an interrupted queue goes on where it was.",
        "report": "Tables and the picture of the runs that are finished.",
        "list": LIST,
    }
    reported = ("run", "report")

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser, action: str) -> None:
        add_names(parser, "parts", PARTS)
        add_seeds(parser, "of weights, data order and plans")
        if action in COMPUTING:
            help = "folder of the prepared Shakespeare"
            parser.add_argument("--data", type=str, default="data/shakespeare", help=help)

    def runs(self) -> list[QueuedRun]:
        return hybrid_runs(parts=self.values["parts"], seeds=self.values["seeds"])

    def prepare(self) -> None:
        if set(self.values["parts"]) - {"letters"}:
            prepare_shakespeare(Path(self.values["data"]))

    def compute(self, run: QueuedRun, note: Note) -> dict[str, Any]:
        return compute_hybrid(run, data=Path(self.values["data"]))

    def report(self, done: Sequence[FinishedRun], missing: Sequence[QueuedRun], console: Console) -> None:
        letters, text, differences = letter_rows(done), text_rows(done), difference_rows(done)
        tables = {
            "Letters, nats per token; samples under a shared plan": [_letter_cells(row) for row in letters],
            "Shakespeare: a plan": [_text_cells(row, PLAN_COLUMNS) for row in text if row["part"] == "plan"],
            "Shakespeare: an equilibrium": [
                _text_cells(row, EQUILIBRIUM_COLUMNS) for row in text if row["part"] == "equilibrium"
            ],
            "Differences of bits per byte, seed by seed": [
                {"model": row["model"], "less": row["less"], "bits/byte": spread_text(row["bits_per_byte"])}
                for row in differences
            ],
        }
        for title, rows in tables.items():
            if rows:
                console.print(make_table(title, rows, left=2 if "Differences" in title else 1))
        self.write_summary([*letters, *text, *differences], done, missing)
        plot_hybrids(done, self.folder / "hybrids.png")


STUDY = Hybrids


def _letter_cells(row: Mapping[str, Any]) -> dict[str, str]:
    numbers = {title: spread_text(row[name], digits=3) for title, name in LETTER_COLUMNS.items()}
    return {
        "mixer": row["model"],
        "kappa": kappa_label(row["kappa_bits"]),
        **numbers,
        "seeds": str(len(row["seeds"])),
    }


def _text_cells(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, str]:
    sign = "< " if row["kind"] == "bound" else ""
    return {
        "model": row["model"],
        "parameters": f"{row['parameters']:,}",
        "bits/byte": sign + spread_text(row["bits_per_byte"]),
        **{
            title: spread_text(row.get(name), digits=6 if name == "residual" else 3)
            for title, name in columns.items()
        },
        "seeds": str(len(row["seeds"])),
    }

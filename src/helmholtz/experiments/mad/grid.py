"""The grid of the MAD study over starts and learning rates: every run by itself, beside what was published."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from helmholtz.experiments.mad.data import TASKS
from helmholtz.experiments.mad.report import (
    FEM_PAPER,
    PUBLISHED,
    SHORT,
    cell_text,
    page_gaps,
    page_head,
    page_protocol,
    page_table,
    provenance,
)
from helmholtz.experiments.mad.run import MadProfile
from helmholtz.experiments.queue import FinishedRun, QueuedRun, grouped, spread, values_of

AXES = ("task", "model", "initialization", "lr")
"""What a row of the grid is, in the order of its rows; its columns are seeds."""


def grid_rows(finished: Sequence[FinishedRun]) -> list[dict[str, str]]:
    """A row per task, model, start and learning rate; accuracies in per cent, of each seed and their mean."""
    seeds = sorted(values_of(finished, "seed"))
    return [_row(cell, seeds) for cell in _cells(finished)]


def _row(cell: Mapping[str, Any], seeds: Sequence[int]) -> dict[str, str]:
    task, model, scores = cell["task"], cell["model"], cell["scores"]
    known = [score for score in scores.values() if score is not None]
    paper = next((row for row in PUBLISHED if (row.source, row.model) == (FEM_PAPER, model)), None)
    return {
        "task": SHORT[task],
        "model": model,
        "start": cell["initialization"],
        "rate": f"{cell['lr']:g}",
        **{f"seed {seed}": _text(scores, seed) for seed in seeds},
        "mean": cell_text(spread(known) if known else None),
        "paper": "" if paper is None else f"{paper.tasks[list(TASKS).index(task)]:.1f}",
    }


def _cells(finished: Sequence[FinishedRun]) -> list[dict[str, Any]]:
    """Rows with their scores by seed, as fractions; None of a run that diverged."""
    cells = grouped(finished, *AXES)
    places = [values_of(finished, name) for name in AXES]
    order = sorted(cells, key=lambda cell: [p.index(value) for p, value in zip(places, cell, strict=True)])
    return [
        dict(zip(AXES, cell, strict=True))
        | {"scores": {done.run.settings["seed"]: done.result["score"] for done in cells[cell]}}
        for cell in order
    ]


def _text(scores: Mapping[int, float | None], seed: int) -> str:
    if seed not in scores:
        return ""
    score = scores[seed]
    return "diverged" if score is None else f"{100 * score:.1f}"


def grid_content(
    name: str, profile: MadProfile, finished: Sequence[FinishedRun], missing: Sequence[QueuedRun]
) -> dict[str, Any]:
    """Everything of the report as JSON values; accuracies are fractions."""
    return {
        "profile": name,
        "protocol": asdict(profile.protocol),
        "model_sizes": asdict(profile.sizes),
        "seeds": sorted(values_of(finished, "seed")),
        "cells": [
            cell | {"scores": {str(s): v for s, v in cell["scores"].items()}} for cell in _cells(finished)
        ],
        **provenance(finished, missing),
    }


def grid_markdown(content: Mapping[str, Any], rows: Sequence[Mapping[str, str]]) -> str:
    """The report as a page."""
    text = [
        *page_head(content, "Accuracy in per cent: each seed, and their mean and sample deviation."),
        *page_table(rows, left=4),
        "",
        *page_protocol(content),
        *page_gaps(content),
    ]
    return "\n".join(text) + "\n"

"""The table of the MAD study: what a profile's runs gave beside what was published, and what is missing."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from helmholtz.experiments.base import spread_text
from helmholtz.experiments.mad.data import TASKS
from helmholtz.experiments.mad.models import MODELS
from helmholtz.experiments.mad.run import MadProfile, MadRun
from helmholtz.experiments.queue import FinishedRun, QueuedRun, Spread, runs_of, spread, values_of

SHORT = {
    "memorization": "Memory",
    "compression": "Compr.",
    "in-context-recall": "Recall",
    "noisy-in-context-recall": "Noisy",
    "fuzzy-in-context-recall": "Fuzzy",
    "selective-copying": "Copying",
}
"""Columns of the table."""


@dataclass(frozen=True, slots=True)
class PublishedRow:
    """Accuracies in per cent of one published model."""

    source: str
    label: str
    tasks: tuple[float, ...]
    """In the order of ``TASKS``."""
    average: float
    model: str | None = None
    """The row of ours that it corresponds to."""


FEM_PAPER = "Lu & Yang 2026"
MAD_PAPER = "Poli et al. 2024"
PUBLISHED = (
    PublishedRow(FEM_PAPER, "Transformer", (85.7, 44.3, 99.9, 98.7, 24.5, 95.1), 74.7, "attention"),
    PublishedRow(FEM_PAPER, "DiffTransformer", (83.7, 42.9, 99.9, 97.1, 39.0, 95.8), 76.4),
    PublishedRow(FEM_PAPER, "GatedDeltaNet", (80.2, 45.0, 99.9, 99.9, 29.8, 94.3), 74.9),
    PublishedRow(FEM_PAPER, "FEM-SM", (85.9, 53.1, 99.9, 99.9, 43.1, 99.3), 80.2, "fem_softmax"),
    PublishedRow(FEM_PAPER, "FEM-GLA", (86.3, 53.0, 99.9, 92.1, 19.1, 99.0), 74.9, "fem_gla"),
    PublishedRow(MAD_PAPER, "Transformer", (85.2, 51.6, 94.1, 86.8, 29.8, 99.6), 74.5),
    PublishedRow(MAD_PAPER, "Hyena", (89.5, 45.2, 81.7, 78.8, 7.9, 93.1), 66.0),
    PublishedRow(MAD_PAPER, "MH-Hyena", (89.4, 44.8, 99.0, 98.6, 14.4, 93.0), 73.2),
    PublishedRow(MAD_PAPER, "Mamba", (89.5, 52.7, 90.4, 90.1, 6.7, 86.3), 69.3, "mamba"),
    PublishedRow(MAD_PAPER, "GLA", (63.3, 38.8, 80.8, 81.6, 6.9, 88.6), 60.0),
    PublishedRow(MAD_PAPER, "DeltaNet", (52.8, 42.2, 100.0, 100.0, 35.7, 100.0), 71.8),
)
"""Whether the first paper used the whole ladder is not known. Its Noisy column for the Transformer, GatedDeltaNet and
FEM-GLA is worked out from the averages; its Hyena and DeltaNet rows are those of the second, as tabulated with DeltaNet
(Yang et al. 2024), and not repeated."""
ABLATION_AVERAGES = {
    "attention": 74.7,
    "fem_softmax_c": 76.3,
    "fem_softmax_cl": 78.8,
    "fem_softmax_clt": 79.4,
    "fem_softmax": 80.2,
}
"""Published averages of the ablation, in per cent; its first row is softmax attention."""


@dataclass(frozen=True, slots=True)
class Row:
    """Accuracies (fractions) of one model of ours, over seeds."""

    model: str
    parameters: int | None
    """Of the first task that is there."""
    tasks: dict[str, Spread | None]
    """None where runs are missing or all of a setting diverged."""
    average: Spread | None
    """Mean of the profile's tasks, over the seeds that have all of them."""

    @property
    def label(self) -> str:
        return MODELS[self.model].label


def rows_of(profile: MadProfile, finished: Sequence[FinishedRun]) -> list[Row]:
    """A row per model of the profile of which there is a run."""
    by_name = {done.run.name: done for done in finished}
    return [row for model in profile.models if (row := _row(profile, model, by_name)) is not None]


def _row(profile: MadProfile, model: str, by_name: Mapping[str, FinishedRun]) -> Row | None:
    seeds = (*profile.seeds, *profile.extra_seeds)
    runs = profile.runs(list(profile.settings), [model], seeds)
    there = [by_name[run.name] for run in runs if run.name in by_name]
    if not there:
        return None
    scores = {
        (task, seed): task_score(
            [run for run in runs if (run.setting.task_name, run.seed) == (task, seed)], by_name
        )
        for task in profile.settings
        for seed in seeds
    }
    tasks = {
        task: [scores[task, seed] for seed in seeds if scores[task, seed] is not None]
        for task in profile.settings
    }
    whole = [[scores[task, seed] for task in profile.settings] for seed in seeds]
    averages = [
        statistics.fmean(s for s in of_seed if s is not None) for of_seed in whole if None not in of_seed
    ]
    return Row(
        model,
        there[0].result["parameters"],
        {task: _spread(values) for task, values in tasks.items()},
        _spread(averages),
    )


def task_score(runs: Sequence[MadRun], by_name: Mapping[str, FinishedRun]) -> float | None:
    """Mean over the settings of a task of the best score of the grid, as published.

    None if a run is missing, or every run of a setting diverged.
    """
    best = dict[str, float]()
    for run in runs:
        if run.name not in by_name:
            return None
        score = by_name[run.name].result["score"]
        if score is not None:
            best[run.setting.name] = max(score, best.get(run.setting.name, 0.0))
    return statistics.fmean(best.values()) if best.keys() == {run.setting.name for run in runs} else None


def _spread(values: Sequence[float | None]) -> Spread | None:
    known = [value for value in values if value is not None]
    return spread(known) if known else None


def comparisons(rows: Sequence[Row], *, stop_at: float | None) -> list[dict[str, Any]]:
    """Every pair of rows that one paper has too, per task: the difference there, here, and whether they agree.

    Differences are in per cent points, of the second model over the first. They agree if they have one sign. "unclear"
    is one of ours that is no larger than the two sample deviations together, or a published one of 0; "one run" is one
    of a single seed; "both solve it" says that both means are at ``stop_at``, so that nothing tells them apart.

    Args:
        stop_at: the accuracy at which training ended; None if it never did.
    """
    ours = {row.model: row for row in rows}
    found = []
    for a, b in combinations([row for row in PUBLISHED if row.model in ours], 2):
        if a.source != b.source:
            continue
        assert a.model is not None and b.model is not None
        for task, x, y in zip(TASKS, a.tasks, b.tasks, strict=True):
            here = (ours[a.model].tasks.get(task), ours[b.model].tasks.get(task))
            found += _compared(task, (a.model, b.model), y - x, here, stop_at)
    pairs = list(ABLATION_AVERAGES.items())
    for (a_model, x), (b_model, y) in zip(pairs, pairs[1:], strict=False):
        if a_model in ours and b_model in ours:
            here = (ours[a_model].average, ours[b_model].average)
            found += _compared("average", (a_model, b_model), y - x, here, stop_at)
    return found


def _compared(
    task: str,
    models: tuple[str, str],
    published: float,
    here: tuple[Spread | None, Spread | None],
    stop_at: float | None,
) -> list[dict[str, Any]]:
    first, second = here
    if first is None or second is None:
        return []
    difference = 100 * (second.mean - first.mean)
    noise = 100 * ((first.deviation or 0.0) + (second.deviation or 0.0))
    verdict = "agrees" if difference * published > 0 else "differs"
    if stop_at is not None and min(first.mean, second.mean) >= stop_at:
        verdict = "both solve it"
    elif first.n < 2 or second.n < 2:
        verdict = "one run"
    elif abs(difference) <= noise or published == 0:
        verdict = "unclear"
    return [
        {
            "task": task,
            "first": models[0],
            "second": models[1],
            "published": round(published, 2),
            "ours": round(difference, 2),
            "deviations": round(noise, 2),
            "verdict": verdict,
        }
    ]


def report_content(
    name: str, profile: MadProfile, finished: Sequence[FinishedRun], missing: Sequence[QueuedRun]
) -> dict[str, Any]:
    """Everything of the report as JSON values; accuracies of ours are fractions, published ones per cent."""
    rows = rows_of(profile, finished)
    return {
        "profile": name,
        "protocol": asdict(profile.protocol),
        "model_sizes": asdict(profile.sizes),
        "initializations": list(profile.initializations),
        "learning_rates": {
            task: {
                model: values_of(runs_of(finished, task=task, model=model), "lr")
                for model in values_of(runs_of(finished, task=task), "model")
            }
            for task in profile.settings
        },
        "seeds": sorted({done.run.settings["seed"] for done in finished}),
        "rows": [asdict(row) | {"label": row.label} for row in rows],
        "published": [asdict(row) for row in PUBLISHED],
        "published_ablation_averages": ABLATION_AVERAGES,
        "comparisons": comparisons(rows, stop_at=profile.protocol.stop_at),
        **provenance(finished, missing),
    }


def provenance(finished: Sequence[FinishedRun], missing: Sequence[QueuedRun]) -> dict[str, Any]:
    """Which runs a report is of."""
    return {
        "finished": len(finished),
        "missing": [run.name for run in missing],
        "diverged": [done.run.name for done in finished if done.result["stopped"] == "diverged"],
        "cpu_seconds": round(sum(done.timing.get("cpu_seconds", 0.0) for done in finished)),
        "commits": sorted({str(done.timing.get("commit", "unknown")) for done in finished}),
        "processors": sorted({_processor(done) for done in finished}),
    }


def _processor(done: FinishedRun) -> str:
    hardware: Mapping[str, Any] = done.timing.get("hardware", {})
    return f"{hardware.get('processor', 'unknown')}, {hardware.get('threads', '?')} thread(s)"


def table_rows(rows: Sequence[Row], tasks: Sequence[str]) -> list[dict[str, str]]:
    """Our rows and the published ones, in per cent with sample deviations."""
    cells = []
    for row in rows:
        found = {SHORT[task]: cell_text(row.tasks[task]) for task in tasks}
        parameters = "-" if row.parameters is None else f"{row.parameters / 1000:.0f} k"
        cells.append({"model": row.label, "parameters": parameters, **found, "mean": cell_text(row.average)})
    for published in PUBLISHED:
        values = dict(zip(TASKS, published.tasks, strict=True))
        label, found = (
            f"{published.label} ({published.source})",
            {SHORT[t]: f"{values[t]:.1f}" for t in tasks},
        )
        cells.append({"model": label, "parameters": "", **found, "mean": f"{published.average:.1f}"})
    return cells


def cell_text(found: Spread | None) -> str:
    return spread_text(found, digits=1, scale=100)


def markdown(content: Mapping[str, Any], rows: Sequence[Mapping[str, str]]) -> str:
    """The report as a page."""
    rates = "; ".join(f"{task}: {_rates(of_task)}" for task, of_task in content["learning_rates"].items())
    text = [
        *page_head(content, "Accuracy in per cent, mean and sample deviation over seeds."),
        *page_table(rows),
        "",
        *page_protocol(content),
        f"Initialisation: {', '.join(content['initializations'])}. Learning rates: {rates}.",
        *page_gaps(content),
        *_compared_table(content["comparisons"]),
    ]
    return "\n".join(text) + "\n"


def page_head(content: Mapping[str, Any], what: str) -> list[str]:
    total = content["finished"] + len(content["missing"])
    return [
        f"# MAD, profile {content['profile']}",
        "",
        f"{content['finished']} of {total} runs, {content['cpu_seconds']} CPU seconds on "
        f"{'; '.join(content['processors'])}; commits {', '.join(content['commits'])}; seeds "
        f"{', '.join(map(str, content['seeds']))}. {what}",
        "",
    ]


def page_table(rows: Sequence[Mapping[str, str]], left: int = 1) -> list[str]:
    """The first ``left`` columns are words, the others numbers."""
    head, *body = ["| " + " | ".join(line) + " |" for line in (rows[0], *(row.values() for row in rows))]
    return [head, "|" + "---|" * left + "---:|" * (len(rows[0]) - left), *body]


def page_protocol(content: Mapping[str, Any]) -> list[str]:
    return [f"Protocol: {', '.join(f'{key} {value}' for key, value in content['protocol'].items())}."]


def page_gaps(content: Mapping[str, Any]) -> list[str]:
    return [*_listed("Missing", content["missing"]), *_listed("Diverged", content["diverged"])]


def _rates(of_task: Mapping[str, Sequence[float]]) -> str:
    """One rate for all models is said once."""
    by_model = {model: " and ".join(f"{lr:g}" for lr in lrs) for model, lrs in of_task.items()}
    if len(set(by_model.values())) < 2:
        return next(iter(by_model.values()), "-")
    return ", ".join(f"{model} {lrs}" for model, lrs in by_model.items())


def _listed(title: str, names: Sequence[str]) -> list[str]:
    return ["", f"{title} ({len(names)}):", "", *(f"- `{name}`" for name in names)] if names else []


def _compared_table(found: Sequence[Mapping[str, Any]]) -> list[str]:
    if not found:
        return []
    rows = [
        f"| {c['task']} | {MODELS[c['first']].label} | {MODELS[c['second']].label} | {c['published']:+.1f} | "
        f"{c['ours']:+.1f} | {c['deviations']:.1f} | {c['verdict']} |"
        for c in found
    ]
    head = "| task | from | to | published | ours | deviations | order |"
    return ["", "Differences in per cent points:", "", head, "|---|---|---|---:|---:|---:|---|", *rows]

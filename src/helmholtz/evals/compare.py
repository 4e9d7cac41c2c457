"""Runs side by side: quality, speed and memory at equal budgets."""

import json
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from helmholtz._checks import check_integer
from helmholtz._files import write_atomically
from helmholtz._hardware import describe_hardware, git_commit
from helmholtz.data.tokens import TokenDataset
from helmholtz.evals.inspection import count_parameters
from helmholtz.evals.language import decode_tokens_per_second, evaluate_language
from helmholtz.evals.latent import bounds_per_byte, evaluate_bounds, report
from helmholtz.evals.runs import Run, read_run
from helmholtz.models.checkpoint import load_checkpoint
from helmholtz.models.decoder import Decoder

BUDGET_TOLERANCE = 0.02
DECODE_REPEATS = 3
POSTERIOR_SAMPLES = 16
"""Plans per window in the bound of a model with a plan: fixed, so that no run chooses the number that suits it."""
Kind = Literal["exact", "bound"]


@dataclass(frozen=True, slots=True)
class Row:
    """One run in the comparison."""

    name: str
    model: str
    seed: int
    parameters: int
    tokens: int
    """Training tokens."""
    kind: Kind
    """Whether the validation numbers are the model's own or an upper bound of them (a model with a plan)."""
    validation_bits_per_byte: float
    """Over the whole validation split, in windows without overlap, with the weights of lowest validation loss."""
    validation_perplexity: float
    bounds: dict[str, Any] | None
    """Every bound of a model with a plan (``evals.latent.report``); the row shows ``mixture_weighted``."""
    train_tokens_per_second: float
    decode_tokens_per_second: float
    """Greedy, one sequence."""
    peak_memory_bytes: int | None
    """Of the training process (``PeakMemory``); None if its system does not say."""
    parts: dict[str, int]
    """Where the parameters are: embedding, blocks, and encoder and table of a plan."""


@dataclass(frozen=True, slots=True)
class Group:
    """Runs that differ in their seed alone."""

    model: str
    seeds: tuple[int, ...]
    kind: Kind
    mean_bits_per_byte: float
    deviation: float | None
    """Sample standard deviation over seeds; None for a single one."""


@dataclass(frozen=True, slots=True)
class Comparison:
    rows: tuple[Row, ...]
    window: int
    """Tokens of the windows that every row was evaluated on: the shortest that a run was trained on."""
    groups: tuple[Group, ...]
    inequalities: tuple[str, ...]
    """Why the comparison is not at equal budgets; empty if it is."""


def inequalities(runs: Sequence[Run]) -> list[str]:
    """Every way in which the runs' budgets differ: parameters by more than 2 %, tokens, data, or any setting of
    the training but the seed. What a model is and what it minimises are no budgets."""
    found = []
    sizes = {run.name: run.summary["parameters"] for run in runs}
    if max(sizes.values()) > (1 + BUDGET_TOLERANCE) * min(sizes.values()):
        listed = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
        found.append(f"parameters differ by more than {BUDGET_TOLERANCE:.0%}: {listed}")
    first = runs[0]
    for run in runs[1:]:
        seen, wanted = run.summary["tokens"], first.summary["tokens"]
        if seen != wanted:
            found.append(f"{run.name} has seen {seen:,} tokens, {first.name} {wanted:,}")
        if run.description["data"] != first.description["data"]:
            found.append(f"{run.name} and {first.name} were trained on different data")
        old, new = first.description["train"], run.description["train"]
        for key in sorted(old.keys() | new.keys()):
            mine, theirs = new.get(key), old.get(key)
            if key != "seed" and mine != theirs:
                found.append(f"train.{key} is {mine} in {run.name} and {theirs} in {first.name}")
    return found


def compare(
    folders: Sequence[str | Path],
    *,
    allow_unequal: bool = False,
    data_folder: str | Path | None = None,
    batch_size: int | None = None,
) -> Comparison:
    """Evaluate the best weights of every run on the whole validation split, and its speed, one after another.

    Args:
        data_folder: where the runs' data are now; None: where they were in training.
        batch_size: windows per forward pass, which changes nothing but time and memory; None: as in training.

    Raises: ValueError if a run is not finished, if budgets differ and ``allow_unequal`` is false, or if
        ``data_folder`` holds other data than a run was trained on.
    """
    if len(folders) < 1:
        raise ValueError("runs: wanted at least one folder, got none")
    if batch_size is not None:
        check_integer("batch_size", batch_size)
    runs = [read_run(folder) for folder in folders]
    unequal = inequalities(runs)
    if unequal and not allow_unequal:
        raise ValueError("these runs cannot be compared fairly: " + "; ".join(unequal))
    window = min(run.description["train"]["seq_len"] for run in runs)
    rows = tuple(_row(run, window, data_folder, batch_size) for run in runs)
    return Comparison(rows, window, _groups(runs, rows), tuple(unequal))


def _row(run: Run, window: int, data_folder: str | Path | None, batch_size: int | None) -> Row:
    model, train = load_checkpoint(run.checkpoint), run.description["train"]
    data = TokenDataset(data_folder or run.data_folder, "validation")
    if data_folder and data.metadata.fingerprint != run.description["data"]["fingerprint"]:
        raise ValueError(f"data: {data_folder} holds other data than {run.name} was trained on")
    nats, bits, bounds = _quality(model, data, window, batch_size or train["batch_size"])
    n_tokens = min(128, model.config.max_seq_len // 2)
    speeds = [decode_tokens_per_second(model, n_tokens=n_tokens) for _ in range(DECODE_REPEATS)]
    return Row(
        name=run.name,
        model=model_label(run.description),
        seed=train["seed"],
        parameters=run.summary["parameters"],
        tokens=run.summary["tokens"],
        kind="bound" if bounds else "exact",
        validation_bits_per_byte=bits,
        validation_perplexity=math.exp(min(nats, 700.0)),
        bounds=bounds,
        train_tokens_per_second=run.train_tokens_per_second(),
        decode_tokens_per_second=statistics.median(speeds),
        peak_memory_bytes=run.summary["peak_memory_bytes"],
        parts=_parts(model),
    )


def _quality(
    model: Decoder, data: TokenDataset, window: int, batch_size: int
) -> tuple[float, float, dict[str, Any] | None]:
    """Nats per token, bits per byte, and all bounds where these are of one of them."""
    if model.plan is None:
        quality = evaluate_language(model, data, seq_len=window, overlap=0, batch_size=batch_size)
        return quality.nats_per_token, quality.bits_per_byte, None
    bounds = evaluate_bounds(model, data, seq_len=window, batch_size=batch_size, n_samples=POSTERIOR_SAMPLES)
    return bounds.mixture_weighted, bounds_per_byte(bounds)["mixture_weighted"], report(bounds)


def _parts(model: Decoder) -> dict[str, int]:
    parts = Counter[str]()
    for count in count_parameters(model):
        parts[count.module.split(".")[0]] += count.parameters
    return dict(parts)


def leaders(rows: Sequence[Row]) -> set[str]:
    """Names of the rows known to be at or below every exact number: the lowest exact one, or all bounds below that.

    A bound above it is inconclusive: its row may be the best of all. Which of several bounds is best is not known.
    """
    exact = {row.name: row.validation_bits_per_byte for row in rows if row.kind == "exact"}
    lowest = min(exact.values(), default=-math.inf)
    wins = {row.name for row in rows if row.kind == "bound" and row.validation_bits_per_byte < lowest}
    return wins or {name for name, value in exact.items() if value == lowest}


def is_bounded(description: dict[str, Any]) -> bool:
    """Whether a run's losses are upper bounds of the model's own: where it was trained with a plan."""
    return "kappa_bits" in (description.get("objective") or {})


def model_label(description: dict[str, Any]) -> str:
    """Architecture, with the priors of a FEM model, ``fem_lm (softmax)``, or the free bits of a plan's training."""
    if is_bounded(description):
        return f"{description['architecture']} ({description['objective']['kappa_bits']:g} bits)"
    prior = description["model"].get("prior")
    names = prior if isinstance(prior, str) else ", ".join(dict.fromkeys(prior or ()))
    return f"{description['architecture']} ({names})" if names else description["architecture"]


def same_model(run: Run) -> str:
    """Equal for runs of one model: architecture, configuration and objective."""
    parts = ("architecture", "model", "objective")
    return json.dumps([run.description.get(part) for part in parts], sort_keys=True)


def _groups(runs: Sequence[Run], rows: Sequence[Row]) -> tuple[Group, ...]:
    members: dict[str, list[Row]] = {}
    for run, row in zip(runs, rows, strict=True):
        members.setdefault(same_model(run), []).append(row)
    groups = []
    for group in members.values():
        values, seeds = [row.validation_bits_per_byte for row in group], tuple(row.seed for row in group)
        deviation = statistics.stdev(values) if len(values) > 1 else None
        groups.append(Group(group[0].model, seeds, group[0].kind, statistics.mean(values), deviation))
    return tuple(groups)


def write_results(comparison: Comparison, folders: Sequence[str | Path], file: Path) -> None:
    """The comparison as JSON, with the hardware, the commit and the complete description of each run."""
    content = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "hardware": describe_hardware(),
        **asdict(comparison),
        "runs": [read_run(folder).description for folder in folders],
    }
    write_atomically(file, json.dumps(content, indent=2) + "\n")

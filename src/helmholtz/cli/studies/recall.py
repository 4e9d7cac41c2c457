"""``helmholtz study recall``."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from helmholtz._checks import check_choice, check_integer
from helmholtz._display import make_losable
from helmholtz._files import write_atomically
from helmholtz._hardware import describe_hardware, git_commit
from helmholtz.cli.arguments import make_parser, parse
from helmholtz.cli.studies.learners import LEARNERS, build_learner
from helmholtz.cli.studies.queues import read_content
from helmholtz.experiments.recall.data import PairTask
from helmholtz.experiments.recall.patterns import (
    AssociationResult,
    Corruption,
    RecallResult,
    recall_patterns,
    recall_values,
)
from helmholtz.experiments.recall.report import plot_recall
from helmholtz.experiments.recall.run import InContextRecall, InContextResult, recall_by_memory

ACTIONS = {
    "run": "Recall from a Hopfield memory: patterns spoilt by noise, masks and flips beside a float64 oracle and the "
    "nearest neighbour, values from keys, and pairs in a context; then the report. Nothing is trained unless "
    "--train_steps says so.",
    "report": "Tables and picture of recall.json.",
    "list": "What recall.json holds.",
}
RECALL = "recall.json"
NOISES = (0.0, 0.5, 1.0, 1.5)
SPOILT = (
    Corruption("mask", 0.25),
    Corruption("mask", 0.5),
    Corruption("flip", 0.1),
    Corruption("flip", 0.25),
)
PROFILES: dict[str, dict[int, tuple[int, ...]]] = {
    "ci": {32: (64, 512), 64: (512,)},
    "full": {32: (64, 512, 4096), 64: (512, 4096, 10000), 128: (64, 512, 4096, 10000)},
    "capacity": {
        16: tuple(2**n for n in range(2, 9)),
        32: tuple(2**n for n in range(4, 13)),
        64: tuple(2**n for n in range(8, 15)),
    },
}
"""Numbers of patterns per width. ``capacity`` follows the margin down, and does nothing else."""
MASKED = {"ci": ((64, 512),), "full": ((64, 512), (128, 512), (128, 4096)), "capacity": ()}
"""Widths and numbers of patterns of the rows with masks and flips."""
PAIRS = {"ci": (500,), "full": (500, 2000), "capacity": ()}


def pattern_results(profile: str, trials: int, seed: int, console: Console) -> list[RecallResult]:
    """Noise for every size of the profile, masks and flips for some."""
    settings = [
        (d_model, n_patterns, Corruption("noise", level))
        for d_model, sizes in PROFILES[profile].items()
        for n_patterns in sizes
        for level in NOISES
    ]
    settings += [(d, k, corruption) for d, k in MASKED[profile] for corruption in SPOILT]
    results = []
    for d_model, n_patterns, corruption in settings:
        with console.status(f"D={d_model}, K={n_patterns}: {corruption.kind} {corruption.level}"):
            results.append(recall_patterns(d_model, n_patterns, corruption, n_trials=trials, seed=seed))
    return results


def value_results(profile: str, trials: int, seed: int, console: Console) -> list[AssociationResult]:
    """Values by keys of width 32 and 64: rows of 64 and 128 numbers."""
    results = []
    for d_key in (32, 64):
        for n_pairs in PAIRS[profile]:
            for beta in (2.0, 4.0, 8.0):
                for noise in (0.0, 0.5):
                    with console.status(f"{n_pairs} pairs, beta {beta}"):
                        found = recall_values(
                            d_key, n_pairs, beta=beta, noise=noise, n_trials=trials, seed=seed
                        )
                    results.append(found)
    return results


def in_context_results(
    learner: str, pairs: int, steps: int, seed: int, console: Console
) -> dict[str, tuple[PairTask, InContextResult]]:
    """A memory that is written, an untrained decoder and, if asked for, the trained one."""
    written = PairTask(n_pairs=32, n_keys=64, n_values=64)
    task = PairTask(n_pairs=pairs, n_keys=max(16, pairs), n_values=16)
    model = build_learner(learner, vocab_size=task.vocab_size, n_tokens=task.n_tokens, seed=seed)
    recall = InContextRecall(model, task, seed=seed)
    results = {"written": (written, recall_by_memory(written, 1000, seed=seed))}
    results[f"untrained {learner}"] = (task, recall.evaluate())
    if steps:
        with console.status(f"training on {pairs} pairs"):
            recall.train(steps)
        results[f"trained {learner}"] = (task, recall.evaluate())
    return results


def pattern_table(results: Sequence[RecallResult]) -> Table:
    def row(r: RecallResult) -> dict[str, str]:
        return {
            "D": str(r.d_model),
            "K": str(r.n_patterns),
            "margin": f"{r.margin:.1f}{' !' if r.warned else ''}",
            "spoilt by": f"{r.corruption.kind} {r.corruption.level:g}",
            "recalled": f"{r.accuracy:.3f}",
            "strict": f"{r.strict:.3f}",
            "oracle": f"{r.oracle:.3f}",
            "nearest": f"{r.nearest:.3f}",
            "steps": f"{r.num_steps_mean:.1f} ({r.num_steps_max})",
            "AUROC": "-" if r.auroc is None else f"{r.auroc:.2f}",
            "": "" if r.agrees() else "DIFFERS",
        }

    return _table("Patterns recalled (kappa = 0: no gain of a context enters)", [row(r) for r in results])


def value_table(results: Sequence[AssociationResult]) -> Table:
    def row(r: AssociationResult) -> dict[str, str]:
        return {
            "D key": str(r.d_key),
            "pairs": str(r.n_pairs),
            "beta": f"{r.beta:g}",
            "noise": f"{r.noise:g}",
            "recalled": f"{r.accuracy:.3f}",
            "oracle": f"{r.oracle:.3f}",
            "nearest": f"{r.nearest:.3f}",
            "answered": f"{r.answered:.3f}",
            "steps": f"{r.num_steps_mean:.1f} ({r.num_steps_max})",
            "": "" if r.agrees() else "DIFFERS",
        }

    return _table("Values recalled from keys", [row(r) for r in results])


def _table(title: str, rows: Sequence[dict[str, str]]) -> Table:
    """Rows that name their columns, all of them the same."""
    table = Table(title=title, box=None, padding=(0, 1, 0, 0))
    for column in rows[0]:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row.values())
    return table


def options(action: str, arguments: list[str]) -> dict[str, Any]:
    """Values of the command line. Raises: ValueError naming the option that is wrong."""
    parser = make_parser(f"study recall {action}", ACTIONS[action])
    parser.add_argument("--output", type=str, default="results/memory", help="folder of the result")
    if action != "run":
        return parse(parser, arguments)
    parser.add_argument("--profile", type=str, default="ci", help=f"sizes: {', '.join(PROFILES)}")
    parser.add_argument(
        "--trials", type=int, default=4096, help="queries per row, over five sets of patterns"
    )
    parser.add_argument("--pairs", type=int, default=4, help="pairs in the context of the decoder")
    parser.add_argument(
        "--learner", type=str, default="mamba_hopfield", help=f"the decoder: one of {', '.join(LEARNERS)}"
    )
    parser.add_argument(
        "--train_steps", type=int, default=0, help="steps of a decoder on them; 0 trains none"
    )
    parser.add_argument("--seed", type=int, default=0, help="of patterns, queries and weights")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    values = parse(parser, arguments)
    check_choice("profile", values["profile"], PROFILES)
    check_choice("learner", values["learner"], LEARNERS)
    for name in ("trials", "pairs", "threads"):
        check_integer(name, values[name])
    for name in ("train_steps", "seed"):
        check_integer(name, values[name], minimum=0)
    return values


def compute(values: dict[str, Any], console: Console) -> dict[str, Any]:
    """What ``recall.json`` holds."""
    torch.set_num_threads(values["threads"])
    profile, trials, seed = values["profile"], values["trials"], values["seed"]
    patterns = pattern_results(profile, trials, seed, console)
    pairs = value_results(profile, trials, seed, console)
    in_context = in_context_results(values["learner"], values["pairs"], values["train_steps"], seed, console)
    return {
        "profile": profile,
        "seed": seed,
        "patterns": [result.to_dict() for result in patterns],
        "values": [result.to_dict() for result in pairs],
        "in_context": {
            name: {"task": asdict(task), **result.to_dict()} for name, (task, result) in in_context.items()
        },
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "hardware": describe_hardware(),
    }


def report(folder: Path, console: Console) -> None:
    """Tables and picture. Raises: ValueError if there are no results, or they are damaged."""
    content = read_content(folder / RECALL, "recall")
    try:
        patterns = [RecallResult.from_dict(values) for values in content["patterns"]]
        pairs = [AssociationResult.from_dict(values) for values in content["values"]]
        in_context = [
            f"{found['task']['n_pairs']} pairs in a context, {name}: {found['accuracy']:.3f} "
            f"(chance {found['chance']:.3f})"
            for name, found in content["in_context"].items()
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / RECALL}: damaged ({error!r}); run the study again") from error
    console.print(pattern_table(patterns))
    if pairs:
        console.print(value_table(pairs))
    for line in in_context:
        console.print(line, markup=False)
    plot_recall(patterns, folder / "recall.png")
    console.print(f"wrote {folder / 'recall.png'}; the numbers are in {folder / RECALL}", markup=False)


def act(action: str, arguments: list[str], console: Console) -> None:
    make_losable(console)
    values = options(action, arguments)
    folder = Path(values["output"])
    if action == "run":
        content = compute(values, console)
        write_atomically(folder / RECALL, json.dumps(content, indent=1) + "\n")
    if action == "list":
        content = read_content(folder / RECALL, "recall")
        counts = ", ".join(
            f"{len(content.get(part, ()))} {part}" for part in ("patterns", "values", "in_context")
        )
        console.print(f"{folder / RECALL}: profile {content.get('profile')}, {counts}", markup=False)
    else:
        report(folder, console)

"""A run of the MAD study, by model: some training steps and a test, at the study's sizes, beside attention.

    python benchmarks/models/mad.py --threads 2
    python tools/against.py 252ba62 benchmarks/models/mad.py --threads 2     # beside another commit

Width 128, two blocks, parameters of the attention model; batches of 32 sequences, of 32 tokens (compression) or 128
(in-context recall). A run is the study's own ``train``: steps of AdamW, and at the end a test on 32 sequences.

Floor: 6 FLOPs a parameter and token of a step.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from _timing import interleave, parse_options, print_table, write_results

try:
    from helmholtz.experiments.mad.data import baseline, draw
    from helmholtz.experiments.mad.models import MadSizes, build_model
    from helmholtz.experiments.mad.training import MadProtocol, train
except ImportError:  # where a commit that it is measured against has them
    from helmholtz.data.mad import baseline, draw
    from helmholtz.studies.mad_models import MadSizes, build_model
    from helmholtz.studies.mad_training import MadProtocol, train

TASKS = ("compression", "in-context-recall")
MODELS = ("attention", "fem_softmax", "fem_gla", "mamba")
BATCH, STEPS = 32, 4
GOAL = 1.3
"""Times that of attention, for the Free Energy Mixer over softmax."""


def training(task: str, name: str, losses: list[float]) -> Callable[[], None]:
    """Runs of one model, each of which goes on from the weights of the last."""
    setting = replace(baseline(task), n_train=BATCH * STEPS, n_test=BATCH)
    data = draw(setting, seed=0)
    model = build_model(name, setting.task, MadSizes(), seed=0)
    protocol = MadProtocol(batch_size=BATCH, steps=STEPS, n_evaluations=1, stop_at=None)

    def run() -> None:
        trained = train(model, data, protocol, lr=1e-3, weight_decay=0.1, seed=0)
        losses.append(trained.curve[-1]["training_loss"])

    return run


def measure(task: str, rounds: int) -> list[dict[str, Any]]:
    losses: dict[str, list[float]] = {name: [] for name in MODELS}
    runs = {name: training(task, name, found) for name, found in losses.items()}
    seconds = interleave(runs, rounds=rounds, warmup=1)
    for name, (first, *_, last) in losses.items():
        if not last < first:
            raise RuntimeError(f"{name} does not learn: a loss of {first}, then of {last}")
    return [
        {
            "task": task,
            "model": name,
            "training_ms": 1e3 * seconds[name] / STEPS,
            "to_attention": seconds[name] / seconds["attention"],
        }
        for name in MODELS
    ]


def main() -> None:
    options = parse_options("mad", __doc__, rounds=7)
    rows = [row for task in TASKS for row in measure(task, options.rounds)]
    print_table(rows)
    print(f"goal: {GOAL} for fem_softmax")
    write_results(options, rows)


if __name__ == "__main__":
    main()

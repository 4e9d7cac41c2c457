"""A run of the MAD study, by model: some training steps and a test, at the study's sizes, beside attention.

    python benchmarks/models/mad.py --threads 2
    python tools/against.py 252ba62 benchmarks/models/mad.py --threads 2     # beside another commit

In-context recall: batches of 32 sequences of 128 tokens, width 128, two blocks, parameters of the attention model. A
run is the study's own ``train``: steps of AdamW, and at the end a test on 128 sequences.

Floor: 6 x 32 x 128 FLOPs a parameter and step.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

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

MODELS = ("attention", "fem_softmax", "fem_gla", "mamba")
TASK, BATCH, STEPS, TESTED = "in-context-recall", 32, 4, 128
GOAL = 1.3
"""Times that of attention, for the Free Energy Mixer over softmax."""


def training(name: str) -> Callable[[], Any]:
    """Runs of one model, each of which goes on from the weights of the last."""
    setting = replace(baseline(TASK), n_train=BATCH * STEPS, n_test=TESTED)
    data = draw(setting, seed=0)
    model = build_model(name, setting.task, MadSizes(), seed=0)
    protocol = MadProtocol(batch_size=BATCH, steps=STEPS, n_evaluations=1, stop_at=None)

    def run() -> Any:
        return train(model, data, protocol, lr=1e-3, weight_decay=0.1, seed=0)

    return run


def check(name: str) -> None:
    """The loss falls: what is timed is a training."""
    run = training(name)
    first, last = run().curve[-1], [run() for _ in range(3)][-1].curve[-1]
    if not last["training_loss"] < first["training_loss"]:
        raise RuntimeError(f"{name} does not learn: {first} to {last}")


def main() -> None:
    options = parse_options("mad", __doc__, rounds=7)
    torch.manual_seed(0)
    for name in MODELS:
        check(name)
    seconds = interleave({name: training(name) for name in MODELS}, rounds=options.rounds, warmup=1)
    rows = [
        {
            "model": name,
            "training_ms": 1e3 * seconds[name] / STEPS,
            "to_attention": seconds[name] / seconds["attention"],
        }
        for name in MODELS
    ]
    print_table(rows)
    print(f"goal: {GOAL} for fem_softmax")
    write_results(options, rows)


if __name__ == "__main__":
    main()

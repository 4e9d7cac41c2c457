"""Compare a baseline and a Free Transformer: exact numbers with upper bounds, never with what a plan leaks.

    python examples/eval_compare.py --baseline-checkpoint checkpoints/baseline --free-checkpoint checkpoints/free

Writes results.json and the loss curves, as ``helmholtz compare``. Unequal budgets are compared too, and said to be.
"""

import argparse
import sys

from helmholtz.cli.main import main as helmholtz


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare a baseline and a Free Transformer.")
    parser.add_argument("--baseline-checkpoint", default="checkpoints/baseline", help="folder of its run")
    parser.add_argument("--free-checkpoint", default="checkpoints/free", help="folder of its run")
    parser.add_argument("--data-dir", help="where the data are now (default: where they were in training)")
    parser.add_argument("--output-dir", default="results/comparison", help="folder of the results")
    parser.add_argument("--batch-size", type=int, default=8, help="windows per forward pass")
    arguments = parser.parse_args()
    options = [f"--output={arguments.output_dir}", f"--batch_size={arguments.batch_size}", "--allow_unequal"]
    if arguments.data_dir:
        options.append(f"--data={arguments.data_dir}")
    return helmholtz(
        ["compare", "--runs", arguments.baseline_checkpoint, arguments.free_checkpoint, *options]
    )


if __name__ == "__main__":
    sys.exit(main())

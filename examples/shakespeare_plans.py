"""Does a plan help on Shakespeare? Four models of one size, three seeds, compared by upper bounds.

    python examples/shakespeare_plans.py        # about 40 minutes on 2 cores; interrupted, it goes on where it was

Trains the baseline, its control with one more block, and the Free Transformer with half a bit and with two bits per
token free of charge, on the data and the schedule of the demo at a quarter of its learning rate (at the demo's no plan
is used, see docs/experiments/LOG.md). Then compares all runs, evaluates every Free Transformer with 64 plans per
window on a part of the validation text, and samples. Runs are in runs/shakespeare_plans, results in the folder given.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RUNS = Path("runs/shakespeare_plans")
CONFIGS = {
    "baseline": ("baseline", ()),
    "control": ("control", ()),
    "free_half_bit": ("free_transformer", ("--objective.kappa_bits=0.5",)),
    "free_two_bits": ("free_transformer", ("--objective.kappa_bits=2",)),
}
LR = 1e-3
N_SAMPLES, N_WINDOWS = 64, 100
PROMPT = "KING HENRY.\n"


def helmholtz(*arguments: str, capture: bool = False) -> str:
    command = [sys.executable, "-m", "helmholtz.cli.main", *arguments]
    result = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE if capture else None)
    if result.returncode:
        sys.exit(result.returncode)
    return result.stdout or ""


def train(seeds: list[int]) -> dict[str, Path]:
    folders = {}
    for seed in seeds:
        for name, (config, options) in CONFIGS.items():
            folder = folders[f"{name}-{seed}"] = RUNS / f"{name}-{seed}"
            helmholtz(
                "train",
                "--config=configs/demo.yaml",
                f"--config=configs/demo/{config}.yaml",
                f"--train.output_dir={folder}",
                f"--train.seed={seed}",
                f"--train.lr={LR}",
                "--train.resume=auto",
                *options,
            )
    return folders


def measure(folders: dict[str, Path], output: Path) -> None:
    helmholtz("compare", "--runs", *map(str, folders.values()), f"--output={output}")
    bounds, samples = {}, []
    for name, folder in folders.items():
        if "free" in name:
            options = (f"--n_samples={N_SAMPLES}", f"--n_windows={N_WINDOWS}", "--seq_len=128", "--json")
            bounds[name] = json.loads(helmholtz("evaluate", f"--checkpoint={folder}", *options, capture=True))
            shared = json.loads(
                helmholtz(
                    "plan",
                    f"--checkpoint={folder}",
                    f"--prompt={PROMPT}",
                    "--sampling.max_new_tokens=48",
                    f"--picture={output / f'plans_{name}.png'}",
                    "--json",
                    capture=True,
                )
            )
            bounds[name]["sharing"] = {key: shared[key] for key in ("one_plan", "a_plan_each", "gap")}
        text = helmholtz(
            "generate", f"--checkpoint={folder}", f"--prompt={PROMPT}", "--sampling.max_new_tokens=120",
            "--sampling.temperature=0.8", "--sampling.top_p=0.95", capture=True,
        )  # fmt: skip
        samples.append(f"== {name}\n\n{text.strip()}\n")
    (output / "bounds.json").write_text(json.dumps(bounds, indent=1) + "\n")
    (output / "samples.txt").write_text("\n".join(samples))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("results/shakespeare_plans"))
    arguments = parser.parse_args()
    helmholtz("data", "--config=configs/demo.yaml")
    measure(train(arguments.seeds), arguments.output)


if __name__ == "__main__":
    main()

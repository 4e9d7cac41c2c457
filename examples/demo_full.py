"""The long demo: seven language models on the complete Shakespeare, at equal budgets, compared.

    python examples/demo_full.py           # 7 to 12 minutes on 2 cores; interrupted, it goes on where it was
    python examples/demo_full.py --seed 1  # the same with another seed

Trains the baseline, the Free Energy Mixer with the softmax and the GLA prior, a Free Transformer next to its control
(no plan, one more block), and Mamba with and without an equilibrium per token, one process each, through the command
line that users have. Everything is in runs/demo and results/comparison; with a seed other than 0 in runs/demo-seed<n>
and results/comparison-seed<n>.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("baseline", "fem_softmax", "fem_gla", "control", "free_transformer", "mamba", "mamba_hopfield")
PROMPT = "KING HENRY.\n"
SENTENCE = "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer"


def helmholtz(*arguments: str, capture: bool = False) -> str:
    """Run one command in a process of its own and return what it printed; stop the demo if it fails."""
    command = [sys.executable, "-m", "helmholtz.cli.main", *arguments]
    result = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE if capture else None)
    if result.returncode:
        sys.exit(result.returncode)
    return result.stdout or ""


def train(console: Console, runs: Path, seed: int) -> None:
    for name in NAMES:
        console.rule(f"training {name}")
        helmholtz(
            "train",
            "--config=configs/demo.yaml",
            f"--config=configs/demo/{name}.yaml",
            f"--train.output_dir={runs / name}",
            f"--train.seed={seed}",
            "--train.resume=auto",
        )


def show(console: Console, runs: Path, results: Path) -> list[Path]:
    """Comparison, figures and a sample per model; returns the pictures."""
    console.rule("comparison")
    helmholtz("compare", "--runs", *(str(runs / name) for name in NAMES), f"--output={results}")
    pictures = [results / "loss.png"]
    for name in ("fem_softmax", "fem_gla"):
        picture = results / f"selection_{name}.png"
        checkpoint = f"--checkpoint={runs / name}"
        helmholtz("inspect", checkpoint, f"--text={SENTENCE}", f"--picture={picture}", capture=True)
        pictures.append(picture)
    console.rule("what samples of the Free Transformer share under one plan")
    pictures.append(results / "plans.png")
    helmholtz(
        "plan",
        f"--checkpoint={runs / 'free_transformer'}",
        f"--prompt={PROMPT}",
        "--sampling.max_new_tokens=48",
        "--n_samples=4",
        "--n_plans=4",
        f"--picture={pictures[-1]}",
    )
    pictures += equilibria(console, f"--checkpoint={runs / 'mamba_hopfield'}", results)
    for name in NAMES:
        text = helmholtz(
            "generate",
            f"--checkpoint={runs / name}",
            f"--prompt={PROMPT}",
            "--sampling.max_new_tokens=160",
            "--sampling.temperature=0.8",
            "--sampling.top_p=0.95",
            capture=True,
        )
        console.print(Panel(Text(text.strip()), title=f"a sample of {name}"))
    return pictures


def equilibria(console: Console, checkpoint: str, results: Path) -> list[Path]:
    """Whether the trained model keeps its promises, and the energy of a token; returns the pictures."""
    console.rule("the equilibria of Mamba-Hopfield")
    helmholtz("validate", checkpoint, f"--text={SENTENCE}", f"--output={results / 'validate.json'}")
    helmholtz(
        "landscape", checkpoint, f"--text={SENTENCE}", f"--output={results / 'landscape'}", capture=True
    )
    return sorted((results / "landscape").glob("*.png"))


def main() -> None:
    parser = argparse.ArgumentParser(description="Train and compare seven language models of equal size.")
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args().seed
    console, begin = Console(highlight=False), time.perf_counter()
    suffix = f"-seed{seed}" if seed else ""
    runs, results = Path(f"runs/demo{suffix}"), Path(f"results/comparison{suffix}")
    console.rule("preparing the complete Shakespeare")
    helmholtz("data", "--config=configs/demo.yaml")
    train(console, runs, seed)
    pictures = show(console, runs, results)
    console.rule("done")
    console.print(f"results: {results / 'results.json'}")
    for picture in pictures:
        console.print(f"picture: {picture}")
    console.print(f"demo time: {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()

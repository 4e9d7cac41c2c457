"""Validate and draw two small Mamba-Hopfield models that have read a little Shakespeare, one of each regime.

    python examples/equilibrium_landscape.py        # some minutes on 2 cores; interrupted, it goes on where it was

Trains both on bytes, checks what the theory promises (helmholtz validate) and draws the energy of one token (helmholtz
landscape). With --output=docs/experiments/mamba_hopfield it makes the figures of docs/equilibrium-tools.md.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from helmholtz.cli.main import main as helmholtz
from helmholtz.data.prepare import DataConfig, prepare
from helmholtz.models.mamba_hopfield import MambaHopfieldConfig
from helmholtz.training.config import RunConfig, TrainConfig
from helmholtz.training.run import train

REGIMES = ("contractive", "descent")
TEXT = "To be, or not to be: that is the question"
TOKEN = 18
"""The second "be"."""


def run_of(regime: str, data: DataConfig, vocab_size: int, steps: int, folder: Path) -> RunConfig:
    model = MambaHopfieldConfig(
        vocab_size=vocab_size, d_model=64, d_state=32, d_head=32, n_layers=2, n_patterns=128, stability=regime,
        max_seq_len=128, adjoint_on_nonconvergence="ignore",  # a token may rest on a saddle for a while
    )  # fmt: skip
    settings = TrainConfig(
        output_dir=str(folder), steps=steps, batch_size=8, seq_len=96, lr=3e-3, warmup_steps=20, threads=1,
        resume="auto", eval_every=steps, save_every=steps,
    )  # fmt: skip
    return RunConfig(architecture="mamba_hopfield", model=model, data=data, train=settings)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200, help="of training")
    parser.add_argument("--output", type=Path, default=Path("results/equilibrium_landscape"))
    arguments = parser.parse_args()
    data = DataConfig(folder="data/shakespeare_bytes", tokenizer="bytes")
    vocab_size, console, failed = prepare(data).metadata.vocab_size, Console(), 0
    for regime in REGIMES:
        folder, output = Path("runs/equilibrium_landscape") / regime, arguments.output / regime
        train(run_of(regime, data, vocab_size, arguments.steps, folder), console=console)
        report = f"--output={output / 'validate.json'}"
        failed += helmholtz(["validate", f"--checkpoint={folder}", f"--text={TEXT}", report])
        place = f"--token={TOKEN}"
        failed += helmholtz(
            ["landscape", f"--checkpoint={folder}", f"--text={TEXT}", place, f"--output={output}"]
        )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

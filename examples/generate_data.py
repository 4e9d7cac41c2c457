"""Draw synthetic sequences that can be learned, and write them as a folder of tokens for training.

    python examples/generate_data.py --output-dir data/synthetic --vocab-size 1000 --seq-length 128

Beside the tokens lies law.json: the sizes, and the loss in nats per token that no model of the data can beat.
"""

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console

from helmholtz.data import write_rows
from helmholtz.interop.seeds.free_transformer.config import DataConfig
from helmholtz.interop.seeds.free_transformer.synthetic_data import SyntheticDataGenerator, describe


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Write synthetic sequences with hidden topics and local copies."
    )
    parser.add_argument("--output-dir", default="data/synthetic", help="folder of the tokens")
    parser.add_argument("--vocab-size", type=int, default=10000)
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--num-train", type=int, default=50000)
    parser.add_argument("--num-val", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--overwrite", action="store_true", help="replace a folder of other tokens")
    arguments = parser.parse_args()
    console = Console(highlight=False)
    try:
        config = DataConfig(
            synthetic_vocab_size=arguments.vocab_size,
            synthetic_seq_length=arguments.seq_length,
            num_train_samples=arguments.num_train,
            num_val_samples=arguments.num_val,
            seed=arguments.seed,
        )
        generator = SyntheticDataGenerator.of(config)
        train, validation = (
            generator.generate_dataset(n) for n in (config.num_train_samples, config.num_val_samples)
        )
        folder = Path(arguments.output_dir)
        write_rows(folder, train, validation, n_ids=arguments.vocab_size, overwrite=arguments.overwrite)
    except ValueError as error:
        sys.exit(f"generate_data: error: {error}")
    law = {"train": describe(generator, train), "validation": describe(generator, validation)}
    (folder / "law.json").write_text(json.dumps(law, indent=2) + "\n")
    console.print(f"{folder}: {train.numel():,} training and {validation.numel():,} validation tokens")
    floor, uniform = (law["validation"][f"{name}_nats_per_token"] for name in ("floor", "uniform"))
    console.print(
        f"nats per token: {uniform:.4f} for uniform guesses, {floor:.4f} at best (within a sequence)"
    )


if __name__ == "__main__":
    main()

"""A text, a model and a run small enough for tests."""

import random
from dataclasses import replace
from pathlib import Path

from helmholtz.data.prepare import DataConfig, prepare
from helmholtz.models.transformer import TransformerConfig
from helmholtz.training.config import RunConfig, TrainConfig

WORDS = [
    "the",
    "king",
    "shall",
    "speak",
    "of",
    "love",
    "and",
    "war",
    "before",
    "night",
    "falls",
    "upon",
    "his",
    "quiet",
    "house",
]


def write_text(file: Path, n_words: int = 4000) -> Path:
    """English-like text, the same each time."""
    generator = random.Random(5)
    lines = [" ".join(generator.choice(WORDS) for _ in range(8)) for _ in range(n_words // 8)]
    file.write_text("\n".join(lines) + "\n")
    return file


def prepare_text(folder: Path) -> DataConfig:
    """Bytes of ``write_text`` under ``folder``, prepared."""
    source = write_text(folder / "text.txt")
    config = DataConfig(
        folder=str(folder / "data"), sources=(str(source),), tokenizer="bytes", validation_fraction=0.1
    )
    prepare(config)
    return config


def tiny_run(data: DataConfig, output: Path, **changes: object) -> RunConfig:
    """A run of 20 steps, evaluated every 5 and saved every 4, with dropout; ``changes`` go to its training."""
    settings = TrainConfig(
        output_dir=str(output),
        steps=20,
        batch_size=2,
        seq_len=16,
        accumulation=2,
        warmup_steps=3,
        eval_every=5,
        eval_tokens=160,
        save_every=4,
        threads=1,
    )
    return RunConfig(
        architecture="transformer",
        model=TransformerConfig(
            vocab_size=257, d_model=16, n_layers=1, n_heads=2, max_seq_len=32, dropout=0.1
        ),
        data=data,
        train=replace(settings, **changes),  # type: ignore[arg-type]
    )

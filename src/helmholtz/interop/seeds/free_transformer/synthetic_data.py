r"""Synthetic sequences that can be learned, in the original names (its own are uniform noise: nothing can be).

The data distribution: a sequence has a hidden topic, one of 8, each as likely. A topic is a distribution :math:`P_k`
over all ids, Zipf's law with the exponent 1.5 in an order of its own. The first two ids are drawn from it; from then on
an id repeats the one two places before with probability 1/2, or else is drawn from the topic:

.. math:: p(x_t | x_{<t}, k) = \tfrac12 [x_t = x_{t-2}] + \tfrac12 P_k(x_t)

A model has to learn the topics' words, to infer the topic, and to look back. The likelihood of a sequence is a sum over
8 topics, so that what no model can beat is known exactly for every data set.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int, Shaped
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from helmholtz._checks import check, check_integer
from helmholtz.interop.seeds.free_transformer.config import DataConfig, read_yaml

TOPICS, EXPONENT, COPY, LAG = 8, 1.5, 0.5, 2
CHUNK = 1024
ROWS = "tokens"


@dataclass(frozen=True, slots=True)
class SyntheticDistribution:
    """The topics over ``vocab_size`` ids. The same for every seed of the sequences."""

    vocab_size: int

    def __post_init__(self) -> None:
        check_integer("vocab_size", self.vocab_size, minimum=2)

    def topics(self) -> Float[Tensor, "K vocab"]:
        """The probability of every id in every topic."""
        generator = torch.Generator().manual_seed(self.vocab_size)
        ranks = torch.stack([torch.randperm(self.vocab_size, generator=generator) for _ in range(TOPICS)])
        weights = (1.0 + ranks.double()) ** -EXPONENT
        return weights / weights.sum(-1, keepdim=True)

    def draw(self, n: int, length: int, *, generator: torch.Generator) -> Int[Tensor, "n length"]:
        """Independent sequences."""
        topic = torch.randint(TOPICS, (n,), generator=generator)
        rows = self.topics()[topic].cumsum(-1)
        uniform = torch.rand(n, length, generator=generator, dtype=torch.float64) * rows[:, -1:]
        fresh = torch.searchsorted(rows, uniform, right=True).clamp(max=self.vocab_size - 1)
        copied = torch.rand(n, length, generator=generator, dtype=torch.float64) < COPY
        parts = list(fresh.split(LAG, dim=1))
        for index in range(1, len(parts)):
            width = parts[index].shape[1]
            here = copied[:, index * LAG : index * LAG + width]
            parts[index] = torch.where(here, parts[index - 1][:, :width], parts[index])
        return torch.cat(parts, dim=1)

    def log_likelihood(self, rows: Int[Tensor, "n length"]) -> Float[Tensor, "n"]:
        """Natural logarithm of each sequence's probability, the topic summed out."""
        topics = self.topics()
        parts = [self._log_likelihood(part, topics) for part in rows.split(CHUNK)]
        return torch.cat(parts)

    def _log_likelihood(self, rows: Tensor, topics: Tensor) -> Tensor:
        drawn = topics[:, rows]
        repeats = (rows[:, LAG:] == rows[:, :-LAG]).double()
        p = torch.cat([drawn[..., :LAG], COPY * repeats + (1 - COPY) * drawn[..., LAG:]], dim=-1)
        return p.log().sum(-1).logsumexp(0) - math.log(TOPICS)


class SyntheticDataGenerator:
    """Draws from ``SyntheticDistribution(vocab_size)``; what comes next depends on the seed and the calls before."""

    def __init__(self, vocab_size: int = 10000, seq_length: int = 512, seed: int = 42) -> None:
        self.distribution = SyntheticDistribution(vocab_size)
        check_integer("seq_length", seq_length)
        self.vocab_size, self.seq_length, self.seed = vocab_size, seq_length, seed
        self._generator = torch.Generator().manual_seed(seed)

    @classmethod
    def of(cls, config: DataConfig) -> "SyntheticDataGenerator":
        """The generator of a config's vocabulary, length and seed."""
        return cls(config.synthetic_vocab_size, config.synthetic_seq_length, config.seed)

    def generate_sample(self) -> Int[Tensor, " T"]:
        """One sequence."""
        return self.generate_dataset(1)[0]

    def generate_batch(self, batch_size: int) -> Int[Tensor, "B T"]:
        """Some sequences."""
        return self.generate_dataset(batch_size)

    def generate_dataset(self, num_samples: int) -> Int[Tensor, "N T"]:
        """Many sequences, drawn a chunk at a time."""
        check_integer("num_samples", num_samples)
        sizes = [CHUNK] * (num_samples // CHUNK) + [num_samples % CHUNK]
        parts = [self.distribution.draw(n, self.seq_length, generator=self._generator) for n in sizes if n]
        return torch.cat(parts)

    def save_dataset(self, num_samples: int, output_path: str | os.PathLike[str]) -> None:
        """Write sequences as safetensors, and beside them ``<stem>_metadata.json`` with the floor of their loss.

        Raises: ValueError for another suffix than ``.safetensors``.
        """
        path = _safetensors(output_path)
        rows = self.generate_dataset(num_samples)
        path.write_bytes(save({ROWS: rows}))  # save_file would make it readable by its owner alone
        values = describe(self, rows)
        (path.parent / f"{path.stem}_metadata.json").write_text(json.dumps(values, indent=2) + "\n")


def describe(generator: SyntheticDataGenerator, rows: Int[Tensor, "N T"]) -> dict[str, float]:
    """Sizes of a data set, and the nats per id that no model of it can beat on average, beside those of uniform ids."""
    return {
        "vocab_size": generator.vocab_size,
        "seq_length": generator.seq_length,
        "num_samples": len(rows),
        "seed": generator.seed,
        "floor_nats_per_token": -generator.distribution.log_likelihood(rows).mean().item() / rows.shape[1],
        "uniform_nats_per_token": math.log(generator.vocab_size),
    }


class SyntheticDataset(Dataset[tuple[Tensor, Tensor]]):
    """Sequences that ``save_dataset`` wrote; an item is a sequence without its last id, and without its first.

    Raises: ValueError for a file that is no safetensors; ``convert`` reads the original's ``.pt`` files.
    """

    def __init__(self, data_path: str | os.PathLike[str]) -> None:
        path = _safetensors(data_path)
        try:
            self.data: Int[Tensor, "N T"] = load_file(path)[ROWS]
        except (OSError, SafetensorError, KeyError) as error:
            raise ValueError(f"data_path: {path} holds no sequences ({error!r})") from error
        beside = path.parent / f"{path.stem}_metadata.json"
        self.metadata: dict[str, float] = read_yaml(beside) if beside.exists() else {}  # JSON is YAML

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, idx: int) -> tuple[Shaped[Tensor, "..."], Shaped[Tensor, "..."]]:
        return self.data[idx, :-1], self.data[idx, 1:]


def create_dataloaders(
    train_path: str | os.PathLike[str],
    val_path: str | os.PathLike[str],
    batch_size: int = 32,
    num_workers: int = 0,
    device: torch.device | None = None,
) -> tuple[DataLoader[tuple[Tensor, Tensor]], DataLoader[tuple[Tensor, Tensor]]]:
    """Loaders of shuffled training and of validation sequences.

    Args:
        num_workers: the sequences are in memory, so that processes to read them only cost (the original: 4).
        device: for CUDA, batches are in pinned memory.
    """
    pinned = device is not None and device.type == "cuda"
    train, validation = SyntheticDataset(train_path), SyntheticDataset(val_path)
    return (
        DataLoader(train, batch_size, shuffle=True, num_workers=num_workers, pin_memory=pinned),
        DataLoader(validation, batch_size, shuffle=False, num_workers=num_workers, pin_memory=pinned),
    )


def _safetensors(path: str | os.PathLike[str]) -> Path:
    check(Path(path).suffix == ".safetensors", "path", os.fspath(path), "the name of a .safetensors file")
    return Path(path)

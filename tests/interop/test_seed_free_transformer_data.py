"""The synthetic sequences of the original spelling: their law is what is written, and it can be learned."""

import itertools
import json
import math
import runpy
import sys
from pathlib import Path

import pytest
import torch
import yaml

from helmholtz.data import TokenDataset
from helmholtz.interop.seeds.free_transformer.synthetic_data import (
    COPY,
    LAG,
    TOPICS,
    SyntheticDataGenerator,
    SyntheticDataset,
    SyntheticDistribution,
    create_dataloaders,
    describe,
)

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_probabilities_of_all_sequences_sum_to_one():
    rows = torch.tensor(list(itertools.product(range(3), repeat=5)))
    total = SyntheticDistribution(3).log_likelihood(rows).exp().sum()
    torch.testing.assert_close(total, torch.ones((), dtype=torch.float64), rtol=1e-12, atol=0)


def test_sequences_are_drawn_with_their_probabilities():
    law, n = SyntheticDistribution(2), 40_000
    rows = law.draw(n, 5, generator=torch.Generator().manual_seed(0))
    every = torch.tensor(list(itertools.product(range(2), repeat=5)))
    p = law.log_likelihood(every).exp()
    weights = 2 ** torch.arange(4, -1, -1)
    counts = torch.bincount((rows * weights).sum(-1), minlength=32).double()
    chi_square = ((counts - n * p).square() / (n * p)).sum()
    assert chi_square < 61.1  # 0.999 quantile of 31 degrees of freedom


def test_topics_differ_and_ids_repeat():
    law = SyntheticDistribution(200)
    topics = law.topics()
    assert topics.shape == (TOPICS, 200) and (topics > 0).all()
    torch.testing.assert_close(topics.sum(-1), torch.ones(TOPICS, dtype=torch.float64))
    assert len(topics.argmax(-1).unique()) > TOPICS / 2
    rows = law.draw(400, 50, generator=torch.Generator().manual_seed(1))
    repeats = (rows[:, LAG:] == rows[:, :-LAG]).double().mean()
    by_chance = topics.square().sum(-1).mean()
    assert abs(repeats - (COPY + (1 - COPY) * by_chance)) < 0.02


def test_one_seed_gives_one_stream_and_the_law_is_the_same_for_all():
    one, same, other = (SyntheticDataGenerator(30, 12, seed=s) for s in (1, 1, 2))
    first, second = one.generate_batch(3), one.generate_sample()
    assert torch.equal(same.generate_batch(3), first) and torch.equal(same.generate_sample(), second)
    assert not torch.equal(other.generate_batch(3), first)
    assert first.shape == (3, 12) and second.shape == (12,) and first.dtype == torch.long
    assert one.generate_dataset(1030).shape == (1030, 12)
    assert torch.equal(one.distribution.topics(), other.distribution.topics())


def test_the_floor_is_between_nothing_and_uniform_and_does_not_depend_on_the_draw():
    floors = []
    for seed in (1, 2):
        generator = SyntheticDataGenerator(100, 64, seed=seed)
        floors.append(describe(generator, generator.generate_dataset(2000))["floor_nats_per_token"])
    assert abs(floors[0] - floors[1]) < 0.03
    assert 1 < floors[0] < math.log(100) / 2


def test_datasets_on_disk_are_read_back(tmp_path):
    generator, same = (SyntheticDataGenerator(30, 12, seed=1) for _ in range(2))
    for name, size in (("train", 10), ("val", 4)):
        generator.save_dataset(size, tmp_path / f"{name}.safetensors")
    dataset, expected = SyntheticDataset(tmp_path / "train.safetensors"), same.generate_dataset(10)
    inputs, targets = dataset[3]
    assert torch.equal(inputs, expected[3, :-1]) and torch.equal(targets, expected[3, 1:])
    assert len(dataset) == 10 and dataset.metadata["num_samples"] == 10
    train, val = create_dataloaders(
        tmp_path / "train.safetensors", tmp_path / "val.safetensors", batch_size=4
    )
    assert sum(len(inputs) for inputs, _ in train) == 10
    assert torch.equal(next(iter(val))[0], same.generate_dataset(4)[:, :-1])
    with pytest.raises(ValueError, match="path must be the name of a .safetensors file"):
        generator.save_dataset(2, tmp_path / "train.pt")
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    for name in ("bad", "none"):
        with pytest.raises(ValueError, match=f"{name}.safetensors holds no sequences"):
            SyntheticDataset(tmp_path / f"{name}.safetensors")


SMALL = dict(d_model=32, n_layers=2, n_heads=2, max_seq_len=32)
RUN = dict(
    steps=60,
    batch_size=16,
    seq_len=32,
    lr=2e-2,
    warmup_steps=5,
    eval_every=60,
    eval_tokens=2048,
    save_every=60,
)


@pytest.fixture
def run_example(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        try:
            runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        except SystemExit as stop:
            return stop.code
        return None

    return run


def test_the_four_scripts_generate_train_and_compare(run_example, tmp_path, capsys):
    data = tmp_path / "data"
    sizes = ("--vocab-size", 40, "--seq-length", 32, "--num-train", 300, "--num-val", 40)
    assert not run_example("generate_data", "--output-dir", data, *sizes)
    law = json.loads((data / "law.json").read_text())
    assert law["validation"]["num_samples"] == 40 and len(TokenDataset(data, "validation")) == 40 * 33
    assert "holds other tokens" in run_example("generate_data", "--output-dir", data, *sizes, "--seed", 1)
    own = {"data": {"folder": str(data), "tokenizer": "ids"}, "train": RUN}
    (tmp_path / "base.yaml").write_text(
        yaml.safe_dump(own | {"model": {"architecture": "transformer", **SMALL}})
    )
    assert not run_example(
        "train_baseline", "--config", tmp_path / "base.yaml", "--output-dir", tmp_path / "base"
    )
    theirs = {
        "model": dict(vocab_size=40, hidden_dim=32, num_layers=2, num_heads=2, latent_dim=4, max_seq_len=32),
        "training": dict(learning_rate=2e-2, warmup_steps=5, max_steps=60, batch_size=16, kappa_free_bits=0.1,
                         eval_every=60, save_every=60, use_fsdp=False),
        "data": {"dataset_name": "synthetic", "data_dir": str(data)},
    }  # fmt: skip
    (tmp_path / "theirs.yaml").write_text(yaml.safe_dump(theirs))
    assert not run_example(
        "train_free", "--config", tmp_path / "theirs.yaml", "--output-dir", tmp_path / "free"
    )
    said = capsys.readouterr().err
    assert "training.max_steps: one cosine" in said and "use_fsdp" not in said
    wrong = run_example("train_free", "--config", tmp_path / "base.yaml", "--output-dir", tmp_path / "free")
    assert "model.architecture: got 'transformer', this script trains 'free_transformer'" in wrong
    runs = ("--baseline-checkpoint", tmp_path / "base", "--free-checkpoint", tmp_path / "free")
    moved = data.rename(tmp_path / "moved")
    assert not run_example("eval_compare", *runs, "--data-dir", moved, "--output-dir", tmp_path / "results")
    rows = json.loads((tmp_path / "results" / "results.json").read_text())["rows"]
    assert [(row["name"], row["kind"]) for row in rows] == [("base", "exact"), ("free", "bound")]
    for row in rows:
        assert math.log(row["validation_perplexity"]) < 0.85 * math.log(40)
    run_example("generate_data", "--output-dir", data, *sizes, "--seed", 1)
    assert run_example("eval_compare", *runs, "--data-dir", data, "--output-dir", tmp_path / "results") == 2
    assert "holds other data than base was trained on" in capsys.readouterr().err

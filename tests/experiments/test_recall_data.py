"""Pairs and maps: what the sequences hold and that their answer is in them."""

import pytest
import torch

from helmholtz.experiments.recall.data import IGNORED, MapTask, PairTask, epochs, sample_maps, sample_pairs


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    "task", [PairTask(), PairTask(n_pairs=1, n_keys=1, n_values=1), PairTask(n_pairs=16)], ids=str
)
def test_the_answer_is_the_value_behind_the_key(task):
    tokens, targets = sample_pairs(task, 300, generator=generator())
    assert tokens.shape == targets.shape == (300, task.n_tokens)
    keys, values = tokens[:, 0:-1:2], tokens[:, 1::2]
    assert (keys < task.n_keys).all() and (values >= task.n_keys).all() and (values < task.vocab_size).all()
    assert all(len(set(row)) == task.n_pairs for row in keys.tolist())
    asked = keys == tokens[:, -1:]
    assert torch.equal(values[asked], targets[:, -1])
    assert (targets[:, :-1] == IGNORED).all()


def test_every_place_is_asked_for_alike():
    task = PairTask(n_pairs=4)
    tokens, _ = sample_pairs(task, 4000, generator=generator())
    place = (tokens[:, 0:-1:2] == tokens[:, -1:]).int().argmax(1)
    assert (torch.bincount(place) / 1000 - 1).abs().max() < 0.1


def test_pairs_are_decided_by_the_generator():
    first, second, other = (sample_pairs(PairTask(), 8, generator=generator(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_maps_share_inputs_and_labels():
    task = MapTask(n_tasks=3, n_inputs=40, n_labels=5)
    tokens, labels = sample_maps(task, generator=generator())
    assert tokens.shape == (3, 40, 2) and labels.shape == (3, 40)
    assert torch.equal(tokens[0, :, 1], tokens[2, :, 1])
    assert tokens[:, :, 0].unique(dim=1).flatten().tolist() == [45, 46, 47]
    assert len(tokens.flatten(0, 1).unique(dim=0)) == 120
    assert labels.unique().tolist() == [0, 1, 2, 3, 4] and tokens.max() == task.vocab_size - 1
    assert not torch.equal(labels[0], labels[1])


def test_everything_comes_once_before_anything_comes_twice():
    batches = epochs(10, 7, 4, generator=generator())
    assert [len(batch) for batch in batches] == [4] * 7
    order = torch.cat(batches)
    for start in (0, 10):
        assert sorted(order[start : start + 10].tolist()) == list(range(10))
    assert order[:10].tolist() != order[10:20].tolist()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PairTask(n_pairs=17), "n_keys must be an integer of at least 17, got 16"),
        (lambda: PairTask(n_pairs=0), "n_pairs must be"),
        (lambda: MapTask(n_labels=1), "n_labels must be an integer of at least 2"),
        (lambda: sample_pairs(PairTask(), 0, generator=generator()), "n_sequences must be"),
        (lambda: epochs(0, 1, 1, generator=generator()), "n_items must be"),
    ],
)
def test_sizes_are_checked(call, message):
    with pytest.raises(ValueError, match=message):
        call()

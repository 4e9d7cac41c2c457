"""Continual learning: its measures, when the memory is written and which answer counts."""

import json

import pytest
import torch

from helmholtz.experiments.continual.run import (
    ContinualConfig,
    ContinualLearning,
    ContinualResult,
    joint_accuracy,
    last_features,
)
from helmholtz.experiments.recall.data import MapTask
from helmholtz.models.mamba_hopfield import MambaHopfield, MambaHopfieldConfig
from helmholtz.models.transformer import Transformer, TransformerConfig

TASK = MapTask(n_tasks=3, n_inputs=20, n_labels=5)


def decoder(task=TASK, seed=0):
    torch.manual_seed(seed)
    return Transformer(
        TransformerConfig(vocab_size=task.vocab_size, d_model=32, n_layers=1, n_heads=2, max_seq_len=2)
    )


def config(**changes):
    return ContinualConfig(**{"task": TASK, "steps": 8, "batch_size": 16, "n_slots": 60, **changes})


def test_measures_of_a_matrix():
    matrix = ((0.9, 0.2, 0.1), (0.95, 0.8, 0.3), (0.5, 0.6, 1.0))
    result = ContinualResult(matrix, 0.1, 0, 0, None, None)
    assert result.accuracy == pytest.approx(0.7)
    assert result.backward_transfer == pytest.approx(((0.5 - 0.9) + (0.6 - 0.8)) / 2)
    assert result.forgetting == pytest.approx(((0.95 - 0.5) + (0.8 - 0.6)) / 2)
    assert result.forward_transfer == pytest.approx(((0.2 - 0.1) + (0.3 - 0.1)) / 2)
    assert result.diagonal == pytest.approx(0.9)
    assert result.to_dict()["forgetting"] == result.forgetting and result.to_dict()["matrix"] == matrix
    assert ContinualResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result
    one = ContinualResult(((0.5,),), 0.1, 0, 0, None, None)
    assert one.forgetting == one.backward_transfer == one.forward_transfer == 0


def test_every_pair_is_written_once_when_it_is_first_read():
    learning = ContinualLearning(decoder(), config())
    seen = []
    learning.learn(0, lambda number, step, loss: seen.append((number, step, learning.num_writes)))
    assert seen == [(0, 0, 16), *((0, step, 20) for step in range(1, 8))]
    assert learning.memory.num_stored == 20
    learning.learn(1)
    assert learning.num_writes == 40
    assert learning.measure(0) == learning.measure(1) == 1


def test_the_memory_answers_only_what_it_knows():
    learning = ContinualLearning(decoder(), config())
    learning.learn(0)
    alone = ContinualLearning(decoder(), config(keys="none"))
    alone.learn(0)
    assert learning.measure(0) == 1
    assert learning.measure(2) == alone.measure(2)  # the same decoder, and no stored key


def test_a_run_with_and_without_memory():
    with_memory, alone = (ContinualLearning(decoder(), config(keys=keys)).run() for keys in ("ngram", "none"))
    assert with_memory.accuracy == 1 and with_memory.forgetting == 0 and with_memory.answered == 1
    assert with_memory.key_cosine == pytest.approx(1.0, abs=1e-5)
    assert with_memory.num_writes == 60 and with_memory.memory_bytes == 60 * 128 * 4
    assert alone.num_writes == alone.memory_bytes == 0 and alone.answered is alone.key_cosine is None
    assert len(alone.matrix) == 3 and alone.accuracy < with_memory.accuracy
    again = ContinualLearning(decoder(), config(keys="none")).run()
    assert again == alone


def test_features_drift_and_n_grams_do_not():
    result = ContinualLearning(decoder(), config(keys="features", steps=15)).run()
    assert result.key_cosine < 0.9 and result.answered < 1


def test_features_are_what_the_output_matrix_reads():
    model = decoder()
    tokens = ContinualLearning(model, config()).tokens[0]
    features = last_features(model, tokens)
    torch.testing.assert_close(model.unembed(features), model(tokens).logits[:, -1])
    assert not features.requires_grad and model.training and not model.unembed._forward_pre_hooks


def test_a_full_memory_forgets_the_oldest_or_some_of_all():
    few = [config(n_slots=30, policy=policy, steps=4) for policy in ("fifo", "reservoir")]
    fifo, reservoir = (ContinualLearning(decoder(), settings).run() for settings in few)
    assert fifo.answered == reservoir.answered == pytest.approx(0.5)
    assert fifo.matrix[-1][0] < 0.7 and fifo.matrix[-1][2] == 1
    assert reservoir.matrix[-1][0] > fifo.matrix[-1][0]


def test_the_equilibrium_model_as_the_learner():
    torch.manual_seed(0)
    model = MambaHopfield(
        MambaHopfieldConfig(
            vocab_size=TASK.vocab_size, d_model=32, d_head=16, n_layers=1, n_patterns=8, max_seq_len=2
        )
    )
    result = ContinualLearning(model, config(steps=2, keys="features")).run()
    assert 0 <= result.accuracy <= 1 and result.num_writes == 60


def test_joint_training_sees_every_map():
    task = MapTask(n_tasks=2, n_inputs=5, n_labels=3)
    accuracy = joint_accuracy(decoder(task), ContinualConfig(task=task, steps=60, batch_size=16, lr=1e-2))
    assert min(accuracy) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be an integer"),
        ({"n_slots": 0}, "n_slots must be an integer"),
        ({"lr": 0.0}, "lr must be a finite number above 0"),
    ],
)
def test_settings_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_a_model_with_too_small_a_vocabulary_is_refused():
    with pytest.raises(ValueError, match="task: 115 token ids, the model's vocabulary has 28"):
        ContinualLearning(decoder(), ContinualConfig())

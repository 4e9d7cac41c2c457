"""Pairs in a context: a decoder that learns to recall them, and a memory that need not."""

import math

import pytest
import torch

from helmholtz.experiments.recall.data import PairTask
from helmholtz.experiments.recall.run import InContextRecall, recall_by_memory
from helmholtz.models.transformer import Transformer, TransformerConfig


def decoder(task, d_model=32):
    torch.manual_seed(0)
    config = TransformerConfig(
        vocab_size=task.vocab_size, d_model=d_model, n_layers=2, n_heads=2, max_seq_len=task.n_tokens
    )
    return Transformer(config)


def test_written_pairs_are_recalled_without_training():
    """L5: 32 pairs in every context."""
    result = recall_by_memory(PairTask(n_pairs=32, n_keys=64, n_values=64), 100)
    assert result.accuracy >= 0.99 and result.steps == 0 and result.chance == 1 / 64


def test_an_untrained_decoder_is_at_chance_and_one_pair_is_learned():
    task = PairTask(n_pairs=1, n_keys=4, n_values=4)
    recall = InContextRecall(decoder(task), task)
    before = recall.evaluate(400)
    assert before.steps == 0 and before.accuracy < 0.45 and before.chance == 0.25
    losses = []
    recall.train(60, callback=lambda step, loss: losses.append((step, loss)))
    after = recall.evaluate(400)
    assert after.accuracy > 0.95 and after.steps == 60
    assert [step for step, _ in losses] == list(range(1, 61)) and losses[-1][1] < losses[0][1]
    assert math.isfinite(losses[0][1]) and recall.model.training


def test_a_model_with_too_small_a_vocabulary_is_refused():
    with pytest.raises(ValueError, match="task: 32 token ids, the model's vocabulary has 8"):
        InContextRecall(decoder(PairTask(n_pairs=1, n_keys=4, n_values=4)), PairTask())

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook

from helmholtz.data.prepare import DataConfig, prepare
from helmholtz.data.tokens import TokenDataset
from helmholtz.evals.language import _windows, decode_tokens_per_second, evaluate_language
from helmholtz.models import MODELS
from helmholtz.models.base import evaluation_mode
from helmholtz.models.outputs import LMOutput
from helmholtz.models.transformer import Transformer, TransformerConfig
from hybrid_cases import hybrid_config
from tiny_runs import prepare_text


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return TokenDataset(prepare_text(tmp_path_factory.mktemp("text")).folder, "validation")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Transformer(
        TransformerConfig(vocab_size=257, d_model=16, n_layers=1, n_heads=2, max_seq_len=64, dropout=0.3)
    )


def test_a_uniform_model_pays_log_of_the_vocabulary_for_every_token(data, model, monkeypatch):
    monkeypatch.setattr(model, "forward", lambda tokens: LMOutput(torch.zeros(*tokens.shape, 257)))
    result = evaluate_language(model, data, seq_len=50)
    assert result.nats_per_token == pytest.approx(math.log(257), rel=1e-6)
    assert result.perplexity == pytest.approx(257, rel=1e-5)
    assert result.n_tokens == len(data)
    # bytes are tokens here, and the text is one document: its end token is predicted, but is no byte of the text
    assert result.n_bytes == len(data) - 1
    assert result.bits_per_byte == pytest.approx(math.log2(257) * len(data) / (len(data) - 1), rel=1e-6)


@pytest.mark.parametrize("n", [1, 2, 9, 10, 11, 16, 47])
@pytest.mark.parametrize("overlap", [0, 3, 5, 9])
def test_every_token_is_predicted_once_from_its_predecessor(n, overlap):
    stream = torch.arange(100, 100 + n + 1)
    predicted = []
    for inputs, targets in _windows(stream, 10, overlap, 2):
        counted = targets != -100
        assert torch.equal(targets[counted], inputs[counted] + 1)
        predicted += targets[counted].tolist()
        first = counted.int().argmax(1)  # context before the first counted target of a row
        assert ((first == 0) | (first >= overlap)).all()
    assert sorted(predicted) == stream[1:].tolist()


def test_a_text_that_fits_in_a_window_is_one_pass(model, tmp_path):
    text = "love and war before night"
    (tmp_path / "text.txt").write_text(text)
    settings = DataConfig(
        folder=str(tmp_path / "data"), sources=(str(tmp_path / "text.txt"),), tokenizer="bytes"
    )
    data = TokenDataset(prepare(replace(settings, validation_fraction=0.5)).folder, "validation")
    tokens = data.read(torch.tensor([0]), len(data))
    with evaluation_mode(model):
        logits = model(torch.cat([torch.tensor([[256]]), tokens[:, :-1]], 1)).logits
    expected = torch.nn.functional.cross_entropy(logits[0], tokens[0]).item()
    assert evaluate_language(model, data, seq_len=64).nats_per_token == pytest.approx(expected, rel=1e-6)


def test_the_batch_size_does_not_matter_and_more_context_changes_the_result(data, model):
    one, many = (evaluate_language(model, data, seq_len=32, batch_size=size) for size in (1, 7))
    assert one.nats_per_token == pytest.approx(many.nats_per_token, rel=1e-6)
    assert evaluate_language(model, data, seq_len=32, overlap=0).nats_per_token != one.nats_per_token
    assert model.training


def test_windows_that_cannot_be_are_refused(data, model):
    with pytest.raises(ValueError, match="seq_len must be at most the model's 64, got 65"):
        evaluate_language(model, data, seq_len=65)
    with pytest.raises(ValueError, match=r"overlap must be in \[0, seq_len = 32\), got 32"):
        evaluate_language(model, data, seq_len=32, overlap=32)
    for size in (-1, 0):
        with pytest.raises(ValueError, match=f"batch_size must be an integer of at least 1, got {size}"):
            evaluate_language(model, data, seq_len=32, batch_size=size)


def test_decoding_speed_counts_all_rows(model):
    assert decode_tokens_per_second(model, n_tokens=8) > 1
    assert decode_tokens_per_second(model, n_tokens=8, batch_size=64) > 2 * decode_tokens_per_second(
        model, n_tokens=8
    )
    with pytest.raises(ValueError, match="max_seq_len"):
        decode_tokens_per_second(model, n_tokens=64)


@pytest.mark.parametrize("name", MODELS)
def test_decoding_speed_is_of_the_modules_of_every_model(name):
    """No model has a path of its own that others lack: each token goes through each of the model's blocks."""
    config = MODELS[name].config_class
    sizes = {"vocab_size": 20, "d_model": 64, "n_layers": 2, "max_seq_len": 32}
    built = hybrid_config("mixed", "middle", "equilibrium") if name == "decoder" else config(**sizes)
    model = MODELS[name](built)
    calls = dict.fromkeys(model.blocks, 0)

    def count(module, arguments, output):
        if module in calls:
            calls[module] += 1

    # hooks of the modules themselves could send a model down another path; these are not on any module
    handle = register_module_forward_hook(count)
    try:
        decode_tokens_per_second(model, n_tokens=8)
    finally:
        handle.remove()
    assert set(calls.values()) == {4 + 8}  # the warm-up, and a prompt and seven tokens

"""Bits per byte of a part of a text divide by the bytes of that part, wherever they are reported."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helmholtz.data import BPETokenizer, ByteTokenizer, DataConfig, IdTokenizer, prepare
from helmholtz.data.tokens import TokenDataset, bits_per_byte
from helmholtz.evals.language import evaluate_language
from helmholtz.evals.latent import evaluate_bounds, report
from helmholtz.experiments.equilibrium.run import unigram_bits
from helmholtz.experiments.language.run import quality
from helmholtz.models.free_transformer import FreeTransformer, FreeTransformerConfig
from helmholtz.models.transformer import Transformer, TransformerConfig
from helmholtz.training.config import TrainConfig
from helmholtz.training.loop import Trainer

SEQ_LEN, WINDOWS = 16, 8
ASCII, CJK = "the king shall speak of love before night falls\n" * 40, "日本語の本を読む人々がいる\n" * 80
BPE = BPETokenizer.train([ASCII * 4, CJK], 330)
BYTE_LEVEL = [ByteTokenizer(), BPE]


@pytest.mark.parametrize("tokenizer", BYTE_LEVEL, ids=["bytes", "bpe"])
@given(text=st.text(st.characters(codec="utf-8")))
def test_the_bytes_of_tokens_are_those_of_the_text(tokenizer, text):
    counts = tokenizer.byte_counts()
    assert len(counts) == tokenizer.vocab_size and counts[tokenizer.eos_id] == 0
    assert sum(counts[i] for i in tokenizer.encode(text)) == len(text.encode())


def test_parts_of_a_character_and_added_tokens_count_their_bytes():
    ids = BPE.encode("🎭")  # never seen: a token per byte
    assert [BPE.byte_counts()[i] for i in ids] == [1, 1, 1, 1]
    backend = BPE.copy_of_backend()
    backend.add_special_tokens(["<é>"])
    foreign = BPETokenizer(backend)
    (special,) = foreign.encode("<é>")
    assert foreign.byte_counts()[special] == 4 and foreign.byte_counts()[foreign.eos_id] == 0
    assert IdTokenizer(12).byte_counts() == [2] * 10 + [3, 3, 0]


def test_no_bytes_are_infinitely_many_bits():
    assert bits_per_byte(1.0, 0) == math.inf
    assert bits_per_byte(math.log(2), 4) == 0.25


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def data(request, tmp_path_factory):
    """Both splits: text of ASCII, then text of three bytes per character."""
    folder = tmp_path_factory.mktemp(request.param)
    for name in ("train", "validation"):
        (folder / f"{name}.txt").write_text(ASCII + CJK)
    config = DataConfig(
        folder=str(folder / "data"), sources=(str(folder / "train.txt"),), tokenizer=request.param,
        validation_sources=(str(folder / "validation.txt"),), vocab_size=330 if request.param == "bpe" else None,
    )  # fmt: skip
    return prepare(config)


def uniform(data, model_class=Transformer, config_class=TransformerConfig, **sizes):
    """A model that gives all tokens the same probability."""
    shared = {"d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": SEQ_LEN}
    model = model_class(config_class(vocab_size=data.metadata.vocab_size, **shared, **sizes))
    torch.nn.init.zeros_(model.embed.weight)
    return model


def uniform_planned(data):
    return uniform(data, FreeTransformer, FreeTransformerConfig, n_latent_bits=2)


def expected(data, tokens):
    """Bits per byte of a uniform model on these tokens, of which the text is decoded whole."""
    text = data.tokenizer.decode(tokens.flatten().tolist())
    assert "\ufffd" not in text
    return tokens.numel() * math.log2(data.metadata.vocab_size) / len(text.encode())


def ascii_part(split):
    return split.read(torch.tensor([1]), WINDOWS * SEQ_LEN)


def test_training_and_its_validation(data, tmp_path):
    config = TrainConfig(
        output_dir=str(tmp_path), steps=1, batch_size=2, seq_len=SEQ_LEN, accumulation=2, warmup_steps=0,
        eval_tokens=WINDOWS * SEQ_LEN, device="cpu",
    )  # fmt: skip
    trainer = Trainer(uniform(data), data.train, data.validation, config)
    right = expected(data, ascii_part(data.validation))
    assert trainer.evaluate().validation_bits_per_byte == pytest.approx(right, rel=1e-5)
    rows = torch.cat([tokens[:, 1:] for tokens, _ in trainer.batches.of_step(0)])
    n_bytes = data.train.count_bytes(rows)
    right = rows.numel() * math.log2(data.metadata.vocab_size) / n_bytes
    assert trainer.step().bits_per_byte == pytest.approx(right, rel=1e-5)


def test_the_study_of_languages(data):
    first = data.validation.read(torch.tensor([0]), WINDOWS * SEQ_LEN)
    right = expected(data, first)
    exact = quality(uniform(data), data.validation, WINDOWS * SEQ_LEN, SEQ_LEN, plans=2)
    assert exact["bits_per_byte"] == pytest.approx(right, rel=1e-5)
    bound = quality(uniform_planned(data), data.validation, WINDOWS * SEQ_LEN, SEQ_LEN, plans=2)
    assert bound["bounds"]["prior_cross_entropy"] == pytest.approx(right, rel=1e-5)
    assert bound["bits_per_byte"] == pytest.approx(right, rel=1e-2)  # the mixture's own draws


def test_bounds_on_some_windows(data):
    found = evaluate_bounds(uniform_planned(data), data.validation, seq_len=SEQ_LEN, n_samples=1, n_windows=3)
    available = -(-len(data.validation) // SEQ_LEN)
    starts = torch.tensor([index * available // 3 * SEQ_LEN for index in range(3)])
    n_bytes = data.validation.count_bytes(data.validation.read(starts, SEQ_LEN))
    bits = found.n_tokens * math.log2(data.metadata.vocab_size) / n_bytes
    assert (found.n_tokens, found.n_bytes) == (3 * SEQ_LEN, n_bytes)
    assert report(found)["prior_cross_entropy_bits_per_byte"] == pytest.approx(bits, rel=1e-5)


def test_a_whole_split(data):
    split = data.validation
    right = len(split) * math.log2(data.metadata.vocab_size) / len((ASCII + CJK).encode())
    found = evaluate_language(uniform(data), split, seq_len=SEQ_LEN)
    assert found.n_bytes == split.n_bytes == len((ASCII + CJK).encode())
    assert found.bits_per_byte == pytest.approx(right, rel=1e-5)
    bounds = evaluate_bounds(uniform_planned(data), split, seq_len=SEQ_LEN, n_samples=1)
    assert report(bounds)["prior_cross_entropy_bits_per_byte"] == pytest.approx(right, rel=1e-5)
    counts = torch.bincount(split.read(torch.tensor([0]), len(split))[0], minlength=split.vocab_size) + 1.0
    asked = -(counts / counts.sum()).log2()[split.read(torch.tensor([0]), len(split))[0]].sum().item()
    assert unigram_bits(data.train, split) == pytest.approx(asked / split.n_bytes, rel=1e-5)


def test_a_tokenizer_of_another_vocabulary_is_refused(data, tmp_path):
    opened = TokenDataset(data.folder, "validation")
    opened.folder = tmp_path
    IdTokenizer(12).save(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="the tokenizer's vocab_size must be .*, got 13"):
        opened.count_bytes(torch.tensor([0]))
